"""What the gateway costs: a bare upstream, the gateway in front of it and, if there, LiteLLM's proxy, side by side in one run.

    python tests/benchmarks/gateway.py                    # ten minutes
    python tests/benchmarks/gateway.py --quick            # under a minute: rough, without the memory run and without LiteLLM
    python tests/benchmarks/gateway.py --peers            # sets LiteLLM up in a cache folder first, once
    python tests/benchmarks/gateway.py --litellm-venv DIR # LiteLLM from a virtual environment of yours

Everything is on the loopback and in processes of its own: mock_upstream.py (answers after 0 or 50 ms), `distill teacher` as a user starts
it, with keys, limits (wide enough never to bind) and metrics on and its log in a file, and load.py, which checks that every answer is the
one to its own request. Systems take turns within each round, and what is compared is the median over rounds of the difference or ratio
within a round, since machines are noisy. Prints a table and what it means; the last line is one JSON object, null where not measured.
Exit code 1 only for a wrong answer; a missed target is told, not an error. It runs on Linux: it reads /proc.

Expected, written down before the first run on 2 cores that gateway, upstream and load share (`EXPECTED`): a bare FastAPI proxy was measured
at +0.8-0.95 ms, 1,200 requests/s and 0.75; keys, limits and metrics should cost little beside it. A second worker cannot double the rate,
since there is less than one core left for it. LiteLLM was measured at +20-24 ms and 59-63 requests/s.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from statistics import median

from load import Load, Result, WrongAnswer, run
from mock_upstream import GAP_S

from shared.settings import cache_dir

HERE = Path(__file__).parent
LITELLM = "1.82.6"
"""Pinned: 1.82.7 and 1.82.8 on PyPI stole credentials, 1.107.0 is told to be compromised too; this is the last before all of them."""
LITELLM_SHA256 = "164a3ef3e19f309e3cabc199bef3d2045212712fefdfa25fc7f75884a5b5b205"
LITELLM_COMPROMISED = ("1.82.7", "1.82.8", "1.107.0")
START_S = 90.0
"""Seconds in which a server must listen; LiteLLM needs 10 to 30."""
MEMORY_STEPS, MEMORY_STEP = 10, 10_000
WARM_UP_REQUESTS = 5_000
"""Before memory is read first: connections, caches and the allocator's arenas have then their size."""
WIDE = {
    "--requests-per-minute": 100_000,
    "--characters-per-day": 10**15,
    "--concurrent-requests": 4096,
    "--max-in-flight": 1024,
    "--max-queue": 1024,
}
"""Limits that are checked for every request and never bind."""
KEYS = 8
"""Enough that the requests a minute that one key may be given at most do not bind."""

EXPECTED: dict[str, str] = {
    "p50_added_ms": "0.9",
    "requests_per_s_per_worker": "1,100",
    "throughput_ratio_64": "0.75",
    "requests_per_s_2_workers": "1.4 x one worker",
    "rss_growth_mb": "under 10",
    "ttft_added_ms": "1.2",
    "litellm_p50_added_ms": "20",
    "litellm_requests_per_s": "60",
}


@dataclass(frozen=True)
class Target:
    wording: str
    met: Callable[[float], bool]


TARGETS = {
    "p50_added_ms": Target("at most 1.2", lambda value: value <= 1.2),
    "requests_per_s_per_worker": Target("at least 1,000", lambda value: value >= 1000),
    "throughput_ratio_64": Target("at least 0.75", lambda value: value >= 0.75),
    "workers_gain": Target("above 1: grows with workers", lambda value: value > 1),
    "rss_growth_mb": Target("flat: at most 10", lambda value: value <= 10),
}


@dataclass(frozen=True)
class Case:
    title: str
    delay_ms: int
    in_flight: int
    stream: bool = False


