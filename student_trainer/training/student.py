"""The student as the trainer sees it: packed rows in, logits at the responses' tokens out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig
from transformers.pytorch_utils import Conv1D

from shared.engines.t5 import RELATIVE_POSITION_MODELS, scales_logits, tied
from shared.errors import TrainingError
from shared.settings import TrainSettings
from student_trainer.training.collate import Collator, visible
from student_trainer.training.losses import token_logps
from student_trainer.training.packing import Kind, Packed

ADAPTER = "adapter"
"""The folder of a round's LoRA in peft's format."""
LARGEST_ERROR = 1e-2
"""In nats a token: how far packed float32 log-probabilities may be from unpacked ones. Wrong masks are off by whole nats."""
OTHER_FAMILY = "use a model of the Llama or T5 family"


class Student(nn.Module):
    """A language model that scores packed batches."""

    def __init__(self, model: Any, kind: Kind, *, bf16: bool = False) -> None:
        """model: a T5-like or a Llama-like model with its head; bf16: compute in bfloat16 over the weights as they are."""
        super().__init__()
        self.model, self.kind, self.bf16 = model, kind, bf16
        self.adapted: Any = None
        """The peft model around `model`, if LoRA is trained."""

    @property
    def _no_split_modules(self) -> list[str]:
        """What FSDP shards as one: the model's blocks."""
        return sorted(self.model._no_split_modules or ())

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def _precision(self) -> Any:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """(T, vocabulary) logits that predict `batch["labels"]`, a batch as `collate.Collator` makes it."""
        with self._precision():
            hidden = self._decode(batch) if self.kind == "encoder-decoder" else self._continue(batch)
            # the head is a tenth of the work at every position it runs on: run it only where a response token is predicted
            logits: Tensor = self.model.get_output_embeddings()(hidden[batch["rows"], batch["columns"]])
        return logits

    def generate(self, inputs: dict[str, Tensor], **options: Any) -> Tensor:
        """(B, tokens) greedy answers to padded prompts (`input_ids`, `attention_mask`), without the prompts; padded behind their end."""
        own = self.model.generation_config
        start = self.model.config.decoder_start_token_id if self.kind == "encoder-decoder" else None
        try:
            # greedy and nothing else: a model's own may hold penalties, which serving does not know
            self.model.generation_config = GenerationConfig(decoder_start_token_id=start)
            with torch.no_grad(), self._precision():
                found: Tensor = self.model.generate(**inputs, **options)
        finally:
            self.model.generation_config = own
        return found[:, 1 if self.kind == "encoder-decoder" else inputs["input_ids"].shape[1] :]

    def initial_logits(self, batch: dict[str, Any]) -> Tensor:
        """(T, vocabulary) logits of the student before any LoRA. No gradient."""
        with torch.no_grad(), self.adapted.disable_adapter():
            return self(batch)  # type: ignore[no-any-return]

    def _continue(self, batch: dict[str, Any]) -> Tensor:
        """(B, S, hidden) of a decoder-only model."""
        hidden: Tensor = self.model.get_decoder()(
            input_ids=batch["input_ids"],
            attention_mask=visible(batch["segments"]),
            position_ids=batch["position_ids"],
            use_cache=False,
        ).last_hidden_state
        return hidden

    def _decode(self, batch: dict[str, Any]) -> Tensor:
        """(B, D, hidden) of an encoder-decoder, as its head expects it."""
        prompt = self.model.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        hidden: Tensor = self.model.decoder(
            input_ids=batch["decoder_input_ids"],
            attention_mask=visible(batch["segments"]),
            encoder_hidden_states=prompt.last_hidden_state,
            encoder_attention_mask=batch["attention_mask"],
            use_cache=False,
        ).last_hidden_state
        return hidden * self.model.model_dim**-0.5 if scales_logits(self.model) else hidden

    def merged(self) -> Any:
        """The Hugging Face model with any LoRA folded in. The student cannot be trained on after this."""
        return self.model if self.adapted is None else self.adapted.merge_and_unload()

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def load(source: str | Path, settings: TrainSettings, *, bf16: bool, adapter: Path | None = None) -> tuple[Student, Any]:
    """Student and tokenizer from a folder or a Hub name: float32 weights, no dropout, frozen or adapted as the settings say.

    adapter: LoRA of an earlier round, to be trained on instead of a new one.

    Raises TrainingError for a model that cannot be read or is of a kind that cannot be packed, and for settings that it does not allow.
    """
    try:
        config = AutoConfig.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        if not tokenizer.is_fast:
            raise TrainingError(f"student.model: {source} has no fast tokenizer, which serving needs (a tokenizer.json)")
        if config.is_encoder_decoder and config.model_type not in RELATIVE_POSITION_MODELS:
            raise TrainingError(
                f"student.model: {source} is an encoder-decoder of type {config.model_type}, whose absolute positions do not allow "
                f"several responses in one row; use one of {', '.join(RELATIVE_POSITION_MODELS)}, or a decoder-only model"
            )
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model, found = auto.from_pretrained(source, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True)
    except TrainingError:
        raise
    except Exception as exc:  # a boundary: the libraries that read a model's files have errors of all classes
        if no_memory(exc):
            raise
        raise TrainingError(f"student.model: cannot load {source}: {type(exc).__name__}: {exc}") from exc
    if missing := sorted(found["missing_keys"]):
        raise TrainingError(
            f"student.model: {source} has no weights for {len(missing)} tensors of its config.json, which would be random "
            f"({', '.join(missing[:3])}); use a whole model with its language-model head"
        )
    if config.is_encoder_decoder and not isinstance(getattr(config, "decoder_start_token_id", None), int):
        raise TrainingError(
            f"student.model: the config.json of {source} has no decoder_start_token_id, with which every answer begins; set it"
        )
    student = Student(model, "encoder-decoder" if config.is_encoder_decoder else "decoder-only", bf16=bf16)
    tell_truth_about_tying(model)
    turn_dropout_off(model)
    freeze_lowest(student, settings.frozen_layers)
    if settings.activation_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise TrainingError(
                f"train.activation_checkpointing: a {config.model_type} model cannot compute activations again; set it to false"
            )
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if settings.lora_rank:
        adapt(student, settings.lora_rank, adapter)
    return student, tokenizer


