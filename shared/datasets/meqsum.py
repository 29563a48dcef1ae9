"""MeQSum: 1,000 consumer health questions with summaries by experts, from its xlsx (a path or its URL) or from the Hub.

Asma Ben Abacha and Dina Demner-Fushman, "On the Summarization of Consumer Health Questions", ACL 2019; CC BY 4.0.
"""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from shared.artifacts import canonical, sha256_bytes, write_atomic
from shared.commands import install
from shared.datasets.rows import Dataset, Row, Source, make_splits
from shared.errors import DataError, SettingsError
from shared.settings import DatasetSettings

URL = "https://github.com/abachaa/MeQSum/raw/master/MeQSum_ACL2019_BenAbacha_Demner-Fushman.xlsx"
SHA256 = "abedd939d5014306ca576522416bf69103e85dc8fcf1668a4099e8b84a39eeea"
"""Of the file as published."""
QUESTION_COLUMNS = ("chq", "question")
SUMMARY_COLUMNS = ("summary",)
INSTALL = install("datasets")


def load_meqsum(settings: DatasetSettings, cache: Path, *, url: str = URL, sha256: str = SHA256, timeout_s: float = 60.0) -> Dataset:
    """MeQSum from `settings.hub`, else from `settings.path`, else from `url` by way of `cache`; split by seed.

    An example's id is `meqsum-` and 12 hex digits of the SHA-256 of its normalised question, wherever it was read from.
    Raises DataError if a file is not the published one or cannot be had, or if a Hub data set has other columns.
    """
    if settings.hub is not None:
        rows = read_hub(settings.hub, cache)
        source = Source(f"hub:{settings.hub}", sha256_bytes(canonical([[r.question, r.summary] for r in rows])))
    else:
        data, location = _local(settings.path, sha256) if settings.path is not None else _remote(url, cache, sha256, timeout_s)
        rows, source = read_xlsx(data, location), Source(location, sha256)
    return make_splits("meqsum", rows, settings, source, {"ids": "SHA-256 of the normalised question"})


def read_xlsx(data: bytes, location: str) -> list[Row]:
    """The rows of sheet QS of an xlsx in MeQSum's layout. Raises DataError if it has other columns."""
    try:
        import openpyxl
    except ImportError as exc:
        raise SettingsError(f"dataset.name=meqsum reads an xlsx, which needs openpyxl: {INSTALL}") from exc
    book = openpyxl.load_workbook(io.BytesIO(data), read_only=True)
    # the published sheet is 1,000 columns wide, all but the first three empty
    table = book["QS"].iter_rows(max_col=16, values_only=True)
    header = [str(cell or "") for cell in next(table, ())]
    return _rows((dict(zip(header, cells, strict=True)) for cells in table if any(c is not None for c in cells)), header, location)


def read_hub(name: str, cache: Path) -> list[Row]:
    """All rows, of all splits, of a data set of the Hugging Face Hub, or of a folder that `datasets` can read."""
    try:
        import datasets
    except ImportError as exc:
        raise SettingsError(f"dataset.hub={name} needs the package datasets: {INSTALL}") from exc
    try:
        parts = datasets.load_dataset(name, cache_dir=str(cache / "datasets"))
    except Exception as exc:  # a boundary: the library raises anything from OSError to its dependencies' own classes
        raise DataError(f"dataset.hub={name}: {type(exc).__name__}: {exc}; check the name and the network, or give dataset.path") from exc
    columns = [column for part in parts.values() for column in part.column_names]
    return _rows((record for part in parts.values() for record in part), columns, f"hub:{name}")


def _rows(records: Iterable[dict[str, Any]], columns: Sequence[str], location: str) -> list[Row]:
    question = _column(columns, QUESTION_COLUMNS, location)
    summary = _column(columns, SUMMARY_COLUMNS, location)
    return [
        # a few texts hold &quot;, left over from a web page
        Row(f"{location}, row {n}", html.unescape(str(record[question] or "")), html.unescape(str(record[summary] or "")))
        for n, record in enumerate(records, 1)
    ]


def _column(columns: Sequence[str], wanted: Sequence[str], location: str) -> str:
    for name in wanted:
        for column in columns:
            if column.casefold() == name:
                return column
    existing = ", ".join(dict.fromkeys(c for c in columns if c))
    raise DataError(f"{location}: no column named {' or '.join(wanted)} (in any case); it has: {existing}")


def _local(path: Path, sha256: str) -> tuple[bytes, str]:
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise DataError(f"dataset.path={path}: {exc.strerror}; give MeQSum's xlsx, or no path to have it downloaded") from exc
    if sha256_bytes(data) != sha256:
        raise DataError(
            f"dataset.path={path} is not MeQSum as published: SHA-256 {sha256_bytes(data)}, expected {sha256}. Leave out dataset.path "
            "to have it downloaded; for rows of your own save them as CSV and give dataset.name=file, dataset.path, "
            "dataset.question_column=CHQ and dataset.summary_column=Summary"
        )
    return data, str(path)


def _remote(url: str, cache: Path, sha256: str, timeout_s: float) -> tuple[bytes, str]:
    file = cache / "datasets" / f"meqsum-{sha256[:12]}.xlsx"
    if file.exists():
        data = file.read_bytes()
        if sha256_bytes(data) == sha256:  # else damaged: fetched again
            return data, url
    import httpx

    remedy = f"check the network, or download {url} by other means and give dataset.path"
    try:
        answer = httpx.get(url, follow_redirects=True, timeout=timeout_s)
    except httpx.HTTPError as exc:
        raise DataError(f"{url}: {exc!r}; {remedy}") from exc
    if answer.status_code != httpx.codes.OK:
        raise DataError(f"{url}: HTTP {answer.status_code}; {remedy}")
    if sha256_bytes(answer.content) != sha256:
        raise DataError(f"{url}: SHA-256 {sha256_bytes(answer.content)}, expected {sha256}: not the published file; {remedy}")
    write_atomic(file, answer.content)
    return answer.content, url
