"""The ledger of a harvest: whole lines only, each kept and counted once, whatever happens to the process or the disk."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.contracts import FinishReason, Response
from shared.errors import DataError, StorageError
from shared.harvest.ledger import AnswerLedger, AnswerReader, Held, answer_files, kinds


def key(number: int) -> str:
    return f"{number:032x}" + 32 * "0"


def row(number: int, text: str = "t", *, example: str | None = None, finish_reason: FinishReason = "stop") -> Response:
    return Response(
        key=key(number),
        example_id=example or f"e{number}",
        sample=0,
        status="ok",
        text=text,
        finish_reason=finish_reason,
        model="m",
        latency_s=0.5,
        attempts=1,
        received_at="2026-01-01T00:00:00+00:00",
    )


def failed(number: int, reason: str = "refused: no") -> Response:
    return row(number).model_copy(update={"status": "failed", "text": "", "finish_reason": None, "reason": reason})


LINE = len(row(0).model_dump_json()) + 1
"""Bytes of a line with a one-digit number."""


def names(folder: Path) -> list[str]:
    return [file.name for file in answer_files(folder)]


def texts(folder: Path) -> list[str]:
    """Of all lines in all files, as any reader of JSON Lines sees them."""
    return [json.loads(line)["text"] for file in answer_files(folder) for line in file.read_text().split("\n")[:-1]]


def counting(folder: Path) -> list[Response]:
    with AnswerLedger(folder) as ledger:
        return list(ledger.rows())


def child(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": os.getcwd()})


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """A file size limit stops a write in the middle of a line, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


# lines


def test_rows_come_back_in_the_order_of_their_appending_and_after_reopening(tmp_path: Path) -> None:
    folder, rows = tmp_path / "made" / "here", [row(0, "an ä\nand a \r and a \u2028 inside"), row(1), failed(2)]
    with AnswerLedger(folder) as ledger:
        ledger.append(rows[:2])
        ledger.append([])
        ledger.append(rows[2:])
        assert list(ledger.rows()) == rows
    with AnswerLedger(folder) as ledger:
        assert (ledger.repaired_bytes, ledger.superseded) == (0, 0)
        ledger.append([row(3)])
        assert list(ledger.rows()) == [*rows, row(3)]
    assert texts(folder)[0] == "an ä\nand a \r and a \u2028 inside"


def found(ledger: AnswerLedger, number: int, example_id: str) -> Held | None:
    return ledger.find([key(number)]).get((key(number), hash(example_id)))


def test_many_keys_are_looked_up_in_one_go_with_the_rows_of_every_example_that_shares_one(tmp_path: Path) -> None:
    with AnswerLedger(tmp_path) as ledger:
        assert ledger.empty
        ledger.append([row(1), row(2), row(1, example="other"), row(3)])
        assert not ledger.empty
        places = ledger.find([key(1), key(2), key(9)])
        assert places.keys() == {(key(1), hash("e1")), (key(1), hash("other")), (key(2), hash("e2"))}


def test_a_row_is_found_by_what_was_asked_for_an_example_and_read_from_its_place(tmp_path: Path) -> None:
    with AnswerLedger(tmp_path, segment_bytes=2 * LINE) as ledger:
        ledger.append([row(1, "one"), row(2, "two", finish_reason="length")])
        ledger.append([failed(3), row(1, "one again", example="other")])
        places = [found(ledger, 1, "e1"), found(ledger, 2, "e2"), found(ledger, 3, "e3"), found(ledger, 1, "other")]
        assert [held.kind for held in places if held] == ["ok", "cut_off", "refused", "ok"]
        assert [ledger.read(held) for held in places if held] == list(ledger.rows())
        assert found(ledger, 1, "e2") is None
        assert found(ledger, 9, "e1") is None


def test_an_answer_of_another_example_is_found_and_a_failure_is_none(tmp_path: Path) -> None:
    def text(held: Held | None) -> str | None:
        return ledger.read(held).text if held else None

    with AnswerLedger(tmp_path) as ledger:
        ledger.append([row(1, "one"), row(2, "two", finish_reason="length"), failed(3)])
        assert [text(ledger.twin(key(number))) for number in range(4)] == [None, "one", "two", None]
        assert text(ledger.twin(key(2), cut_off=False)) is None


