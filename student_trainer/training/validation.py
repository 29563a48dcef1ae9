"""ROUGE-L of generated answers to the validation rows: which checkpoint is the best one, and when to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import safe_open
from transformers import TrainerCallback

from shared.artifacts import Ledger
from shared.contracts import Contract
from student_trainer.training.rounds import BEST, is_first
from student_trainer.training.student import Student
from student_trainer.training.trainer import ANOTHER_RUN, damage_told, out_of_memory_told, whole_weights, write_weights

VALIDATION = "validation"
"""What the file of the best weights says beside them."""
BATCH = 16
OUT_OF_MEMORY = (
    f"out of memory while step {{step}} is validated; begin in another --out {ANOTHER_RUN} with a lower train.validation_max_tokens, or "
    "with train.validate_every=0, which takes the student after the last step"
)


class ValidationRow(Contract):
    """One validation: the student as it was after that step."""

    step: int
    epoch: float
    """Steps by the steps of an epoch."""
    rouge_l: float
    """Mean ROUGE-L F1 with the references, in [0, 1]."""


@dataclass(frozen=True)
class Answerer:
    """Greedy answers of a student that is still in torch."""

    student: Student
    tokenizer: Any
    pad_token_id: int
    max_tokens: int
    stop: tuple[str, ...]

    def __call__(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """The text of each answer, up to the first stop text. prompts: token ids."""
        answers = [""] * len(prompts)
        ordered = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for first in range(0, len(ordered), BATCH):
            batch = ordered[first : first + BATCH]
            generated = self.student.generate(
                self._padded([prompts[i] for i in batch]),
                max_new_tokens=self.max_tokens,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.pad_token_id,
            )
            for index, ids in zip(batch, generated.tolist(), strict=True):
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                answers[index] = text[: min((at for s in self.stop if (at := text.find(s)) >= 0), default=len(text))].strip()
        return answers

    def _padded(self, prompts: list[Sequence[int]]) -> dict[str, torch.Tensor]:
        """On the left for a decoder-only model, whose answers begin where the row ends."""
        longest, left = max(map(len, prompts)), self.student.kind == "decoder-only"
        ids, mask = [], []
        for prompt in prompts:
            gap = longest - len(prompt)
            filling = [self.pad_token_id] * gap
            ids.append([*filling, *prompt] if left else [*prompt, *filling])
            mask.append([0] * gap + [1] * len(prompt) if left else [1] * len(prompt) + [0] * gap)
        device = self.student.device
        return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


class Validator(TrainerCallback):  # type: ignore[misc]
    """Validates every so many epochs and after the last step; keeps the best weights; ends training that gets no better.

    All processes answer, each a part; the first one, which has the ledger, decides.
    """

    def __init__(
        self,
        answer: Answerer,
        prompts: Sequence[Sequence[int]],
        score: Callable[[Sequence[str]], float],
        folder: Path,
        ledger: Ledger[ValidationRow] | None,
        *,
        every: float,
        patience: int | None,
        epoch: Callable[[], float],
        report: Callable[..., None],
    ) -> None:
        """score: of all answers in the order of `prompts`; every: epochs; patience: validations without a better score; None: no end;
        epoch, report: as `Resumable` has them.
        """
        self._answer, self._prompts, self._score = answer, prompts, score
        self._folder, self._ledger, self._every, self._patience = folder, ledger, every, patience
        self._epoch_now, self._report = epoch, report
        self._rows = {row.step: row for row in ledger.rows()} if ledger else {}
        self._best = best_validation(folder)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._epoch = self._epoch_now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before, self._epoch = self._epoch, self._epoch_now()
        passed = int(before / self._every + 1e-6) < int(self._epoch / self._every + 1e-6)
        if passed or state.global_step >= state.max_steps:
            self._validate(state.global_step, self._epoch, control, process=args.process_index, processes=args.world_size)

    def _validate(self, step: int, epoch: float, control: Any, *, process: int, processes: int) -> None:
        begun, student = time.monotonic(), self._answer.student
        student.eval()
        # as many for each process, for under FSDP all of them work on every batch; what is answered twice is answered alike
        mine = [i % len(self._prompts) for i in range(process, -(-len(self._prompts) // processes) * processes, processes)]
        with out_of_memory_told(lambda: OUT_OF_MEMORY.format(step=step)):
            answers = list(zip(mine, self._answer([self._prompts[i] for i in mine]), strict=True))
        if processes > 1:
            answers = gather_object(answers)
        student.train()
        row = ValidationRow(step=step, epoch=epoch, rouge_l=self._score([text for _, text in sorted(dict(answers).items())]))
        # with what is kept, which may be of a step after this one: one that was lost in a kill, and on a GPU never comes again to the bit
        better = self._best is None or row.rouge_l > self._best.rouge_l
        best = step if better or self._best is None else self._best.step
        since = sum(best < other <= step for other in {*self._rows, step})
        better, stop = broadcast_object_list([better, self._patience is not None and since >= self._patience])
        if better:
            self._best = row
            keep_weights(student, self._folder, row)
        self._report({"validation_rouge_l": row.rouge_l}, seconds=time.monotonic() - begun)
        if self._ledger is not None:
            note = ", the best so far" if better else ""
            print(f"train: step {step}: validation ROUGE-L {100 * row.rouge_l:.1f} on {len(self._prompts)} rows{note}", flush=True)
            if self._rows.get(step) != row:  # after a kill the same step says the same again, but on a GPU
                self._ledger.append(row)
            self._rows[step] = row
        if stop:
            control.should_training_stop = True


def keep_weights(student: Student, folder: Path, row: ValidationRow | None = None) -> None:
    """Keep the trained weights as they are in folder/BEST, and with them their validation.

    All processes take part, the first one writes. Raises StorageError.
    """
    weights = whole_weights(student)
    if is_first():
        write_weights(weights, folder / BEST, metadata={} if row is None else {VALIDATION: row.model_dump_json()})


def best_validation(folder: Path) -> ValidationRow | None:
    """The validation of the weights that are kept in `folder`; None if there are none, or none that were validated."""
    if not (folder / BEST).exists():
        return None
    with damage_told(folder), safe_open(folder / BEST, "pt") as weights:
        said = (weights.metadata() or {}).get(VALIDATION)
        return None if said is None else ValidationRow.model_validate_json(said)
