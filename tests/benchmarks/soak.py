"""Everything at once, at twice what the student's server can do: is each request answered as it should be, and is all over afterwards?

    python tests/benchmarks/soak.py                    # SmolLM2, ten minutes
    python tests/benchmarks/soak.py --minutes 1        # shorter

First the capacity is measured: whole answers of the mixture, by clients that wait for theirs. Then requests arrive at random moments,
TIMES as many a second as that, whatever becomes of those before: short and long ones, streams, streams whose client leaves in the middle,
requests whose client leaves before the answer, prompts that are too long, bodies that are none, and models that do not exist.
Checked: what is accepted is answered whole; refusals are 429 with retry-after and nothing else; wrong requests are told so; nothing takes
longer than PATIENCE_S; memory does not grow; afterwards the server is ready, has nothing in flight and ends with 0 when told to.
Prints a table; the last line is one JSON object. Exit code 1 where a check fails. It runs on Linux: it reads /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import aiohttp

from shared.models import serving_folder

sys.path.insert(0, str(Path(__file__).parents[1]))
from gateways import Gateway, in_time, running

TIMES = 2.0
"""Requests a second, by the measured capacity."""
PATIENCE_S = 180.0
"""Seconds in which a request must be over: a queue may hold it for one minute, the model for another."""
CAPACITY_CLIENTS = 16
MOST_CONNECTIONS = 2000
"""Of the load, which must not be what limits it."""
GROWTH_MB, GROWTH = 64.0, 0.1
"""Most that the peak of resident memory may grow after the warm-up, in MB or as a share: allocators' arenas fill slowly."""
WARM_UP = 0.3
"""Share of the load's time after which memory is first looked at."""
GAUGES = ("distill_http_requests_in_flight", "distill_queue_length")


@dataclass(frozen=True)
class Words:
    """What is asked of a model of some size."""

    short: str
    long: str
    overlong: str
    short_tokens: int
    long_tokens: int
    samples: int
    """Answers of one long request, and questions of one call: what makes the model the bottleneck, and not HTTP."""


SMOLLM2 = Words(
    short="I have had a headache for three days. What helps?",
    long="My knee has hurt since I fell on the stairs last week, and it is worse at night. " * 8 + "What should I do?",
    overlong="word " * 9000,
    short_tokens=24,
    long_tokens=64,
    samples=4,
)
OUTCOMES = ("answered", "refused", "rejected", "left", "broken off", "WRONG", "STUCK")
"""What became of a request: refused for want of room, rejected for what it is, left by its client, a stream broken off with an error."""


