"""What a harvest on a cluster reaches, and where it would break: measured on a small cluster here, and carried on by simulation.

    python tests/benchmarks/scale.py              # two to five minutes
    python tests/benchmarks/scale.py --quick      # one rate, short

Measured: a Ray cluster of processes on this machine, a head and WORKERS worker nodes, and mock_teacher.py at 50 ms that allows 40, 400 or
1,000 requests a second and says 429 to more; all share the machine's cores. Rates are by the teacher's clock, from first call to last
answer. In one more harvest a node is killed in its middle, and in one a budget ends it half-way.

By simulation: the same `Allowance`, with a clock of its own, asked by 1,000 workers in discrete events, a part of whom die; what a lease
takes there is measured, and so is how many calls an actor of Ray's answers here. What 10^8 rows come to is arithmetic on that, and on what
a row takes to read again and to gather, measured here as well.

Expected, written down before the first run: 90% of the allowed rate at 40 and 400 requests/s (it is told, and 3% are left for clocks), less
at 1,000, where four workers, the teacher and Ray share two cores; no 429; the desk leases well above 10,000 times a second, and the driver,
which has all training rows in memory, is what breaks first.
Prints tables; the last line is one JSON object. Exit code 1 only where a harvest fails.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

from gateway import Failed, Target, processor

from shared.contracts import Example, Response
from shared.harvest.allowance import Allowance, Report
from shared.harvest.budget import Account
from shared.harvest.segments import BASE, SegmentLedger, folder_of
from shared.settings import BudgetSettings
from shared.storage import Storage

sys.path.insert(0, str(Path(__file__).parents[1]))
from clusters import finished, nodes, started, wait_for_calls
from harvests import lines, mock_teacher, recipe

DISK = "/var/tmp"  # /tmp is in memory on many machines
WORKERS = 3
RATES = (40, 400, 1000)
SECONDS, QUICK_S = 15, 8
SIMULATED_WORKERS, ROWS = 1000, 10**8
SIMULATED_RATES = (1_000, 10_000)
SIMULATED_S = 30.0
TRIP_S = 0.002
"""From a worker to the desk and back, in one data centre."""
DEATHS_PER_S = 1.0
"""Of all workers together; each comes back after a minute as another."""
TARGETS = {
    "of_allowed_rate": Target("at least 0.85", lambda value: value >= 0.85),
    "wasted_calls": Target("at most 0.05", lambda value: value <= 0.05),
    "lost": Target("none", lambda value: value == 0),
    "overshot": Target("none", lambda value: value == 0),
}


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# measured


def harvest_at(per_s: int, seconds: float, address: str, folder: Path, *, kill: Any = None, budget: int | None = None) -> dict[str, float]:
    """One harvest. Raises Failed."""
    prompts = int(per_s * seconds)
    folder.mkdir()
    file = recipe(folder, prompts)
    more = ["--set", f"harvest.requests_per_minute={60 * per_s}"]
    if budget is not None:
        more += ["--set", f"harvest.budget.requests={budget}"]
    with mock_teacher("--delay-ms", "50", "--per-s", str(per_s), "--capacity", str(per_s)) as teacher:
        child = started(file, folder / "run", teacher, address, *more)
        if kill is not None:
            wait_for_calls(teacher, prompts // 2, child)
            kill()
        code, said = finished(child, within_s=600)
        counts = teacher.settled()
        if code != (0 if budget is None else 13):
            raise Failed(f"a harvest ended with {code}:\n{said}")
        rows = lines(folder / "run")
    taken = counts["last_answer_at"] - counts["first_call_at"]
    return {
        "of_allowed": counts["answered"] / taken / per_s,
        "calls": counts["calls"],
        "refused": counts["refused"],
        "lost": 0 if budget is not None else prompts - len({row[1] for row in rows}),
        "twice": len(rows) - len({row[:3] for row in rows}),
        "again": counts["answered"] - prompts,
    }


def measured(quick: bool, folder: Path) -> dict[str, float]:
    rates, seconds = ((400,), QUICK_S) if quick else (RATES, SECONDS)
    found: dict[int, dict[str, float]] = {}
    with nodes(WORKERS) as cluster:
        for per_s in rates:
            tell(f"{per_s} requests/s allowed")
            found[per_s] = harvest_at(per_s, seconds, cluster.address, folder / str(per_s))
        tell("a budget that ends it half-way")
        spent = harvest_at(400, QUICK_S, cluster.address, folder / "budget", budget=int(200 * QUICK_S))
        actor_per_s = desk_calls(cluster.address)
        tell("a node is killed")
        killed = harvest_at(100, QUICK_S, cluster.address, folder / "killed", kill=lambda: cluster.kill(0))
    print(f"\n{'allowed':>12}{'reached':>10}{'of it':>8}{'calls':>8}{'429':>6}{'lost':>6}{'twice':>7}")
    for per_s, row in found.items():
        counted = "".join(f"{row[name]:>{width}.0f}" for name, width in (("calls", 8), ("refused", 6), ("lost", 6), ("twice", 7)))
        print(f"{per_s:>10}/s{row['of_allowed'] * per_s:>10.0f}{row['of_allowed']:>8.0%}{counted}")
    print(
        f"one of {WORKERS} nodes killed half-way: {killed['lost']:.0f} lost, {killed['twice']:.0f} twice, {killed['again']:.0f} asked again"
    )
    print(f"a budget of {200 * QUICK_S} requests: {spent['calls']:.0f} made")
    return {
        "of_allowed_rate": min(row["of_allowed"] for row in found.values()),
        "wasted_calls": max(row["refused"] / row["calls"] for row in found.values()),
        "lost": killed["lost"] + killed["twice"] + sum(row["lost"] + row["twice"] for row in found.values()),
        "overshot": max(0.0, spent["calls"] - 200 * QUICK_S),
        "actor_calls_per_s": actor_per_s,
    }


def desk_calls(address: str) -> float:
    """Calls a second that an actor of Ray's answers to one caller with many in flight."""
    from shared.cluster.ways import connected

    class Answering:
        def lease(self, report: Report) -> int:
            return report.want

    with connected(address) as ray:
        actor = ray.remote(Answering).options(num_cpus=0).remote()
        ray.get(actor.lease.remote(Report("w", want=1)))
        began = time.perf_counter()
        for _ in range(5):
            ray.get([actor.lease.remote(Report("w", want=1)) for _ in range(400)])
        return 2000 / (time.perf_counter() - began)


