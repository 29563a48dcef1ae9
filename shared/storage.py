"""Files that several machines share: a folder on a shared file system, or a bucket (whatever pyarrow or fsspec reads)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

from shared.artifacts import temporary_name
from shared.commands import install
from shared.errors import SettingsError, storage_error

FSSPEC = "install the file system's package, e.g. pip install s3fs"


class Storage:
    """A folder by its path or URI; names in it have / between their parts. It can be sent to other processes."""

    def __init__(self, uri: str, folder: str = "") -> None:
        """`folder`: below it, for all names.

        Raises SettingsError for a URI that no file system is known for, or where pyarrow is missing.
        """
        self.uri = uri if "://" in uri else os.path.abspath(uri)  # elsewhere it would be relative to something else
        self._folder = folder
        self._connect()

    def _connect(self) -> None:
        try:
            from pyarrow import fs
        except ImportError as exc:
            raise SettingsError(f"storage that machines share needs pyarrow: {install('cluster')}") from exc
        self._fs: Any
        if "://" not in self.uri:
            self._fs, self._root = fs.LocalFileSystem(), os.path.join(self.uri, self._folder).rstrip("/")
            self.local = True
            return
        try:
            self._fs, self._root = fs.FileSystem.from_uri(self.uri)
        except (ValueError, OSError) as exc:
            try:
                import fsspec

                found, self._root = fsspec.core.url_to_fs(self.uri)
            except (ImportError, ValueError) as other:
                raise SettingsError(f"{self.uri}: {exc}; {other}: {FSSPEC}") from exc
            self._fs = fs.PyFileSystem(fs.FSSpecHandler(found))
        self._root = f"{self._root.rstrip('/')}/{self._folder}".rstrip("/")
        self.local = isinstance(self._fs, fs.LocalFileSystem)

    def __getstate__(self) -> tuple[str, str]:
        return self.uri, self._folder

    def __setstate__(self, state: tuple[str, str]) -> None:
        self.uri, self._folder = state
        self._connect()

    def at(self, name: str) -> str:
        """The path of a file as its file system knows it."""
        return f"{self._root}/{name}"

    def read(self, name: str) -> bytes | None:
        """The content of a file; None where there is none. Raises StorageError."""
        try:
            with self._fs.open_input_stream(self.at(name)) as file:
                return bytes(file.read())
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise storage_error(exc, Path(self.at(name))) from exc

    def range(self, name: str, start: int, size: int) -> bytes:
        """A part of a file. Raises StorageError."""
        try:
            with self._fs.open_input_file(self.at(name)) as file:
                return bytes(file.read_at(size, start))
        except OSError as exc:
            raise storage_error(exc, Path(self.at(name))) from exc

    def write(self, name: str, data: bytes) -> None:
        """A file, whole or not at all. Raises StorageError."""
        path = Path(self.at(name))
        try:
            if not self.local:
                with self._fs.open_output_stream(self.at(name)) as file:  # an object appears when it is complete
                    file.write(data)
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = temporary_name(path)
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as exc:
            raise storage_error(exc, path) from exc

    def appending(self, name: str) -> BinaryIO:
        """A new file to append to, unbuffered; only where `local`. Raises StorageError."""
        path = Path(self.at(name))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("ab", buffering=0)
        except OSError as exc:
            raise storage_error(exc, path) from exc

    def has(self, name: str) -> bool:
        """Whether there is such a file. Raises StorageError."""
        try:
            return bool(self._fs.get_file_info(self.at(name)).is_file)
        except OSError as exc:
            raise storage_error(exc, Path(self.at(name))) from exc

    def names(self, folder: str) -> list[str]:
        """The files of a folder, sorted; none where there is no folder. Raises StorageError."""
        from pyarrow import fs

        try:
            found = self._fs.get_file_info(fs.FileSelector(self.at(folder), allow_not_found=True))
        except OSError as exc:
            raise storage_error(exc, Path(self.at(folder))) from exc
        return sorted(f"{folder}/{info.base_name}" for info in found if info.is_file)

    def remove(self, name: str) -> None:
        """Raises StorageError; it is no error where there is none."""
        try:
            self._fs.delete_file(self.at(name))
        except FileNotFoundError:
            pass
        except OSError as exc:
            raise storage_error(exc, Path(self.at(name))) from exc

    def discard(self, folder: str) -> None:
        """Remove a folder with all below it, if it is there. Raises StorageError."""
        try:
            self._fs.delete_dir(self.at(folder).rstrip("/"))
        except FileNotFoundError:
            pass
        except OSError as exc:
            raise storage_error(exc, Path(self.at(folder))) from exc