@dataclass
class Report:
    """What a soak found."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    """By kind of request."""
    problems: list[str] = field(default_factory=list)
    capacity_per_s: float = 0.0
    sent: int = 0
    seconds: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    """Of what was answered whole."""
    memory: list[tuple[float, float]] = field(default_factory=list)
    """(seconds since the load began, resident MB)."""

    def count(self, kind: str, outcome: str) -> None:
        self.outcomes.setdefault(kind, Counter())[outcome] += 1

    def total(self, outcome: str) -> int:
        return sum(found[outcome] for found in self.outcomes.values())

    @property
    def settled(self) -> list[tuple[float, float]]:
        return [(at, mb) for at, mb in self.memory if at >= WARM_UP * self.seconds]

    @property
    def slope_mb_per_min(self) -> float:
        """Of memory after the warm-up, least squares."""
        at, mb = zip(*self.settled, strict=True)
        spread = sum((a - fmean(at)) ** 2 for a in at)
        return 60 * sum((a - fmean(at)) * (m - fmean(mb)) for a, m in self.settled) / spread if spread else 0.0

    @property
    def growth_mb(self) -> float:
        """How much higher the peak of memory was in the second half after the warm-up than in the first: batches come and go."""
        half = len(self.settled) // 2
        return self.peak_mb - max(mb for _, mb in self.settled[:half]) if half else 0.0

    @property
    def peak_mb(self) -> float:
        """In the second half after the warm-up."""
        return max(mb for _, mb in self.settled[len(self.settled) // 2 :])


class Wrong(Exception):
    """An answer that should not be."""


class Asker:
    """The kinds of requests, each of which tells what became of it."""

    def __init__(self, session: aiohttp.ClientSession, url: str, words: Words, draw: random.Random) -> None:
        self._session, self._url, self._words, self._draw = session, url, words, draw

    def _chat(self, content: str, max_tokens: int, **more: Any) -> dict[str, Any]:
        return {"model": "student", "messages": [{"role": "user", "content": content}], "max_tokens": max_tokens, "temperature": 0.7} | more

    async def _refused(self, response: aiohttp.ClientResponse) -> str | None:
        """ "refused" for a proper 429, None for another status. Raises Wrong."""
        if response.status != 429:
            return None
        await _error(response)
        if not float(response.headers.get("retry-after", "0")) > 0:
            raise Wrong("a 429 without retry-after")
        return "refused"

    async def _whole(self, path: str, body: dict[str, Any], check: Callable[[Any], bool]) -> str:
        async with self._session.post(self._url + path, json=body) as response:
            if refused := await self._refused(response):
                return refused
            if response.status != 200:
                raise Wrong(f"{response.status}: {(await response.text())[:300]}")
            if not check(answer := await response.json()):
                raise Wrong(f"not a whole answer: {json.dumps(answer)[:300]}")
            return "answered"

    async def short(self) -> str:
        body = self._chat(self._words.short, self._words.short_tokens)
        return await self._whole("/v1/chat/completions", body, lambda answer: _is_whole(answer, 1))

    async def long(self) -> str:
        samples = self._words.samples
        body = self._chat(self._words.long, self._words.long_tokens, n=samples)
        return await self._whole("/v1/chat/completions", body, lambda answer: _is_whole(answer, samples))

    async def question(self) -> str:
        asked = [f"{self._words.short} {i}" for i in range(self._words.samples)]
        return await self._whole("/v1/generate", {"question": asked}, lambda answer: len(answer["answers"]) == len(asked))

    async def stream(self) -> str:
        body = self._chat(self._words.short, self._words.long_tokens, stream=True)
        async with self._session.post(self._url + "/v1/chat/completions", json=body) as response:
            if refused := await self._refused(response):
                return refused
            if response.status != 200:
                raise Wrong(f"{response.status}: {(await response.text())[:300]}")
            events = [line[6:].strip() async for line in response.content if line.startswith(b"data: ")]
        errors = [event for event in events if event.startswith(b'{"error"')]
        if events[-1:] == [b"[DONE]"] and not errors:
            ends = [json.loads(event)["choices"][0]["finish_reason"] for event in events[:-1] if json.loads(event)["choices"]]
            if not ends or ends[-1] not in ("stop", "length"):
                raise Wrong(f"a stream that ends without a reason: {events[-3:]}")
            return "answered"
        if events and errors == events[-1:]:
            return "broken off"
        raise Wrong(f"a stream that ends neither with [DONE] nor with one error: {events[-3:]}")

    async def stream_left(self) -> str:
        body = self._chat(self._words.short, self._words.long_tokens, stream=True)
        async with self._session.post(self._url + "/v1/chat/completions", json=body) as response:
            if refused := await self._refused(response):
                return refused
            if response.status != 200:
                raise Wrong(f"{response.status}: {(await response.text())[:300]}")
            await response.content.readline()
            response.close()  # the connection, with whatever is still to come
        return "left"

    async def left(self) -> str:
        try:
            async with asyncio.timeout(self._draw.uniform(0.005, 0.3)):
                return await self.long()
        except TimeoutError:
            return "left"

    async def overlong(self) -> str:
        body = self._chat(self._words.overlong, self._words.short_tokens)
        async with self._session.post(self._url + "/v1/chat/completions", json=body) as response:
            if refused := await self._refused(response):
                return refused
            if response.status != 400:
                raise Wrong(f"an over-long prompt: {response.status}: {(await response.text())[:300]}")
            await _error(response)
        return "rejected"

    async def bad_body(self) -> str:
        good = self._chat(self._words.short, 8)
        bodies = [b"", b"{", b"[]", b'"text"', b"\xff\xfe", {}, good | {"messages": []}, good | {"max_tokens": -1}, good | {"surprise": 1}]
        bodies += [good | {"messages": "text"}, good | {"temperature": "hot"}, {"model": "student"}]
        body = self._draw.choice(bodies)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        path = self._draw.choice(("/v1/chat/completions", "/v1/completions", "/v1/generate"))
        async with self._session.post(self._url + path, data=data, headers={"content-type": "application/json"}) as response:
            if not 400 <= response.status < 500:
                raise Wrong(f"{path} with {data[:80]!r}: {response.status}: {(await response.text())[:300]}")
            await _error(response)
        return "rejected"

    async def wrong_model(self) -> str:
        body = self._chat(self._words.short, 8) | {"model": "nobody"}
        async with self._session.post(self._url + "/v1/chat/completions", json=body) as response:
            if response.status != 404:
                raise Wrong(f"an unknown model: {response.status}: {(await response.text())[:300]}")
            await _error(response)
        return "rejected"

    def kinds(self) -> dict[str, tuple[float, Callable[[], Awaitable[str]]]]:
        """The share of each, and how it is asked."""
        return {
            "short": (0.30, self.short),
            "long": (0.15, self.long),
            "question": (0.10, self.question),
            "stream": (0.15, self.stream),
            "stream, left": (0.08, self.stream_left),
            "left before the answer": (0.08, self.left),
            "over-long prompt": (0.04, self.overlong),
            "bad body": (0.06, self.bad_body),
            "wrong model": (0.04, self.wrong_model),
        }


WHOLE = ("short", "long", "question", "stream")
"""Kinds whose requests are answered whole or refused."""


def _is_whole(answer: Any, n: int) -> bool:
    return len(answer["choices"]) == n and all(
        choice["finish_reason"] in ("stop", "length") and isinstance(choice["message"]["content"], str) for choice in answer["choices"]
    )


async def _error(response: aiohttp.ClientResponse) -> None:
    """Raises Wrong where a refusal has not the shape of one."""
    try:
        told = set((await response.json())["error"])
    except (ValueError, KeyError, TypeError, aiohttp.ClientError):
        told = set()
    if told != {"message", "type", "param", "code"}:
        raise Wrong(f"{response.status} without an error of the known shape: {(await response.text())[:300]}")


async def _ask(report: Report, kind: str, ask: Callable[[], Awaitable[str]]) -> str:
    """One request, counted; returns what became of it."""
    began = time.monotonic()
    try:
        async with asyncio.timeout(PATIENCE_S):
            outcome = await ask()
    except Wrong as exc:
        outcome, told = "WRONG", str(exc)
    except TimeoutError:
        outcome, told = "STUCK", f"not over after {PATIENCE_S:g} s"
    except (aiohttp.ClientError, ValueError, KeyError, OSError) as exc:
        outcome, told = "WRONG", f"{type(exc).__name__}: {exc}"
    if outcome in ("WRONG", "STUCK"):
        report.problems.append(f"{kind}: {told}")
    if outcome == "answered":
        report.latencies_s.append(time.monotonic() - began)
    report.count(kind, outcome)
    return outcome


async def _capacity(asker: Asker, seconds: float) -> float:
    """Answers a second of the kinds that are answered, in the mixture's shares, by clients that wait for theirs."""
    kinds = {kind: asked for kind, asked in asker.kinds().items() if kind in WHOLE}
    draw, report = random.Random(1), Report()
    began = time.monotonic()

    async def client() -> None:
        while time.monotonic() - began < seconds:
            (kind,) = draw.choices(list(kinds), [share for share, _ in kinds.values()])
            await _ask(report, kind, kinds[kind][1])

    await asyncio.gather(*(client() for _ in range(CAPACITY_CLIENTS)))
    if report.problems:
        raise Wrong(f"before any overload: {report.problems[0]}")
    return report.total("answered") / (time.monotonic() - began)