def rows_per_s(folder: Path) -> tuple[float, float, float]:
    """Bytes of a row, rows a second that a worker reads when it goes on with a partition, and bytes a second that the driver gathers."""
    storage, count = Storage(str(folder)), 20_000
    with SegmentLedger(storage, 0, "w") as ledger:
        ledger.append([_row(number) for number in range(count)])
        ledger.finish()
    size = Path(storage.at(f"{folder_of(0)}/{BASE}")).stat().st_size
    began = time.perf_counter()
    SegmentLedger(storage, 0, "x").close()
    read = count / (time.perf_counter() - began)
    began = time.perf_counter()
    for _ in range(5):
        with Path(storage.at(f"{folder_of(0)}/{BASE}")).open("rb") as source, (folder / "gathered").open("ab") as out:
            shutil.copyfileobj(source, out, 2**20)
            os.fsync(out.fileno())
    return size / count, read, 5 * size / (time.perf_counter() - began)


def _row(number: int) -> Response:
    return Response(
        key=f"{number:064x}", example_id=f"file-{number}", sample=0, status="ok", text="What are the treatments for this condition? " * 2,
        finish_reason="stop", model="teacher", latency_s=1.2, attempts=1, received_at="2026-01-01T00:00:00.000000+00:00",
    )  # fmt: skip


def driver_bytes() -> float:
    """Bytes of memory of a training row of the driver's, which holds all of them."""
    count = 20_000
    question = "what can be done about it? " * 10
    lines = [Example(id=f"file-{i}", question=f"#{i}: {question}", summary="What is it?").model_dump_json() for i in range(count)]
    tracemalloc.start()
    held = [Example.model_validate_json(line) for line in lines]
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return size / len(held)


