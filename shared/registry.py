"""The registry of promoted students: what is served now, what was served before, and why. Written by promotion, read by serving.

REGISTRY/
  format.json                   which version of this layout it is; written before everything else
  versions/<id>/serving/        a copy of the serving folder, beside it the model card and the reports
  versions/<id>/promoted.json   written last: a version without it does not exist
  current.json                  what is served now; replaced in one step, so a reader needs no lock
  history.jsonl                 every promotion, rollback and refusal, with its reason; its lock admits one writer at a time
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from shared.artifacts import (
    LOST_AND_FOUND,
    Ledger,
    canonical,
    new_directory,
    now,
    read_json,
    refuse_other_format,
    sha256_bytes,
    sha256_file,
    write_atomic,
    write_json,
)
from shared.contracts import Contract
from shared.errors import DataError, PromotionRefused, RunMismatch, StorageError

FORMAT = 1
"""Of registries. One without format.json is of format 1: version 0.1.0 began without it."""
ENTRIES = {"format.json", "current.json", "history.jsonl", "versions"}


class Promoted(Contract):
    """A student that is, or was, served."""

    version: str = Field(pattern=r"^[0-9TZ]+-[0-9a-f]{12}$")
    """UTC time of the first promotion, then a hash of the served files, the name and the task: the same content is the same version."""
    folder: str
    """The serving folder, relative to the registry."""
    name: str
    """The recipe's name."""
    task: dict[str, Any]
    """The recipe's TaskSettings, so that serving words its prompts as training did."""
    scores: dict[str, float]
    """Of this student on the test split, each in [0, 1]."""
    sha256: dict[str, str]
    """Of every file below `folder`."""
    run: str
    """The run directory it came from."""
    promoted_at: str
    """UTC, ISO 8601: when it became what is served, by promotion or rollback."""
    served_before: tuple[str, ...] = ()
    """Versions that rollbacks go back to, oldest first."""


class Event(Contract):
    """One line of the registry's history."""

    at: str
    what: Literal["promoted", "rolled back", "refused"]
    version: str | None
    """What is served after it."""
    reason: str
    run: str | None = None
    scores: dict[str, float] = Field(default_factory=dict)


def current(registry: Path) -> Promoted | None:
    """What is served now; None before the first promotion.

    Raises DataError for a damaged pointer, RunMismatch for a directory that is no registry, or one of another version.
    """
    _check(registry)
    return _read(registry / "current.json")


def serving_path(registry: Path, promoted: Promoted) -> Path:
    """The serving folder of a version."""
    return registry / promoted.folder


def verify(registry: Path, promoted: Promoted) -> None:
    """Return if the files of a version are exactly those that were promoted. Raises DataError that names those that are not."""
    found = _hashes(serving_path(registry, promoted))
    wrong = sorted(name for name in found.keys() | promoted.sha256.keys() if found.get(name) != promoted.sha256.get(name))
    if wrong:
        raise DataError(
            f"{registry}: version {promoted.version} is not what was promoted ({', '.join(wrong)} changed, missing or added); "
            "promote it again from its run, or roll back"
        )


def promote(
    registry: Path,
    serving_folder: Path,
    *,
    name: str,
    task: Mapping[str, Any],
    scores: Mapping[str, float],
    run: str,
    reason: str,
    attachments: Sequence[Path | tuple[str, str]] = (),
) -> Promoted:
    """Copy a serving folder into the registry and make it the served version. What is served already stays as it is.

    `attachments` are kept beside it, files or names with their text: the model card, the reports. `reason` goes into the history.
    Raises DataError for an incomplete serving folder, StorageError for a full disk or a second writer.
    """
    content = _hashes(serving_folder)
    if missing := {"serving.json", "model.bin", "tokenizer.json"} - content.keys():
        raise DataError(f"{serving_folder} is no serving folder (no {', '.join(sorted(missing))}); export the model again")
    digest = sha256_bytes(canonical({"files": content, "name": name, "task": dict(task)}))[:12]
    with _writing(registry) as (served, events):
        known = _version_of(registry, digest)
        if known and served and known.version == served.version:
            return served
        version = known.version if known else f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{digest}"
        promoted = Promoted(
            version=version,
            folder=f"versions/{version}/serving",
            name=name,
            task=dict(task),
            scores=dict(scores),
            sha256=content,
            run=run,
            promoted_at=now(),
            served_before=(*served.served_before, served.version) if served else (),
        )
        if not known:
            with new_directory(registry / "versions" / version) as folder:
                shutil.copytree(serving_folder, folder / "serving")
                for attached in attachments:
                    if isinstance(attached, Path):
                        shutil.copyfile(attached, folder / attached.name)
                    else:
                        file_name, text = attached
                        (folder / file_name).write_text(text, encoding="utf-8")
                if _hashes(folder / "serving") != content:
                    raise StorageError(f"{serving_folder} changed while it was copied; end what writes it and promote again")
                (folder / "promoted.json").write_text(promoted.model_dump_json(indent=2) + "\n")
        _serve(registry, events, promoted, "promoted", reason)
        return promoted


