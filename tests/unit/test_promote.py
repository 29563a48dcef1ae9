"""Promotion: only what is provably better, and exactly what was evaluated."""

from __future__ import annotations

import json

import pytest
from evaluated import export, exported_run, recipe
from huggingface_hub import ModelCard

import evaluator.run
from evaluator import rollback
from evaluator.promote import main, promote
from evaluator.systems import ALWAYS, Evaluated, System
from shared import registry as store
from shared.artifacts import Run, sha256_file, write_json, write_jsonl
from shared.cli import main as cli
from shared.contracts import Prediction
from shared.datasets.stage import prepare
from shared.errors import DataError, PromotionRefused, RunMismatch, SettingsError, StageOrder
from shared.settings import evaluation_settings


def evaluated_run(path, *, better: bool = True, **changes):
    """A run whose distilled student copies every other reference, and whose baseline copies none or the same ones."""
    run = exported_run(path, **changes)
    stage, test = run.stage("evaluation", ["dataset", "model"]), prepare(run)["test"]

    def text(system, index, example):
        return example.summary if index % 2 and (system == "distilled" or not better) else "What is it?"

    predictions = [Prediction(system=s, example_id=e.id, text=text(s, i, e)) for s in ALWAYS for i, e in enumerate(test)]
    write_jsonl(stage.path / "predictions.jsonl", predictions)
    systems = [System(name=name, group="distilled" if name == "distilled" else "trivial", about="a test") for name in ALWAYS]
    write_json(stage.path / "systems.json", Evaluated(systems=tuple(systems)).model_dump(mode="json"))
    for name in ("report.html", "report.json", "report.md"):
        (stage.path / name).write_text("report")
    stage.finish([file for file in stage.path.iterdir() if file.is_file()], settings=evaluation_settings(run.recipe), counts={"given": {}})
    return run


def test_a_better_student_is_promoted_with_its_card_its_report_and_its_task(tmp_path):
    run = evaluated_run(tmp_path / "run")
    promoted = promote(run, tmp_path / "registry")
    assert store.current(tmp_path / "registry") == promoted
    assert promoted.task == run.recipe.task.model_dump(mode="json")
    assert set(promoted.scores) == {"rouge1", "rouge2", "rougeL", "bleu", "sacrebleu", "chrf"}
    assert promoted.run == str(run.path.resolve())
    version = tmp_path / "registry" / "versions" / promoted.version
    kept = {"report.html", "report.json", "report.md", "predictions.jsonl", "systems.json", "test.jsonl"}
    assert {"README.md", "serving", *kept} <= {p.name for p in version.iterdir()}


def test_the_registry_keeps_the_card_with_scores_and_the_run_the_one_that_was_exported(tmp_path):
    run = evaluated_run(tmp_path / "run")
    version = promote(run, tmp_path / "registry")
    kept = ModelCard((tmp_path / "registry" / "versions" / version.version / "README.md").read_text())
    scores = {result.metric_type: result.metric_value for result in kept.data.eval_results}
    assert scores == pytest.approx(version.scores, abs=1e-6)
    assert kept.data.eval_results[0].dataset_args == {"rows": 40}
    assert "points over student-zero-shot on 40 test rows" in kept.text
    recorded = {output.path: output.sha256 for output in run.manifest("model").outputs}
    assert sha256_file(run.path / "model" / "README.md") == recorded["model/README.md"]


def test_a_student_whose_card_has_gone_is_promoted_with_its_scores_alone(tmp_path):
    run = evaluated_run(tmp_path / "run")
    (run.path / "model" / "README.md").unlink()
    version = promote(run, tmp_path / "registry")
    assert "| **distilled** |" in (tmp_path / "registry" / "versions" / version.version / "README.md").read_text()


def test_a_student_that_is_no_better_is_refused_with_exit_3_and_what_is_served_stays(tmp_path):
    registry = tmp_path / "registry"
    served = promote(evaluated_run(tmp_path / "good"), registry)
    with pytest.raises(PromotionRefused, match=r"\+0\.0 points over student-zero-shot on 40 test rows") as refused:
        promote(evaluated_run(tmp_path / "same", better=False), registry)
    assert refused.value.exit_code == 3
    assert store.current(registry) == served
    assert [event.what for event in store.history(registry)] == ["promoted", "refused"]
    assert "points over" in store.history(registry)[-1].reason


def test_a_margin_that_the_gain_does_not_exceed_refuses(tmp_path):
    with pytest.raises(PromotionRefused, match="not above 90 points"):
        promote(evaluated_run(tmp_path / "run", promote={"margin": 0.9}), tmp_path / "registry")


@pytest.mark.parametrize("metric", ["rouge1", "bleu"])
def test_the_rule_can_look_at_another_metric(tmp_path, metric):
    run = evaluated_run(tmp_path / "run", promote={"metric": metric})
    promote(run, tmp_path / "registry")
    assert store.history(tmp_path / "registry")[-1].reason.startswith(f"{metric} +")


