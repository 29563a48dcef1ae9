"""The registry of promoted students: what is served now, what was served before, and why. Written by promotion, read by serving.

REGISTRY/
  format.json                   which version of this layout it is; written before everything else
  versions/<id>/serving/        a copy of the serving folder, beside it the model card and the reports
  versions/<id>/promoted.json   written last: a version without it does not exist
  current.json                  what is served now; replaced in one step, so a reader needs no lock
  canary.json                   while a version is tried on a share of the requests: which, and the share; set and removed in one step
  history.jsonl                 every promotion, canary, rollback and refusal, with its reason
  .writer                       locked by the one process that writes, and says which that is; a lock dies with its process

Version 0.1.0 knows no canaries, and reads and writes registries without them as ever. Of one that has had a canary it goes on
serving current.json, to all requests; its other commands refuse the history, whose line it cannot read, and change nothing. So
nothing is misunderstood and the format stays 1: another number would keep its servers from serving what they can.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from shared.artifacts import (
    LOST_AND_FOUND,
    Ledger,
    canonical,
    fsync_dir,
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
from shared.errors import DataError, PromotionRefused, RunMismatch, StorageError, storage_error

FORMAT = 1
"""Of registries. One without format.json is of format 1: version 0.1.0 began without it."""
ENTRIES = {"format.json", "current.json", "canary.json", "history.jsonl", "versions"}
VERSION = r"^[0-9TZ]+-[0-9a-f]{12}$"
REFUSAL_WAITS_S = 60.0
"""Seconds that a refusal waits for the promotion under way: it wins nothing by being told that it came second."""
KILLED = "written down late: the process was ended right after"
ContractT = TypeVar("ContractT", bound=Contract)


class Promoted(Contract):
    """A student that is, or was, served."""

    version: str = Field(pattern=VERSION)
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
    """UTC, ISO 8601: when it became what is served, by promotion or rollback, or the canary."""
    served_before: tuple[str, ...] = ()
    """Versions that rollbacks go back to, oldest first. Of a canary the last of them is the one it is tried beside."""


class Canary(Contract):
    """A student that is tried on a share of the requests; the others go to what is served."""

    promoted: Promoted
    share: float = Field(gt=0, lt=1)
    """Of the requests."""


class Event(Contract):
    """One line of the registry's history."""

    at: str
    what: Literal["promoted", "canary", "rolled back", "refused"]
    """rolled back: what is served, or the canary, which leaves `version` what it was."""
    version: str | None
    """What is served after it."""
    reason: str
    run: str | None = None
    """Of the student that was promoted, tried, refused or gone back to, or that was the canary; so are the scores."""
    scores: dict[str, float] = Field(default_factory=dict)


def current(registry: Path) -> Promoted | None:
    """What is served now; None before the first promotion.

    Raises DataError for a damaged pointer, RunMismatch for a directory that is no registry, or one of another version.
    """
    _check(registry)
    return _read(registry / "current.json", Promoted, "promote again")


def canary(registry: Path) -> Canary | None:
    """What is tried on a share of the requests now; None where nothing is.

    A canary is tried beside one version. Once another is served it is over, although its file may still be there for a moment, or
    after a kill until the next writer comes: there is no instant at which a version is its own canary. Raises as `current` does.
    """
    _check(registry)
    found = _read(registry / "canary.json", Canary, "set the canary again if it is still wanted: what is served stays served")
    served = current(registry)
    return found if found and served and found.promoted.served_before[-1:] == (served.version,) else None


def versions(registry: Path) -> dict[str, Promoted | DataError]:
    """Every version by its id, oldest first; in place of one whose promoted.json is damaged the error that says so.

    A version that was served more than once is told as it was at its first promotion. Raises as `current` does, but for the pointer.
    """
    _check(registry)
    found: dict[str, Promoted | DataError] = {}
    for file in sorted((registry / "versions").glob("*/promoted.json")):
        if not re.match(VERSION, file.parent.name):
            continue
        try:
            promoted = _read(file, Promoted, "promote again")
            if promoted is not None and promoted.version != file.parent.name:
                raise DataError(f"{file} speaks of version {promoted.version}; remove {file.parent} and promote that student again")
        except DataError as exc:
            found[file.parent.name] = exc
        else:
            if promoted is not None:
                found[promoted.version] = promoted
    return found


