"""From token ids to tensors: a prompt once, and all its responses beside each other in the same row.

Encoder-decoder: the encoder reads the prompt, one decoder row holds every response (a block-diagonal causal mask keeps them
apart). Decoder-only: one row holds the prompt and then each response as a branch that sees the prompt and itself, with
position ids that go on from the prompt's. Both give what unpacked rows would give, for a fraction of the work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from student_trainer.training.losses import Counts
from student_trainer.training.packing import Kind, Packed

PROMPT, PADDING = 0, -1
"""Segments of a row; the responses are segments 1, 2, ..."""
WINDOW, GROUP, BLUR = 100, 3, 0.03
"""Of `LengthGrouped`: batches of a window and of a group in it, and by what part of itself a length is blurred. T5's padding on MeQSum is
1.08 with these (tests/benchmarks/train.py), and was 1.19 when one sum of both lengths was sorted by."""


class Collator:
    """Packs examples into one batch of tensors.

    Responses that no term of the loss needs are left out: rejected ones without an odds ratio, further samples of the teacher without a
    KL to it.

    A batch, with B rows, T predicted tokens and R responses; indices are int64, weights float32:
      input_ids       (B, S) the prompt, and behind it the branches (decoder-only)
      attention_mask  (B, S) encoder-decoder: 1 on the prompt
      position_ids    (B, S) decoder-only
      decoder_input_ids (B, D) encoder-decoder
      segments        (B, S or D) PROMPT, PADDING or the number of the response in its row; what `visible` is made from
      rows, columns   (T,) where the hidden state stands that predicts each token
      labels          (T,) the predicted tokens
      response        (T,) the response, counted over the batch, of each of them
      weights         (R,) of each response in the NLL, 0 if it is not chosen
      shares          (R,) share of the teacher's samples that said it
      chosen          (C,) which of the T tokens are of chosen responses
      pairs           (P, 2) indices of responses: chosen, rejected
      visits, mass, edges, edge_counts  the prefix tree of the teacher's samples, as `losses.prefix_tree_kl` reads it
      reference       the batch of the chosen responses alone, where a frozen student is to score them; without this entry
      example_ids     list of B strings
      denominators    losses.Counts, what the batch adds to them
      cells           (real tokens, all cells)
    """

    def __init__(
        self,
        kind: Kind,
        *,
        pad_token_id: int,
        start_token_id: int | None = None,
        with_rejected: bool = True,
        with_samples: bool = False,
        with_reference: bool = False,
    ) -> None:
        self.kind, self.pad_token_id, self._start = kind, pad_token_id, start_token_id
        self.with_rejected, self._with_samples = with_rejected, with_samples
        self._of_chosen: Collator | None = None
        if with_reference:
            self._of_chosen = Collator(kind, pad_token_id=pad_token_id, start_token_id=start_token_id, with_rejected=False)

    def __call__(self, examples: Sequence[Packed]) -> dict[str, Any]:
        lay_out = self._decoder_row if self.kind == "decoder-only" else self._encoder_decoder_row
        laid: list[_Row] = []
        flat = _Flat()
        for row, example in enumerate(examples):
            used = self.used(example)
            responses = [example.responses[i] for i in used]
            laid.append(lay_out(example.prompt, responses))
            first, place = len(flat.weights), {index: number for number, index in enumerate(used)}
            for number, ids in enumerate(responses):
                flat.rows += [row] * len(ids)
                flat.labels += ids
                flat.response += [first + number] * len(ids)
            flat.columns += laid[-1].columns
            flat.weights += [example.weights[i] for i in used]
            counts = [example.counts[i] if self._with_samples else 0 for i in used]
            flat.shares += [count / max(sum(counts), 1) for count in counts]
            if self._with_samples:
                flat.add_prefix_tree(responses, counts)
            if self.with_rejected:
                flat.pairs += [(first + place[c], first + place[r]) for c, r in example.pairs]
        batch: dict[str, Any] = flat.tensors() | {
            "segments": _padded([row.segments for row in laid], PADDING),
            "example_ids": [e.example_id for e in examples],
        }
        if self.kind == "decoder-only":
            batch |= {
                "input_ids": _padded([row.input_ids for row in laid], self.pad_token_id),
                "position_ids": _padded([row.position_ids for row in laid], 0),
            }
        else:
            batch |= {
                "input_ids": _padded([e.prompt for e in examples], self.pad_token_id),
                "attention_mask": _padded([[1] * len(e.prompt) for e in examples], 0),
                "decoder_input_ids": _padded([row.input_ids for row in laid], self.pad_token_id),
            }
        if self._of_chosen is not None:
            batch["reference"] = self._of_chosen(examples)
        # counted here, before a GPU has it, which would have to be waited for
        return batch | {"denominators": denominators(batch), "cells": cells(batch)}

    def size(self, example: Packed) -> tuple[int, int]:
        """Tokens of its two rows, of the encoder and of the decoder; of a decoder-only model's one, and 0.

        All responses count, also those that the loss leaves out: the same triplets come in the same batches, with an odds ratio or without.
        """
        responses = sum(map(len, example.responses))
        return (len(example.prompt), responses) if self.kind == "encoder-decoder" else (len(example.prompt) + responses, 0)

    def used(self, example: Packed) -> list[int]:
        """The responses that take part in the loss; of a blank example its only one."""
        needed = {r for _, r in example.pairs} if self.with_rejected else set()
        needed |= {i for i, weight in enumerate(example.weights) if weight}
        if self._with_samples:
            needed |= {i for i, count in enumerate(example.counts) if count}
        return sorted(needed) or [0]

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


@dataclass
class _Flat:
    """What a batch holds by token, by response and by pair."""

    rows: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    response: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    visits: list[int] = field(default_factory=list)
    mass: list[float] = field(default_factory=list)
    edges: list[tuple[int, int]] = field(default_factory=list)
    edge_counts: list[int] = field(default_factory=list)

    def add_prefix_tree(self, responses: Sequence[tuple[int, ...]], counts: Sequence[int]) -> None:
        """The nodes that the samples of one prompt pass; responses that are no samples get no mass."""
        following: dict[tuple[int, ...], Counter[int]] = {}
        for ids, count in zip(responses, counts, strict=True):
            for length in range(len(ids) if count else 0):
                following.setdefault(ids[:length], Counter())[ids[length]] += count
        for ids, count in zip(responses, counts, strict=True):
            for length in range(len(ids)):
                node = following[ids[:length]] if count else Counter()
                for token, times in node.items():
                    self.edges.append((len(self.visits), token))
                    self.edge_counts.append(times)
                self.visits.append(node.total())
                self.mass.append(count / max(sum(counts), 1))

    def tensors(self) -> dict[str, Tensor]:
        integers = ("rows", "columns", "labels", "response", "pairs", "visits", "edges", "edge_counts")
        found = {name: torch.tensor(getattr(self, name), dtype=torch.int64) for name in integers}
        found |= {name: torch.tensor(getattr(self, name), dtype=torch.float32) for name in ("weights", "shares", "mass")}
        found["chosen"] = found["weights"][found["response"]].nonzero().squeeze(1)
        return found | {name: found[name].view(-1, 2) for name in ("pairs", "edges")}


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """(rows, longest) int64, filled up with `value` on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.int64)


