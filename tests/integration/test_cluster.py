"""A harvest on a real Ray cluster: the rows of one machine's, one rate and one budget for all, and nothing lost when a node dies.

The cluster is one of processes on this machine (tests/clusters.py); long forms and rates are in benchmarks/scale.py.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import Nodes, finished, kill_driver, nodes, started, wait_for_calls
from harvests import harvested, lines, mock_teacher, recipe

from shared.cluster.answer import elsewhere
from shared.collect import Chunk, answered_by
from shared.contracts import GenerationRequest, Sampling
from shared.engines.local import LocalModel
from shared.errors import INTERRUPTED, EngineError
from shared.models import serving_folder

PROMPTS, SAMPLES = 240, 2
CONCURRENCY = 8
SLOWLY = ("--set", "harvest.requests_per_minute=2400", "--set", f"harvest.concurrency={CONCURRENCY}")  # 40/s: six seconds


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    with nodes(3) as found:
        yield found


def ran(*arguments: object, within_s: float = 240.0) -> str:
    code, said = finished(started(*arguments), within_s=within_s)  # type: ignore[arg-type]
    assert code == 0, said
    return said


def manifest(out: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((out / "responses" / "teacher" / "manifest.json").read_bytes())
    return found


def test_the_rows_are_those_of_one_machine_and_each_prompt_is_asked_once(cluster: Nodes, tmp_path: Path) -> None:
    file = recipe(tmp_path, PROMPTS, samples=SAMPLES)
    with mock_teacher("--delay-ms", "20") as teacher:
        alone = harvested(file, tmp_path / "alone", teacher)
    with mock_teacher("--delay-ms", "20") as teacher:
        said = ran(file, tmp_path / "together", teacher, cluster.address)
        assert set(teacher.calls().values()) == {1}
    assert lines(tmp_path / "together") == alone
    assert len(alone) == PROMPTS * SAMPLES
    assert "3 workers on 4 nodes" in said
    theirs, ours = manifest(tmp_path / "alone"), manifest(tmp_path / "together")
    own = {"seconds", "last_command"}
    assert {k: v for k, v in ours["counts"].items() if k not in own} == {k: v for k, v in theirs["counts"].items() if k not in own}  # type: ignore[attr-defined]
    left = {path.name for path in (tmp_path / "together" / "responses" / "teacher").iterdir() if not path.name.startswith(".")}
    assert left == {"responses.jsonl", "manifest.json", "spent.json", "progress.json"}


def test_a_node_that_dies_in_the_middle_costs_what_it_had_in_flight(tmp_path: Path) -> None:
    file = recipe(tmp_path, PROMPTS, samples=SAMPLES)
    with nodes(2) as two, mock_teacher("--delay-ms", "50") as teacher:
        child = started(file, tmp_path / "run", teacher, two.address, *SLOWLY)
        wait_for_calls(teacher, PROMPTS // 3, child)
        two.kill(0)
        code, said = finished(child)
        assert code == 0, said
        calls = teacher.calls()
    found = lines(tmp_path / "run")
    assert len({line[:3] for line in found}) == len(found) == PROMPTS * SAMPLES
    assert {line[3] for line in found} == {"ok"}
    assert len(calls) == PROMPTS
    assert sum(calls.values()) <= PROMPTS + CONCURRENCY


def test_a_driver_that_is_killed_goes_on_with_the_same_command(cluster: Nodes, tmp_path: Path) -> None:
    file, out = recipe(tmp_path, PROMPTS, samples=SAMPLES), tmp_path / "run"
    with mock_teacher("--delay-ms", "50") as teacher:
        child = started(file, out, teacher, cluster.address, *SLOWLY)
        wait_for_calls(teacher, PROMPTS // 3, child)
        before = kill_driver(child, teacher)
        assert before < PROMPTS
        told = subprocess.run([sys.executable, "-m", "shared.cli", "harvest", "status", str(out)], capture_output=True, text=True).stdout
        (answers,) = re.findall(r"^answers +(\d+) of 480,", told, re.MULTILINE)
        assert SAMPLES * (before - 3 * CONCURRENCY) <= int(answers) <= SAMPLES * before
        alone = subprocess.run(
            [sys.executable, "-m", "shared.cli", "harvest", "--recipe", file, "--out", out, "--teacher-url", teacher.url, *SLOWLY],
            capture_output=True,
            text=True,
        )
        assert alone.returncode == 6, alone.stderr
        assert "the same --on" in alone.stderr
        ran(file, out, teacher, cluster.address, *SLOWLY)
        again = sum(teacher.calls().values()) - PROMPTS
    found = lines(out)
    assert len({line[:3] for line in found}) == len(found) == PROMPTS * SAMPLES
    assert again <= 3 * CONCURRENCY
    assert json.loads((out / "responses/teacher/spent.json").read_bytes())["requests"] >= PROMPTS


def test_a_budget_is_one_for_all_workers_and_one_machine_and_what_either_has_is_not_asked_again(cluster: Nodes, tmp_path: Path) -> None:
    file, out = recipe(tmp_path, PROMPTS), tmp_path / "run"
    with mock_teacher("--delay-ms", "10") as teacher:
        alone = [sys.executable, "-m", "shared.cli", "harvest", "--recipe", str(file), "--out", str(out), "--teacher-url", teacher.url]
        begun = subprocess.run([*alone, "--set", "harvest.budget.requests=90"], capture_output=True, text=True)
        assert begun.returncode == 13, begun.stderr
        assert teacher.counts()["calls"] == 90
        theirs = {"train.jsonl": b"their rows", "spent.json": b"their account", "partitions/00000000/responses.jsonl": b"their answers"}
        for name, content in theirs.items():
            (tmp_path / "store" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "store" / name).write_bytes(content)
        kept = ("--storage", str(tmp_path / "store"))
        code, said = finished(started(file, out, teacher, cluster.address, *kept, "--set", "harvest.budget.requests=130"))
        assert code == 13, said
        assert "harvest.budget.requests = 130" in said
        assert teacher.counts()["calls"] == 130
        ran(file, out, teacher, cluster.address, *kept, "--set", "harvest.budget.requests=1000")
        assert set(teacher.calls().values()) == {1}
    assert len(lines(out)) == PROMPTS
    assert json.loads((out / "responses/teacher/spent.json").read_bytes())["requests"] == PROMPTS
    # nothing of it is left there, and what is somebody else's is as it was
    left = {str(path.relative_to(tmp_path / "store")): path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()}
    assert left == theirs
    assert {path.name for path in (tmp_path / "store").iterdir()} == {"train.jsonl", "spent.json", "partitions"}


def test_ctrl_c_ends_all_workers_with_everything_kept(cluster: Nodes, tmp_path: Path) -> None:
    file, out = recipe(tmp_path, PROMPTS), tmp_path / "run"
    with mock_teacher("--delay-ms", "50") as teacher:
        child = started(file, out, teacher, cluster.address, *SLOWLY)
        wait_for_calls(teacher, PROMPTS // 4, child)
        child.send_signal(signal.SIGINT)
        code, said = finished(child, within_s=60)
        assert code == INTERRUPTED, said
        stopped = teacher.settled()["calls"]
        assert stopped < PROMPTS
        ran(file, out, teacher, cluster.address, *SLOWLY)
        assert set(teacher.calls().values()) == {1}
    assert len(lines(out)) == PROMPTS


@pytest.mark.parametrize(
    ("on", "more", "said"),
    [
        ("127.0.0.1:1", (), "no cluster to work on"),
        ("{}", ("--workers", "99"), "the cluster has 3 processors"),
        ("{}", ("--storage", "nowhere://bucket/run"), "nowhere://bucket/run"),
        ("{}", ("--set", "teacher.api_key_file=/no/key"), "/no/key cannot be read there"),
    ],
)
def test_a_cluster_or_a_storage_that_cannot_be_used_is_found_out_before_anything_is_asked(
    cluster: Nodes, tmp_path: Path, on: str, more: tuple[str, ...], said: str
) -> None:
    file = recipe(tmp_path, 20)
    with mock_teacher() as teacher:
        code, text = finished(started(file, tmp_path / "run", teacher, on.format(cluster.address), *more))
        assert code == 2, text
        assert said in text
        assert teacher.counts()["calls"] == 0


def test_a_dead_teacher_ends_all_workers_with_its_own_message(cluster: Nodes, tmp_path: Path) -> None:
    file = recipe(tmp_path, 60)
    with mock_teacher() as teacher:
        url, teacher.url = teacher.url, "http://127.0.0.1:1/v1"
        code, text = finished(started(file, tmp_path / "run", teacher, cluster.address, "--set", "teacher.patience_s=1"))
        teacher.url = url
    assert code == 7, text
    assert "has not answered" in text


def test_the_students_own_answers_are_those_of_one_process_with_the_same_seed(cluster: Nodes, tmp_path: Path) -> None:
    file = recipe(tmp_path, 100)
    said = []
    for name, more in (("alone", []), ("together", ["--on", cluster.address])):
        command = [sys.executable, "-m", "shared.cli", "sample", "--recipe", str(file), "--out", str(tmp_path / name)]
        done = subprocess.run([*command, "--set", "student.model=random:tiny-t5", *more], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        rows = map(json.loads, (tmp_path / name / "responses" / "student-r0" / "responses.jsonl").read_text().splitlines())
        said.append(sorted((row["key"], row["example_id"], row["sample"], row["text"]) for row in rows))
    assert said[0] == said[1]
    assert len(said[0]) == 200
    assert len({line[3] for line in said[0]}) > 100


def test_a_student_answers_greedily_on_a_cluster_as_in_one_process(cluster: Nodes, tmp_path: Path) -> None:
    """What evaluation asks; in float32, so that nothing depends on what shares a batch."""
    asked = [GenerationRequest(prompt=f"word {number}", sampling=Sampling(max_tokens=8, temperature=0)) for number in range(30)]
    chunked = [Chunk(number, tuple(asked[6 * number : 6 * number + 6]), None) for number in range(5)]
    folder = serving_folder("random:tiny-t5", "float32")
    here = LocalModel(folder)
    expected = {chunk.number: answered_by(here, chunk).completions for chunk in chunked}
    found = {one.number: one.completions for one in elsewhere(cluster.address, "random:tiny-t5", "float32", workers=2)(chunked)}
    assert found == expected
    with pytest.raises(EngineError, match=r"node \S+: "):
        list(elsewhere(cluster.address, str(tmp_path), "float32", workers=1)(chunked))