def find(registry: Path, name: str) -> Promoted:
    """One version: `current`, `canary`, `previous` (what a rollback goes back to where there is no canary), or an id, or the beginning
    of an id or of the hash in it.

    Raises DataError for a name that fits none, or several, with those there are; for a damaged version; as `current` does.
    """
    served, known = current(registry), versions(registry)
    if served is None:
        raise DataError(f"{registry}: nothing has been promoted, so there is no version {name!r}")
    if name == "current":
        return served
    if name == "canary":
        if (tried := canary(registry)) is None:
            raise DataError(f"{registry}: there is no canary; `distill promote --canary 0.1` makes one")
        return tried.promoted
    if name == "previous":
        if not served.served_before:
            raise DataError(f"{registry}: nothing was served before version {served.version}, so there is no previous one")
        name = served.served_before[-1]
    fitting = [version for version in known if version.startswith(name) or version.partition("-")[2].startswith(name)] if name else []
    if len(fitting) != 1:
        what, those = (f"{name!r} may be any of", fitting) if fitting else (f"no version {name!r}; there are", list(known))
        raise DataError(f"{registry}: {what} {', '.join(those) or 'none'}")
    found = known[fitting[0]]
    if isinstance(found, DataError):
        raise found
    return served if found.version == served.version else found


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
    expected: Mapping[str, str] | None = None,
    canary: float | None = None,
) -> Promoted:
    """Copy a serving folder into the registry and make it the served version. Of what is served already scores and attachments alone
    are written anew, if they differ.

    `attachments` are kept beside it, files or names with their text: the model card, the reports. `reason` goes into the history.
    `expected`: the SHA-256 of every file that is to be there, relative to the folder; None: whatever is there.
    `canary`: a share of the requests, between 0 and 1: the version becomes the canary, in place of the one before if there is one,
    and what is served stays served. Without it the canary is over, whichever version it was: who promotes decides who answers every
    request, and what was tried beside another version has not been tried beside this one.

    Of two promotions at once, one is made and the other gets StorageError at once, having written nothing. One that begins after the
    other has ended is made as well, although it was decided upon while something else was served: decisions are made against a
    baseline of the recipe, which no promotion changes. The later one is then served, and a rollback goes back to the other.

    Raises DataError for an incomplete serving folder, PromotionRefused for a canary where nothing is served or this very version is,
    StorageError for a full disk or while another process writes the registry, ValueError for a share that is none.
    """
    if canary is not None and not 0 < canary < 1:
        raise ValueError(f"canary: {canary} is no share between 0 and 1")
    content = _hashes(serving_folder)
    if missing := {"serving.json", "model.bin", "tokenizer.json"} - content.keys():
        raise DataError(f"{serving_folder} is no serving folder (no {', '.join(sorted(missing))}); export the model again")
    if expected is not None and content != dict(expected):
        wrong = sorted(file for file in content.keys() | expected.keys() if content.get(file) != expected.get(file))
        raise DataError(
            f"{serving_folder} is not what was evaluated ({', '.join(wrong)} changed, missing or added); export and evaluate it again"
        )
    digest = sha256_bytes(canonical({"files": content, "name": name, "task": dict(task)}))[:12]
    alone = f"{registry}: nothing is served yet that a canary could be tried beside; promote without --canary"
    if canary is not None and current(registry) is None:
        raise PromotionRefused(alone)
    with _writing(registry, f"promoting {run}") as (served, tried, events):
        if canary is not None and served is None:
            raise PromotionRefused(alone)
        known = _version_of(registry, digest)
        is_served = known is not None and served is not None and known.version == served.version
        if canary is not None and is_served and known:
            raise PromotionRefused(f"{registry}: version {known.version} is served already, to all requests: there is nothing to try")
        before, share = (served if canary is None else tried and tried.promoted), tried and tried.share
        same = known and before and (known.version, dict(scores), canary) == (before.version, before.scores, share)
        if before and same and not _attach(_folder(registry, before.version), attachments):
            return before
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
            served_before=() if served is None else served.served_before if is_served else (*served.served_before, served.version),
        )
        if not known:
            with new_directory(_folder(registry, version)) as folder:
                shutil.copytree(serving_folder, folder / "serving")
                _attach(folder, attachments)
                if _hashes(folder / "serving") != content:
                    raise StorageError(f"{serving_folder} changed while it was copied; end what writes it and promote again")
                (folder / "promoted.json").write_text(promoted.model_dump_json(indent=2) + "\n")
        else:  # the same student, evaluated anew: a rollback to it tells its scores of now
            _attach(_folder(registry, version), attachments)
            write_atomic(_folder(registry, version) / "promoted.json", promoted.model_dump_json(indent=2) + "\n")
        if canary is None or served is None:
            _serve(registry, events, promoted, "promoted", reason)
        else:
            pointer = Canary(promoted=promoted, share=canary)
            write_atomic(registry / "canary.json", pointer.model_dump_json(indent=2) + "\n")
            events.append(_trial(pointer, served, reason))
        return promoted


