"""Harvests as a user starts them, of a mock teacher that is a process as well: for tests and benchmarks that kill or plague them.

The mock is benchmarks/mock_teacher.py. The recipe launches its teacher, as far as it knows: its keys do not depend on the mock's port.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MOCK = Path(__file__).parent / "benchmarks" / "mock_teacher.py"
PATIENCE_S = 60.0
"""Seconds in which a harvest must make its first call, and one that is not killed must end: the machine may be busy."""
Line = tuple[str, str, int, str, str]


@dataclass
class MockTeacher:
    url: str

    def counts(self) -> dict[str, Any]:
        """See `Counts` in mock_teacher.py."""
        counts: dict[str, Any] = self._get("counts")
        return counts

    def calls(self) -> dict[int, int]:
        """How often each prompt was asked, by its number."""
        return {int(number): calls for number, calls in self._get("calls").items()}

    def settled(self) -> dict[str, Any]:
        """The counts once every call has been answered, heard or not."""
        time.sleep(0.02)  # what has just been sent is to be read first
        while (counts := self.counts())["in_flight"]:
            time.sleep(0.01)
        return counts

    def _get(self, what: str) -> Any:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            f"{self.url.removesuffix('/v1')}/{what}", timeout=30
        ) as answer:
            return json.load(answer)


@contextmanager
def mock_teacher(*flags: str) -> Iterator[MockTeacher]:
    command = [sys.executable, str(MOCK), "--until-stdin-closes", *flags]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield MockTeacher(process.stdout.readline().strip())
        process.communicate()


def recipe(folder: Path, prompts: int, *, samples: int = 1, question: str = "#{}: is it serious?") -> Path:
    """A recipe file in `folder`, with `prompts` training rows beside it. {} in `question` stands for the row's number."""
    rows = folder / "rows.jsonl"
    with rows.open("w") as file:
        for number in range(prompts + 2):
            file.write(json.dumps({"question": question.format(number), "summary": f"What is {number}?"}) + "\n")
    path = folder / "recipe.yaml"
    path.write_text(f"""
name: mocked
dataset: {{name: file, path: {rows}, validation_rows: 1, test_rows: 1}}
teacher: {{launch: {{engine: scripted}}}}
harvest: {{samples: {samples}, max_tokens: 64}}
evaluate: {{allow_overlap: [near-question]}}  # they differ in their numbers alone
""")
    return path


def command(recipe: Path, out: Path, teacher: MockTeacher, *more: str) -> list[str]:
    """`distill harvest` in its own words."""
    harvest = [sys.executable, "-m", "shared.cli", "harvest", "--recipe", str(recipe), "--out", str(out)]
    return [*harvest, "--teacher-url", teacher.url, *more]


def harvested(recipe: Path, out: Path, teacher: MockTeacher, *more: str) -> list[Line]:
    """The lines of a harvest that nothing disturbs. Raises AssertionError with its log if it fails."""
    done = subprocess.run(command(recipe, out, teacher, *more), capture_output=True, text=True, timeout=PATIENCE_S * 10, env=_environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return lines(out)


def lines(out: Path) -> list[Line]:
    """Of all files of a ledger, each as often as it stands there: key, example, sample, status, text; sorted."""
    return sorted((row["key"], row["example_id"], row["sample"], row["status"], row["text"]) for row in _rows(out))


def _rows(out: Path) -> Iterator[dict[str, Any]]:
    for file in (out / "responses" / "teacher").glob("responses*.jsonl"):
        for line in file.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):  # else torn by a kill
                yield json.loads(line)


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("DISTILL_")}


@dataclass
class Killed:
    """What a harvest that was killed now and then came to."""

    lines: list[Line]
    kills: int
    asked_again: list[int] = field(default_factory=list)
    """For each kill: calls whose answers were not in the ledger then, so that their prompts were asked again."""


def killed(recipe: Path, out: Path, teacher: MockTeacher, *more: str, kills: int, spread_s: float, seed: int) -> Killed:
    """Harvest, with a SIGKILL `kills` times and then to the end.

    Each kill comes within `spread_s` seconds: of its first call, or for every fourth of its start. Raises AssertionError where the
    harvest ends in another way than by its kill, but for an early end with everything done.
    """
    drawn = random.Random(seed)
    before, result = 0, Killed([], 0)
    for kill in range(kills):
        calls = teacher.counts()["calls"]
        with subprocess.Popen(
            command(recipe, out, teacher, *more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=_environment()
        ) as child:
            deadline = time.monotonic() + PATIENCE_S
            while kill % 4 and child.poll() is None and teacher.counts()["calls"] == calls and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(drawn.uniform(0, spread_s))
            child.kill()
            said = child.communicate()[0]
        if child.returncode == 0:
            break  # everything was done before its kill
        assert child.returncode < 0, said.decode()
        result.kills += 1
        complete = {row["example_id"] for row in _rows(out)}
        lost = teacher.settled()["calls"] - len(complete)
        result.asked_again.append(lost - before)
        before = lost
    result.lines = harvested(recipe, out, teacher, *more)
    return result
