"""One round of training as a stage of a run: triplets in, a student folder out, resumable at any instant."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tensorboardX import SummaryWriter
from transformers import GenerationConfig, TrainerCallback, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.utils import logging as transformers_logging

from shared.artifacts import Ledger, Run, canonical, read_json, read_jsonl, sha256_bytes, sha256_file, write_json
from shared.contracts import Response, Triplet
from shared.datasets.stage import prepare
from shared.errors import TrainingError, storage_error
from shared.models import HUB_FILES, offline_model
from shared.prompts import zero_shot
from shared.settings import TrainSettings
from student_trainer.training.collate import Collator
from student_trainer.training.losses import Weights
from student_trainer.training.packing import Census, Packer, group, samples_by_example
from student_trainer.training.record import LogRow, Recorder
from student_trainer.training.rounds import (
    BEST,
    checkpoint_stage,
    checkpoints,
    clear,
    first_does,
    is_first,
    remove_checkpoint,
    stage_name,
    sweep,
)
from student_trainer.training.student import (
    ADAPTER,
    Student,
    load,
    native_bf16,
    padding_token,
    refuse_longer_texts,
    refuse_unless_it_fits,
    refuse_unless_packable,
)
from student_trainer.training.trainer import (
    ANOTHER_RUN,
    OUT_OF_MEMORY,
    TENSORBOARD,
    OrpoTrainer,
    Resumable,
    arguments,
    damage_told,
    load_weights,
    out_of_memory_told,
    weights_directory,
)
from student_trainer.training.validation import Answerer, ValidationRow, Validator, best_validation, keep_weights
from student_trainer.triplets.build import TEACHER
from student_trainer.triplets.build import stage_name as triplets_stage
from student_trainer.triplets.ranking import rouge_l

NO_ROOM = (
    "out of memory before the first step: the student does not fit (with train.kl_reference without LoRA it is there twice); begin in "
    f"another --out {ANOTHER_RUN} with train.lora_rank, without train.kl_reference or with a smaller student.model"
)


def train(run: Run, number: int) -> None:
    """Train the student of round `number` on RUN/triplets/rN; write RUN/checkpoints/rN: student/ (float32), log.jsonl, the manifest.

    Round 0 begins with `recipe.student.model`, a later one with the student of the round before. Of torchrun's processes all call this.
    Raises TrainingError, DataError, StorageError. Whatever happens, the last whole checkpoint stays, and the next call goes on from it to
    the same student; not where the triplets, the initial student or the prompts a step are others by then: it says so and begins anew.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    recipe, settings, folder = run.recipe, run.recipe.train, run.path / stage_name(number)
    file = run.path / triplets_stage(number) / "triplets.jsonl"
    said = samples_by_example(read_jsonl(run.path / TEACHER / "responses.jsonl", Response)) if settings.learns_samples else None
    examples = group(read_jsonl(file, Triplet), said)
    seed = recipe.seed + number
    set_seed(seed)
    args = arguments(settings, folder, seed=seed)
    with ExitStack() as files:
        stage = ledgers = None
        if is_first():
            stage = checkpoint_stage(run, number)
            initial = known_as(recipe.student.model)
            refuse_another_initial_student(run, number, initial)
            step = settings.batch_size * settings.gradient_accumulation * args.world_size
            digest = sha256_bytes(canonical([ref.model_dump() for ref in stage.inputs]))
            inputs = {"inputs_sha256": digest, "initial_student": initial, "prompts_a_step": step}
            ledgers = Ledgers.open(files, folder, inputs, bf16=uses_bf16(settings, args.device))
            print(f"train: loading {recipe.student.model}", flush=True)
        bf16 = first_does(lambda: ledgers is not None and ledgers.bf16)  # nor do the others read a checkpoint that is about to go
        with out_of_memory_told(lambda: NO_ROOM):
            student, tokenizer, reference = students(run, number, bf16=bf16, device=args.device)
            if not settings.fsdp:  # which shards it on its way there
                student.to(args.device)
        packer = Packer(
            tokenizer, student.kind, max_prompt_tokens=settings.max_prompt_tokens, max_response_tokens=settings.max_response_tokens
        )
        rows, census = packer.pack(examples)
        if is_first():
            tell(census)
        collator = collator_for(student, tokenizer, settings)
        refuse_unless_it_fits(student, collator, rows)
        recorder = Recorder(ledgers.log) if ledgers else None
        on_row = recorder.record if recorder else lambda row: None
        trainer: Resumable
        if settings.trainer == "trl":
            from student_trainer.training.trl_backend import trl_trainer  # trl: only where it is asked for

            trainer = trl_trainer(student, tokenizer, rows, args, settings, pad_token_id=collator.pad_token_id, bf16=bf16, on_row=on_row)
        else:
            with out_of_memory_told(lambda: OUT_OF_MEMORY.format(step=1)):
                refuse_unless_packable(student, collator, max(rows, key=lambda row: row.length))
            trainer = OrpoTrainer(student, rows, collator, args, weights=weights_of(settings), on_row=on_row, reference=reference)
        if recorder:
            trainer.add_callback(recorder)
            if TENSORBOARD in settings.report_to:
                trainer.add_callback(TensorBoardCallback(event_writer(folder)))
        validator = validator_for(run, student, packer, collator, folder, ledgers.validations if ledgers else None, trainer)
        if validator:
            trainer.add_callback(validator)
        trainer.add_callback(
            Checkpointing(
                folder, every_s=60 * settings.checkpoint_minutes, every_steps=settings.checkpoint_steps, keep=settings.keep_checkpoints
            )
        )
        trainer.go_on()
        if not validator:
            keep_weights(student, folder)
        if stage and ledgers:
            best = best_validation(folder)
            counts = {**asdict(census), **ledgers.counts(), "best_validation": best.model_dump() if best else None, **sizes(student)}
            counts |= {"device": str(args.device), "processes": args.world_size}
            if settings.fsdp:  # this process holds only parts of its weights
                student, tokenizer, _ = students(run, number, bf16=bf16, device=torch.device("cpu"))
            with damage_told(folder):
                load_weights(student, folder / BEST)
            outputs = save(student, tokenizer, folder)
            stage.finish(
                [*outputs, *ledgers.paths],
                settings={
                    **settings.model_dump(mode="json"),
                    "student": recipe.student.model,
                    "initial_student": initial,
                    "seed": seed,
                    "bf16": bf16,
                },
                counts=counts,
            )
            clear(folder)
        first_does(lambda: None)  # no process leaves while another one may need it


