"""Three replicas of the student's server over one registry behind a real nginx with the shipped configuration, under load.

`tests/replicas/with-nginx.sh python -m pytest tests/replicas -s` runs them and shows what was counted.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from awake import awake
from composed import ROOT, free_port
from tiny_servable import SPECIAL, WORDS, line_tokenizer
from transformers import T5Config, T5ForConditionalGeneration

from shared.engines.convert import convert
from shared.registry import Promoted, promote
from shared.settings import TaskSettings

CONF = ROOT / "docker/nginx/student.conf"
NGINX = os.environ.get("NGINX")
KEY, LIMITED = "key-of-the-load-0123456789", "key-with-a-limit-0123456789"
KEYS = {"load": (KEY, {}), "limited": (LIMITED, {"requests_per_minute": 1})}
QUESTIONS = [f"word{i} word{2 * i + 1}" for i in range(1, 9)]
CLIENTS = 9
"""Requests in flight, always; every other one is a stream."""
WAIT_S = 20.0
SET_ASIDE_S = 5.0
"""fail_timeout of the configuration."""
_numbers = count()


@dataclass
class Asked:
    """One request through nginx, and what came of it."""

    question: str
    stream: bool
    agent: str = field(default_factory=lambda: f"load/{next(_numbers)}")
    """Sent as User-Agent: the name of this request in nginx's log."""
    began: float = field(default_factory=time.monotonic)
    ended: float = 0.0
    status: int | None = None
    headers: httpx.Headers = field(default_factory=httpx.Headers)
    raw: bytes = b""
    arrived: list[int] = field(default_factory=list)
    """Bytes of each read."""
    broke: bool = False

    @property
    def answer(self) -> tuple[str, str] | None:
        """Version and text, of an answer that is whole and of one version; None for anything less."""
        if self.status != 200 or self.broke:
            return None
        if self.stream:
            *events, last = [event.removeprefix("data: ") for event in self.raw.decode().strip().split("\n\n")]
            said = [json.loads(event) for event in events]
            if last != "[DONE]" or not said or said[-1].get("finish_reason") is None:
                return None
            versions, text = {event["version"] for event in said}, "".join(event["text"] for event in said).strip()
        else:
            reply = json.loads(self.raw)
            versions, text = {reply["version"]}, reply["answers"][0]["text"]
        versions.add(self.headers["x-student-version"])
        return (versions.pop(), text) if len(versions) == 1 else None


def failed(seen: list[Asked]) -> list[Asked]:
    return [one for one in seen if one.answer is None]


class Replica:
    """One `distill serve`, always at the same port."""

    def __init__(self, registry: Path, keys: Path, log: Path) -> None:
        self.registry, self._keys, self._log, self.port = registry, keys, log, free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "shared.cli", "serve", "--registry", self.registry, "--port", self.port]
        command += ["--threads", "1x1", "--api-keys-file", self._keys, "--log-level", "info"]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def end(self) -> int:
        """Wait until it has ended. Its exit code."""
        assert self.process is not None
        return self.process.wait(WAIT_S)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"http://{self.address}{path}", headers={"authorization": f"Bearer {KEY}"}, timeout=WAIT_S, trust_env=False)

    def ready(self) -> bool:
        try:
            return self.get("/readyz").status_code == 200
        except httpx.TransportError:
            assert self.process is not None
            assert self.process.poll() is None, self._log.read_text()
            return False

    def lives(self) -> bool:
        try:
            return self.get("/healthz").status_code == 200
        except httpx.TransportError:
            return False

    def version(self) -> str | None:
        found: str | None = self.get("/v1/student").json()["version"]
        return found


