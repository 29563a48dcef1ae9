"""`distill run --dataset`: the data set on the command line takes the place of the recipe's own, with all that says where that is."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from shared.commands import assignments
from shared.errors import SettingsError
from shared.settings import DatasetSettings, Recipe, load_settings
from student_trainer.pipeline import dataset_flags

FILE = "{name: file, path: /data/rows.csv, question_column: q, summary_column: s}"
HUB = "{name: meqsum, hub: some/meqsum}"
COLUMNS = ("question", "summary")


def chosen(folder: Path, dataset: str, name: str | None, *given: str, limit: int | None = None) -> DatasetSettings:
    """What a recipe with that `dataset` becomes with `--dataset NAME` and `--set GIVEN`."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(f'name: x\nteacher: {{url: "http://127.0.0.1:9/v1"}}\ndataset: {dataset}\n')
    flags: dict[str, Any] = dataset_flags(argparse.Namespace(dataset=name, limit=limit), assignments(list(given)))
    return load_settings(Recipe, flags=flags, yaml_file=recipe).dataset


@pytest.mark.parametrize("recipe", [FILE, HUB, "{name: sample, reserved_rows: 110}"])
@pytest.mark.parametrize(
    ("name", "kind", "path"),
    [("sample", "sample", None), ("meqsum", "meqsum", None), ("/d/m.xlsx", "meqsum", "/d/m.xlsx"), ("/d/M.XLSX", "meqsum", "/d/M.XLSX")],
)
def test_a_data_set_with_columns_of_its_own_leaves_nothing_of_the_recipes(
    tmp_path: Path, recipe: str, name: str, kind: str, path: str
) -> None:
    found = chosen(tmp_path, recipe, name)
    assert (found.name, found.hub, found.path) == (kind, None, Path(path) if path else None)
    assert (found.question_column, found.summary_column) == COLUMNS
    assert found.reserved_rows == (110 if name == "sample" and "110" in recipe else 0)


def test_a_file_takes_the_place_of_a_hub_and_of_a_path_and_keeps_the_columns_that_only_files_have(tmp_path: Path) -> None:
    found = chosen(tmp_path, HUB, "/data/other.csv")
    assert (found.name, found.hub, str(found.path), found.question_column) == ("file", None, "/data/other.csv", "question")
    found = chosen(tmp_path, FILE, "/data/other.csv")
    assert (str(found.path), found.question_column, found.summary_column) == ("/data/other.csv", "q", "s")


def test_what_is_set_beside_it_holds(tmp_path: Path) -> None:
    assert chosen(tmp_path, FILE, "meqsum", "dataset.hub=some/other").hub == "some/other"
    assert str(chosen(tmp_path, FILE, "meqsum", "dataset.path=/d/m.xlsx").path) == "/d/m.xlsx"
    assert chosen(tmp_path, HUB, "/data/other.csv", "dataset.question_column=q", limit=7).question_column == "q"
    assert chosen(tmp_path, HUB, None, limit=7).limit == 7
    with pytest.raises(SettingsError, match="question_column"):
        chosen(tmp_path, FILE, "sample", "dataset.question_column=q")


def test_without_it_the_recipe_stands(tmp_path: Path) -> None:
    assert chosen(tmp_path, HUB, None).hub == "some/meqsum"
    with pytest.raises(SettingsError, match="--dataset nothing: expected sample, meqsum or the path"):
        chosen(tmp_path, HUB, "nothing")
