"""`distill teacher --recipe`: the teacher that a recipe launches, and nobody else."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.errors import SettingsError
from teacher_service.main import launched_by


def recipe(folder: Path, teacher: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(f"name: r\nteacher: {teacher}\n")
    return file


def test_a_recipe_says_engine_model_and_public_name_and_flags_the_rest(tmp_path: Path) -> None:
    local = recipe(tmp_path, "{launch: {engine: local, model: 'random:tiny-t5'}}")
    assert launched_by(local, {"port": "1"}) == {
        "engine": "local", "model_ref": "random:tiny-t5", "public_name": "random:tiny-t5", "port": "1",
    }  # fmt: skip
    assert launched_by(recipe(tmp_path, "{launch: {engine: scripted}}"), {}) == {"engine": "scripted", "public_name": "scripted"}


@pytest.mark.parametrize("name", ["engine", "model_ref", "public_name"])
def test_a_recipe_and_a_flag_or_a_variable_that_say_the_same_thing_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    file = recipe(tmp_path, "{launch: {engine: scripted}}")
    with pytest.raises(SettingsError, match=f"--{name.replace('_', '-')}: --recipe .* says who the teacher is"):
        launched_by(file, {name: "x"})
    monkeypatch.setenv(f"TEACHER_{name.upper()}", "")
    launched_by(file, {})
    monkeypatch.setenv(f"TEACHER_{name.upper()}", "x")
    with pytest.raises(SettingsError, match=f"TEACHER_{name.upper()}: --recipe"):
        launched_by(file, {})


def test_a_recipe_whose_teacher_is_at_a_url_launches_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = recipe(tmp_path, "{launch: {engine: scripted}}")
    monkeypatch.setenv("DISTILL_TEACHER__URL", "http://elsewhere/v1")
    with pytest.raises(SettingsError, match="teacher is at http://elsewhere/v1: there is nothing to launch"):
        launched_by(file, {})
