"""From the ledgers to the answers that may be ranked, with a reason for each row that may not."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shared.contracts import Response, Source
from shared.datasets.rows import normalise


@dataclass(frozen=True)
class Candidate:
    """One usable answer to one prompt; `text` has no blanks at its ends."""

    text: str
    source: Source
    sample: int
    cut_off: bool = False
    """It ended at the token limit; only a student's may."""


def gather(answers: Mapping[Source, Sequence[Response]]) -> tuple[dict[str, list[Candidate]], Counter[str]]:
    """Usable answers by example id, and the rows dropped by reason; every row is in one of the two.

    answers: the ledger of each source, in the order in which equal texts are kept: the teacher's first.
    Answers stand source by source, then by sample index, whatever the order of the ledgers: a harvest that was cut short and went on
    gives the same triplets. Of several rows for one sample the last counts. A teacher's answer that ended at the token limit is
    dropped: nothing that stops in the middle may be chosen. A student's is kept: an undistilled student rambles, the limit is often
    the only end its answers have, and rambling is a true reason to be rejected.
    """
    kept: dict[str, list[Candidate]] = defaultdict(list)
    dropped: Counter[str] = Counter()
    for source, rows in answers.items():
        last = {(row.example_id, row.sample): row for row in rows}
        dropped["asked again"] += len(rows) - len(last)
        for (example_id, sample), row in sorted(last.items()):
            cut_off = row.finish_reason == "length"
            if row.status == "failed":
                dropped[f"failed ({source})"] += 1
            elif not normalise(row.text):
                dropped[f"empty ({source})"] += 1
            elif cut_off and source == "teacher":
                dropped["cut off (teacher)"] += 1
            else:
                kept[example_id].append(Candidate(row.text.strip(), source, sample, cut_off))
    return dict(kept), +dropped
