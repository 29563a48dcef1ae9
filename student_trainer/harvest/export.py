"""A ledger as a Parquet file or a folder of Hugging Face `datasets`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.artifacts import new_directory, temporary_name
from shared.commands import install
from shared.errors import DataError, SettingsError, storage_error
from shared.harvest.ledger import AnswerReader, answer_files

COLUMNS = {
    "key": "string",
    "example_id": "string",
    "sample": "int32",
    "status": "string",
    "text": "string",
    "finish_reason": "string",
    "reason": "string",
    "model": "string",
    "latency_s": "float64",
    "attempts": "int32",
    "received_at": "string",
}


def export(stage: Path, to: Path) -> int:
    """Write the rows that count, one a sample, to `to`; whole or not at all. Returns their number.

    Raises DataError without a ledger, SettingsError for a name that is taken or of another kind and where `datasets` is not installed,
    StorageError. A harvest may be at work: what it has so far is written, and the stage's own folder need not be writable.
    """
    if to.exists() or not to.name or to.suffix not in ("", ".parquet"):
        raise SettingsError(f"{to}: give a new name, that of a folder or one that ends in .parquet; what is there is not replaced")
    if not answer_files(stage):
        raise DataError(f"{stage} holds no answers yet: run `distill harvest` first")
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    try:
        import datasets
    except ImportError as exc:
        raise SettingsError(f"distill harvest export needs the datasets library: {install('datasets')}") from exc
    features = datasets.Features({name: datasets.Value(kind) for name, kind in COLUMNS.items()})
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        nowhere = tempfile.TemporaryDirectory(dir=to.parent, prefix=".export.", suffix=".tmp")
    except OSError as exc:
        raise storage_error(exc, to) from exc
    with nowhere as cache, AnswerReader(stage) as ledger:

        def rows() -> Iterator[dict[str, Any]]:
            for row in ledger.rows():
                yield row.model_dump()

        # a generator's fingerprint would be made by pickling it, ledger and all
        table = datasets.Dataset.from_generator(rows, features=features, cache_dir=cache, fingerprint="ledger")
        try:
            if to.suffix == ".parquet":
                temporary = temporary_name(to)
                table.to_parquet(str(temporary))
                temporary.replace(to)
            else:
                with new_directory(to) as folder:
                    table.save_to_disk(str(folder))
        except OSError as exc:
            raise storage_error(exc, to) from exc
        return len(table)
