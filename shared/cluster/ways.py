"""Ways to a Ray cluster, and what must hold there before anything is asked."""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import socket
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import shared.errors
from shared import __version__
from shared.commands import install
from shared.errors import DistillError, SettingsError, StorageError
from shared.storage import Storage

LOCAL = "local-cluster"
CLIENT = "ray://"
ASK_S, LOST_S = 5.0, 45.0
"""Seconds between two questions whether the cluster is there, and without an answer until it is taken for lost."""
REACHED_S = 10.0
PROBE_S = 60.0
"""Seconds in which every node must have answered what it is asked first."""


@contextmanager
def connected(on: str, *, logs: bool = False) -> Iterator[Any]:
    """Ray, connected to the cluster that `on` names, until the block ends.

    local-cluster or local-cluster:N, N processes on this machine; auto, the cluster this process is a job of; HOST:PORT.
    `logs`: what its workers print is printed here.
    Raises SettingsError where it cannot be reached, or runs other versions of Ray or Python, and StorageError where it is lost meanwhile.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not logs:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its own files have all of it
    local = re.fullmatch(rf"{LOCAL}(?::(\d+))?", on)
    if local and "RAY_AUTH_MODE" not in os.environ:  # nobody else on this machine; and Ray need not write a token into the home directory
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    try:
        import ray
        from ray.data import DataContext
    except ImportError as exc:
        raise SettingsError(f"--on: a cluster needs Ray: {install('cluster')}") from exc
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": logs}
    heard = signal.getsignal(signal.SIGTERM)
    try:
        if not local and (found := re.fullmatch(r"(?:ray://)?(.+):(\d+)", on)):
            socket.create_connection((found[1], int(found[2])), timeout=REACHED_S).close()  # Ray itself tries for minutes
        if local:
            # more processes than cores are of use: they mostly wait for the teacher; Ray Train asks the dashboard what is left to clean up
            ray.init(address="local", num_cpus=int(local[1] or os.cpu_count() or 1), include_dashboard=logs, **quiet)
        else:
            ray.init(address=on, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as exc:
        said = " ".join(str(exc).split()).rstrip(".") or type(exc).__name__
        remedy = "start it (ray start --head), or give its own address"
        if isinstance(exc, ray.exceptions.AuthenticationError):
            said, remedy = "it wants a token", "set RAY_AUTH_TOKEN to that of the cluster"
        elif re.search("version|incompatible", said, re.IGNORECASE):
            remedy = "install the same here as there"
        elif not local:
            mode = "" if os.environ.get("RAY_AUTH_MODE") == "token" else "RAY_AUTH_MODE=token and "
            remedy += f"; if it wants a token, set {mode}RAY_AUTH_TOKEN to that of the cluster"
        raise SettingsError(f"--on {on}: no cluster to work on: {said}; {remedy}") from exc
    over = threading.Event()
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, heard)  # Ray puts its own handler in its place
        if not on.startswith(CLIENT):  # whose calls fail where the cluster is gone
            threading.Thread(target=_watch, args=(ray, over), daemon=True).start()
        context = DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        yield ray
    except (ray.exceptions.RayTaskError, ray.exceptions.UserCodeException):
        raise  # a fault of ours: all of it is told
    except ray.exceptions.RayError as exc:
        said = (str(exc).strip() or type(exc).__name__).splitlines()[0]
        raise StorageError(f"--on {on}: the cluster was lost, or what did the work there: {said}; run the same command again") from exc
    finally:
        over.set()
        ray.shutdown()


def _watch(ray: Any, over: threading.Event) -> None:
    """End this process where the cluster is gone for good: Ray does, after a minute and without a word."""
    answered = threading.Event()

    def ask() -> None:
        while not over.wait(ASK_S):
            with suppress(Exception):
                ray.cluster_resources()  # waits where nobody answers
                answered.set()

    threading.Thread(target=ask, daemon=True).start()
    silent = 0
    while not over.wait(1):
        # counted, since a process may be stopped for an hour
        silent = 0 if answered.is_set() else silent + 1
        answered.clear()
        if silent > LOST_S:
            os.write(2, b"distill: the cluster was lost: it does not answer; everything done so far is kept, run the same command again\n")
            os._exit(StorageError.exit_code)


def workers_of(ray: Any, wanted: int | None, *, gpus: bool = False) -> int:
    """How many workers to start: as many as wanted, by default one a processor of the cluster. `gpus`: each needs one of those, too.

    Raises SettingsError for more than there are, or less than one.
    """
    resources = ray.cluster_resources()
    processors = int(resources.get("CPU", 0))
    most, what = min((processors, "processors"), (int(resources.get("GPU", 0)), "GPUs")) if gpus else (processors, "processors")
    if wanted is not None and wanted < 1:
        raise SettingsError(f"--workers {wanted}: at least one is needed")
    if max(wanted or 1, 1) > most:
        raise SettingsError(f"--workers {wanted or 1}: the cluster has {most} {what} to give; start more nodes, or lower it")
    return wanted or processors


def here(ray: Any) -> Any:
    """Where an actor is to be that this process cannot do without: on its own node, if that may be."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)


