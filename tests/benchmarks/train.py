"""What packing saves: a training step of ours beside TRL's on the same prompts, and beside plain SFT on the chosen alone, in one run.

    python tests/benchmarks/train.py                        # five minutes
    python tests/benchmarks/train.py --quick                # within a minute on idle cores: of the wall clock only T5's, and roughly
    python tests/benchmarks/train.py --meqsum meqsum.xlsx   # padding on MeQSum's own lengths instead of the embedded sample's
    python tests/benchmarks/train.py --device cuda          # prompts/s and memory on a GPU, and nothing else

A prompt of 150 tokens with one chosen and k rejected responses of 16. TRL's side is TRL's own code, `trl.experimental.orpo.ORPOTrainer`, on
the same model object, with the same attention (sdpa) and dtype, float32 on a CPU; it takes one pair a row, so k rows a prompt, in one
batch. Ours is the student, the collator and the losses of the trainer; SFT is the same code with lambda 0 and no rejected responses. "Not
packed" is ours with each response behind a prompt of its own. All weights are random. A step is forward, loss and backward: neither
collating, which takes milliseconds, nor the optimizer, which costs all of them the same.

FLOPs are counted, not timed: FlopCounterMode over FakeTensorMode, which runs the meta device's kernels (shapes without numbers) yet bears
the name of a device, which autocast and TRL ask for. Attention is taken apart into its matrix products there, to be counted like
everything else. Wall clock: systems take turns within each round, and what is compared is the median over rounds of the ratio within a
round, since machines are noisy. It runs on one thread (--threads): several wait for each other at every product, so that one busy core
spoils all. Memory: bytes of distinct storages that autograd keeps for the backward pass, without parameters.
Padding: all cells that are computed on over real tokens; the target is meant for MeQSum's lengths. On a GPU each system has the batch that
is fastest for it. Prints tables; the last line is one JSON object, null where not measured: TRL's cost over ours, but `..._of_sft_...` is
ours over SFT's. A missed target is told, not an error. It runs on Linux: it reads /proc.

Expected (`MEASURES`), from measurements of a prototype, and for decoder-only models from a first count of their FLOPs: flan-t5-base, 8
prompts, one rejected: TRL 1,662 GFLOP, packed 1.79x fewer and 1.12x of SFT; three rejected: 4.43x fewer and 1.36x of SFT; flan-t5-small
on 2 cores: 4.18 s against 2.27 s (SFT 2.02 s), 1,504 MiB against 818; padding 4.60 at fixed 512, 1.96 shuffled, 1.04 by length. Wall
clock should follow the FLOPs where none was measured. Decoder-only: 332 positions against 182, and 996 against 214, hence 1.8 and 4.7;
more in FLOPs, as TRL's head runs on every position and ours on those that predict a response.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}  # read while they are imported

import datasets
import torch
from gateway import Target, busy_s, processor, shown
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.utils import logging
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from shared.datasets import load
from shared.models import hugging_face_model
from shared.prompts import zero_shot
from shared.settings import DatasetSettings, TaskSettings, TrainSettings, cache_dir
from student_trainer.training.collate import Collator, LengthGrouped
from student_trainer.training.losses import Weights, terms, token_logps
from student_trainer.training.packing import Kind, Packed, Packer, Preferences
from student_trainer.training.student import Student, turn_dropout_off

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny_models

PROMPT, RESPONSE, BETA = 150, 16, 0.1
TRL, OURS, SFT, NOT_PACKED = "TRL", "ours", "SFT on the chosen", "ours, not packed"
Case = tuple[str, int]
"""A system and the number of rejected responses; SFT, which reads none of them, stands under 1."""
TIMED: list[Case] = [(TRL, 1), (OURS, 1), (SFT, 1), (TRL, 3), (OURS, 3)]
COUNTED: list[Case] = [(TRL, 1), (NOT_PACKED, 1), (OURS, 1), (SFT, 1), (TRL, 3), (NOT_PACKED, 3), (OURS, 3)]
GAIN = 1.03
"""On a GPU the batch is doubled until that brings less than this."""


def at_least(least: float) -> Target:
    return Target(f"at least {least:.2f}", lambda value: value >= least)


def at_most(most: float) -> Target:
    return Target(f"at most {most:.2f}", lambda value: value <= most)


MEASURES: dict[str, tuple[str, Target | None]] = {
    "t5_flops_k1": ("1.79", at_least(1.75)),
    "t5_flops_k3": ("4.43", at_least(4.2)),
    "t5_flops_of_sft_k1": ("1.12", at_most(1.15)),
    "t5_flops_of_sft_k3": ("1.36", at_most(1.4)),
    "t5_wall_k1": ("1.84", at_least(1.6)),
    "t5_wall_k3": ("4.4", at_least(3.5)),
    "t5_memory_k1": ("1.84", at_least(1 / 0.6)),
    "decoder_flops_k1": ("above 1.8", at_least(1.75)),
    "decoder_flops_k3": ("above 4.7", at_least(4.2)),
    "decoder_flops_of_sft_k1": ("", None),
    "decoder_flops_of_sft_k3": ("", None),
    "decoder_wall_k1": ("1.8", at_least(1.6)),
    "decoder_wall_k3": ("4.7", at_least(3.5)),
    "decoder_memory_k1": ("", None),
    "t5_padding": ("1.04", at_most(1.1)),
    "decoder_padding": ("1.04", at_most(1.1)),
    "t5_cuda_wall_k1": ("", None),
    "t5_cuda_wall_k3": ("", None),
    "t5_cuda_memory_k1": ("", None),
}
"""Of the last line, in its order: what was expected, and the target if there is one."""
Config = T5Config | LlamaConfig


def t5(name: str, **sizes: int) -> T5Config:
    sizes |= {"d_kv": 64, "vocab_size": 32128, "decoder_start_token_id": 0, "pad_token_id": 0}
    return T5Config(name_or_path=name, feed_forward_proj="gated-gelu", **sizes)


def flan_t5_base() -> T5Config:
    return t5("flan-t5-base", num_layers=12, d_model=768, d_ff=2048, num_heads=12)


def flan_t5_small(layers: int) -> T5Config:
    return t5("flan-t5-small", num_layers=layers, d_model=512, d_ff=1024, num_heads=6)


def smollm2_135m(layers: int) -> LlamaConfig:
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}
    return LlamaConfig(name_or_path="SmolLM2-135M", num_hidden_layers=layers, tie_word_embeddings=True, **sizes)


def kind_of(config: Config) -> Kind:
    return "encoder-decoder" if config.is_encoder_decoder else "decoder-only"


def trl_trainer(kind: Kind, device: str = "cpu") -> ORPOTrainer:
    """TRL's trainer, built around a tiny model: its methods take the model to be measured as an argument."""
    encoder_decoder = kind == "encoder-decoder"
    with tempfile.TemporaryDirectory() as folder:
        options = {"max_length": 512, "max_completion_length": 64, "bf16": False, "report_to": [], "remove_unused_columns": False}
        return ORPOTrainer(
            model=tiny_models.tiny_t5() if encoder_decoder else tiny_models.tiny_llama(),
            args=ORPOConfig(output_dir=folder, beta=BETA, use_cpu=device == "cpu", **options),
            train_dataset=datasets.Dataset.from_dict({"prompt": ["w1"], "chosen": ["w2"], "rejected": ["w3"]}),
            processing_class=tiny_models.tokenizer(appends_eos=encoder_decoder),
        )