class Balancer:
    """nginx with the shipped configuration, in which only addresses are others."""

    def __init__(self, replicas: list[Replica], folder: Path) -> None:
        self.port, self._folder, self._log = free_port(), folder, folder / "requests.log"
        self._process: subprocess.Popen[bytes] | None = None
        conf = re.sub(r"\n *resolver .*", "", CONF.read_text())
        conf, places = re.subn(
            r"( *)server student:8080 resolve (.*;).*",
            lambda found: "\n".join(f"{found[1]}server {replica.address} {found[2]}" for replica in replicas),
            conf,
        )
        assert places == 2
        assert conf.count("listen 8080;") == 1
        (folder / "student.conf").write_text(conf.replace("listen 8080;", f"listen 127.0.0.1:{self.port};"))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        assert NGINX, "NGINX names no nginx: tests/replicas/with-nginx.sh finds or installs one"
        command = [NGINX, "-e", "stderr", "-p", self._folder, "-c", self._folder / "student.conf", "-g", "daemon off;"]
        with self._log.open("ab") as log, (self._folder / "errors.log").open("ab") as errors:
            self._process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=errors)
        eventually(self._answers)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._folder / "errors.log").read_text()
        try:
            return httpx.get(f"{self.url}/metrics", timeout=WAIT_S, trust_env=False).status_code == 404
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            try:
                self._process.wait(5)
            finally:
                self._process.kill()

    def lines(self, seen: list[Asked]) -> dict[str, Line]:
        """What its log tells of each of these requests, by their names."""
        found: dict[str, Line] = {}

        def all_there() -> bool:
            told = [json.loads(line) for line in self._log.read_text().splitlines()]
            found.update({line["agent"]: Line(line["replica"].split(", "), line["replica_status"].split(", ")) for line in told})
            return all(one.agent in found for one in seen)

        eventually(all_there)
        return {one.agent: found[one.agent] for one in seen}


@dataclass(frozen=True)
class Line:
    """Of one request: the replicas that were asked, in this order, and what each has said."""

    replicas: list[str]
    statuses: list[str]


@dataclass
class Fleet:
    replicas: list[Replica]
    balancer: Balancer
    folders: list[Path]
    """Of two students that answer differently."""
    registry: Path
    unpromoted: list[Asked] = field(default_factory=list)
    """Asked while nothing was promoted."""
    one_not_ready: list[Asked] = field(default_factory=list)
    """Asked while the last replica had no registry."""
    expected: dict[str, dict[str, str]] = field(default_factory=dict)
    """The right answers, by version and question, as one replica gives them to whoever asks it directly."""

    def promote(self, name: str) -> Promoted:
        """The student that is not served."""
        folder = self.folders[len(self.expected) % 2]
        return promote(self.registry, folder, name=name, task=TaskSettings(shots=0).model_dump(), scores={}, run="r", reason="a test")

    def learn(self, version: str) -> None:
        """Wait until every replica serves this version, and ask one what it answers."""
        eventually(lambda: all(replica.version() == version for replica in self.replicas if replica.registry.exists()))
        asked = [asyncio.run(_once(f"http://{self.replicas[0].address}", question, stream=False)) for question in QUESTIONS]
        answers = [one.answer for one in asked]
        assert all(answer is not None and answer[0] == version for answer in answers)
        self.expected[version] = {one.question: answer[1] for one, answer in zip(asked, answers, strict=True) if answer}

    def wrong(self, seen: list[Asked]) -> list[Asked]:
        """Whole answers that are not the right one."""
        return [one for one in seen if one.answer and self.expected[one.answer[0]][one.question] != one.answer[1]]

    def again(self, replica: Replica) -> float:
        """Start a replica that has ended. Seconds in which the machine ran from when it is ready until nginx asks it again."""
        replica.start()
        eventually(replica.ready)
        with awake() as seconds:
            eventually(lambda: replica.address in self.asked_of(6))
            return seconds()

    def asked_of(self, requests: int) -> Counter[str]:
        """Who has answered so many requests, one after the other."""
        seen = [asyncio.run(_once(self.balancer.url, QUESTIONS[0], stream=False)) for _ in range(requests)]
        return self.spread(seen)

    def spread(self, seen: list[Asked]) -> Counter[str]:
        """How many of these requests each replica has answered."""
        lines = self.balancer.lines(seen)
        return Counter(lines[one.agent].replicas[-1] for one in seen if one.answer)


