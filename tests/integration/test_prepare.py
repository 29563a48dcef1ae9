"""`distill prepare`: after it neither torch nor a network is needed, and it does nothing twice."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny_servable import servable_t5

from shared.errors import SettingsError
from student_trainer.prepare import STARTED_BESIDE, refuse_another_teacher, refuse_without_gpu

RECIPE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"
LIGHT = """
import sys
for name in ("torch", "transformers", "huggingface_hub", "peft", "gguf", "datasets"):
    sys.modules[name] = None
from shared.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""An installation without the libraries that make models."""


def run(*arguments: str, light: bool = False, **variables: str) -> subprocess.CompletedProcess[str]:
    python = [sys.executable, *(["-c", LIGHT] if light else ["-m", "shared.cli"])]
    return subprocess.run([*python, *arguments], capture_output=True, text=True, check=False, env={**os.environ, **variables}, timeout=120)


@pytest.mark.parametrize(
    ("driver", "kernel", "accepted"), [(True, "Linux", True), (False, "Linux", False), (False, "Linux-Microsoft", True)]
)
def test_where_no_driver_is_the_command_that_needs_none_is_told(tmp_path: Path, driver: bool, kernel: str, accepted: bool) -> None:
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/version").write_text(kernel)
    if driver:
        (tmp_path / "proc/driver/nvidia/version").write_text("580")
    with nullcontext() if accepted else pytest.raises(SettingsError, match=r"docker compose -f compose.cpu.yaml up"):
        refuse_without_gpu(str(tmp_path))


@pytest.mark.parametrize(
    ("own", "asked", "accepted"),
    [
        ("https://api.example.com/v1", STARTED_BESIDE, False),
        ("https://api.example.com/v1", "https://api.example.com/v1", True),
        ("https://api.example.com/v1", "https://other.example.com/v1", True),  # asked for by TEACHER_URL
        ("http://127.0.0.1:8000/v1", STARTED_BESIDE, True),
        (STARTED_BESIDE, STARTED_BESIDE, True),
        ("", STARTED_BESIDE, True),
    ],
)
def test_a_teacher_of_the_recipes_own_is_not_taken_for_the_one_that_compose_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, asked: str, accepted: bool
) -> None:
    (tmp_path / "r.yaml").write_text(f"name: r\nteacher: {{url: {own}}}\n" if own else "name: r\nteacher: {launch: {engine: scripted}}\n")
    monkeypatch.setenv("DISTILL_TEACHER__URL", asked)
    told = r"at api\.example\.com, but .* set TEACHER_URL and TEACHER_MODEL"
    with nullcontext() if accepted else pytest.raises(SettingsError, match=told):
        refuse_another_teacher(tmp_path / "r.yaml")


def test_the_recipe_of_a_custom_teacher_is_refused_by_prepare_where_compose_starts_another(tmp_path: Path) -> None:
    custom = ["--recipe", str(RECIPE.with_name("custom-teacher.yaml")), "--out", str(tmp_path / "run")]
    done = run("prepare", *custom, DISTILL_TEACHER__URL=STARTED_BESIDE, DISTILL_TEACHER__MODEL="TinyLlama")
    assert done.returncode == 2
    assert "its teacher.url is at api.anthropic.com" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_misspelt_model_is_told_before_the_run_is_bound_to_it(tmp_path: Path) -> None:
    shared = ["--recipe", str(RECIPE), "--out", str(tmp_path / "run")]
    variables = {"DISTILL_CACHE": str(tmp_path / "cache")}
    wrong = run("prepare", *shared, "--set", "student.model=random:tiny-t55", **variables)
    assert wrong.returncode == 2
    assert "tiny-t55" in wrong.stderr
    assert run("prepare", *shared, **variables).returncode == 0


def test_references_that_rouge_cannot_read_are_told_before_anything_is_made(tmp_path: Path) -> None:
    def prepared(name: str, summaries: list[str], *more: str) -> subprocess.CompletedProcess[str]:
        rows = [{"question": f"Τι είναι η ημικρανία; {n}", "summary": text} for n, text in enumerate(summaries)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = ["dataset.name=file", f"dataset.path={tmp_path / name}.jsonl", "dataset.validation_rows=1", "dataset.test_rows=1"]
        given = [word for setting in (*data, "triplets.ranking=reference", *more) for word in ("--set", setting)]
        return run("prepare", "--recipe", str(RECIPE), "--out", str(tmp_path / name), *given, DISTILL_CACHE=str(tmp_path / "cache"))

    greek = [f"Ημικρανία, μέρος {'α' * (n + 1)};" for n in range(8)]
    refused = prepared("greek", greek)
    assert refused.returncode == 4, refused.stderr
    assert "triplets.ranking=reference: ROUGE-L reads a-z and 0-9 alone" in refused.stderr
    assert "give triplets.ranking=first" in refused.stderr
    assert not (tmp_path / "cache").exists()
    mended = prepared("greek", greek, "triplets.ranking=first")
    assert mended.returncode == 0, mended.stderr

    mixed = prepared("mixed", [*greek, *(f"Ημικρανία, {n} mg;" for n in range(8))])
    assert mixed.returncode == 0, mixed.stderr
    assert re.search(r"prepare: [1-8] of 14 train rows will give no triplet: .*triplets\.ranking=first needs no references\n", mixed.stdout)


def test_what_is_prepared_is_told_is_made_once_and_serves_light_images(tmp_path: Path) -> None:
    cache = {"DISTILL_CACHE": str(tmp_path / "cache")}
    shared = ["--recipe", str(RECIPE), "--out", str(tmp_path / "run")]
    launch = [*shared, "--set", "teacher.launch={engine: local, model: 'random:tiny-t5'}"]
    early = run("sample", *launch, light=True, **cache)
    assert early.returncode == 11
    assert "random:tiny-t5 is not in" in early.stderr
    assert "run `distill prepare` with the same recipe" in early.stderr

    first = run("prepare", *launch, **cache)
    assert first.returncode == 0, first.stderr
    ready = [line for line in first.stdout.splitlines() if line.startswith("prepare: ")]
    assert [line.rpartition(" ")[0] for line in ready] == [
        "prepare: student random:tiny-t5: to be trained",
        "prepare: student random:tiny-t5: to be asked",
        "prepare: teacher random:tiny-t5: to be asked",
        "prepare: the rows are in",
    ]
    assert all(Path(line.split()[-1]).is_dir() for line in ready)
    assert "-float32-" in ready[1]
    assert "-int8-" in ready[2]

    second = run("prepare", *launch, light=True, **cache)
    assert second.returncode == 0, second.stderr
    assert second.stdout.splitlines() == [*ready, "prepare: complete, nothing to do"]
    sampled = run("sample", *launch, light=True, **cache)
    assert sampled.returncode == 0, sampled.stderr
    assert (tmp_path / "run" / "responses" / "student-r0" / "manifest.json").exists()


def test_where_nothing_can_be_made_what_is_missing_is_told_with_who_makes_it(tmp_path: Path) -> None:
    shared = ["--recipe", str(RECIPE), "--out", str(tmp_path / "run")]
    (tmp_path / "cache").touch()  # nothing can be made in it, whoever runs this test
    missing = run("sample", *shared, DISTILL_CACHE=str(tmp_path / "cache"))
    assert missing.returncode == 10
    assert "run `distill prepare` with the same recipe first" in missing.stderr
    assert "--out" not in missing.stderr


class Hub(BaseHTTPRequestHandler):
    """As much of a model hub as its client asks for."""

    files: dict[str, bytes]
    served: Counter[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        if path.startswith("/api/models/tiny/t5/tree/"):
            tree = [{"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for n, d in self.files.items()]
            self._send(json.dumps(tree).encode())
        elif path.startswith("/api/models/tiny/t5"):
            siblings = [{"rfilename": n} for n in self.files]
            self._send(json.dumps({"id": "tiny/t5", "modelId": "tiny/t5", "sha": "a" * 40, "siblings": siblings}).encode())
        elif path.startswith("/tiny/t5/resolve/") and name in self.files:
            self.served[name] += self.command == "GET"
            self._send(self.files[name], {"ETag": f'"{hashlib.sha1(self.files[name]).hexdigest()}"', "X-Repo-Commit": "a" * 40})
        else:
            self._send(b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "a" * 40}, status=404)

    def _send(self, body: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Counter[str]]]:
    folder = servable_t5(tmp_path / "hf")
    files = {f.name: f.read_bytes() for f in folder.iterdir()}
    Handler = type("Handler", (Hub,), {"files": {**files, "tf_model.h5": b"of another framework"}, "served": Counter()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", Handler.served  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


def test_a_model_of_the_hub_is_downloaded_once_and_trained_on_without_a_network(tmp_path: Path, hub: tuple[str, Counter[str]]) -> None:
    url, served = hub
    cache = {"DISTILL_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "cache" / "hub"), "HF_ENDPOINT": url}
    arguments = ["prepare", "--recipe", str(RECIPE), "--out", str(tmp_path / "run"), "--set", "student.model=tiny/t5"]
    first = run(*arguments, **cache)
    assert first.returncode == 0, first.stderr
    assert served["model.safetensors"] == served["config.json"] == served["tokenizer.json"] == 1, served
    assert served["tf_model.h5"] == 0
    before = served.copy()
    second = run(*arguments, **cache)
    assert second.stdout.endswith("prepare: complete, nothing to do\n"), second.stderr
    assert served == before
    load = """
