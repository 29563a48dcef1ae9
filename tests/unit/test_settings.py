"""Settings: which layer wins, and that nothing unknown passes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from shared.commands import assignments
from shared.errors import SettingsError
from shared.settings import PROCEDURE, Recipe, cache_dir, dotted_names, load_settings, read_secret
from student_trainer.serving.settings import StudentServiceSettings
from teacher_service.settings import TeacherServiceSettings

BASE = "name: r\nteacher: {url: http://t/v1}\n"
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _no_variables_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for variable in [v for v in os.environ if v.upper().startswith("DISTILL_")]:
        monkeypatch.delenv(variable)


def load(folder: Path, yaml: str = BASE, **flags: Any) -> Recipe:
    file = folder / "recipe.yaml"
    file.write_text(yaml)
    return load_settings(Recipe, flags={k.replace("__", "."): v for k, v in flags.items()}, yaml_file=file)


def test_a_flag_beats_the_environment_beats_the_recipe_beats_the_default_and_neighbours_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yaml = BASE + "train: {epochs: 5, batch_size: 5, learning_rate: 0.5}\n"
    monkeypatch.setenv("DISTILL_TRAIN__EPOCHS", "6")
    monkeypatch.setenv("DISTILL_TRAIN__BATCH_SIZE", "6")
    train = load(tmp_path, yaml, train__epochs=7).train
    assert (train.epochs, train.batch_size, train.learning_rate, train.scheduler) == (7, 6, 0.5, "linear")


def test_a_loaded_recipe_is_a_recipe_and_cannot_be_changed(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    assert type(recipe) is Recipe
    assert recipe == load(tmp_path)
    with pytest.raises(ValueError, match="frozen"):
        setattr(recipe, "seed", 3)  # noqa: B010  a type checker sees it, too


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_every_shipped_recipe_is_readable(file: Path) -> None:
    assert load_settings(Recipe, flags={}, yaml_file=file).name


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"train__kl_reference": 0.1}, "train.kl_reference"),
        ({"train__kl_teacher_sequence": 0.5, "train__kl_teacher_token": 0.2}, "train.kl_teacher_sequence, train.kl_teacher_token"),
        ({"triplets__max_chosen": 2}, "triplets.max_chosen"),
        ({"train__orpo_lambda": 0}, "train.orpo_lambda=0"),
    ],
)
def test_what_trl_has_no_loss_for_is_refused_by_name(tmp_path: Path, flags: dict[str, Any], named: str) -> None:
    assert load(tmp_path, **flags).train.trainer == "packed"
    with pytest.raises(SettingsError, match=rf"train\.trainer=trl cannot express {named}; give train\.trainer=packed"):
        load(tmp_path, train__trainer="trl", **flags)


def test_there_are_shipped_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        (BASE + "train: {epohcs: 3}\n", "train.epohcs: unknown setting; did you mean train.epochs?"),
        (BASE + "trian: {epochs: 3}\n", "trian: unknown setting; did you mean train?"),
        (BASE + "epochs: 3\n", "epochs: unknown setting; did you mean train.epochs?"),
        (BASE + "train: {epochs: 0}\n", "train.epochs: Input should be greater than 0 (got 0)"),
        (BASE + "train: {epochs: many}\n", "train.epochs: "),
        (BASE + "train: 5\n", "train: "),
        (BASE + "train:\n", "train: "),
        (BASE + "1: 2\n", "1: names of settings are text"),
        (BASE + "harvest: {stop: [a, b, c, d, e]}\n", "harvest.stop: "),
        (BASE + "harvest: {max_tokens: 5000}\n", "harvest.max_tokens: "),
        ("teacher: {url: http://t/v1}\n", "name: required, and neither flag, environment nor recipe gives it"),
        ("name: r\nteacher: {model: m}\n", "teacher: give url or launch"),
        ("name: r\nteacher: {url: http://t/v1, launch: {engine: scirpted}}\n", "teacher.launch.engine: "),
        ("name: a b\nteacher: {url: http://t/v1}\n", "name: "),
        ("name: r\nteacher: {url: 127.0.0.1:8000/v1}\n", "teacher: url: give the whole of it, e.g. teacher.url=http://127.0.0.1:8000/v1"),
        ("name: r\nteacher: {url: ftp://t/v1}\n", "teacher: url: give the whole of it"),
        ("name: r\nteacher: {url: 'http:///v1'}\n", "teacher: url: give the whole of it"),
        (BASE + "harvest: {stop: x}\n", """harvest.stop: expected a list, e.g. ["x"] (got 'x')"""),
        ("- a\n", "expected a mapping of settings, found list"),
        ("", "expected a mapping of settings, found NoneType"),
        ("a: [", "is not readable YAML"),
    ],
)
def test_a_wrong_recipe_is_refused_with_its_file_and_field_named(tmp_path: Path, yaml: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, yaml)
    assert said in str(caught.value)
    assert "recipe.yaml" in str(caught.value)


def test_several_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"train\.epochs: .*; train\.nonsense: "):
        load(tmp_path, BASE + "train: {epochs: 0, nonsense: 1}\n")


def test_a_recipe_that_is_not_there_is_told_with_where_to_find_some(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.yaml: No such file.*recipes/ has some"):
        load_settings(Recipe, flags={}, yaml_file=tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("DISTILL_TRAIN__EPOHCS", "did you mean DISTILL_TRAIN__EPOCHS?"),
        ("DISTILL_TRAIN_EPOCHS", "did you mean DISTILL_TRAIN__EPOCHS?"),
        ("distill_tarin__epochs", "did you mean DISTILL_TRAIN__EPOCHS?"),
        ("DISTILL_XYZZY", "DISTILL_XYZZY: unknown environment variable; unset it"),
    ],
)
def test_a_misspelt_variable_is_refused_with_the_nearest_right_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, said: str
) -> None:
    monkeypatch.setenv(variable, "3")
    with pytest.raises(SettingsError) as caught:
        load(tmp_path)
    assert said in str(caught.value)


def test_a_variable_that_cannot_be_read_is_refused_with_its_section_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_HARVEST__STOP", "not json")
    with pytest.raises(SettingsError, match="harvest"):
        load(tmp_path)


def test_the_cache_variable_is_no_recipe_setting_and_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    load(tmp_path)
    assert cache_dir() == tmp_path / "cache"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"train.epohcs": 1}, "did you mean train.epochs?"),
        ({"train": 5, "train.epochs": 2}, "train is a section"),
        ({"train.epochs": 2, "train": {"epochs": 3}}, "given both as a whole and setting by setting"),
    ],
)
def test_a_wrong_flag_is_refused(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(Recipe, flags=flags)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"dataset.path": "mine.csv"}, "path: the sample is embedded"),
        ({"dataset.name": "meqsum", "dataset.path": "a.xlsx", "dataset.hub": "a/b"}, "give one of them"),
        ({"dataset.hub": "a/b"}, "only name meqsum is read from the Hub"),
        ({"dataset.name": "meqsum", "dataset.question_column": "CHQ"}, "only name file has columns of your own"),
    ],
)
def test_a_data_set_setting_that_would_be_ignored_is_refused(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, **values)
    assert said in str(caught.value)


def test_a_key_on_the_command_line_is_refused_and_not_repeated() -> None:
    with pytest.raises(SettingsError) as caught:
        assignments(["teacher.api_key=hush-hush"])
    assert "api_key_file" in str(caught.value)
    assert "hush" not in str(caught.value)


def test_a_flag_may_take_a_setting_back_and_give_another_in_its_place(tmp_path: Path) -> None:
    recipe = load(tmp_path, teacher__url=None, **{"teacher.launch.engine": "scripted"})
    assert recipe.teacher.identity.startswith("launch:scripted")


LAUNCHES = "name: r\nteacher: {launch: {engine: scripted}}\n"


def test_a_url_by_flag_variable_or_recipe_takes_the_place_of_a_launched_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(tmp_path, LAUNCHES).teacher.launch is not None
    by_flag = load(tmp_path, LAUNCHES, teacher__url="http://u/v1")
    by_recipe = load(tmp_path, LAUNCHES.replace("launch:", "url: 'http://u/v1', launch:"))
    monkeypatch.setenv("DISTILL_TEACHER__URL", "http://u/v1")
    by_variable = load(tmp_path, LAUNCHES)
    assert by_flag == by_recipe == by_variable
    assert by_flag.model_dump(mode="json")["teacher"]["launch"] is None
    assert by_flag.teacher.identity == "http://u/v1"


def test_another_launched_model_has_another_name_so_that_no_server_of_before_answers_in_its_place(tmp_path: Path) -> None:
    def name(model: str) -> str:
        return load(tmp_path, f"name: r\nteacher: {{launch: {{engine: local, model: '{model}'}}}}\n").teacher.public_name

    assert (name("embedded:one"), name("embedded:two")) == ("embedded:one", "embedded:two")
    with pytest.raises(SettingsError, match="teacher: model: a launched teacher has the name of its own model"):
        load(tmp_path, LAUNCHES, teacher__model="oracle")
    assert load(tmp_path, LAUNCHES, teacher__url="http://u/v1").teacher.public_name == "teacher"


def test_the_variables_of_compose_may_stand_in_the_environment_of_our_own_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    example = (Path(__file__).parents[2] / ".env.example").read_text()
    names = re.findall(r"^#([A-Z_]+)=", example, re.MULTILINE)
    assert "DISTILL_UID" in names
    numbers = ("PORT", "PER_MINUTE", "PER_DAY", "CONCURRENT_REQUESTS")
    for name in names:
        monkeypatch.setenv(name, "8000" if name.endswith(numbers) else "x")
    before = load(tmp_path, LAUNCHES)
    assert before.teacher.public_name == "scripted"
    assert load_settings(TeacherServiceSettings, flags={}).engine == "local"
    assert load_settings(StudentServiceSettings, flags={"registry": "r"}).public_name == "student"


def test_an_empty_variable_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load(tmp_path, LAUNCHES + "train: {epochs: 5}\n")
    for variable in ("TEACHER__URL", "TEACHER__MODEL", "TEACHER__API_KEY_FILE", "TRAIN__EPOCHS", "HARVEST__STOP", "NAME", "TRAIN"):
        monkeypatch.setenv(f"DISTILL_{variable}", "")
    assert load(tmp_path, LAUNCHES + "train: {epochs: 5}\n") == before
    monkeypatch.setenv("TEACHER_ENGINE", "")
    monkeypatch.setenv("TEACHER_UPSTREAM_KEY_FILE", "")
    settings = load_settings(TeacherServiceSettings, flags={})
    assert (settings.engine, settings.upstream_key_file) == ("local", None)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sample__samples": 0}, r"train\.rounds=2, sample\.samples=0: .*; raise sample\.samples; or give triplets\.on_policy=0"),
        ({"triplets__rejected_from": ["teacher"]}, r"train\.rounds=2, triplets\.rejected_from: .*; name student there; or give"),
    ],
)
def test_a_second_round_that_could_reject_nothing_of_the_students_is_refused(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        load(tmp_path, train__rounds=2, **settings)
    assert load(tmp_path, train__rounds=1, **settings).train.rounds == 1
    assert load(tmp_path, train__rounds=2, triplets__on_policy=0, **settings).train.rounds == 2  # a baseline, and asked for


def test_patience_without_validations_is_refused_with_both_settings_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"train: patience, validate_every: .*give train\.validate_every, or leave train\.patience out"):
        load(tmp_path, LAUNCHES + "train: {patience: 2, validate_every: 0}\n")
    assert load(tmp_path, LAUNCHES + "train: {patience: 2}\n").train.patience == 2


def test_settings_of_procedure_are_settings() -> None:
    assert set(dotted_names(Recipe)) >= set(PROCEDURE)


def test_assignments_are_read_as_yaml() -> None:
    given = ["train.epochs=2", "harvest.stop=[a, b]", "teacher.url=", "task.instruction=a=b", "name=yes please"]
    assert assignments(given) == {
        "train.epochs": 2,
        "harvest.stop": ["a", "b"],
        "teacher.url": None,
        "task.instruction": "a=b",
        "name": "yes please",
    }


@pytest.mark.parametrize("pair", ["train.epochs", "=3", "", "train.epochs=[1"])
def test_an_assignment_that_is_none_is_refused(pair: str) -> None:
    with pytest.raises(SettingsError, match="--set"):
        assignments([pair])


def test_a_secret_is_given_directly_or_by_file_and_shown_nowhere(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("from-file\n")
    assert read_secret(SecretStr("direct"), tmp_path / "key", "teacher.api_key") == "direct"
    assert read_secret(None, tmp_path / "key", "teacher.api_key") == "from-file"
    assert read_secret(SecretStr(""), tmp_path / "key", "teacher.api_key") == "from-file"
    assert read_secret(SecretStr(""), None, "teacher.api_key") is None
    assert read_secret(None, None, "teacher.api_key") is None
    recipe = load(tmp_path, BASE.replace("}", ", api_key: hush-hush}"))
    assert "hush" not in repr(recipe) + recipe.model_dump_json()


def test_a_secret_file_that_is_missing_empty_or_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, said in (("none", "cannot read .*none: No such file"), ("empty", "is empty"), ("binary", "cannot read .*binary")):
        with pytest.raises(SettingsError, match=f"teacher.api_key_file: .*{said}"):
            read_secret(None, tmp_path / name, "teacher.api_key")
