"""From a request to token ids: one piece of code for training, sampling and serving, so that all see the same prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from shared.contracts import GenerationRequest, Message, ServingConfig
from shared.errors import EngineError

UNSEEN = "\u200b"
"""A zero-width blank."""


class PromptEncoder:
    """Renders a request and tokenises it, as the model's own tokenizer does."""

    def __init__(self, tokenizer: Tokenizer, *, chat_template: str | None, bos_token: str | None, eos_token: str) -> None:
        """Raises EngineError for a chat template that is none."""
        self.tokenizer = tokenizer
        self._names = {"bos_token": bos_token or "", "eos_token": eos_token}
        self._marks = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(chat_template) if chat_template else None
        except TemplateError as exc:
            raise EngineError(f"the model's chat template cannot be read: {exc}; mend it in its folder") from exc

    @classmethod
    def from_folder(cls, folder: Path, config: ServingConfig) -> PromptEncoder:
        """The encoder of a serving folder. Raises EngineError if it has no tokenizer."""
        file = folder / "tokenizer.json"
        if not file.exists():
            raise EngineError(f"{folder} has no tokenizer.json: it is not a complete serving folder; export the model again")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as exc:  # tokenizers raises nothing more precise
            raise EngineError(f"{file} cannot be read, export the model again: {exc}") from exc
        return cls(tokenizer, chat_template=config.chat_template, bos_token=config.bos_token, eos_token=config.eos_token)

    @classmethod
    def from_transformers(cls, tokenizer: Any) -> PromptEncoder:
        """The encoder of a fast tokenizer of transformers (its chat template is used for messages)."""
        return cls(
            tokenizer.backend_tokenizer,
            chat_template=default_template(tokenizer),
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
        )

    def render(self, messages: Sequence[Message]) -> str:
        """Chat turns as the model was trained to read them, ready for the assistant's answer; plain text without a template."""
        if self._template is None:
            return "\n\n".join(m.content for m in messages)
        try:
            turns = [{**m.model_dump(), "content": self._inert(m.content)} for m in messages]
            return self._template.render(messages=turns, add_generation_prompt=True, **self._names)
        except Exception as exc:  # a boundary: a template is code, which can fail in any way
            raise EngineError(f"the model's chat template refuses these messages: {exc}") from exc

    def _inert(self, text: str) -> str:
        """What a turn says, so that no word of it ends the turn or begins another: marks of the template are broken up where they stand."""
        for mark in self._marks:
            if mark in text:
                text = text.replace(mark, f"{mark[0]}{UNSEEN}{mark[1:]}")
        return text

    def encode(self, request: GenerationRequest) -> list[int]:
        """Token ids of a whole prompt; special tokens are added unless a chat template has already written them."""
        if request.messages is not None:
            text, special = self.render(request.messages), self._template is None
        else:
            text, special = request.prompt or "", True
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special).ids
        return ids


def default_template(tokenizer: Any) -> str | None:
    """The chat template of a tokenizer of transformers; of several, which it has by name, that for plain chat. Raises EngineError."""
    found: str | dict[str, str] | None = tokenizer.chat_template
    if not isinstance(found, dict):
        return found
    if "default" not in found:
        raise EngineError(f"the model has chat templates for {', '.join(found)} and none for plain chat; name one of them default")
    return found["default"]


def _raise(message: str) -> None:
    raise TemplateError(message)
