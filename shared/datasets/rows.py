"""What all data sets share: cleaning, duplicates, splits that share no text, and a count of every row."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from shared.contracts import Example, Split
from shared.errors import DataError
from shared.settings import DatasetSettings


@dataclass(frozen=True)
class Source:
    """Where rows came from."""

    location: str
    """A path, a URL, `hub:NAME` or `embedded`."""
    sha256: str
    """Of the file's bytes; of the rows as read, for a Hub data set."""


@dataclass(frozen=True)
class Row:
    """One row as read, before anything is dropped. `place` finds it in its source, for messages; `id` None: none given."""

    place: str
    question: str
    summary: str | None
    id: str | None = None


@dataclass(frozen=True)
class Dataset:
    """Rows in fixed splits.

    `census` counts every row read: read == sum of `dropped` + sum of `kept`. It also says how the splits were made.
    """

    name: str
    splits: Mapping[Split, tuple[Example, ...]]
    census: Mapping[str, Any]
    source: Source


def normalise(text: str) -> str:
    """`text` as it is compared: NFKC, case folded, without signs that nobody sees (a soft hyphen, a zero-width blank), every run of other
    than letters, digits and marks one blank.

    Two texts are the same for the removal of duplicates and for decontamination exactly when this is equal.
    """
    # first, for NFKC joins what they keep apart
    text = text.translate({ord(c): None for c in set(text) if unicodedata.category(c) == "Cf"})
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    # Marks (M) count as parts of words: without its vowel signs a Hindi word would equal another one.
    return " ".join(text.translate({ord(c): " " for c in set(text) if unicodedata.category(c)[0] not in "LNM"}).split())


