"""ORPO on packed rows: a `transformers.Trainer` that gives the same result on any layout and however often it is killed."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from shared.artifacts import fsync_dir, new_directory, read_json, temporary_name
from shared.errors import StorageError, TrainingError, storage_error
from shared.settings import TrainSettings
from student_trainer.training.collate import Collator, LengthGrouped, blank
from student_trainer.training.losses import Counts, Terms, Weights, terms
from student_trainer.training.packing import Packed
from student_trainer.training.record import LogRow
from student_trainer.training.rounds import PATIENCE, checkpoints, is_first, several
from student_trainer.training.student import Student, no_memory

WEIGHTS = "trained.safetensors"
"""What a checkpoint holds of the weights: only those that training changes."""
ANOTHER_RUN = "(with --answers-from and this run its teacher is asked nothing anew)"
OUT_OF_MEMORY = (
    "out of memory at step {step}; go on with a lower train.batch_size (and train.gradient_accumulation raised by as much: the result is "
    "the same) or with train.activation_checkpointing=true. The last checkpoint is kept. If that does not help: another --out "
    f"{ANOTHER_RUN} with a lower train.max_prompt_tokens or triplets.max_rejected, with train.frozen_layers or train.lora_rank"
)
NOT_FINITE = (
    f"begin again in another --out {ANOTHER_RUN} with a lower train.learning_rate or train.precision=fp32. The last checkpoint is kept"
)
NEVER = 10**9
TENSORBOARD = "tensorboard"


def arguments(
    settings: TrainSettings, output: Path, *, seed: int, make: Callable[..., TrainingArguments] = TrainingArguments
) -> TrainingArguments:
    """What `Trainer` must know of our settings. One device a process; `checkpoint-N` folders go to `output`.

    Raises TrainingError for shards in a single process and for reports that nobody takes. make: called with all of it; another trainer's
    arguments are a subclass.
    """
    if settings.fsdp and not several():
        raise TrainingError("train.fsdp shards weights over several processes: start them with torchrun, or leave it out")
    for name in settings.report_to:
        try:
            for taken in get_reporting_integration_callbacks([name]):
                taken()
        except (ValueError, RuntimeError, ImportError) as exc:
            raise TrainingError(f"train.report_to: {name}: {exc}") from exc
    args = make(
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
        save_strategy="steps",  # after the last one, and when `Checkpointing` asks for it
        save_steps=NEVER,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[name for name in settings.report_to if name != TENSORBOARD],  # whose folder is the stage's affair
        seed=seed,
        dataloader_pin_memory=False,
        use_cpu=several() and not torch.cuda.is_available(),  # else it would not see the other processes
        ddp_find_unused_parameters=False,  # every trained weight takes part in every loss, a blank's too
        ddp_timeout=int(PATIENCE.total_seconds()),
        fsdp=settings.fsdp or None,
        fsdp_config={"fsdp_version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": True}
        if settings.fsdp
        else None,
    )
    assert args.device is not None  # reading it counts the devices, which the next line overrides
    args._n_gpu = 1  # several would mean nn.DataParallel, which would split a packed batch
    return args


TERMS = ("nll", "odds_ratio", "kl_reference", "kl_teacher_sequence", "kl_teacher_token")
SUMS = (*TERMS, "pairs", "preferred", "logp_chosen", "logp_rejected")
"""What is summed over a step's micro-batches: the terms of the loss, pairs, those whose chosen response is the likelier, their scores."""


def sums_of(found: Terms) -> Tensor:
    """(len(SUMS),) float64 of one micro-batch, left on its device: asking a GPU for a number means to wait for it."""
    of_terms = [getattr(found, name).detach() for name in TERMS]
    preferred = (found.chosen > found.rejected).sum()
    rest = [preferred.new_full((), len(found.chosen)), preferred, found.chosen.sum(), found.rejected.sum()]
    return torch.stack([value.to(sums_device(of_terms[0].device), torch.float64) for value in (*of_terms, *rest)])


def sums_device(device: torch.device) -> torch.device:
    """Where float64 is: Apple's GPUs have none."""
    return torch.device("cpu") if device.type == "mps" else device


class EpochOrder(TrainerCallback):  # type: ignore[misc]
    """Tells the sampler which epoch it is. In an epoch that is gone on with it stands behind more wrappers than Trainer looks through where
    there are several processes: they would take the first epoch's order.
    """

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        batches = train_dataloader.batch_sampler
        while hasattr(batches, "batch_sampler"):
            batches = batches.batch_sampler
        batches.sampler.set_epoch(int(state.epoch or 0))


