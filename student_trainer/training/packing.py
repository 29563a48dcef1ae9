"""From triplets to tensors: a prompt once, and all its responses beside each other in the same row.

Encoder-decoder: the encoder reads the prompt, one decoder row holds every response (a block-diagonal causal mask keeps them
apart). Decoder-only: one row holds the prompt and then each response as a branch that sees the prompt and itself, with
position ids that go on from the prompt's. Both give what unpacked rows would give, for a fraction of the work.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from shared.contracts import GenerationRequest, Message, Triplet
from shared.engines.encoding import PromptEncoder
from shared.errors import TrainingError

Kind = Literal["encoder-decoder", "decoder-only"]
PROMPT, PADDING = 0, -1
"""Segments of a row; the responses are segments 1, 2, ..."""


@dataclass(frozen=True)
class Preferences:
    """All triplets of one example as texts: each response once, and which of them make pairs."""

    example_id: str
    prompt: str
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    """(index in chosen, index in rejected)."""


@dataclass(frozen=True)
class Packed:
    """One example as token ids."""

    example_id: str
    prompt: tuple[int, ...]
    chosen: tuple[tuple[int, ...], ...]
    rejected: tuple[tuple[int, ...], ...]
    pairs: tuple[tuple[int, int], ...]

    @property
    def length(self) -> int:
        """Tokens of its row, by which similar examples are put together."""
        return len(self.prompt) + sum(map(len, self.chosen)) + sum(map(len, self.rejected))


@dataclass
class Census:
    """What happened to every triplet on its way to a tensor."""

    triplets: int = 0
    examples: int = 0
    pairs: int = 0
    dropped: dict[str, int] = field(default_factory=lambda: {"prompt_too_long": 0, "equal_after_cut": 0})
    """Triplets that are not trained on, by reason; `pairs` + all of these = `triplets`."""
    cut_responses: int = 0
    """Responses longer than train.max_response_tokens: trained on without their end."""
    prompt_tokens: int = 0
    response_tokens: int = 0


def group(triplets: Iterable[Triplet]) -> list[Preferences]:
    """Triplets by example, in order of first appearance.

    Raises TrainingError when there is none, when a chosen text equals its rejected one, or when an example has two prompts.
    """
    examples: dict[str, list[Triplet]] = {}
    for triplet in triplets:
        examples.setdefault(triplet.example_id, []).append(triplet)
    if not examples:
        raise TrainingError("triplets/r0/triplets.jsonl is empty: nothing to train on; see its census for what was dropped and why")
    equal = sorted({t.example_id for rows in examples.values() for t in rows if t.chosen == t.rejected})
    if equal:
        raise TrainingError(f"chosen equals rejected, which teaches nothing, in {_some(equal)}; build the triplets again")
    torn = [name for name, rows in examples.items() if len({t.prompt for t in rows}) > 1]
    if torn:
        raise TrainingError(f"triplets of one example have different prompts: {_some(torn)}; build the triplets again")
    grouped = []
    for name, rows in examples.items():
        chosen = list(dict.fromkeys(t.chosen for t in rows))
        rejected = list(dict.fromkeys(t.rejected for t in rows))
        pairs = dict.fromkeys((chosen.index(t.chosen), rejected.index(t.rejected)) for t in rows)
        grouped.append(Preferences(name, rows[0].prompt, tuple(chosen), tuple(rejected), tuple(pairs)))
    return grouped


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class Packer:
    """Tokenises preferences as the student reads and writes them when it is served."""

    def __init__(self, tokenizer: Any, kind: Kind, *, max_prompt_tokens: int, max_response_tokens: int) -> None:
        """tokenizer: a fast tokenizer of transformers. Raises TrainingError if it has no end-of-sequence token."""
        if tokenizer.eos_token_id is None:
            raise TrainingError("student.model: its tokenizer has no end-of-sequence token, so no answer could ever end; set eos_token")
        self._tokenizer, self._kind = tokenizer, kind
        self._encoder = PromptEncoder.from_transformers(tokenizer)
        self._max_prompt, self._max_response = max_prompt_tokens, max_response_tokens

    def pack(self, examples: Iterable[Preferences]) -> tuple[list[Packed], Census]:
        """Token ids of every example that can be trained on, and what became of the others.

        An example whose prompt is too long is dropped whole: a chat prompt cut anywhere is not the prompt that is served.
        Raises TrainingError when nothing is left.
        """
        rows, census = [], Census()
        for example in examples:
            census.triplets += len(example.pairs)
            prompt = self._prompt(example.prompt)
            if len(prompt) > self._max_prompt:
                census.dropped["prompt_too_long"] += len(example.pairs)
                continue
            chosen, rejected = [self._response(t, census) for t in example.chosen], [self._response(t, census) for t in example.rejected]
            pairs = [(c, r) for c, r in example.pairs if chosen[c] != rejected[r]]
            census.dropped["equal_after_cut"] += len(example.pairs) - len(pairs)
            if pairs:
                rows.append(Packed(example.example_id, tuple(prompt), tuple(chosen), tuple(rejected), tuple(pairs)))
                census.examples, census.pairs = census.examples + 1, census.pairs + len(pairs)
                census.prompt_tokens += len(prompt)
                census.response_tokens += sum(map(len, (*chosen, *rejected)))
        if not rows:
            raise TrainingError(
                f"all {census.triplets} triplets were dropped ({census.dropped['prompt_too_long']} have a prompt of more than "
                f"train.max_prompt_tokens={self._max_prompt} tokens, {census.dropped['equal_after_cut']} are equal after "
                f"train.max_response_tokens={self._max_response}); raise these settings, or lower task.max_question_chars"
            )
        return rows, census

    def _prompt(self, text: str) -> list[int]:
        if self._kind == "decoder-only":
            return self._encoder.encode(GenerationRequest(messages=(Message(role="user", content=text),), n=1))
        return self._encoder.encode(GenerationRequest(prompt=text, n=1))

    def _response(self, text: str, census: Census) -> tuple[int, ...]:
        """Its token ids; the end of sequence only where the response was not cut, else the student would learn to stop there."""
        ids = tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if len(ids) < self._max_response:
            return (*ids, self._tokenizer.eos_token_id)
        census.cut_responses += 1
        return ids[: self._max_response]


class Collator:
    """Packs examples into one batch of tensors.

    With `with_rejected` false only the chosen responses are laid out (sequence-level distillation).

    A batch, with B rows, T predicted tokens and R responses; indices are int64:
      input_ids       (B, S) the prompt, and behind it the branches (decoder-only)
      attention_mask  (B, S) encoder-decoder: 1 on the prompt
      position_ids    (B, S) decoder-only
      decoder_input_ids (B, D) encoder-decoder
      segments        (B, S or D) PROMPT, PADDING or the number of the response in its row; what `visible` is made from
      rows, columns   (T,) where the hidden state stands that predicts each token
      labels          (T,) the predicted tokens
      response        (T,) the response, counted over the batch, of each of them
      chosen          (R,) bool
      pairs           (P, 2) indices of responses: chosen, rejected
      example_ids     list of B strings
    """

    def __init__(self, kind: Kind, *, pad_token_id: int, start_token_id: int | None = None, with_rejected: bool = True) -> None:
        self._kind, self._pad, self._start, self._with_rejected = kind, pad_token_id, start_token_id, with_rejected

    def __call__(self, examples: Sequence[Packed]) -> dict[str, Any]:
        lay_out = self._decoder_row if self._kind == "decoder-only" else self._encoder_decoder_row
        prompts: list[Sequence[int]] = []
        inputs: list[list[int]] = []
        positions: list[list[int]] = []
        segments: list[list[int]] = []
        rows: list[int] = []
        columns: list[int] = []
        labels: list[int] = []
        response: list[int] = []
        chosen: list[bool] = []
        pairs: list[tuple[int, int]] = []
        for row, example in enumerate(examples):
            responses = [*example.chosen, *(example.rejected if self._with_rejected else ())]
            laid = lay_out(example.prompt, responses)
            prompts.append(example.prompt)
            inputs.append(laid.input_ids)
            positions.append(laid.position_ids)
            segments.append(laid.segments)
            columns += laid.columns
            first = len(chosen)
            for number, ids in enumerate(responses):
                rows += [row] * len(ids)
                labels += ids
                response += [first + number] * len(ids)
            chosen += [number < len(example.chosen) for number in range(len(responses))]
            if self._with_rejected:
                pairs += [(first + c, first + len(example.chosen) + r) for c, r in example.pairs]
        batch: dict[str, Any] = {
            "segments": _padded(segments, PADDING),
            "rows": torch.tensor(rows),
            "columns": torch.tensor(columns),
            "labels": torch.tensor(labels),
            "response": torch.tensor(response),
            "chosen": torch.tensor(chosen),
            "pairs": torch.tensor(pairs, dtype=torch.int64).view(-1, 2),
            "example_ids": [e.example_id for e in examples],
        }
        if self._kind == "decoder-only":
            return batch | {"input_ids": _padded(inputs, self._pad), "position_ids": _padded(positions, 0)}
        return batch | {
            "input_ids": _padded(prompts, self._pad),
            "attention_mask": _padded([[1] * len(p) for p in prompts], 0),
            "decoder_input_ids": _padded(inputs, self._pad),
        }

    def _decoder_row(self, prompt: Sequence[int], responses: Sequence[Sequence[int]]) -> _Row:
        """The prompt, then each response without its last token, which predicts nothing."""
        row = _Row(list(prompt), list(range(len(prompt))), [PROMPT] * len(prompt), [])
        for number, ids in enumerate(responses, 1):
            # the first token of every branch is predicted at the prompt's end, which all branches share
            row.columns += [len(prompt) - 1, *range(len(row.input_ids), len(row.input_ids) + len(ids) - 1)]
            row.input_ids += ids[:-1]
            row.position_ids += range(len(prompt), len(prompt) + len(ids) - 1)
            row.segments += [number] * (len(ids) - 1)
        return row

    def _encoder_decoder_row(self, prompt: Sequence[int], responses: Sequence[Sequence[int]]) -> _Row:
        """Each response behind a start token of its own. No positions: these models know only distances between tokens."""
        row = _Row([], [], [], [])
        for number, ids in enumerate(responses, 1):
            assert self._start is not None
            row.columns += range(len(row.input_ids), len(row.input_ids) + len(ids))
            row.input_ids += [self._start, *ids[:-1]]
            row.segments += [number] * len(ids)
        return row


@dataclass
class _Row:
    input_ids: list[int]
    position_ids: list[int]
    segments: list[int]
    columns: list[int]


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """(rows, longest) int64, filled up with `value` on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.int64)


def cells(batch: dict[str, Any]) -> tuple[int, int]:
    """(real tokens, all cells) of a batch: what is computed on beyond the first number is padding."""
    real, total = int((batch["segments"] != PADDING).sum()), batch["segments"].numel()
    if "attention_mask" in batch:
        real, total = real + int(batch["attention_mask"].sum()), total + batch["attention_mask"].numel()
    return real, total


def visible(segments: Tensor) -> Tensor:
    """Which token sees which: (B, 1, S, S) bool, [b, 0, query, key], from segments (B, S).

    A token sees what stands before it in its own segment and in the prompt. Padding sees something too (a softmax over
    nothing is NaN), and is seen by no one else.
    """
    query, key = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
    return (causal & ((key == PROMPT) | (key == query)))[:, None]