def clean(text: str, *, one_line: bool = False) -> str:
    """`text` without blanks at its ends and with every run of blanks, non-breaking ones too, as one; lines stay unless `one_line`."""
    if one_line:
        return " ".join(text.split())
    lines = (" ".join(line.split()) for line in text.strip().replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    return "\n".join(lines)


def make_splits(name: str, rows: Sequence[Row], settings: DatasetSettings, source: Source, notes: Mapping[str, Any]) -> Dataset:
    """Clean rows, drop empty and repeated questions, split by seed, cut to the limits; every row is counted.

    Rows are ordered by the SHA-256 of the seed and the normalised question: a seeded shuffle that depends neither on the
    order of the file nor on Python's version, so that the same rows from a file and from the Hub split alike. Rows that share
    a normalised question or summary, directly or through others, form a group; a group goes whole into the first of test,
    validation and train that has room for it, so no text stands in two splits. Where there are references at all,
    rows without one go to train: they can teach, but nothing can be measured on them.

    Raises DataError if nothing is left or if the splits cannot be filled.
    """
    dropped: Counter[str] = Counter({"empty question": 0, "duplicate question": 0})
    unique: dict[str, tuple[str, str, str | None]] = {}
    for row in rows:
        question, key = clean(row.question), normalise(row.question)
        if not key:
            dropped["empty question"] += 1
            continue
        summary = clean(row.summary or "", one_line=True) or None
        if key in unique:
            dropped["duplicate question"] += 1
            if unique[key][2] is not None or summary is None:
                continue  # but one that brings the reference takes the place of one without
        unique[key] = (row.id or f"{name}-{_digest(key)[:12]}", question, summary)
    if not unique:
        raise DataError(f"{source.location}: no row has a question ({len(rows)} rows read); give a file with texts to learn from")
    ordered = sorted(unique, key=lambda key: _digest(f"{settings.seed}\n{key}"))
    groups = _groups(ordered, {key: normalise(unique[key][2] or "") for key in ordered})
    splits = _fill(groups, {key for key in ordered if unique[key][2] is not None}, settings, source)
    examples: dict[Split, tuple[Example, ...]] = {
        split: tuple(_example(*unique[k], source) for k in keys) for split, keys in splits.items()
    }
    made = {
        "split": "seeded: by SHA-256 of seed and normalised question; rows that share a text stay together",
        "seed": settings.seed,
        "rows_sharing_text": sum(len(g) for g in groups if len(g) > 1),
    }
    return limited(name, examples, settings, source, read=len(rows), dropped=dropped, notes={**made, **notes})


def limited(
    name: str,
    splits: Mapping[Split, tuple[Example, ...]],
    settings: DatasetSettings,
    source: Source,
    *,
    read: int,
    dropped: Mapping[str, int],
    notes: Mapping[str, Any],
) -> Dataset:
    """The data set after `reserved_rows`, `limit` and `test_limit`, in this order. Raises DataError if no train row is left."""
    train, test = splits["train"], splits["test"]
    free = train[settings.reserved_rows :]
    if not free:
        raise DataError(
            f"{source.location}: dataset.reserved_rows={settings.reserved_rows} leaves none of the {len(train)} train rows; lower it"
        )
    kept: dict[Split, tuple[Example, ...]] = {
        "train": free[: settings.limit],
        "validation": splits["validation"],
        "test": test[: settings.test_limit],
    }
    census = {
        "read": read,
        "dropped": {
            **dropped,
            "reserved": len(train) - len(free),
            "over limit": len(free) - len(kept["train"]),
            "over test_limit": len(test) - len(kept["test"]),
        },
        "kept": {split: len(examples) for split, examples in kept.items()},
        "without_reference": sum(e.summary is None for examples in kept.values() for e in examples),
        **notes,
    }
    return Dataset(name, kept, census, source)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _example(identity: str, question: str, summary: str | None, source: Source) -> Example:
    try:
        return Example(id=identity, question=question, summary=summary)
    except ValidationError as exc:
        raise DataError(f"{source.location}, row {identity}: {exc.errors()[0]['msg']}") from exc


def _groups(keys: Sequence[str], summaries: Mapping[str, str]) -> list[list[str]]:
    """Keys (normalised questions) joined by equal normalised summaries, or by a summary that is another row's question.

    Groups come in the order of their first key.
    """
    by_text: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        for text in {key, summaries[key]} - {""}:  # a set: a summary may be its own question
            by_text[text].append(key)
    groups, seen = [], set()
    for key in keys:
        if key in seen:
            continue
        seen.add(key)
        group, frontier = [], [key]
        while frontier:
            member = frontier.pop(0)
            group.append(member)
            for text in (member, summaries[member]):
                # popped: a text of many rows is walked once, not once a row
                fresh = [other for other in by_text.pop(text, ()) if other not in seen]
                seen.update(fresh)
                frontier += fresh
        groups.append(group)
    return groups


def _fill(groups: Sequence[Sequence[str]], referenced: set[str], settings: DatasetSettings, source: Source) -> dict[Split, list[str]]:
    """Groups shared out: each to the first of test, validation, train that has room. Raises DataError if a split stays short."""
    total = sum(map(len, groups))
    wanted: dict[Split, int] = {"test": settings.test_rows, "validation": settings.validation_rows}
    advice = "lower dataset.test_rows or dataset.validation_rows, or give more rows"
    if total < sum(wanted.values()) + 1:
        raise DataError(
            f"{source.location}: {total} usable rows, but dataset.test_rows={settings.test_rows} and dataset.validation_rows="
            f"{settings.validation_rows} need at least {sum(wanted.values()) + 1}, one for train; {advice}"
        )
    splits: dict[Split, list[str]] = {"train": [], "validation": [], "test": []}
    for group in groups:
        measurable = not referenced or referenced.issuperset(group)
        fits = [split for split, rows in wanted.items() if measurable and len(splits[split]) + len(group) <= rows]
        splits[fits[0] if fits else "train"] += group
    short = [f"{split} has {len(splits[split])} of {rows} rows" for split, rows in wanted.items() if len(splits[split]) < rows]
    if not splits["train"]:
        short.append("train has no row")
    if short:
        raise DataError(
            f"{source.location}: {', '.join(short)}: {total} usable rows, {len(referenced)} with a reference, largest group of rows that "
            f"share a question or a summary {max(map(len, groups))}, and such rows must not be torn apart; {advice}"
        )
    return splits
