"""A student's server without a student: it serves the real page and answers what a test wants, as slowly as a test wants."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}
SCORES = {"rouge1": 0.4512, "rouge2": 0.2204, "rougeL": 0.4107, "bleu": 0.1689}
STATE: dict[str, Any] = {
    "ready": True,
    "reason": None,
    "version": "20261126-214000-5f3a9c1e",
    "name": "offline-demo",
    "scores": SCORES,
    "promoted_at": "2026-11-26T21:40:00.000+00:00",
    "max_question_characters": 400,
    "models": ["student", "base", "teacher"],
    "samples": ["I take ibuprofen against migraine. Does it go together with the tablets for my heart?", "What is a stye, and will it go?"],
    "report": True,
    "canary": None,
}
NOTHING = {**STATE, "ready": False, "reason": "no version is promoted in /registry yet", "version": None, "name": None, "scores": {}}
RUN: dict[str, Any] = {
    "name": "offline-demo",
    "begun_at": "2026-11-26T21:30:00.000+00:00",
    "stages": [
        {"stage": "dataset", "state": "done", "rows": 330, "seconds": 0.012},
        {"stage": "responses/teacher", "state": "done", "rows": 440, "seconds": 32.1},
        {"stage": "responses/student-r0", "state": "done", "rows": 220, "seconds": 8.75},
        {"stage": "triplets/r0", "state": "outdated", "rows": 109, "seconds": 0.13},
        {"stage": "checkpoints/r0", "state": "partial", "rows": 47, "seconds": None},
        {"stage": "model", "state": "missing", "rows": None, "seconds": None},
        {"stage": "evaluation", "state": "missing", "rows": None, "seconds": None},
    ],
    "harvest": {"state": "running", "answers": 212, "wanted": 440, "rows_per_s": 13.25, "failed": 3},
    "training": {
        "round": 0,
        "step": 47,
        "wanted_steps": 90,
        "tokens_per_s": 803.2,
        "loss": [[step, 0.6 + 3.2 / (1 + step / 6) + 0.35 * ((step * 7919) % 13 - 6) / 13] for step in range(1, 48)],
    },
    "error": None,
}


@dataclass
class Script:
    """What a model says: pieces with a pause before each."""

    pieces: tuple[str, ...] = ("What", " is", " a", " stye?")
    pause_s: float = 0.0
    finish_reason: str = "stop"
    truncated: bool = False
    status: int = 200
    """Else nothing is said but `error`."""
    error: str | None = None
    """After the pieces, if the status is 200."""
    breaks_off: bool = False


@dataclass
class ScriptedStudent:
    """Everything may be changed while it serves."""

    url: str = ""
    state: dict[str, Any] = field(default_factory=lambda: dict(STATE))
    run: dict[str, Any] | None = None
    key: str | None = None
    scripts: dict[str, Script] = field(default_factory=dict)
    """By model."""
    asked: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of POST /v1/generate."""
    looks: list[float] = field(default_factory=list)
    """When GET /v1/run came."""
    hung_up: list[str] = field(default_factory=list)
    """Models whose answer nobody waited for."""

    def app(self) -> FastAPI:
        app = FastAPI()
        page = resources.files("student_trainer.serving").joinpath("page.html").read_text(encoding="utf-8")

        @app.middleware("http")
        async def guard(request: Request, call_next: Any) -> Response:
            if self.key and request.url.path != "/" and request.headers.get("authorization") != f"Bearer {self.key}":
                return problem(401, "Give an API key: authorization: Bearer KEY.", "invalid_api_key")
            return await call_next(request)

        @app.get("/")
        async def index() -> Response:
            return HTMLResponse(page, headers=PAGE_HEADERS)

        @app.get("/v1/student")
        async def state() -> Response:
            return JSONResponse(self.state)

        @app.get("/report")
        async def report() -> Response:
            return HTMLResponse("<!doctype html><title>The report</title><h1>The report</h1>")

        @app.get("/v1/run")
        async def run() -> Response:
            self.looks.append(time.monotonic())
            return JSONResponse(self.run) if self.run else problem(404, "No run is mounted.", "no_run")

        @app.post("/v1/generate")
        async def generate(request: Request) -> Response:
            body = await request.json()
            self.asked.append(body)
            script = self.scripts.get(body.get("model", "student"), Script())
            if script.status != 200:
                return problem(script.status, script.error or "no", None)
            if not body.get("stream"):
                answer = {"text": "".join(script.pieces), "finish_reason": script.finish_reason}
                return JSONResponse({"model": "student", "version": None, "answers": [answer]})
            headers = {"x-truncated": "1"} if script.truncated else {}
            return StreamingResponse(self._events(body["model"], script), headers=headers, media_type="text/event-stream")

        return app

    async def _events(self, model: str, script: Script) -> AsyncIterator[str]:
        version = self.state["version"] if model == "student" else None
        try:
            for piece in script.pieces:
                await asyncio.sleep(script.pause_s)
                yield event({"model": model, "version": version, "text": piece, "finish_reason": None})
        except asyncio.CancelledError:
            self.hung_up.append(model)
            raise
        if script.breaks_off:
            return
        if script.error:
            yield event({"error": {"message": script.error, "type": "server_error", "param": None, "code": None}})
            return
        yield event({"model": model, "version": version, "text": "", "finish_reason": script.finish_reason})
        yield "data: [DONE]\n\n"


def event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def problem(status: int, message: str, code: str | None) -> Response:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}, status)


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """An application on a free port of this machine, on a thread; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
