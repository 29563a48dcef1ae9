"""A Ray cluster of several nodes, each of processes of its own, for tests and benchmarks: its nodes are killed and its harvests watched."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from harvests import MockTeacher, _environment

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "RAY_AUTH_MODE": "disabled"}
START_S = 90.0


@dataclass
class Nodes:
    """The first one is the head, which is not killed."""

    address: str
    cluster: Any
    workers: list[Any]

    def kill(self, number: int) -> None:
        """All processes of a worker node at once, as if its power went."""
        node = self.workers.pop(number)
        pids = [process.process.pid for processes in node.all_processes.values() for process in processes]
        own = [pid for raylet in pids for pid in _below(raylet)]
        assert pids
        assert own, "nothing works there"
        for pid in [*pids, *own]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _below(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(child) for child in found]


@contextmanager
def nodes(workers: int, *, processors: int = 1) -> Iterator[Nodes]:
    """A head without processors to give, and so many worker nodes with some each, all with this process's environment."""
    os.environ.update(QUIET)
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        made = [cluster.add_node(num_cpus=processors, wait=True) for _ in range(workers)]
        cluster.wait_for_nodes(timeout=START_S)
        yield Nodes(cluster.address, cluster, made)
    finally:
        cluster.shutdown()


@dataclass(frozen=True)
class Head:
    """A node as `ray start` starts it, with a dashboard, which takes jobs."""

    address: str
    client: str
    dashboard: str


@contextmanager
def head(folder: Path, *, processors: int = 2) -> Iterator[Head]:
    """One node with the command users start it with. `folder`: of its log."""
    main, client, dashboard, agent = (free_port() for _ in range(4))
    ports = [f"--port={main}", f"--ray-client-server-port={client}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--node-ip-address=127.0.0.1", *ports]
    ray += [f"--dashboard-agent-listen-port={agent}", f"--num-cpus={processors}"]
    with (folder / "ray.log").open("w") as log:
        environment = _environment() | QUIET
        process = subprocess.Popen(ray, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + START_S
        while not (_listens(client) and _takes_jobs(f"http://127.0.0.1:{dashboard}")):
            assert process.poll() is None, (folder / "ray.log").read_text()
            assert time.monotonic() < deadline, (folder / "ray.log").read_text()
            time.sleep(0.2)
        yield Head(f"127.0.0.1:{main}", f"ray://127.0.0.1:{client}", f"http://127.0.0.1:{dashboard}")
    finally:
        started = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for one in started:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait(timeout=30)


def free_port() -> int:
    """One that nobody is given who asks for any: Ray's many processes would take it before it is used."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _takes_jobs(dashboard: str) -> bool:
    from ray.job_submission import JobSubmissionClient

    try:
        JobSubmissionClient(dashboard).submit_job(entrypoint="true")
    except (ConnectionError, RuntimeError):  # it listens before there is an agent that starts jobs
        return False
    return True


def command(recipe: Path, out: Path, teacher: MockTeacher, on: str, *more: str) -> list[str]:
    """`distill harvest --on` in its own words."""
    harvest = [sys.executable, "-m", "shared.cli", "harvest", "--recipe", str(recipe), "--out", str(out), "--teacher-url", teacher.url]
    return [*harvest, "--on", on, *more]


def started(recipe: Path, out: Path, teacher: MockTeacher, on: str, *more: str, cwd: Path | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(recipe, out, teacher, on, *more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=_environment() | QUIET,
        cwd=cwd,
    )


def finished(child: subprocess.Popen[str], *, within_s: float = 240.0) -> tuple[int, str]:
    """Its exit code and all it said."""
    try:
        said, _ = child.communicate(timeout=within_s)
    finally:
        if child.poll() is None:
            child.kill()
    return child.returncode, said


def kill_driver(child: subprocess.Popen[str], teacher: MockTeacher) -> int:
    """Kill a harvest's own process, with which its workers end. Returns how often the teacher was asked."""
    child.kill()
    child.communicate()
    calls, before = teacher.counts()["calls"], -1
    while calls != before:  # a busy machine takes its time to end them
        time.sleep(2)
        calls, before = teacher.settled()["calls"], calls
    return int(calls)


def wait_for_calls(teacher: MockTeacher, calls: int, child: subprocess.Popen[str], *, within_s: float = 120.0) -> None:
    """Until the teacher has been asked so often. Raises AssertionError where the harvest ends before, or nothing comes."""
    deadline = time.monotonic() + within_s
    while teacher.counts()["calls"] < calls:
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < deadline, "nobody is asked"
        time.sleep(0.02)
