"""ORPO on packed rows: a `transformers.Trainer` that gives the same result however often it is killed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from shared.artifacts import new_directory, read_json, temporary_name
from shared.contracts import Contract
from shared.errors import TrainingError
from shared.settings import TrainSettings
from student_trainer.training.losses import Scores, score
from student_trainer.training.packing import Collator, Packed, cells
from student_trainer.training.student import Student

WEIGHTS = "trained.safetensors"
"""What a checkpoint holds of the weights: only those that training changes."""


class LogRow(Contract):
    """One optimizer step. Log-probabilities are means over a response's tokens, in nats."""

    step: int
    epoch: float
    loss: float
    nll: float
    """A chosen token."""
    odds_ratio: float | None = None
    """L_OR a pair; like the rest below None without rejected responses."""
    accuracy: float | None = None
    """Share of pairs whose chosen response is the more likely one, by mean log-probability."""
    logp_chosen: float | None = None
    logp_rejected: float | None = None
    margin: float | None = None
    """logp_chosen - logp_rejected."""
    grad_norm: float
    learning_rate: float
    tokens_per_s: float
    """Tokens of packed rows, without padding, by the seconds of the step."""


class LengthGrouped(Sampler[int]):
    """Examples shuffled, then grouped by length so that batches hold little padding.

    The order depends on the seed and the epoch alone. (Trainer's own "group_by_length" draws it from the global random
    state, which a resumed run no longer has: it would see other batches.)
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed, self._epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        return iter(get_length_grouped_indices(self._lengths, self._batch_size, generator=generator))


def arguments(settings: TrainSettings, output: Path, *, seed: int) -> TrainingArguments:
    """What `Trainer` must know of our settings. One device; `checkpoint-N` folders go to `output`."""
    args = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=settings.warmup_fraction,  # below 1 it is a fraction of all steps
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch_fused",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.checkpoint_steps,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
        seed=seed,
        dataloader_pin_memory=False,
    )
    assert args.device is not None  # reading it counts the devices, which the next line overrides
    args._n_gpu = 1  # several would mean nn.DataParallel, which would split a packed batch
    return args


class OrpoTrainer(Trainer):  # type: ignore[misc]
    """L = NLL of the chosen tokens + lambda * mean L_OR of the pairs, both over the whole optimizer step."""

    # our denominators already span all micro-batches: Trainer must not divide by their number once more
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        student: Student,
        rows: list[Packed],
        collator: Collator,
        args: TrainingArguments,
        *,
        orpo_lambda: float,
        on_row: Callable[[LogRow], None],
    ) -> None:
        """on_row: called with every step's row, before the step's checkpoint is written."""
        super().__init__(model=student, args=args, train_dataset=rows, data_collator=collator)
        self.remove_callback(PrinterCallback)
        self._lambda, self._on_row = orpo_lambda, on_row
        self._step: list[tuple[Scores, int]] = []
        self._writing_to = Path(args.output_dir or ".")
        self._counts = (1.0, 0.0)
        self._step_began = time.monotonic()

    def go_on(self) -> None:
        """Train to the end, from the last checkpoint if there is one."""
        found = checkpoints(Path(self.args.output_dir))
        if not found:
            self.train()
            return
        state = read_json(found[-1] / "trainer_state.json")
        if state["global_step"] < state["max_steps"]:
            self.train(resume_from_checkpoint=str(found[-1]))
        else:  # killed between the last step and the end of the stage
            self._load_from_checkpoint(str(found[-1]))

    def padding_ratio(self) -> float:
        """All cells of the first epoch's batches by those that hold a token."""
        order, size = list(self._get_train_sampler()), self.args.train_batch_size
        batches = [self.data_collator([self.train_dataset[i] for i in order[k : k + size]]) for k in range(0, len(order), size)]
        real, total = map(sum, zip(*map(cells, batches), strict=True))
        return total / real

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGrouped([row.length for row in self.train_dataset], size, self.args.seed)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        """(2,) chosen tokens and pairs of the whole optimizer step."""
        self._step, self._step_began = [], time.monotonic()
        tokens = sum(int(b["chosen"][b["response"]].sum()) for b in batch_samples)
        self._counts = (tokens, sum(len(b["pairs"]) for b in batch_samples))
        return torch.tensor(self._counts)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """() loss of a micro-batch. Raises TrainingError naming the examples if it is not finite."""
        assert isinstance(num_items_in_batch, Tensor)
        chosen_tokens, pairs = num_items_in_batch.tolist()
        scores = score(model(inputs), inputs["response"], inputs["chosen"], inputs["pairs"])
        loss = scores.loss(self._lambda, chosen_tokens=chosen_tokens, pairs=pairs)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}, on examples {', '.join(inputs['example_ids'])}; lower "
                "train.learning_rate or set train.precision=fp32. The last checkpoint is kept"
            )
        self._step.append((scores.detached(), cells(inputs)[0]))
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Complete the row of a step from what `compute_loss` kept."""
        if "loss" not in logs:  # Trainer's own summary at the end
            return
        seconds = time.monotonic() - self._step_began
        chosen_tokens, pairs = self._counts
        row = {
            "step": self.state.global_step,
            "epoch": self.state.epoch,
            "loss": logs["loss"],
            "nll": sum(s.nll.item() for s, _ in self._step) / chosen_tokens,
            "grad_norm": logs.get("grad_norm", 0.0),
            "learning_rate": logs["learning_rate"],
            "tokens_per_s": sum(t for _, t in self._step) / seconds,
        }
        if pairs:
            chosen = torch.cat([s.chosen for s, _ in self._step])
            rejected = torch.cat([s.rejected for s, _ in self._step])
            row |= {
                "odds_ratio": sum(s.odds_ratio.item() for s, _ in self._step) / pairs,
                "accuracy": (chosen > rejected).double().mean().item(),
                "logp_chosen": chosen.mean().item(),
                "logp_rejected": rejected.mean().item(),
                "margin": (chosen - rejected).mean().item(),
            }
        self._on_row(LogRow.model_validate(row))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write checkpoint-N whole or not at all, then remove the one before."""
        output = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        with new_directory(output / name) as temporary:
            self._writing_to = temporary
            super()._save_checkpoint(model, trial)
            for file in (temporary / name).iterdir():
                file.rename(temporary / file.name)
            (temporary / name).rmdir()
        for older in checkpoints(output)[:-1]:
            remove_checkpoint(older)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing_to)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().contiguous() for name, p in self.model.trained().items()}, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved, trained = load_file(Path(resume_from_checkpoint) / WEIGHTS), self.model.trained()
        if saved.keys() != trained.keys():
            raise TrainingError(f"{resume_from_checkpoint} holds other weights than this student trains; remove it to begin anew")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved[name])


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first: they get their name only when every file is on the disk."""
    return sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))


def remove_checkpoint(checkpoint: Path) -> None:
    """Take its name away first, so that half a checkpoint is never taken for a whole one."""
    doomed = temporary_name(checkpoint)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)