ALONE, ALONE_50 = Case("1 in flight, upstream 0 ms", 0, 1), Case("1 in flight, upstream 50 ms", 50, 1)
FULL, FULL_50 = Case("64 in flight, upstream 0 ms", 0, 64), Case("64 in flight, upstream 50 ms", 50, 64)
STREAM, STREAM_FULL = Case("1 stream, upstream 0 ms", 0, 1, stream=True), Case("64 streams, upstream 0 ms", 0, 64, stream=True)
CASES = (ALONE, ALONE_50, FULL, FULL_50, STREAM, STREAM_FULL)

DIRECT, ONE, TWO, PEER = "direct (no gateway)", "gateway, 1 worker", "gateway, 2 workers", "LiteLLM, 1 worker"


class Failed(Exception):
    """A server that does not start, or is not set up as it should be."""


class Server:
    """A process, what it said so far, and what it and its children use."""

    def __init__(self, process: subprocess.Popen[bytes], out: Path, err: Path) -> None:
        self._process, self._out, self._err = process, out, err

    def said(self, pattern: str) -> str:
        """The first group of `pattern` in its output, waited for. Raises Failed."""
        deadline = time.monotonic() + START_S
        while not (found := re.search(pattern, self._out.read_text())):
            self.fail_unless_alive(deadline)
        return found[1]

    def fail_unless_alive(self, deadline: float) -> None:
        """Wait a moment. Raises Failed with the end of its log if it has ended or the time is up."""
        if self._process.poll() is not None or time.monotonic() > deadline:
            raise Failed(f"{self._process.args!r} did not start:\n" + "\n".join(self._err.read_text().splitlines()[-15:]))
        time.sleep(0.05)

    def cpu_s(self) -> float:
        return sum(int(fields[11]) + int(fields[12]) for fields in self._stat()) / os.sysconf("SC_CLK_TCK")

    def rss_mb(self) -> float:
        return sum(int(fields[21]) for fields in self._stat()) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def _stat(self) -> Iterator[list[str]]:
        """Of each process of its session (it leads one), the fields of /proc/PID/stat from the third on: a name may hold spaces."""
        for file in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = file.read_text().rpartition(") ")[2].split()
            except OSError:  # it ended just now
                continue
            if int(fields[3]) == self._process.pid:
                yield fields

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@contextmanager
def started(command: list[str], folder: Path, *, env: dict[str, str] | None = None) -> Iterator[Server]:
    """`command` in a session of its own, with its output and its log in files of `folder`; stopped at the end of the block."""
    name = f"{len(list(folder.glob('*.log')))}"
    out, err = folder / f"{name}.out", folder / f"{name}.log"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stdout, stderr=stderr, env=env, start_new_session=True)
    server = Server(process, out, err)
    try:
        yield server
    finally:
        server.stop()


@dataclass(frozen=True)
class System:
    """Something that answers, in front of an upstream with one delay."""

    name: str
    url: str
    model: str
    keys: list[str]
    server: Server


@dataclass(frozen=True)
class Sample:
    """One system's share in one round."""

    result: Result
    cpu_ms: float
    """Of the system's server, for one request; not of load or, behind a gateway, of the upstream."""