def test_an_unknown_baseline_is_refused_with_those_there_are(tmp_path):
    run = evaluated_run(tmp_path / "run", promote={"baseline": "teacher"})
    with pytest.raises(SettingsError, match=r"promote\.baseline: 'teacher'.*teacher-few-shot"):
        promote(run, tmp_path / "registry")


def test_a_model_exported_after_its_evaluation_is_not_promoted(tmp_path):
    run = evaluated_run(tmp_path / "run")
    export(run, "other weights")
    with pytest.raises(StageOrder, match="distill evaluate"):
        promote(run, tmp_path / "registry")


def test_a_run_evaluated_under_another_rule_is_evaluated_again_before_it_is_promoted(tmp_path):
    run = evaluated_run(tmp_path / "run")
    other = Run.open(run.path, recipe(promote={"metric": "rouge1"}))
    with pytest.raises(StageOrder, match="evaluated with other settings"):
        promote(other, tmp_path / "registry")


def test_a_refused_regression_is_told_with_the_metric_and_what_is_served_stays(tmp_path):
    registry = tmp_path / "registry"
    served = promote(evaluated_run(tmp_path / "good"), registry)
    run = evaluated_run(tmp_path / "run", weights="b", promote={"min_rows": 41})
    with pytest.raises(PromotionRefused, match=r"40 scored test rows: promote\.min_rows is 41"):
        promote(run, registry)
    assert store.current(registry) == served


@pytest.mark.parametrize(
    "name", ["model/serving/model.bin", "evaluation/predictions.jsonl", "evaluation/report.json", "dataset/test.jsonl"]
)
def test_a_file_changed_by_hand_after_the_evaluation_is_named_and_not_promoted(tmp_path, name):
    run = evaluated_run(tmp_path / "run")
    file = run.path / name
    file.write_bytes(file.read_bytes()[:-2] + b" \n")  # the same size, which a glance at the folder does not tell
    with pytest.raises(DataError, match=file.name):
        promote(run, tmp_path / "registry")
    assert store.current(tmp_path / "registry") is None


def test_the_commands_promote_once_say_so_the_second_time_and_roll_back(tmp_path, capsys):
    first, second = evaluated_run(tmp_path / "a"), evaluated_run(tmp_path / "b", weights="b")
    registry = ["--registry", str(tmp_path / "registry")]
    for run in (first, second, second):
        (tmp_path / "recipe.yaml").write_text(run.recipe.model_dump_json())
        assert main(["--recipe", str(tmp_path / "recipe.yaml"), "--out", str(run.path), *registry]) == 0
    assert rollback.main(registry) == 0
    said = capsys.readouterr().out
    assert said.count("promoted: version") == 2
    assert said.count("is served already, nothing to do") == 1
    assert "rolled back: version" in said
    assert store.current(tmp_path / "registry").run == str(first.path.resolve())


def test_a_canary_is_tried_then_promoted_by_the_command_that_says_what_to_do_next(tmp_path, capsys):
    first, second = evaluated_run(tmp_path / "a"), evaluated_run(tmp_path / "b", weights="b")
    registry = tmp_path / "registry"
    served = promote(first, registry)
    (tmp_path / "recipe.yaml").write_text(second.recipe.model_dump_json())
    command = ["--recipe", str(tmp_path / "recipe.yaml"), "--out", str(second.path), "--registry", str(registry)]
    capsys.readouterr()
    assert main([*command, "--canary", "0.1"]) == 0
    tried = store.canary(registry)
    assert (tried.share, tried.promoted.run) == (0.1, str(second.path.resolve()))
    assert capsys.readouterr().out == (
        f"canary: version {tried.promoted.version} gets 10% of the requests; `distill promote` makes it the served one, "
        "`distill rollback` ends it\n"
    )
    assert store.current(registry) == served
    kept = {"README.md", "serving", "report.html", "test.jsonl"}
    assert kept <= {p.name for p in (registry / "versions" / tried.promoted.version).iterdir()}
    assert main([*command, "--canary", "0.1"]) == 0
    assert "is the canary already, nothing to do" in capsys.readouterr().out
    assert main(command) == 0
    assert f"promoted: version {tried.promoted.version}" in capsys.readouterr().out
    assert (store.current(registry).version, store.canary(registry)) == (tried.promoted.version, None)


def test_a_promotion_beside_which_another_canary_ends_says_so(tmp_path, capsys):
    registry = tmp_path / "registry"
    promote(evaluated_run(tmp_path / "a"), registry)
    tried = promote(evaluated_run(tmp_path / "b", weights="b"), registry, canary=0.5)
    promote(evaluated_run(tmp_path / "c", weights="c"), registry)
    assert f"the canary, version {tried.version}, is over" in capsys.readouterr().out


@pytest.mark.parametrize("share", ["10%", "10", "1", "0", "-0.1", "nan", "", "a tenth"])
def test_a_canary_with_a_share_that_is_none_is_refused_before_anything_is_read(tmp_path, share):
    with pytest.raises(SettingsError, match=r"--canary .*: give the share of the requests as a number above 0 and below 1"):
        main(["--recipe", "none.yaml", "--out", str(tmp_path / "none"), f"--canary={share}"])
    assert not (tmp_path / "none").exists()


