"""What the harvester makes of a teacher's time: beside a bare loop over aiohttp and, if there, its neighbours, in one run.

    python tests/benchmarks/harvest.py                    # four minutes
    python tests/benchmarks/harvest.py --quick            # within a minute: two rounds, few kills
    python tests/benchmarks/harvest.py --peers            # sets distilabel and curator up in a cache folder first, once; 12 minutes
    python tests/benchmarks/harvest.py --rows 1000000     # memory and rate over a million prompts as well: 10 minutes more

The teacher is mock_teacher.py on the loopback, each harvest a process of its own (harvesters.py) with a fresh mock; all of them share the
machine's cores. Ledgers are on the disk of /var/tmp. Systems take turns within each round, and what is compared is the median over rounds
of the ratio within a round, since machines are noisy. Ours is timed from its first line of work to the compacted ledger, without imports;
`distill harvest` and the neighbours, whose start is no part of a long harvest, by the teacher's clock, from first call to last answer, with
the whole time of the process beside it. A limited teacher's ideal is its prompts by its rate, though its bucket is full at first.
Prints tables and what they mean; the last line is one JSON object, null where not measured. Exit code 1 only where a harvester fails; a
missed target is told, not an error. It runs on Linux: it reads /proc.

Expected, written down before the first run on 2 cores that all share (`EXPECTED`). httpx over aiohttp was measured at 1,038 of 1,280
requests/s and 0.61 ms each, a bare loop at up to 1,093 and 0.19 ms; a ledger should cost little beside it. A told rate is kept but for a
few percent of caution, an untold one is found at the price of some refusals. The neighbours were measured before: distilabel at 58-61
requests/s, and 25.5 s with 479 calls for the limited 400; curator at 163, and 23.1 s with 689.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from gateway import Failed, Target, busy_s, processor, shown
from harvesters import Job, Outcome
from mock_teacher import Counts, text_of
from mock_upstream import PROMPT

from shared.settings import cache_dir

sys.path.insert(0, str(Path(__file__).parents[1]))
from harvests import harvested, killed, mock_teacher, recipe

HERE = Path(__file__).parent
DISK = "/var/tmp"  # /tmp is in memory on many machines
DELAY_MS, IN_FLIGHT, PROMPTS = 50, 64, 2000
IDEAL_PER_S = IN_FLIGHT / DELAY_MS * 1000
PER_S, LIMITED_PROMPTS = 40, 400
CAPACITIES = (40, 80)
"""Of the limited teacher's bucket: what it allows in a second, and all that it allows during a Retry-After."""
HELD = 100_000
FAULTS_SEED = 1
SAMPLE_EVERY_S = 1.0

BARE, OURS, COMMAND, DISTILABEL, CURATOR = "bare aiohttp loop", "ours", "distill harvest", "distilabel", "curator"

EXPECTED: dict[str, str] = {
    "of_ideal": "0.78",
    "of_bare_aiohttp": "0.92",
    "cpu_ms_per_request": "0.75",
    "limited_of_allowed": "0.97",
    "limited_of_allowed_untold": "0.85",
    "wasted_calls": "0",
    "wasted_calls_untold": "0.08",
    "kill_asked_again_most": "up to 64",
    "resume_first_call_s": "2",
    "resume_first_call_one_sample_s": "3",
    "million_rss_mb": "150",
    "million_slowdown": "0.03",
    "distilabel_per_s": "60",
    "curator_per_s": "163",
    "distilabel_limited_s": "25",
    "curator_limited_s": "23",
}
TARGETS = {
    "of_ideal": Target("at least 0.8, idle machine", lambda value: value >= 0.8),
    "of_bare_aiohttp": Target("at least 0.9", lambda value: value >= 0.9),
    "cpu_ms_per_request": Target("at most 0.8", lambda value: value <= 0.8),
    "limited_of_allowed": Target("at least 0.95", lambda value: value >= 0.95),
    "limited_of_allowed_untold": Target("at least 0.95", lambda value: value >= 0.95),
    "wasted_calls": Target("at most 0.05", lambda value: value <= 0.05),
    "wasted_calls_untold": Target("at most 0.05", lambda value: value <= 0.05),
    "calls_inside_gate": Target("none", lambda value: value == 0),
    "lost": Target("none", lambda value: value == 0),
    "kill_lost": Target("none", lambda value: value == 0),
    "kill_duplicated": Target("none", lambda value: value == 0),
    "kill_asked_again_most": Target(f"at most {IN_FLIGHT}, those in flight", lambda value: value <= IN_FLIGHT),
    "resume_first_call_s": Target("at most 3", lambda value: value <= 3),
    "resume_first_call_one_sample_s": Target("at most 3", lambda value: value <= 3),
    "fault_rows_that_differ": Target("none", lambda value: value == 0),
    "million_rss_mb": Target("at most 300", lambda value: value <= 300),
    "million_slowdown": Target("at most 0.1", lambda value: value <= 0.1),
}


