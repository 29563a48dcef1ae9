"""A command on a cluster that is reached through Ray Client (ray://HOST:PORT): done there, seen here.

Neither Ray Data nor Ray Train works through Ray Client (2.60). So a process of the cluster does the whole command, as `--on auto`; what it
says, its exit code and a Ctrl-C are passed on. Where this end goes away it ends too, once Ray has noticed: within half a minute.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from shared.cli import PART_OF_A_RUN
from shared.cluster.ways import connected, refuse_unless_ready
from shared.commands import interruptible
from shared.errors import INTERRUPTED, SettingsError, StorageError

SETTINGS = "DISTILL_"
"""Variables of the environment that begin so go there with the command."""
WAIT_S = 0.5
COMMAND = "import signal; signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT}); from shared.cli import entry; entry()"
"""`distill`, which hears a Ctrl-C: Ray's actors block it, and so does what they start."""


class Doing:
    """The process that does it, as an actor of the cluster's."""

    def start(self, arguments: Sequence[str], folder: str, settings: Mapping[str, str]) -> str:
        """Returns what is wrong, if anything."""
        import ray

        address = ray.get_runtime_context().gcs_address
        environment = {**os.environ, **settings, PART_OF_A_RUN: "1", "RAY_ADDRESS": address}
        command = [sys.executable, "-c", COMMAND, *arguments]
        pipe = subprocess.PIPE
        try:
            # its standard input closes with this actor, which ends it
            self._process = subprocess.Popen(command, cwd=folder, env=environment, stdin=pipe, stdout=pipe, stderr=pipe)
        except OSError as exc:
            return f"{folder} is not on node {os.uname().nodename} ({exc.strerror}); go to a folder that all nodes share"
        self._said: queue.Queue[tuple[int, bytes] | None] = queue.Queue()
        for number, file in ((1, self._process.stdout), (2, self._process.stderr)):
            threading.Thread(target=self._read, args=(number, file), daemon=True).start()
        self._open = 2
        return ""

    def _read(self, number: int, file: Any) -> None:
        for line in file:
            self._said.put((number, line))
        self._said.put(None)

    def more(self) -> tuple[list[tuple[int, bytes]], int | None]:
        """Lines with the number of their stream, as they come, and the exit code when there are no more."""
        lines: list[tuple[int, bytes]] = []
        with suppress(queue.Empty):
            while self._open:
                if (line := self._said.get(timeout=0 if lines else WAIT_S)) is None:
                    self._open -= 1
                else:
                    lines.append(line)
        return lines, None if self._open else self._process.wait()

    def tell(self, signum: int) -> None:
        self._process.send_signal(signum)


def done_there(on: str, arguments: Sequence[str]) -> int:
    """Do `distill ARGUMENTS` on the cluster, in a folder of the same path. Returns its exit code.

    Raises SettingsError where there is no cluster, or nodes that lack the package or the folder; StorageError where that process is lost;
    KeyboardInterrupt when a Ctrl-C has ended it there.
    """
    there = ["auto" if word == on else "--on=auto" if word == f"--on={on}" else word for word in arguments]
    settings = {name: value for name, value in os.environ.items() if name.startswith(SETTINGS)}
    with connected(on) as ray, interruptible() as stopping:
        import grpc

        refuse_unless_ready(ray, None)
        # two at once: it is told of a signal while it waits for a line
        doing = ray.remote(Doing).options(num_cpus=0, max_concurrency=2).remote()
        told, code = False, None
        try:
            if wrong := ray.get(doing.start.remote(there, os.getcwd(), settings)):
                raise SettingsError(f"--on {on}: {wrong}")
            while code is None:
                if stopping() and not told:
                    ray.get(doing.tell.remote(stopping.signal))
                    told = True
                lines, code = ray.get(doing.more.remote())
                for number, line in lines:
                    with suppress(OSError):  # nobody listens any more, which is no reason to end
                        os.write(number, line)
        except (ConnectionError, grpc.RpcError) as exc:
            said = (str(exc).strip() or type(exc).__name__).splitlines()[0]
            raise StorageError(f"--on {on}: the cluster was lost: {said}; run the same command again") from exc
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code < 0:
        raise StorageError(f"--on {on}: the process that did it there was killed by signal {-code}; run the same command again")
    return int(code)
