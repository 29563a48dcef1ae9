"""Ledgers: whole lines only, whatever happens to the process or the disk."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.artifacts import Ledger
from shared.contracts import Prediction
from shared.errors import DataError, StorageError


def row(number: int, text: str = "t") -> Prediction:
    return Prediction(system="s", example_id=str(number), text=text)


def ids(path: Path) -> list[str]:
    return [json.loads(line)["example_id"] for line in path.read_text().splitlines()]


def child(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": os.getcwd()})


def test_rows_come_back_in_the_order_of_their_appending_and_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "l.jsonl"
    with Ledger(path, Prediction) as ledger:
        ledger.append(row(0, "an ä\nand a \r and a \u2028 inside"))
        ledger.append(row(1))
        assert ledger.rows() == [row(0, "an ä\nand a \r and a \u2028 inside"), row(1)]
    with Ledger(path, Prediction) as ledger:
        assert ledger.repaired_bytes == 0
        ledger.append(row(2))
        assert [r.example_id for r in ledger.rows()] == ["0", "1", "2"]


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, 200_000])
def test_a_torn_tail_of_any_size_is_cut_and_nothing_else(tmp_path: Path, size: int) -> None:
    path = tmp_path / "l.jsonl"
    with Ledger(path, Prediction) as ledger:
        ledger.append(row(0))
    with path.open("ab") as file:
        file.write(b"x" * size)
    with Ledger(path, Prediction) as ledger:
        assert ledger.repaired_bytes == size
        ledger.append(row(1))
    assert ids(path) == ["0", "1"]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=40), max_size=6), data=st.data())
def test_a_file_cut_at_any_byte_opens_with_exactly_the_lines_before_the_cut(tmp_path: Path, texts: list[str], data: st.DataObject) -> None:
    path = tmp_path / "l.jsonl"
    path.unlink(missing_ok=True)
    rows = [row(number, text) for number, text in enumerate(texts)]
    with Ledger(path, Prediction) as ledger:
        for r in rows:
            ledger.append(r)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    with Ledger(path, Prediction) as ledger:
        assert ledger.rows() == rows[: whole[:cut].count(b"\n")]


def test_a_file_that_is_one_torn_line_opens_empty(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_bytes(b'{"system"')
    with Ledger(path, Prediction) as ledger:
        assert ledger.rows() == []
        assert ledger.repaired_bytes == 9


def test_a_second_writer_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    with Ledger(path, Prediction) as ledger:
        ledger.append(row(0))
        other = child(
            """
            import sys
            from pathlib import Path
            from shared.artifacts import Ledger
            from shared.contracts import Prediction
            from shared.errors import StorageError
            try:
                Ledger(Path(sys.argv[1]), Prediction)
            except StorageError as exc:
                print(exc)
            """,
            path,
        )
        assert "another process is writing this ledger" in other.stdout
        ledger.append(row(1))
    assert ids(path) == ["0", "1"]
    Ledger(path, Prediction).close()


def test_a_line_that_is_something_else_is_named_by_file_and_number(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text(row(0).model_dump_json() + '\n{"system": "s"}\n')
    with Ledger(path, Prediction) as ledger, pytest.raises(DataError, match=r"l\.jsonl, line 2: example_id"):
        ledger.rows()


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        Ledger(tmp_path / "file" / "l.jsonl", Prediction)


@pytest.mark.parametrize("limit", [250, 251, 299, 300])
def test_a_disk_that_fills_up_within_a_line_leaves_whole_lines_and_the_ledger_usable(tmp_path: Path, limit: int) -> None:
    """A file size limit stops a write in the middle of a line, as a full disk does."""
    path = tmp_path / "l.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with Ledger(path, Prediction) as ledger:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            fitting = limit // (len(row(0, "t" * 30).model_dump_json()) + 1)
            for number in range(fitting):
                ledger.append(row(number, "t" * 30))
            with pytest.raises(StorageError, match=r"l\.jsonl"):
                ledger.append(row(fitting, "t" * 30))
            assert path.read_bytes().endswith(b"\n")
            assert ids(path) == [str(number) for number in range(fitting)]
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            ledger.append(row(99))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert ids(path) == [*(str(number) for number in range(fitting)), "99"]


def test_a_full_device_is_told_with_its_remedy(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.symlink_to("/dev/full")
    with Ledger(path, Prediction) as ledger, pytest.raises(StorageError, match="no space left on the device; free some and run the same"):
        ledger.append(row(0))


def test_a_process_killed_right_after_appending_has_kept_every_line(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    killed = child(
        """
        import os, signal, sys
        from pathlib import Path
        from shared.artifacts import Ledger
        from shared.contracts import Prediction
        ledger = Ledger(Path(sys.argv[1]), Prediction, sync_every_s=3600)
        for number in range(1000):
            ledger.append(Prediction(system="s", example_id=str(number), text="t"))
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        path,
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(ids(path)) == 1000


def test_closing_twice_is_harmless_and_lets_the_next_writer_in(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.jsonl", Prediction)
    ledger.append(row(0))
    ledger.close()
    ledger.close()
    Ledger(tmp_path / "l.jsonl", Prediction).close()
