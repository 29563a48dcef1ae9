"""The ledger of a harvest: answers as JSON Lines in segments, and an index of them on disk, so that memory stays flat."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Protocol, Self

from pydantic import ValidationError

from shared.artifacts import fsync_dir, temporary_name
from shared.contracts import CUT_OFF, Response
from shared.errors import DataError, StorageError, storage_error

SEGMENT_BYTES = 64 * 2**20
INDEX_KIB = 32 * 1024
"""Of the index in memory; the rest of it is in a file that has no name any more."""
READ_AT_ONCE = 20_000
TRIES, AGAIN_S = 5, 0.1
"""Of opening files that are put together meanwhile."""
OK = "ok"
PARTITIONS = "partitions"
"""Where those of a harvest on a cluster are, until their lines are gathered."""
Entry = tuple[bytes, int, int, int, str, int]
"""A row of the index: key, example, file, place, kind, text."""


class Held(NamedTuple):
    """Where the ledger has an answer, and what it is."""

    file: int
    at: int
    kind: str
    """ok, cut_off, or the class of a failure."""
    text: int
    """The hash of its text, as this process makes it."""


def kind_of(row: Response) -> str:
    """ok, cut_off for an answer that ended at the token limit, or the class of a failure."""
    if row.status == "failed":
        return (row.reason or "unanswered").partition(":")[0]
    return CUT_OFF if row.finish_reason == "length" else OK


class Answers(Protocol):
    """What a harvest needs of its ledger."""

    dirty: bool
    """Whether there is anything to `sync`."""

    @property
    def empty(self) -> bool: ...
    def find(self, keys: Sequence[str]) -> dict[tuple[str, int], Held]: ...
    def twin(self, key: str, cut_off: bool = True) -> Held | None: ...
    def read(self, held: Held) -> Response: ...
    def append(self, rows: Sequence[Response]) -> None: ...
    def sync(self) -> None: ...


class AnswerReader:
    """The answers a ledger has when it is opened, whoever goes on writing it: nothing is locked, mended or written there.

    Of several lines for one key and example the last counts. A torn tail is left out: it is being written, or a crash has cut it short.
    """

    def __init__(self, folder: Path, stem: str = "responses") -> None:
        """Raises StorageError where something cannot be read, DataError for a damaged line."""
        self._begin(folder, stem)
        self._ends: list[int] = []
        """Of what each file had."""
        try:
            self._open_all()
            self._index = _new_index("")  # a file of SQLite's own, among the machine's temporary ones
            self._ends = [self._read_in(number, self._readers[number]) for number in range(len(self._files))]
        except OSError as exc:
            self._close_files()
            raise StorageError(f"{folder}: cannot be read: {exc.strerror or exc}; give this user the right to, or a copy") from exc
        except sqlite3.Error as exc:
            self._close_files()
            raise self._no_index(exc) from exc
        except BaseException:
            self._close_files()
            raise

    def _begin(self, folder: Path, stem: str) -> None:
        self.folder, self._stem = folder, stem
        self.superseded = 0
        self._files: list[Path] = []
        self._readers: dict[int, BinaryIO] = {}

    def find(self, keys: Sequence[str]) -> dict[tuple[str, int], Held]:
        """What the ledger has of some keys, by key and the hash of the example's id; in one go, which costs a third of one by one."""
        marks = ",".join("?" * len(keys))
        query = f"SELECT key, example, file, at, kind, text FROM rows WHERE key IN ({marks})"
        by_short = {_short(key): key for key in keys}
        found = self._index.execute(query, [_short(key) for key in keys])
        return {(by_short[key], example): Held(file, at, kind, text) for key, example, file, at, kind, text in found}

    @property
    def empty(self) -> bool:
        return self._index.execute("SELECT 1 FROM rows LIMIT 1").fetchone() is None

    def twin(self, key: str, cut_off: bool = True) -> Held | None:
        """An answer that another example has had to the same request; `cut_off`: such a one will do as well."""
        query = "SELECT file, at, kind, text FROM rows WHERE key = ? AND kind IN (?, ?)"
        found = self._index.execute(query, (_short(key), OK, CUT_OFF if cut_off else OK)).fetchone()
        return Held(*found) if found else None

    def read(self, held: Held) -> Response:
        """The row at a place. Raises StorageError."""
        try:
            file = self._file(held.file)
            file.seek(held.at)
            return Response.model_validate_json(file.readline())
        except OSError as exc:
            raise storage_error(exc, self._files[held.file]) from exc

    def rows(self) -> Iterator[Response]:
        """The rows that count, in the order in which they came. Raises DataError, StorageError."""
        return (row for _, row in self._lines())

    def close(self) -> None:
        self._close_files()
        self._index.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _open_all(self) -> None:
        """All files, before they are read: they may be put together and removed at any time."""
        for tries_left in reversed(range(TRIES)):
            self._files = answer_files(self.folder, self._stem)
            try:
                for number, path in enumerate(self._files):
                    self._readers[number] = path.open("rb")
                return
            except FileNotFoundError:
                self._close_files()
                if not tries_left:
                    raise
                time.sleep(AGAIN_S)

    def _file(self, number: int) -> BinaryIO:
        return self._readers[number]

    def _read_in(self, number: int, file: BinaryIO) -> int:
        """Enter all whole lines of a file into the index. Returns how many bytes they have."""
        end, entries = 0, []
        for count, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            entries.append(self._entry(parsed(line, self._files[number], count), number, end))
            end += len(line)
            if len(entries) == READ_AT_ONCE:
                self._enter(sorted(entries))
                entries = []
        self._enter(sorted(entries))  # neighbours in the index one after the other
        return end

    def _entry(self, row: Response, number: int, at: int) -> Entry:
        # Python's own hash: this index dies with this process
        return _short(row.key), hash(row.example_id), number, at, kind_of(row), hash(row.text)

    def _enter(self, entries: Sequence[Entry]) -> None:
        try:
            before = self._index.total_changes
            self._index.executemany("INSERT OR IGNORE INTO rows VALUES (?, ?, ?, ?, ?, ?)", entries)
            if self._index.total_changes - before < len(entries):  # some are there already: the last counts
                self._index.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?, ?, ?)", entries)
                self.superseded += 1
        except sqlite3.Error as exc:
            raise self._no_index(exc) from exc

    def _no_index(self, exc: sqlite3.Error) -> StorageError:
        return StorageError(f"{self.folder}: the index of the answers: {exc}; see to space and rights there and run the same command again")

    def _lines(self) -> Iterator[tuple[bytes, Response]]:
        for number, path in enumerate(self._files):
            at = count = 0
            try:
                while at < self._ends[number]:
                    file = self._file(number)
                    file.seek(at)  # `read` may have been elsewhere in between
                    line, count = file.readline(), count + 1
                    row = parsed(line, path, count)
                    if not self.superseded or self._counts(row, number, at):
                        yield line, row
                    at += len(line)
            except OSError as exc:
                raise storage_error(exc, path) from exc

    def _counts(self, row: Response, number: int, at: int) -> bool:
        place = self._index.execute("SELECT file, at FROM rows WHERE key = ? AND example = ?", (_short(row.key), hash(row.example_id)))
        return bool(place.fetchone() == (number, at))

    def _close_files(self) -> None:
        for file in self._readers.values():
            file.close()
        self._readers = {}


