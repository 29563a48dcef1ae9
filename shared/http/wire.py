"""The bodies of the OpenAI-compatible API: what may be asked and what is answered, text only."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shared.contracts import Completion, FinishReason, GenerationRequest, Message, Sampling

StopText = Annotated[str, Field(min_length=1)]


class Body(BaseModel):
    """Base of all request bodies: an unknown field is refused by name, and so is a value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None or name not in cls.model_fields}


class Turn(Body):
    role: Literal["system", "user", "assistant"]
    content: str


class GenerationBody(Body):
    """What both kinds of request share. Defaults are those of the OpenAI API."""

    model: str
    max_tokens: int | None = Field(None, ge=1, le=4096)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=64)
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] = []
    seed: int | None = Field(None, ge=0, lt=2**63)
    user: str | None = None
    """Accepted, since clients send it, and not used."""
    stream: bool = False

    @model_validator(mode="after")
    def _not_streamed(self) -> GenerationBody:
        if self.stream:
            raise ValueError("stream: answers are not streamed; leave it out or set it to false")
        return self

    def _sampling(self, max_tokens: int) -> Sampling:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        return Sampling(max_tokens=max_tokens, temperature=self.temperature, top_p=self.top_p, stop=stop, seed=self.seed)


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[Turn] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=4096)
    """The newer name of max_tokens."""

    @model_validator(mode="after")
    def _one_bound(self) -> ChatBody:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens: give either it or max_completion_tokens")
        return self

    def request(self) -> GenerationRequest:
        """The request as an engine takes it; at most 256 tokens unless another bound is given."""
        messages = tuple(Message(role=turn.role, content=turn.content) for turn in self.messages)
        return GenerationRequest(messages=messages, n=self.n, sampling=self._sampling(self.max_tokens or self.max_completion_tokens or 256))


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: str

    def request(self) -> GenerationRequest:
        """The request as an engine takes it; at most 16 tokens, as in the OpenAI API, unless another bound is given."""
        return GenerationRequest(prompt=self.prompt, n=self.n, sampling=self._sampling(self.max_tokens or 16))


class Answer(BaseModel):
    """Base of all answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ChatTurn(Answer):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(Answer):
    index: int
    message: ChatTurn
    finish_reason: FinishReason
    logprobs: None = None


class TextChoice(Answer):
    index: int
    text: str
    finish_reason: FinishReason
    logprobs: None = None


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    """Unix time, s."""
    model: str
    choices: list[ChatChoice]


class TextCompletion(Answer):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    """Unix time, s."""
    model: str
    choices: list[TextChoice]


def chat_completion(model: str, completions: Sequence[Completion]) -> ChatCompletion:
    """A new object with nothing in it but the public name, the texts and why they ended."""
    choices = [ChatChoice(index=i, message=ChatTurn(content=c.text), finish_reason=c.finish_reason) for i, c in enumerate(completions)]
    return ChatCompletion(id=f"chatcmpl-{uuid.uuid4().hex}", created=int(time.time()), model=model, choices=choices)


def text_completion(model: str, completions: Sequence[Completion]) -> TextCompletion:
    """A new object with nothing in it but the public name, the texts and why they ended."""
    choices = [TextChoice(index=i, text=c.text, finish_reason=c.finish_reason) for i, c in enumerate(completions)]
    return TextCompletion(id=f"cmpl-{uuid.uuid4().hex}", created=int(time.time()), model=model, choices=choices)
