"""Whether test rows share text with rows that were learned from, chosen by or shown: what was seen before measures memory.

Two kinds are told. Equal: the question or the summary of both is the same after `normalise`. Near: at least half of the test question's
word 8-grams stand in one question of another split, or that question stands as good as whole in the test question. On MeQSum a few real
copies have shares above 0.85 and all other rows below 0.15, most of it phrases of politeness; single shared n-grams, as in the 13-gram
rule of Brown et al. (2020), would tell these apart no better. Summaries are not compared by n-grams: many questions are rightly summarised
by one phrase with another word in it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal

from shared.contracts import Contract, Example, Split
from shared.datasets.rows import normalise
from shared.errors import LeakageError

ORDER = 8
NEAR = 0.5
WHOLE, LEAST = 0.9, 10
"""Of another question's n-grams, and how many: it stands as good as whole in a longer test question."""
SHOWN = 10


class Overlap(Contract):
    """A test row that shares text with a row of another split."""

    test_id: str
    other_id: str
    split: Split
    kind: Literal["question", "summary", "near-question"]
    share: float
    """Of the test question's 8-grams; 1.0 where equal."""


def overlaps(rows: Mapping[Split, Sequence[Example]]) -> list[Overlap]:
    """Every test row that overlaps with one of another split: its closest row, in the order of the test split."""
    test, found = rows["test"], dict[str, Overlap]()
    questions = {normalise(e.question): e.id for e in test}
    summaries = defaultdict(list)
    for example in test:
        if example.summary is not None and (said := normalise(example.summary)):  # signs alone say nothing that another could repeat
            summaries[said].append(example.id)
    grams = {e.id: _grams(normalise(e.question)) for e in test}
    holders = defaultdict(list)
    for test_id, of_row in grams.items():
        for gram in of_row:
            holders[gram].append(test_id)

    def note(overlap: Overlap) -> None:
        known = found.get(overlap.test_id)
        # the nearer one, and of two with all its n-grams the copy
        if known is None or (overlap.share, overlap.kind != "near-question") > (known.share, known.kind != "near-question"):
            found[overlap.test_id] = overlap

    for split in rows:
        for other in rows[split] if split != "test" else ():
            question = normalise(other.question)
            if (same := questions.get(question)) is not None:
                note(Overlap(test_id=same, other_id=other.id, split=split, kind="question", share=1.0))
            for i in summaries.get(normalise(other.summary), ()) if other.summary is not None else ():
                note(Overlap(test_id=i, other_id=other.id, split=split, kind="summary", share=1.0))
            shared: dict[str, int] = defaultdict(int)
            mine = _grams(question)
            for gram in mine:
                for i in holders.get(gram, ()):
                    shared[i] += 1
            for i, count in shared.items():
                share = count / len(grams[i])
                if share >= NEAR or (count >= LEAST and count / len(mine) >= WHOLE):
                    note(Overlap(test_id=i, other_id=other.id, split=split, kind="near-question", share=round(share, 4)))
    return [found[e.id] for e in test if e.id in found]


def refuse_overlaps(found: Sequence[Overlap], allowed: Sequence[str]) -> None:
    """Raises LeakageError that names the test rows which `allowed` (evaluate.allow_overlap: ids, and kinds of overlap) does not."""
    refused = [overlap for overlap in found if not {overlap.test_id, overlap.kind} & set(allowed)]
    if refused:
        told = "; ".join(f"{o.test_id} is {_WORDS[o.kind]} of {o.other_id} ({o.split})" for o in refused[:SHOWN])
        more = f" and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
        ids = ", ".join(json.dumps(o.test_id, ensure_ascii=False) for o in refused[:SHOWN])
        ids += ", ..." if len(refused) > SHOWN else ""
        raise LeakageError(
            f"{len(refused)} test rows share text with rows that are learned from: {told}{more}; take one of each two out of the data, or "
            f"allow them by name: --set 'evaluate.allow_overlap=[{ids}]', or, where a text stands in every row, all of a kind: "
            f"[{', '.join(sorted({o.kind for o in refused}))}]"
        )


_WORDS = {"question": "a copy", "summary": "summarised in the words", "near-question": "nearly a copy"}


def too_short(examples: Sequence[Example]) -> int:
    """Questions without a single n-gram, near copies of which are not found: short ones, and those of scripts without blanks."""
    return sum(len(normalise(e.question).split()) < ORDER for e in examples)


def _grams(text: str) -> set[tuple[str, ...]]:
    """The word n-grams of a normalised text; none of one shorter than ORDER."""
    words = text.split()
    return {tuple(words[i : i + ORDER]) for i in range(len(words) - ORDER + 1)}