class AnswerLedger(AnswerReader):
    """`STEM-000001.jsonl` and so on in a folder while a harvest is under way, `STEM.jsonl` once it is compacted; one writer at a time.

    Of several lines for one key and example the last counts. Opening repairs torn tails: what a crash cut short is asked for again.
    Lines outlive this process from `append` on and the machine from `sync` on.
    """

    def __init__(self, folder: Path, stem: str = "responses", *, segment_bytes: int = SEGMENT_BYTES) -> None:
        """Raises StorageError where another writer is at work or nothing can be written, DataError for a damaged line."""
        self._begin(folder, stem)
        self._segment_bytes, self.base = segment_bytes, folder / f"{stem}.jsonl"
        self.repaired_bytes = 0
        self.dirty = False
        self._segment: BinaryIO | None = None
        self._syncing = threading.Lock()
        self._end = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / f".{stem}.lock").open("ab")
        except OSError as exc:
            raise storage_error(exc, folder) from exc
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for leftover in folder.glob(f".{stem}.*.tmp"):  # of a process that was killed
                leftover.unlink(missing_ok=True)
            index = temporary_name(folder / f"{stem}.index")
            index.unlink(missing_ok=True)
            self._index = _new_index(index)
            index.unlink()  # it lives as long as this process has it open
            self._files = answer_files(folder, stem)
            for number in range(len(self._files)):
                self._mend(number)
        except BlockingIOError as exc:
            self._lock.close()
            raise StorageError(f"{self.base}: another process is writing this ledger; wait for it or end it") from exc
        except OSError as exc:
            self._lock.close()
            raise storage_error(exc, folder) from exc
        except sqlite3.Error as exc:
            self._lock.close()
            raise self._no_index(exc) from exc
        except BaseException:
            self._lock.close()
            raise

    def append(self, rows: Sequence[Response]) -> None:
        """Add lines, all of them whole or none. Raises StorageError; the ledger stays usable."""
        if not rows:
            return
        lines = [row.model_dump_json().encode() + b"\n" for row in rows]
        data = b"".join(lines)
        segment = self._room()
        try:
            left = data
            while left:  # a disk that is nearly full takes a part
                left = left[segment.write(left) :]
        except OSError as exc:
            with contextlib.suppress(OSError):  # else the next opening repairs it
                segment.truncate(self._end)
            raise storage_error(exc, self._files[-1]) from exc
        self.dirty = True
        places = []
        for row, line in zip(rows, lines, strict=True):
            places.append(self._entry(row, len(self._files) - 1, self._end))
            self._end += len(line)
        self._enter(places)

    def sync(self) -> None:
        """Make every appended line durable; may be called from another thread. Raises StorageError."""
        with self._syncing:  # else the segment might be closed meanwhile
            if not self.dirty or self._segment is None:
                return
            self.dirty = False  # before: what is appended meanwhile is for the next time
            try:
                os.fsync(self._segment.fileno())
            except OSError as exc:
                self.dirty = True
                raise storage_error(exc, self._files[-1]) from exc

    def compact(self) -> Path:
        """Put the lines that count into one file, atomically, remove the segments and close the ledger. Returns the file's path.

        Raises StorageError.
        """
        self.sync()
        self._close_files()
        segments = [path for path in self._files if path != self.base]
        try:
            if segments or self.superseded or not self.base.exists():
                if len(segments) == len(self._files) == 1 and not self.superseded:
                    os.replace(segments[0], self.base)
                else:
                    self._write_base()
                fsync_dir(self.folder)
                for path in segments:
                    path.unlink(missing_ok=True)
        except OSError as exc:
            raise storage_error(exc, self.base) from exc
        self.close()
        return self.base

    def close(self) -> None:
        """Make every line durable and let the next writer in."""
        try:
            self.sync()
        finally:
            self._close_files()
            self._index.close()
            self._lock.close()

    def _file(self, number: int) -> BinaryIO:
        reader = self._readers.get(number)
        if reader is None:
            reader = self._readers[number] = self._files[number].open("rb")
        return reader

    def _mend(self, number: int) -> None:
        """Enter all lines of a file into the index; cut what follows the last line feed."""
        with self._files[number].open("rb+") as file:
            self._end = self._read_in(number, file)
            if torn := file.seek(0, os.SEEK_END) - self._end:
                self.repaired_bytes += torn
                file.truncate(self._end)

    def _room(self) -> BinaryIO:
        """The segment to append to: the last one, unless it is full."""
        if self._segment is not None and self._end < self._segment_bytes:
            return self._segment
        if self._segment is not None:
            self.sync()
            with self._syncing:
                self._segment.close()
                self._segment = None
        try:
            if not self._files or self._files[-1] == self.base or self._end >= self._segment_bytes:
                last = 0 if not self._files or self._files[-1] == self.base else int(self._files[-1].stem.rpartition("-")[2])
                self._files.append(self.folder / f"{self._stem}-{last + 1:06d}.jsonl")
                self._end = 0
            # unbuffered: what a full disk refused is known line by line, and a killed process holds nothing back
            segment = self._files[-1].open("ab", buffering=0)
            fsync_dir(self.folder)
        except OSError as exc:
            raise storage_error(exc, self.folder) from exc
        self._segment = segment
        return segment

    def _lines(self) -> Iterator[tuple[bytes, Response]]:
        for number, path in enumerate(self._files):
            at = 0
            try:
                with path.open("rb") as file:
                    for count, line in enumerate(file, 1):
                        row = parsed(line, path, count)
                        if not self.superseded or self._counts(row, number, at):
                            yield line, row
                        at += len(line)
            except OSError as exc:
                raise storage_error(exc, path) from exc

    def _write_base(self) -> None:
        temporary = temporary_name(self.base)
        try:
            with temporary.open("wb") as out:
                if self.superseded:
                    out.writelines(line for line, _ in self._lines())
                else:
                    for path in self._files:
                        with path.open("rb") as file:
                            shutil.copyfileobj(file, out, 2**20)
                out.flush()
                os.fsync(out.fileno())
            os.replace(temporary, self.base)
        finally:
            temporary.unlink(missing_ok=True)

    def _close_files(self) -> None:
        super()._close_files()
        if self._segment is not None:
            self._segment.close()
            self._segment = None


