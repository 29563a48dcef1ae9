"""A server as a process, for tests that speak to a real one: started, watched, ended; its log is kept."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ANSWER_S = 60.0
"""Seconds that a test waits for an answer at most: the machine may be busy."""
QUESTION = "Is migraine hereditary?"
ANSWER = "What should I know about hereditary and migraine?"
"""The scripted engine's greedy answer to it."""
WELCOME = ("teacher (scripted): --no-auth: whoever reaches 127.0.0.1 may ask, without a key",)
"""What a server says to people before it serves."""


@dataclass
class Gateway:
    process: subprocess.Popen[str]
    port: int
    log: Path
    """Its standard error."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def told(self) -> list[dict[str, Any]]:
        """Its log so far; a line that is no JSON (a traceback of Python's own) is one of an error."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return [json.loads(line) if line.startswith("{") else {"level": "error", "message": line} for line in lines if line not in WELCOME]

    def complaints(self) -> list[dict[str, Any]]:
        """What the log tells of errors in the server itself."""
        return [line for line in self.told() if line["level"] in ("error", "critical") or "exception" in line]

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=ANSWER_S)


@contextmanager
def running(command: list[str], log: Path, **variables: str) -> Iterator[Gateway]:
    """A Python program (its arguments) that prints "... listening on URL", until the block ends; it must then end with 0 when told to."""
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, **variables}
        )
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if "listening on" in line), "")
        assert line, log.read_text()
        yield Gateway(process, int(line.rpartition(":")[2].removesuffix("/v1\n")), log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


def teacher(log: Path, *options: str) -> Any:
    """`distill teacher` over the scripted engine with such options, as `running` does."""
    return running(["-m", "shared.cli", "teacher", "--engine", "scripted", "--port", "0", *options], log)


def in_time(condition: Callable[[], bool], seconds: float = ANSWER_S) -> bool:
    """Whether this becomes true within so many seconds."""
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        assert set(self.json) == {"error"}, self
        assert set(self.json["error"]) == {"message", "type", "param", "code"}
        return dict(self.json["error"])


def read_answers(connection: socket.socket, most: int = 1000) -> list[Answer]:
    """The answers that come until the other side closes, or until there are `most`; a part of one is none."""
    answers: list[Answer] = []
    with connection.makefile("rb") as lines:
        while len(answers) < most:
            try:
                answer = _read_answer(lines)
            except ConnectionError:
                break
            if answer is None:
                break
            if answer.status != 100:
                answers.append(answer)
    return answers


def _read_answer(lines: Any) -> Answer | None:
    first = lines.readline()
    if not first.endswith(b"\r\n"):
        return None
    headers = {}
    while (line := lines.readline()) not in (b"\r\n", b""):
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    status = int(first.split()[1])
    if "content-length" in headers:
        body = lines.read(int(headers["content-length"]))
        complete = len(body) == int(headers["content-length"])
    elif headers.get("transfer-encoding") == "chunked":
        body, complete = b"", False
        while size := lines.readline().strip():
            piece = lines.read(int(size, 16))
            complete = lines.read(2) == b"\r\n" and not piece
            body += piece
            if complete:
                break
    else:
        body = b"" if status < 200 else lines.read()
        complete = True
    return Answer(status, headers, body) if complete else None