def test_of_several_lines_for_one_key_and_example_the_last_counts(tmp_path: Path) -> None:
    with AnswerLedger(tmp_path, segment_bytes=LINE) as ledger:
        for text in ("first", "second", "third"):
            ledger.append([row(1, text), row(2, text, example=text)])
        ledger.append([row(1, "in one go"), row(1, "last")])
        expected = [row(2, "first", example="first"), row(2, "second", example="second"), row(2, "third", example="third"), row(1, "last")]
        assert list(ledger.rows()) == expected
        held = found(ledger, 1, "e1")
        assert held is not None
        assert ledger.read(held).text == "last"
    assert counting(tmp_path) == expected
    with AnswerLedger(tmp_path) as ledger:
        ledger.compact()
    assert texts(tmp_path) == ["first", "second", "third", "last"]
    assert counting(tmp_path) == expected


# segments


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 3), max_size=8),
    segment_bytes=st.sampled_from([1, LINE - 1, LINE, LINE + 1, 3 * LINE, 2**20]),
    reopened=st.sets(st.integers(0, 8)),
)
def test_however_lines_fall_into_segments_all_are_there_and_compaction_leaves_them_in_one_file(
    sizes: list[int], segment_bytes: int, reopened: set[int]
) -> None:
    rows = [row(number) for number in range(sum(sizes))]
    with tempfile.TemporaryDirectory() as name:
        folder, left = Path(name), list(rows)
        ledger = AnswerLedger(folder, segment_bytes=segment_bytes)
        for turn, size in enumerate(sizes):
            if turn in reopened:
                ledger.close()
                ledger = AnswerLedger(folder, segment_bytes=segment_bytes)
            ledger.append(left[:size])
            left = left[size:]
        with ledger:
            assert list(ledger.rows()) == rows
            assert all(file.stat().st_size < segment_bytes + 3 * (LINE + 1) for file in answer_files(folder))
            assert ledger.compact() == folder / "responses.jsonl"
        assert names(folder) == ["responses.jsonl"]
        assert counting(folder) == rows


def test_a_full_segment_is_followed_by_the_next_number_and_a_compacted_ledger_begins_with_one(tmp_path: Path) -> None:
    with AnswerLedger(tmp_path, segment_bytes=LINE) as ledger:
        for number in range(3):
            ledger.append([row(number)])
    assert names(tmp_path) == ["responses-000001.jsonl", "responses-000002.jsonl", "responses-000003.jsonl"]
    with AnswerLedger(tmp_path, segment_bytes=LINE) as ledger:
        ledger.compact()
    with AnswerLedger(tmp_path, segment_bytes=LINE) as ledger:
        ledger.append([row(3)])
    assert names(tmp_path) == ["responses.jsonl", "responses-000001.jsonl"]
    assert [r.example_id for r in counting(tmp_path)] == ["e0", "e1", "e2", "e3"]


def test_an_empty_ledger_is_compacted_to_an_empty_file_and_twice_is_once(tmp_path: Path) -> None:
    for _ in range(2):
        with AnswerLedger(tmp_path) as ledger:
            assert ledger.compact().read_bytes() == b""


def test_two_ledgers_in_one_folder_do_not_meet(tmp_path: Path) -> None:
    with AnswerLedger(tmp_path, "teacher") as one, AnswerLedger(tmp_path, "teacher-few") as other:
        one.append([row(1)])
        other.append([row(2)])
        one.compact()
        other.compact()
    assert [file.name for file in sorted(tmp_path.glob("[!.]*"))] == ["teacher-few.jsonl", "teacher.jsonl"]


@pytest.mark.parametrize("name", ["responses-000001 copy.jsonl", "responses-1.jsonl", "responses-000001.jsonl.bak", "other.jsonl"])
def test_files_of_other_names_are_neither_read_nor_removed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with AnswerLedger(tmp_path) as ledger:
        ledger.append([row(1)])
        ledger.compact()
    assert (tmp_path / name).read_text() == "mine"


