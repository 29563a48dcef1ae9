"""Errors as callers see them: one shape, the right status, and nothing of what an engine says about itself."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from shared.errors import DistillError, RequestRefused, TeacherBusy, TeacherFailed, TeacherLate, TeacherRejected, TeacherUnavailable
from shared.http.keys import Forbidden, Unauthorised
from shared.http.limits import Exhausted, OverADay, QueueFull

log = logging.getLogger(__name__)


class Refused(DistillError):
    """A request that is not what this API takes. `reason` is a label for metrics, one of few."""

    def __init__(self, status: int, reason: str, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.reason, self.param, self.code = status, reason, param, code


class NotReady(TeacherUnavailable):
    """No model is served yet. The message says what it waits for, and is meant for the caller."""


def wrong_body(error: Any) -> Refused:
    """What pydantic says of a body, in the API's words."""
    if error["type"] == "json_invalid" or (not error["loc"] and error["type"] != "value_error"):
        return Refused(400, "not_json", "the body is no JSON object; send one, as application/json")
    # only where and what is wrong: the value itself may be a prompt
    parts = [str(part) for part in error["loc"] if isinstance(part, int) or part.isidentifier()]  # without pydantic's names of types
    name = (".".join(parts) or ".".join(map(repr, error["loc"])))[:100]
    if error["type"] == "extra_forbidden":
        return Refused(422, "field", f"{name}: unknown field; it is not supported here", param=name)
    said = "it has no text" if error["type"] == "string_pattern_mismatch" else str(error["msg"]).removeprefix("Value error, ")
    name = name or said.partition(":")[0] * (error["type"] == "value_error")
    return Refused(422, "field", said if said.startswith(f"{name}: ") else f"{name or 'body'}: {said}", param=name or None)


def add_error_handlers(app: FastAPI) -> None:
    """Give every error of `app` the one shape."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, exc: RequestValidationError) -> JSONResponse:
        error = exc.errors()[0]
        return problem(wrong_body({**error, "loc": error["loc"][1:]}))

    @app.exception_handler(HTTPException)
    async def http(request: Request, exc: HTTPException) -> JSONResponse:
        message = {404: "there is nothing at this path", 405: "this path does not know that method"}.get(exc.status_code, exc.detail)
        return error_answer(exc.status_code, message, headers=dict(exc.headers or {}))

    @app.exception_handler(DistillError)
    async def distill(request: Request, exc: DistillError) -> JSONResponse:
        return problem(exc)

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, exc: Exception) -> JSONResponse:
        return error_answer(500, "an error in this service; its log tells which")


def reason_of(exc: DistillError) -> str:
    """Why a request got no answer, as a label of metrics."""
    if isinstance(exc, Refused):
        return exc.reason
    if isinstance(exc, Exhausted):
        return exc.limit
    return next(REASONS[kind] for kind in type(exc).__mro__ if kind in REASONS)


REASONS: dict[type[DistillError], str] = {
    Unauthorised: "no_key",
    Forbidden: "key_revoked",
    OverADay: "characters_per_day",
    QueueFull: "queue_full",
    NotReady: "not_ready",
    RequestRefused: "engine_refused",
    TeacherBusy: "engine_busy",
    TeacherLate: "engine_late",
    TeacherFailed: "engine_failed",
    TeacherUnavailable: "engine_unavailable",
    TeacherRejected: "engine_refuses_all",
    DistillError: "error",
}
"""By class, or by the nearest one above it."""


def problem(exc: DistillError, request_id: str = "-") -> JSONResponse:
    """The response to an error. What an engine says of itself is logged, under the request's id, and not told."""
    about = {"fields": {"id": request_id}}
    match exc:
        case Refused():
            unread = {"connection": "close"} if exc.status == 408 else None
            return error_answer(exc.status, str(exc), param=exc.param, code=exc.code, headers=unread)
        case Unauthorised():
            return error_answer(401, str(exc), code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        case Forbidden():
            return error_answer(403, str(exc))
        case Exhausted():
            code = "insufficient_quota" if exc.limit == "characters_per_day" else "rate_limit_exceeded"
            return error_answer(429, str(exc), code=code, headers=_retry_after(exc))
        case QueueFull():
            return error_answer(429, str(exc), code="rate_limit_exceeded", headers=_retry_after(exc))
        case OverADay():
            return error_answer(400, str(exc), param="max_tokens", code="insufficient_quota")
        case RequestRefused():
            return error_answer(400, str(exc), code="context_length_exceeded" if exc.kind == "too_long" else None)
        case NotReady():
            return error_answer(503, str(exc), headers=_retry_after(exc))
        case TeacherBusy():
            log.info("busy: %s", exc, extra=about)
            later = _retry_after(exc) or {"retry-after": "1"}  # a 429 always says when
            return error_answer(429, "the model takes no more requests now; try again", code="rate_limit_exceeded", headers=later)
        case TeacherLate():
            log.warning("late: %s", exc, extra=about)
            return error_answer(504, "the model did not answer in time")
        case TeacherFailed():
            log.warning("failed: %s", exc, extra=about)
            return error_answer(502, "the model failed to answer; try again")
        case TeacherUnavailable():
            log.warning("unavailable: %s", exc, extra=about)
            return error_answer(503, "the model is not available now; try again", headers=_retry_after(exc))
        case TeacherRejected():
            log.error("rejected: %s", exc, extra=about)
            return error_answer(502, "the model behind this service refuses to answer; its operator must look")
        case _:
            log.error("%s: %s", type(exc).__name__, exc, extra=about)
            return error_answer(500, "the model failed to answer")


def problem_body(exc: DistillError, request_id: str) -> Any:
    """The body of the response to an error."""
    return json.loads(bytes(problem(exc, request_id).body))


def _retry_after(exc: TeacherUnavailable) -> dict[str, str]:
    return {} if exc.retry_after_s is None else {"retry-after": str(max(1, math.ceil(exc.retry_after_s)))}


TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_answer(
    status: int, message: str, *, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    """An error as the OpenAI API words it."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status, headers)