@dataclass(frozen=True)
class Peer:
    """A neighbour on PyPI, of one version, in an environment of its own."""

    name: str
    version: str
    sha256: str
    """Of its wheel."""
    requirements: tuple[str, ...]
    """Beside itself: its extra, and what it imports without saying so."""


PEERS = {
    DISTILABEL: Peer(
        "distilabel",
        "1.5.3",
        "e3c10ccdf1e4fc45e81bc19ab7da2b248bc57fad277e14eac0976f25641c77b3",
        ("distilabel[openai]==1.5.3", "requests>=2.32"),
    ),
    # LiteLLM, which it needs, was compromised in 1.82.7 and 1.82.8; what it asks for by version is later and had neither payload
    CURATOR: Peer(
        "bespokelabs-curator",
        "0.1.31",
        "a181f8007a3083d27e823363ae6bba1bfdae21d4f9af6709bb50d7c94f090d76",
        ("bespokelabs-curator==0.1.31", "litellm==1.83.7"),
    ),
}


@dataclass(frozen=True)
class Harvested:
    """One harvest: what the harvester says, and what the teacher saw."""

    outcome: Outcome
    counts: Counts
    prompts: int

    @property
    def per_s(self) -> float:
        """By the harvester's own clock."""
        return self.prompts / self.outcome.seconds

    @property
    def answered_per_s(self) -> float:
        """By the teacher's clock."""
        return self.prompts / self.counts.seconds

    @property
    def cpu_ms(self) -> float:
        return self.outcome.cpu_s / self.prompts * 1e3

    @property
    def wasted(self) -> float:
        """Calls beyond one a prompt, as a share of the prompts."""
        return (self.counts.calls - self.prompts) / self.prompts


@dataclass
class Results:
    """All that was measured; a system's list has one entry a round."""

    rate: dict[str, list[Harvested]] = field(default_factory=dict)
    limited: dict[tuple[int, bool, str], list[Harvested]] = field(default_factory=dict)
    """By capacity, whether it was told the rate, and system."""
    values: dict[str, float | None] = field(default_factory=dict)


class Harvesters:
    """Runs one harvest of a system against a fresh teacher."""

    def __init__(self, peers: dict[str, Path]) -> None:
        """`peers`: the Python of each neighbour."""
        self._python = {BARE: Path(sys.executable), OURS: Path(sys.executable), **peers}
        self.names = [BARE, OURS, COMMAND, *peers]

    def run(self, name: str, *teacher: str, prompts: int, told: bool = False, held: int = 0, samples: int = 1) -> Harvested:
        """Raises Failed with what it said if it fails."""
        with mock_teacher("--delay-ms", str(DELAY_MS), *teacher) as mock, tempfile.TemporaryDirectory(dir=DISK) as folder:
            rate = PER_S * 60 if told else None
            if name == COMMAND:
                outcome = _commanded(mock, Path(folder), prompts, rate)
            else:
                job = Job(
                    url=mock.url,
                    prompt=PROMPT,
                    answer=_any_number(text_of(0, 0)),
                    prompts=prompts,
                    folder=f"{folder}/ledger",
                    in_flight=IN_FLIGHT,
                    requests_per_minute=rate,
                    held=held,
                    samples=samples,
                )
                outcome = self._asked(name, job, Path(folder))
            counts = Counts(**mock.counts())
            return Harvested(outcome, counts, prompts)

    def start(self, name: str, job: Job, folder: Path) -> subprocess.Popen[str]:
        env = dict(os.environ)
        if name in PEERS:
            # somebody else's program: it sees nothing of this shell's environment, and tells nobody of its use
            env = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "TELEMETRY_ENABLED": "false", "CURATOR_DISABLE_RICH_DISPLAY": "1"}
            env |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
        child = {BARE: "bare", OURS: "ours"}.get(name, name)
        command = [str(self._python[name]), str(HERE / "harvesters.py"), child]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        assert process.stdin is not None
        process.stdin.write(json.dumps(asdict(job)))
        process.stdin.close()
        process.stdin = None
        return process

    def _asked(self, name: str, job: Job, folder: Path) -> Outcome:
        return finished(name, self.start(name, job, folder))


