"""Examples as they may leave for the teacher."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from shared.contracts import Example
from shared.settings import RedactKind


class Redaction:
    """Takes out of examples what `kinds` names, and counts it; with None nothing is done and no library needed.

    Raises SettingsError for an unknown region, and where a library is missing.
    """

    def __init__(self, kinds: Sequence[RedactKind] | None, *, region: str = "US") -> None:
        self.counts: Counter[str] = Counter()
        """Hits so far, by kind."""
        self._redactor = None
        if kinds is not None:
            from shared.redact import Redactor

            self._redactor = Redactor(kinds, region=region)

    def of(self, example: Example) -> Example:
        """The example with placeholders in its texts."""
        if self._redactor is None:
            return example
        question, found = self._redactor(example.question)
        summary = example.summary
        if summary is not None:
            summary, more = self._redactor(summary)
            found += more
        self.counts += found
        return example.model_copy(update={"question": question, "summary": summary})