def test_a_student_that_is_no_better_does_not_become_the_canary_either(tmp_path):
    registry = tmp_path / "registry"
    promote(evaluated_run(tmp_path / "good"), registry)
    with pytest.raises(PromotionRefused, match="points over student-zero-shot"):
        promote(evaluated_run(tmp_path / "same", better=False), registry, canary=0.1)
    assert store.canary(registry) is None
    assert [event.what for event in store.history(registry)] == ["promoted", "refused"]


def test_a_canary_in_an_empty_registry_ends_with_exit_3_and_the_remedy(tmp_path, capsys):
    run = evaluated_run(tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(run.recipe.model_dump_json())
    assert cli(["promote", "--recipe", str(tmp_path / "recipe.yaml"), "--out", str(run.path), "--canary", "0.1"]) == 3
    assert "promote without --canary" in capsys.readouterr().err
    assert not (run.path / "registry").exists()


@pytest.mark.parametrize("ended", [False, True])
def test_an_evaluation_with_nothing_new_promotes_no_canary_and_none_that_was_rolled_back(tmp_path, ended):
    registry = tmp_path / "registry"
    served, run = promote(evaluated_run(tmp_path / "first"), registry), evaluated_run(tmp_path / "second", weights="b")
    promote(run, registry, canary=0.1)
    if ended:
        store.rollback(registry)
    assert evaluate_and_promote(run, "--registry", str(registry)) == 0
    assert store.current(registry) == served
    assert (store.canary(registry) is None) == ended


def evaluate_and_promote(run, *more):
    recipe = run.path.with_suffix(".yaml")
    recipe.write_text(run.recipe.model_dump_json())
    return evaluator.run.main(["--recipe", str(recipe), "--out", str(run.path), "--promote", *more])


@pytest.mark.parametrize("scored_again", [False, True])
def test_an_evaluation_goes_on_with_the_promotion_also_when_it_was_complete(tmp_path, capsys, scored_again):
    run = evaluated_run(tmp_path / "run")
    (run.path / "evaluation" / "answers").mkdir()
    again = ["--score-only"] if scored_again else []
    assert evaluate_and_promote(run, "--registry", str(tmp_path / "registry"), *again) == 0
    assert ("evaluation: complete, nothing to do" in capsys.readouterr().out) is not scored_again
    assert store.current(tmp_path / "registry").run == str(run.path.resolve())
    assert evaluate_and_promote(run) == 0
    assert store.current(run.path / "registry") is not None


def test_an_evaluation_with_a_refused_promotion_ends_as_the_promotion_does(tmp_path, capsys):
    run = evaluated_run(tmp_path / "run", better=False)
    recipe = tmp_path / "run.yaml"
    recipe.write_text(run.recipe.model_dump_json())
    assert cli(["evaluate", "--recipe", str(recipe), "--out", str(run.path), "--promote"]) == 3
    assert "distill evaluate: not promoted: " in capsys.readouterr().err


def test_an_evaluation_with_nothing_new_leaves_a_rollback_as_it_is(tmp_path, capsys):
    registry = tmp_path / "registry"
    first = promote(evaluated_run(tmp_path / "first"), registry)
    run = evaluated_run(tmp_path / "second", weights="b")
    promote(run, registry)
    store.rollback(registry)
    assert evaluate_and_promote(run, "--registry", str(registry)) == 0
    assert "left as it is, since it was rolled back" in capsys.readouterr().out
    assert store.current(registry).version == first.version


def test_a_student_that_was_never_promoted_is_although_another_one_was_rolled_back(tmp_path):
    registry = tmp_path / "registry"
    for name in "ab":
        promote(evaluated_run(tmp_path / name, weights=name), registry)
    run = evaluated_run(tmp_path / "c", weights="c")  # killed after its evaluation
    store.rollback(registry)
    assert evaluate_and_promote(run, "--registry", str(registry)) == 0
    assert store.current(registry).run == str(run.path.resolve())


def test_what_is_no_registry_is_refused_before_anything_is_scored(tmp_path, capsys):
    run = evaluated_run(tmp_path / "run")
    capsys.readouterr()
    with pytest.raises(RunMismatch, match="is a run directory"):
        evaluate_and_promote(run, "--registry", str(run.path), "--score-only")
    assert capsys.readouterr().out == ""


def test_a_registry_without_a_promotion_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="--promote"):
        evaluator.run.main(["--recipe", "r", "--out", "o", "--registry", "x"])


def test_the_registry_of_a_run_is_its_own_unless_another_is_named(tmp_path):
    run = evaluated_run(tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(json.dumps(run.recipe.model_dump(mode="json")))
    assert main(["--recipe", str(tmp_path / "recipe.yaml"), "--out", str(run.path)]) == 0
    assert store.current(run.path / "registry") is not None
