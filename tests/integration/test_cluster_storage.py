"""A harvest on a real Ray cluster that keeps its partitions in a bucket or on a disk that fills; nodes that are not like this one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import QUIET, Nodes, finished, free_port, kill_driver, nodes, started, wait_for_calls
from harvests import lines, mock_teacher, recipe
from teachers import Said, empty, listening, prompt_of, usual
from teachers import recipe as asking

from shared.storage import Storage

PROMPTS, SAMPLES, CONCURRENCY = 160, 2, 8
SLOWLY = ("--set", "harvest.requests_per_minute=1800", "--set", f"harvest.concurrency={CONCURRENCY}")  # 30/s
S3_PYTHON = Path(os.environ.get("S3_PYTHON") or Path(__file__).parents[2] / ".venv-s3/bin/python")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URI of a bucket of an S3 server, whose keys this process and what it starts have."""
    if not S3_PYTHON.exists():
        pytest.fail(f"{S3_PYTHON}: the S3 server of the tests is not there; make .venv-s3/.installed")
    port = free_port()
    keys = {"AWS_ACCESS_KEY_ID": "who", "AWS_SECRET_ACCESS_KEY": "knows", "AWS_EC2_METADATA_DISABLED": "true"}
    command = [str(S3_PYTHON), "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with pytest.MonkeyPatch.context() as patch, subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        for name, value in keys.items():
            patch.setenv(name, value)
        made = urllib.request.Request(f"http://127.0.0.1:{port}/harvests", method="PUT")
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(made, timeout=10).close()
                break
            except OSError:
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield f"s3://harvests/RUN?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
        server.kill()


@pytest.fixture(scope="module")
def cluster(bucket: str) -> Iterator[Nodes]:
    with nodes(2) as found:
        yield found


def test_a_harvest_in_a_bucket_goes_on_after_a_kill_and_leaves_nothing_there(cluster: Nodes, bucket: str, tmp_path: Path) -> None:
    file, out = recipe(tmp_path, PROMPTS, samples=SAMPLES), tmp_path / "run"
    uri = bucket.replace("RUN", "killed")
    with mock_teacher("--delay-ms", "50") as teacher:
        child = started(file, out, teacher, cluster.address, "--storage", uri, *SLOWLY)
        wait_for_calls(teacher, PROMPTS // 2, child)
        before = kill_driver(child, teacher)
        assert before < PROMPTS
        note = json.loads((out / "responses/teacher/cluster.json").read_bytes())
        assert note["storage"] == uri
        kept = Storage(uri, note["folder"])
        assert kept.has("train.jsonl")
        code, said = finished(started(file, out, teacher, cluster.address, "--storage", uri, *SLOWLY))
        assert code == 0, said
        again = sum(teacher.calls().values()) - PROMPTS
    found = lines(out)
    assert len({line[:3] for line in found}) == len(found) == PROMPTS * SAMPLES
    # what is in flight, and what has come since the last object: a second's at most
    assert again <= 2 * CONCURRENCY + 30 * 1.5
    assert kept.names("") == kept.names("partitions/00000000") == []
    assert json.loads((out / "responses/teacher/spent.json").read_bytes())["requests"] >= PROMPTS


def test_a_bucket_that_is_not_there_is_found_out_before_anything_is_asked(cluster: Nodes, bucket: str, tmp_path: Path) -> None:
    with mock_teacher() as teacher:
        uri = bucket.replace("//harvests", "//nobodys")
        code, said = finished(started(recipe(tmp_path, 20), tmp_path / "run", teacher, cluster.address, "--storage", uri))
        assert teacher.counts()["calls"] == 0
    assert code == 10, said
    assert "nobodys" in said.splitlines()[-1]


def test_what_has_failed_is_asked_for_again_and_nothing_else(cluster: Nodes, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def wrong(body: dict[str, Any]) -> Said:
        return empty(body) if re.search(r"condition \d*[05],", prompt_of(body)) else usual(body)

    with listening() as teacher:
        file = asking(tmp_path, teacher.url, prompts=60, samples=SAMPLES, harvest="max_failed_fraction: 0.4")
        teacher.answer = wrong
        code, said = finished(started(file, out, teacher, cluster.address))  # type: ignore[arg-type]
        assert code == 0, said
        failed = sum(line[3] == "failed" for line in lines(out)) // SAMPLES
        assert 5 < failed < 20
        before = len(teacher.bodies)
        teacher.answer = usual
        code, said = finished(started(file, out, teacher, cluster.address, "--retry-failed"))  # type: ignore[arg-type]
        assert code == 0, said
        assert len(teacher.bodies) - before == failed
    found = lines(out)
    assert {line[3] for line in found} == {"ok"}
    assert len({line[:3] for line in found}) == len(found) == before * SAMPLES


def test_nodes_that_are_not_like_this_one_are_found_out_before_anything_is_asked(tmp_path: Path) -> None:
    odd = {"without": "raise ImportError('missing')", "older": "__version__ = '0.0.1'"}
    with mock_teacher() as teacher, nodes(1) as some:
        for name, content in odd.items():
            package = tmp_path / name / "shared"
            package.mkdir(parents=True)
            (package / "__init__.py").write_text(content)
            some.cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": str(tmp_path / name)})
        some.cluster.wait_for_nodes()
        code, text = finished(started(recipe(tmp_path, 20), tmp_path / "run", teacher, some.address, cwd=tmp_path))
        assert teacher.counts()["calls"] == 0
    assert code == 2, text
    said = text.splitlines()[-1]
    assert re.search(r"node \d\S+: blackbox-distill is not installed there \(missing\)", said), said
    assert re.search(r"node \d\S+: blackbox-distill 0.0.1 is installed there, and \S+ here", said), said
    assert said.count("node ") == 2, said


def test_a_cluster_of_another_version_of_ray_is_told_from_one_that_is_not_there(tmp_path: Path) -> None:
    with mock_teacher() as teacher, nodes(1) as two:
        import ray
        from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

        ray.init(address=two.address, logging_level="ERROR")
        told = json.loads(_internal_kv_get("CLUSTER_METADATA", namespace="cluster"))
        _internal_kv_put("CLUSTER_METADATA", json.dumps(told | {"ray_version": "2.48.0"}), overwrite=True, namespace="cluster")
        ray.shutdown()
        code, text = finished(started(recipe(tmp_path, 20), tmp_path / "run", teacher, two.address))
        assert teacher.counts()["calls"] == 0
    assert code == 2, text
    assert "2.48.0" in text
    assert "install the same here as there" in text


def test_a_disk_that_fills_loses_nothing_that_is_on_it_and_the_harvest_goes_on_when_there_is_room(tmp_path: Path) -> None:
    enter = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*enter, "true"], capture_output=True).returncode:
        pytest.skip("this system allows no file system of one's own (unshare --user --mount)")
    file, out, small = recipe(tmp_path, PROMPTS, samples=SAMPLES), tmp_path / "run", tmp_path / "small"
    small.mkdir()
    with mock_teacher("--delay-ms", "20") as teacher:
        harvest = [sys.executable, "-m", "shared.cli", "harvest", "--recipe", str(file), "--out", str(out), "--teacher-url", teacher.url]
        harvest += ["--on", "local-cluster:2", "--storage", str(small), "--set", f"harvest.concurrency={CONCURRENCY}"]
        script = f"""
            mount -t tmpfs -o size=64k tmpfs {small}
            "$@" > {tmp_path}/first 2>&1; echo $? >> {tmp_path}/first
            cat {small}/*/partitions/*/*.jsonl | wc -l > {tmp_path}/had
            mount -o remount,size=64m {small}
            "$@" > {tmp_path}/second 2>&1; echo $? >> {tmp_path}/second
        """
        # a cluster of its own has a token of its own, for which it needs no home directory
        environment = {name: value for name, value in (os.environ | QUIET).items() if name != "RAY_AUTH_MODE"} | {"HOME": "/proc/none"}
        subprocess.run([*enter, "sh", "-c", script, "sh", *harvest], check=True, env=environment, timeout=280)
        calls = teacher.calls()
    first, second = ((tmp_path / name).read_text().splitlines() for name in ("first", "second"))
    assert first[-1] == "10", first
    assert "no space left on the device" in first[-2]
    assert second[-1] == "0", second
    had = int((tmp_path / "had").read_text())
    assert 0 < had < PROMPTS * SAMPLES
    found = lines(out)
    assert len({line[:3] for line in found}) == len(found) == PROMPTS * SAMPLES
    assert len(calls) == PROMPTS
    assert sum(calls.values()) <= PROMPTS + 2 * CONCURRENCY
