"""Whether there is anything to rank answers by: ROUGE-L reads a-z and 0-9 alone, and of other scripts nothing."""

from __future__ import annotations

from collections.abc import Sequence

from shared.contracts import Example
from shared.errors import DataError


def readable(text: str) -> bool:
    """Whether ROUGE-L finds a word in a text, which then scores 1 with itself, else 0."""
    return any("a" <= c <= "z" or "0" <= c <= "9" for c in text.lower())


def refuse_unrankable(train: Sequence[Example]) -> int:
    """How many train rows have a reference that ROUGE-L cannot read. Raises DataError if no row can be ranked by its reference."""
    references = [e.summary for e in train if e.summary is not None]
    if not references:
        raise DataError("triplets.ranking=reference: no train row has a reference; give triplets.ranking=consensus (or first)")
    unreadable = sum(not readable(reference) for reference in references)
    if unreadable == len(references):
        raise DataError(
            "triplets.ranking=reference: ROUGE-L reads a-z and 0-9 alone, which no reference of a train row has, so that every answer "
            "would score 0; give triplets.ranking=first"
        )
    return unreadable


def refuse_unreadable(answers: Sequence[str]) -> None:
    """Raises DataError if there are answers of the teacher and ROUGE-L can compare none of them with another."""
    if answers and not any(map(readable, answers)):
        raise DataError(
            "triplets.ranking=consensus: ROUGE-L reads a-z and 0-9 alone, which no answer of the teacher has, so that every answer would "
            "score 0; give triplets.ranking=first"
        )