def no_memory(exc: BaseException) -> bool:
    """Whether torch found no memory; a processor's allocator says that by its name, in any words."""
    return isinstance(exc, torch.OutOfMemoryError) or (isinstance(exc, RuntimeError) and "DefaultCPUAllocator" in str(exc))


def padding_token(tokenizer: Any) -> int:
    """What fills up rows, where it is seen by nothing; a tokenizer without such a token lends its end."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def tell_truth_about_tying(model: Any) -> None:
    """Set `config.tie_word_embeddings` to whether the head really is the embedding.

    transformers 5 says True for every T5. flan-T5 has a head of its own, which tie_weights() would then silently replace.
    """
    model.config.tie_word_embeddings = tied(model)


def turn_dropout_off(model: nn.Module) -> None:
    """No dropout anywhere: both sides of an odds ratio must be scored by the same network, and a resumed run by the same one.

    Some attention layers (T5's) keep the probability in a plain float attribute beside the nn.Dropout modules.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "dropout_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def blocks(student: Student) -> list[nn.ModuleList]:
    """The stacks of blocks, lowest first: encoder and decoder, or the one stack of a decoder-only model. Raises TrainingError."""
    if student.kind == "encoder-decoder":
        return [student.model.encoder.block, student.model.decoder.block]
    decoder = student.model.get_decoder()
    if not hasattr(decoder, "layers"):
        raise TrainingError(
            f"train.frozen_layers: the blocks of a {student.model.config.model_type} model are not where those of Llama are; set it to 0"
        )
    return [decoder.layers]


def freeze_lowest(student: Student, layers: int) -> None:
    """Do not train the embeddings and the lowest `layers` blocks of each stack; 0 freezes nothing.

    A head tied to the embeddings is frozen with them. Frozen embeddings need no gradient, so autograd keeps nothing of the
    frozen blocks above them: they cost one forward pass. Raises TrainingError if no block would be left.
    """
    if not layers:
        return
    for stack in blocks(student):
        if layers >= len(stack):
            raise TrainingError(f"train.frozen_layers={layers} leaves nothing to train: the student has {len(stack)} layers")
        stack[:layers].requires_grad_(False)
    student.model.get_input_embeddings().requires_grad_(False)


def adapt(student: Student, rank: int, adapter: Path | None = None) -> None:
    """Train LoRA of this rank (alpha = 2 * rank) on all linear layers above the frozen ones instead of the weights themselves.

    adapter: the folder of one to go on with. Raises TrainingError where there is no such layer, and for an adapter that cannot be read.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if adapter is not None:
        try:
            student.adapted = PeftModel.from_pretrained(student.model, adapter, is_trainable=True)
        except Exception as exc:  # a boundary, as in `load`
            if no_memory(exc):
                raise
            raise TrainingError(
                f"{adapter} cannot be read ({exc}): it is damaged; remove {adapter.parent} to train that round anew"
            ) from exc
        return

    head = student.model.get_output_embeddings()
    linear = {
        name: module
        for name, module in student.model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and _trainable(module)
    }
    if not linear:
        raise TrainingError(
            f"train.lora_rank: a {student.model.config.model_type} model has no linear layers that LoRA could stand beside; set it to 0, "
            "with train.frozen_layers or a smaller student.model if the memory is too small"
        )
    transposed = any(isinstance(module, Conv1D) for module in linear.values())  # GPT-2's
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=list(linear), fan_in_fan_out=transposed)
    student.adapted = get_peft_model(student.model, config)


def _trainable(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def native_bf16(device: torch.device) -> bool:
    """Whether the processor computes bfloat16 itself; where it only emulates it, float32 is faster."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "sve_bf16"))
    return False


def refuse_unless_it_fits(student: Student, collator: Collator, rows: Sequence[Packed]) -> None:
    """Raises TrainingError for a token without an embedding and a position beyond the last: to torch, an index out of range."""
    ids = [max(part) for row in rows for part in (row.prompt, *row.responses) if part]
    if student.kind == "encoder-decoder":
        ids.append(student.model.config.decoder_start_token_id)
    largest, embedded = max(*ids, collator.pad_token_id), len(student.model.get_input_embeddings().weight)
    if largest >= embedded:
        raise TrainingError(
            f"student.model: its tokenizer gives the token {largest}, but it has embeddings of 0 to {embedded - 1} only; give it the "
            "tokenizer that it was trained with, or save it after model.resize_token_embeddings(len(tokenizer))"
        )
    longest = max(len(row.prompt) + len(response) for row in rows for response in row.responses)
    refuse_longer_texts(student, longest, "train.max_prompt_tokens or train.max_response_tokens")


def refuse_longer_texts(student: Student, longest: int, settings: str) -> None:
    """Raises TrainingError if the student has no position for the last of so many tokens; `settings`: those that make them fewer."""
    if (limit := positions(student)) is not None and longest > limit:
        raise TrainingError(
            f"student.model: a {student.model.config.model_type} model of {limit} positions cannot read a prompt and an answer of "
            f"{longest} tokens together; lower {settings}"
        )


def positions(student: Student) -> int | None:
    """How many positions a decoder-only model knows that looks them up in a table; None of one that computes them, however many."""
    limit = getattr(student.model.config, "max_position_embeddings", None)
    if student.kind == "encoder-decoder" or not isinstance(limit, int):
        return None
    embedding = student.model.get_input_embeddings()
    tables = [module.weight for module in student.model.modules() if isinstance(module, nn.Embedding) and module is not embedding]
    tables += [buffer for buffer in student.model.buffers() if buffer.dim() == 2]  # GPT-J's
    return limit if any(len(table) >= limit for table in tables) else None


def refuse_unless_packable(student: Student, collator: Collator, example: Packed) -> None:
    """Score one example packed and one response at a time. Raises TrainingError if the two differ, or if the model fails on it.

    That is what makes any decoder-only architecture safe: one that ignores 4-D masks or position ids, windows its attention
    or scales its logits is refused instead of trained wrongly.
    """
    named = f"student.model: a {student.model.config.model_type} model"
    try:
        error = _packing_error(student, collator, example)
    except Exception as exc:  # a boundary: what a model does that knows no masks of this shape is its own affair
        if no_memory(exc):
            raise
        raise TrainingError(f"{named} cannot read packed rows ({type(exc).__name__}: {exc}); {OTHER_FAMILY}") from exc
    if not error <= LARGEST_ERROR:
        raise TrainingError(
            f"{named} scores packed rows differently from single ones (by {error:.3g} nats a token), so it cannot be trained this way; "
            f"{OTHER_FAMILY}"
        )


def _packing_error(student: Student, collator: Collator, example: Packed) -> float:
    """In nats: by how much a token's log-probability differs at most, packed and alone."""
    device = student.device
    batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in collator([example]).items()}
    prompt = torch.tensor([example.prompt], device=device)
    exact = type(student)(student.model, student.kind)
    with torch.no_grad():
        packed, single = token_logps(exact(batch), batch["labels"]), []
        for index in collator.used(example):
            labels = torch.tensor(example.responses[index], device=device)
            if student.kind == "decoder-only":
                row = torch.cat([prompt, labels[None, :-1]], dim=1)
                logits = student.model(input_ids=row, use_cache=False).logits[0, len(example.prompt) - 1 :]
            else:
                logits = student.model(input_ids=prompt, labels=labels[None], use_cache=False).logits[0]
            single.append(token_logps(logits, labels))
    return (packed - torch.cat(single)).abs().max().item()
