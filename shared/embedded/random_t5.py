"""A tiny T5 with random weights and a word-piece of a tokenizer, built on the spot: it tests plumbing and learns nothing worth quoting.

torch is loaded only to build what the cache does not hold.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from shared.artifacts import make_once, new_directory, write_json
from shared.commands import uninterrupted
from shared.errors import SettingsError

NAME = "tiny-t5"
REVISION = 1
"""Raised when anything below changes, so that a cached model of before is not taken for the new one."""


def random_model(name: str, cache: Path) -> Path:
    """The Hugging Face folder of a random model, built in `cache` at first use (a second). Raises SettingsError for an unknown name."""
    if name != NAME:
        raise SettingsError(f"random:{name}: no such random model; there is random:{NAME}")
    return make_once(cache / "huggingface" / f"random-{NAME}-{REVISION}", "origin.json", _build)


def _build(out: Path) -> None:
    with uninterrupted():
        import torch
        from transformers import T5Config, T5ForConditionalGeneration
        from transformers.utils import logging

    logging.disable_progress_bar()  # four bars for one copied file are noise
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=tokenizer.pad_token_id,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    with new_directory(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / "origin.json", {"model": "random weights, seed 0", "license": "Apache-2.0"})


def _tokenizer() -> Any:
    """A byte-pair tokenizer of 1,024 pieces, trained on the embedded sample, shaped like T5's (pad 0, eos 1, unk 2)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    pieces = Tokenizer(models.BPE(unk_token="<unk>"))
    pieces.normalizer = normalizers.NFKC()
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.decoder = decoders.Metaspace()
    text = resources.files("shared.datasets").joinpath("sample.jsonl").read_text(encoding="utf-8")
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False)
    pieces.train_from_iterator(text.splitlines(), trainer)
    pieces.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
