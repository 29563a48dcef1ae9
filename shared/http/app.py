"""The face both servers show: an OpenAI-compatible API that gives text, a finish reason and the public model name, nothing else."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.routing import BaseRoute
from starlette.types import Receive, Scope, Send

from shared.engines import Engine
from shared.errors import DistillError, TeacherUnavailable
from shared.http.face import Bounds, Face
from shared.http.keys import Keys
from shared.http.limits import Counts
from shared.http.metrics import Meters
from shared.http.problems import NotReady, add_error_handlers
from shared.http.schema import describe
from shared.http.wire import ChatBody, CompletionBody

READY_S = 5.0
"""Seconds in which /readyz answers: a name that is looked up in vain may take minutes, and whoever asks waits for less."""

log = logging.getLogger(__name__)


Endpoint = Callable[[Request], Awaitable[Response]]


class _App(FastAPI):
    """An application that has a straight way to the routes that carry the load: the layers between cost as much as all else there."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._straight: dict[str, tuple[Endpoint, BaseRoute]] = {}

    def straight(self, path: str) -> Callable[[Endpoint], Endpoint]:
        """A decorator: POSTs of `path` are answered by this function, which raises nothing."""

        def register(endpoint: Endpoint) -> Endpoint:
            self.add_api_route(path, endpoint, methods=["POST"], response_model=None)
            self._straight[path] = endpoint, self.routes[-1]
            return endpoint

        return register

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = self._straight.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if found is None:
            await super().__call__(scope, receive, send)
            return
        endpoint, scope["route"] = found
        response = await endpoint(Request(scope, receive))
        await response(scope, receive, send)


def create_app(
    engine: Engine,
    *,
    model: str,
    title: str,
    keys: Keys | None = None,
    counts: Counts | None = None,
    bounds: Bounds | None = None,
    meters: Meters | None = None,
    with_usage: bool = True,
    listed: Callable[[], bool] = lambda: True,
    beside: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
) -> FastAPI:
    """An application over `engine`, which it closes when it ends; `model` is the public name, the only one it answers to.

    `keys`: who may ask (None: everybody), `counts`: what each key has used, shared by several such applications; `bounds`: what a
    request may be; `with_usage`: tell characters and words of every answer. `listed`: whether the model is among those served now.
    `beside` is entered before the first request and left after the last.

    Every error has the shape {"error": {"message", "type", "param", "code"}}. What an engine says about itself goes to the
    log, never to the caller; prompts and answers go to neither.
    """
    keys, bounds = keys or Keys({}), bounds or Bounds()
    face = Face(
        engine,
        model=model,
        keys=keys,
        counts=counts or Counts(keys.keys),
        bounds=bounds,
        meters=meters or Meters(),
        with_usage=with_usage,
    )
    description = describe(
        title=title,
        model=model,
        keys=keys.required,
        bounds=bounds,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with beside():
            yield
        await engine.aclose()

    # no pages of documentation: they load scripts from elsewhere
    app = _App(title=title, lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    started = int(time.time())
    add_error_handlers(app)

    @app.straight("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await face.answer(request, ChatBody)

    @app.straight("/v1/completions")
    async def complete(request: Request) -> Response:
        return await face.answer(request, CompletionBody)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        face.known(request)
        data = [{"id": model, "object": "model", "created": started, "owned_by": "blackbox-distill"}] if listed() else []
        return {"object": "list", "data": data}

    @app.get("/openapi.json")
    async def schema() -> JSONResponse:
        return JSONResponse(description)

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
            log.info("not ready: %s", str(exc) or f"no answer within {READY_S:g} s")
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
