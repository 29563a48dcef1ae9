"""Any JSON Lines or CSV file with a column of questions and, where there is one, a column of references."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.artifacts import sha256_bytes
from shared.datasets.rows import Dataset, Row, Source, make_splits
from shared.errors import DataError, SettingsError
from shared.settings import DatasetSettings


def load_file(settings: DatasetSettings) -> Dataset:
    """The data set at `settings.path`, split by seed.

    An example's id is that of the file's `id` column where it is filled and unique, else `row-N`, N counting records from 1.
    Raises SettingsError without a path; DataError for a file that cannot be read, a wrong column, a bad line, or too few rows.
    """
    path = settings.path
    if path is None:
        raise SettingsError("dataset.path: required for dataset.name=file; give a .jsonl or .csv")
    data, records = read_records(path, f"dataset.path={path}")
    columns = sorted({name for _, record in records for name in record})
    _require_columns(settings, columns, path)
    identities = _identities(records)
    rows = [
        Row(
            place=place,
            question=_text(record, settings.question_column, place) or "",
            summary=_text(record, settings.summary_column, place) if settings.summary_column is not None else None,
            id=identities[index] if identities else f"row-{index + 1}",
        )
        for index, (place, record) in enumerate(records)
    ]
    source = Source(str(path), sha256_bytes(data))
    return make_splits("file", rows, settings, source, {"ids": "id column" if identities else "record number"})


def read_records(path: Path, named: str) -> tuple[bytes, list[tuple[str, dict[str, Any]]]]:
    """The bytes of a .jsonl or .csv file, and its records: values by column, each with its place for messages.

    `named`: what messages call the file. Raises DataError for a file that cannot be read, has another ending, a bad line or no rows.
    """
    if path.suffix.lower() not in READERS:
        raise DataError(f"{named}: expected a file that ends in .jsonl or .csv; convert it to one of them")
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise DataError(f"{named}: {exc.strerror}; give the path of a readable .jsonl or .csv") from exc
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        raise DataError(f"{named}, line {line}: not UTF-8 ({exc.reason}); save the file as UTF-8") from exc
    records = list(READERS[path.suffix.lower()](text, named))
    if not records:
        raise DataError(f"{named}: no rows; give a file with at least one")
    return data, records


def _json_lines(text: str, named: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{named}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as exc:
            raise DataError(f"{place}: not valid JSON ({exc}); each line must be one JSON object") from exc
        if not isinstance(record, dict):
            raise DataError(f"{place}: expected a JSON object, found {type(record).__name__}; write one object of named columns a line")
        yield place, record


def _csv_records(text: str, named: str) -> Iterator[tuple[str, dict[str, Any]]]:
    # strict: a lone quotation mark would otherwise swallow the rest of the file into one field
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(lines, [])
        if len(set(header)) < len(header):
            raise DataError(f"{named}: the header names a column twice: {', '.join(header)}; rename one")
        for fields in lines:
            if not fields:
                continue  # an empty line is no record
            place = f"{named}, line {lines.line_num}"
            if len(fields) != len(header):
                raise DataError(
                    f"{place}: {len(fields)} fields, but the header names {len(header)}; put texts that hold commas, "
                    "quotation marks or line breaks in quotation marks"
                )
            yield place, dict(zip(header, fields, strict=True))
    except csv.Error as exc:
        raise DataError(f"{named}, line {lines.line_num}: not valid CSV ({exc}); mend the quotation marks there") from exc


READERS = {".jsonl": _json_lines, ".csv": _csv_records}


def _require_columns(settings: DatasetSettings, columns: list[str], path: Path) -> None:
    listed = ", ".join(columns)
    if settings.question_column not in columns:
        raise DataError(f"dataset.question_column={settings.question_column}: {path} has no such column; it has: {listed}")
    if settings.summary_column is not None and settings.summary_column not in columns:
        raise DataError(
            f"dataset.summary_column={settings.summary_column}: {path} has no such column; it has: {listed}"
            " (null where there are no references)"
        )


def _text(record: dict[str, Any], column: str, place: str) -> str | None:
    value = record.get(column)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{place}: column {column} holds {type(value).__name__}, not text; write it as a JSON string")
    try:
        (value or "").encode()
    except UnicodeEncodeError as exc:
        raise DataError(f"{place}: column {column} holds half of a surrogate pair, which is no text; remove it") from exc
    return value


def _identities(records: list[tuple[str, dict[str, Any]]]) -> list[str] | None:
    """The `id` column as texts, or None unless each record has its own."""
    found = [str(record["id"]).strip() for _, record in records if isinstance(record.get("id"), (str, int))]
    return found if len(set(found)) == len(records) and all(found) else None