class Systems:
    """TRL, ours and SFT around one model object: the loss of each."""

    def __init__(self, config: Config, trl: ORPOTrainer, *, device: str = "cpu", bf16: bool = False) -> None:
        self._trl, self._device, self._bf16 = trl, device, bf16
        torch.manual_seed(0)
        made = T5ForConditionalGeneration if config.is_encoder_decoder else LlamaForCausalLM
        with torch.device(device):
            self.model = made._from_config(config, attn_implementation="sdpa").train()
        if config.is_encoder_decoder:  # flan-T5 has a head of its own, which transformers 5 ties
            self.model.lm_head.weight = torch.nn.Parameter(self.model.lm_head.weight.detach().clone())
        turn_dropout_off(self.model)
        self.kind = kind_of(config)
        self._student = Student(self.model, self.kind, bf16=bf16)

    def loss(self, system: str, batch: dict[str, Any]) -> Tensor:
        """() of a whole training step."""
        if system == TRL:
            with torch.autocast(self._device, dtype=torch.bfloat16, enabled=self._bf16):
                loss: Tensor = self._trl.get_batch_loss_metrics(self.model, batch)[0]
            return loss
        weights = Weights(orpo_lambda=0.0 if system == SFT else BETA)
        return terms(self._student(batch), batch, weights).loss(weights, batch["denominators"])

    def countable(self, system: str, batch: dict[str, Any]) -> Tensor:
        """() with the matrix products of `loss`, though no number of it can be read: the metrics and denominators of both sides do that."""
        if system == TRL:
            chosen, rejected, _, _, nll = self._trl.concatenated_forward(self.model, batch)
            return nll - self._trl.odds_ratio_loss(chosen, rejected)[0].mean()
        return token_logps(self._student(batch), batch["labels"]).sum()


