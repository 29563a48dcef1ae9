"""The face both servers show: an OpenAI-compatible API that gives text, a finish reason and the public model name, nothing else."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from shared.engines import Engine
from shared.errors import DistillError, RequestRefused, TeacherRejected, TeacherUnavailable
from shared.http.wire import ChatBody, ChatCompletion, CompletionBody, TextCompletion, chat_completion, text_completion

READY_S = 5.0
"""Seconds in which /readyz answers: a name that is looked up in vain may take minutes, and whoever asks waits for less."""

log = logging.getLogger(__name__)


class UnknownModel(RequestRefused):
    """The request names a model that is not served here."""


class NotReady(TeacherUnavailable):
    """No model is served yet. The message says what it waits for, and is meant for the caller."""


def create_app(
    engine: Engine,
    *,
    model: str,
    title: str,
    listed: Callable[[], bool] = lambda: True,
    beside: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
) -> FastAPI:
    """An application over `engine`, which it closes when it ends; `model` is the public name, the only one it answers to.

    `listed`: whether the model is among those served now. `beside` is entered before the first request and left after the last.

    Every error has the shape {"error": {"message", "type", "param", "code"}}. What an engine says about itself goes to the
    log, never to the caller; prompts and answers go to neither.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with beside():
            yield
        await engine.aclose()

    # no schema and no docs pages: they would tell of routes and fields to come
    app = FastAPI(title=title, lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    started = int(time.time())
    add_error_handlers(app)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody) -> ChatCompletion:
        _known(body.model, model)
        with cut_short():
            return chat_completion(model, await engine.generate(body.request()))

    @app.post("/v1/completions")
    async def complete(body: CompletionBody) -> TextCompletion:
        _known(body.model, model)
        with cut_short():
            return text_completion(model, await engine.generate(body.request()))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        data = [{"id": model, "object": "model", "created": started, "owned_by": "blackbox-distill"}] if listed() else []
        return {"object": "list", "data": data}

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        """A request would be answered now."""
        try:
            async with asyncio.timeout(READY_S):
                await engine.check()
        except NotReady as exc:
            return JSONResponse({"status": "not ready", "reason": str(exc)}, 503)
        except (DistillError, TimeoutError) as exc:
            log.warning("not ready: %s", str(exc) or f"no answer within {READY_S:g} s")
            silent = isinstance(exc, (TeacherUnavailable, TimeoutError))
            reason = "the model does not answer" if silent else "the model refuses to answer"
            return JSONResponse({"status": "not ready", "reason": reason}, 503)
        return JSONResponse({"status": "ready"})

    return app


@contextmanager
def cut_short() -> Iterator[None]:
    """Answers a request that the server cancels, which it does to what is still in flight when it must end, as any that came too late."""
    try:
        yield
    except asyncio.CancelledError:
        raise TeacherUnavailable("shutting down") from None


def _known(asked: str, model: str) -> None:
    if asked != model:
        raise UnknownModel(f"the model {asked!r} does not exist here; the one served is {model!r}")


def add_error_handlers(app: FastAPI) -> None:
    """Give every error of `app` the one shape."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, exc: RequestValidationError) -> JSONResponse:
        error = exc.errors()[0]
        if error["type"] == "json_invalid" or (len(error["loc"]) == 1 and error["type"] != "value_error"):
            return error_answer(400, "the body is no JSON object; send one, as application/json")
        # only where and what is wrong: the value itself may be a prompt
        parts = [part for part in error["loc"][1:] if isinstance(part, int) or part.isidentifier()]  # without pydantic's names of types
        field = ".".join(map(str, parts))
        if error["type"] == "extra_forbidden":
            message = f"{field}: unknown field; it is not supported here"
        else:
            said = error["msg"].removeprefix("Value error, ")
            field = field or said.partition(":")[0] * (error["type"] == "value_error")
            message = said if said.startswith(f"{field}: ") else f"{field or 'body'}: {said}"
        return error_answer(422, message, param=field or None)

    @app.exception_handler(HTTPException)
    async def http(request: Request, exc: HTTPException) -> JSONResponse:
        message = {404: "there is nothing at this path", 405: "this path does not know that method"}.get(exc.status_code, exc.detail)
        return error_answer(exc.status_code, message, headers=dict(exc.headers or {}))

    @app.exception_handler(DistillError)
    async def distill(request: Request, exc: DistillError) -> JSONResponse:
        match exc:
            case UnknownModel():
                return error_answer(404, str(exc), param="model", code="model_not_found")
            case RequestRefused():
                return error_answer(400, str(exc))
            case NotReady():
                return error_answer(503, str(exc), headers=_retry_after(exc))
            case TeacherUnavailable():
                log.warning("unavailable: %s", exc)
                return error_answer(503, "the model is not available now; try again", headers=_retry_after(exc))
            case TeacherRejected():
                log.error("rejected: %s", exc)
                return error_answer(502, "the model behind this service refuses to answer; its operator must look")
            case _:
                log.error("%s: %s", type(exc).__name__, exc)
                return error_answer(500, "the model failed to answer")

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, exc: Exception) -> JSONResponse:
        return error_answer(500, "an error in this service; its log tells which")


def _retry_after(exc: TeacherUnavailable) -> dict[str, str]:
    return {} if exc.retry_after_s is None else {"retry-after": str(math.ceil(exc.retry_after_s))}


def error_answer(
    status: int, message: str, *, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    """An error as the OpenAI API words it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status, headers)
