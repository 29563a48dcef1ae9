"""From triplets to token ids: all that is said to one prompt stands in one example, each response once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from shared.contracts import GenerationRequest, Message, Response, Triplet
from shared.engines.encoding import PromptEncoder
from shared.errors import TrainingError

Kind = Literal["encoder-decoder", "decoder-only"]


@dataclass(frozen=True)
class Preferences:
    """All triplets of one example as texts, and the teacher's samples if they are learned from as well."""

    example_id: str
    prompt: str
    responses: tuple[str, ...]
    """Each text once."""
    ended: tuple[bool, ...]
    """Whether whoever said it ended it: a rejected answer may have been cut off at the token limit."""
    weights: tuple[float, ...]
    """Of each response in the NLL: those of the chosen add up to 1, the others have 0."""
    counts: tuple[int, ...]
    """How many of the teacher's samples said it."""
    pairs: tuple[tuple[int, int], ...]
    """Indices of a chosen and a rejected response."""


@dataclass(frozen=True)
class Packed:
    """One example as token ids; `weights`, `counts`, `pairs` as in `Preferences`."""

    example_id: str
    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    weights: tuple[float, ...]
    counts: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]

    @property
    def length(self) -> int:
        """Tokens of its row, by which similar examples are put together."""
        return len(self.prompt) + sum(map(len, self.responses))


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


def samples_by_example(responses: Iterable[Response]) -> dict[str, Counter[str]]:
    """What the teacher said to each example and how often: whole answers only, of several rows for one sample the last."""
    last = {(row.example_id, row.sample): row for row in responses}
    said: dict[str, Counter[str]] = {}
    for (example_id, _), row in last.items():
        if row.status == "ok" and row.finish_reason == "stop" and row.text.strip():
            said.setdefault(example_id, Counter())[row.text.strip()] += 1
    return said


def group(triplets: Iterable[Triplet], said: Mapping[str, Counter[str]] | None = None) -> list[Preferences]:
    """Triplets by example, in order of first appearance, with what the teacher `said` to each.

    Raises TrainingError when there is none, when a chosen text equals its rejected one, or when an example has two prompts.
    """
    examples: dict[str, list[Triplet]] = {}
    for triplet in triplets:
        examples.setdefault(triplet.example_id, []).append(triplet)
    if not examples:
        raise TrainingError("triplets.jsonl is empty: nothing to train on; see the census of its stage for what was dropped and why")
    equal = sorted({t.example_id for rows in examples.values() for t in rows if t.chosen == t.rejected})
    if equal:
        raise TrainingError(f"chosen equals rejected, which teaches nothing, in {_some(equal)}; build the triplets again")
    torn = [name for name, rows in examples.items() if len({t.prompt for t in rows}) > 1]
    if torn:
        raise TrainingError(f"triplets of one example have different prompts: {_some(torn)}; build the triplets again")
    return [_preferences(name, rows, (said or {}).get(name, Counter())) for name, rows in examples.items()]


def _preferences(name: str, rows: Sequence[Triplet], said: Counter[str]) -> Preferences:
    chosen = {t.chosen: t.chosen_weight for t in rows}
    responses = list(dict.fromkeys([*chosen, *(t.rejected for t in rows), *said]))
    place = {text: index for index, text in enumerate(responses)}
    total = sum(chosen.values())
    unended = {t.rejected for t in rows if t.rejected_cut_off}.difference(chosen, said)
    return Preferences(
        name,
        rows[0].prompt,
        tuple(responses),
        tuple(text not in unended for text in responses),
        tuple(chosen.get(text, 0.0) / total for text in responses),
        tuple(said[text] for text in responses),
        tuple(dict.fromkeys((place[t.chosen], place[t.rejected]) for t in rows)),
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class Packer:
    """Tokenises preferences as the student reads and writes them when it is served."""

    def __init__(self, tokenizer: Any, kind: Kind, *, max_prompt_tokens: int, max_response_tokens: int) -> None:
        """tokenizer: a fast tokenizer of transformers. Raises TrainingError if it has no end-of-sequence token."""
        if tokenizer.eos_token_id is None:
            raise TrainingError("student.model: its tokenizer has no end-of-sequence token, so no answer could ever end; set eos_token")
        self.tokenizer, self._kind = tokenizer, kind
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
            prompt = self.prompt(example.prompt)
            if len(prompt) > self._max_prompt:
                census.dropped["prompt_too_long"] += len(example.pairs)
                continue
            row = self._row(example, prompt, self._responses(example, census))
            census.dropped["equal_after_cut"] += len(example.pairs) - len(row.pairs)
            if row.pairs:
                rows.append(row)
                census.examples, census.pairs = census.examples + 1, census.pairs + len(row.pairs)
                census.prompt_tokens += len(prompt)
                census.response_tokens += sum(map(len, row.responses))
        if not rows:
            raise TrainingError(
                f"all {census.triplets} triplets were dropped ({census.dropped['prompt_too_long']} have a prompt of more than "
                f"train.max_prompt_tokens={self._max_prompt} tokens, {census.dropped['equal_after_cut']} are equal after "
                f"train.max_response_tokens={self._max_response}); raise these settings, or lower task.max_question_chars"
            )
        return rows, census

    def _row(self, example: Preferences, prompt: Sequence[int], responses: Sequence[tuple[int, ...]]) -> Packed:
        """Responses that the cut has made equal become one, with the weights and counts of both; pairs this makes void are left out."""
        place = {ids: index for index, ids in enumerate(dict.fromkeys(responses))}
        weights, counts = [0.0] * len(place), [0] * len(place)
        for ids, weight, count in zip(responses, example.weights, example.counts, strict=True):
            weights[place[ids]] += weight
            counts[place[ids]] += count
        pairs = dict.fromkeys((place[responses[c]], place[responses[r]]) for c, r in example.pairs)
        return Packed(
            example.example_id,
            tuple(prompt),
            tuple(place),
            tuple(weights),
            tuple(counts),
            tuple((c, r) for c, r in pairs if not weights[r]),
        )

    def prompt(self, text: str) -> list[int]:
        """Token ids of a prompt."""
        if self._kind == "decoder-only":
            return self._encoder.encode(GenerationRequest(messages=(Message(role="user", content=text),), n=1))
        return self._encoder.encode(GenerationRequest(prompt=text, n=1))

    def _responses(self, example: Preferences, census: Census) -> list[tuple[int, ...]]:
        """Their token ids; the end of sequence only where one was not cut, here or when it was said.

        Behind a cut chosen response it would teach the student to stop there; behind a cut rejected one it would be scored as what
        nobody has said, and found so unlikely that little is left to be lowered.
        """
        found = []
        for text, ended in zip(example.responses, example.ended, strict=True):
            ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            if len(ids) >= self._max_response:
                census.cut_responses += 1
                ids = ids[: self._max_response]
            elif ended or not ids:  # text of which no token is left scores as an answer that ends at once
                ids = (*ids, self.tokenizer.eos_token_id)
            found.append(ids)
        return found
