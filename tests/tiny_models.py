"""Tiny random models, a word tokenizer and packed examples: the real architectures, small enough to test exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from student_trainer.training.collate import Collator, denominators
from student_trainer.training.losses import Weights, terms
from student_trainer.training.packing import Packed
from student_trainer.training.student import Student, turn_dropout_off

KINDS = ["decoder-only", "encoder-decoder"]
WORDS = 90
PAD, EOS, UNK, BOS = 0, 1, 2, 3
VOCABULARY = WORDS + 4
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ bos_token }} {{ m['content'] }} {{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}{% endif %}"
)


def tokenizer(*, appends_eos: bool, chat: bool = False) -> PreTrainedTokenizerFast:
    """Splits at white space; knows the words w0 ... w89. appends_eos: as T5's does to every text with special tokens."""
    names = ["<pad>", "</s>", "<unk>", "<s>", *(f"w{i}" for i in range(WORDS))]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if appends_eos:
        core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>")
    if chat:
        made.chat_template = CHAT_TEMPLATE
    return made


def tiny_t5(seed: int = 0, *, dropout: float = 0.1) -> T5ForConditionalGeneration:
    """About 25,000 weights, with a head of its own as flan-T5 has it."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=PAD,
        pad_token_id=PAD,
        eos_token_id=EOS,
        dropout_rate=dropout,
    )
    model = T5ForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCABULARY, 32) * 0.3)  # sharp: errors must show in the log-probabilities
    model.config.tie_word_embeddings = False
    return model


def tiny_llama(seed: int = 0, *, layers: int = 2) -> LlamaForCausalLM:
    """About 25,000 weights, grouped key-value heads and tied embeddings as SmolLM2 has them."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        initializer_range=0.3,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa")


def save_folder(model: torch.nn.Module, made: PreTrainedTokenizerFast, folder: Path) -> Path:
    """`model` and its tokenizer as a Hugging Face folder."""
    model.save_pretrained(folder)  # type: ignore[operator]
    made.save_pretrained(folder)
    return folder


def collator(kind, **options):
    """A collator of that kind for these models."""
    return Collator(kind, pad_token_id=PAD, start_token_id=PAD, **options)


def student(kind, **options):
    """A tiny student in double precision, without dropout."""
    model = (tiny_llama(**options) if kind == "decoder-only" else tiny_t5(**options)).double()
    turn_dropout_off(model)
    return Student(model, kind)


def packed(name, prompt, chosen, rejected, *, weights=None, counts=None):
    """An example whose chosen responses are each paired with every rejected one."""
    responses = (*chosen, *rejected)
    pairs = tuple((c, len(chosen) + r) for c in range(len(chosen)) for r in range(len(rejected)))
    weights = weights or [1 / len(chosen)] * len(chosen)
    return Packed(name, prompt, responses, (*weights, *[0.0] * len(rejected)), tuple(counts or [0] * len(responses)), pairs)


def examples(count, rejected=1, seed=0, chosen=1):
    """Random examples of uneven lengths; every chosen response is paired with every rejected one."""
    draw = np.random.default_rng(seed)

    def ids(low, high):
        return tuple(draw.integers(4, VOCABULARY, draw.integers(low, high)).tolist())

    return [packed(f"e{i}", ids(4, 12), [ids(1, 7) for _ in range(chosen)], [ids(1, 7) for _ in range(rejected)]) for i in range(count)]


def loss_of(student, batch, weights=Weights(orpo_lambda=0.1), reference=None):  # noqa: B008
    """The loss of one batch that is a whole optimizer step."""
    return terms(student(batch), batch, weights, reference=reference).loss(weights, denominators(batch))


def gradients(student, loss):
    """Gradients by parameter name."""
    student.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