def eventually(holds: Callable[[], bool], *, within_s: float = WAIT_S) -> float:
    """Seconds until it holds; the test fails if it does not."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < within_s, f"not within {within_s:g} s"
        time.sleep(0.05)
    return time.monotonic() - began


async def ask(client: httpx.AsyncClient, question: str, *, stream: bool, key: str = KEY, max_tokens: int = 32) -> Asked:
    asked = Asked(question, stream)
    body = {"question": question, "stream": stream, "max_tokens": max_tokens}
    headers = {"user-agent": asked.agent, "authorization": f"Bearer {key}"}
    try:
        async with client.stream("POST", "/v1/generate", json=body, headers=headers) as response:
            asked.status, asked.headers = response.status_code, response.headers
            async for part in response.aiter_raw():
                asked.raw += part
                asked.arrived.append(len(part))
    except httpx.TransportError:
        asked.broke = True
    asked.ended = time.monotonic()
    return asked


def _client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=WAIT_S, trust_env=False)


async def _once(url: str, question: str, **options: Any) -> Asked:
    async with _client(url) as client:
        return await ask(client, question, **options)


async def _several(url: str, requests: int, **options: Any) -> list[Asked]:
    """So many at a time."""
    async with _client(url) as client:
        return await asyncio.gather(*(ask(client, QUESTIONS[number], **options) for number in range(requests)))


@asynccontextmanager
async def load(url: str) -> AsyncIterator[list[Asked]]:
    """CLIENTS requests in flight until the block ends; all that were asked, in the order in which they ended."""
    seen: list[Asked] = []
    stopped = False

    async def keep_asking(number: int) -> None:
        async with _client(url) as client:
            while not stopped:
                number += 1
                seen.append(await ask(client, QUESTIONS[number % len(QUESTIONS)], stream=number % 2 == 0))

    clients = [asyncio.create_task(keep_asking(number)) for number in range(CLIENTS)]
    try:
        yield seen
    finally:
        stopped = True
        await asyncio.gather(*clients)


def loaded(url: str, meanwhile: Callable[[], Any], *, before_s: float = 0.5, after_s: float = 1.0) -> list[Asked]:
    """All requests of a load during which something is done in a thread, with some of the load before and after it."""

    async def run() -> list[Asked]:
        async with load(url) as seen:
            await asyncio.sleep(before_s)
            await asyncio.to_thread(meanwhile)
            await asyncio.sleep(after_s)
        return seen

    return asyncio.run(run())


def student(folder: Path, seed: int) -> Path:
    """A T5 of random weights as a serving folder: a millisecond a token, and its greedy answers never end by themselves.

    Another seed answers otherwise.
    """
    torch.manual_seed(seed)
    tokenizer = line_tokenizer(appends_eos=True)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=256,
        d_kv=32,
        d_ff=1024,
        num_layers=4,
        num_heads=8,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        initializer_factor=4.0,  # else it says the same whatever it is asked
        tie_word_embeddings=False,
    )
    model = T5ForConditionalGeneration(config)
    head = torch.randn(len(tokenizer), config.d_model)
    head[: len(SPECIAL)] = head[len(SPECIAL) + len(WORDS) :] = 0  # neither an end nor a line feed is ever the likeliest
    model.lm_head.weight = torch.nn.Parameter(head)
    model.config.tie_word_embeddings = False  # transformers sets it again when it builds the model
    model.save_pretrained(folder / "hf")
    tokenizer.save_pretrained(folder / "hf")
    return convert(str(folder / "hf"), folder / "serving", name=f"tiny-{seed}", quantization="float32")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Replicas and nginx, up before anything is promoted; the last replica's registry is there only after the first promotion."""
    root = tmp_path_factory.mktemp("replicas")
    keys, registry, late = root / "keys.yaml", root / "registry", root / "late"
    keys.write_text(json.dumps({name: {"sha256": hashlib.sha256(key.encode()).hexdigest(), **more} for name, (key, more) in KEYS.items()}))
    replicas = [Replica(where, keys, root / f"replica-{i}.log") for i, where in enumerate((registry, registry, late))]
    balancer = Balancer(replicas, root)
    one = Fleet(replicas, balancer, [student(root / f"student-{seed}", seed) for seed in (1, 2)], registry)
    try:
        for replica in replicas:
            replica.start()
        for replica in replicas:
            eventually(replica.lives)
        balancer.start()
        one.unpromoted = [asyncio.run(_once(balancer.url, QUESTIONS[0], stream=bool(i % 2))) for i in range(12)]
        one.learn(one.promote("first").version)
        time.sleep(SET_ASIDE_S)
        one.one_not_ready = loaded(balancer.url, lambda: time.sleep(2))
        late.symlink_to(registry)
        eventually(replicas[-1].ready)
        eventually(lambda: len(one.asked_of(6)) == 3)
        yield one
    finally:
        balancer.stop()
        for replica in replicas:
            if replica.process is not None:
                replica.process.kill()
                replica.process.wait()


