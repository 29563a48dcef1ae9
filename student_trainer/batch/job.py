"""A file answered by a student's server: asked by the harvester's scheduler, kept in its ledger, written once all of it is there."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from shared.artifacts import read_json, write_atomic, write_json
from shared.collect import Collected
from shared.commands import interruptible
from shared.contracts import GenerationRequest, Response, Sampling
from shared.errors import DataError, FailureClass, HarvestTooThin, RunMismatch, SettingsError, TeacherUnavailable
from shared.harvest.ask import Ask
from shared.harvest.ledger import AnswerLedger
from shared.harvest.scheduler import Limits, harvest
from shared.http.client import refuse_too_many
from student_trainer.batch.rows import KINDS, Rows, read_rows
from student_trainer.batch.student import StudentApi

RECORD = "batch.json"
STUDENT = "student"
MOST_AT_ONCE = 1024
LOOKED_UP = 256
"""Rows read from the ledger at once."""
TIMEOUT_S = 120.0
"""For one question, the server's own queue included."""


@dataclass(frozen=True)
class Job:
    """What is asked of whom, and where it goes."""

    source: Path
    out: Path
    url: str
    model: str | None
    """None: the server's own student."""
    column: str
    truncate: bool

    @property
    def folder(self) -> Path:
        """Where the answers are kept as they come."""
        return self.out.with_name(f"{self.out.name}.batch")


def answer_file(job: Job, *, api_key: str | None, concurrency: int, retry_failed: bool) -> int:
    """Ask for what is missing and write `job.out`. Returns 0 if every row was answered.

    A first Ctrl-C or SIGTERM waits for what is in flight, a second one does not. Raises DataError, SettingsError and RunMismatch before
    anything is asked; TeacherError, StorageError, Stopped with all answers so far kept; HarvestTooThin where some rows have failed (then
    `job.out` is written, with their errors) or all of the first ones (then it is not).
    """
    _check_out(job)
    refuse_too_many(concurrency, "--concurrency")
    rows = read_rows(job.source, job.column)
    student = StudentApi(job.url, model=job.model, truncate=job.truncate, api_key=api_key, timeout_s=TIMEOUT_S)
    retry = frozenset(get_args(FailureClass)) if retry_failed else frozenset()
    if job.truncate:
        retry |= {"too_long"}  # of a call without it

    with AnswerLedger(job.folder) as ledger, interruptible() as stopping:
        _claim(job, rows, student.base, begun=not ledger.empty)

        async def collect() -> Collected:
            try:
                return await harvest(
                    student,
                    _asks(rows, student.base, job.model or STUDENT),
                    ledger,
                    # a row that fails costs nothing here, and is told of in its place; only if all of the first fail something is wrong
                    limits=Limits(concurrency=concurrency, timeout_s=TIMEOUT_S, first_failures=1.0),
                    what="batch",
                    whom="the student",
                    total=len(rows.records),
                    retry=retry,
                    stopping=stopping,
                )
            finally:
                await student.aclose()

        try:
            collected = asyncio.run(collect())
        except TeacherUnavailable as exc:
            raise TeacherUnavailable(f"{exc}; see that `distill serve` runs there and has a student, or give its own --url") from exc
        stopping.raise_if_asked()
        answers = list(_held(_asks(rows, student.base, job.model or STUDENT), ledger))
        write_atomic(job.out, rows.answered(answers, job.model or STUDENT))
        ledger.compact()
    versions = Counter(row.model for row in answers if row.status == "ok")
    print(f"{job.out}: {collected.explain()}")
    if len(versions) > 1:
        shown = ", ".join(f"{count} by {version}" for version, count in versions.most_common())
        print(f"{job.out}: another student was promoted in between: {shown}; the column version tells which answered")
    if collected.failed:
        most = max(collected.failed, key=lambda kind: collected.failed[kind])
        cut = "; --truncate cuts what is too long" if "too_long" in collected.failed and not job.truncate else ""
        raise HarvestTooThin(
            f"{sum(collected.failed.values())} of {len(rows.records)} rows have no answer and say why in the column error, most with: "
            f"{collected.said.get(most, most)}. To ask for them again, run the same command with --retry-failed{cut}"
        )
    return 0


def _check_out(job: Job) -> None:
    """Refuse a place for answers that is none, before a long file is read."""
    kind = job.source.suffix.lower()
    if kind in KINDS and job.out.suffix.lower() != kind:
        raise SettingsError(f"--out {job.out}: the answers to a {kind} file are one as well; give a name that ends in {kind}")
    if job.out.is_dir():
        raise SettingsError(f"--out {job.out}: a folder; give the name of a file")
    if not job.out.absolute().parent.is_dir():
        raise SettingsError(f"--out {job.out}: there is no folder {job.out.parent}; make it, or give another --out")
    if job.out.exists() and job.source.exists() and os.path.samefile(job.source, job.out):
        raise SettingsError(f"--out {job.out}: the file that is to be read; give another name")
    if not (job.folder / RECORD).is_file():
        # what begins with a dot was left by a batch that was killed before it began
        if job.folder.exists() and not (job.folder.is_dir() and all(entry.name.startswith(".") for entry in job.folder.iterdir())):
            raise RunMismatch(f"{job.folder} exists and is no folder of a batch (it has no {RECORD}); give another --out")
        if job.out.exists():
            raise RunMismatch(f"{job.out} exists, and no batch has made it (there is no {job.folder}); give another --out, or remove it")


def _claim(job: Job, rows: Rows, url: str, *, begun: bool) -> None:
    """Note what the folder's answers are to, or raise RunMismatch that shows what differs from what was noted.

    A batch that was never answered anything may become another one; and `truncate` may be added, by which no answer changes that is there.
    """
    file = job.folder / RECORD
    mine: dict[str, Any] = {
        "input": str(job.source),
        "input_sha256": rows.sha256,
        "url": url,
        "model": job.model or STUDENT,
        "column": job.column,
        "truncate": job.truncate,
    }
    if begun:
        theirs = read_json(file)
        if not isinstance(theirs, dict) or theirs.keys() != mine.keys():
            raise DataError(f"{file}: not what a batch of this version writes; give another --out, or remove {job.folder} and {job.out}")
        differing = {name for name in mine if theirs[name] != mine[name]}
        # the same rows may come under another name
        if not differing <= {"input", *(["truncate"] if job.truncate else [])}:
            shown = [f"{name}: the batch has {theirs[name]!r}, you ask for {mine[name]!r}" for name in mine if name in differing]
            raise RunMismatch(
                f"{job.out} belongs to another batch; give another --out, or ask for the same (to forget its answers, remove {job.out} and "
                f"{job.folder}): {'; '.join(shown)}"
            )
    write_json(file, mine)


def _asks(rows: Rows, url: str, model: str) -> Iterator[Ask]:
    """One for each row, known by its number from 1; equal texts have one key, and are asked once."""
    sampling = Sampling()  # the server's own; one object for all, which makes keys cheaper
    for number, record in enumerate(rows.records, 1):
        request = GenerationRequest(prompt=record[rows.column], sampling=sampling)
        yield Ask(f"row-{number}", request, identity=url, model=model, protocol="generate")


def _held(asks: Iterator[Ask], ledger: AnswerLedger) -> Iterator[Response]:
    """What the ledger has of each ask, in order."""
    while some := list(islice(asks, LOOKED_UP)):
        keys = [ask.key(0) for ask in some]
        found = ledger.find(keys)
        for ask, key in zip(some, keys, strict=True):
            yield ledger.read(found[key, hash(ask.example_id)])
