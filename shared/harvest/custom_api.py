"""A teacher's own API as a recipe declares it: what is sent, by a template, and where in the answer what stands, by JMESPath.

JMESPath has a specification and conformance tests, joins and chooses (`join('', content[?type=='text'].text)`), and runs no code of the
recipe's. Its reference library `jmespath` has no dependencies, and boto keeps it alive.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, JsonValue, field_validator, model_validator

from shared.contracts import GenerationRequest, Message
from shared.errors import RequestRefused

PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
LISTS = ("messages", "stop")
OF_A_REQUEST = (*LISTS, "prompt", "system", "model", "max_tokens", "temperature", "top_p", "seed", "n", "api_key")
OF_A_MESSAGE = ("role", "content")
SECRET = re.compile(r"(^|[-_])(api)?(authorization|auth|key|token|secret|password|credentials?|cookie)$", re.IGNORECASE)
"""Names of headers, and of parts of a URL's query, whose values are nobody's business."""
HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
OURS = ("content-type", "content-length", "transfer-encoding", "connection", "host", "accept-encoding")
"""Headers that say how the request is sent, which is not a recipe's to say."""
ABSENT = object()

Ending = Literal["stop", "length", "content_filter"]
Outcome = Literal["busy", "failed", "refused", "too_long", "content_filter", "rejected"]


def _expression(text: str) -> str:
    """`text`, if it is a JMESPath expression with functions that exist: the library finds those out on the first answer only."""
    import jmespath
    from jmespath.functions import Functions

    try:
        parsed = jmespath.compile(text).parsed
    except jmespath.exceptions.JMESPathError as exc:
        raise ValueError(f"no JMESPath expression: {' '.join(str(exc).split()).rstrip('^ ')}") from exc
    for name in _functions(parsed):
        if name not in Functions.FUNCTION_TABLE:
            raise ValueError(f"JMESPath has no function {name}(){_nearest(name, Functions.FUNCTION_TABLE)}")
    return text


Expression = Annotated[str, AfterValidator(_expression)]


class CustomApi(BaseModel):
    """A JSON API of any shape. A string that is one placeholder alone becomes its value with its type, and where there is none (no
    seed, no system message, no stop) it is left out with its key. What the template does not name is not sent.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["POST", "PUT"] = "POST"
    headers: dict[str, str] = {}
    """`{api_key}` stands for teacher.api_key: a secret in a recipe is refused."""
    body: JsonValue
    """With `{messages}` (and `{system}`, else system messages are among them) or with `{prompt}`, as the API takes chats or plain text.
    And: {model} {max_tokens} {temperature} {top_p} {stop} {seed} {n} {api_key}. Without `{n}` a request asks for one answer."""
    message: JsonValue = {"role": "{role}", "content": "{content}"}
    """One of `{messages}`."""
    roles: dict[Literal["system", "user", "assistant"], str] = {}
    """What `{role}` becomes where the API has names of its own."""

    choices: Expression | None = None
    """The list of answers; `text` and `finish_reason` are then looked up in each. None: the whole body is the one answer."""
    text: Expression
    finish_reason: Expression | None = None
    """None: nobody knows which answers were cut off; all count as ended."""
    finish_reasons: dict[str, Ending] = {}
    """What the API's words mean, beside stop, length and content_filter themselves. An answer that ends otherwise is a failed row."""
    error: Expression | None = None
    """An error or its code, whatever the HTTP status; nothing, false, 0 and "" are none."""
    errors: dict[str, Outcome] = {}
    """What `error` means. busy: come back later, it is no failure. failed: worth another attempt. refused, too_long, content_filter: this
    request alone. rejected: the harvest ends. Others mean what their HTTP status does; with 2xx busy if `retry_after_s` is there, else
    failed."""
    retry_after_s: Expression | None = None
    """Seconds, or a text like 1.5s or 200ms; comes before the header Retry-After."""
    input_tokens: Expression | None = None
    output_tokens: Expression | None = None
    """Of all choices together."""

    @field_validator("headers", mode="before")
    @classmethod
    def _quoted(cls, headers: Any) -> Any:
        for name, value in headers.items() if isinstance(headers, dict) else ():
            if not isinstance(value, str):
                shown = f"{{{next(iter(value))}}}" if isinstance(value, dict) and len(value) == 1 else value
                raise ValueError(f'{name}: without quotes YAML does not read this as text; write "{shown}"')
        return headers

    @field_validator("headers")
    @classmethod
    def _no_secrets(cls, headers: dict[str, str]) -> dict[str, str]:
        for name, value in headers.items():
            if not HEADER.fullmatch(name) or not value.isascii() or not value.isprintable():
                raise ValueError(f"{name}: no header has this name or this value")
            if name.lower() in OURS:
                raise ValueError(f"{name}: leave it out, it is set by the client (bodies are JSON)")
            if SECRET.search(name) and "{api_key}" not in value:
                raise ValueError(f'{name}: a secret has no place in a recipe; write "{{api_key}}" for it and give teacher.api_key_file')
            _known(value, ("api_key",))
        return headers

    @field_validator("body")
    @classmethod
    def _asks(cls, body: JsonValue) -> JsonValue:
        _known(body, OF_A_REQUEST)
        used = set(placeholders(body))
        if ("prompt" in used) == ("messages" in used):
            raise ValueError('the template needs either "{prompt}" (plain text) or "{messages}" (a chat), and not both')
        if {"prompt", "system"} <= used:
            raise ValueError('"{system}" goes with "{messages}"; plain text has its instruction in "{prompt}"')
        return body

    @field_validator("message")
    @classmethod
    def _says_it(cls, message: JsonValue) -> JsonValue:
        _known(message, OF_A_MESSAGE)
        if "content" not in placeholders(message):
            raise ValueError('the template of a message needs "{content}"')
        return message

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> CustomApi:
        if self.most_choices is None and self.choices is None:
            raise ValueError('choices: "{n}" asks for several answers; say where their list is, or leave "{n}" out')
        if not self.chat and self.model_fields_set & {"message", "roles"}:
            raise ValueError('message, roles: they shape "{messages}", which the body does not have')
        for words, field in (("finish_reasons", "finish_reason"), ("errors", "error")):
            if getattr(self, words) and getattr(self, field) is None:
                raise ValueError(f"{words}: say in {field} where these words stand")
        return self

    @cached_property
    def used(self) -> frozenset[str]:
        """The placeholders of body and headers."""
        return frozenset(placeholders([self.body, *self.headers.values()]))

    @property
    def chat(self) -> bool:
        """Whether it is asked by chat turns; else by plain text."""
        return "messages" in self.used

    @property
    def bounded(self) -> bool:
        """Whether it is told how long an answer may be."""
        return "max_tokens" in self.used

    @property
    def most_choices(self) -> int | None:
        """Answers a request may ask for; None: as many as one likes."""
        return None if "n" in self.used else 1

    @property
    def fingerprint(self) -> str:
        """Of all that decides what an answer is. How errors and waits are read does not: to mend that asks nothing anew."""
        kept = {"method", "headers", "body", "message", "roles", "choices", "text", "finish_reason", "finish_reasons"}
        declared = json.dumps(self.model_dump(mode="json", include=kept), sort_keys=True)
        return hashlib.sha256(declared.encode()).hexdigest()[:16]

    def asked(self, request: GenerationRequest, *, model: str, api_key: str | None) -> Any:
        """The body of `request`, to be sent as JSON. Raises RequestRefused for a chat where plain text is asked for, and the reverse."""
        if (request.messages is not None) != self.chat:
            raise RequestRefused(f"teacher.custom.body takes {'chats' if self.chat else 'plain text'}, and this is the other")
        sampling = request.sampling
        values = {
            "prompt": request.prompt,
            "model": model,
            "api_key": api_key,
            "n": request.n,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop": list(sampling.stop) or None,
            "seed": sampling.seed,
        }
        turns = request.messages or ()
        if "system" in self.used:
            values["system"] = "\n\n".join(turn.content for turn in turns if turn.role == "system") or None
            turns = tuple(turn for turn in turns if turn.role != "system")
        values["messages"] = [self._turn(turn) for turn in turns]
        return fill(self.body, values)

    def _turn(self, turn: Message) -> Any:
        return fill(self.message, {"role": self.roles.get(turn.role, turn.role), "content": turn.content})