def finished(name: str, process: subprocess.Popen[str]) -> Outcome:
    """What it says once it has ended. Raises Failed."""
    out, err = process.communicate()
    if process.returncode:
        raise Failed(f"{name} ended with {process.returncode}:\n" + "\n".join(err.splitlines()[-15:]))
    # some end with an empty line
    return Outcome(**json.loads(next(line for line in reversed(out.splitlines()) if line.startswith('{"seconds"'))))


def _commanded(mock: Any, folder: Path, prompts: int, rate: float | None) -> Outcome:
    """`distill harvest`, with its start and its data set."""
    file = recipe(folder, prompts, question=PROMPT)
    began, cpu = time.monotonic(), os.times()
    told = [] if rate is None else ["--set", f"harvest.requests_per_minute={rate:g}"]
    lines = harvested(file, folder / "run", mock, *told)
    seconds, used = time.monotonic() - began, os.times()
    wrong = sum(status != "ok" or not _answers_some_prompt(text) for *_, status, text in lines)
    cpu_s = used.children_user + used.children_system - cpu.children_user - cpu.children_system
    return Outcome(seconds=seconds, began_at=began, cpu_s=cpu_s, lost=wrong + prompts - len({line[0] for line in lines}))


def _any_number(text: str) -> str:
    """An answer to #0 with {} for the number."""
    return text.replace("#0", "#{}")


def _answers_some_prompt(text: str) -> bool:
    return text == text_of(int(text.partition("#")[2].partition(":")[0]), 0)


def made_peer(peer: Peer) -> Path:
    """The Python of an environment with `peer` in the cache folder, made if it is not there. Raises Failed."""
    folder = cache_dir() / f"{peer.name}-{peer.version}"
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    print(f"setting up {peer.name} {peer.version} in {folder}: some minutes, once", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    exact = folder / "exact.txt"
    exact.write_text(f"{peer.name}=={peer.version} --hash=sha256:{peer.sha256}\n")
    # wheels alone: nothing of theirs runs while it is installed
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"]
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, "--no-deps", "--require-hashes", "-r", str(exact)],
        [*pip, *peer.requirements],
    ):
        if subprocess.run(command).returncode:
            raise Failed(f"{peer.name} cannot be set up; leave --peers out. What failed: {' '.join(command)}")
    (folder / "complete").touch()
    return python


def measure_rate(harvesters: Harvesters, results: Results, *, rounds: int) -> None:
    print(f"\n{DELAY_MS} ms an answer, {IN_FLIGHT} in flight, {PROMPTS:,} prompts: ideal {IDEAL_PER_S:,.0f}/s; medians of {rounds} rounds")
    print_row("", "req/s", "teacher's clock", "of ideal", "CPU ms/req", "whole s", "lost")
    for i in range(rounds):
        for name in in_turn(harvesters.names, i):
            results.rate.setdefault(name, []).append(harvesters.run(name, prompts=PROMPTS))
    for name in harvesters.names:
        found = results.rate[name]
        per_s = median(one.per_s for one in found) if name in (BARE, OURS) else None
        answered = median(one.answered_per_s for one in found)
        numbers = (
            per_s,
            answered,
            (per_s or answered) / IDEAL_PER_S,
            median(one.cpu_ms for one in found),
            median(one.outcome.seconds for one in found),
            sum(one.outcome.lost for one in found),
        )
        print_row(name, *map(shown, numbers))


