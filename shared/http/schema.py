"""What the text-only API is, in OpenAPI's words: what may be asked, within which limits, and every way an answer can look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from shared.http.face import Bounds
from shared.http.wire import ChatBody, ChatChunk, ChatCompletion, CompletionBody, ErrorAnswer, TextChunk, TextCompletion

REFUSALS = {
    400: "No JSON object, a prompt that the model cannot take, or one over the limit of characters, which is named.",
    401: "No API key, or one that is not known.",
    403: "An API key that may not be used any more.",
    404: "Nothing is at this path, or no model of this name is served.",
    405: "The path does not know this method; `allow` tells which it knows.",
    408: "The body did not come in time.",
    413: "The body is too large; the limit is named.",
    415: "The body is no JSON in UTF-8, or it is compressed.",
    422: "A field that is unknown, missing or out of its bounds: `param` names it.",
    429: "Too many requests or characters for this key, or too many requests at all; `retry-after` tells when to come back.",
    500: "An error in this service.",
    502: "The model behind this service failed.",
    503: "The model does not answer now.",
    504: "The model did not answer in time.",
}
WITH_RETRY_AFTER = (429, 503)


@dataclass(frozen=True)
class Read:
    """A GET that a server has beside those of all."""

    path: str
    summary: str
    answer: type[BaseModel] | str
    """Its JSON, or another media type."""
    missing: str | None = None
    """When it is answered with 404."""
    keyed: bool = True
    """Whether it wants a key where keys are wanted."""


@dataclass(frozen=True)
class Generating:
    """A POST that a server has beside those of all."""

    path: str
    summary: str
    body: type[BaseModel]
    answer: type[BaseModel]
    chunk: type[BaseModel]


@dataclass(frozen=True)
class Described:
    """What OpenAPI tells of a server beside what all have."""

    reads: tuple[Read, ...] = ()
    generating: tuple[Generating, ...] = ()
    names: tuple[str, ...] = ()
    """Models, beside the one."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """What answers of models tell in headers, and what that means."""
    listed: Mapping[str, Any] = field(default_factory=dict)
    """JSON schemas of what a listed model tells beside its name, by field."""


def describe(*, title: str, model: str, keys: bool, bounds: Bounds, more: Described = Described()) -> dict[str, Any]:
    """The OpenAPI document of a server that answers to the name `model`, with its limits. `keys`: whether it asks for them."""
    bodies: list[type[BaseModel]] = [ChatBody, CompletionBody, *(g.body for g in more.generating)]
    answers: list[type[BaseModel]] = [ChatCompletion, ChatChunk, TextCompletion, TextChunk, ErrorAnswer]
    answers += [a for g in more.generating for a in (g.answer, g.chunk)] + [r.answer for r in more.reads if not isinstance(r.answer, str)]
    names = [model, *more.names]
    _, definitions = models_json_schema(
        [*((b, "validation") for b in bodies), *((a, "serialization") for a in answers)], ref_template="#/components/schemas/{model}"
    )
    schemas = definitions["$defs"]
    for body in bodies:
        fields = schemas[body.__name__]["properties"]
        fields["model"]["enum"] = names
        fields["model"].pop("default", None)
        for name, most in (("n", bounds.max_n), ("max_tokens", bounds.max_tokens), ("max_completion_tokens", bounds.max_tokens)):
            if name in fields:
                fields[name]["anyOf"][0]["maximum"] = min(most, fields[name]["anyOf"][0].get("maximum", most))
        if "prompt" in fields:
            fields["prompt"]["maxLength"] = bounds.max_prompt_characters
    schemas["Turn"]["properties"]["content"]["maxLength"] = bounds.max_prompt_characters
    # either name of the bound; null is as good as absent
    both = {"properties": {name: {"type": "integer"} for name in ("max_tokens", "max_completion_tokens")}}
    schemas["ChatBody"]["properties"]["messages"]["maxItems"] = bounds.max_messages
    schemas["ChatBody"]["properties"]["messages"]["contains"] = {"required": ["content"], "properties": {"content": {"pattern": r"\S"}}}
    schemas["ChatBody"]["not"] = both | {"required": ["max_tokens", "max_completion_tokens"]}

    secured: dict[str, Any] = {"security": [{"key": []}]} if keys else {}

    def read(of: Read) -> dict[str, Any]:
        content = {of.answer: {"schema": {"type": "string"}}} if isinstance(of.answer, str) else None
        found = {"description": "It.", "content": content} if content else _json("It.", _reference(of.answer))  # type: ignore[arg-type]
        refused = (*((401, 403) if keys and of.keyed else ()), *((404,) if of.missing else ()), 405)
        responses = {"200": found, **_errors(*refused)}
        if of.missing:
            responses["404"] = _json(of.missing, _reference(ErrorAnswer))
        name = of.path.strip("/").replace("/", "_") or "page"
        return {"get": {"summary": of.summary, "operationId": name, "responses": responses, **(secured if of.keyed else {})}}

    def generation(what: str, body: type, answer: type, chunk: type) -> dict[str, Any]:
        headers = {"x-request-id": {"description": "Names this request in the server's log.", "schema": {"type": "string"}}}
        return {
            "summary": what,
            "description": f"At most {bounds.max_body_bytes} bytes, with at most {bounds.max_prompt_characters} characters of prompt.",
            "operationId": answer.__name__,
            "requestBody": {"required": True, "content": {"application/json": {"schema": _reference(body)}}},
            "responses": {
                "200": {
                    "description": "The answer; with `stream`, server-sent events: chunks, then `data: [DONE]` or one error.",
                    "headers": headers | {n: {"description": d, "schema": {"type": "string"}} for n, d in more.headers.items()},
                    "content": {
                        "application/json": {"schema": _reference(answer)},
                        "text/event-stream": {"schema": _event(chunk)},
                    },
                },
                **_errors(400, *((401, 403) if keys else ()), 404, 405, 408, 413, 415, 422, 429, 500, 502, 503, 504, headers=headers),
            },
            **secured,
        }

    listing = {
        "type": "object",
        "required": ["object", "data"],
        "properties": {
            "object": {"const": "list"},
            "data": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["id", "object", "created", "owned_by"],
                    "properties": {
                        "id": {"enum": names},
                        "object": {"const": "model"},
                        "created": {"type": "integer"},
                        "owned_by": {"type": "string"},
                        **more.listed,
                    },
                    "additionalProperties": False,
                },
            },
        },
        "additionalProperties": False,
    }
    state = {
        "type": "object",
        "required": ["status"],
        "properties": {"status": {"type": "string"}, "reason": {"type": "string"}},
        "additionalProperties": False,
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": title,
            "version": "1",
            "description": "Text in, text out: the OpenAI-compatible API of a black box. No log-probabilities, token ids or token counts; "
            "a field that is not named here is refused.",
        },
        "paths": {
            "/v1/chat/completions": {"post": generation("Answer a chat.", ChatBody, ChatCompletion, ChatChunk)},
            "/v1/completions": {"post": generation("Complete a plain prompt.", CompletionBody, TextCompletion, TextChunk)},
            "/v1/models": {
                "get": {
                    "summary": "The one model.",
                    "operationId": "models",
                    "responses": {
                        "200": _json("The model, or nothing while none is served.", listing),
                        **_errors(*((401, 403) if keys else ()), 405),
                    },
                    **secured,
                }
            },
            **{g.path: {"post": generation(g.summary, g.body, g.answer, g.chunk)} for g in more.generating},
            **{r.path: read(r) for r in more.reads},
            "/openapi.json": {
                "get": {
                    "summary": "This.",
                    "operationId": "schema",
                    "responses": {"200": _json("OpenAPI.", {"type": "object"}), **_errors(405)},
                }
            },
            "/healthz": {
                "get": {
                    "summary": "The process lives.",
                    "operationId": "healthz",
                    "responses": {"200": _json("It does.", state), **_errors(405)},
                }
            },
            "/readyz": {
                "get": {
                    "summary": "A request would be answered now.",
                    "operationId": "readyz",
                    "responses": {"200": _json("It would.", state), "503": _json("It would not.", state), **_errors(405)},
                }
            },
        },
        "components": {
            "schemas": schemas,
            **({"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}} if keys else {}),
        },
    }


def _errors(*statuses: int, headers: dict[str, Any] | None = None) -> dict[str, Any]:
    found = {}
    for status in statuses:
        found[str(status)] = _json(REFUSALS[status], _reference(ErrorAnswer))
        more = {"retry-after": {"description": "Seconds.", "schema": {"type": "integer"}}} if status in WITH_RETRY_AFTER else {}
        if headers or more:
            found[str(status)]["headers"] = {**(headers or {}), **more}
    return found


def _event(chunk: type) -> dict[str, Any]:
    """One server-sent event, as readers of OpenAPI take it apart."""
    content = {"anyOf": [_reference(chunk), _reference(ErrorAnswer)]}
    data = {"anyOf": [{"const": "[DONE]"}, {"type": "string", "contentMediaType": "application/json", "contentSchema": content}]}
    return {"type": "object", "required": ["data"], "properties": {"data": data}}


def _json(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _reference(model: type) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}