@dataclass(frozen=True)
class Ledgers:
    """What the first process writes down of a round: a line a step, a line a validation."""

    log: Ledger[LogRow]
    validations: Ledger[ValidationRow]
    bf16: bool
    """As the training began, also where it goes on with another processor."""

    @classmethod
    def open(cls, files: ExitStack, folder: Path, inputs: dict[str, Any], *, bf16: bool) -> Ledgers:
        """Both ledgers, closed with `files`; what was trained on other `inputs` is removed first. Raises StorageError.

        bf16: for training that begins now.
        """
        with Ledger(folder / "log.jsonl", LogRow):  # its lock: no other trainer is at work here
            bf16 = forget_other_inputs(folder, inputs, bf16=bf16)
        log = files.enter_context(Ledger(folder / "log.jsonl", LogRow, sync_every_s=0.0))
        return cls(log, files.enter_context(Ledger(folder / "validation.jsonl", ValidationRow, sync_every_s=0.0)), bf16)

    @property
    def paths(self) -> list[Path]:
        return [self.log.path, self.validations.path]

    def counts(self) -> dict[str, Any]:
        """What a manifest says of them."""
        steps = self.log.rows()
        return {
            "padding_ratio": round(sum(row.padding_ratio for row in steps) / len(steps), 3),
            "last_step": steps[-1].model_dump(),
        }


def tell(census: Census) -> None:
    """What is not trained on as it was given, if anything is not."""
    if dropped := ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in census.dropped.items() if count):
        print(f"train: {census.pairs} of {census.triplets} triplets; left out: {dropped} (train.max_prompt_tokens, max_response_tokens)")
    if census.cut_responses:
        print(f"train: {census.cut_responses} responses are longer than train.max_response_tokens and learnt without their end", flush=True)


def sizes(student: Student) -> dict[str, int]:
    """Parameters, all and those that are trained."""
    return {
        "parameters": sum(p.numel() for p in student.parameters()),
        "trained_parameters": sum(p.numel() for p in student.trained().values()),
    }


def students(run: Run, number: int, *, bf16: bool, device: torch.device) -> tuple[Student, Any, Student | None]:
    """The student that a round begins with, its tokenizer, and the frozen initial student if `kl_reference` needs one.

    With LoRA the adapter of the round before is trained on, and the initial student is the same model with its adapter off.
    """
    settings, model = run.recipe.train, offline_model(run.recipe.student.model)
    before = run.path / stage_name(number - 1) if number else None
    start = str(before / "student") if before and not settings.lora_rank else model
    student, tokenizer = load(start, settings, bf16=bf16, adapter=before / ADAPTER if before and settings.lora_rank else None)
    if not settings.kl_reference or settings.lora_rank:
        return student, tokenizer, None
    reference, _ = load(model, TrainSettings(), bf16=bf16)
    return student, tokenizer, reference.eval().requires_grad_(False).to(device)


