"""Running an application until it is told to stop: one line when it listens, a clear word when the port is taken, a quiet end."""

from __future__ import annotations

import errno
import gc
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import nullcontext
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from shared.errors import EngineError, SettingsError
from shared.http.connections import bounded
from shared.http.metrics import Measured, exposed, forget_process, told_of
from shared.http.workers import supervise

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from shared.http.limits import Counts

DRAIN_S = 7
"""Seconds that requests in flight get to finish after a signal to stop: container engines kill 10 s after theirs."""
GC_THRESHOLDS = (5_000, 10, 5)
"""Python's own look for garbage after every 700 objects, which takes a tenth of a server's time."""
KEEP_ALIVE_S = 30
"""Seconds that a connection stays open between two requests: longer than clients keep theirs, else they meet a closed one."""


class _Server(uvicorn.Server):
    announcement = ""
    drain_s = DRAIN_S

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self.announcement:
            print(self.announcement, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # a batch under way or a model being loaded is a thread, which nothing else ends before it is done
        end = threading.Timer(self.drain_s + 1, _end)
        end.daemon = True
        end.start()
        await super().shutdown(sockets)


def _end() -> None:
    logging.shutdown()
    os._exit(0)


def serve(
    app: FastAPI,
    *,
    host: str,
    port: int,
    name: str,
    until_stdin_closes: bool = False,
    metrics_port: int | None = None,
    registry: CollectorRegistry | None = None,
    drain_s: int | None = None,
    workers: int = 1,
    counts: Counts | None = None,
    spare_files: int = 0,
    measured: bool = False,
) -> int:
    """Serve until SIGTERM or Ctrl-C, finish what is in flight, return 0. Port 0 picks a free one.

    What is not finished `drain_s` (DRAIN_S) after the signal is given up, and soon after that the process ends with 0 whatever it is doing.

    Prints "NAME: listening on URL" once it does. `until_stdin_closes`: end as well when the process that started this one
    is gone, so that no server outlives it. `metrics_port`: count and time requests, and tell the numbers of `registry` there, on the
    same host, in a second line "NAME: metrics on URL" (see metrics.py). `workers`: processes that answer; one that dies is replaced,
    and gives back what it held in `counts`. `spare_files`: connections that the engine may need itself. `measured`: count and time
    requests without a port for the numbers as well, since the application tells them itself.
    Raises SettingsError if an address cannot be had, EngineError if startup fails.
    """
    drain_s = DRAIN_S if drain_s is None else drain_s
    registry = registry or CollectorRegistry()
    listeners = _listen(host, port, workers)
    shown = f"[{host}]" if ":" in host else host
    announcement = f"{name}: listening on http://{shown}:{listeners[0].getsockname()[1]}/v1"
    application = Measured(app, registry) if measured or metrics_port is not None else app
    told = nullcontext() if metrics_port is None else exposed(told_of(registry), host=host, port=metrics_port, option="--metrics-port")
    with told as url:
        if url:
            announcement += f"\n{name}: metrics on {url}"
        if workers == 1:
            _run(
                application,
                listeners[0],
                name=name,
                announcement=announcement,
                drain_s=drain_s,
                spare_files=spare_files,
                until_stdin_closes=until_stdin_closes,
            )
            return 0

        def work(index: int) -> None:
            for other in listeners[:index] + listeners[index + 1 :]:
                other.close()  # else it would still be open when its own worker has stopped to accept
            if counts is not None:
                counts.worker = index
            _run(application, listeners[index], name=name, announcement="", drain_s=drain_s, spare_files=spare_files)

        def stop_listening() -> None:
            for listener in listeners:
                listener.close()

        def died(index: int, pid: int) -> None:
            forget_process(pid)
            if counts is not None:
                counts.forget(index)

        supervise(
            work,
            workers,
            started=lambda: print(announcement, flush=True),
            died=died,
            stopping=stop_listening,
            end_s=drain_s + 2,
            until_stdin_closes=until_stdin_closes,
        )
    return 0


def _run(
    app: ASGIApp,
    listener: socket.socket,
    *,
    name: str,
    announcement: str,
    drain_s: int,
    spare_files: int,
    until_stdin_closes: bool = False,
) -> None:
    """Serve in this process until it is told to stop."""
    config = uvicorn.Config(
        app,
        http=bounded(spare_files),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=drain_s,
    )
    server = _Server(config)
    server.announcement, server.drain_s = announcement, drain_s

    def stop(signum: int = 0, frame: FrameType | None = None) -> None:
        server.should_exit = True

    # uvicorn raises a signal it has handled once more when it is done: it must then find a handler that does no harm
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    if until_stdin_closes:
        call_at_end_of_stdin(stop)
    gc.collect()
    gc.freeze()  # what is there now stays: it need not be looked through again and again
    gc.set_threshold(*GC_THRESHOLDS)
    server.run(sockets=[listener])
    logging.shutdown()
    if not server.started and not server.should_exit:
        raise EngineError(f"{name}: the server did not start; its log tells why")


def call_at_end_of_stdin(stop: Callable[[], None]) -> None:
    """Call `stop` when standard input ends: the process that started this one is gone."""

    def wait_for_the_end() -> None:
        while os.read(0, 4096):  # not sys.stdin: its lock, held by this thread, would abort the interpreter's end
            pass
        stop()

    threading.Thread(target=wait_for_the_end, daemon=True).start()


def _listen(host: str, port: int, sockets: int) -> list[socket.socket]:
    """That many sockets at one address, among which the system spreads connections; a worker that dies leaves its own to the next."""
    first = _bind(host, port)
    if sockets == 1:
        first.listen()  # until one of them listens, several sockets may have the same address
        return [first]
    port = first.getsockname()[1]  # it is free, or what has it does not share
    first.close()
    listeners = [_bind(host, port, shared=True) for _ in range(sockets)]
    for listener in listeners:
        listener.listen()
    return listeners


def _bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
    except socket.gaierror as exc:
        raise SettingsError(f"--host {host}: no such address of this machine") from exc
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            raise SettingsError(f"--port {port}: another process listens there; give another --port (0 picks a free one)") from exc
        if exc.errno == errno.EADDRNOTAVAIL:
            raise SettingsError(f"--host {host}: no address of this machine") from exc
        raise SettingsError(f"--port {port} on --host {host}: {exc.strerror}") from exc
    return listener