async def _load(server: Gateway, words: Words, *, seconds: float, capacity_s: float, say: Callable[[str], None]) -> Report:
    report, draw = Report(seconds=seconds), random.Random(0)
    connector = aiohttp.TCPConnector(limit=MOST_CONNECTIONS)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        asker = Asker(session, server.url, words, draw)
        report.capacity_per_s = await _capacity(asker, capacity_s)
        kinds = asker.kinds()
        answerable = sum(share for kind, (share, _) in kinds.items() if kind in WHOLE)
        per_s = TIMES * report.capacity_per_s / answerable
        say(f"capacity: {report.capacity_per_s:.1f} whole answers/s; {per_s:.1f} requests/s of all kinds for {seconds:g} s")
        began, next_at, next_look = time.monotonic(), 0.0, 0.0
        tasks: set[asyncio.Task[str]] = set()
        while (at := time.monotonic() - began) < seconds:
            if at >= next_look:
                report.memory.append((at, server.resident_bytes() / 2**20))
                next_look = at + 0.5
            while next_at <= at:
                (kind,) = draw.choices(list(kinds), [share for share, _ in kinds.values()])
                tasks.add(task := asyncio.create_task(_ask(report, kind, kinds[kind][1])))
                task.add_done_callback(tasks.discard)
                report.sent += 1
                next_at += draw.expovariate(per_s)
            await asyncio.sleep(min(max(next_at - (time.monotonic() - began), 0.001), 0.5))
        say(f"{report.sent} requests sent; {len(tasks)} are under way")
        await asyncio.gather(*tasks)
    return report