def test_until_a_student_is_promoted_every_caller_gets_a_replicas_own_503_that_tells_when_to_come_back(fleet: Fleet) -> None:
    assert len(fleet.unpromoted) == 12
    for asked in fleet.unpromoted:
        assert asked.status == 503, asked
        assert asked.headers["retry-after"] == "5"
        assert json.loads(asked.raw)["error"]["message"] == "no student is promoted yet"


def test_a_replica_without_a_student_answers_nothing_and_costs_no_request(fleet: Fleet) -> None:
    seen, idle = fleet.one_not_ready, fleet.replicas[-1].address
    assert failed(seen) == []
    lines = fleet.balancer.lines(seen).values()
    refusals = [line for line in lines if idle in line.replicas]
    print(f"\none of 3 not ready: 0 of {len(seen)} requests failed; it was asked {len(refusals)} times, 503 each, and another one then")
    assert refusals, "it was never asked"
    assert all(line.statuses[line.replicas.index(idle)] == "503" and line.statuses[-1] == "200" for line in refusals)
    assert len(refusals) < len(seen) / 20


def test_where_no_replica_lives_a_caller_is_told_when_to_come_back(tmp_path: Path) -> None:
    balancer = Balancer([Replica(tmp_path, tmp_path, tmp_path) for _ in range(3)], tmp_path)
    try:
        balancer.start()
        for stream in (False, True, False, True):
            asked = asyncio.run(_once(balancer.url, QUESTIONS[0], stream=stream))
            assert (asked.status, asked.headers["retry-after"]) == (503, "5")
            assert asked.headers["content-type"] == "application/json"
            assert set(json.loads(asked.raw)["error"]) == {"message", "type", "param", "code"}
    finally:
        balancer.stop()


def test_the_key_goes_through_and_each_replica_has_a_share(fleet: Fleet) -> None:
    assert httpx.post(f"{fleet.balancer.url}/v1/generate", json={"question": "word1"}, trust_env=False).status_code == 401
    seen = loaded(fleet.balancer.url, lambda: time.sleep(1))
    assert failed(seen) == []
    assert fleet.wrong(seen) == []
    spread = fleet.spread(seen)
    print(f"\n{len(seen)} requests, {CLIENTS} in flight: by replica {sorted(spread.values())}")
    assert len(spread) == 3
    assert min(spread.values()) > len(seen) / 6


def test_a_stream_comes_piece_by_piece(fleet: Fleet) -> None:
    seen = [asyncio.run(_once(fleet.balancer.url, QUESTIONS[0], stream=True)) for _ in range(5)]
    assert failed(seen) == []
    best = max(seen, key=lambda one: len(one.arrived))
    events = best.raw.count(b"\n\n")
    print(
        f"\na stream of {events} events and {len(best.raw)} bytes came in {len(best.arrived)} reads, the first of {best.arrived[0]} bytes"
    )
    assert len(best.arrived) > events * 0.7
    assert best.arrived[0] < 300


def test_a_429_reaches_the_client_with_its_retry_after_and_nobody_else_is_asked(fleet: Fleet) -> None:
    seen = [asyncio.run(_once(fleet.balancer.url, QUESTIONS[0], stream=False, key=LIMITED)) for _ in range(9)]
    # once a minute, says the keys file, and each replica counts for itself
    assert Counter(one.status for one in seen) == {200: 3, 429: 6}
    for one in seen:
        if one.status == 429:
            assert 1 <= int(one.headers["retry-after"]) <= 60
            assert json.loads(one.raw)["error"]["code"] == "rate_limit_exceeded"
            assert fleet.balancer.lines([one])[one.agent].statuses == ["429"]
    assert len(fleet.asked_of(6)) == 3, "a 429 has set a replica aside"


def test_a_body_that_is_too_large_and_the_metrics_are_refused_in_the_words_of_the_api(fleet: Fleet) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    large = httpx.post(f"{fleet.balancer.url}/v1/generate", content=b" " * (1 << 20) + b"{}", headers=headers, trust_env=False)
    metrics = httpx.get(f"{fleet.balancer.url}/metrics", headers=headers, trust_env=False)
    assert (large.status_code, metrics.status_code) == (413, 404)
    for refused in (large, metrics):
        assert set(refused.json()["error"]) == {"message", "type", "param", "code"}
    assert b"distill_" in fleet.replicas[0].get("/metrics").content


