"""Tiny random models in Hugging Face folders whose vocabulary can end lines, for tests of everything that decodes or serves one."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

SPECIAL = ["<pad>", "</s>", "<unk>"]
WORDS = [f"word{i}" for i in range(60)]
LINES = [f"end{i}\nnext{i}" for i in range(12)]
"""Tokens that hold a line feed, with text on both sides of it."""
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}word0 "


def line_tokenizer(*, appends_eos: bool, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Splits at white space; what is no word of the vocabulary is <unk>."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS, *LINES])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if appends_eos:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="</s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=chat_template,
    )


def servable_llama(folder: Path) -> Path:
    """A decoder-only model with a chat template that reads 128 tokens."""
    torch.manual_seed(0)
    tokenizer = line_tokenizer(appends_eos=False, chat_template=CHAT_TEMPLATE)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        initializer_range=0.3,  # wide enough that greedy answers are no single repeated word
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def servable_t5(folder: Path) -> Path:
    """An encoder-decoder model."""
    torch.manual_seed(0)
    tokenizer = line_tokenizer(appends_eos=True)
    config = T5Config(
        vocab_size=len(tokenizer) + 5,  # as in T5 itself: rows that no token has
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(config.vocab_size, 32))
    model.config.tie_word_embeddings = False  # transformers sets it again when it builds the model
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
