"""Promotions at the same time, by real processes, under the eyes of a reader that never stops: one is made, the others are told; and
promotions, canaries and rollbacks that are killed.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from shared import registry as store
from shared.errors import StorageError

WRITERS, ROUNDS, KILLS, CANARY_KILLS = 3, 30, 12, 16
WEIGHTS_BYTES = 2**20
WRITER = """
import json, sys
from pathlib import Path
from shared import registry as store
from shared.errors import DistillError
registry, work, me = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
for number in range(int(sys.argv[4])):
    serving = work / f"{me}-{number}"
    serving.mkdir()
    for name in ("serving.json", "tokenizer.json"):
        (serving / name).write_text("{}")
    (serving / "model.bin").write_bytes(f"{me} {number} ".encode() * (int(sys.argv[5]) // 8))
    print(json.dumps("ready"), flush=True)
    sys.stdin.readline()
    try:
        run = f"runs/{me}"
        made = store.promote(registry, serving, name=me, task={"round": number}, scores={}, run=run, reason=f"round {number}")
        print(json.dumps({"version": made.version}), flush=True)
    except DistillError as exc:
        print(json.dumps({"told": str(exc), "exit": exc.exit_code}), flush=True)
"""

DOING = """
import sys
from itertools import count
from pathlib import Path
from random import Random
from shared import registry as store
from shared.errors import PromotionRefused
registry, work, me = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
random, rounds = Random(me), range(int(sys.argv[4])) if len(sys.argv) > 4 else count()
if store.current(registry):
    store.record_refusal(registry, reason="a writer comes", run=me, scores={})  # which mends what the one before has left
print("ready", flush=True)
for number in rounds:
    if random.random() < 0.25:
        try:
            store.rollback(registry)
        except PromotionRefused:
            pass
        continue
    tried = store.canary(registry)
    if tried and random.random() < 0.4:  # promoted itself, or tried on another share
        name, serving = tried.promoted.name, work / tried.promoted.name
    else:
        name = f"{me}-{number}"
        serving = work / name
        serving.mkdir()
        for file in ("serving.json", "tokenizer.json"):
            (serving / file).write_text("{}")
        (serving / "model.bin").write_bytes(f"{name} ".encode() * 4096)
    share = random.uniform(0.1, 0.9) if store.current(registry) and random.random() < 0.6 else None
    store.promote(registry, serving, name=name, task={}, scores={}, run=name, reason="better", canary=share)
print("done", flush=True)
"""


class Reader(threading.Thread):
    """Looks at what is served and at the canary and verifies them, over and over, as a server does."""

    def __init__(self, registry: Path) -> None:
        super().__init__(daemon=True)
        self._registry, self._end = registry, threading.Event()
        self.seen: list[str] = []
        """Versions in the order in which they were served, as far as seen."""
        self.tried: set[str] = set()
        """Versions seen as the canary."""
        self.looks = 0
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            while not self._end.is_set():
                served = store.current(self._registry)
                self.looks += 1
                if served is None:
                    assert not self.seen, "the pointer has gone"
                    continue
                store.verify(self._registry, served)
                if self.seen[-1:] != [served.version]:
                    self.seen.append(served.version)
                self._look_at_the_canary()
        except Exception as exc:
            self.error = exc

    def _look_at_the_canary(self) -> None:
        before, tried, after = store.current(self._registry), store.canary(self._registry), store.current(self._registry)
        if tried is None:
            return
        store.verify(self._registry, tried.promoted)
        self.tried.add(tried.promoted.version)
        if before and before == after:  # else it may have been tried beside another
            assert tried.promoted.version != before.version, "its own canary"
            assert tried.promoted.served_before == (*before.served_before, before.version)

    def end(self) -> None:
        self._end.set()
        self.join(20)
        if self.error:
            raise self.error


@contextlib.contextmanager
def writers(registry: Path, work: Path, count: int, rounds: int) -> Iterator[list[subprocess.Popen[str]]]:
    work.mkdir(exist_ok=True)
    found: list[subprocess.Popen[str]] = []
    try:
        for number in range(count):
            command = [sys.executable, "-c", WRITER, str(registry), str(work), f"{work.name}-w{number}", str(rounds), str(WEIGHTS_BYTES)]
            found.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        yield found
    finally:
        for process in found:
            process.kill()
            process.communicate()


def heard(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def nothing_is_half_done(registry: Path) -> None:
    """Every folder of a version is a whole, undamaged version, and nothing else lies about."""
    assert not list(registry.rglob("*.tmp"))
    known = store.versions(registry)
    assert {folder.name for folder in (registry / "versions").iterdir()} == set(known)
    for promoted in known.values():
        assert isinstance(promoted, store.Promoted)
        store.verify(registry, promoted)


def test_of_promotions_at_once_one_is_made_the_others_are_told_by_whom_and_every_look_finds_a_whole_student(tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    reader = Reader(registry)
    reader.start()
    made: set[str] = set()
    told: list[tuple[int, dict[str, Any]]] = []
    with writers(registry, tmp_path / "work", WRITERS, ROUNDS) as processes:
        for _ in range(ROUNDS):
            assert [heard(process) for process in processes] == ["ready"] * WRITERS
            for process in processes:
                go(process)
            outcomes = [heard(process) for process in processes]
            won = [outcome["version"] for outcome in outcomes if "version" in outcome]
            assert won, outcomes
            made |= set(won)
            told += [(process.pid, outcome) for process, outcome in zip(processes, outcomes, strict=True) if "told" in outcome]
        pids = {process.pid for process in processes}
    reader.end()

    assert len(told) >= ROUNDS // 3  # they did meet; one that came when the other had ended is made as well
    named = set()
    for pid, outcome in told:
        assert outcome["exit"] == StorageError.exit_code
        assert outcome["told"].startswith(f"{registry}: another process is ")
        assert "this one has changed nothing" in outcome["told"]
        # between locking and signing there is an instant in which the holder has no name
        if by := re.search(r"promoting runs/work-w\d \(process (\d+) on \S+, since 2", outcome["told"]):
            named.add(int(by[1]))
            assert int(by[1]) in pids - {pid}
    assert named
    assert len(made) + len(told) == WRITERS * ROUNDS

    nothing_is_half_done(registry)
    assert set(store.versions(registry)) == made
    served = store.current(registry)
    assert served is not None
    in_order = [*served.served_before, served.version]
    events = store.history(registry)
    assert [(event.what, event.version) for event in events] == [("promoted", version) for version in in_order]
    assert set(in_order) == made
    assert reader.looks > ROUNDS
    assert [version for version in in_order if version in set(reader.seen)] == reader.seen


def test_a_promotion_killed_at_any_instant_leaves_a_whole_student_served_and_the_next_one_is_made(tmp_path: Path) -> None:
    registry, random = tmp_path / "registry", Random(3)
    reader = Reader(registry)
    reader.start()
    for number in range(KILLS):
        with writers(registry, tmp_path / f"work-{number}", 1, 2) as (process,):
            assert heard(process) == "ready"
            go(process)
            time.sleep(random.uniform(0, 0.04))
            process.send_signal(signal.SIGKILL)
            process.wait()
    with writers(registry, tmp_path / "work", 1, 1) as (process,):
        assert heard(process) == "ready"
        go(process)
        version = heard(process)["version"]
    reader.end()
    nothing_is_half_done(registry)
    served = store.current(registry)
    assert served is not None
    assert served.version == version
    # a kill between the pointer and its line of history is made good by the next writer
    assert [event.version for event in store.history(registry)] == [*served.served_before, served.version]


def as_told(events: list[store.Event]) -> tuple[list[str], str | None]:
    """What the history says, event by event: versions in the order a rollback takes back, the last of them served, and the run of the
    canary."""
    stack: list[str] = []
    tried: str | None = None
    for event in events:
        if event.what == "promoted":
            stack.append(str(event.version))
            tried = None
        elif event.what == "canary":
            tried = event.run
        elif event.what == "rolled back" and tried:
            assert event.run == tried
            tried = None
        elif event.what == "rolled back":
            stack.pop()
        assert event.version == stack[-1], event
    return stack, tried


def test_canaries_promotions_and_rollbacks_killed_at_any_instant_show_whole_states_alone_and_a_history_that_tells_them(
    tmp_path: Path,
) -> None:
    registry, work, random = tmp_path / "registry", tmp_path / "work", Random(5)
    work.mkdir()
    reader = Reader(registry)
    reader.start()
    for number in range(CANARY_KILLS + 1):
        last = ["3"] if number == CANARY_KILLS else []
        command = [sys.executable, "-c", DOING, str(registry), str(work), f"w{number}", *last]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            if last:
                assert process.stdout.readline() == "done\n"
                continue
            # the one that has come has mended everything before it says so
            time.sleep(random.uniform(0, 0.15))
            process.kill()
    reader.end()
    nothing_is_half_done(registry)
    events = store.history(registry)
    stack, run = as_told(events)
    served, tried = store.current(registry), store.canary(registry)
    assert served is not None
    assert [*served.served_before, served.version] == stack
    assert (tried.promoted.run if tried else None) == run
    assert {event.what for event in events} == {"promoted", "canary", "rolled back", "refused"}
    assert reader.tried
    assert reader.looks > CANARY_KILLS


def test_a_command_that_meets_a_promotion_under_way_ends_with_10_and_says_who_is_at_work_and_what_to_do(tmp_path: Path) -> None:
    registry, serving = tmp_path / "registry", tmp_path / "serving"
    serving.mkdir()
    for name in ("model.bin", "serving.json", "tokenizer.json"):
        (serving / name).write_text("{}")
    for name in ("a", "b"):
        served = store.promote(registry, serving, name=name, task={}, scores={}, run=f"runs/{name}", reason="better")
    again = [sys.executable, "-m", "shared.cli", "rollback", "--registry", str(registry)]
    with store._writing(registry, "promoting runs/c"):
        done = subprocess.run(again, capture_output=True, text=True, check=False)
    assert done.returncode == StorageError.exit_code
    said = rf"^distill rollback: {registry}: another process is promoting runs/c \(process \d+ on .*run this command again"
    assert re.search(said, done.stderr), done.stderr
    assert store.current(registry) == served
    assert subprocess.run(again, capture_output=True, check=False).returncode == 0
