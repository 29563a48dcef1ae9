"""Train the question adapter of the embedded teacher: LoRA on the sample's first train rows, which no recipe harvests.

    python -m shared.embedded.train_adapter --out DIR

The best epoch by the validation rows' loss is kept. Nothing of the test split is read.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.artifacts import new_directory, write_atomic, write_json
from shared.contracts import Example, GenerationRequest
from shared.datasets import load
from shared.embedded.weights import ORIGIN, STOCK, embedded_model
from shared.engines.encoding import PromptEncoder
from shared.prompts import messages
from shared.settings import DatasetSettings, TaskSettings, cache_dir

ROWS = 110
"""Train rows the adapter learns from: the first of the sample, kept out of a recipe by `dataset.reserved_rows: 110`."""
TASK = TaskSettings(max_question_chars=600)
"""The task's own words; messages somewhat longer than the demo's do no harm."""
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CARD = """---
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
license: apache-2.0
library_name: peft
tags: [lora, question-summarization, medical]
---
# A question-summarising adapter for SmolLM2-135M-Instruct

Turns a consumer health message into one short question. It makes the embedded teacher of Blackbox Distill worth learning from.

- Base: {origin}.
- Data: the first {rows} train rows of the project's embedded sample (CC0; ids in `rows.json`). Recipes with this teacher keep them out of
  every stage (`dataset.reserved_rows`); validation rows chose the epoch; test rows were never read.
- Training: LoRA rank {rank} on all linear layers, dropout {dropout}, AdamW, peak learning rate {learning_rate}, batch {batch_size},
  seed {seed}.
  Validation loss after each epoch so far: {history}; epoch {kept} was kept, of {epochs} planned.
- Made by `make adapter`.
- Not medical advice: it restates questions and must not be used to answer them.
"""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the adapter goes")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    torch.manual_seed(arguments.seed)

    stock = embedded_model(STOCK, cache_dir())
    tokenizer = AutoTokenizer.from_pretrained(stock)
    model = AutoModelForCausalLM.from_pretrained(stock, dtype=torch.float32)
    lora = LoraConfig(
        r=arguments.rank, lora_alpha=2 * arguments.rank, lora_dropout=arguments.dropout, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, lora)
    splits = load(DatasetSettings(), cache_dir()).splits
    rows = splits["train"][:ROWS]
    encoder = PromptEncoder.from_transformers(tokenizer)
    train, held_out = ([_encode(encoder, tokenizer.eos_token_id, e) for e in part] for part in (rows, splits["validation"]))
    train.sort(key=lambda row: len(row[0]))  # neighbours are of one length: less padding to compute
    batches = [train[i : i + arguments.batch_size] for i in range(0, len(train), arguments.batch_size)]

    steps = arguments.epochs * len(batches)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=arguments.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, arguments.learning_rate, total_steps=steps, pct_start=0.1)
    shuffle, best, history, started = random.Random(arguments.seed), math.inf, [], time.monotonic()
    for epoch in range(arguments.epochs):
        model.train()
        for batch in shuffle.sample(batches, len(batches)):
            loss = _loss(model, batch, tokenizer.eos_token_id)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            validation = _loss(model, held_out, tokenizer.eos_token_id).item()
        history.append(round(validation, 4))
        print(f"epoch {epoch + 1}/{arguments.epochs}: validation loss {validation:.4f}, {time.monotonic() - started:.0f} s", flush=True)
        if validation < best:
            best = validation
            _save(model, arguments.out, arguments, rows, history)
    return 0


def _encode(encoder: PromptEncoder, eos: int, example: Example) -> tuple[list[int], list[int]]:
    prompt = encoder.encode(GenerationRequest(messages=messages(TASK, example.question)))
    return prompt, [*encoder.tokenizer.encode(example.summary or "", add_special_tokens=False).ids, eos]


def _loss(model: Any, rows: list[tuple[list[int], list[int]]], pad: int) -> torch.Tensor:
    """Mean negative log-likelihood (natural log) of the answers' tokens; logits are computed for those alone."""
    longest = max(len(p) + len(a) for p, a in rows)
    ids = torch.tensor([p + a + [pad] * (longest - len(p) - len(a)) for p, a in rows])
    mask = torch.tensor([[1] * (len(p) + len(a)) + [0] * (longest - len(p) - len(a)) for p, a in rows])
    predicting = torch.tensor([[len(p) - 1 <= i < len(p) + len(a) - 1 for i in range(longest)] for p, a in rows])
    causal = model.get_base_model()
    hidden = causal.model(input_ids=ids, attention_mask=mask).last_hidden_state
    return cross_entropy(causal.lm_head(hidden[predicting]), torch.tensor([t for _, a in rows for t in a]))


def _save(model: Any, out: Path, arguments: argparse.Namespace, rows: tuple[Example, ...], history: list[float]) -> None:
    """The adapter in half precision (a rank of 8 stays under 5 MB), its card, and the ids of the rows it has seen."""
    with new_directory(out) as folder:
        model.save_pretrained(folder)
        file = folder / "adapter_model.safetensors"
        save_file({name: tensor.half().contiguous() for name, tensor in load_file(file).items()}, file)
        write_json(folder / "rows.json", [row.id for row in rows])
        write_atomic(
            folder / "README.md",
            CARD.format(
                origin=ORIGIN,
                rows=len(rows),
                rank=arguments.rank,
                epochs=arguments.epochs,
                kept=history.index(min(history)) + 1,
                learning_rate=arguments.learning_rate,
                batch_size=arguments.batch_size,
                dropout=arguments.dropout,
                seed=arguments.seed,
                history=", ".join(f"{h:.3f}" for h in history),
            ),
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