def denominators(batch: dict[str, Any]) -> Counts:
    """The denominators that a batch adds."""
    weights = batch["weights"]
    return Counts(
        chosen_tokens=float(weights[batch["response"]].sum()),
        pairs=float(weights[batch["pairs"][:, 0]].sum()),
        prompts=float(batch["shares"].sum()),
    )


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


def blank(example: Packed) -> Packed:
    """An example that adds nothing to any sum: what fills up the last batches, so that every process has as many as the others."""
    shortest = min(example.responses, key=len)
    return Packed("", example.prompt, (shortest,), (0.0,), (0,), ())


class LengthGrouped(Sampler[int]):
    """Batches of examples of like length, which hold little padding, in random order.

    An encoder-decoder lays out two lengths: a window of many batches is sorted by the first, then in groups of a few by the second. The
    batch with the longest example comes first: what does not fit into memory shows at once. The order depends on the seed and the epoch
    alone. (Trainer's own "group_by_length" draws it from the global random state, which a resumed run no longer has: it would see other
    batches; and it goes from long to short in each of its windows.)
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], batch_size: int, seed: int, *, multiple_of: int = 1) -> None:
        """sizes: as `Collator.size` gives them; batch_size: examples of an optimizer step; multiple_of: the index behind the last example
        fills up to a multiple of this.
        """
        self._sizes, self._batch_size, self._seed, self._epoch = sizes, batch_size, seed, 0
        self._blanks = -len(sizes) % multiple_of

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._sizes) + self._blanks

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        shuffled = torch.randperm(len(self._sizes), generator=generator).tolist()
        # not quite by length: where one window holds all, every epoch would have the same batches
        blur = (1 + BLUR * (2 * torch.rand(len(shuffled), generator=generator) - 1)).tolist()
        order: list[int] = []
        for window in _chunks(shuffled, self._batch_size * WINDOW):
            by_first = sorted(window, key=lambda i: self._sizes[i][0] * blur[i], reverse=True)
            for group in _chunks(by_first, self._batch_size * GROUP):
                order += sorted(group, key=lambda i: self._sizes[i][1], reverse=True)
        batches = _chunks(order, self._batch_size)
        rest = batches.pop() if len(order) % self._batch_size else []
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        longest = max(order, key=lambda i: sum(self._sizes[i]))
        batches.sort(key=lambda batch: longest not in batch)  # stable
        yield from [i for batch in (*batches, rest) for i in batch]
        yield from [len(order)] * self._blanks


def _chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[first : first + size] for first in range(0, len(items), size)]