def refuse_unless_ready(ray: Any, storage: Storage | None, *, readable: Sequence[Path] = ()) -> int:
    """Look at every node: it has this version of the package, the same storage, if one is needed, and some files. Returns how many
    there are.

    Raises SettingsError naming the nodes and what they lack.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    token, uri = uuid.uuid4().hex[:12], storage.uri if storage else None
    mine = f".probe-{token}"
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if storage:
        storage.write(mine, token.encode())

    # a function of this module would be looked for on the node, where the module may be missing
    def look(name: str) -> str:
        try:
            from shared import __version__ as version

            if version != expected:
                return f"blackbox-distill {version} is installed there, and {expected} here; install the same on every node"
            from shared.storage import Storage
        except ImportError as exc:
            return f"blackbox-distill is not installed there ({exc}); install it on every node, with the extra cluster"
        if missing := [file for file in files if not os.access(file, os.R_OK)]:
            return f"{missing[0]} cannot be read there; put the same file on every node"
        if uri is None:
            return ""
        try:
            there = Storage(uri)
            if there.read(mine) != token.encode():
                return f"{uri} is another folder there than here; give --storage a folder or bucket that all nodes share"
            there.write(f"{mine}-{name}", b"seen")
        except Exception as exc:
            return f"{uri} cannot be used there: {exc}"
        return ""

    expected, files = __version__, [str(path) for path in readable]
    asked = {}
    for node in nodes:
        pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(look).options(num_cpus=0, scheduling_strategy=pinned, max_retries=1)
        asked[node["NodeID"]] = (node["NodeManagerAddress"], task.remote(node["NodeID"]))
    wrong = []
    try:
        for name, (address, answer) in asked.items():
            try:
                said = ray.get(answer, timeout=PROBE_S)
            except ray.exceptions.GetTimeoutError:
                said = f"no answer within {PROBE_S:g} s"
            except ray.exceptions.RayError as exc:
                said = str(exc).strip().splitlines()[-1]
            if not said and storage and storage.read(f"{mine}-{name}") != b"seen":
                said = f"what it writes to {uri} is not seen here; give --storage a folder or bucket that all nodes share"
            if said:
                wrong.append(f"node {address}: {said}")
    finally:
        for name in [mine, *(f"{mine}-{name}" for name in asked)]:
            with suppress(StorageError):  # a leftover of a few bytes
                if storage:
                    storage.remove(name)
    if wrong:
        raise SettingsError("; ".join(dict.fromkeys(wrong)))
    return len(nodes)


def error_of(name: str, message: str) -> DistillError:
    """The error of a worker, here."""
    kind = getattr(shared.errors, name, DistillError)
    return kind(message) if isinstance(kind, type) and issubclass(kind, DistillError) else DistillError(message)
