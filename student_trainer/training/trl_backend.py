"""`train.trainer=trl`: TRL's experimental ORPOTrainer on the token ids that the packed trainer sees, as a baseline and an oracle.

Everything around the loss (checkpoints, log rows, order of the rows, validation) is that of the packed trainer. The module loads trl.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import TrainingArguments

from shared.settings import TrainSettings
from student_trainer.training.collate import Collator, LengthGrouped
from student_trainer.training.packing import Kind, Packed
from student_trainer.training.record import LogRow
from student_trainer.training.student import Student
from student_trainer.training.trainer import ANOTHER_RUN, Resumable, arguments

# both are read while trl is imported
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.utils import DPODataCollatorWithPadding


def trl_trainer(
    student: Student,
    tokenizer: Any,
    rows: Sequence[Packed],
    args: TrainingArguments,
    settings: TrainSettings,
    *,
    pad_token_id: int,
    bf16: bool,
    on_row: Callable[[LogRow], None],
) -> TrlTrainer:
    """A trainer of what TRL can express of these settings (`Recipe` refuses the others).

    args: of the packed trainer, whose output folder, seed and device these are; on_row: as in `Resumable`.
    """
    options = {
        "beta": settings.orpo_lambda,
        "bf16": bf16,  # accelerate's autocast; TRL's default is True
        "use_cpu": args.device.type == "cpu",  # else transformers takes bf16 for a request for a GPU
        "padding_value": pad_token_id,
        # `load` has turned both on or off; TRL's own switch for dropout leaves that of T5's attention on
        "disable_dropout": False,
        "gradient_checkpointing": False,
        # no row is longer, and TRL warns where these are missing
        "max_length": settings.max_prompt_tokens + settings.max_response_tokens,
        "max_completion_length": settings.max_response_tokens,
    }
    orpo = arguments(settings, Path(args.output_dir), seed=args.seed, make=lambda **given: ORPOConfig(**{**given, **options}))
    return TrlTrainer(student, tokenizer, single_pairs(rows), orpo, on_row=on_row)


class TokenIds(list[Packed]):
    """Rows that ORPOTrainer need not tokenise: what it does to every row with `map`, to get token ids of its own, is left out."""

    def map(self, function: Callable[..., Any], **options: Any) -> TokenIds:
        return self


def single_pairs(rows: Sequence[Packed]) -> TokenIds:
    """One row a pair: its chosen response, then its rejected one."""
    return TokenIds(
        Packed(row.example_id, row.prompt, (row.responses[c], row.responses[r]), (1.0, 0.0), (0, 0), ((0, 1),))
        for row in rows
        for c, r in row.pairs
    )


class PairCollator:
    """Pads pairs to one of TRL's batches. B pairs, int64, filled up on the right:

    prompt_input_ids, prompt_attention_mask     (B, S) encoder-decoder
    chosen_labels, rejected_labels              (B, T) the response; -100 elsewhere: in front of it too if decoder-only
    chosen_input_ids, chosen_attention_mask     (B, T) decoder-only: prompt and response
    rejected_input_ids, rejected_attention_mask (B, T) the same
    example_id                                  list of B strings
    """

    def __init__(self, kind: Kind, *, pad_token_id: int) -> None:
        self._kind = kind
        self.size = Collator(kind, pad_token_id=pad_token_id).size  # the order of the rows is the packed trainer's
        self._pad = DPODataCollatorWithPadding(pad_token_id=pad_token_id, is_encoder_decoder=kind == "encoder-decoder")

    def __call__(self, pairs: Sequence[Packed]) -> dict[str, Any]:
        batch: dict[str, Any] = self._pad([self._columns(pair) for pair in pairs])
        return batch

    def _columns(self, pair: Packed) -> dict[str, Any]:
        columns: dict[str, Any] = {"example_id": pair.example_id}
        sides = dict(zip(("chosen", "rejected"), pair.responses, strict=True))
        if self._kind == "encoder-decoder":
            columns |= {"prompt_input_ids": pair.prompt, "prompt_attention_mask": [1] * len(pair.prompt)}
            return columns | {f"{side}_labels": ids for side, ids in sides.items()}
        for side, ids in sides.items():
            columns |= {
                f"{side}_input_ids": [*pair.prompt, *ids],
                f"{side}_attention_mask": [1] * (len(pair.prompt) + len(ids)),
                f"{side}_labels": [-100] * len(pair.prompt) + list(ids),
            }
        return columns


class TrlTrainer(Resumable, ORPOTrainer):  # type: ignore[misc]
    """L = NLL + beta * L_OR as TRL computes it: two full rows a pair.

    With one rejected response a prompt, one micro-batch a step and an encoder-decoder that is the packed trainer's loss. Otherwise:
      - a decoder-only model's NLL is of the prompt's tokens as well (all but the first), and so are `loss` and `nll` of its log rows;
      - `batch_size` counts pairs, and a chosen response counts in the NLL once for each rejected one;
      - NLL and L_OR are means over a micro-batch, averaged over micro-batches and processes: other sizes give another student,
        and of several processes the last batch of an epoch is filled up with rows from its beginning;
      - log(1 - p) is not clamped: at a mean log-probability within 3e-8 of 0 the gradient is NaN, which ends the training;
      - throughput and padding in the log rows are of TRL's rows, which hold each prompt twice a pair.
    Source: trl/experimental/orpo/orpo_trainer.py of 1.16; that module may change in any release.
    """

    out_of_memory = (
        "out of memory at step {step}; go on with a lower train.batch_size or with train.activation_checkpointing=true. The last "
        f"checkpoint is kept. If that does not help: another --out {ANOTHER_RUN} with train.trainer=packed, which needs less, a lower "
        "train.max_prompt_tokens, train.frozen_layers or train.lora_rank"
    )

    def __init__(self, student: Student, tokenizer: Any, pairs: TokenIds, args: ORPOConfig, *, on_row: Callable[[LogRow], None]) -> None:
        super().__init__(
            student,
            on_row=on_row,
            model=student.model if student.adapted is None else student.adapted,
            args=args,
            train_dataset=pairs,
            data_collator=PairCollator(student.kind, pad_token_id=args.padding_value),
            processing_class=tokenizer,
        )
        # ORPOTrainer asks the Hub for one if it gets none; Trainer would write its special tokens into the student's configuration
        self.processing_class = None
        self._tokens = self._cells = 0

    def _send_telemetry(self) -> None:
        """Nothing: whatever imported huggingface_hub first has decided whether it heeds the environment variable."""

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """Nothing: it would lie beside the checkpoints, where manifest.json says what was done."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        whole = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        return LengthGrouped([self.data_collator.size(pair) for pair in self.train_dataset], whole, self.args.seed)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> None:
        """Count what the step computes on. (TRL divides by no number of items.)"""
        self._step_began = time.monotonic()
        masks = [mask for batch in batch_samples for mask in self._masks(batch)]
        self._tokens, self._cells = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)

    def _masks(self, batch: dict[str, Any]) -> list[Tensor]:
        """Which cells hold a token, of each tensor that the model gets."""
        both = self.concatenated_inputs(batch, is_encoder_decoder=self.is_encoder_decoder, padding_value=self.padding_value)
        read = both["concatenated_attention_mask"] == 1
        return [read, both["concatenated_labels"] != -100] if self.is_encoder_decoder else [read]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """() the loss of a micro-batch."""
        loss: Tensor = super().compute_loss(model, inputs)
        self._losses.append((loss.detach(), inputs["example_id"]))
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Complete the row of a step from TRL's metrics: means of its micro-batches' means, over all processes."""
        if "loss" not in logs:  # Trainer's own summary at the end
            return
        means = {name: sum(values) / len(values) for name, values in self._stored_metrics["train"].items()}
        counted = self._over_all_processes([{"tokens": self._tokens, "cells": self._cells}])
        self._complete(
            logs,
            **counted,
            nll=means["nll_loss"],
            odds_ratio=-means["log_odds_ratio"],  # TRL's is log sigmoid of the log odds ratio, without beta
            accuracy=means["rewards/accuracies"],
            # means over a response's tokens; of "rewards/..." they are beta times these
            logp_chosen=means["logps/chosen"],
            logp_rejected=means["logps/rejected"],
            margin=means["logps/chosen"] - means["logps/rejected"],
        )
