"""Data sets as fixed splits of examples: the embedded sample, MeQSum, any JSONL or CSV file. Heavy readers load on use."""

from __future__ import annotations

from shared.datasets.load import load
from shared.datasets.rows import Dataset, normalise

__all__ = ["Dataset", "load", "normalise"]
