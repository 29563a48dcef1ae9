from __future__ import annotations

import os
from pathlib import Path

import pytest

from shared.errors import SettingsError, StorageError
from student_trainer.fetch import main


def test_the_link_leads_to_the_folder_also_when_both_are_mounted_elsewhere(tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    (volume / "models" / "one").mkdir(parents=True)
    assert main([str(volume / "models" / "one"), "--link", str(volume / "engine")]) == 0
    assert (volume / "engine").resolve() == volume / "models" / "one"
    volume.rename(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "engine").resolve() == tmp_path / "elsewhere" / "models" / "one"


def test_another_model_takes_the_place_of_the_first(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        main([str(tmp_path / name), "--link", str(tmp_path / "engine")])
    assert (tmp_path / "engine").resolve() == tmp_path / "two"
    assert sorted(os.listdir(tmp_path)) == ["engine", "one", "two"]


def test_a_link_where_a_folder_stands_is_refused_and_the_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "engine").mkdir()
    with pytest.raises(SettingsError, match="--link"):
        main([str(tmp_path / "one"), "--link", str(tmp_path / "engine")])
    assert (tmp_path / "engine").is_dir()
    assert not (tmp_path / "engine").is_symlink()


def test_a_link_that_cannot_be_written_is_a_matter_of_storage(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with pytest.raises(StorageError, match="/proc/engine"):
        main([str(tmp_path / "one"), "--link", "/proc/engine"])


def test_what_another_container_is_writing_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / ".engine.tmp").touch()
    main([str(tmp_path / "one"), "--link", str(tmp_path / "engine")])
    assert (tmp_path / ".engine.tmp").exists()