def gauges(url: str) -> dict[str, float]:
    """What /metrics tells of the gauges that must come back to 0, over all their labels."""
    told = _got(url)
    found = {name: re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", told, re.MULTILINE) for name in GAUGES}
    return {name: sum(map(float, values)) for name, values in found.items() if values}


def _got(url: str) -> str:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=30) as answer:
        return str(answer.read().decode())


def soak(
    folder: Path,
    words: Words,
    log: Path,
    *,
    seconds: float,
    capacity_s: float,
    options: tuple[str, ...] = (),
    say: Callable[[str], None] = print,
) -> Report:
    """Serve `folder`, load the server for so long and check all; the report's `problems` tell what is wrong."""
    command = ["-m", "shared.cli", "serve", "--model-dir", str(folder), "--port", "0", *options]
    told = subprocess.run([sys.executable, "-m", "shared.cli", "serve", "--help"], capture_output=True, text=True, check=True).stdout
    command += ["--no-auth"] if "--no-auth" in told else []
    with running(command, log) as server:
        report = asyncio.run(_load(server, words, seconds=seconds, capacity_s=capacity_s, say=say))
        report.problems += _after(server)
    # `running` has seen it end with 0
    said = log.read_text(errors="replace")
    if (at := said.find("Traceback")) >= 0 or (at := said.find('"level": "error"')) >= 0:
        report.problems.append(f"its log tells of an error in the server itself: {said[max(0, at - 200) : at + 2000]}")
    wanted = {"answered": "was answered", "refused": "was refused", "rejected": "was rejected", "left": "was left by its client"}
    report.problems += [f"no request {told}: this was no soak" for outcome, told in wanted.items() if not report.total(outcome)]
    if report.growth_mb > max(GROWTH_MB, GROWTH * report.peak_mb):
        report.problems.append(f"memory's peak grew by {report.growth_mb:.0f} MB after the warm-up; {report.slope_mb_per_min:.1f} MB/min")
    return report


def _after(server: Gateway) -> list[str]:
    """What is wrong with a server that has nothing to do any more."""
    problems = []
    url = f"{server.url}/metrics"
    if not in_time(lambda: sum(gauges(url).values()) <= 1, 20):  # this look at it is in flight as well
        problems.append(f"20 s after the last answer: {gauges(url)}")
    if missing := [name for name in GAUGES if name not in gauges(url)]:
        problems.append(f"/metrics does not tell {', '.join(missing)}")
    try:
        _got(f"{server.url}/readyz")
    except OSError as exc:  # every status but 200 is one
        problems.append(f"/readyz: {exc}")
    return problems


def print_report(report: Report) -> None:
    print(f"\n{'':26}" + "".join(f"{outcome:>12}" for outcome in OUTCOMES))
    for kind, found in report.outcomes.items():
        print(f"{kind:26}" + "".join(f"{found[outcome]:>12,}" for outcome in OUTCOMES))
    latencies = sorted(report.latencies_s)
    print(f"answered within {latencies[len(latencies) // 2]:.2f} s (median), {latencies[int(0.99 * len(latencies))]:.2f} s (p99)")
    curve = " ".join(f"{report.memory[i * (len(report.memory) - 1) // 10][1]:.0f}" for i in range(11))
    print(f"memory, MB, at every tenth of the load: {curve}; the peak after the warm-up grew by {report.growth_mb:+.1f}, the mean by "
          f"{report.slope_mb_per_min:+.2f} a minute")  # fmt: skip
    for problem, times in Counter(report.problems).most_common(20):
        print(f"PROBLEM ({times} x): {problem}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of the load; default 10")
    args = parser.parse_args()
    folder = serving_folder("embedded:smollm2-135m-questions", "int8")
    with tempfile.TemporaryDirectory() as place:
        log, options = Path(place) / "log", ("--max-queue", "64")  # full within seconds
        report = soak(folder, SMOLLM2, log, seconds=60 * args.minutes, capacity_s=min(30.0, 15 * args.minutes), options=options)
    print_report(report)
    outcomes = {outcome.replace(" ", "_").lower(): report.total(outcome) for outcome in OUTCOMES}
    print(
        json.dumps(
            outcomes
            | {
                "capacity_per_s": round(report.capacity_per_s, 2),
                "peak_mb": round(report.peak_mb),
                "growth_mb": round(report.growth_mb, 1),
                "slope_mb_per_min": round(report.slope_mb_per_min, 2),
                "problems": len(report.problems),
                "minutes": args.minutes,
            }
        )
    )
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