def answer_files(folder: Path, stem: str = "responses") -> list[Path]:
    """The files of a ledger in the order in which they were written; none if it has not begun."""
    base = folder / f"{stem}.jsonl"
    return [*([base] if base.is_file() else []), *sorted(folder.glob(f"{stem}-{'[0-9]' * 6}.jsonl"))]


def kinds(folder: Path, stem: str = "responses") -> dict[tuple[str, str], str]:
    """What a ledger and the partitions of one (segments.py) have, read without disturbing their writers: key and example id to kind.

    Raises DataError.
    """
    for _ in range(TRIES):
        with contextlib.suppress(FileNotFoundError):  # the segments were compacted in between
            return _read_kinds(_all_files(folder, stem))
        time.sleep(AGAIN_S)
    return _read_kinds(_all_files(folder, stem))


def _all_files(folder: Path, stem: str) -> list[Path]:
    parts = folder.glob(f"{PARTITIONS}/*/*.jsonl")
    return [*answer_files(folder, stem), *sorted(parts, key=lambda path: (path.parent, path.name != f"{stem}.jsonl", path))]


def _read_kinds(files: Sequence[Path]) -> dict[tuple[str, str], str]:
    found = {}
    for path in files:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n"):  # one that is being written waits for its end
                    row = parsed(line, path, number)
                    found[row.key, row.example_id] = kind_of(row)
    return found