def rollback(registry: Path, *, reason: str = "asked for") -> Promoted:
    """Serve again what was served before the current version; asked again, it goes back one further.

    Raises PromotionRefused if nothing was, DataError if that version is damaged; what is served stays served.
    """
    if current(registry) is None:
        raise PromotionRefused(f"{registry}: nothing has been promoted, so there is nothing to roll back")
    with _writing(registry) as (served, events):
        if served is None or not served.served_before:
            raise PromotionRefused(f"{registry}: nothing was served before version {served and served.version}; it stays served")
        *earlier, version = served.served_before
        before = _read(registry / "versions" / version / "promoted.json")
        if before is None:
            raise DataError(f"{registry}: version {version} is gone; {served.version} stays served")
        verify(registry, before)
        promoted = before.model_copy(update={"promoted_at": now(), "served_before": tuple(earlier)})
        _serve(registry, events, promoted, "rolled back", f"from {served.version}: {reason}")
        return promoted


def record_refusal(registry: Path, *, reason: str, run: str, scores: Mapping[str, float]) -> None:
    """Note in the history that a student was not promoted, and why; what is served stays served."""
    with _writing(registry) as (served, events):
        version = served.version if served else None
        events.append(Event(at=now(), what="refused", version=version, reason=reason, run=run, scores=dict(scores)))


def history(registry: Path) -> list[Event]:
    """Every event, oldest first; a last line that is still being written is left out. Raises as `current` does."""
    _check(registry)
    file = registry / "history.jsonl"
    if not file.exists():
        return []
    try:
        return [Event.model_validate_json(line) for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    except ValidationError as exc:
        raise DataError(f"{file} holds a line that is no event: {exc.errors()[0]['msg']}") from exc


def stays_rolled_back(registry: Path, run: Path) -> bool:
    """Whether the last word on what is served was a rollback, and this run's student had been promoted: doing the same again must not
    undo what somebody asked for. Says so."""
    events = [event for event in history(registry) if event.what != "refused"]
    if not events or events[-1].what != "rolled back" or str(run.resolve()) not in {e.run for e in events if e.what == "promoted"}:
        return False
    print("promote: left as it is, since it was rolled back; `distill promote` serves this student again", flush=True)
    return True


def _check(registry: Path) -> None:
    """Return if this is a registry that this version can use, or nothing yet. Raises RunMismatch, DataError."""
    if (registry / "run.json").exists():
        raise RunMismatch(f"{registry} is a run directory and no registry; the run's own is {registry / 'registry'}")
    file = registry / "format.json"
    if file.exists():
        refuse_other_format(file, read_json(file), FORMAT, "give another --registry")
    elif registry.exists() and not (registry.is_dir() and _is_ours(registry)):
        raise RunMismatch(f"{registry} exists, is not empty and is no registry; give another --registry")


def _is_ours(registry: Path) -> bool:
    visible = {entry.name for entry in registry.iterdir() if not entry.name.startswith(".")} - {LOST_AND_FOUND}
    return not visible or bool(visible & ENTRIES)


@contextlib.contextmanager
def _writing(registry: Path) -> Iterator[tuple[Promoted | None, Ledger[Event]]]:
    """What is served, and the history opened for writing, which shuts out every other writer. Raises StorageError, RunMismatch."""
    _check(registry)
    if not (registry / "format.json").exists():
        write_json(registry / "format.json", {"format": FORMAT})
    with Ledger(registry / "history.jsonl", Event) as events:
        for leftover in (registry / "versions").glob(".*.tmp"):  # of a promotion that was killed while copying
            shutil.rmtree(leftover, ignore_errors=True)
        served = current(registry)
        # the pointer is replaced before the history is told: a kill in between left the line out
        told = events.rows()
        if served and not any(e.at == served.promoted_at and e.version == served.version for e in told):
            previous = told[-1].version if told else None
            forward = served.served_before[-1:] == ((previous,) if previous else ())
            events.append(_event(served, "promoted" if forward else "rolled back", "written down late: the process was ended right after"))
        yield served, events


def _serve(registry: Path, events: Ledger[Event], promoted: Promoted, what: Literal["promoted", "rolled back"], reason: str) -> None:
    write_atomic(registry / "current.json", promoted.model_dump_json(indent=2) + "\n")
    events.append(_event(promoted, what, reason))


def _event(promoted: Promoted, what: Literal["promoted", "rolled back"], reason: str) -> Event:
    return Event(at=promoted.promoted_at, what=what, version=promoted.version, reason=reason, run=promoted.run, scores=promoted.scores)


def _version_of(registry: Path, digest: str) -> Promoted | None:
    """The whole, undamaged version with this content, if the registry has it."""
    for file in sorted((registry / "versions").glob(f"*-{digest}/promoted.json")):
        with contextlib.suppress(DataError):  # a damaged one is replaced by a new copy
            found = _read(file)
            if found is not None:
                verify(registry, found)
                return found
    return None


def _read(file: Path) -> Promoted | None:
    try:
        return Promoted.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as exc:
        error = exc.errors()[0]
        raise DataError(f"{file}: {'.'.join(map(str, error['loc']))}: {error['msg']}; remove this file and promote again") from exc


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by relative path; empty where there is no folder."""
    return {str(f.relative_to(folder)): sha256_file(f) for f in sorted(folder.rglob("*")) if f.is_file()}
