"""What each part may load: a service that serves needs no torch, `shared` needs no service, and nobody else owns our names."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEAVES = ("torch", "transformers", "trl", "peft", "datasets", "ctranslate2", "fastapi", "uvicorn", "vllm", "rouge_score", "nltk")
CLUSTER = ("ray", "pyarrow")


def loaded_after(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `statement`."""
    probe = f"import sys, json\n{statement}\nprint(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("module", ["contracts", "settings", "artifacts", "prompts", "errors", "registry", "collect", "datasets", "models"])
def test_the_common_ground_loads_no_heavy_library(module: str) -> None:
    assert not loaded_after(f"import shared.{module}") & {*LEAVES, *CLUSTER}


@pytest.mark.parametrize("module", ["teacher_service.app", "student_trainer.serving.app", "shared.engines.local"])
def test_no_server_loads_torch(module: str) -> None:
    assert not loaded_after(f"import {module}") & {"torch", "transformers", "trl", "peft", "datasets", "vllm"}


def test_harvest_and_evaluation_load_no_torch() -> None:
    heavy = {"torch", "transformers", "trl", "datasets", *CLUSTER}
    assert not loaded_after("import student_trainer.harvest.run, student_trainer.harvest.stage, evaluator.stage") & heavy


def test_vllm_is_spoken_to_over_http_and_is_no_dependency() -> None:
    requirements = metadata.requires("blackbox-distill") or []
    assert requirements
    assert not [r for r in requirements if r.lower().startswith("vllm")]


def test_our_top_level_names_belong_to_our_distribution_alone() -> None:
    owners = metadata.packages_distributions()
    for name in ("shared", "teacher_service", "student_trainer", "evaluator"):
        # an editable install lists no files, so it may own nothing; another distribution must never own a name of ours
        assert set(owners.get(name, ["blackbox-distill"])) == {"blackbox-distill"}, name
        imported = subprocess.run(
            [sys.executable, "-c", f"import {name}; print({name}.__file__)"], capture_output=True, text=True, check=True, cwd="/"
        )
        assert Path(imported.stdout.strip()) == ROOT / name / "__init__.py"


def test_the_wheel_holds_our_packages_with_their_data_and_nothing_else(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    adapter = {f"shared/embedded/adapter/{file}" for file in ("adapter_model.safetensors", "adapter_config.json", "rows.json", "README.md")}
    assert names >= {"shared/datasets/sample.jsonl", *(f"evaluator/report/page.{kind}" for kind in ("html.j2", "css", "js")), *adapter}
    top = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {"shared", "teacher_service", "student_trainer", "evaluator"}


def test_tests_and_docker_are_no_packages() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert not list((ROOT / "docker").rglob("__init__.py"))