from shared.settings import TrainSettings
from student_trainer.training.student import load
print(load("tiny/t5", TrainSettings(), bf16=False)[0].kind)
"""
    offline = {**os.environ, **cache, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    loaded = subprocess.run([sys.executable, "-c", load], env=offline, capture_output=True, text=True, check=False)
    assert loaded.stdout == "encoder-decoder\n", loaded.stderr


def test_a_download_that_was_cut_short_is_completed(tmp_path: Path, hub: tuple[str, Counter[str]]) -> None:
    url, served = hub
    cache = {"DISTILL_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "cache" / "hub"), "HF_ENDPOINT": url}
    arguments = ["prepare", "--recipe", str(RECIPE), "--out", str(tmp_path / "run"), "--set", "student.model=tiny/t5"]
    assert run(*arguments, **cache).returncode == 0
    (weights,) = (tmp_path / "cache" / "hub").glob("**/snapshots/*/model.safetensors")
    weights.resolve().unlink()
    weights.unlink()
    again = run(*arguments, **cache)
    assert again.returncode == 0
    assert "nothing to do" not in again.stdout
    assert weights.exists()
    assert served["model.safetensors"] == 2


def test_a_model_that_nobody_has_is_named(tmp_path: Path, hub: tuple[str, Counter[str]]) -> None:
    cache = {"DISTILL_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "cache" / "hub"), "HF_ENDPOINT": hub[0]}
    for name in ("no/model", "no such folder"):
        done = run("prepare", "--recipe", str(RECIPE), "--out", str(tmp_path / name), "--set", f"student.model={name}", **cache)
        assert done.returncode == 11
        assert f"cannot load the model {name}" in done.stderr
        assert "student.model can be a folder or embedded:smollm2-135m, and the variable HF_ENDPOINT names another hub" in done.stderr
        assert "Traceback" not in done.stderr