def weights_of(settings: TrainSettings) -> Weights:
    return Weights(
        orpo_lambda=settings.orpo_lambda,
        kl_reference=settings.kl_reference,
        kl_teacher_sequence=settings.kl_teacher_sequence,
        kl_teacher_token=settings.kl_teacher_token,
        pseudocount=settings.kl_teacher_pseudocount,
    )


def validator_for(
    run: Run,
    student: Student,
    packer: Packer,
    collator: Collator,
    folder: Path,
    ledger: Ledger[ValidationRow] | None,
    trainer: Resumable,
) -> Validator | None:
    """What validates this student; None where the settings want none. Raises TrainingError where there is nothing to compare with."""
    settings, recipe = run.recipe.train, run.recipe
    if not settings.validate_every:
        return None
    rows = [e for e in prepare(run)["validation"] if e.summary is not None][: settings.validation_rows]
    if not rows:
        raise TrainingError(
            "train.validate_every: no validation row has a reference to compare answers with; give train.validate_every=0 to take the "
            "student after the last step, or a data set with references"
        )
    prompts = [packer.prompt(zero_shot(recipe.task, e.question)) for e in rows]
    longest = max(map(len, prompts)) + settings.validation_max_tokens
    refuse_longer_texts(student, longest, "task.max_question_chars or train.validation_max_tokens")
    answer = Answerer(student, packer.tokenizer, collator.pad_token_id, settings.validation_max_tokens, settings.validation_stop)
    similarity = rouge_l()
    if not any(similarity(e.summary or "", e.summary or "") for e in rows):
        raise TrainingError(
            "train.validate_every: ROUGE-L reads a-z and 0-9 alone, which no validation reference has, so that every student would score "
            "0; give train.validate_every=0 to take the student after the last step"
        )

    def score(answers: Sequence[str]) -> float:
        return sum(similarity(e.summary or "", text) for e, text in zip(rows, answers, strict=True)) / len(rows)

    return Validator(
        answer,
        prompts,
        score,
        folder,
        ledger,
        every=settings.validate_every,
        patience=settings.patience,
        epoch=lambda: trainer.epoch,
        report=trainer.report,
    )


class Checkpointing(TrainerCallback):  # type: ignore[misc]
    """Asks for a checkpoint when the last one is too long or too many steps ago, and removes those that are too many.

    Trainer's own setting of the steps would be that of the checkpoint gone on from, whatever the recipe says now.
    """

    def __init__(self, folder: Path, *, every_s: float, every_steps: int | None, keep: int) -> None:
        self._folder, self._every_s, self._every_steps, self._keep = folder, every_s, every_steps, keep
        self._saved_at = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        due = bool(self._every_steps) and state.global_step % self._every_steps == 0
        if due or first_does(lambda: time.monotonic() - self._saved_at >= self._every_s):
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved_at = time.monotonic()
        if is_first():
            for older in checkpoints(self._folder)[: -self._keep]:
                remove_checkpoint(older)


def refuse_without_gpu() -> None:
    """Raises TrainingError where torch finds no GPU that it can use: a driver older than its CUDA is one reason."""
    if not torch.cuda.is_available():
        raise TrainingError(
            f"torch {torch.__version__} (CUDA {torch.version.cuda or 'none'}) can use no GPU here: is one given to this container, and is "
            "its driver new enough for that CUDA (nvidia-smi tells)? To train on the CPU: docker compose -f compose.cpu.yaml up"
        )


def known_as(reference: str) -> str:
    """A model reference that tells what it names from what it named before: a folder by its contents, a model of the Hub by its commit.

    (`stamped` goes by times, which differ between the machines that a training may go on.)
    """
    folder = Path(offline_model(reference))
    if folder.parent.name == "snapshots":
        return f"{reference}@{folder.name}"
    if not Path(reference).is_dir():
        return reference
    files = sorted(file for pattern in (*HUB_FILES, "*.safetensors", "*.bin") for file in folder.glob(pattern))
    return f"{reference}@{sha256_bytes(canonical([(file.name, sha256_file(file)) for file in files]))[:12]}"


