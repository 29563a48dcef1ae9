"""Model references: which of them tell a model from what it was before it changed."""

from __future__ import annotations

from pathlib import Path

import pytest

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
