"""`distill teacher --recipe`: the teacher that a recipe launches, and nobody else."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.errors import SettingsError
from shared.http.keys import digest
from shared.settings import load_settings
from teacher_service.main import launched_by
from teacher_service.settings import TeacherServiceSettings

KEY = "alice-key-0123456789-abcdef"


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


def settings(**flags: object) -> TeacherServiceSettings:
    return load_settings(TeacherServiceSettings, flags={"engine": "scripted", **flags})


def test_who_may_ask_must_be_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TEACHER_API_KEYS", raising=False)
    with pytest.raises(SettingsError, match=r"distill keygen NAME.*--no-auth"):
        settings().keys()
    assert not settings(no_auth=True).keys().required


@pytest.mark.parametrize("text", ["", "# alice: {sha256: ...}\n"])
def test_a_keys_file_without_keys_opens_nothing_whatever_else_is_said(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text)
    for no_auth in (False, True):
        with pytest.raises(SettingsError, match="no key is in them"):
            settings(api_keys_file=str(tmp_path / "keys"), no_auth=no_auth).keys()


def test_keys_come_from_a_variable_and_a_file_together_and_are_asked_for_also_where_no_auth_was_typed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(f"bob: {{sha256: {digest('bob-key-9876543210-ghijkl').hex()}, requests_per_minute: 9}}\n")
    monkeypatch.setenv("TEACHER_API_KEYS", f"alice={KEY}")
    keys = settings(api_keys_file=str(file), no_auth=True, requests_per_minute=5).keys()
    assert keys.required
    assert {key.name: key.limits.requests_per_minute for key in keys.keys} == {"bob": 9, "alice": 5}
    monkeypatch.setenv("TEACHER_API_KEYS", f"bob={KEY}")
    with pytest.raises(SettingsError, match="bob stands in the keys file as well"):
        settings(api_keys_file=str(file)).keys()


def test_a_weak_key_is_refused_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_API_KEYS", "alice=sk-1234")
    with pytest.raises(SettingsError, match="alice: too weak"):
        settings().keys()


def test_several_servers_are_several_flags_or_one_variable_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_UPSTREAM_URL", "http://a/v1, http://b/v1")
    assert settings(engine="upstream", upstream_model="m").upstream_url == ("http://a/v1", "http://b/v1")
    assert settings(engine="upstream", upstream_model="m", upstream_url=["http://c/v1"]).upstream_url == ("http://c/v1",)
    monkeypatch.delenv("TEACHER_UPSTREAM_URL")
    with pytest.raises(SettingsError, match="upstream-url"):
        settings(engine="upstream", upstream_model="m")
