"""The gateway before three replicas of one teacher, all real processes: the least busy is asked, one is slow, one dies and comes back."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from awake import awake
from composed import free_port
from gateways import ANSWER, ANSWER_S, QUESTION, Gateway, in_time, running

CLIENTS = 12
"""Requests in flight, always; every third one is a stream."""
DELAY_S = 0.1
"""Of each replica's answer: so long that two busy cores are not what bounds them."""


class Replica:
    """`distill teacher` over the scripted engine, always at the same port."""

    def __init__(self, folder: Path, number: int) -> None:
        self.port, self._folder, self._number, self._starts = free_port(), folder, number, 0
        self.process: subprocess.Popen[str] | None = None

    def start(self, delay_s: float) -> None:
        self._starts += 1
        command = [sys.executable, "-m", "shared.cli", "teacher", "--engine", "scripted", "--delay-s", str(delay_s)]
        command += ["--port", str(self.port), "--no-auth", "--until-stdin-closes"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)

    def listens(self) -> None:
        """Wait until it does."""
        assert self.process is not None
        assert self.process.stdout is not None
        assert any("listening on" in line for line in self.process.stdout), self.log.read_text()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    @property
    def log(self) -> Path:
        """Since its last start."""
        return self._folder / f"replica-{self._number}-{self._starts}.log"

    def answered(self) -> int:
        """Requests, since its last start; a line may come a tenth of a second late."""
        lines = [line for line in self.log.read_text().splitlines() if line.startswith("{")]
        return sum(json.loads(line).get("route") == "/v1/chat/completions" for line in lines)


@dataclass
class Fleet:
    replicas: list[Replica]
    gateway: Gateway


@pytest.fixture
def fleet(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    """Three replicas behind a gateway; a parameter gives the delays of their answers, in seconds."""
    delays = getattr(request, "param", (DELAY_S, DELAY_S, DELAY_S))
    replicas = [Replica(tmp_path, number) for number in range(3)]
    try:
        for replica, delay_s in zip(replicas, delays, strict=True):
            replica.start(delay_s)
        for replica in replicas:
            replica.listens()
        urls = [part for replica in replicas for part in ("--upstream-url", f"http://127.0.0.1:{replica.port}/v1")]
        command = ["-m", "shared.cli", "teacher", "--engine", "upstream", *urls, "--upstream-model", "teacher", "--port", "0", "--no-auth"]
        with running(command, tmp_path / "gateway.log") as gateway:
            yield Fleet(replicas, gateway)
    finally:
        for replica in replicas:
            replica.kill()


@dataclass
class Load:
    """CLIENTS requests in flight."""

    began: list[float] = field(default_factory=list)
    failed: list[tuple[float, bool, str]] = field(default_factory=list)
    """Of each failure when the request began, whether it was a stream, and what came."""

    def run(self, gateway: Gateway, meanwhile: Callable[[], object]) -> None:
        """Until `meanwhile` returns, and then until all are answered."""
        asyncio.run(self._run(gateway, meanwhile))

    async def _run(self, gateway: Gateway, meanwhile: Callable[[], object]) -> None:
        doing = asyncio.create_task(asyncio.to_thread(meanwhile))

        async def keep_asking(number: int) -> None:
            async with httpx.AsyncClient(base_url=gateway.url, timeout=ANSWER_S, trust_env=False) as client:
                while not doing.done():
                    number += 1
                    await self._ask(client, stream=number % 3 == 0)

        await asyncio.gather(doing, *(keep_asking(number) for number in range(CLIENTS)))

    async def _ask(self, client: httpx.AsyncClient, *, stream: bool) -> None:
        body = {"model": "teacher", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "stream": stream}
        began = time.monotonic()
        self.began.append(began)
        answer = await client.post("/v1/chat/completions", json=body)
        if answer.status_code != 200 or _said(answer, stream=stream) != ANSWER:
            self.failed.append((began, stream, f"{answer.status_code} {answer.text}"))


def _said(answer: httpx.Response, *, stream: bool) -> str | None:
    """The text of a whole answer."""
    if not stream:
        text: str = answer.json()["choices"][0]["message"]["content"]
        return text
    *events, last = [event.removeprefix("data: ") for event in answer.text.strip().split("\n\n")]
    choices = [choice for event in events for choice in json.loads(event).get("choices", [])]
    return "".join(choice["delta"].get("content") or "" for choice in choices) if last == "[DONE]" else None


def counted(fleet: Fleet, load: Load) -> list[int]:
    """What each replica has answered, once they have written down all."""
    assert in_time(lambda: sum(replica.answered() for replica in fleet.replicas) >= len(load.began))
    return [replica.answered() for replica in fleet.replicas]


def test_three_replicas_that_are_equally_fast_get_a_third_each(fleet: Fleet) -> None:
    load = Load()
    load.run(fleet.gateway, lambda: time.sleep(2))
    assert load.failed == []
    answered = counted(fleet, load)
    print(f"\n{len(load.began)} requests, {CLIENTS} in flight: {answered}")
    assert sum(answered) == len(load.began)
    assert max(answered) - min(answered) <= CLIENTS


@pytest.mark.parametrize("fleet", [(DELAY_S, DELAY_S, 20 * DELAY_S)], indirect=True)
def test_a_replica_that_is_twenty_times_as_slow_gets_a_fifth_of_what_the_others_get_or_less(fleet: Fleet) -> None:
    """By turns it would get as many, and its 2 s would be everybody's."""
    load = Load()
    load.run(fleet.gateway, lambda: time.sleep(3))
    assert load.failed == []
    *fast, slow = counted(fleet, load)
    print(f"\none of 3 answers after {20 * DELAY_S:g} s, the others after {DELAY_S:g} s: {slow} requests, and {fast}")
    assert 0 < slow < min(fast) / 5


def test_a_replica_that_is_killed_under_load_costs_no_more_than_its_share_in_flight_and_is_used_again_when_it_is_back(fleet: Fleet) -> None:
    *_, dead = fleet.replicas
    load, killed, back = Load(), 0.0, 0.0

    def kill_and_start() -> None:
        nonlocal killed, back
        time.sleep(1)
        dead.kill()
        killed = time.monotonic()
        time.sleep(1)
        dead.start(DELAY_S)
        dead.listens()
        with awake() as seconds:
            assert in_time(lambda: dead.answered() > 0)
            back = seconds()

    load.run(fleet.gateway, kill_and_start)
    later = [began for began, *_ in load.failed if began > killed]
    print(
        f"\nSIGKILL to one of 3 with {CLIENTS} in flight: {len(load.failed)} of {len(load.began)} requests failed, {len(later)} of those "
        f"asked later; asked again {back:.1f} s after it was back"
    )
    assert later == []
    assert len(load.failed) <= CLIENTS // 3
    assert all(stream for _, stream, _ in load.failed), "a whole answer is asked for once more elsewhere"
    assert back < 5
    told = Counter(line["message"].partition("/v1")[2] for line in fleet.gateway.told() if line["message"].startswith("upstream "))
    assert told[" is back"] == 1
    load = Load()
    before = [replica.answered() for replica in fleet.replicas]
    load.run(fleet.gateway, lambda: time.sleep(1))
    time.sleep(0.5)
    shares = [replica.answered() - already for replica, already in zip(fleet.replicas, before, strict=True)]
    assert load.failed == []
    assert min(shares) > len(load.began) / 6
