"""The embedded sample: 330 consumer health questions with one reference each, written for this project (CC0)."""

from __future__ import annotations

from importlib import resources

from shared.artifacts import sha256_bytes
from shared.contracts import Example
from shared.datasets.rows import Dataset, Source, limited
from shared.settings import DatasetSettings

TRAIN, VALIDATION = 220, 30
"""Rows 1-220 are train, 221-250 validation, the rest (80) test: already shuffled, and fixed for good."""


def load_sample(settings: DatasetSettings) -> Dataset:
    """The embedded sample in its fixed splits. Raises DataError if `reserved_rows` leaves no train row."""
    data = resources.files("shared.datasets").joinpath("sample.jsonl").read_bytes()
    rows = tuple(Example.model_validate_json(line) for line in data.splitlines())
    return limited(
        "sample",
        {"train": rows[:TRAIN], "validation": rows[TRAIN : TRAIN + VALIDATION], "test": rows[TRAIN + VALIDATION :]},
        settings,
        Source("embedded", sha256_bytes(data)),
        read=len(rows),
        dropped={},
        notes={"split": f"fixed: rows 1-{TRAIN} train, to {TRAIN + VALIDATION} validation, to {len(rows)} test"},
    )