def _folder(registry: Path, version: str) -> Path:
    return registry / "versions" / version


def _attach(folder: Path, attachments: Sequence[Path | tuple[str, str]]) -> bool:
    """Keep what belongs to a version beside it. Returns whether anything of it is new."""
    new = False
    for attached in attachments:
        name, content = (attached.name, attached.read_bytes()) if isinstance(attached, Path) else (attached[0], attached[1].encode())
        file = folder / name
        if not file.is_file() or file.read_bytes() != content:
            write_atomic(file, content)
            new = True
    return new


def rollback(registry: Path, *, reason: str = "asked for") -> Promoted:
    """End the canary if there is one, and nothing else; else serve again what was served before the current version. Asked again, it
    goes back one further. A version that is gone or damaged is passed over, which the reason tells. Returns what is served after it.

    Raises PromotionRefused if nothing was, DataError if no version before it is whole, StorageError while another process writes the
    registry; what is served stays served.
    """
    if current(registry) is None:
        raise PromotionRefused(f"{registry}: nothing has been promoted, so there is nothing to roll back")
    with _writing(registry, "rolling back") as (served, tried, events):
        if served and tried:
            _end_canary(registry)
            events.append(_ended(tried.promoted, served, f"canary {tried.promoted.version}: {reason}"))
            return served
        if served is None or not served.served_before:
            raise PromotionRefused(f"{registry}: nothing was served before version {served and served.version}; it stays served")
        lost: list[str] = []
        for place in reversed(range(len(served.served_before))):
            version = served.served_before[place]
            if version == served.version:  # promoted twice, and what was between them is lost: to serve it again would change nothing
                continue
            try:
                before = _read(registry / "versions" / version / "promoted.json", Promoted, "promote again")
                if before is None:
                    raise DataError(f"version {version} is gone")
                verify(registry, before)
            except DataError as exc:
                lost.append(str(exc))
                continue
            promoted = before.model_copy(update={"promoted_at": now(), "served_before": served.served_before[:place]})
            told = "; ".join([f"from {served.version}: {reason}", *(f"passed over: {why}" for why in lost)])
            _serve(registry, events, promoted, "rolled back", told)
            return promoted
        raise DataError(f"{registry}: {'; '.join(lost)}; {served.version} stays served: promote another run to replace it")


def record_refusal(registry: Path, *, reason: str, run: str, scores: Mapping[str, float]) -> None:
    """Note in the history that a student was not promoted, and why; what is served stays served.

    Raises StorageError if another process writes the registry for longer than REFUSAL_WAITS_S.
    """
    with _writing(registry, f"noting why {run} is refused", wait_s=REFUSAL_WAITS_S) as (served, _, events):
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
    """Whether the last word on what is served was a rollback or a canary, and this run's student had been promoted or tried: doing the
    same again must not undo what somebody asked for. Says so.
    """
    events = [event for event in history(registry) if event.what != "refused"]
    runs = {event.run for event in events if event.what in ("promoted", "canary")}
    if not events or events[-1].what == "promoted" or str(run.resolve()) not in runs:
        return False
    if events[-1].what == "canary":
        print("promote: left as it is, since a canary is tried; `distill promote` serves this student to all and ends that", flush=True)
    else:
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
def _writing(registry: Path, doing: str, *, wait_s: float = 0.0) -> Iterator[tuple[Promoted | None, Canary | None, Ledger[Event]]]:
    """What is served, what is the canary, and the history opened for writing, which shuts out every other writer. Raises StorageError,
    RunMismatch, DataError.

    doing: what others are told meanwhile.
    """
    _check(registry)
    with _alone(registry, doing, wait_s):
        if not (registry / "format.json").exists():
            write_json(registry / "format.json", {"format": FORMAT})
        _sweep(registry)
        with Ledger(registry / "history.jsonl", Event) as events:
            served = current(registry)
            _mend(registry, events, served)
            yield served, canary(registry), events


def _mend(registry: Path, events: Ledger[Event], served: Promoted | None) -> None:
    """Finish what a killed writer has begun. Pointers are replaced before the history is told: it left the line out."""
    told = events.rows()
    if served and not any(e.at == served.promoted_at and e.version == served.version for e in told):
        _end_canary(registry)  # a canary that is there is of before
        # a promotion writes its moment beside the version, too, a rollback does not
        found = versions(registry).get(served.version)
        promoted = isinstance(found, Promoted) and found.promoted_at == served.promoted_at
        events.append(_event(served, "promoted" if promoted else "rolled back", KILLED))
        return
    tried = canary(registry)
    last = next((event for event in reversed(told) if event.what != "refused"), None)
    if served and tried and not any(e.at == tried.promoted.promoted_at and e.what == "canary" for e in told):
        events.append(_trial(tried, served, KILLED))
    elif served and not tried and last and last.what == "canary":
        events.append(_ended(last, served, f"canary of {last.at}: {KILLED}, or canary.json was removed"))