# by simulation


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def simulated(per_s: int, workers: int, seconds: float, seed: int = 7) -> dict[str, float]:
    """Workers that ask for more when half of what they have is used, and send each request when it is due."""
    clock, drawn = Clock(), random.Random(seed)
    desk = Allowance(BudgetSettings(requests=ROWS), Account(requests=0, cost=0.0, seconds=0.0), lambda account: None,
                     requests_per_minute=60 * per_s, clock=clock)  # fmt: skip
    events: list[tuple[float, int, str]] = [(drawn.uniform(0, 1), i, f"w{i}") for i in range(workers)]
    heapq.heapify(events)
    owed: dict[str, int] = {}
    sent = deaths = 0
    busy = 0.0
    order = workers
    next_death = drawn.expovariate(DEATHS_PER_S)
    while events and events[0][0] < seconds:
        clock.now, _, worker = heapq.heappop(events)
        if clock.now > next_death:  # what it had leased is lost, and nobody is told
            next_death = clock.now + drawn.expovariate(DEATHS_PER_S)
            owed.pop(worker, None)
            deaths, order = deaths + 1, order + 1
            heapq.heappush(events, (clock.now + 60, order, f"{worker}'"))
            continue
        mine = owed.pop(worker, 0)
        sent += mine
        began = time.perf_counter()
        lease = desk.lease(Report(worker, want=64, sent=mine, settled=mine, answered_s=(0.05,) * mine))
        busy += time.perf_counter() - began
        order += 1
        owed[worker] = lease.requests
        pause = lease.start_s + lease.requests * lease.every_s / 2 if lease.requests else lease.later_s
        heapq.heappush(events, (clock.now + max(TRIP_S, pause), order, worker))
    return {
        "of_allowed": sent / seconds / per_s,
        "leases_per_s": desk.leases / seconds,
        "lease_us": 1e6 * busy / desk.leases,
        "deaths": deaths,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one rate, short")
    args = parser.parse_args()
    print(f"machine: {len(os.sched_getaffinity(0))} cores, {processor()}, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory(dir=DISK) as name:
        folder = Path(name)
        try:
            values = measured(args.quick, folder)
        except Failed as exc:
            print(f"scale benchmark: {exc}", file=sys.stderr)
            return 1
        row_bytes, read_per_s, gathered_bytes_per_s = rows_per_s(folder / "rows")
    print(f"\n{SIMULATED_WORKERS} workers in simulation; an actor answers {values['actor_calls_per_s']:,.0f} calls/s here")
    for per_s in SIMULATED_RATES:
        found = simulated(per_s, SIMULATED_WORKERS, SIMULATED_S if not args.quick else 10.0)
        load = found["leases_per_s"] / values["actor_calls_per_s"]
        print(f"  {per_s:,}/s allowed: {found['of_allowed']:.0%} used; {found['leases_per_s']:,.0f} leases/s of {found['lease_us']:.0f} us")
        print(f"    they are {load:.0%} of what the actor answers; {found['deaths']:.0f} workers died")
        values[f"simulated_of_allowed_{per_s}"] = found["of_allowed"]
        values[f"desk_load_{per_s}"] = load
    total = ROWS * row_bytes
    resume_s, gather_min = ROWS / SIMULATED_WORKERS / read_per_s, total / gathered_bytes_per_s / 60
    print(f"{ROWS:,} rows of {row_bytes:.0f} bytes are {total / 1e9:.0f} GB; at 10,000/s they take {ROWS / 1e4 / 3600:.1f} h")
    print(f"to go on, {SIMULATED_WORKERS} workers read {read_per_s:,.0f} rows/s each: {resume_s:.0f} s; gathered in {gather_min:.0f} min")
    of_driver = driver_bytes()
    print(f"what breaks first: the driver holds training rows of {of_driver:,.0f} bytes, {ROWS * of_driver / 1e9:.0f} GB of them")
    values |= {"driver_row_bytes": of_driver, "row_bytes": row_bytes, "resume_s": resume_s, "gather_min": gather_min}
    for key, target in TARGETS.items():
        print(f"{key:18}{values[key]:>8.3g}  {target.wording} ({'met' if target.met(values[key]) else 'MISSED'})")
    print(json.dumps({key: round(value, 4) for key, value in values.items()} | {"quick": args.quick, "workers": WORKERS}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
