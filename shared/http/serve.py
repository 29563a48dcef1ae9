"""Running an application until it is told to stop: one line when it listens, a clear word when the port is taken, a quiet end."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
from contextlib import nullcontext
from types import FrameType

import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from shared.errors import EngineError, SettingsError
from shared.http.metrics import Measured, exposed

DRAIN_S = 7
"""Seconds that requests in flight get to finish after a signal to stop: container engines kill 10 s after theirs."""


class _Server(uvicorn.Server):
    announcement = ""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(self.announcement, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # a batch under way or a model being loaded is a thread, which nothing else ends before it is done
        end = threading.Timer(DRAIN_S + 1, os._exit, [0])
        end.daemon = True
        end.start()
        await super().shutdown(sockets)


def serve(app: FastAPI, *, host: str, port: int, name: str, until_stdin_closes: bool = False, metrics_port: int | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C, finish what is in flight, return 0. Port 0 picks a free one.

    What is not finished DRAIN_S after the signal is given up, and soon after that the process ends with 0 whatever it is doing.

    Prints "NAME: listening on URL" once it does. `until_stdin_closes`: end as well when the process that started this one
    is gone, so that no server outlives it. `metrics_port`: count and time requests, and tell the numbers there, on the same
    host, in a second line "NAME: metrics on URL" (see metrics.py).
    Raises SettingsError if an address cannot be had, EngineError if startup fails.
    """
    listener = _listen(host, port)
    taken = listener.getsockname()[1]
    registry = CollectorRegistry()
    application = app if metrics_port is None else Measured(app, registry)
    server = _Server(uvicorn.Config(application, log_level="warning", access_log=False, timeout_graceful_shutdown=DRAIN_S))
    shown = f"[{host}]" if ":" in host else host
    server.announcement = f"{name}: listening on http://{shown}:{taken}/v1"

    def stop(signum: int = 0, frame: FrameType | None = None) -> None:
        server.should_exit = True

    # uvicorn raises a signal it has handled once more when it is done: it must then find a handler that does no harm
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    if until_stdin_closes:

        def wait_for_the_end() -> None:
            while os.read(0, 4096):  # not sys.stdin: its lock, held by this thread, would abort the interpreter's end
                pass
            stop()

        threading.Thread(target=wait_for_the_end, daemon=True).start()
    metrics = nullcontext() if metrics_port is None else exposed(registry, host=host, port=metrics_port, option="--metrics-port")
    with metrics as url:
        if url:
            server.announcement += f"\n{name}: metrics on {url}"
        server.run(sockets=[listener])
    if not server.started and not server.should_exit:
        raise EngineError(f"{name}: the server did not start; its log tells why")
    return 0


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()  # until one of them listens, several sockets may have the same address
    except socket.gaierror as exc:
        raise SettingsError(f"--host {host}: no such address of this machine") from exc
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            raise SettingsError(f"--port {port}: another process listens there; give another --port (0 picks a free one)") from exc
        if exc.errno == errno.EADDRNOTAVAIL:
            raise SettingsError(f"--host {host}: no address of this machine") from exc
        raise SettingsError(f"--port {port} on --host {host}: {exc.strerror}") from exc
    return listener