def _sweep(registry: Path) -> None:
    """Remove what a promotion that was killed while writing has left half done."""
    for leftover in (registry / "versions").glob(".*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    for leftover in (*registry.glob(".*.tmp"), *(registry / "versions").glob("*/.*.tmp")):
        leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(registry: Path, doing: str, wait_s: float) -> Iterator[None]:
    """Shut out every other writer, in this process or another, until the block ends. Raises StorageError that names who it is."""
    file = registry / ".writer"
    try:
        registry.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)  # less what the umask forbids
    except OSError as exc:
        raise storage_error(exc, file) from exc
    try:
        _lock(registry, handle, time.monotonic() + wait_s)
        with contextlib.suppress(OSError):  # who holds it is a courtesy, for which a full disk may have no room
            os.ftruncate(handle, 0)  # what a killed one has left
            # a pid alone means nothing to another container
            os.pwrite(handle, f"{doing} (process {os.getpid()} on {platform.node()}, since {now()})".encode(), 0)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def _lock(registry: Path, handle: int, until: float) -> None:
    """Lock an open file, trying until a moment of the monotonic clock. Raises StorageError."""
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            if time.monotonic() < until:
                time.sleep(0.05)
                continue
            doing = os.pread(handle, 4096, 0).decode(errors="replace") or "writing it"
            raise StorageError(
                f"{registry}: another process is {doing}; this one has changed nothing: wait until that has ended, look at "
                "`distill registry list`, then run this command again if it is still wanted"
            ) from exc
        except OSError as exc:
            raise storage_error(exc, registry) from exc
        return


def _serve(registry: Path, events: Ledger[Event], promoted: Promoted, what: Literal["promoted", "rolled back"], reason: str) -> None:
    write_atomic(registry / "current.json", promoted.model_dump_json(indent=2) + "\n")
    # for readers the line above has ended the canary; before it a kill would end the canary and promote nothing
    _end_canary(registry)
    try:
        events.append(_event(promoted, what, reason))
    except StorageError as exc:  # the next writer adds the line
        raise StorageError(f"version {promoted.version} is served now, and the history could not be told: {exc}") from exc


def _event(promoted: Promoted, what: Literal["promoted", "rolled back"], reason: str) -> Event:
    return Event(at=promoted.promoted_at, what=what, version=promoted.version, reason=reason, run=promoted.run, scores=promoted.scores)


def _trial(tried: Canary, served: Promoted, reason: str) -> Event:
    promoted = tried.promoted
    told = f"version {promoted.version} gets {tried.share * 100:g}% of the requests: {reason}"
    return Event(at=promoted.promoted_at, what="canary", version=served.version, reason=told, run=promoted.run, scores=promoted.scores)


def _ended(tried: Promoted | Event, served: Promoted, reason: str) -> Event:
    """That a canary is over: `version` stays what it was, `run` and `scores` are of the canary."""
    return Event(at=now(), what="rolled back", version=served.version, reason=reason, run=tried.run, scores=tried.scores)


def _end_canary(registry: Path) -> None:
    """Remove the pointer, durably. Raises StorageError."""
    file = registry / "canary.json"
    try:
        file.unlink()
        fsync_dir(registry)
    except FileNotFoundError:
        return
    except OSError as exc:
        raise storage_error(exc, file) from exc


def _version_of(registry: Path, digest: str) -> Promoted | None:
    """The whole, undamaged version with this content, if the registry has it."""
    for file in sorted((registry / "versions").glob(f"*-{digest}/promoted.json")):
        with contextlib.suppress(DataError):  # a damaged one is replaced by a new copy
            found = _read(file, Promoted, "promote again")
            if found is not None:
                verify(registry, found)
                return found
    return None


def _read(file: Path, model: type[ContractT], then: str) -> ContractT | None:
    """What a file holds, None where there is none. Raises DataError, whose remedy is to remove the file and `then`."""
    try:
        return model.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise DataError(f"{file}: {exc.strerror}") from exc
    except ValidationError as exc:
        error = exc.errors()[0]
        raise DataError(f"{file}: {'.'.join(map(str, error['loc']))}: {error['msg']}; remove this file and {then}") from exc


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by relative path; empty where there is no folder."""
    return {str(f.relative_to(folder)): sha256_file(f) for f in sorted(folder.rglob("*")) if f.is_file()}
