"""The face both servers show: an OpenAI-compatible API that gives text, a finish reason and the public model name, nothing else."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, nullcontext
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.routing import BaseRoute
from starlette.types import Receive, Scope, Send

from shared.engines import Engine
from shared.errors import DistillError, TeacherUnavailable
from shared.http.face import Bounds, Chat, Choose, Chosen, Complete, Face, Route
from shared.http.keys import Keys
from shared.http.limits import Counts
from shared.http.metrics import Meters
from shared.http.problems import NotReady, Refused, add_error_handlers, error_answer
from shared.http.schema import Described, describe

READY_S = 5.0
"""Seconds in which /readyz answers: a name that is looked up in vain may take minutes, and whoever asks waits for less."""

log = logging.getLogger(__name__)


Endpoint = Callable[[Request], Awaitable[Response]]


class App(FastAPI):
    """An application that has a straight way to the routes that carry the load: the layers between cost as much as all else there."""

    names: tuple[str, ...] | None = None
    """Host names under which it answers; None: any. A page of anybody's can let its own name mean this machine, to read what is here."""
    known: Callable[[Request], object]
    """Raises Unauthorised or Forbidden for a request without a key that may ask: for routes that are added to the application."""

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
        if scope["type"] == "http" and self.names is not None and _host(scope) not in ("", *self.names):  # a browser always says one
            told = f"a server without keys answers this machine alone: ask it as {' or '.join(self.names)}, or start it with keys"
            await error_answer(403, told)(scope, receive, send)
            return
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
    choose: Choose | None = None,
    models: Callable[[], list[dict[str, Any]]] | None = None,
    routes: Mapping[str, Route[Any]] = MappingProxyType({}),
    described: Described = Described(),  # noqa: B008
    beside: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
    names: tuple[str, ...] | None = None,
) -> App:
    """An application over `engine`, which it closes when it ends; `model` is the public name, the only one it answers to.

    `keys`: who may ask (None: everybody), `counts`: what each key has used, shared by several such applications; `bounds`: what a
    request may be; `with_usage`: tell characters and words of every answer.
    `choose`: who answers to a name, if there are several names; `models`: what GET /v1/models lists, beside what all have in common;
    `routes`: more kinds of calls, by path; `described`: what OpenAPI tells of these and of other paths that are added to the application.
    `beside` is entered before the first request and left after the last; `names`: host names that it answers to, any by default.

    Every error has the shape {"error": {"message", "type", "param", "code"}}. What an engine says about itself goes to the
    log, never to the caller; prompts and answers go to neither.
    """
    keys, bounds = keys or Keys({}), bounds or Bounds()
    face = Face(
        choose or only(engine, model),
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
        more=described,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with beside():
            yield
        await engine.aclose()

    # no pages of documentation: they load scripts from elsewhere
    app = App(title=title, lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.known, app.names = face.known, names
    started = int(time.time())
    add_error_handlers(app)

    def answering(path: str, route: Route[Any]) -> None:
        @app.straight(path)
        async def answer(request: Request) -> Response:
            return await face.answer(request, route)

    answering("/v1/chat/completions", Chat())
    answering("/v1/completions", Complete())
    for path, route in routes.items():
        answering(path, route)

    @app.get("/v1/models")
    async def listing(request: Request) -> dict[str, Any]:
        face.known(request)
        common = {"object": "model", "created": started, "owned_by": "blackbox-distill"}
        return {"object": "list", "data": [common | listed for listed in (models() if models else [{"id": model}])]}

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


def _host(scope: Scope) -> str:
    """The name that was asked for, without its port."""
    named: bytes = next((value for name, value in scope["headers"] if name == b"host"), b"")
    return re.sub(r":\d+$", "", named.decode("latin-1").lower())


def only(engine: Engine, model: str) -> Choose:
    """The choice of a server that has one model."""
    chosen = nullcontext(Chosen(engine, model))

    def choose(name: str) -> AbstractContextManager[Chosen]:
        if name != model:
            raise unknown_model(name, model)
        return chosen

    return choose


def unknown_model(name: str, *served: str) -> Refused:
    """Nobody here answers to this name."""
    those = f"the one served is {served[0]!r}" if len(served) == 1 else f"those served are {', '.join(map(repr, served))}"
    return Refused(404, "model", f"the model {name[:100]!r} does not exist here; {those}", param="model", code="model_not_found")