def _new_index(path: str | Path) -> sqlite3.Connection:
    """A table of the rows by key. It is made anew from the lines at every opening: nothing to repair, nothing to keep in step."""
    index = sqlite3.connect(path, isolation_level=None)
    index.execute("PRAGMA journal_mode = OFF")
    index.execute("PRAGMA synchronous = OFF")
    index.execute("PRAGMA locking_mode = EXCLUSIVE")
    index.execute(f"PRAGMA cache_size = -{INDEX_KIB}")
    index.execute(
        "CREATE TABLE rows (key BLOB, example INTEGER, file INTEGER, at INTEGER, kind TEXT, text INTEGER, PRIMARY KEY (key, example))"
        " WITHOUT ROWID"
    )
    index.execute("BEGIN")  # for good: it is never committed, since it is never read again
    return index


def _short(key: str) -> bytes:
    return bytes.fromhex(key[:32])


def parsed(line: bytes, path: Path, number: int) -> Response:
    try:
        row = Response.model_validate_json(line)
        _short(row.key)
    except ValidationError as exc:
        error = exc.errors()[0]
        field = ".".join(map(str, error["loc"]))
        raise DataError(f"{path}, line {number}: {field + ': ' if field else ''}{error['msg']}") from exc
    except ValueError as exc:
        raise DataError(f"{path}, line {number}: key: not a SHA-256 in hex") from exc
    return row
