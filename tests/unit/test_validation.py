"""Which weights a round keeps, and that their score is told beside them, also where a step done again after a kill scores otherwise."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny_models
import torch
from safetensors.torch import load_file

from shared.artifacts import Ledger
from shared.errors import TrainingError
from student_trainer.training.rounds import BEST
from student_trainer.training.validation import ValidationRow, Validator, best_validation


def validated(folder, scores, *, patience=None, answers=lambda prompts: ["x"] * len(prompts)):
    """Validate steps that score so, with weights that are filled with the score; the ledger's rows and whether it told to stop."""
    student = tiny_models.student("decoder-only").float()
    weight, control = next(iter(student.trained().values())), SimpleNamespace(should_training_stop=False)

    class Answers:
        def __init__(self):
            self.student = student

        def __call__(self, prompts):
            return answers(prompts)

    with Ledger(folder / "validation.jsonl", ValidationRow) as ledger:
        left = iter(scores.values())
        validator = Validator(
            Answers(),
            [[4]],
            lambda texts: next(left),
            folder,
            ledger,
            every=1.0,
            patience=patience,
            epoch=lambda: 0.0,
            report=lambda *a, **k: None,
        )
        for step, score in scores.items():
            with torch.no_grad():
                weight.fill_(score)
            validator._validate(step, step / 4, control, process=0, processes=1)
        return ledger.rows(), control.should_training_stop


def kept(folder):
    """The score that the kept weights had, and what is said of it."""
    weight = next(iter(load_file(folder / BEST).values())).flatten()[0].item()
    return round(weight, 4), best_validation(folder)


def test_the_first_of_the_best_is_kept(tmp_path):
    rows, _ = validated(tmp_path, {4: 0.3, 8: 0.5, 12: 0.5, 16: 0.4})
    assert kept(tmp_path) == (0.5, rows[1])


@pytest.mark.parametrize(
    ("before", "again", "best"),
    [
        ({4: 0.4}, {4: 0.5, 8: 0.45}, (4, 0.5)),
        ({4: 0.5}, {4: 0.4, 8: 0.45}, (4, 0.5)),
        ({4: 0.4, 8: 0.5}, {8: 0.45, 12: 0.46}, (8, 0.5)),
        ({4: 0.4, 8: 0.5}, {4: 0.4, 8: 0.5}, (8, 0.5)),
    ],
)
def test_after_a_kill_the_kept_weights_and_what_is_said_of_them_belong_together(before, again, best, tmp_path):
    validated(tmp_path, before)
    rows, _ = validated(tmp_path, again)
    weight, row = kept(tmp_path)
    assert (row.step, row.rouge_l) == best
    assert weight == best[1]
    assert {r.step: r.rouge_l for r in rows} == {**before, **again}


@pytest.mark.parametrize("moment", ["save_file", "os.replace", "fsync_dir"])
def test_killed_while_better_weights_take_their_place_it_has_whole_ones_with_their_score(moment, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*anything, **more):
        raise Killed

    validated(tmp_path, {4: 0.4})
    with monkeypatch.context() as patched:
        patched.setattr(f"student_trainer.training.trainer.{moment}", kill)
        with pytest.raises(Killed):
            validated(tmp_path, {8: 0.5})
    weight, row = kept(tmp_path)
    assert row.rouge_l == weight == (0.5 if moment == "fsync_dir" else 0.4)
    validated(tmp_path, {8: 0.45})
    weight, row = kept(tmp_path)
    assert row.rouge_l == weight == (0.5 if moment == "fsync_dir" else 0.45)


def test_a_step_that_says_the_same_again_has_one_row(tmp_path):
    validated(tmp_path, {4: 0.4, 8: 0.5})
    rows, _ = validated(tmp_path, {8: 0.5, 12: 0.1})
    assert [row.step for row in rows] == [4, 8, 12]


def test_patience_counts_validations_since_the_best_also_over_a_kill(tmp_path):
    assert not validated(tmp_path, {4: 0.5, 8: 0.4}, patience=2)[1]
    assert validated(tmp_path, {8: 0.4, 12: 0.5}, patience=2)[1]
    assert not validated(tmp_path, {16: 0.6}, patience=2)[1]


def test_out_of_memory_while_answering_names_what_to_lower(tmp_path):
    with pytest.raises(TrainingError, match=r"step 4 is validated; .*another --out \(with --answers-from.* lower train\.validation_max"):
        validated(tmp_path, {4: 0.5}, answers=lambda prompts: torch.empty(10**15))
