"""The census of a harvest: every wanted row is counted once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shared.collect import Collected
from shared.contracts import CUT_OFF, Response
from shared.harvest.ask import Ask
from shared.harvest.ledger import OK, Held, kind_of

FEW_TEXTS = 8
"""Fewer answers may well be one and the same text."""


@dataclass(slots=True)
class Prompt:
    """A prompt under way."""

    ask: Ask
    keys: list[str]
    """Of its samples, in order."""
    open: int = 0
    """Samples without a row so far."""
    answers: int = 0
    texts: set[int] = field(default_factory=set)
    """Hashes of its answers."""
    before: dict[int, Held] | None = None
    """Answers it has had, by sample, that are asked for again all the same: they stay if nothing better comes."""


class Census:
    """Counts by prompt and row. `answers`, `failed` and what is `missing` sum up to what is wanted."""

    def __init__(self) -> None:
        self.prompts = self.wanted = self.answers = self.cut_off = 0
        self.failed: Counter[str] = Counter()
        self.said: dict[str, str] = {}
        """What was said last, by the class of the failure."""
        self.shared = self.collected = 0
        self._of_several = self._distinct = self._several = self._varied = 0
        self._texts: set[int] = set()

    def prompt(self, ask: Ask, keys: list[str]) -> Prompt:
        self.prompts += 1
        self.wanted += len(keys)
        return Prompt(ask, keys)

    def held(self, prompt: Prompt, row: Held, read: Callable[[Held], Response]) -> None:
        """A row that was there before."""
        self._count(prompt, row.kind, row.text)
        if row.kind in self.failed and row.kind not in self.said:
            self.said[row.kind] = read(row).reason or row.kind

    def made(self, prompt: Prompt, row: Response) -> None:
        """A row that was added."""
        self.collected += 1
        kind = kind_of(row)
        self._count(prompt, kind, hash(row.text))
        if row.status == "failed":
            self.said[kind] = row.reason or kind

    def close(self, prompt: Prompt) -> None:
        """Nothing of a prompt is missing any more."""
        if prompt.answers > 1:
            self._of_several += prompt.answers
            self._distinct += len(prompt.texts)
            self._several += 1
            self._varied += len(prompt.texts) > 1

    def collected_of(self, *, total: int | None, requests: int, refused: int, seconds: float) -> Collected:
        """`total`: rows wanted in the end, where more are than have been drawn."""
        return Collected(
            prompts=self.prompts,
            answers=self.answers,
            failed=dict(self.failed),
            missing=max(self.wanted, total or 0) - self.answers - self.failed.total(),
            cut_off=self.cut_off,
            distinct_fraction=self._distinct / self._of_several if self._of_several else 1.0,
            requests=requests,
            refused=refused,
            shared=self.shared,
            several=self._several,
            of_several=self._of_several,
            varied=self._varied,
            one_text=len(self._texts) == 1 and self.answers >= FEW_TEXTS and self.prompts > 1,
            said=self.said,
            seconds=seconds,
            collected=self.collected,
        )

    def _count(self, prompt: Prompt, kind: str, text: int) -> None:
        if kind in (OK, CUT_OFF):
            self.answers += 1
            self.cut_off += kind == CUT_OFF
            prompt.answers += 1
            prompt.texts.add(text)
            if len(self._texts) < 2:
                self._texts.add(text)
        else:
            self.failed[kind] += 1


def together(parts: Sequence[Collected], *, wanted: int, seconds: float) -> Collected:
    """The census of all partitions of a harvest. `wanted`: rows in the end; `seconds`: wall time of all together.

    An answer that prompts of two partitions could have shared has been asked for twice.
    """
    failed: Counter[str] = Counter()
    said: dict[str, str] = {}
    for part in parts:
        failed.update(part.failed)
        said |= part.said
    of_several = sum(part.of_several for part in parts)
    answers = sum(part.answers for part in parts)
    distinct = sum(part.distinct_fraction * part.of_several for part in parts)
    return Collected(
        prompts=sum(part.prompts for part in parts),
        answers=answers,
        failed=dict(failed),
        missing=wanted - answers - failed.total(),
        cut_off=sum(part.cut_off for part in parts),
        distinct_fraction=distinct / of_several if of_several else 1.0,
        requests=sum(part.requests for part in parts),
        refused=sum(part.refused for part in parts),
        shared=sum(part.shared for part in parts),
        several=sum(part.several for part in parts),
        of_several=of_several,
        varied=sum(part.varied for part in parts),
        one_text=bool(parts) and all(part.one_text for part in parts),
        said=said,
        seconds=seconds,
        collected=sum(part.collected for part in parts),
    )