class Resumable(Trainer):  # type: ignore[misc]
    """What a trainer of a student needs beside its loss: rows for log.jsonl, and checkpoints that are whole or not there."""

    out_of_memory = OUT_OF_MEMORY

    def __init__(self, student: Student, *, on_row: Callable[[LogRow], None], **options: Any) -> None:
        """on_row: called with every step's row, before the step's checkpoint is written; options: of the `Trainer` this is mixed into."""
        super().__init__(**options)
        if self.args.fsdp and self.accelerator.distributed_type != DistributedType.FSDP:
            # accelerate would keep a whole copy in each without a word
            raise TrainingError("train.fsdp: weights are sharded over GPUs only, and these processes have none; leave it out (DDP)")
        self.remove_callback(PrinterCallback)
        self.add_callback(EpochOrder)
        self.student, self._on_row, self._step_began = student, on_row, time.monotonic()
        self._writing_to = Path(self.args.output_dir or ".")
        self._losses: list[tuple[Tensor, Sequence[str]]] = []
        """Of the step's micro-batches so far, with the examples' ids."""
        self._steps_an_epoch = 1

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        self._steps_an_epoch = -(-len(loader) // self.args.gradient_accumulation_steps)
        return loader

    @property
    def epoch(self) -> float:
        """Epochs so far, counted in steps: Trainer counts them in micro-batches, of which layouts of the same step have more or fewer."""
        return float(self.state.global_step / self._steps_an_epoch)

    def go_on(self) -> None:
        """Train to the end, from the last checkpoint if there is one. Raises TrainingError."""
        found = checkpoints(Path(self.args.output_dir))
        with out_of_memory_told(lambda: self.out_of_memory.format(step=self.state.global_step + 1)):
            if not found:
                self.train()
                return
            with damage_told(found[-1]):
                state = read_json(found[-1] / "trainer_state.json")
                stopped = state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]
            if not stopped:
                self.train(resume_from_checkpoint=str(found[-1]))
            else:  # killed between the last step, or an early stop, and the end of the stage
                self._load_from_checkpoint(str(found[-1]))

    def _over_all_processes(self, rows: list[dict[str, float]]) -> dict[str, float]:
        """Each number summed over `rows` and over the processes."""
        if self.args.world_size == 1:
            return {name: sum(row[name] for row in rows) for name in rows[0]}
        sums = torch.tensor([list(row.values()) for row in rows], dtype=torch.float64, device=sums_device(self.args.device)).sum(0)
        return dict(zip(rows[0], self.accelerator.reduce(sums, "sum").tolist(), strict=True))

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        """The norm of a step's gradient, once a step and before the weights are touched: a GPU is waited for here and not in between.

        Raises TrainingError naming the examples if it is not finite, as it is not where a loss is not.
        """
        found = super()._get_grad_norm(model, grad_norm)
        norm = float(found.full_tensor() if isinstance(found, DTensor) else found)
        losses, self._losses = self._losses, []
        if math.isfinite(norm):
            return norm
        failed = [(loss.item(), list(ids)) for loss, ids in losses if not torch.isfinite(loss)]
        known = [id_ for _, ids in losses for id_ in ids]
        if several():  # the norm is everybody's, so that all are here
            failed, known = gather_object(failed), gather_object(known)
        step = self.state.global_step + 1
        if failed:
            values = "/".join(sorted({str(value) for value, _ in failed}))
            ids = [id_ for _, ids in failed for id_ in ids]
            raise TrainingError(f"the loss is {values} at step {step}, on examples {_listed(ids)}; {NOT_FINITE}")
        raise TrainingError(f"the gradient is not finite at step {step}, on examples {_listed(known)}; {NOT_FINITE}")

    def _complete(self, logs: dict[str, float], *, tokens: float, cells: float, **measured: float) -> None:
        """Hand on a step's row: Trainer's own `logs`, and what was `measured` over all processes."""
        seconds = time.monotonic() - self._step_began
        row = {
            "step": self.state.global_step,
            "epoch": self.epoch,
            "loss": logs["loss"],
            "grad_norm": logs["grad_norm"],
            "learning_rate": logs["learning_rate"],
            "tokens_per_s": tokens / seconds,
            "padding_ratio": cells / tokens,
            **measured,
        }
        self._on_row(LogRow.model_validate(row))
        self._show({name: value for name, value in row.items() if name not in ("step", "epoch")})

    def report(self, values: dict[str, float], *, seconds: float) -> None:
        """Show more numbers of this step to `train.report_to`; `seconds`: what they took is no part of the step."""
        self._step_began += seconds
        asked = self.control.should_log
        self._show(values)
        self.control.should_log = asked  # the step's own row is still to come

    def _show(self, values: dict[str, float]) -> None:
        super().log(values)
        del self.state.log_history[:]  # the stage's ledgers have them; here they would make every checkpoint longer

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write checkpoint-N whole or not at all."""
        name, first = f"checkpoint-{self.state.global_step}", self.args.should_save
        whole = weights_directory(Path(self.args.output_dir) / name) if first else contextlib.nullcontext(Path())
        with whole as temporary:
            self._writing_to = Path(broadcast_object_list([str(temporary)])[0])  # the first process's, made by now
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if first:
                for file in (temporary / name).iterdir():
                    file.rename(temporary / file.name)
                (temporary / name).rmdir()
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing_to)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder, weights = Path(output_dir or self.args.output_dir), whole_weights(self.student)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(weights, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with damage_told(Path(resume_from_checkpoint)):
            load_weights(self.student, Path(resume_from_checkpoint) / WEIGHTS)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with damage_told(Path(checkpoint or "")):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with damage_told(Path(checkpoint or "")):
            super()._load_rng_state(checkpoint)


class OrpoTrainer(Resumable):
    """L = NLL + lambda * L_OR + KL terms, each over the whole optimizer step: all its micro-batches on all processes."""

    # our denominators already span all micro-batches: Trainer must not divide by their number once more
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        student: Student,
        rows: list[Packed],
        collator: Collator,
        args: TrainingArguments,
        *,
        weights: Weights,
        on_row: Callable[[LogRow], None],
        reference: Student | None = None,
    ) -> None:
        """on_row: as in `Resumable`; reference: the frozen initial student, needed for `weights.kl_reference` unless the student has an
        adapter that can be turned off.
        """
        # the blank fills up last batches where there are several processes; nothing else reaches it
        filled = [*rows, blank(rows[0])]
        super().__init__(student, on_row=on_row, model=student, args=args, train_dataset=filled, data_collator=collator)
        self._reference, self._weights = reference, weights
        self._sums, self._counts = torch.zeros(len(SUMS)), Counts(1.0, 0.0, 0.0)
        self._tokens = self._cells = 0

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        size = self.args.train_batch_size * self.args.world_size
        lengths = [self.data_collator.size(row) for row in self.train_dataset[:-1]]
        whole = size * self.args.gradient_accumulation_steps
        return LengthGrouped(lengths, whole, self.args.seed, multiple_of=size if self.args.world_size > 1 else 1)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> None:
        """Count the denominators of the whole optimizer step, over all processes."""
        self._step_began, self._sums = time.monotonic(), torch.zeros(len(SUMS), dtype=torch.float64, device=sums_device(self.args.device))
        self._tokens, self._cells = map(sum, zip(*(batch["cells"] for batch in batch_samples), strict=True))
        self._counts = Counts(**self._over_all_processes([asdict(batch["denominators"]) for batch in batch_samples]))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """() a micro-batch's share of the loss."""
        reference = None
        if self._weights.kl_reference:
            alone = inputs["reference"]
            with torch.no_grad():
                reference = self._reference(alone) if self._reference is not None else self.student.initial_logits(alone)
                reference = reference[alone["chosen"]]  # a blank's token is of no chosen response
        found = terms(model(inputs), inputs, self._weights, reference=reference)
        loss = found.loss(self._weights, self._counts)
        self._losses.append((loss.detach(), inputs["example_ids"]))
        self._sums += sums_of(found)
        whole: Tensor = loss * self.args.world_size
        return whole  # gradients are averaged over the processes, and the shares must be summed

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Complete the row of a step from what `compute_loss` kept."""
        if "loss" not in logs:  # Trainer's own summary at the end
            return
        own = {**dict(zip(SUMS, self._sums.tolist(), strict=True)), "tokens": self._tokens, "cells": self._cells}
        sums, counts, weights = self._over_all_processes([own]), self._counts, self._weights
        row = {"nll": sums["nll"] / counts.chosen_tokens}
        if sums["pairs"]:
            chosen, rejected = sums["logp_chosen"] / sums["pairs"], sums["logp_rejected"] / sums["pairs"]
            row |= {
                "odds_ratio": sums["odds_ratio"] / counts.pairs,
                "accuracy": sums["preferred"] / sums["pairs"],
                "logp_chosen": chosen,
                "logp_rejected": rejected,
                "margin": chosen - rejected,
            }
        if weights.kl_reference:
            row["kl_reference"] = sums["kl_reference"] / counts.chosen_tokens
        for name in ("kl_teacher_sequence", "kl_teacher_token"):
            if getattr(weights, name):
                row[name] = sums[name] / max(counts.prompts, 1.0)
        self._complete(logs, tokens=sums["tokens"], cells=sums["cells"], **row)


def whole_weights(student: Student) -> dict[str, Tensor]:
    """The trained weights by name, each whole; of several processes all call it, and the first alone gets them.

    FSDP leaves a process only a part of each: one after the other is put together and leaves the GPU again, which need not hold them all.
    """
    found = {}
    for name, parameter in student.trained().items():
        weight = parameter.detach()
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        if is_first():
            found[name] = (whole.cpu() if isinstance(weight, DTensor) else whole).contiguous()
    return found


@contextlib.contextmanager
def weights_directory(path: Path) -> Iterator[Path]:
    """`new_directory` for what safetensors and torch write, which tell of a full disk by errors of their own. Raises StorageError."""
    with full_disk_told(path), new_directory(path) as temporary:
        yield temporary


def write_weights(weights: dict[str, Tensor], file: Path, *, metadata: dict[str, str]) -> None:
    """Write a file of weights durably, or leave the one that was there: whatever happens, there is a whole one. Raises StorageError."""
    temporary = temporary_name(file)
    try:
        with full_disk_told(file):
            save_file(weights, temporary, metadata=metadata)
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, file)
            fsync_dir(file.parent)
    except OSError as exc:
        raise storage_error(exc, file) from exc
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def full_disk_told(path: Path) -> Iterator[None]:
    """Raises StorageError where safetensors, torch or tokenizers tell by errors of their own that there is no room for `path`."""
    try:
        yield
    except Exception as exc:
        of_torch = isinstance(exc, RuntimeError) and any(word in str(exc) for word in ("inline_container", "PytorchStreamWriter"))
        of_tokenizers = type(exc) is Exception and "(os error" in str(exc)
        if not (isinstance(exc, SafetensorError) or of_torch or of_tokenizers):
            raise
        raise StorageError(f"{path} cannot be written: {str(exc).splitlines()[0]}; free some space and run the same command again") from exc


@contextlib.contextmanager
def out_of_memory_told(what: Callable[[], str]) -> Iterator[None]:
    """Raises TrainingError with `what()` where torch finds no memory."""
    try:
        yield
    except RuntimeError as exc:
        if not no_memory(exc):
            raise
        raise TrainingError(what()) from exc


@contextlib.contextmanager
def damage_told(folder: Path) -> Iterator[None]:
    """Raises TrainingError that says what to remove where what is read in `folder` is not what was written there."""
    try:
        yield
    except TrainingError:
        raise
    except Exception as exc:  # a boundary: torch, pickle and safetensors have errors of all classes for a torn file
        if no_memory(exc):
            raise
        said = f"{type(exc).__name__}: {str(exc).splitlines()[0][:150] if str(exc) else 'it ends too early'}"
        raise TrainingError(f"{folder} is damaged ({said}); remove it, and the same command goes on from what is left") from exc


def _listed(example_ids: Sequence[str]) -> str:
    """The ids but those of blanks, which have none."""
    return ", ".join(filter(None, example_ids))


def load_weights(student: Student, file: Path) -> None:
    """Put trained weights back in their places. Raises TrainingError for those of another student."""
    saved, trained = load_file(file), student.trained()
    if {name: w.shape for name, w in saved.items()} != {name: w.shape for name, w in trained.items()}:
        raise TrainingError(f"{file} holds other weights than this student trains; remove {file.parent} to begin anew")
    with torch.no_grad():
        for name, parameter in trained.items():
            weight = saved[name].to(parameter.device)
            if isinstance(parameter, DTensor):  # under FSDP each process keeps its part
                weight = distribute_tensor(weight, parameter.device_mesh, parameter.placements)
            parameter.copy_(weight)
