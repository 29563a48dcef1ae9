"""A teacher on a thread that answers what a test wants, and `distill harvest` of it as users start it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from shared.cli import main
from shared.contracts import Response
from shared.harvest.ledger import answer_files

SAMPLES = 3
CONCURRENCY = 4


@dataclass(frozen=True)
class Said:
    """An answer over HTTP."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


Body = dict[str, Any]


def prompt_of(body: Body) -> str:
    return str(body["prompt"] if "prompt" in body else body["messages"][-1]["content"])


def saying(body: Body, texts: Sequence[str | None], finish_reason: str | None = "stop", **more: Any) -> Said:
    """An answer with these texts as its choices."""
    choices: list[dict[str, Any]] = []
    for index, text in enumerate(texts):
        said = {"text": text} if "prompt" in body else {"message": {"role": "assistant", "content": text}}
        choices.append({"index": index, "finish_reason": finish_reason, **said})
    return Said(json.dumps({"choices": choices, **more}).encode())


def usual(body: Body) -> Said:
    """Texts that tell prompts and samples apart."""
    asked = prompt_of(body)
    return saying(body, [f"{len(asked)} {asked[-20:]!r} {body['seed'] + i}" for i in range(body["n"])])


def empty(body: Body) -> Said:
    return saying(body, [""] * body["n"])


def same(body: Body) -> Said:
    return saying(body, ["always the same"] * body["n"])


def html(body: Body) -> Said:
    return Said(b"<html>Welcome to the wrong port</html>", headers={"content-type": "text/html"})


def refusing(status: int, said: str = "no", **headers: str) -> Callable[[Body], Said]:
    return lambda body: Said(json.dumps({"error": {"message": said}}).encode(), status, headers)


class Teacher:
    """An OpenAI-compatible server on a thread; `answer` and `delay_s` may be changed while it runs."""

    def __init__(self) -> None:
        self.answer: Callable[[Body], Said] = usual
        self.delay_s = 0.0
        self.bodies: list[Body] = []
        self.keys: set[str | None] = set()
        self.answered = 0
        teacher = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                teacher.bodies.append(body)
                teacher.keys.add(self.headers["authorization"])
                time.sleep(teacher.delay_s)
                said = teacher.answer(body)
                self.send_response(said.status)
                for name, value in {"content-type": "application/json", "content-length": str(len(said.body)), **said.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(said.body)
                teacher.answered += 1

            def log_message(self, format: str, *arguments: Any) -> None: ...

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None: ...  # clients are killed on purpose

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    @property
    def asked(self) -> Counter[tuple[str, int]]:
        """How often each (prompt, seed of a sample) was asked for."""
        return Counter((prompt_of(b), b["seed"] + i) for b in self.bodies for i in range(b["n"]))


@contextmanager
def listening() -> Iterator[Teacher]:
    teacher = Teacher()
    thread = threading.Thread(target=teacher.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield teacher
    teacher.server.shutdown()
    teacher.server.server_close()
    thread.join()


def self_signed(folder: Path) -> Path:
    """A certificate for `localhost` and its key in one file, which is returned; the certificate alone in a .crt beside it."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make a certificate")
    pem = folder / "self-signed.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(pem), "-out", str(pem.with_suffix(".crt"))]
    subprocess.run([*command, *names], check=True, capture_output=True)
    pem.write_text(pem.read_text() + pem.with_suffix(".crt").read_text())
    return pem


def recipe(
    folder: Path, url: str, prompts: int = 10, more: str = "", *, teacher: str = "", harvest: str = "", samples: int = SAMPLES
) -> Path:
    """A recipe file with rows of its own; `teacher` and `harvest`: more settings of these sections, `more`: more sections."""
    rows = folder / "rows.jsonl"
    if not rows.exists():
        lines = [{"question": f"My doctor spoke of condition {i}, what is it?", "summary": f"What is condition {i}?"} for i in range(400)]
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    file = folder / "recipe.yaml"
    file.write_text(f"""
name: test
dataset: {{name: file, path: {rows}, limit: {prompts}, validation_rows: 5, test_rows: 5}}
teacher: {{url: "{url}", max_attempts: 1, timeout_s: 20, patience_s: 0.5{", " * bool(teacher)}{teacher}}}
harvest: {{samples: {samples}, concurrency: {CONCURRENCY}{", " * bool(harvest)}{harvest}}}
{more}
""")
    return file


def harvest(file: Path, out: Path, *more: str) -> int:
    """The exit code of `distill harvest` in this process."""
    return main(["harvest", "--recipe", str(file), "--out", str(out), *more])


@contextmanager
def child(file: Path, out: Path, *more: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """`distill harvest` as a process of its own."""
    command = [sys.executable, "-m", "shared.cli", "harvest", "--recipe", str(file), "--out", str(out), *more]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}, start_new_session=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def stage_of(out: Path) -> Path:
    return out / "responses" / "teacher"


def count_lines(out: Path) -> int:
    return sum(file.read_bytes().count(b"\n") for file in answer_files(stage_of(out)))


def wait_for_lines(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    while count_lines(out) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def rows_of(out: Path) -> list[Response]:
    """Every whole line of a ledger, as often as it stands there."""
    read = [line for file in answer_files(stage_of(out)) for line in file.read_bytes().splitlines(keepends=True)]
    return [Response.model_validate_json(line) for line in read if line.endswith(b"\n")]


def lines(out: Path) -> list[tuple[str, str, int, str, str]]:
    """What two harvests of the same must have alike."""
    return sorted((r.key, r.example_id, r.sample, r.status, r.text) for r in rows_of(out))


def manifest(out: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((stage_of(out) / "manifest.json").read_text())
    return loaded