def refuse_another_initial_student(run: Run, number: int, initial: str) -> None:
    """Raises TrainingError if round `number` needs the student that the round before began with, and student.model is another by now."""
    before = run.manifest(stage_name(number - 1)) if number else None
    needed = run.recipe.train.lora_rank or run.recipe.train.kl_reference
    if before and needed and (theirs := before.settings["initial_student"]) != initial:
        raise TrainingError(
            f"student.model: it is {initial}, and {stage_name(number - 1)} was trained with {theirs}, which this round needs as well; "
            f"restore it, or begin in another --out {ANOTHER_RUN}"
        )


class EventWriter(SummaryWriter):  # type: ignore[misc]
    """Tells of a disk that is full as everything else does."""

    def flush(self) -> None:
        """Raises StorageError."""
        try:
            super().flush()
        except OSError as exc:
            raise storage_error(exc, Path(self.logdir)) from exc

    def close(self) -> None:
        """Raises StorageError."""
        try:
            super().close()
        except OSError as exc:
            raise storage_error(exc, Path(self.logdir)) from exc


def event_writer(folder: Path) -> EventWriter:
    """What writes a round's events for TensorBoard, which shows none of an earlier writer from the step on that comes next.

    Raises TrainingError for a damaged checkpoint, StorageError.
    """
    found = checkpoints(folder)
    done = 0
    if found:
        with damage_told(found[-1]):
            done = read_json(found[-1] / "trainer_state.json")["global_step"]
    try:
        # its own name holds the second alone: one that was killed in the same would be written over
        return EventWriter(str(folder / TENSORBOARD), purge_step=done + 1, filename_suffix=f".{done:09}.{os.getpid()}")
    except OSError as exc:
        raise storage_error(exc, folder / TENSORBOARD) from exc


def forget_other_inputs(folder: Path, inputs: dict[str, Any], *, bf16: bool) -> bool:
    """Remove what was trained on other inputs or with other steps, and what a killed process left half done.

    Returns whether to compute in bfloat16: as what is left was computed, else `bf16`.
    """
    note = folder / "inputs.json"
    before = read_json(note) if note.exists() else {}
    found, computed = checkpoints(folder), before.pop("bf16", bf16)
    if before != inputs or not (found or (folder / BEST).exists()):
        if found and before:
            changed = ", ".join(
                f"{name} is {inputs[name]} and was {before.get(name)}" for name in inputs if inputs[name] != before.get(name)
            )
            print(f"train: beginning anew, {found[-1].name} is of no use: {changed}", flush=True)
        clear(folder)
        for ledger in ("log.jsonl", "validation.jsonl"):
            (folder / ledger).unlink(missing_ok=True)
        shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)
        computed = bf16
        write_json(note, {**inputs, "bf16": bf16})
    elif computed != bf16:
        print(f"train: train.precision=auto goes on as it began, in {'bf16' if computed else 'fp32'}", flush=True)
    sweep(folder)
    return bool(computed)


def uses_bf16(settings: TrainSettings, device: torch.device) -> bool:
    """Whether to compute in bfloat16 over the float32 weights."""
    return native_bf16(device) if settings.precision == "auto" else settings.precision == "bf16"


def collator_for(student: Student, tokenizer: Any, settings: TrainSettings) -> Collator:
    """The collator of this student; the odds ratio's weight 0 leaves the rejected responses out."""
    return Collator(
        student.kind,
        pad_token_id=padding_token(tokenizer),
        start_token_id=student.model.config.decoder_start_token_id if student.kind == "encoder-decoder" else None,
        with_rejected=settings.orpo_lambda > 0,
        with_samples=settings.learns_samples,
        with_reference=settings.kl_reference > 0,
    )


def save(student: Student, tokenizer: Any, folder: Path) -> list[Path]:
    """The trained model as a Hugging Face folder in float32: bfloat16 would round away what small learning rates changed.

    With LoRA also the adapter alone, in peft's format. Returns the folders.
    """
    made = [folder / "student"]
    if student.adapted is not None:
        made.append(folder / ADAPTER)
        with weights_directory(folder / ADAPTER) as temporary:
            student.adapted.save_pretrained(temporary)
    with weights_directory(folder / "student") as temporary:
        merged = student.merged()
        # what the base model's own adds, penalties for one, was neither trained with nor will it be evaluated or served
        start = merged.config.decoder_start_token_id if student.kind == "encoder-decoder" else None
        merged.generation_config = GenerationConfig(
            eos_token_id=tokenizer.eos_token_id, pad_token_id=padding_token(tokenizer), decoder_start_token_id=start
        )
        merged.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return made
