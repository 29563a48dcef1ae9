"""Promotions at the same time, by real processes, under the eyes of a reader that never stops: one is made, the others are told."""

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

WRITERS, ROUNDS, KILLS = 3, 30, 12
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


class Reader(threading.Thread):
    """Looks at what is served and verifies it, over and over, as a server does."""

    def __init__(self, registry: Path) -> None:
        super().__init__(daemon=True)
        self._registry, self._end = registry, threading.Event()
        self.seen: list[str] = []
        """Versions in the order in which they were served, as far as seen."""
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
        except Exception as exc:
            self.error = exc

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
