"""The bodies of the OpenAI-compatible API: what may be asked and what is answered, text only."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import to_json

from shared.contracts import Completion, FinishReason, GenerationRequest, Message, Sampling


def whole(value: Any) -> Any:
    """JSON knows one kind of number: 4.0 is an integer there, and some clients write it so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


StopText = Annotated[str, Field(min_length=1, max_length=1000)]
Text = Annotated[str, Field(pattern=r"\S")]
CHAT_TOKENS = 256
"""Most tokens of a chat's answer whose length the caller does not bound."""
COMPLETION_TOKENS = 16
"""The same of a plain prompt's, as in the OpenAI API."""


class Body(BaseModel):
    """Base of all request bodies: an unknown field is refused by name, and so is a value of another type. Null is absent."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Turn(Body):
    role: Literal["system", "user", "assistant"]
    content: str


class CallBody(Body):
    """What every kind of request has that a model answers."""

    model: str
    stream: bool | None = None
    """Default false."""
    asks_by: ClassVar[str]
    """The field that holds what is asked."""


class GenerationBody(CallBody):
    """What requests of the OpenAI API share, and their defaults."""

    max_tokens: Annotated[int, Field(ge=1, le=4096), BeforeValidator(whole)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Default 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Default 1."""
    n: Annotated[int, Field(ge=1, le=64), BeforeValidator(whole)] | None = None
    """Default 1."""
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(whole)] | None = None
    """Handed on to an upstream engine. A model in this process draws for a whole batch at once and does not look at it."""
    user: str | None = None
    """Accepted, since clients send it, and not used."""

    def _request(self, max_tokens: int, *, messages: tuple[Message, ...] | None = None, prompt: str | None = None) -> GenerationRequest:
        stop = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        sampling = Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p or 1.0,
            stop=stop,
            seed=self.seed,
        )
        return GenerationRequest(messages=messages, prompt=prompt, n=self.n or 1, sampling=sampling)


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    asks_by = "messages"
    messages: list[Turn] = Field(min_length=1)
    max_completion_tokens: Annotated[int, Field(ge=1, le=4096), BeforeValidator(whole)] | None = None
    """The newer name of max_tokens."""

    @model_validator(mode="after")
    def _is_whole(self) -> ChatBody:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens: give either it or max_completion_tokens")
        if not any(turn.content.strip() for turn in self.messages):
            raise ValueError("messages: none of them has text")
        return self

    def request(self, most_tokens: int) -> GenerationRequest:
        """The request as an engine takes it; of CHAT_TOKENS or `most_tokens` tokens, the fewer, unless another bound is given."""
        messages = tuple(Message(role=turn.role, content=turn.content) for turn in self.messages)
        return self._request(self.max_tokens or self.max_completion_tokens or min(CHAT_TOKENS, most_tokens), messages=messages)


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    asks_by = "prompt"
    prompt: Text

    def request(self, most_tokens: int) -> GenerationRequest:
        """The request as an engine takes it; of COMPLETION_TOKENS or `most_tokens` tokens, the fewer, unless another bound is given."""
        return self._request(self.max_tokens or min(COMPLETION_TOKENS, most_tokens), prompt=self.prompt)


class Answer(BaseModel):
    """Base of all answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Usage(Answer):
    """What was read and written, as anybody can count it in the texts: an engine's tokens stay its own affair."""

    prompt_characters: int
    prompt_words: int
    completion_characters: int
    """Of all choices together."""
    completion_words: int


class ChatTurn(Answer):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(Answer):
    index: int
    message: ChatTurn
    finish_reason: FinishReason


class TextChoice(Answer):
    index: int
    text: str
    finish_reason: FinishReason


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    """Unix time, s."""
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None


class TextCompletion(Answer):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    """Unix time, s."""
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class ChatDelta(Answer):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Answer):
    index: int
    delta: ChatDelta
    finish_reason: FinishReason | None = None


class ChatChunk(Answer):
    """One event of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    """Unix time, s."""
    model: str
    choices: list[ChatChunkChoice]


class TextChunkChoice(Answer):
    index: int
    text: str
    finish_reason: FinishReason | None = None


class TextChunk(Answer):
    """One event of a streamed completion."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    """Unix time, s."""
    model: str
    choices: list[TextChunkChoice]


class Problem(Answer):
    message: str
    """What is wrong and what to do about it."""
    type: Literal["invalid_request_error", "authentication_error", "permission_error", "rate_limit_error", "server_error"]
    param: str | None
    """The field that is wrong."""
    code: str | None


class ErrorAnswer(Answer):
    """Every answer that is no success."""

    error: Problem


def usage(request: GenerationRequest, completions: Sequence[Completion]) -> dict[str, int]:
    """A `Usage`: characters and words of the prompt (of all its turns) and of all completions."""
    prompt = [m.content for m in request.messages or ()] if request.prompt is None else [request.prompt]
    texts = [c.text for c in completions]
    return {
        "prompt_characters": sum(map(len, prompt)),
        "prompt_words": sum([len(text.split()) for text in prompt]),
        "completion_characters": sum(map(len, texts)),
        "completion_words": sum([len(text.split()) for text in texts]),
    }


def chat_completion(model: str, completions: Sequence[Completion], usage: dict[str, int] | None) -> bytes:
    """A `ChatCompletion`: nothing is in it but the public name, the texts, why they ended, and what anybody can count in them."""
    choices = [
        {"index": i, "message": {"role": "assistant", "content": c.text}, "finish_reason": c.finish_reason}
        for i, c in enumerate(completions)
    ]
    return _answer("chatcmpl", "chat.completion", model, choices, usage)


def text_completion(model: str, completions: Sequence[Completion], usage: dict[str, int] | None) -> bytes:
    """A `TextCompletion`: nothing is in it but the public name, the texts, why they ended, and what anybody can count in them."""
    choices = [{"index": i, "text": c.text, "finish_reason": c.finish_reason} for i, c in enumerate(completions)]
    return _answer("cmpl", "text_completion", model, choices, usage)


def _answer(kind: str, name: str, model: str, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> bytes:
    answer = {"id": new_id(kind), "object": name, "created": int(time.time()), "model": model, "choices": choices}
    if usage is not None:
        answer["usage"] = usage
    return bytes(to_json(answer))


def new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(16)}"