def made_batch(kind: Kind, case: Case, prompts: int, put: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """What the case's collator makes of the same prompts, each tensor as `put` returns it."""
    system, rejected = case
    rows = examples(rejected, prompts)
    if system == TRL:
        made = trl_batch(kind, rows)
    else:
        collator = Collator(kind, pad_token_id=0, start_token_id=0, with_rejected=system != SFT)
        made = collator(apart(rows) if system == NOT_PACKED else rows)
    return {name: put(value) if isinstance(value, Tensor) else value for name, value in made.items()}


def examples(rejected: int, prompts: int) -> list[Packed]:
    """All of the same lengths, so that neither side pads."""
    draw = random.Random(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(4, 32000) for _ in range(length))

    return [tiny_models.packed(f"e{i}", ids(PROMPT), [ids(RESPONSE)], [ids(RESPONSE) for _ in range(rejected)]) for i in range(prompts)]


def apart(rows: Sequence[Packed]) -> list[Packed]:
    """Each response behind a prompt of its own."""
    return [replace(row, responses=(one,), weights=(1.0,), counts=(0,), pairs=()) for row in rows for one in row.responses]


def trl_batch(kind: Kind, rows: Sequence[Packed]) -> dict[str, Tensor]:
    """What TRL's collator would make of them: a row a pair."""
    pairs = [(row.prompt, row.responses[c], row.responses[r]) for row in rows for c, r in row.pairs]
    prompts, chosen, rejected = (torch.tensor(side) for side in zip(*pairs, strict=True))
    batch = {"prompt_input_ids": prompts, "prompt_attention_mask": torch.ones_like(prompts)}
    for name, responses in (("chosen", chosen), ("rejected", rejected)):
        if kind == "encoder-decoder":
            batch[f"{name}_labels"] = responses
            continue
        whole = torch.cat([prompts, responses], dim=1)
        batch |= {f"{name}_input_ids": whole, f"{name}_attention_mask": torch.ones_like(whole)}
        batch[f"{name}_labels"] = torch.cat([torch.full_like(prompts, -100), responses], dim=1)
    return batch


def measure_flops(name: str, config: Config, cases: list[Case], *, prompts: int = 8) -> dict[str, float]:
    print(f"\n{config.name_or_path}, {config.num_hidden_layers} layers: FLOPs of forward and backward, {prompts} prompts")
    print_row("", "positions", "GFLOP", "TRL / it", "it / SFT")
    kind, mode, found = kind_of(config), FakeTensorMode(), {}
    trl, batches = trl_trainer(kind), {case: made_batch(kind, case, prompts, mode.from_tensor) for case in cases}
    with mode, sdpa_kernel(SDPBackend.MATH):
        systems = Systems(config, trl)
        for case, batch in batches.items():
            with FlopCounterMode(display=False) as counter:
                systems.countable(case[0], batch).backward()
            found[case] = counter.get_total_flops() / 1e9
    for (system, rejected), flops in found.items():
        of_trl = None if system == SFT else found[TRL, rejected] / flops
        through = 2 * rejected * (PROMPT + RESPONSE) if system == TRL else batches[system, rejected]["cells"][1] // prompts
        print_row(named(system, rejected), str(through), *map(shown, (flops, of_trl, flops / found[SFT, 1])))
    values = {f"{name}_flops_k{k}": found[TRL, k] / found[OURS, k] for k in (1, 3)}
    return values | {f"{name}_flops_of_sft_k{k}": found[OURS, k] / found[SFT, 1] for k in (1, 3)}


def measure_wall(name: str, config: Config, *, prompts: int, rounds: int) -> dict[str, float]:
    print(f"\n{config.name_or_path}, {config.num_hidden_layers} layers: a step of {prompts} prompts, float32; {rounds} rounds in turns")
    print_row("", "median s", "TRL / it", "it / SFT", "saved MiB")
    systems = Systems(config, trl_trainer(kind_of(config)))
    batches = {case: made_batch(systems.kind, case, prompts, lambda tensor: tensor) for case in TIMED}
    saved = {case: saved_bytes(systems, case[0], batch) for case, batch in batches.items()}  # warms up as well
    seconds: dict[Case, list[float]] = {case: [] for case in TIMED}
    for i in range(rounds):
        for case in TIMED if i % 2 == 0 else TIMED[::-1]:  # against drift
            systems.model.zero_grad()
            began = time.perf_counter()
            systems.loss(case[0], batches[case]).backward()
            seconds[case].append(time.perf_counter() - began)
    for (system, rejected), spent in seconds.items():
        of_trl = None if system == SFT else ratio(seconds[TRL, rejected], spent)
        numbers = median(spent), of_trl, ratio(spent, seconds[SFT, 1]), saved[system, rejected] / 2**20
        print_row(named(system, rejected), *map(shown, numbers))
    values = {f"{name}_wall_k{k}": ratio(seconds[TRL, k], seconds[OURS, k]) for k in (1, 3)}
    # not of three rejected: TRL might as well take its three rows a prompt one after the other
    return values | {f"{name}_memory_k1": saved[TRL, 1] / saved[OURS, 1]}


def saved_bytes(systems: Systems, system: str, batch: dict[str, Any]) -> int:
    """Bytes of the distinct storages that one step keeps for its backward pass, without the parameters', which are there anyway."""
    parameters = {p.untyped_storage().data_ptr() for p in systems.model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = systems.loss(system, batch)
    loss.backward()
    return sum(saved.values())


def ratio(one: list[float], other: list[float]) -> float:
    """The median over rounds of the ratio within a round."""
    return median(a / b for a, b in zip(one, other, strict=True))


def measure_padding(meqsum: Path | None) -> dict[str, float]:
    """Cells computed on over real tokens, by kind of student and order of examples."""
    data = load(DatasetSettings(name="meqsum", path=meqsum) if meqsum else DatasetSettings(), cache_dir())
    rows = [row for row in data.splits["train"] if row.summary]
    limits, tokenizer = TrainSettings(), AutoTokenizer.from_pretrained(hugging_face_model("embedded:smollm2-135m"))
    # the rejected response is some other row's reference: what counts here is its length
    preferences = [
        Preferences(
            row.id,
            zero_shot(TaskSettings(), row.question),
            responses=(row.summary, other.summary),
            ended=(True, True),
            weights=(1.0, 0.0),
            counts=(0, 0),
            pairs=((0, 1),),
        )
        for row, other in zip(rows, [*rows[1:], rows[0]], strict=True)
    ]
    size = limits.batch_size
    print(f"\npadding: {len(rows)} train rows of {data.name}, SmolLM2's tokenizer, {size} examples a batch; all cells over real tokens")
    print_row("", "by length", "shuffled", "prompts fixed", "prompt tokens")
    values = {}
    for name, kind in (("t5", "encoder-decoder"), ("decoder", "decoder-only")):
        packer = Packer(tokenizer, kind, max_prompt_tokens=limits.max_prompt_tokens, max_response_tokens=limits.max_response_tokens)
        packed, census = packer.pack(preferences)
        fixed = [replace(row, prompt=(*row.prompt, *[0] * (limits.max_prompt_tokens - len(row.prompt)))) for row in packed]
        collator = Collator(kind, pad_token_id=0, start_token_id=0)
        by_length = list(LengthGrouped([collator.size(row) for row in packed], size, seed=0))
        shuffled = torch.randperm(len(packed), generator=torch.Generator().manual_seed(0)).tolist()
        ((real, least), (_, dynamic), (_, most)) = (
            all_cells(collator, *laid, size) for laid in ((packed, by_length), (packed, shuffled), (fixed, shuffled))
        )
        print_row(f"{name} student", *map(shown, (least / real, dynamic / real, most / real, census.prompt_tokens / census.examples)))
        values[f"{name}_padding"] = least / real
    return values


def all_cells(collator: Collator, rows: Sequence[Packed], order: Sequence[int], size: int) -> tuple[int, int]:
    """(real tokens, all cells) over the batches of `size` that `order` makes."""
    found = [collator([rows[i] for i in order[at : at + size]])["cells"] for at in range(0, len(order), size)]
    return sum(real for real, _ in found), sum(whole for _, whole in found)


@dataclass(frozen=True)
class OnGpu:
    """A case at one batch size."""

    prompts: int
    prompts_per_s: float
    peak_gib: float


def measure_cuda(config: T5Config) -> dict[str, float]:
    print(f"\n{config.name_or_path}, {config.num_hidden_layers} layers, bf16 autocast over float32 weights: {torch.cuda.get_device_name()}")
    print(f"the batch is doubled until memory is out or that makes it less than {GAIN - 1:.0%} faster")
    print_row("", "batch", "prompts/s", "tokens/s", "peak GiB", "TRL / it")
    systems = Systems(config, trl_trainer(kind_of(config), "cuda"), device="cuda", bf16=True)
    found = {case: doubled(systems, case) for case in TIMED}
    for (system, rejected), tried in found.items():
        top = best(tried)
        tokens = PROMPT + RESPONSE * (1 if system == SFT else 1 + rejected)  # of text: what a system computes twice counts once
        of_trl = None if system == SFT else top.prompts_per_s / best(found[TRL, rejected]).prompts_per_s
        numbers = top.prompts_per_s, top.prompts_per_s * tokens, top.peak_gib, of_trl
        print_row(named(system, rejected), str(top.prompts), *map(shown, numbers))
    values = {f"t5_cuda_wall_k{k}": best(found[OURS, k]).prompts_per_s / best(found[TRL, k]).prompts_per_s for k in (1, 3)}
    theirs, ours = list(zip(found[TRL, 1], found[OURS, 1], strict=False))[-1]  # the largest batch that both were tried at
    return values | {"t5_cuda_memory_k1": theirs.peak_gib / ours.peak_gib}


def doubled(systems: Systems, case: Case) -> list[OnGpu]:
    """Raises torch.OutOfMemoryError if not even one prompt has room."""
    tried: list[OnGpu] = []
    while len(tried) < 2 or tried[-1].prompts_per_s > GAIN * tried[-2].prompts_per_s:
        systems.model.zero_grad()
        torch.cuda.empty_cache()  # of sizes before
        try:
            tried.append(on_gpu(systems, case, prompts=2 ** len(tried)))
        except torch.OutOfMemoryError:
            if not tried:
                raise
            break
    return tried


def on_gpu(systems: Systems, case: Case, *, prompts: int, warm_up: int = 3, steps: int = 20) -> OnGpu:
    batch = made_batch(systems.kind, case, prompts, Tensor.cuda)
    torch.cuda.reset_peak_memory_stats()
    for step in range(warm_up + steps):
        if step == warm_up:
            torch.cuda.synchronize()
            began = time.perf_counter()
        systems.model.zero_grad()
        systems.loss(case[0], batch).backward()
    torch.cuda.synchronize()
    return OnGpu(prompts, prompts * steps / (time.perf_counter() - began), torch.cuda.max_memory_allocated() / 2**30)


def best(tried: list[OnGpu]) -> OnGpu:
    return max(tried, key=lambda one: one.prompts_per_s)


def named(system: str, rejected: int) -> str:
    return system if system == SFT else f"{system}, {rejected} rejected"


def print_row(name: str, *texts: str) -> None:
    print(f"{name:28}" + "".join(f"{text:>15}" for text in texts), flush=True)


def print_verdict(values: dict[str, float | None]) -> None:
    print(f"\n{'measure':26}{'expected':>12}{'measured':>12}  target")
    for name, value in values.items():
        expected, target = MEASURES[name]
        verdict = "" if target is None or value is None else " (met)" if target.met(value) else " (MISSED)"
        print(f"{name:26}{expected:>12}{shown(value):>12}  {target.wording if target else ''}{verdict}")


def measure(*, quick: bool, meqsum: Path | None, device: str) -> None:
    """The whole run."""
    began, busy, own = time.monotonic(), busy_s(), sum(os.times()[:4])
    machine = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads used, {processor()}"
    print(f"machine: {machine}, Python {platform.python_version()}, torch {torch.__version__}")
    values: dict[str, float | None] = dict.fromkeys(MEASURES)
    if device == "cuda":
        values |= measure_cuda(flan_t5_base())
    else:
        cases = TIMED if quick else COUNTED
        values |= measure_padding(meqsum)
        values |= measure_flops("t5", flan_t5_base(), cases)
        values |= measure_flops("decoder", smollm2_135m(30), cases)
        if quick:
            values |= measure_wall("t5", flan_t5_small(8), prompts=1, rounds=2)
        else:
            values |= measure_wall("t5", flan_t5_small(8), prompts=8, rounds=5)
            values |= measure_wall("decoder", smollm2_135m(10), prompts=2, rounds=5)
    rounded = {name: None if value is None else round(value, 3) for name, value in values.items()}
    print_verdict(rounded)
    wall = time.monotonic() - began
    others = max(0.0, busy_s() - busy - (sum(os.times()[:4]) - own)) / wall
    print(f"{wall:.0f} s, in which other programs took {others:.2f} of {os.cpu_count()} cores: trust the wall clock only below 0.1")
    print(json.dumps(rounded | {"quick": quick, "device": device, "cores": os.cpu_count(), "cores_taken_by_others": round(others, 2)}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="within a minute on idle cores: of wall clock and memory T5 alone, one prompt a step"
    )
    parser.add_argument("--meqsum", type=Path, metavar="PATH", help="MeQSum's xlsx, for its lengths; else the embedded sample's rows")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: what a GPU's user sees, and nothing else")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of a step on the CPU; more than 1 only on idle cores")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use, and finds none")
    torch.set_num_threads(args.threads)
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # TRL's
    measure(quick=args.quick, meqsum=args.meqsum, device=args.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
