"""The ledger of one partition of a harvest, on storage that machines share: who works on the partition adds segments of its own."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from shared.contracts import CUT_OFF, Response
from shared.errors import StorageError, storage_error
from shared.harvest.ledger import OK, PARTITIONS, Held, kind_of, parsed
from shared.storage import Storage

OBJECT_EVERY_S = 1.0
"""Objects of a bucket are paid for one by one: a worker adds no more than one a second."""
MOST_TRIES = 5
BASE = "responses.jsonl"


def folder_of(partition: int) -> str:
    return f"{PARTITIONS}/{partition:08d}"


class SegmentLedger:
    """`partitions/00000012/OWNER-000001.jsonl` and so on while it is worked on, `responses.jsonl` in their place when it is done.

    A partition has one owner. One that is taken for dead may still be at work: what it writes goes to segments of its own, and nobody
    waits for it. Of several lines for one key and example the last counts.

    On a file system lines outlive this process from `append` on and the machine from `sync` on; objects in a bucket are never appended
    to, so that there they outlive both from `sync` on, which makes an object of what has come since the last time, once a second at most.
    """

    def __init__(self, storage: Storage, partition: int, owner: str) -> None:
        """Raises StorageError, DataError for a damaged line."""
        self._storage, self._folder, self._owner = storage, folder_of(partition), owner
        self._rows: list[Response] = []
        self._places: dict[str, dict[int, int]] = {}
        """Row numbers by key and the hash of the example's id."""
        self._pending: list[bytes] = []
        self._segments = 0
        self._file: BinaryIO | None = None
        self._end = 0
        self._appending, self._syncing = threading.Lock(), threading.Lock()
        self._synced_at = -math.inf
        self.dirty = self._changed = False
        if before := self._read_in():  # from here on the base is older than every segment
            self._write_base(before)

    def _read_in(self) -> list[str]:
        """Take over what others have written and this one does not have. Returns the segments among it."""
        for _ in range(MOST_TRIES):
            names = [name for name in self._storage.names(self._folder) if f"/{self._owner}-" not in name]
            names.sort(key=lambda name: not name.endswith(f"/{BASE}"))  # the base first
            found = [(name, self._storage.read(name)) for name in names]
            if any(data is None for _, data in found):
                continue  # another owner has put them together meanwhile
            for name, data in found:
                self._enter(row for row in self._lines(name, data or b"") if not self._changed or not self._has(row))
            return [name for name in names if not name.endswith(f"/{BASE}")]
        raise StorageError(f"{self._storage.at(self._folder)}: its files change all the time; is another harvest at work there?")

    def find(self, keys: Sequence[str]) -> dict[tuple[str, int], Held]:
        """See `AnswerLedger.find`."""
        return {(key, example): self._held(place) for key in keys for example, place in self._places.get(key, {}).items()}

    @property
    def empty(self) -> bool:
        return not self._rows

    def twin(self, key: str, cut_off: bool = True) -> Held | None:
        """See `AnswerLedger.twin`."""
        kinds = (OK, CUT_OFF) if cut_off else (OK,)
        found = (self._held(place) for place in self._places.get(key, {}).values())
        return next((held for held in found if held.kind in kinds), None)

    def read(self, held: Held) -> Response:
        return self._rows[held.at]

    def append(self, rows: Sequence[Response]) -> None:
        """Add lines. Raises StorageError; the ledger stays usable."""
        if not rows:
            return
        data = b"".join(row.model_dump_json().encode() + b"\n" for row in rows)
        if self._storage.local:
            self._append(data)
        else:
            with self._appending:
                self._pending.append(data)
        self._enter(rows)
        self.dirty = self._changed = True

    def sync(self, *, soon: bool = True) -> None:
        """Make every line durable; may be called from another thread. `soon`: there will be another call. Raises StorageError."""
        with self._syncing:
            if not self.dirty or (soon and not self._storage.local and time.monotonic() - self._synced_at < OBJECT_EVERY_S):
                return
            self.dirty, self._synced_at = False, time.monotonic()
            with self._appending:
                pending, self._pending = self._pending, []
            try:
                if self._file is not None:
                    os.fsync(self._file.fileno())
                elif pending:
                    self._storage.write(self._next_name(), b"".join(pending))
            except BaseException as exc:
                self.dirty = True
                with self._appending:
                    self._pending = pending + self._pending
                if isinstance(exc, OSError):
                    raise storage_error(exc, Path(self._storage.at(self._folder))) from exc
                raise

    def finish(self) -> None:
        """Put the lines that count in one file and remove the segments, with what another owner has written meanwhile.

        Raises StorageError.
        """
        self.sync(soon=False)
        others = self._read_in()
        mine = [name for name in self._storage.names(self._folder) if f"/{self._owner}-" in name]
        if self._changed or others or not self._rows:
            self._write_base([*others, *mine])

    def close(self) -> None:
        """Make every line durable. Raises StorageError."""
        try:
            self.sync(soon=False)
        finally:
            if self._file is not None:
                self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _append(self, data: bytes) -> None:
        if self._file is None:
            self._file = self._storage.appending(self._next_name())
        size = len(data)
        try:
            while data:  # a disk that is nearly full takes a part
                written = self._file.write(data)
                data = data[written:]
        except OSError as exc:
            with contextlib.suppress(OSError):  # else who reads it leaves the torn line out
                self._file.truncate(self._end)
            raise storage_error(exc, Path(self._storage.at(self._folder))) from exc
        self._end += size

    def _next_name(self) -> str:
        self._segments += 1
        return f"{self._folder}/{self._owner}-{self._segments:06d}.jsonl"

    def _enter(self, rows: Iterable[Response]) -> None:
        for row in rows:
            self._places.setdefault(row.key, {})[hash(row.example_id)] = len(self._rows)
            self._rows.append(row)

    def _held(self, place: int) -> Held:
        row = self._rows[place]
        return Held(0, place, kind_of(row), hash(row.text))

    def _has(self, row: Response) -> bool:
        return hash(row.example_id) in self._places.get(row.key, {})

    def _lines(self, name: str, data: bytes) -> Iterator[Response]:
        path = Path(self._storage.at(name))
        for number, line in enumerate(data.split(b"\n")[:-1], 1):  # what follows the last line feed is a dead owner's torn line
            yield parsed(line, path, number)

    def _write_base(self, segments: Sequence[str]) -> None:
        counting = sorted(place for of_key in self._places.values() for place in of_key.values())
        lines = (self._rows[place].model_dump_json().encode() + b"\n" for place in counting)
        self._storage.write(f"{self._folder}/{BASE}", b"".join(lines))
        for name in segments:
            self._storage.remove(name)