# crashes


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(max_size=40), max_size=6), segment_bytes=st.sampled_from([LINE, 3 * LINE, 2**20]), data=st.data())
def test_a_last_segment_cut_at_any_byte_opens_with_exactly_the_lines_before_the_cut(
    texts: list[str], segment_bytes: int, data: st.DataObject
) -> None:
    rows = [row(number, text) for number, text in enumerate(texts)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with AnswerLedger(folder, segment_bytes=segment_bytes) as ledger:
            for each in rows:
                ledger.append([each])
        files = answer_files(folder)
        whole = files[-1].read_bytes() if files else b""
        cut = data.draw(st.integers(0, len(whole)))
        if files:
            files[-1].write_bytes(whole[:cut])
        kept = rows[: len(rows) - whole[cut:].count(b"\n")]
        with AnswerLedger(folder, segment_bytes=segment_bytes) as ledger:
            assert list(ledger.rows()) == kept
            assert ledger.repaired_bytes == len(whole[:cut]) - whole[:cut].rfind(b"\n") - 1
            ledger.append(rows[len(kept) :])
            assert list(ledger.rows()) == rows


@pytest.mark.parametrize("tail", [b"x", b'{"key"', b"\x00" * 70_000, b"\xff" * 70_000])
def test_a_torn_tail_is_cut_and_nothing_else(tmp_path: Path, tail: bytes) -> None:
    with AnswerLedger(tmp_path) as ledger:
        ledger.append([row(0)])
    with answer_files(tmp_path)[0].open("ab") as file:
        file.write(tail)
    with AnswerLedger(tmp_path) as ledger:
        assert ledger.repaired_bytes == len(tail)
        ledger.append([row(1)])
    assert counting(tmp_path) == [row(0), row(1)]


def test_a_process_killed_right_after_appending_has_kept_every_line(tmp_path: Path) -> None:
    killed = child(
        """
        import os, signal, sys
        from pathlib import Path
        from shared.contracts import Response
        from shared.harvest.ledger import AnswerLedger

        ledger = AnswerLedger(Path(sys.argv[1]), segment_bytes=20_000)
        for number in range(1000):
            ledger.append([Response(key=f"{number:064x}", example_id=str(number), sample=0, status="ok", text="t", finish_reason="stop",
                                    model="m", latency_s=0.0, attempts=1, received_at="now")])
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        tmp_path,
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(answer_files(tmp_path)) > 5
    assert [r.example_id for r in counting(tmp_path)] == [str(number) for number in range(1000)]


@pytest.mark.parametrize("segments_left", [(1, 2, 3), (2, 3), (3,), ()])
@pytest.mark.parametrize("retried", [False, True])
def test_a_compaction_that_is_cut_short_after_its_file_is_there_loses_and_doubles_nothing(
    tmp_path: Path, segments_left: tuple[int, ...], retried: bool
) -> None:
    """The compacted file has taken its place, and some of the segments, the oldest first, are gone."""
    with AnswerLedger(tmp_path / "ledger", segment_bytes=LINE) as ledger:
        ledger.append([failed(0)])
        ledger.append([row(0, "answered later") if retried else row(1)])
        ledger.append([row(2)])
    shutil.copytree(tmp_path / "ledger", tmp_path / "saved")
    with AnswerLedger(tmp_path / "ledger") as ledger:
        wanted = list(ledger.rows())
        ledger.compact()
    for number in segments_left:
        shutil.copy(tmp_path / "saved" / f"responses-{number:06d}.jsonl", tmp_path / "ledger")

    with AnswerLedger(tmp_path / "ledger") as ledger:
        assert sorted(r.key for r in ledger.rows()) == sorted(r.key for r in wanted)
        assert {(r.key, r.status, r.text) for r in ledger.rows()} == {(r.key, r.status, r.text) for r in wanted}
        ledger.compact()
    assert names(tmp_path / "ledger") == ["responses.jsonl"]
    assert len(texts(tmp_path / "ledger")) == len(wanted)


def test_a_compaction_that_is_cut_short_before_that_leaves_the_segments_and_its_half_file_is_swept_away(tmp_path: Path) -> None:
    with AnswerLedger(tmp_path, segment_bytes=LINE) as ledger:
        ledger.append([row(0)])
        ledger.append([row(1)])
    leftover = tmp_path / ".responses.jsonl.elsewhere.123.tmp"
    leftover.write_bytes(answer_files(tmp_path)[0].read_bytes()[:50])
    assert counting(tmp_path) == [row(0), row(1)]
    assert not leftover.exists()


def test_a_line_that_is_something_else_is_named_by_file_and_number(tmp_path: Path) -> None:
    with AnswerLedger(tmp_path, segment_bytes=LINE) as ledger:
        ledger.append([row(0)])
        ledger.append([row(1)])
    damaged = tmp_path / "responses-000002.jsonl"
    good = damaged.read_text()
    for line, what in [
        ('{"key": "0"}', "example_id: Field required"),
        ("nonsense", "Invalid JSON"),
        ("", "Invalid JSON"),
        (good.strip().replace(key(1), "xyz"), "key: not a SHA-256"),
    ]:
        damaged.write_text(good + line + "\n" + good)
        with pytest.raises(DataError, match=rf"responses-000002\.jsonl, line 2: {what}"):
            AnswerLedger(tmp_path)
    damaged.write_text(good)
    assert counting(tmp_path) == [row(0), row(1)]


# other writers, disks, threads


def test_a_second_writer_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    with AnswerLedger(tmp_path) as ledger:
        ledger.append([row(0)])
        other = child(
            """
            import sys
            from pathlib import Path
            from shared.errors import StorageError
            from shared.harvest.ledger import AnswerLedger
            try:
                AnswerLedger(Path(sys.argv[1]))
            except StorageError as exc:
                print(exc)
            """,
            tmp_path,
        )
        assert "responses.jsonl: another process is writing this ledger" in other.stdout
        with pytest.raises(StorageError, match="another process"):
            AnswerLedger(tmp_path)
        ledger.append([row(1)])
    assert counting(tmp_path) == [row(0), row(1)]


def test_a_ledger_that_could_not_be_opened_locks_nobody_out(tmp_path: Path) -> None:
    (tmp_path / "responses.jsonl").write_text("nonsense\n")
    with pytest.raises(DataError):
        AnswerLedger(tmp_path)
    (tmp_path / "responses.jsonl").unlink()
    AnswerLedger(tmp_path).close()


def test_closing_twice_and_after_compaction_is_harmless_and_lets_the_next_writer_in(tmp_path: Path) -> None:
    ledger = AnswerLedger(tmp_path)
    ledger.append([row(0)])
    ledger.compact()
    ledger.close()
    ledger.close()
    AnswerLedger(tmp_path).close()


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        AnswerLedger(tmp_path / "file" / "ledger")


@pytest.mark.parametrize("room", [LINE - 1, 2 * LINE - 1, 2 * LINE, 3 * LINE - 1])
def test_a_disk_that_fills_up_within_a_line_leaves_whole_lines_and_the_ledger_usable(tmp_path: Path, room: int) -> None:
    fitting = room // LINE
    with AnswerLedger(tmp_path) as ledger:
        with files_no_larger_than(room):
            for number in range(fitting):
                ledger.append([row(number)])
            with pytest.raises(StorageError, match=r"responses-000001\.jsonl"):
                ledger.append([row(fitting)])
        assert list(ledger.rows()) == [row(number) for number in range(fitting)]
        ledger.append([row(9)])
    assert counting(tmp_path) == [*(row(number) for number in range(fitting)), row(9)]


def test_of_rows_that_belong_together_all_are_there_or_none(tmp_path: Path) -> None:
    with AnswerLedger(tmp_path) as ledger:
        ledger.append([row(0)])
        with files_no_larger_than(3 * LINE), pytest.raises(StorageError):
            ledger.append([row(1), row(2), row(3)])
        assert list(ledger.rows()) == [row(0)]
        assert found(ledger, 1, "e1") is None


@pytest.mark.parametrize("room", [0, 100, 5000])
def test_a_disk_without_room_for_an_index_is_a_storage_error(tmp_path: Path, room: int) -> None:
    with files_no_larger_than(room), pytest.raises(StorageError):
        AnswerLedger(tmp_path)
    AnswerLedger(tmp_path).close()


def test_a_full_disk_at_compaction_keeps_everything(tmp_path: Path) -> None:
    with AnswerLedger(tmp_path, segment_bytes=LINE) as ledger:
        ledger.append([row(0)])
        ledger.append([row(1)])
        with files_no_larger_than(LINE), pytest.raises(StorageError, match=r"responses\.jsonl"):
            ledger.compact()
    assert counting(tmp_path) == [row(0), row(1)]
    assert not list(tmp_path.glob(".*.tmp"))


def test_the_index_has_no_name_and_needs_none(tmp_path: Path) -> None:
    with AnswerLedger(tmp_path) as ledger:
        ledger.append([row(0)])
        assert sorted(file.name for file in tmp_path.iterdir()) == [".responses.lock", "responses-000001.jsonl"]
        ledger.append([row(1)])
        assert found(ledger, 1, "e1") is not None


def test_a_hundred_thousand_rows_are_all_known_after_reopening(tmp_path: Path) -> None:
    line = row(0).model_dump_json()
    with (tmp_path / "responses-000001.jsonl").open("w") as file:
        for number in range(100_000):
            file.write(line.replace(key(0), key(number)).replace('"e0"', f'"e{number}"') + "\n")
    with AnswerLedger(tmp_path) as ledger:
        assert (ledger.repaired_bytes, ledger.superseded) == (0, 0)
        for number in (0, 4999, 5000, 65_536, 99_999):
            held = found(ledger, number, f"e{number}")
            assert held is not None
            assert ledger.read(held).example_id == f"e{number}"
        assert found(ledger, 100_000, "e100000") is None
        ledger.append([row(1, "again", example="e1")])
        held = found(ledger, 1, "e1")
        assert held is not None
        assert ledger.read(held).text == "again"


def test_lines_can_be_made_durable_from_another_thread_while_segments_come_and_go(tmp_path: Path) -> None:
    failures: list[BaseException] = []
    ended = threading.Event()

    def syncing() -> None:
        while not ended.is_set():
            try:
                ledger.sync()
            except BaseException as exc:
                failures.append(exc)

    with AnswerLedger(tmp_path, segment_bytes=LINE) as ledger:
        thread = threading.Thread(target=syncing)
        thread.start()
        for number in range(60):
            ledger.append([row(number)])
        ended.set()
        thread.join()
    assert failures == []
    assert len(counting(tmp_path)) == 60


# a look from outside


def test_what_a_ledger_has_is_seen_while_another_writes_it_and_a_line_that_is_half_written_is_not(tmp_path: Path) -> None:
    assert kinds(tmp_path) == {}
    with AnswerLedger(tmp_path, segment_bytes=LINE) as ledger:
        ledger.append([failed(0)])
        ledger.append([row(1, finish_reason="length")])
        ledger.append([row(0)])
        with answer_files(tmp_path)[-1].open("ab") as file:
            file.write(row(2).model_dump_json().encode())
        assert kinds(tmp_path) == {(key(0), "e0"): "ok", (key(1), "e1"): "cut_off"}
    with AnswerLedger(tmp_path) as ledger:
        ledger.compact()
    assert kinds(tmp_path) == {(key(0), "e0"): "ok", (key(1), "e1"): "cut_off"}


def test_a_look_while_segments_become_one_file_sees_all_of_them(tmp_path: Path) -> None:
    ended = threading.Event()
    seen: list[int] = []

    def look() -> None:
        while not ended.is_set():
            seen.append(len(kinds(tmp_path)))

    with AnswerLedger(tmp_path, segment_bytes=LINE) as ledger:
        ledger.append([row(number) for number in range(5)])
    thread = threading.Thread(target=look)
    thread.start()
    for number in range(5, 9):
        with AnswerLedger(tmp_path, segment_bytes=LINE) as ledger:
            ledger.append([row(number)])
            ledger.compact()
    ended.set()
    thread.join()
    assert seen == sorted(seen)
    assert min(seen) >= 5


# readers


def test_a_reader_has_what_there_was_when_it_was_opened_whatever_becomes_of_the_files(tmp_path: Path) -> None:
    with AnswerLedger(tmp_path, segment_bytes=2 * LINE) as ledger:
        ledger.append([row(0, "first"), row(1), row(2)])
        ledger.append([row(0, "last"), failed(3)])
        (found,) = ledger.find([key(0)]).values()
        with AnswerReader(tmp_path) as reader, AnswerReader(tmp_path) as other:
            ledger.append([row(4), row(1, "later")])
            ledger.compact()
            assert [(r.key, r.text) for r in reader.rows()] == [(key(1), "t"), (key(2), "t"), (key(0), "last"), (key(3), "")]
            assert reader.find([key(0), key(4)]) == {(key(0), hash("e0")): found}
            assert reader.read(found).text == "last"
            assert other.twin(key(3)) is None
            assert not other.empty


@pytest.mark.parametrize("tail", [b"", b"\x00", b'{"key": "torn'])
def test_a_reader_leaves_a_torn_tail_out_and_everything_as_it_is(tmp_path: Path, tail: bytes) -> None:
    with AnswerLedger(tmp_path) as ledger:
        ledger.append([row(0), row(1)])
    file = answer_files(tmp_path)[0]
    file.write_bytes(file.read_bytes() + tail)
    before = (tmp_path.stat().st_mtime_ns, file.read_bytes())
    with AnswerReader(tmp_path) as reader:
        assert [r.key for r in reader.rows()] == [key(0), key(1)]
        assert (tmp_path.stat().st_mtime_ns, file.read_bytes()) == before


def test_a_reader_of_nothing_has_nothing_and_makes_nothing(tmp_path: Path) -> None:
    with AnswerReader(tmp_path / "nowhere") as reader:
        assert reader.empty
        assert list(reader.rows()) == []
    assert not (tmp_path / "nowhere").exists()


def test_a_reader_names_a_damaged_line_and_a_file_that_it_may_not_read(tmp_path: Path) -> None:
    (tmp_path / "responses.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"responses\.jsonl, line 1"):
        AnswerReader(tmp_path)
    (tmp_path / "responses-000001.jsonl").mkdir()
    with pytest.raises(StorageError, match="cannot be read"):
        AnswerReader(tmp_path)
