"""`distill prepare`: the rows of a run and every model it needs, once, where torch and a network are; later stages need neither."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from shared.commands import open_run, stage_parser
from shared.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shared.artifacts import Run
    from shared.contracts import Example

STARTED_BESIDE = "http://teacher:8000/v1"
"""Where compose and Kubernetes start a teacher, whose address they put in the place of a recipe's own."""


def main(argv: list[str]) -> int:
    """Make what is missing, tell what is ready and where. Returns 0. Raises SettingsError, DataError, EngineError, StorageError."""
    parser = stage_parser(
        "prepare", "Fetch the rows and make the models a run needs; stages and servers then need neither torch nor a network."
    )
    parser.add_argument("--require-gpu", action="store_true", help="end at once where no NVIDIA driver is, as compose.yaml needs one")
    arguments = parser.parse_args(argv)
    if arguments.require_gpu:
        refuse_without_gpu()
    refuse_another_teacher(arguments.recipe)
    run = open_run(arguments)

    from shared.datasets.load import load
    from shared.datasets.stage import STAGE, prepare
    from shared.models import offline_model, serving_folder
    from shared.settings import DEFAULT_QUANTIZATION, cache_dir, read_secret

    recipe, before = run.recipe, _made(run)
    read_secret(recipe.teacher.api_key, recipe.teacher.api_key_file, "teacher.api_key")  # the harvest needs it; better told now
    # what is wrong with the data comes to light before minutes go into models
    dataset = load(recipe.dataset, cache_dir()) if run.manifest(STAGE) is None else None
    if recipe.triplets.ranking == "reference":
        tell_of_unreadable((dataset.splits if dataset else prepare(run))["train"])
    student = recipe.student.model
    print(f"prepare: student {student}: to be trained {offline_model(student)}", flush=True)
    print(f"prepare: student {student}: to be asked {serving_folder(student, recipe.export.quantization)}", flush=True)
    if recipe.teacher.launch and recipe.teacher.launch.engine == "local":
        teacher = recipe.teacher.launch.model
        print(f"prepare: teacher {teacher}: to be asked {serving_folder(teacher, DEFAULT_QUANTIZATION)}", flush=True)
    prepare(run, dataset)  # last: until a run has rows, its recipe may be mended, a misspelt model's name for one
    print(f"prepare: the rows are in {run.path / STAGE}", flush=True)
    if _made(run) == before:
        print("prepare: complete, nothing to do")
    return 0


def tell_of_unreadable(train: Sequence[Example]) -> None:
    """Warn of references that cannot rank answers. Raises DataError if none can: told now, before a harvest is paid for."""
    from student_trainer.triplets.references import refuse_unrankable

    if unreadable := refuse_unrankable(train):
        print(
            f"prepare: {unreadable} of {len(train)} train rows will give no triplet: ROUGE-L reads a-z and 0-9 alone, which their "
            "references do not have; triplets.ranking=first needs no references",
            flush=True,
        )


def refuse_without_gpu(root: str = "/") -> None:
    """Raises SettingsError where the kernel has no NVIDIA driver. Under Windows, where containers do not see it, Docker must tell."""
    driver, kernel = Path(root, "proc/driver/nvidia/version"), Path(root, "proc/version")
    if not driver.exists() and "microsoft" not in kernel.read_text().lower():
        raise SettingsError(
            "compose.yaml needs an NVIDIA GPU, and this machine has no NVIDIA driver. Without one: docker compose -f compose.cpu.yaml up"
        )


def refuse_another_teacher(file: Path) -> None:
    """Raises SettingsError for a recipe whose own teacher is elsewhere, where containers put the one that they start in its place."""
    from shared.settings import read_yaml

    teacher = read_yaml(file).get("teacher")
    url = teacher.get("url") if isinstance(teacher, dict) else None
    if not url or os.environ.get("DISTILL_TEACHER__URL") != STARTED_BESIDE:
        return
    host = urlsplit(str(url)).hostname  # the rest may hold a secret
    if host not in ("127.0.0.1", "localhost", "::1", urlsplit(STARTED_BESIDE).hostname):
        raise SettingsError(
            f"recipe {file}: its teacher.url is at {host}, but the teacher that is started here would be asked in its place; to ask the "
            "recipe's own, set TEACHER_URL and TEACHER_MODEL to its url and model, and TEACHER_KEY_FILE (Kubernetes: the ConfigMap teacher)"
        )


def _made(run: Run) -> set[Path]:
    """What this command may add to."""
    from shared.settings import cache_dir

    return {*run.path.glob("dataset/manifest.json"), *cache_dir().rglob("*")}
