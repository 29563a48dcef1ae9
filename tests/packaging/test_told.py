"""What files and messages tell a user to type can be typed, and does what they say."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from student_trainer.prepare import STARTED_BESIDE

ROOT = Path(__file__).parents[2]
SOURCES = [
    file for folder in ("shared", "teacher_service", "student_trainer", "evaluator") for file in sorted((ROOT / folder).rglob("*.py"))
]
TOLD = {file.relative_to(ROOT).as_posix(): file.read_text() for file in [*SOURCES, ROOT / "README.md", *(ROOT / "recipes").glob("*.yaml")]}


def test_nobody_is_told_to_install_our_name_from_an_index_that_does_not_have_it() -> None:
    assert not [name for name, text in TOLD.items() if re.search(r"pip install [^\n]*blackbox-distill", text)]


def test_every_extra_that_is_named_is_one() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {extra for text in TOLD.values() for extra in re.findall(r"""install\(["'](\w+)["']\)|pip install -e '\.\[(\w+)\]'""", text)}
    named = {one or other for one, other in named}
    assert named == {"cluster", "datasets", "local", "privacy", "train"}
    assert named <= set(extras)


def test_a_teacher_that_is_to_be_started_is_told_who_may_ask() -> None:
    """Else it does not start."""
    lines = [line for name, text in TOLD.items() if not name.endswith(".py") for line in re.findall(r"distill teacher --[^`\n]*", text)]
    assert len(lines) >= 3
    assert [line for line in lines if not re.search(r"--no-auth|--api-keys-file|\.\.\.$", line)] == []


def services(*files: str) -> dict[str, dict[str, Any]]:
    return {name: service for file in files for name, service in yaml.safe_load((ROOT / file).read_text())["services"].items()}


def selected(name: str, of: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A service and all that it waits for, as `docker compose up NAME` starts them."""
    yield name
    for other in of[name].get("depends_on", ()):
        if other in of:
            yield from selected(other, of)


@pytest.mark.parametrize(
    ("file", "teacher"),
    [
        ("compose.yaml", "gpu"),
        ("compose.yaml", "gpu-url-model"),
        ("compose.cpu.yaml", "cpu"),
        ("compose.cpu.yaml", "cpu-vllm"),
        ("compose.cpu.yaml", "cpu-url-model"),
    ],
)
def test_the_command_for_scripts_builds_every_image_of_ours_that_it_starts(file: str, teacher: str) -> None:
    """`docker compose up --exit-code-from evaluator evaluator` on a fresh checkout: no image of ours is ever pulled."""
    every = services(file, f"docker/teacher/{teacher}.yaml")
    every = {name: service for name, service in every.items() if service.get("profiles") != ["never"]}
    started = [every[name] for name in set(selected("evaluator", every))]
    built = {service["image"] for service in started if "build" in service}
    assert {service["image"] for service in started if service["image"].startswith("blackbox-distill/")} == built
    with_build = [service["image"] for service in every.values() if "build" in service]
    assert len(with_build) == len(set(with_build))  # two would build the same at once


def test_where_a_teacher_is_started_its_address_is_the_one_that_prepare_knows() -> None:
    """So that it sees when that address takes the place of a recipe's own."""
    for file in ("compose.yaml", "compose.cpu.yaml", "docker/kubernetes/base.yaml"):
        assert re.search(rf"DISTILL_TEACHER__URL: .*{re.escape(STARTED_BESIDE)}", (ROOT / file).read_text()), file


def test_secrets_that_the_readme_has_made_in_the_checkout_are_ignored_by_git() -> None:
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {"/key", "/keys.yaml", "/secret.yaml"} <= set(ignored)
