"""Data sets: what is read, what is dropped and counted, and that no text stands in two splits."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import openpyxl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shared.artifacts import Run, sha256_bytes
from shared.datasets import Dataset, load, normalise
from shared.datasets.meqsum import load_meqsum
from shared.datasets.rows import Row, Source, clean, make_splits
from shared.datasets.stage import prepare, shots
from shared.errors import DataError, RunMismatch, SettingsError
from shared.settings import DatasetSettings, Recipe, TeacherSettings

CACHE = Path("/nonexistent/cache")


def run_at(folder: Path, **dataset: object) -> Run:
    recipe = Recipe(name="t", teacher=TeacherSettings(url="http://127.0.0.1:9/v1"), dataset=DatasetSettings(**dataset))
    return Run.open(folder, recipe)


def small(path: Path, **more: object) -> DatasetSettings:
    return DatasetSettings(**{"name": "file", "path": path, "validation_rows": 1, "test_rows": 2, **more})


def jsonl(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def questions(count: int) -> list[dict[str, object]]:
    return [{"question": f"What about topic {n}?", "summary": f"Topic {n}?"} for n in range(count)]


def xlsx(rows: list[tuple[str, str, str]], header: tuple[str, ...] = ("File", "CHQ", "Summary")) -> bytes:
    book = openpyxl.Workbook()
    book.active.title = "QS"
    for row in (header, *rows):
        book.active.append(row)
    data = io.BytesIO()
    book.save(data)
    return data.getvalue()


def assert_every_row_is_counted(dataset: Dataset) -> None:
    census = dataset.census
    assert census["read"] == sum(census["dropped"].values()) + sum(census["kept"].values())
    assert census["kept"] == {split: len(rows) for split, rows in dataset.splits.items()}


def texts(dataset: Dataset, *splits: str) -> set[str]:
    rows = [e for split in splits for e in dataset.splits[split]]
    return {normalise(e.question) for e in rows} | {normalise(e.summary) for e in rows if e.summary}


# --- the embedded sample


def test_the_sample_is_220_30_80_rows_and_no_text_stands_in_two_splits() -> None:
    dataset = load(DatasetSettings(), CACHE)
    assert dataset.census["kept"] == {"train": 220, "validation": 30, "test": 80}
    assert dataset.splits["train"][0].id == "q-001"
    assert dataset.splits["test"][0].id == "q-251"
    assert not texts(dataset, "test") & texts(dataset, "train", "validation")
    assert not texts(dataset, "validation") & texts(dataset, "train")
    assert_every_row_is_counted(dataset)


def test_reserved_rows_go_first_and_limits_keep_the_first_of_the_rest() -> None:
    dataset = load(DatasetSettings(reserved_rows=110, limit=5, test_limit=3), CACHE)
    assert [e.id for e in dataset.splits["train"]] == [f"q-{n}" for n in range(111, 116)]
    assert [e.id for e in dataset.splits["test"]] == ["q-251", "q-252", "q-253"]
    assert dataset.census["dropped"] == {"reserved": 110, "over limit": 105, "over test_limit": 77}
    assert_every_row_is_counted(dataset)


def test_reserving_every_train_row_is_refused() -> None:
    with pytest.raises(DataError, match=r"dataset.reserved_rows=220 leaves none of the 220"):
        load(DatasetSettings(reserved_rows=220), CACHE)


# --- text


def test_normalise_folds_case_width_accents_forms_and_punctuation() -> None:
    assert normalise("  What's\u00a0CAF\u00c9,\n(\uff11) ?") == "what s café 1"
    assert normalise("cafe\u0301") == normalise("caf\u00e9")
    assert normalise("STRASSE") == normalise("straße")


def test_normalise_keeps_vowel_signs_apart() -> None:
    assert normalise("कि") != normalise("की")


@pytest.mark.parametrize("unseen", ["\u00ad", "\u200b", "\u2060"])
def test_normalise_passes_over_signs_that_nobody_sees(unseen: str) -> None:
    assert normalise(f"{unseen}Is my go{unseen}ut{unseen} cur{unseen}able?") == "is my gout curable"
    assert normalise(unseen) == ""
    assert normalise(f"cafe{unseen}\u0301") == normalise("caf\u00e9")


@settings(deadline=None)
@given(st.text())
def test_normalise_of_normalised_text_changes_nothing(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


def test_clean_keeps_lines_and_folds_blanks() -> None:
    assert clean("\u00a0 SUBJECT:\u00a0 a \r\n\tMESSAGE:  b \n") == "SUBJECT: a\nMESSAGE: b"
    assert clean(" a\n b\u00a0", one_line=True) == "a b"


# --- splits

ROWS = st.lists(
    st.tuples(st.sampled_from("abcdefghijklmnop!"), st.sampled_from(["", *"qrstuvwxyzab"])), min_size=1, max_size=40
)  # few texts, so that rows share them in chains; a summary may be another row's question


@settings(max_examples=300, deadline=None)
@given(ROWS, st.integers(0, 3))
@example([("a", "r"), ("b", "b"), ("c", "b"), ("d", "q")], 2)  # a summary that is its own question
def test_splits_share_no_text_and_every_row_is_counted(rows: list[tuple[str, str]], seed: int) -> None:
    chosen = DatasetSettings(name="file", validation_rows=1, test_rows=1, seed=seed)
    try:
        made = make_splits("file", [Row("", q, s) for q, s in rows], chosen, Source("here", ""), {})
    except DataError:
        return  # nothing usable, or groups that no split can hold
    for one, others in (("test", ("train", "validation")), ("validation", ("train",))):
        assert not texts(made, one) & texts(made, *others)
    assert len(made.splits["test"]) == len(made.splits["validation"]) == 1
    assert_every_row_is_counted(made)


def test_splits_do_not_depend_on_the_order_of_the_file_but_on_the_seed() -> None:
    rows = [Row("", f"question {n}", f"summary {n}") for n in range(50)]
    chosen = DatasetSettings(name="meqsum", validation_rows=5, test_rows=5)
    forward = make_splits("meqsum", rows, chosen, Source("", ""), {}).splits
    assert make_splits("meqsum", rows[::-1], chosen, Source("", ""), {}).splits == forward
    other = make_splits("meqsum", rows, chosen.model_copy(update={"seed": 14}), Source("", ""), {}).splits
    assert {e.id for e in other["test"]} != {e.id for e in forward["test"]}


def test_rows_without_a_reference_go_to_train_where_others_have_one() -> None:
    rows = [Row("", f"question {n}", f"summary {n}" if n < 3 else None) for n in range(30)]
    dataset = make_splits("file", rows, DatasetSettings(name="file", validation_rows=1, test_rows=2), Source("", ""), {})
    assert all(e.summary for split in ("validation", "test") for e in dataset.splits[split])
    assert dataset.census["without_reference"] == 27


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_equal_questions_the_one_with_a_reference_is_kept_whichever_comes_first(order: int) -> None:
    pair = [Row("", "Is gout curable?", None, id="without"), Row("", "is gout, CURABLE", "Gout?", id="with")]
    rows = [*pair[::order], *(Row("", f"question {n}", f"summary {n}") for n in range(8))]
    dataset = make_splits("file", rows, DatasetSettings(name="file", validation_rows=1, test_rows=2), Source("", ""), {})
    (kept,) = (e for split in dataset.splits.values() for e in split if normalise(e.question) == "is gout curable")
    assert (kept.id, kept.question, kept.summary) == ("with", "is gout, CURABLE", "Gout?")
    assert dataset.census["dropped"]["duplicate question"] == 1
    assert dataset.census["without_reference"] == 0
    assert_every_row_is_counted(dataset)


def test_of_two_equal_questions_with_a_reference_the_first_is_kept() -> None:
    rows = [Row("", "Is gout curable?", summary, id=summary) for summary in ("first", "second")]
    rows += [Row("", f"question {n}", f"summary {n}") for n in range(8)]
    dataset = make_splits("file", rows, DatasetSettings(name="file", validation_rows=1, test_rows=2), Source("", ""), {})
    assert {"first", "second"} & {e.id for split in dataset.splits.values() for e in split} == {"first"}
    assert_every_row_is_counted(dataset)


def test_labels_instead_of_summaries_cannot_be_split_and_the_message_says_why() -> None:
    rows = [Row("", f"question {n}", "yes" if n % 2 else "no") for n in range(20)]
    with pytest.raises(DataError, match=r"test has 0 of 2 rows, .*20 usable rows.*largest group.* 10"):
        make_splits("file", rows, DatasetSettings(name="file", validation_rows=1, test_rows=2), Source("here", ""), {})


# --- files


def test_a_csv_and_a_jsonl_of_the_same_rows_split_alike(tmp_path: Path) -> None:
    rows = [{"question": f'He said "{n}", then\nleft é', "summary": f"Did he say {n}?"} for n in range(8)]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["summary", "question"])
        writer.writeheader()
        writer.writerows(rows)
    from_csv = load(small(tmp_path / "a.csv"), CACHE)
    from_jsonl = load(small(jsonl(tmp_path / "a.jsonl", rows)), CACHE)
    assert from_csv.splits == from_jsonl.splits
    assert from_csv.source.sha256 == sha256_bytes((tmp_path / "a.csv").read_bytes())
    assert_every_row_is_counted(from_csv)


def test_a_csv_cell_of_200_000_characters_is_read(tmp_path: Path) -> None:
    long = ("word " * 40_000).strip() + "s"
    cells = [long, *(f"question {n}" for n in range(4))]
    (tmp_path / "a.csv").write_text("question,summary\n" + "".join(f'"{cell}",summary {n}\n' for n, cell in enumerate(cells)))
    assert len(long) == 200_000
    found = load(small(tmp_path / "a.csv"), CACHE)
    assert long in {e.question for split in found.splits.values() for e in split}


def test_empty_and_repeated_questions_are_dropped_and_counted(tmp_path: Path) -> None:
    extra = [{"question": " \u00a0?! "}, {"question": None}, {"question": "WHAT about topic 0"}]
    dataset = load(small(jsonl(tmp_path / "a.jsonl", questions(6) + extra)), CACHE)
    assert dataset.census["dropped"] == {
        "empty question": 2,
        "duplicate question": 1,
        "reserved": 0,
        "over limit": 0,
        "over test_limit": 0,
    }
    assert dataset.census["kept"] == {"train": 3, "validation": 1, "test": 2}


def test_ids_are_the_files_own_where_unique_else_record_numbers(tmp_path: Path) -> None:
    own = [{"id": n + 7, **row} for n, row in enumerate(questions(5))]
    ids = {e.id for rows in load(small(jsonl(tmp_path / "a.jsonl", own)), CACHE).splits.values() for e in rows}
    assert ids == {"7", "8", "9", "10", "11"}
    own[1]["id"] = 7
    repeated = load(small(jsonl(tmp_path / "b.jsonl", own)), CACHE)
    assert {e.id for rows in repeated.splits.values() for e in rows} == {f"row-{n}" for n in range(1, 6)}
    assert repeated.census["ids"] == "record number"


def test_a_wrong_column_lists_those_that_exist(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a", "title": "b"}])
    with pytest.raises(DataError, match=r"dataset.question_column=question: .* it has: text, title"):
        load(small(path), CACHE)
    with pytest.raises(DataError, match=r"dataset.summary_column=summary: .* it has: text, title \(null where"):
        load(small(path, question_column="text"), CACHE)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "no rows"),
        ("a.csv", b"question,summary\n", "no rows"),
        ("a.jsonl", b'{"question": "a"}\n\n{"question": \n', "line 3: not valid JSON"),
        ("a.jsonl", b'["a"]\n', "line 1: expected a JSON object, found list"),
        ("a.jsonl", b'{"question": "a", "summary": 3}\n', "line 1: column summary holds int"),
        ("a.jsonl", b'{"question": "\\ud800", "summary": "b"}\n', "line 1: column question holds half of a surrogate"),
        ("a.jsonl", b'{"question": "a"}\n{"question": "\xe9"}\n', "line 2: not UTF-8"),
        ("a.csv", b"question,summary\na,b\nc,d,e\n", "line 3: 3 fields, but the header names 2"),
        ("a.csv", b"question,question\na,b\n", "names a column twice: question, question"),
        ("a.csv", b'question,summary\n"a,b\nc,d\n', "not valid CSV"),
        ("a.jsonl", b'{"question": "?", "summary": "b"}\n', "no row has a question"),
        ("a.parquet", b"x", r"expected a file that ends in .jsonl or .csv"),
    ],
)
def test_a_bad_file_is_refused_with_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(small(tmp_path / name), CACHE)


def test_a_missing_file_a_folder_and_no_path_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset.path=.*No such file"):
        load(small(tmp_path / "none.csv"), CACHE)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match=r"dataset.path=.*Is a directory"):
        load(small(tmp_path / "folder.csv"), CACHE)
    with pytest.raises(SettingsError, match=r"dataset.path: required"):
        load(DatasetSettings(name="file"), CACHE)


def test_too_few_rows_name_the_numbers_and_the_settings_to_lower(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"3 usable rows, but dataset.test_rows=2 and dataset.validation_rows=1 need at least 4.*lower"):
        load(small(jsonl(tmp_path / "a.jsonl", questions(3))), CACHE)


def test_a_file_without_references_splits_too(tmp_path: Path) -> None:
    dataset = load(small(jsonl(tmp_path / "a.jsonl", questions(5)), summary_column=None), CACHE)
    assert dataset.census["kept"] == {"train": 2, "validation": 1, "test": 2}
    assert dataset.census["without_reference"] == 5


# --- MeQSum

MEQSUM = xlsx([(f"{n}.txt", f"SUBJECT:\u00a0 t{n}\nI read &quot;it&quot; {n} ", f"\u00a0What\n is {n}? ") for n in range(8)])


def meqsum(**more: object) -> DatasetSettings:
    return DatasetSettings(**{"name": "meqsum", "validation_rows": 1, "test_rows": 2, **more})


def test_meqsum_texts_are_cleaned_and_questions_keep_their_lines(tmp_path: Path) -> None:
    (tmp_path / "m.xlsx").write_bytes(MEQSUM)
    dataset = load_meqsum(meqsum(path=tmp_path / "m.xlsx"), CACHE, sha256=sha256_bytes(MEQSUM))
    rows = {e.question: e.summary for split in dataset.splits.values() for e in split}
    assert rows == {f'SUBJECT: t{n}\nI read "it" {n}': f"What is {n}?" for n in range(8)}
    assert dataset.census["seed"] == 13
    assert_every_row_is_counted(dataset)


def test_another_xlsx_is_refused_with_both_hashes_and_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "m.xlsx").write_bytes(MEQSUM)
    with pytest.raises(DataError, match=rf"{sha256_bytes(MEQSUM)}, expected abedd939.*dataset.name=file"):
        load(meqsum(path=tmp_path / "m.xlsx"), CACHE)


def test_other_columns_list_those_that_exist(tmp_path: Path) -> None:
    data = xlsx([("1", "a", "b")], ("File", "Text", "Summary"))
    (tmp_path / "m.xlsx").write_bytes(data)
    with pytest.raises(DataError, match=r"no column named chq or question .*it has: File, Text, Summary"):
        load_meqsum(meqsum(path=tmp_path / "m.xlsx"), CACHE, sha256=sha256_bytes(data))


class FileServer:
    """Serves `body` with `status` at /m.xlsx, by way of a redirect from /, and counts what it is asked."""

    def __init__(self) -> None:
        self.body, self.status, self.asked = MEQSUM, 200, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked += 1
                redirect = self.path == "/"
                body = b"" if redirect else outer.body
                self.send_response(302 if redirect else outer.status)
                if redirect:
                    self.send_header("Location", "/m.xlsx")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"


@pytest.fixture
def file_server() -> Iterator[FileServer]:
    served = FileServer()
    thread = threading.Thread(target=served.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield served
    served.server.shutdown()
    served.server.server_close()
    thread.join()


def test_a_download_is_kept_and_a_damaged_copy_is_fetched_again(tmp_path: Path, file_server: FileServer) -> None:
    first = load_meqsum(meqsum(), tmp_path, url=file_server.url, sha256=sha256_bytes(MEQSUM))
    again = load_meqsum(meqsum(), tmp_path, url=file_server.url, sha256=sha256_bytes(MEQSUM))
    assert first == again
    assert file_server.asked == 2  # the redirect and the file, once
    [copy] = (tmp_path / "datasets").iterdir()
    copy.write_bytes(b"damaged")
    assert load_meqsum(meqsum(), tmp_path, url=file_server.url, sha256=sha256_bytes(MEQSUM)) == first
    assert copy.read_bytes() == MEQSUM


def test_a_failed_or_wrong_download_leaves_nothing_and_names_another_way(tmp_path: Path, file_server: FileServer) -> None:
    file_server.body = b"<html>log in</html>"
    with pytest.raises(DataError, match=r"not the published file; .*give dataset.path"):
        load_meqsum(meqsum(), tmp_path, url=file_server.url)
    file_server.status = 404
    with pytest.raises(DataError, match=r"HTTP 404; .*give dataset.path"):
        load_meqsum(meqsum(), tmp_path, url=file_server.url)
    with pytest.raises(DataError, match=r"ConnectError.*give dataset.path"):
        load_meqsum(meqsum(), tmp_path, url="http://127.0.0.1:1/")
    assert not list(tmp_path.iterdir())


def test_a_hub_data_set_splits_like_the_xlsx_whatever_the_case_of_its_columns(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    hub.mkdir()
    rows = [{"chq": f"SUBJECT: t{n}\nI read &quot;it&quot; {n}", "SUMMARY": f"What is {n}?"} for n in reversed(range(8))]
    jsonl(hub / "train.jsonl", rows)
    from_hub = load(meqsum(hub=str(hub)), tmp_path / "cache")
    (tmp_path / "m.xlsx").write_bytes(MEQSUM)
    from_file = load_meqsum(meqsum(path=tmp_path / "m.xlsx"), CACHE, sha256=sha256_bytes(MEQSUM))
    assert from_hub.splits == from_file.splits


def test_a_hub_data_set_that_cannot_be_read_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"(?s)dataset.hub=.*or give dataset.path"):
        load(meqsum(hub=str(tmp_path / "empty")), tmp_path)


# --- the stage


def test_the_stage_writes_once_and_tells_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = jsonl(tmp_path / "a.jsonl", [*questions(6), {"question": ""}])
    run = run_at(tmp_path / "run", **small(path).model_dump())
    first = prepare(run)
    assert capsys.readouterr().out == "dataset: file, 7 rows read: 3 train, 1 validation, 2 test; dropped: 1 empty question\n"
    path.unlink()  # the run has its own copy
    assert prepare(Run.open(run.path, run.recipe)) == first
    assert capsys.readouterr().out == ""
    manifest = run.manifest("dataset")
    assert manifest is not None
    assert manifest.counts["source"]["location"] == str(path)
    assert [o.path for o in manifest.outputs] == ["dataset/train.jsonl", "dataset/validation.jsonl", "dataset/test.jsonl"]


def test_rows_are_neither_written_nor_read_under_the_recipe_of_another_who_took_the_empty_run_over(tmp_path: Path) -> None:
    first = run_at(tmp_path / "run", name="sample", limit=30)
    second = run_at(tmp_path / "run", name="sample", limit=200)
    assert len(prepare(first)["train"]) == 30
    with pytest.raises(RunMismatch, match=r"dataset\.limit: the run has 30, you ask for 200"):
        prepare(second)


def test_of_two_processes_at_once_one_writes_and_both_read_the_same(tmp_path: Path) -> None:
    run = run_at(tmp_path / "run")
    (tmp_path / "recipe.json").write_text(run.recipe.model_dump_json())
    script = """