def fill(template: JsonValue, values: Mapping[str, Any]) -> Any:
    """`template` with `values` in the place of its placeholders; what they hold is not looked at again."""
    match template:
        case str():
            if alone := PLACEHOLDER.fullmatch(template):
                value = values[alone[1]]
                return ABSENT if value is None else value
            return PLACEHOLDER.sub(lambda found: "" if values[found[1]] is None else str(values[found[1]]), template)
        case list():
            return [filled for part in template if (filled := fill(part, values)) is not ABSENT]
        case dict():
            return {name: filled for name, part in template.items() if (filled := fill(part, values)) is not ABSENT}
        case _:
            return template


def placeholders(template: JsonValue) -> list[str]:
    """The names of all placeholders, in their order."""
    return [name for part in _parts(template) if isinstance(part, str) for name in PLACEHOLDER.findall(part)]


def _known(template: JsonValue, names: tuple[str, ...]) -> None:
    """Raise ValueError for a placeholder that nothing fills, and for one that YAML has not read as text."""
    for part in _parts(template):
        if isinstance(part, dict) and len(part) == 1 and part.get(name := next(iter(part)), "") is None and name in names:
            raise ValueError(f'{{{name}}} without quotes is a mapping to YAML; write "{{{name}}}"')
        for name in PLACEHOLDER.findall(part) if isinstance(part, str) else ():
            if name not in names:
                raise ValueError(f"{{{name}}}: unknown placeholder{_nearest(name, names)} (there are {', '.join(sorted(names))})")
            if name in LISTS and part != f"{{{name}}}":
                raise ValueError(f"{{{name}}} is a list: let it stand alone, without text around it")


def _parts(template: JsonValue) -> Iterator[JsonValue]:
    yield template
    if isinstance(template, (list, dict)):
        for part in template.values() if isinstance(template, dict) else template:
            yield from _parts(part)


def _functions(parsed: Any) -> Iterator[str]:
    """The names of all functions in a parsed expression."""
    if isinstance(parsed, dict):
        if parsed.get("type") == "function_expression":
            yield parsed["value"]
        for child in parsed.get("children", ()):
            yield from _functions(child)


def _nearest(name: str, names: Iterable[str]) -> str:
    close = get_close_matches(name, list(names), 1, 0.75)
    return f"; did you mean {close[0]}?" if close else ""
