"""What transformers 5 hides about T5 and its relatives: whether a model's logits are scaled."""

from __future__ import annotations

from typing import Any

RELATIVE_POSITION_MODELS = ("t5", "mt5", "umt5")
"""Encoder-decoders whose decoder knows only distances between tokens, so that responses can stand beside each other."""


def tied(model: Any) -> bool:
    """Whether the head of a transformers model really is its embedding."""
    return bool(model.get_output_embeddings().weight is model.get_input_embeddings().weight)


def scales_logits(model: Any) -> bool:
    """Whether a t5, mt5 or umt5 multiplies what its decoder gives by d_model ** -0.5 before the head.

    transformers 5 sets `tie_word_embeddings` for every one of them, whatever the truth. t5 keeps the truth in `scale_decoder_outputs`, mt5
    scales in no case, umt5 goes by that flag and so scales an untied head unless the flag is set right.
    """
    if model.config.model_type == "t5":
        return bool(model.config.scale_decoder_outputs)
    return model.config.model_type == "umt5" and tied(model)
