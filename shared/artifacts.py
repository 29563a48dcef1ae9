"""Run directories, ledgers, atomic files and manifests: the only place that writes run files.

A file exists only when complete, a ledger line only when durable, a manifest only when everything it names does.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from pydantic import BaseModel, ValidationError

from shared.contracts import Contract, FileRef, Manifest
from shared.errors import DataError, RunMismatch, StageOrder, StorageError, storage_error
from shared.settings import PROCEDURE, Recipe

FORMAT = 3
"""Of run directories. 2: keys of answers without the example, ledgers in segments. 3: a folder of checkpoints a round. A run.json that
names none is of format 1."""
RECORDED_PACKAGES = (
    "torch", "transformers", "trl", "peft", "ctranslate2", "rouge_score", "nltk", "sacrebleu", "numpy", "httpx", "pydantic"
)  # fmt: skip
ANOTHER_RUN = "give another --out (with compose: RUN=name)"
LOST_AND_FOUND = "lost+found"
"""What a fresh file system holds: a volume with nothing else is empty."""
ASKED = {"teacher": "responses/teacher", "harvest": "responses/teacher", "sample": "responses/student-r0"}
"""Sections of a recipe that shape nothing but answers -> the stage of these: until it has one, they may be mended."""
MADE_BY = {
    "dataset": "prepare",
    "responses/teacher": "harvest",
    "responses/student-r0": "sample",
    "responses": "train",  # those of later rounds
    "triplets": "triplets",
    "checkpoints": "train",
    "model": "export",
    "evaluation": "evaluate",
}
"""Stages, or the first part of their names, and the commands that complete them."""
_LOCKED: dict[Path, int] = {}
"""Lock files this process holds, with their handles: a stage may be opened several times in one process, not in two."""
T = TypeVar("T", bound=Contract)


def now() -> str:
    """UTC, ISO 8601, in milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Raises DataError for a file that cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise DataError(f"{path}: {exc.strerror}") from exc


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: the form in which values are hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write all of `data` to `path`, durably, or leave what was there. Raises StorageError."""
    if isinstance(data, str):
        data = data.encode()
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_dir(path.parent)
    except OSError as exc:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise storage_error(exc, path) from exc


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[BaseModel]) -> None:
    write_atomic(path, "".join(row.model_dump_json() + "\n" for row in rows))


def read_jsonl(path: Path, model: type[T]) -> list[T]:
    """All rows of a JSON Lines file. Raises DataError that names the line and the field."""
    rows = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    rows.append(model.model_validate_json(line))
                except ValidationError as exc:
                    error = exc.errors()[0]
                    raise DataError(f"{path}, line {number}: {'.'.join(map(str, error['loc']))}: {error['msg']}") from exc
    except OSError as exc:
        raise DataError(f"{path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise DataError(f"{path}, line {len(rows) + 1} or later: not UTF-8: {exc.reason}") from exc
    return rows


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill that takes the place of `path`, whole, when the block ends without an error.

    What a kill leaves under the name `path` is the old directory, the new one or none, and never a part of one. What must always be there
    is a file, which `os.replace` changes at once. Raises StorageError.
    """
    temporary, old = temporary_name(path), temporary_name(path.with_name(f"{path.name}.old"))
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if path.exists():
            path.rename(old)
        try:
            os.replace(temporary, path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
        fsync_dir(path.parent)
    except OSError as exc:
        raise storage_error(exc, path) from exc
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def make_once(out: Path, last: str, make: Callable[[Path], object]) -> Path:
    """The folder `out` of a shared cache, made with `make` unless it holds `last`, the file that is written last. Returns `out`.

    What is there is used without a lock. Raises as `alone_in` does.
    """
    if not (out / last).exists():
        with alone_in(out.parent):
            if not (out / last).exists():
                make(out)
    return out


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process makes anything in a folder of a shared cache, and sweep away what killed ones left half done.

    Raises StorageError where the folder cannot be written to, as in a container that is only to read what `distill prepare` has made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as exc:
        raise StorageError(
            f"what is missing in {folder} cannot be made here ({exc.strerror}); run `distill prepare` with the same recipe first, where "
            "this cache may be written"
        ) from exc
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for leftover in folder.glob(".*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield
    finally:
        os.close(handle)


def fsync_dir(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Ledger(Generic[T]):
    """An append-only JSON Lines file of one kind of contract; one writer at a time.

    Opening repairs a torn tail: a last line that a crash cut short is removed, and is asked for again. Lines outlive this
    process from `append` on and the machine from `sync` on, which `append` calls when `sync_every_s` seconds have passed.
    """

    def __init__(self, path: Path, model: type[T], *, sync_every_s: float = 0.2) -> None:
        self.path, self._model, self._every = path, model, sync_every_s
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # unbuffered: what a full disk refused is known line by line, and a killed process holds nothing back
            self._file = path.open("ab+", buffering=0)
        except OSError as exc:
            raise storage_error(exc, path) from exc
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fsync_dir(path.parent)
            self.repaired_bytes = self._repair()
        except BlockingIOError as exc:
            self._file.close()
            raise StorageError(f"{path}: another process is writing this ledger; wait for it or end it") from exc
        except OSError as exc:
            self._file.close()
            raise storage_error(exc, path) from exc
        self._dirty, self._synced_at = False, time.monotonic()

    def _repair(self) -> int:
        """Cut what follows the last line feed. Returns the bytes cut."""
        size = end = self._file.seek(0, os.SEEK_END)
        while end > 0:  # back to the last line feed, in blocks
            start = max(0, end - 65536)
            cut = os.pread(self._file.fileno(), end - start, start).rfind(b"\n")
            if cut >= 0:
                end = start + cut + 1
                break
            end = start
        if end < size:
            self._file.truncate(end)
        return size - end

    def rows(self) -> list[T]:
        """All lines. Raises DataError for a line that is not what this ledger holds."""
        return read_jsonl(self.path, self._model)

    def append(self, row: T) -> None:
        """Add one line, whole or not at all. Raises StorageError; the ledger stays usable."""
        line = row.model_dump_json().encode() + b"\n"
        end = os.fstat(self._file.fileno()).st_size
        try:
            while line:  # a disk that is nearly full takes a part
                line = line[self._file.write(line) :]
        except OSError as exc:
            with contextlib.suppress(OSError):  # else the next opening repairs it
                self._file.truncate(end)
            raise storage_error(exc, self.path) from exc
        self._dirty = True
        if time.monotonic() - self._synced_at >= self._every:
            self.sync()

    def sync(self) -> None:
        """Make every appended line durable. Raises StorageError."""
        if self._dirty:
            try:
                os.fsync(self._file.fileno())
            except OSError as exc:
                raise storage_error(exc, self.path) from exc
        self._dirty, self._synced_at = False, time.monotonic()

    def close(self) -> None:
        """Make every line durable and let the next writer in."""
        try:
            if not self._file.closed:
                self.sync()
        finally:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Run:
    """A directory that belongs to one recipe."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path, self.recipe = path, recipe

    @classmethod
    def open(cls, path: Path, recipe: Recipe) -> Run:
        """Open or begin a run.

        Raises RunMismatch that shows each setting that differs from the run's own, or for a directory that this version cannot use.
        """
        mine, file = recipe.model_dump(mode="json"), path / "run.json"
        fresh = {"format": FORMAT, "recipe": mine, "created_at": now()}
        if file.exists():
            theirs = _recorded_recipe(file)
            differences = {key: values for key, values in _compare(theirs, mine).items() if not key.startswith(PROCEDURE)}
            # an earlier command failed before its first stage did anything, or before the first answer that these settings shape
            if differences and (_is_unused(path) or all(_shapes_nothing_yet(path, key) for key in differences)):
                write_json(file, fresh)
            elif differences:
                told = [f"{key}: the run has {theirs!r}, you ask for {mine!r}" for key, (theirs, mine) in differences.items()]
                raise RunMismatch(f"{path} belongs to a run with other settings; {ANOTHER_RUN}, or ask for the same: " + "; ".join(told))
        else:
            if path.exists() and (not path.is_dir() or not all(e.name == LOST_AND_FOUND or _is_temporary(e) for e in path.iterdir())):
                raise RunMismatch(f"{path} exists, is not empty and is no run directory (it has no run.json); {ANOTHER_RUN}")
            write_json(file, fresh)
        return cls(path, recipe)

    def stage(self, name: str, inputs: Sequence[str] = ()) -> Stage:
        """A stage that reads the outputs of the stages named in `inputs`. Raises StageOrder if one of them is not complete."""
        for other in inputs:
            if not (self.path / other / "manifest.json").exists():
                raise StageOrder(f"{name} reads {other}/, which {self.path} does not have yet: run `distill {_made_by(other)}` first")
        stage = Stage(self, name, tuple(inputs))
        if name in ASKED.values():
            Run.open(self.path, self.recipe)  # until this process had the stage, another one might begin with other settings
        return stage

    def manifest(self, name: str) -> Manifest | None:
        """The manifest of a complete stage, else None."""
        file = self.path / name / "manifest.json"
        try:
            return Manifest.model_validate_json(file.read_bytes()) if file.exists() else None
        except ValidationError as exc:
            raise DataError(f"{file}: not a readable manifest; remove it and run its stage again") from exc


def _made_by(stage: str) -> str:
    """The command that completes a stage."""
    return MADE_BY.get(stage) or MADE_BY.get(stage.partition("/")[0], "COMMAND")


def _shapes_nothing_yet(run: Path, setting: str) -> bool:
    """Whether all that a setting shapes are answers of a stage that has no line yet, and that no other process is at work on."""
    name = ASKED.get(setting.partition(".")[0])
    if name is None or _is_taken(run / ".locks" / name.replace("/", "-")):
        return False
    files = [file for file in (run / name).rglob("*") if file.is_file()]
    # cluster.json: a harvest on a cluster, whose answers may be in a bucket
    return not any(file.name in ("manifest.json", "cluster.json") or (file.suffix == ".jsonl" and file.stat().st_size) for file in files)


def _is_unused(run: Path) -> bool:
    """Whether a run directory holds nothing yet that its settings have shaped."""
    return all(entry.name in ("run.json", ".locks", "teacher.log", LOST_AND_FOUND) or _is_temporary(entry) for entry in run.iterdir())


class Stage:
    """One stage of a run: the folder RUN/NAME, complete when its manifest says so and its inputs are still the same.

    Opened once, no other process can open it before this one ends: StorageError.
    """

    def __init__(self, run: Run, name: str, inputs: tuple[str, ...]) -> None:
        self.run, self.name, self._reads = run, name, inputs
        self.path = run.path / name
        self._started, self._started_at = time.monotonic(), now()
        _lock(run.path / ".locks" / name.replace("/", "-"), f"the stage {name} of {run.path}")

    @property
    def complete(self) -> bool:
        """Whether this stage has finished on exactly the inputs that stand there now."""
        manifest = self.run.manifest(self.name)
        return manifest is not None and manifest.inputs == self.inputs and all(self._stands(output) for output in manifest.outputs)

    def _stands(self, output: FileRef) -> bool:
        file = self.run.path / output.path
        return file.is_file() and file.stat().st_size == output.bytes

    def finish(self, outputs: Sequence[Path], *, settings: Mapping[str, Any], counts: Mapping[str, Any] | None = None) -> Manifest:
        """Write the manifest, last. `outputs`: files or folders below the run directory."""
        files: list[Path] = []
        for output in outputs:
            # what begins with a dot is a lock, or was left half written
            inside = sorted(path for path in output.rglob("*") if path.is_file() and not path.name.startswith("."))
            files += inside if output.is_dir() else [output]
        manifest = Manifest(
            stage=self.name,
            inputs=self.inputs,
            outputs=tuple(self._ref(f) for f in files),
            settings=dict(settings),
            counts=dict(counts or {}),
            versions=versions(),
            started_at=self._started_at,
            seconds=round(time.monotonic() - self._started, 3),
        )
        write_atomic(self.path / "manifest.json", manifest.model_dump_json(indent=2) + "\n")
        return manifest

    def refuse_changed_inputs(self) -> None:
        """Raises DataError if a file that this stage reads is no longer the one that its own stage wrote, and whose hash is passed on."""
        for name in self._reads:
            manifest = self.run.manifest(name)
            for ref in manifest.outputs if manifest else ():
                file = self.run.path / ref.path
                if not self._stands(ref) or sha256_file(file) != ref.sha256:
                    raise DataError(
                        f"{file} is not what `distill {_made_by(name)}` wrote: its size or SHA-256 is not the one in {name}/manifest.json. "
                        f"Restore it, or remove that manifest.json and run `distill {_made_by(name)}` again"
                    )

    def _ref(self, file: Path) -> FileRef:
        return FileRef(path=str(file.relative_to(self.run.path)), sha256=sha256_file(file), bytes=file.stat().st_size)

    @property
    def inputs(self) -> tuple[FileRef, ...]:
        """The recorded outputs of every input stage (their hashes chain, so a model traces back to every answer)."""
        refs: list[FileRef] = []
        for name in self._reads:
            manifest = self.run.manifest(name)
            refs += manifest.outputs if manifest else ()
        return tuple(refs)


def _lock(path: Path, what: str) -> None:
    """Lock `path` for this process until it ends, however it ends. Raises StorageError that names the process that has it."""
    path = path.absolute()
    if path in _LOCKED:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)  # less what the umask forbids
    except OSError as exc:
        raise storage_error(exc, path) from exc
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        holder = os.read(handle, 256).decode(errors="replace").strip()
        os.close(handle)
        raise StorageError(f"process {holder or '?'} is at work on {what}; wait for it or end it") from exc
    with contextlib.suppress(OSError):  # who holds it is a courtesy, for which a full disk may have no room
        os.ftruncate(handle, 0)
        # a pid alone means nothing to another container
        os.pwrite(handle, f"{os.getpid()} on {platform.node()}".encode(), 0)
    _LOCKED[path] = handle


def _is_taken(path: Path) -> bool:
    """Whether another process has locked `path`."""
    if path.absolute() in _LOCKED or not path.exists():
        return False
    with path.open("rb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _recorded_recipe(file: Path) -> Any:
    content = read_json(file)
    if isinstance(content, dict) and ("format" in content or "recipe" in content):
        refuse_other_format(file, content, FORMAT, ANOTHER_RUN)
    try:
        return content["recipe"]
    except (KeyError, TypeError) as exc:
        raise DataError(f"{file}: no recipe in it; it is damaged, {ANOTHER_RUN}") from exc


def refuse_other_format(file: Path, content: Any, ours: int, otherwise: str) -> None:
    """Return if the format that a file names (none: 1) is ours. Raises RunMismatch."""
    theirs = content.get("format", 1) if isinstance(content, dict) else 1
    if theirs != ours:
        raise RunMismatch(
            f"{file}: format {theirs}, and this version reads and writes format {ours}; use the one that wrote it, or {otherwise}"
        )


def temporary_name(path: Path) -> Path:
    """Where to write what shall become `path`: a name that no other process has, in this container or another."""
    return path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")


def _is_temporary(path: Path) -> bool:
    """Whether a killed process may have left this behind while writing a file of another name."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def read_json(path: Path) -> Any:
    """Raises DataError."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as exc:
        raise DataError(f"{path}: {exc}") from exc


def versions() -> dict[str, str]:
    """Python, this package and the libraries that can change a result, as installed."""
    found = {"python": platform.python_version()}
    for package in ("blackbox-distill", *RECORDED_PACKAGES):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _compare(theirs: Any, mine: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted(theirs.keys() | mine.keys()):
            found |= _compare(theirs.get(key), mine.get(key), f"{prefix}.{key}" if prefix else key)
        return found
    return {} if theirs == mine else {prefix: (theirs, mine)}
