"""A teacher in several processes: one address, one set of limits, one set of numbers; a dead worker is replaced, and all end together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

KEY = "alice-key-0123456789-abcdef"
BODY = {"model": "teacher", "prompt": "Is migraine hereditary?"}
Start = Callable[..., "tuple[subprocess.Popen[str], str, str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start `distill teacher` in two workers; its process, base URL and metrics URL. Ends what a test leaves running."""
    running: list[subprocess.Popen[str]] = []

    def begin(*options: str, **variables: str) -> tuple[subprocess.Popen[str], str, str]:
        command = [
            sys.executable,
            "-m",
            "shared.cli",
            "teacher",
            "--engine",
            "scripted",
            "--workers",
            "2",
            "--port",
            "0",
            "--metrics-port",
            "0",
        ]
        pipe = subprocess.PIPE
        environment = {**os.environ, "TEACHER_API_KEYS": f"alice={KEY}", **variables}
        process = subprocess.Popen([*command, *options], stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)
        running.append(process)
        assert process.stdout is not None
        lines = [process.stdout.readline().strip() for _ in range(2)]
        assert "listening on" in lines[0], process.communicate()
        return process, lines[0].rpartition(" ")[2], lines[1].rpartition(" ")[2]

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


def ask(base: str) -> int:
    """The status of one request over a connection of its own."""
    headers = {"authorization": f"Bearer {KEY}"}
    return httpx.post(f"{base}/completions", json=BODY, headers=headers, trust_env=False, timeout=30).status_code


def numbers(url: str) -> dict[str, float]:
    lines = httpx.get(url, trust_env=False, timeout=30).text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))}


def in_flight(metrics: str, requests: int) -> bool:
    """Whether so many are being answered, within a minute."""
    return within(60, lambda: numbers(metrics)["distill_http_requests_in_flight"] == requests)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def takes_connections(base: str) -> bool:
    port = int(base.removesuffix("/v1").rpartition(":")[2])
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except ConnectionRefusedError:
        return False
    return True


def within(seconds: float, claim: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not (held := claim()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return held


def test_a_limit_holds_for_all_workers_together_and_their_numbers_are_added_up(start: Start) -> None:
    process, base, metrics = start("--requests-per-minute", "30")
    assert len(workers_of(process)) == 2
    with ThreadPoolExecutor(8) as pool:
        statuses = Counter(pool.map(lambda _: ask(base), range(40)))
    assert statuses == {200: 30, 429: 10}
    told = numbers(metrics)
    assert told['distill_http_requests_total{method="POST",route="/v1/completions",status="200"}'] == 30
    assert told['distill_refusals_total{reason="requests_per_minute"}'] == 10
    assert told["distill_http_requests_in_flight"] == 0
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


def test_a_killed_worker_is_replaced_and_what_it_held_is_given_back(start: Start) -> None:
    process, base, metrics = start("--concurrent-requests", "2", TEACHER_DELAY_S="6")
    before = workers_of(process)
    with ThreadPoolExecutor(2) as pool:
        lost = [pool.submit(ask, base) for _ in range(2)]
        assert in_flight(metrics, 2)
        assert ask(base) == 429  # both are held
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        for one in lost:
            with pytest.raises(httpx.TransportError):
                one.result()
    assert within(60, lambda: len(set(workers_of(process)) - set(before)) == 2)
    assert ask(base) == 200
    assert numbers(metrics)["distill_http_requests_in_flight"] == 0
    process.send_signal(signal.SIGINT)
    _, complained = process.communicate(timeout=20)
    assert process.returncode == 0
    assert complained.count("died (signal 9); another takes its place") == 2
    assert "Traceback" not in complained


def test_requests_in_flight_are_finished_by_every_worker_before_the_end(start: Start) -> None:
    process, base, metrics = start(TEACHER_DELAY_S="6")
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, base) for _ in range(8)]
        assert in_flight(metrics, 8)
        process.send_signal(signal.SIGTERM)
        assert within(5, lambda: not takes_connections(base))
        assert [one.result() for one in asked] == [200] * 8
    assert process.wait(20) == 0


def test_workers_end_with_the_process_that_started_them_however_that_ended(start: Start) -> None:
    process, _, _ = start()
    pids = workers_of(process)
    process.kill()
    process.wait()
    assert within(15, lambda: not any(map(alive, pids)))


def test_workers_end_when_standard_input_does_if_that_was_asked_for(start: Start) -> None:
    process, _, _ = start("--until-stdin-closes")
    pids = workers_of(process)
    process.communicate(timeout=20)
    assert process.returncode == 0
    assert not any(map(alive, pids))


def test_a_port_that_another_server_has_is_refused_by_several_workers_too(start: Start) -> None:
    _, base, _ = start()
    port = base.removesuffix("/v1").rpartition(":")[2]
    command = [sys.executable, "-m", "shared.cli", "teacher", "--engine", "scripted", "--workers", "2", "--port", port, "--no-auth"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"--port {port}: another process listens there" in done.stderr


def test_a_local_model_has_one_process() -> None:
    command = [sys.executable, "-m", "shared.cli", "teacher", "--engine", "local", "--workers", "2", "--no-auth"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "workers: a local model runs in one process" in done.stderr
