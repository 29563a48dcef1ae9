"""The training stage of a run: triplets in, a student folder out, resumable at any instant."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from shared.artifacts import Ledger, Run, Stage, new_directory, read_json, read_jsonl, sha256_file, write_json
from shared.commands import Progress
from shared.contracts import Manifest, Triplet
from shared.errors import TrainingError
from shared.models import hugging_face_model
from shared.settings import TrainSettings
from student_trainer.training.packing import Collator, Packer, group
from student_trainer.training.student import Student, load, native_bf16, refuse_unless_packable
from student_trainer.training.trainer import LogRow, OrpoTrainer, arguments, checkpoints, remove_checkpoint


def train(run: Run, stage: Stage) -> Manifest:
    """Train `recipe.student.model` on RUN/triplets/r0; write RUN/checkpoints/student (float32), log.jsonl and the manifest.

    Raises TrainingError, DataError, StorageError. Whatever happens, the last whole checkpoint stays, and the next call goes on
    from it to the same student.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    recipe, settings = run.recipe, run.recipe.train
    triplets = run.path / "triplets" / "r0" / "triplets.jsonl"
    examples = group(read_jsonl(triplets, Triplet))
    with Ledger(stage.path / "log.jsonl", LogRow):  # its lock: no other trainer is at work here
        forget_other_triplets(stage.path, sha256_file(triplets))

    with Ledger(stage.path / "log.jsonl", LogRow, sync_every_s=0.0) as log:
        set_seed(recipe.seed)
        args = arguments(settings, stage.path, seed=recipe.seed)
        bf16 = uses_bf16(settings, args.device)
        student, tokenizer = load(hugging_face_model(recipe.student.model), settings, bf16=bf16)
        packer = Packer(
            tokenizer, student.kind, max_prompt_tokens=settings.max_prompt_tokens, max_response_tokens=settings.max_response_tokens
        )
        rows, census = packer.pack(examples)
        collator = collator_for(student, tokenizer, settings)
        refuse_unless_packable(student, collator, rows[0])
        recorder = Recorder(log)
        trainer = OrpoTrainer(student, rows, collator, args, orpo_lambda=settings.orpo_lambda, on_row=recorder.record)
        trainer.add_callback(recorder)
        trainer.go_on()
        counts = {
            **asdict(census),
            "padding_ratio": round(trainer.padding_ratio(), 3),
            "parameters": sum(p.numel() for p in student.parameters()),
            "trained_parameters": sum(p.numel() for p in student.trained().values()),
            "device": str(args.device),
            "last_step": log.rows()[-1].model_dump(),
        }
        save(student, tokenizer, stage.path / "student")

    manifest = stage.finish(
        [stage.path / "student", stage.path / "log.jsonl"],
        settings={**settings.model_dump(mode="json"), "student": recipe.student.model, "seed": recipe.seed, "bf16": bf16},
        counts=counts,
    )
    clear(stage.path)
    return manifest


def refuse_without_gpu() -> None:
    """Raises TrainingError where torch finds no GPU that it can use: a driver older than its CUDA is one reason."""
    if not torch.cuda.is_available():
        raise TrainingError(
            f"torch {torch.__version__} (CUDA {torch.version.cuda or 'none'}) can use no GPU here: is one given to this container, and is "
            "its driver new enough for that CUDA (nvidia-smi tells)? To train on the CPU: docker compose -f compose.cpu.yaml up"
        )


def forget_other_triplets(folder: Path, digest: str) -> None:
    """Remove what was trained on triplets of another SHA-256, and what a killed process left half done."""
    note = folder / "inputs.json"
    if not note.exists() or read_json(note) != {"triplets_sha256": digest}:
        clear(folder)
        (folder / "log.jsonl").unlink()
        write_json(note, {"triplets_sha256": digest})
    sweep(folder)


def clear(folder: Path) -> None:
    """Remove all checkpoints."""
    for checkpoint in checkpoints(folder):
        remove_checkpoint(checkpoint)
    sweep(folder)


def sweep(folder: Path) -> None:
    """Remove the unfinished folders of killed processes."""
    for leftover in folder.glob(".*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def uses_bf16(settings: TrainSettings, device: torch.device) -> bool:
    """Whether to compute in bfloat16 over the float32 weights."""
    return native_bf16(device) if settings.precision == "auto" else settings.precision == "bf16"


def collator_for(student: Student, tokenizer: Any, settings: TrainSettings) -> Collator:
    """The collator of this student; the odds ratio's weight 0 leaves the rejected responses out."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Collator(
        student.kind,
        pad_token_id=pad,
        start_token_id=student.model.config.decoder_start_token_id if student.kind == "encoder-decoder" else None,
        with_rejected=settings.orpo_lambda > 0,
    )


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Writes a log line for every step, once: steps repeated after a kill are in the log already."""

    def __init__(self, log: Ledger[LogRow]) -> None:
        logged = log.rows()
        self._log, self._logged = log, logged[-1].step if logged else 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress = Progress("train", state.max_steps, unit="steps", done=state.global_step, every_s=5.0)

    def record(self, row: LogRow) -> None:
        if row.step > self._logged:
            self._log.append(row)
            self._logged = row.step
        note = f"loss {row.loss:.3f}, nll {row.nll:.3f}"
        if row.odds_ratio is not None:
            note += f", odds ratio {row.odds_ratio:.3f}, accuracy {row.accuracy:.2f}, margin {row.margin:.2f}"
        self._progress.step(note=f"{note}, {row.tokens_per_s:.0f} tokens/s")


def save(student: Student, tokenizer: Any, folder: Path) -> None:
    """The trained model as a Hugging Face folder in float32: bfloat16 would round away what small learning rates changed."""
    with new_directory(folder) as temporary:
        student.merged().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