class Gateways:
    """Starts `distill teacher` with all that its own --help knows of keys, limits and workers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._distill = str(Path(sys.executable).with_name("distill"))
        # variables of the shell would change what is measured
        self._env = {name: value for name, value in os.environ.items() if not name.startswith("TEACHER_")}
        told = subprocess.run([self._distill, "teacher", "--help"], capture_output=True, text=True, check=True, env=self._env)
        self._options = set(re.findall(r"--[a-z-]+", told.stdout))
        self.has_workers = "--workers" in self._options
        self.keys: list[str] = []
        self._flags: list[str] = []
        self.limits = [part for name, value in WIDE.items() if name in self._options for part in (name, str(value))]
        if "--api-keys-file" in self._options:
            self.keys = [secrets.token_urlsafe(32) for _ in range(KEYS)]
            keys = folder / "keys.yaml"
            keys.write_text(
                json.dumps({f"user-{i}": {"sha256": hashlib.sha256(key.encode()).hexdigest()} for i, key in enumerate(self.keys)})
            )
            self._flags = ["--api-keys-file", str(keys)]
        self.missing = sorted({*WIDE, "--api-keys-file", "--workers"} - self._options)

    @contextmanager
    def before(self, upstream: str, *, workers: int) -> Iterator[System]:
        """A gateway in front of `upstream`. Raises Failed if it starts without what was asked for."""
        command = [self._distill, "teacher", "--engine", "upstream", "--upstream-url", upstream, "--upstream-model", "mock-7b"]
        command += ["--public-name", "teacher", "--port", "0", "--metrics-port", "0", "--until-stdin-closes", *self._flags, *self.limits]
        command += ["--workers", str(workers)] if self.has_workers else []
        with started(command, self._folder, env=self._env) as server:
            url = server.said(r"listening on (http\S+)")
            metrics = server.said(r"metrics on (http\S+)")
            if (status := _status(metrics)) != 200:
                raise Failed(f"{metrics} answers {status}: metrics are not on")
            if self.keys and (status := _status(f"{url}/chat/completions", b"{}")) != 401:
                raise Failed(f"{url} answers {status} to a request without a key: keys are not on")
            yield System(ONE if workers == 1 else TWO, url, "teacher", self.keys, server)


@contextmanager
def litellm(venv: Path, upstreams: dict[int, str], folder: Path) -> Iterator[dict[int, System]]:
    """LiteLLM's proxy with one worker and a master key, in front of each upstream. Raises Failed."""
    key = f"sk-{secrets.token_urlsafe(32)}"
    models = [
        {"model_name": f"teacher-{delay_ms}", "litellm_params": {"model": "openai/mock-7b", "api_base": url, "api_key": "none"}}
        for delay_ms, url in upstreams.items()
    ]
    config = folder / "litellm.yaml"
    config.write_text(json.dumps({"model_list": models, "general_settings": {"master_key": key}, "litellm_settings": {"telemetry": False}}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(venv / "bin" / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    # somebody else's program: it sees nothing of this shell's environment, and looks nothing up
    env = {"PATH": f"{venv / 'bin'}:/usr/bin:/bin", "HOME": str(folder), "LITELLM_LOCAL_MODEL_COST_MAP": "True", "DISABLE_ADMIN_UI": "True"}
    litellm_version(venv)  # before its Python runs
    with started(command, folder, env=env) as server:
        deadline = time.monotonic() + START_S
        while _status(f"http://127.0.0.1:{port}/health/liveliness") != 200:
            server.fail_unless_alive(deadline)
        yield {delay_ms: System(PEER, f"http://127.0.0.1:{port}/v1", f"teacher-{delay_ms}", [key], server) for delay_ms in upstreams}


def _status(url: str, body: bytes | None = None) -> int | None:
    """The HTTP status that `url` answers with, None if nothing answers."""
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as exc:
        return exc.code
    except OSError:
        return None


def litellm_version(venv: Path) -> str:
    """Read from the names of its files: malicious releases run at the mere start of their Python. Raises Failed."""
    found = [
        folder.name.removeprefix("litellm-").removesuffix(".dist-info")
        for folder in venv.glob("lib/python*/site-packages/litellm-*.dist-info")
    ]
    if not found:
        raise Failed(f"{venv}: LiteLLM is not installed there")
    if found[0] in LITELLM_COMPROMISED:
        raise Failed(
            f"{venv}: LiteLLM {found[0]} is a compromised release; remove it, and change the credentials that this machine could read"
        )
    return found[0]


def made_litellm() -> Path:
    """A virtual environment with LiteLLM's proxy in the cache folder, made if it is not there. Raises Failed."""
    cache = cache_dir() / f"litellm-{LITELLM}"
    if (cache / "complete").exists():
        return cache
    print(f"setting up LiteLLM {LITELLM} in {cache}: some minutes, once", flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    exact = cache / "litellm.txt"
    exact.write_text(f"litellm=={LITELLM} --hash=sha256:{LITELLM_SHA256}\n")
    pip = [str(cache / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"]
    for command in (
        [sys.executable, "-m", "venv", str(cache)],
        [*pip, "--no-deps", "--require-hashes", "-r", str(exact)],
        [*pip, f"litellm[proxy]=={LITELLM}"],
    ):
        if subprocess.run(command).returncode:
            raise Failed(f"LiteLLM cannot be set up; leave --peers out. What failed: {' '.join(command)}")
    (cache / "complete").touch()
    return cache


class Numbers:
    """Request numbers that no two loads share."""

    def __init__(self) -> None:
        self._loads = count(1)

    def next(self) -> int:
        return next(self._loads) * 10_000_000


def streams(system: System, numbers: Numbers) -> bool:
    """Whether it can stream; what refuses the field by name cannot. Raises WrongAnswer for anything else."""
    load = Load(url=system.url, model=system.model, keys=system.keys, in_flight=1, requests=1, stream=True, first_number=numbers.next())
    try:
        run(load)
    except WrongAnswer as exc:
        if "HTTP/1.1 422" in str(exc):
            return False
        raise
    return True


def rounds_of(case: Case, systems: list[System], *, rounds: int, seconds: float, numbers: Numbers) -> dict[str, list[Sample]]:
    """Each system's samples, one a round; every second round goes the other way round, against drift."""
    samples: dict[str, list[Sample]] = defaultdict(list)
    for i in range(rounds):
        for system in systems if i % 2 == 0 else reversed(systems):
            before = system.server.cpu_s()
            load = Load(
                url=system.url,
                model=system.model,
                keys=system.keys,
                in_flight=case.in_flight,
                seconds=seconds,
                warm_up_s=min(0.5, seconds / 2),
                stream=case.stream,
                first_number=numbers.next(),
            )
            result = run(load)
            samples[system.name].append(Sample(result, (system.server.cpu_s() - before) / result.answered * 1e3))
    return samples


def memory(system: System, numbers: Numbers) -> list[float]:
    """MB of the gateway after the warm-up, then after each of ten times 10,000 requests, 64 in flight."""

    def ask(requests: int) -> float:
        load = Load(url=system.url, model=system.model, keys=system.keys, in_flight=64, requests=requests, first_number=numbers.next())
        run(replace(load, warm_up_s=0.0))
        return system.server.rss_mb()

    return [ask(WARM_UP_REQUESTS), *(ask(MEMORY_STEP) for _ in range(MEMORY_STEPS))]


Samples = dict[Case, dict[str, list[Sample]]]


def compared(samples: Samples, case: Case, name: str, of: Callable[[Result, Result], float]) -> float | None:
    """The median over rounds of `of(system's result, direct result)`; None if it was not measured."""
    ours, direct = samples.get(case, {}).get(name), samples.get(case, {}).get(DIRECT)
    return median(of(a.result, b.result) for a, b in zip(ours, direct, strict=True)) if ours and direct else None


def middle(samples: Samples, case: Case, name: str, of: Callable[[Sample], float]) -> float | None:
    found = samples.get(case, {}).get(name)
    return median(map(of, found)) if found else None


def p50_added(ours: Result, direct: Result) -> float:
    return ours.p50_ms - direct.p50_ms


def ratio(ours: Result, direct: Result) -> float:
    return ours.per_s / direct.per_s


def first_added(ours: Result, direct: Result) -> float:
    assert ours.first_p50_ms is not None
    assert direct.first_p50_ms is not None
    return ours.first_p50_ms - direct.first_p50_ms


def pieces_per_s(sample: Sample) -> float:
    return sample.result.pieces / sample.result.seconds


def summary(samples: Samples, rss: list[float], peer_rss_mb: float | None) -> dict[str, float | None]:
    """The last line's object."""
    one = middle(samples, FULL, ONE, lambda sample: sample.result.per_s)
    two = middle(samples, FULL, TWO, lambda sample: sample.result.per_s)
    values = {
        "p50_added_ms": compared(samples, ALONE, ONE, p50_added),
        "p99_added_ms": compared(samples, ALONE, ONE, lambda ours, direct: ours.p99_ms - direct.p99_ms),
        "p50_added_50ms_ms": compared(samples, ALONE_50, ONE, p50_added),
        "throughput_ratio_64": compared(samples, FULL_50, ONE, ratio),
        "throughput_ratio_64_2_workers": compared(samples, FULL_50, TWO, ratio),
        "requests_per_s_per_worker": one,
        "requests_per_s_2_workers": two,
        "workers_gain": two / one if one and two else None,
        "cpu_ms_per_request": middle(samples, FULL, ONE, lambda sample: sample.cpu_ms),
        "rss_mb": rss[-1] if rss else None,
        "rss_growth_mb": rss[-1] - rss[1] if rss else None,
        "ttft_added_ms": compared(samples, STREAM, ONE, first_added),
        "stream_chunks_per_s": middle(samples, STREAM_FULL, ONE, pieces_per_s),
        "direct_requests_per_s": middle(samples, FULL, DIRECT, lambda sample: sample.result.per_s),
        "litellm_p50_added_ms": compared(samples, ALONE, PEER, p50_added),
        "litellm_throughput_ratio_64": compared(samples, FULL_50, PEER, ratio),
        "litellm_requests_per_s": middle(samples, FULL, PEER, lambda sample: sample.result.per_s),
        "litellm_ttft_added_ms": compared(samples, STREAM, PEER, first_added),
        "litellm_rss_mb": peer_rss_mb,
    }
    return {name: None if value is None else round(value, 3) for name, value in values.items()}


def shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"


def print_samples(case: Case, samples: dict[str, list[Sample]]) -> None:
    for name, found in samples.items():
        firsts = [sample.result.first_p50_ms for sample in found if sample.result.first_p50_ms is not None]
        numbers = (
            median(sample.result.p50_ms for sample in found),
            median(sample.result.p99_ms for sample in found),
            median(sample.result.per_s for sample in found),
            median(firsts) if firsts else None,
            median(map(pieces_per_s, found)) if case.stream else None,
            median(sample.cpu_ms for sample in found),
        )
        print(f"{case.title:30}{name:26}" + "".join(f"{shown(number):>11}" for number in numbers), flush=True)


def busy_s() -> float:
    """Seconds of processor time that this machine spent or had taken from it, all cores together."""
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def processor() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: two short rounds, neither the memory run nor LiteLLM")
    peer = parser.add_mutually_exclusive_group()
    peer.add_argument("--litellm-venv", type=Path, metavar="DIR", help="a virtual environment with litellm[proxy]")
    peer.add_argument("--peers", action="store_true", help=f"set LiteLLM {LITELLM} up in a cache folder, once, and measure it as well")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not at once: servers must be stopped
    try:
        measure(quick=args.quick, litellm_venv=None if args.quick else made_litellm() if args.peers else args.litellm_venv)
    except (WrongAnswer, Failed) as exc:
        print(f"gateway benchmark: {exc}", file=sys.stderr)
        return 1
    return 0


def measure(*, quick: bool, litellm_venv: Path | None) -> None:
    """The whole run. Raises WrongAnswer, Failed."""
    rounds, seconds = (2, 0.4) if quick else (5, 2.0)
    numbers, began, busy = Numbers(), time.monotonic(), busy_s()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        mock = [sys.executable, str(HERE / "mock_upstream.py"), "--until-stdin-closes", "--delays-ms"]
        mocks = {delay_ms: stack.enter_context(started([*mock, str(delay_ms)], folder)) for delay_ms in (0, 50)}
        upstreams = {delay_ms: server.said(rf"{delay_ms} (http\S+)") for delay_ms, server in mocks.items()}
        systems = {delay_ms: [System(DIRECT, url, "mock-7b", [], mocks[delay_ms])] for delay_ms, url in upstreams.items()}
        gateways = Gateways(folder)
        for delay_ms, url in upstreams.items():
            for workers in (1, 2) if gateways.has_workers else (1,):
                systems[delay_ms].append(stack.enter_context(gateways.before(url, workers=workers)))
        peers = stack.enter_context(litellm(litellm_venv, upstreams, folder)) if litellm_venv else {}
        for delay_ms, peer in peers.items():
            systems[delay_ms].append(peer)

        print_setup(gateways, f"LiteLLM: {litellm_version(litellm_venv)}" if litellm_venv else "LiteLLM: left out" + " of --quick" * quick)
        print(
            f"medians of {rounds} rounds of {seconds:g} s in which systems take turns; every answer checked; CPU: of the row's own server"
        )
        headings = ("p50 ms", "p99 ms", "req/s", "first ms", "chunks/s", "CPU ms/req")
        print(f"\n{'what is asked':30}{'who answers':26}" + "".join(f"{heading:>11}" for heading in headings))
        at_start = systems[0][1].server.rss_mb()
        silent = {system.name for system in systems[0] if not streams(system, numbers)}
        samples: Samples = {}
        for case in CASES:
            able = [system for system in systems[case.delay_ms] if not (case.stream and system.name in silent)]
            samples[case] = rounds_of(case, able, rounds=rounds, seconds=seconds, numbers=numbers)
            print_samples(case, samples[case])
        for name in sorted(silent):
            print(f"{name}: does not stream")
        rss = [] if quick else [at_start, *memory(systems[0][1], numbers)]
        print_memory(rss)
        values = summary(samples, rss, peers[0].server.rss_mb() if peers else None)
    ours = os.times()  # the children that were waited for: every load, and by now every server
    wall = time.monotonic() - began
    others = max(0.0, busy_s() - busy - sum(ours[:4])) / wall
    print_verdict(values)
    print(f"ttft_added_ms holds the {GAP_S * 1e3:g} ms to the upstream's next piece: that a word has ended is known only then")
    print(f"{wall:.0f} s, in which other programs took {others:.2f} of {os.cpu_count()} cores: trust the rates only below 0.1")
    print(json.dumps(values | {"quick": quick, "cores": os.cpu_count(), "cores_taken_by_others": round(others, 2)}))


def print_setup(gateways: Gateways, peer: str) -> None:
    print(f"machine: {os.cpu_count()} cores, {processor()}, Python {platform.python_version()}; gateway, upstream and load share them")
    keys, limits = f"{KEYS}" if gateways.keys else "OFF", " ".join(gateways.limits) or "no limits"
    print(f"gateway: keys {keys}, metrics on, log at its default to a file; {limits}")
    if gateways.missing:
        print(f"gateway: this version does not know {', '.join(gateways.missing)}: measured without")
    print(peer)


def print_memory(rss: list[float]) -> None:
    if rss:
        steps = " ".join(f"{mb:.1f}" for mb in rss[2:])
        print(f"\nmemory of {ONE}, MB: {rss[0]:.1f} at its start, {rss[1]:.1f} after {WARM_UP_REQUESTS:,} requests to warm up,")
        print(f"after each {MEMORY_STEP:,} of {MEMORY_STEPS * MEMORY_STEP:,} more: {steps}; grown by {rss[-1] - rss[1]:+.1f}")


def print_verdict(values: dict[str, float | None]) -> None:
    print(f"\n{'measure':32}{'expected':>20}{'measured':>12}  target")
    for name, value in values.items():
        target = TARGETS.get(name)
        verdict = "" if target is None or value is None else " (met)" if target.met(value) else " (MISSED)"
        print(f"{name:32}{EXPECTED.get(name, ''):>20}{shown(value):>12}  {target.wording if target else ''}{verdict}")


if __name__ == "__main__":
    sys.exit(main())
