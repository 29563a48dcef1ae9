"""The images of compose.cpu.yaml, built as a user builds them, and a project to run them in."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from composed import Project


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """All images of compose.cpu.yaml, built as a user builds them. Seconds by service."""
    variables = {"BUILD_NETWORK": "host", **_torch(tmp_path_factory.mktemp("wheels"))}
    seconds = {}
    for service, teacher in (("harvester", ""), ("evaluator", ""), ("prepare", ""), ("vllm", "vllm")):
        begun = time.monotonic()
        project = Project(TEACHER=teacher, **variables)
        done = project.compose("build", service, timeout_s=1200)
        assert done.returncode == 0, done.stdout[-4000:]
        seconds[service] = time.monotonic() - begun
        print(f"built the image of {service} in {seconds[service]:.0f} s", flush=True)
    begun = time.monotonic()
    assert Project(**variables).compose("build", timeout_s=300).returncode == 0
    print(f"built all again in {time.monotonic() - begun:.0f} s", flush=True)
    return seconds


def _torch(folder: Path) -> dict[str, str]:
    """Where the build finds torch: PyTorch's CPU wheel if this machine's pip has it, else what compose.cpu.yaml says by itself."""
    download = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--disable-pip-version-check",
        "-d",
        str(folder),
        "torch==2.13.0+cpu",
    ]
    found = subprocess.run(download, capture_output=True).returncode == 0
    return {"WHEELS": str(folder), "TORCH_INDEX": ""} if found else {}


@pytest.fixture
def project(built: dict[str, float]) -> Iterator[Project]:
    """A project with the smoke recipe, taken down with its volumes afterwards."""
    one = Project()
    yield one
    one.down()