def measure_limited(harvesters: Harvesters, results: Results, *, rounds: int, capacities: tuple[int, ...], prompts: int) -> None:
    print(f"\n{PER_S} requests/s, then 429 with Retry-After 2 s; {prompts} prompts: ideal {prompts / PER_S:g} s")
    print_row("", "s", "of allowed", "calls", "wasted", "in gate", "lost")
    names = [name for name in harvesters.names if name not in (BARE, COMMAND)]
    for capacity in capacities:
        cases = [(told, name) for told in (True, False) for name in names if not (told and name == DISTILABEL)]
        for i in range(rounds):
            for told, name in in_turn(cases, i):
                found = harvesters.run(name, "--per-s", str(PER_S), "--capacity", str(capacity), prompts=prompts, told=told)
                results.limited.setdefault((capacity, told, name), []).append(found)
        for told, name in cases:
            runs = results.limited[capacity, told, name]
            numbers = (
                median(map(limited_s, runs)),
                median(map(of_allowed, runs)),
                median(one.counts.calls for one in runs),
                median(one.wasted for one in runs),
                sum(one.counts.inside_gate for one in runs),
                sum(one.outcome.lost for one in runs),
            )
            print_row(f"{name}, {'told' if told else 'not told'}, bucket of {capacity}", *map(shown, numbers))


def limited_s(one: Harvested) -> float:
    """By the teacher's clock: the start of a neighbour is not its pace."""
    return one.counts.seconds


def of_allowed(one: Harvested) -> float:
    return one.prompts / PER_S / limited_s(one)


def measure_kills(results: Results, *, kills: int, prompts: int) -> None:
    with mock_teacher("--delay-ms", str(DELAY_MS)) as mock, tempfile.TemporaryDirectory(dir=DISK) as name:
        folder = Path(name)
        file = recipe(folder, prompts, question=PROMPT)
        whole = harvested(file, folder / "whole", mock)
    with mock_teacher("--delay-ms", str(DELAY_MS)) as mock, tempfile.TemporaryDirectory(dir=DISK) as name:
        folder = Path(name)
        file = recipe(folder, prompts, question=PROMPT)
        # a kill every few rounds of answers: there is something left to do at the last one
        cut = killed(file, folder / "run", mock, kills=kills, spread_s=0.17, seed=1)
        most = mock.counts()["most_in_flight"]
    lost, duplicated = len(set(whole) - set(cut.lines)), len(cut.lines) - len(set(cut.lines))
    results.values |= {
        "kills": cut.kills,
        "kill_lost": lost + len(set(cut.lines) - set(whole)),
        "kill_duplicated": duplicated,
        "kill_asked_again_most": max(cut.asked_again),
    }
    print(f"\n{cut.kills} times SIGKILL in one harvest of {prompts:,} prompts: {lost} lost, {duplicated} duplicated,")
    print(f"{sum(cut.asked_again)} prompts asked again, at most {max(cut.asked_again)} for a kill; at most {most} were in flight")


