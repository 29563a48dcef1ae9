"""From a Hugging Face folder to a serving folder: CTranslate2 weights, `tokenizer.json`, `serving.json`. Imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ctranslate2
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging

from shared.artifacts import new_directory, write_atomic
from shared.contracts import ServingConfig
from shared.engines.encoding import default_template
from shared.engines.t5 import RELATIVE_POSITION_MODELS, scales_logits
from shared.errors import EngineError

logging.disable_progress_bar()  # four bars for one copied file are noise

FALLBACK_INPUT_TOKENS = 512
"""Of models that state no limit: T5 has none, and was trained on this many."""


class _Converter(ctranslate2.converters.TransformersConverter):  # type: ignore[misc]
    """CTranslate2's own, told the truth about T5.

    It takes `tie_word_embeddings` to mean that a T5's logits are scaled by d_model ** -0.5. transformers 5 sets that flag for
    every T5 (see t5.py); flan-T5's logits would come out divided by 27.7, and its samples
    as noise, though not its greedy answers.
    """

    def load_model(self, model_class: Any, model_name_or_path: str, **kwargs: Any) -> Any:
        model = super().load_model(model_class, model_name_or_path, **kwargs)
        if model.config.model_type in RELATIVE_POSITION_MODELS:
            model.config.tie_word_embeddings = scales_logits(model)
        return model


def convert(model: str, out: Path, *, name: str, quantization: str) -> Path:
    """Convert `model` (Hub name or folder) into the serving folder `out`, whole or not at all.

    Raises EngineError for a model that cannot be found, that CTranslate2 does not know or that has no fast tokenizer.
    """
    try:
        config = AutoConfig.from_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as exc:
        raise EngineError(f"cannot load the model {model}: {exc}") from exc
    if not tokenizer.is_fast:
        raise EngineError(f"{model} has no fast tokenizer, which serving needs (a tokenizer.json)")
    if tokenizer.eos_token is None:
        raise EngineError(f"{model} has no end-of-sequence token: its answers would never end")
    encoder_decoder = bool(config.is_encoder_decoder)
    start = getattr(config, "decoder_start_token_id", None)
    serving = ServingConfig(
        name=name,
        kind="encoder-decoder" if encoder_decoder else "decoder-only",
        eos_token=tokenizer.eos_token,
        bos_token=tokenizer.bos_token,
        decoder_start_token=tokenizer.convert_ids_to_tokens(start) if encoder_decoder and start is not None else None,
        chat_template=default_template(tokenizer),
        max_input_tokens=getattr(config, "max_position_embeddings", None) or FALLBACK_INPUT_TOKENS,
        quantization=quantization,
    )
    with new_directory(out) as folder:
        try:
            _Converter(model).convert(str(folder), quantization=quantization, force=True)
        except (OSError, ValueError) as exc:
            if isinstance(exc, OSError) and exc.errno is not None:  # the disk's fault, not the model's
                raise
            raise EngineError(f"{model} cannot be converted for serving: {exc}") from exc
        write_atomic(folder / "tokenizer.json", tokenizer.backend_tokenizer.to_str(pretty=True))
        write_atomic(folder / "serving.json", serving.model_dump_json(indent=2) + "\n")
    return out
