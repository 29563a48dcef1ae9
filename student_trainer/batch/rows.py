"""The file that is answered: its rows, checked before the first request, and the same rows with their answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.artifacts import sha256_bytes
from shared.contracts import Response
from shared.datasets.files import READERS, read_records
from shared.errors import DataError

KINDS = tuple(READERS)
ADDED = ("answer", "finish_reason", "version", "error")
"""Columns of what is written, after those of the file."""
SHOWN = 5
"""Wrong rows that a message names."""
BOM = b"\xef\xbb\xbf"
QUOTED = re.compile('[",\r\n]')
"""What a field of a CSV needs quotation marks for."""


@dataclass(frozen=True)
class Rows:
    """Records in the order of the file, each with a question."""

    path: Path
    sha256: str
    """Of the file."""
    records: list[dict[str, Any]]
    column: str
    bom: bool
    crlf: bool
    """Whether the first line ends so."""

    def answered(self, answers: Iterable[Response], model: str) -> bytes:
        """The file once more, each row with the columns of `ADDED`; what a row does not have is null, in a CSV nothing.

        `answers`: of each record; `model`: what it is called where a server names no version.
        """
        made = [{**record, **_added(row, model)} for record, row in zip(self.records, answers, strict=True)]
        if self.path.suffix.lower() == ".csv":
            end = "\r\n" if self.crlf else "\n"
            text = "".join(",".join(map(_field, cells)) + end for cells in [list(made[0]), *(list(row.values()) for row in made)])
            return (BOM if self.bom else b"") + text.encode()
        # of half a surrogate pair, which UTF-8 cannot hold, this makes the escape that JSON has for it
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made).encode(errors="backslashreplace")


def read_rows(path: Path, column: str) -> Rows:
    """All rows of a .jsonl or .csv.

    Raises DataError for a file that cannot be read, a bad line, a column that would be written and is there already, and rows
    without a text in `column`: all of them are counted, the first few named.
    """
    data, records = read_records(path, str(path))
    columns = dict.fromkeys(name for _, record in records for name in record)
    if column not in columns:
        raise DataError(f"{path}: there is no column {column!r}; it has: {', '.join(columns)}. Name the one with the questions: --column")
    if taken := [name for name in ADDED if name in columns]:
        raise DataError(f"{path}: the column{'s' * (len(taken) > 1)} {', '.join(taken)} would be written over; rename what is there")
    wrong = [f"{place.removeprefix(f'{path}, ')}: {reason}" for place, record in records if (reason := _wrong(record, column))]
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise DataError(
            f"{path}: {len(wrong)} of {len(records)} rows cannot be asked, and nothing was: {'; '.join(wrong[:SHOWN])}{more}. "
            "Fill them in or take them out"
        )
    return Rows(
        path=path,
        sha256=sha256_bytes(data),
        records=[record for _, record in records],
        column=column,
        bom=data.startswith(BOM),
        crlf=data.partition(b"\n")[0].endswith(b"\r"),
    )


def _wrong(record: dict[str, Any], column: str) -> str | None:
    """Why a row cannot be asked."""
    question = record.get(column)
    if question is None:
        return f"{column} is {'null' if column in record else 'missing'}"
    if not isinstance(question, str):
        return f"{column} holds {type(question).__name__}, not text"
    if not question.strip():
        return f"{column} is empty"
    try:
        question.encode()
    except UnicodeEncodeError:
        return f"{column} holds half of a surrogate pair, which is no text"
    return None


def _added(row: Response, model: str) -> dict[str, str | None]:
    if row.status == "failed":
        return dict(zip(ADDED, (None, None, None, row.reason), strict=True))
    version = row.model if row.model != model else None
    return dict(zip(ADDED, (row.text, row.finish_reason, version, None), strict=True))


def _field(value: str | None) -> str:
    # the csv module leaves a lone carriage return bare, by which a reader ends the record
    text = value or ""
    return '"' + text.replace('"', '""') + '"' if QUOTED.search(text) else text
