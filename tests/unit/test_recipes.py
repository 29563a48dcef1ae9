"""Every recipe that is shipped parses, and says what the README says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared.datasets import load
from shared.embedded.weights import adapter_folder
from shared.settings import Recipe, load_settings

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def parse(name: str) -> Recipe:
    return load_settings(Recipe, flags={}, yaml_file=RECIPES[0].with_name(name))


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.stem)
def test_a_shipped_recipe_parses_and_is_named_like_its_file(file: Path) -> None:
    assert parse(file.name).name == file.stem


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.stem)
def test_a_shipped_recipe_validates_as_it_evaluates(file: Path) -> None:
    recipe = parse(file.name)
    assert recipe.train.validation_max_tokens == recipe.evaluate.max_tokens
    assert recipe.train.validation_stop == recipe.evaluate.stop


def test_the_three_recipes_are_shipped() -> None:
    assert {f.stem for f in RECIPES} >= {"tinyllama-flan-t5-meqsum", "offline-demo", "smoke"}


def test_the_default_of_the_mission_is_flan_t5_base_on_meqsum() -> None:
    recipe = parse("tinyllama-flan-t5-meqsum.yaml")
    assert recipe.student.model == "google/flan-t5-base"
    assert recipe.dataset.name == "meqsum"
    assert recipe.teacher.url is not None


def test_the_demo_never_harvests_tests_or_validates_on_a_row_its_teacher_was_trained_on(tmp_path: Path) -> None:
    seen = set(json.loads((adapter_folder() / "rows.json").read_text()))
    assert len(seen) == 110
    splits = load(parse("offline-demo.yaml").dataset, tmp_path).splits
    for split, examples in splits.items():
        assert examples, split
        assert not seen & {e.id for e in examples}, split


def test_the_adapter_is_small_enough_to_ship_and_has_a_card_with_its_licence() -> None:
    assert (adapter_folder() / "adapter_model.safetensors").stat().st_size <= 5_000_000
    assert "license: apache-2.0" in (adapter_folder() / "README.md").read_text()
