"""Every value that crosses a process boundary. Frozen, and nothing unknown is let in."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Split = Literal["train", "validation", "test"]
FinishReason = Literal["stop", "length"]
Source = Literal["teacher", "student", "current-student"]
"""Who answered. student: before any training; current-student: as it was after the round before."""
CUT_OFF = "cut_off"
"""Beside the classes of failures what may be asked for again: answers that ended at the token limit."""


class Contract(BaseModel):
    """Base of all contracts: immutable, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Example(Contract):
    """One row of a data set: a text and, where there is one, the reference a person wrote for it."""

    id: str = Field(min_length=1)
    question: str = Field(min_length=1)
    summary: str | None = None


class Message(Contract):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class Sampling(Contract):
    """How completions are decoded. Temperature 0 is greedy."""

    max_tokens: int = Field(48, ge=1, le=4096)
    """Most tokens of one completion, in the engine's own tokens."""
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    stop: tuple[str, ...] = Field((), max_length=4)
    """The completion ends before the first of these texts."""
    seed: int | None = Field(None, ge=0, lt=2**63)
    """Sample i of a request uses seed + i, so that a part asked again answers alike where the engine is deterministic."""


class GenerationRequest(Contract):
    """What an engine is asked: exactly one of `messages` (chat) and `prompt` (plain), `n` completions of it."""

    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    n: int = Field(1, ge=1, le=64)
    sampling: Sampling = Sampling()
    beam_size: int = Field(1, ge=1, le=8)
    """Above 1: beam search of one greedy completion, which a model in this process knows and others ignore."""


class Completion(Contract):
    """All that a black box gives back: text. No logits, no token ids."""

    text: str
    finish_reason: FinishReason


class Response(Contract):
    """One ledger line: one answer of a model to one prompt, or the reason why there is none.

    `key` is the SHA-256 of all that was asked (who, protocol, model, example, request, sampling, sample index): a line
    answers exactly that and nothing else.
    """

    key: str
    example_id: str
    sample: int = Field(ge=0)
    status: Literal["ok", "failed"]
    text: str = ""
    finish_reason: FinishReason | None = None
    reason: str | None = None
    """Why a failed row failed: its class first, then what was said."""
    model: str
    """The public name that was asked for or, where the answer says so, the version that has answered."""
    latency_s: float = Field(ge=0)
    attempts: int = Field(ge=1)
    received_at: str
    """UTC, ISO 8601."""


class Triplet(Contract):
    """One preference: for this prompt `chosen` is better than `rejected`. Columns as TRL reads them.

    `prompt` is the zero-shot text of the task, before any chat template. Scores are those of the ranking.
    """

    example_id: str
    prompt: str
    chosen: str
    rejected: str
    chosen_source: Source
    rejected_source: Source
    chosen_score: float
    rejected_score: float
    chosen_weight: float = Field(1.0, gt=0)
    """Of the chosen response in the NLL, relative to the prompt's other chosen ones."""
    rejected_cut_off: bool = False
    """The rejected answer ended at the token limit: whoever said it did not end there."""


class Prediction(Contract):
    """One system's answer to one example, stored so that scores can be recomputed without a model."""

    system: str
    example_id: str
    text: str
    finish_reason: FinishReason | None = None
    failed: str | None = None
    """Why there is no answer (a FailureClass), and `text` is empty. An answer of nothing but blanks is one."""
    prompt_sha256: str | None = None
    """Of the prompt, or of the chat turns as JSON; None for systems that were not asked here."""


class FileRef(Contract):
    """A file of a run as a manifest records it; `path` is relative to the run directory."""

    path: str
    sha256: str
    bytes: int


class Manifest(Contract):
    """Written last by a stage, atomically: a stage is complete exactly when its manifest is there and true."""

    stage: str
    inputs: tuple[FileRef, ...]
    outputs: tuple[FileRef, ...]
    settings: dict[str, Any]
    """The resolved settings the stage used."""
    counts: dict[str, Any] = {}
    """Census: rows in, kept, dropped and why; whatever a person would want to know at a glance."""
    versions: dict[str, str]
    started_at: str
    seconds: float = Field(ge=0)


class ServingConfig(Contract):
    """`serving.json` in a serving folder: what a local engine must know beside CTranslate2's model and `tokenizer.json`."""

    name: str
    kind: Literal["encoder-decoder", "decoder-only"]
    eos_token: str
    bos_token: str | None = None
    decoder_start_token: str | None = None
    """Encoder-decoder only."""
    chat_template: str | None = None
    """Jinja, as Hugging Face writes it; None: messages are joined into one plain text."""
    max_input_tokens: int = Field(ge=1)
    quantization: Literal["int8", "float16", "float32"]