def measure_resume(harvesters: Harvesters, results: Results) -> None:
    print(f"\nagain with {HELD:,} rows held and {IN_FLIGHT} prompts missing")
    for samples, name in ((4, "resume_first_call_s"), (1, "resume_first_call_one_sample_s")):
        found = harvesters.run(OURS, prompts=IN_FLIGHT, held=HELD // samples, samples=samples)
        first_s = found.counts.first_call_at - found.outcome.began_at
        results.values[name] = first_s
        results.values["resume_lost"] = results.values.get("resume_lost", 0) + found.outcome.lost
        print(f"  of {samples} a prompt: first call after {first_s:.2f} s, {found.counts.calls} calls")


def measure_faults(results: Results, *, prompts: int) -> None:
    found = []
    for faults in ((), ("--faults", str(FAULTS_SEED))):
        with mock_teacher("--delay-ms", str(DELAY_MS), *faults) as mock, tempfile.TemporaryDirectory(dir=DISK) as name:
            folder = Path(name)
            file = recipe(folder, prompts, samples=2, question=PROMPT)
            found.append(harvested(file, folder / "run", mock, "--set", "teacher.timeout_s=2"))
            counts = Counts(**mock.counts())
    right, plagued = map(set, found)
    results.values["fault_rows_that_differ"] = len(right ^ plagued)
    told = ", ".join(f"{number} {name}" for name, number in sorted(counts.faults.items()))
    print(f"\n{counts.calls:,} calls for {prompts:,} prompts of 2 samples, of which went wrong: {told}")
    print(f"{len(right ^ plagued)} of {len(right):,} rows differ; {counts.seconds:.1f} s from first call to last answer")


@dataclass(frozen=True)
class Reading:
    """A long harvest as it is seen from outside."""

    answers: int = 0
    seconds: float = 0.0
    """By the teacher's clock."""
    cpu_s: float = 0.0
    """Of the harvester, with its start."""
    rss_mb: float = 0.0


def measure_memory(harvesters: Harvesters, results: Results, *, rows: int) -> None:
    """RSS and pace over a long harvest, in tenths."""
    print(f"\n{rows:,} prompts from a generator, {IN_FLIGHT} in flight")
    print_row("", "answers", "s", "req/s", "CPU ms/req", "RSS MB")
    tenths, most = [Reading()], 0.0
    with mock_teacher("--delay-ms", "5") as mock, tempfile.TemporaryDirectory(dir=DISK) as folder:
        job = Job(
            url=mock.url, prompt=PROMPT, answer=_any_number(text_of(0, 0)), prompts=rows, folder=f"{folder}/ledger", in_flight=IN_FLIGHT
        )
        process = harvesters.start(OURS, job, Path(folder))
        while process.poll() is None and len(tenths) <= 10:
            time.sleep(SAMPLE_EVERY_S)
            counts = Counts(**mock.counts())
            now = reading(process.pid, counts)
            most = max(most, now.rss_mb)
            if now.answers >= len(tenths) * rows // 10:
                per_s, cpu_ms = pace(tenths[-1], now)
                print_row("", f"{now.answers:,}", f"{now.seconds:,.0f}", shown(per_s), shown(cpu_ms), shown(now.rss_mb))
                tenths.append(now)
        outcome = finished(OURS, process)
    (first_per_s, first_ms), (last_per_s, last_ms) = pace(tenths[0], tenths[1]), pace(tenths[-2], tenths[-1])
    results.values |= {
        "million_rows": rows,
        "million_rss_mb": most,
        "million_slowdown": 1 - last_per_s / first_per_s,
        "million_cpu_growth": last_ms / first_ms - 1,
        "million_per_s": tenths[-1].answers / tenths[-1].seconds,
        "million_lost": outcome.lost + outcome.duplicated,
    }
    print(
        f"from the first to the last tenth {1 - last_per_s / first_per_s:.1%} slower, with {last_ms / first_ms - 1:+.1%} of CPU a request;"
    )
    print(f"RSS at most {most:.0f} MB; {outcome.lost} lost, {outcome.duplicated} duplicated")


def pace(since: Reading, until: Reading) -> tuple[float, float]:
    """Answers a second, and ms of CPU an answer: machines are shared, so that the second tells more of the harvester."""
    answers = until.answers - since.answers
    return answers / (until.seconds - since.seconds), (until.cpu_s - since.cpu_s) / answers * 1e3


def reading(pid: int, counts: Counts) -> Reading:
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    cpu_s = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
    rss_mb = int(stat[21]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return Reading(counts.answered, counts.last_answer_at - counts.first_call_at, cpu_s, rss_mb)


def in_turn(names: list[Any], i: int) -> list[Any]:
    """Every second round goes the other way round, against drift."""
    return names if i % 2 == 0 else names[::-1]


def print_row(name: str, *cells: str) -> None:
    print(f"{name:38}" + "".join(f"{cell:>16}" for cell in cells), flush=True)


def summary(results: Results) -> dict[str, float | None]:
    """The last line's object."""
    ours, bare = results.rate[OURS], results.rate[BARE]
    told, untold = results.limited[CAPACITIES[0], True, OURS], results.limited[CAPACITIES[0], False, OURS]
    mine = [
        one for runs in (results.rate, results.limited) for key, found in runs.items() if OURS in key or COMMAND in key for one in found
    ]

    def middle(name: str, of: Callable[[Harvested], float]) -> float | None:
        return median(map(of, results.rate[name])) if name in results.rate else None

    def limited(name: str, of: Callable[[Harvested], float], capacity: int = CAPACITIES[0], *, told: bool = False) -> float | None:
        found = results.limited.get((capacity, told, name))
        return median(map(of, found)) if found else None

    values: dict[str, float | None] = {
        "of_ideal": median(one.per_s for one in ours) / IDEAL_PER_S,
        "of_bare_aiohttp": median(a.per_s / b.per_s for a, b in zip(ours, bare, strict=True)),
        "cpu_ms_per_request": middle(OURS, lambda one: one.cpu_ms),
        "requests_per_s": middle(OURS, lambda one: one.per_s),
        "command_of_ideal": median(one.answered_per_s for one in results.rate[COMMAND]) / IDEAL_PER_S,
        "command_whole_s": middle(COMMAND, lambda one: one.outcome.seconds),
        "bare_requests_per_s": middle(BARE, lambda one: one.per_s),
        "bare_cpu_ms_per_request": middle(BARE, lambda one: one.cpu_ms),
        "limited_of_allowed": median(map(of_allowed, told)),
        "limited_of_allowed_untold": median(map(of_allowed, untold)),
        "limited_of_allowed_untold_80": limited(OURS, of_allowed, 80),
        "wasted_calls": median(one.wasted for one in told),
        "wasted_calls_untold": median(one.wasted for one in untold),
        "wasted_calls_untold_80": limited(OURS, lambda one: one.wasted, 80),
        "calls_inside_gate": sum(one.counts.inside_gate for one in mine),
        "lost": sum(one.outcome.lost + one.outcome.duplicated for one in mine) + (results.values.get("resume_lost") or 0),
    }
    resumed = ("resume_first_call_s", "resume_first_call_one_sample_s")
    for name in ("kills", "kill_lost", "kill_duplicated", "kill_asked_again_most", *resumed, "fault_rows_that_differ"):
        values[name] = results.values.get(name)
    for name in ("million_rows", "million_rss_mb", "million_slowdown", "million_cpu_growth", "million_per_s", "million_lost"):
        values[name] = results.values.get(name)
    for name in (DISTILABEL, CURATOR):
        values |= {
            f"{name}_per_s": middle(name, lambda one: one.answered_per_s),
            f"{name}_cpu_ms_per_request": middle(name, lambda one: one.cpu_ms),
            f"{name}_limited_s": limited(name, limited_s),
            f"{name}_limited_calls": limited(name, lambda one: one.counts.calls),
            f"{name}_limited_lost": limited(name, lambda one: one.outcome.lost),
            f"{name}_limited_told_s": limited(name, limited_s, told=True),
        }
    return {name: None if value is None else round(value, 3) for name, value in values.items()}


def print_verdict(values: dict[str, float | None]) -> None:
    print(f"\n{'measure':34}{'expected':>12}{'measured':>12}  target")
    for name, value in values.items():
        target = TARGETS.get(name)
        verdict = "" if target is None or value is None else " (met)" if target.met(value) else " (MISSED)"
        print(f"{name:34}{EXPECTED.get(name, ''):>12}{shown(value):>12}  {target.wording if target else ''}{verdict}")


def measure(*, quick: bool, peers: dict[str, Path], rows: int | None) -> None:
    """The whole run. Raises Failed."""
    began, busy = time.monotonic(), busy_s()
    print(f"machine: {os.cpu_count()} cores, {processor()}, Python {platform.python_version()}; teacher and harvester share them")
    harvesters, results = Harvesters(peers), Results()
    measure_rate(harvesters, results, rounds=2 if quick else 5)
    if quick:
        measure_limited(harvesters, results, rounds=1, capacities=CAPACITIES[:1], prompts=LIMITED_PROMPTS // 2)
    else:
        measure_limited(harvesters, results, rounds=3, capacities=CAPACITIES, prompts=LIMITED_PROMPTS)
    measure_kills(results, kills=6 if quick else 50, prompts=300 if quick else PROMPTS)
    measure_faults(results, prompts=300 if quick else PROMPTS)
    measure_resume(harvesters, results)
    if rows:
        measure_memory(harvesters, results, rows=rows)
    values = summary(results)
    ours, wall = os.times(), time.monotonic() - began
    others = max(0.0, busy_s() - busy - sum(ours[:4])) / wall
    print_verdict(values)
    print(f"{wall:.0f} s, in which other programs took {others:.2f} of {os.cpu_count()} cores: trust the rates only below 0.1")
    print(json.dumps(values | {"quick": quick, "cores": os.cpu_count(), "cores_taken_by_others": round(others, 2)}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within a minute: two rounds, a few kills, one bucket")
    parser.add_argument("--peers", action="store_true", help="set the neighbours up in a cache folder, once, and measure them as well")
    parser.add_argument("--rows", type=int, metavar="N", help="also harvest N prompts from a generator and watch memory and rate")
    args = parser.parse_args()
    if args.quick and args.peers:
        parser.error("--peers takes its time: leave --quick out")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not at once: children must be ended
    try:
        measure(quick=args.quick, peers={name: made_peer(peer) for name, peer in PEERS.items()} if args.peers else {}, rows=args.rows)
    except Failed as exc:
        print(f"harvest benchmark: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