def test_a_promotion_under_load_fails_no_request_and_every_replica_ends_with_the_new_version(fleet: Fleet) -> None:
    (old,) = fleet.expected
    new = ""

    def swap() -> None:
        nonlocal new
        new = fleet.promote("second").version
        fleet.learn(new)

    seen = loaded(fleet.balancer.url, swap)
    assert failed(seen) == []
    assert all(fleet.expected[old][question] != fleet.expected[new][question] for question in QUESTIONS)
    assert fleet.wrong(seen) == []
    by_version = Counter(one.answer[0] for one in seen if one.answer)
    print(
        f"\na promotion under load: 0 of {len(seen)} requests failed, {by_version[old]} by the old and {by_version[new]} by the new version"
    )
    assert by_version.keys() == {old, new}
    assert {replica.version() for replica in fleet.replicas} == {new}


def test_a_replica_that_stands_still_gets_no_more_than_its_share_of_those_in_flight(fleet: Fleet) -> None:
    slow = fleet.replicas[0]
    stopped = resumed = 0.0

    def stand_still() -> None:
        nonlocal stopped, resumed
        slow.signal(signal.SIGSTOP)
        stopped = time.monotonic()
        time.sleep(3)
        resumed = time.monotonic()
        slow.signal(signal.SIGCONT)

    seen = loaded(fleet.balancer.url, stand_still)
    assert failed(seen) == []
    # at both ends of these three seconds it answers, which counts for nobody
    spread = fleet.spread([one for one in seen if one.ended > stopped + 0.5 and one.began < resumed - 0.5])
    others = [spread[replica.address] for replica in fleet.replicas[1:]]
    print(
        f"\none of 3 stands still for 3 s: {spread[slow.address]} requests wait for it, the others have {others}; 0 of {len(seen)} failed"
    )
    assert 0 < spread[slow.address] <= CLIENTS // 3 + 1
    assert min(others) > 3 * spread[slow.address]


def test_a_replica_that_is_told_to_stop_finishes_and_no_request_fails(fleet: Fleet) -> None:
    leaving = fleet.replicas[1]
    code = None

    def stop() -> None:
        nonlocal code
        leaving.signal(signal.SIGTERM)
        code = leaving.end()

    seen = loaded(fleet.balancer.url, stop)
    assert code == 0
    assert failed(seen) == []
    assert fleet.wrong(seen) == []
    again = [line for line in fleet.balancer.lines(seen).values() if len(line.replicas) > 1]
    back_s = fleet.again(leaving)
    print(
        f"\nSIGTERM to one of 3: 0 of {len(seen)} requests failed, {len(again)} were sent on; used again {back_s:.1f} s after it was ready"
    )
    assert back_s < 2 * SET_ASIDE_S


def test_a_replica_that_is_killed_takes_with_it_the_streams_that_had_begun_there_and_nothing_else(fleet: Fleet) -> None:
    dead = fleet.replicas[2]
    killed = 0.0
    long: list[Asked] = []
    """Streams that last longer than it takes until the kill."""

    def ask_long() -> None:
        long.extend(asyncio.run(_several(fleet.balancer.url, 6, stream=True, max_tokens=512)))

    asking = threading.Thread(target=ask_long)

    def kill() -> None:
        nonlocal killed
        asking.start()
        time.sleep(1)
        dead.signal(signal.SIGSTOP)  # so that whole answers are in flight as well
        time.sleep(0.3)
        killed = time.monotonic()
        dead.signal(signal.SIGKILL)
        dead.end()

    seen = loaded(fleet.balancer.url, kill, after_s=4)
    asking.join(3 * WAIT_S)
    assert len(long) == 6
    assert fleet.wrong(seen) == []
    seen += long
    lines = fleet.balancer.lines(seen)
    lost = failed(seen)
    again = [one for one in seen if one.began < killed and dead.address in lines[one.agent].replicas[:-1] and one.answer]
    later = [one for one in seen if one.began > killed]
    back_s = fleet.again(dead)
    print(
        f"\nSIGKILL to one of 3 with {len(again) + len(lost)} in flight on it: {len(lost)} of {len(seen)} requests failed, streams that "
        f"had begun; another has answered {len(again)}; 0 of {len(later)} later ones failed; used again {back_s:.1f} s after it was ready"
    )
    assert lost, "no stream had begun there"
    for one in lost:
        assert one.began < killed, one
        assert (one.stream, one.status, one.broke) == (True, 200, True), one
        assert lines[one.agent].replicas == [dead.address], one
    assert len(later) > CLIENTS
    assert back_s < 2 * SET_ASIDE_S