import sys, json, pathlib
from shared.artifacts import Run, sha256_bytes
from shared.datasets.stage import prepare
from shared.settings import Recipe
run = Run.open(pathlib.Path(sys.argv[1]), Recipe(**json.loads(pathlib.Path(sys.argv[2]).read_text())))
print("ready", flush=True)
sys.stdin.readline()
print(sha256_bytes(repr(prepare(run)).encode()))
"""
    command = [sys.executable, "-c", script, str(run.path), str(tmp_path / "recipe.json")]
    callers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for caller in callers:
        assert caller.stdout is not None
        assert caller.stdout.readline() == "ready\n"
    for caller in callers:
        assert caller.stdin is not None
        caller.stdin.write("go\n")
        caller.stdin.flush()
    printed = [caller.communicate()[0].splitlines() for caller in callers]
    assert [caller.returncode for caller in callers] == [0, 0]
    assert printed[0][-1] == printed[1][-1]
    assert sorted(map(len, printed)) == [1, 2]  # one wrote, and said so


def test_a_stage_that_died_before_its_manifest_is_done_again(tmp_path: Path) -> None:
    run = run_at(tmp_path / "run")
    (run.path / "dataset").mkdir()
    (run.path / "dataset" / "train.jsonl").write_text("half a li")
    assert len(prepare(run)["train"]) == 220


def test_shots_are_seeded_solved_and_from_the_shorter_half(tmp_path: Path) -> None:
    run = run_at(tmp_path / "run")
    train = [e if n % 3 else e.model_copy(update={"summary": None}) for n, e in enumerate(prepare(run)["train"])]
    drawn = shots(run, train, 5)
    assert drawn == shots(run, train[::-1], 5)
    assert len({e.id for e in drawn}) == 5
    assert all(e.summary for e in drawn)
    lengths = sorted(len(e.question) for e in train if e.summary)
    assert max(len(e.question) for e in drawn) <= lengths[(len(lengths) + 1) // 2 - 1]
    other = Run(run.path, run.recipe.model_copy(update={"seed": 1}))
    assert shots(other, train, 5) != drawn
    assert shots(run, train, 0) == ()


def test_more_shots_than_solved_rows_are_refused(tmp_path: Path) -> None:
    run = run_at(tmp_path / "run")
    assert len(shots(run, prepare(run)["train"][:2], 2)) == 2
    with pytest.raises(DataError, match=r"3 shots need 3 train rows with a reference, and there are 2"):
        shots(run, prepare(run)["train"][:2], 3)
