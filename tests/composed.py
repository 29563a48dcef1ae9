"""A Docker engine, the images built in it, and a compose project as a user has it: files, variables, one command after the other."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[1]
CPU = "compose.cpu.yaml"
PASSED_ON = {"PATH", "HOME", "DOCKER_HOST", "DOCKER_CONFIG", "LANG", "SSL_CERT_FILE"}
"""Of this process's variables: those of another compose project in the developer's shell must not leak in."""


def environment(**variables: str) -> dict[str, str]:
    return {name: os.environ[name] for name in PASSED_ON if name in os.environ} | variables


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def docker(*arguments: str, timeout_s: float = 120, check: bool = True) -> str:
    """The standard output of a docker command."""
    done = subprocess.run(["docker", *arguments], env=environment(), capture_output=True, text=True, timeout=timeout_s)
    assert not check or done.returncode == 0, f"docker {' '.join(arguments)}: {done.stderr}{done.stdout}"
    return done.stdout


class Project:
    """One compose project of its own: its variables and what is asked of it."""

    def __init__(self, *, file: str = CPU, **variables: str) -> None:
        self.name = f"test{uuid.uuid4().hex[:8]}"
        self.teacher_port, self.student_port = free_port(), free_port()
        self.file = file
        self.variables = {
            "COMPOSE_PROJECT_NAME": self.name,
            "RECIPE": "recipes/smoke.yaml",
            "TEACHER_PORT": str(self.teacher_port),
            "STUDENT_PORT": str(self.student_port),
            **variables,
        }

    def compose(self, *arguments: str, timeout_s: float = 400, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run `docker compose ARGUMENTS`; standard error goes with standard output, as a terminal shows them."""
        command = ["docker", "compose", "--ansi", "never", "-f", self.file, *arguments]
        return subprocess.run(
            command,
            cwd=ROOT,
            env=environment(**(self.variables | variables)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )

    def up(self, *services: str, timeout_s: float = 400, **variables: str) -> subprocess.CompletedProcess[str]:
        """`up` until all is started, which with a chain of jobs is when the last of them is; images are not built anew."""
        return self.compose("up", "-d", "--no-build", *services, timeout_s=timeout_s, **variables)

    def finish(self, service: str = "evaluator", *, timeout_s: float = 400) -> int:
        """Wait for a job that `up` has started. Its exit code."""
        deadline = time.monotonic() + timeout_s
        while (state := self.state(service))["State"] == "running":
            assert time.monotonic() < deadline, f"{service} still runs:\n{self.logs(service)}"
            time.sleep(0.3)
        return int(state["ExitCode"])

    def states(self) -> dict[str, dict[str, Any]]:
        """`docker compose ps --all`, by service."""
        lines = self.compose("ps", "--all", "--format", "json").stdout.splitlines()
        return {row["Service"]: row for row in map(json.loads, lines)}

    def state(self, service: str) -> dict[str, Any]:
        return self.states()[service]

    def logs(self, service: str) -> str:
        return self.compose("logs", "--no-color", "--no-log-prefix", service).stdout

    def container(self, service: str) -> str:
        return self.compose("ps", "--all", "--quiet", service).stdout.strip()

    def in_volume(self, volume: str, script: str) -> str:
        """What a shell script prints that finds a volume of this project, read-only, at /volume."""
        arguments = [
            "--rm",
            "--network",
            "none",
            "-v",
            f"{self.name}_{volume}:/volume:ro",
            "--entrypoint",
            "sh",
            "blackbox-distill/light:0.1.0",
        ]
        return docker("run", *arguments, "-c", script)

    def down(self) -> None:
        self.compose("--profile", "*", "down", "--volumes", "--timeout", "3", "--remove-orphans")


def recipe(folder: Path, **replaced: str) -> dict[str, str]:
    """Variables that name the smoke recipe with some of its text replaced, in a folder that containers may read."""
    text = (ROOT / "recipes/smoke.yaml").read_text()
    for old, new in replaced.items():
        assert old in text, old
        text = text.replace(old, new)
    (folder / "mine.yaml").write_text(text)
    folder.chmod(0o755)
    return {"RECIPES": str(folder), "RECIPE": "recipes/mine.yaml"}


def ready(url: str, *, timeout_s: float = 30) -> httpx.Response:
    """The answer to a GET once it is 200, else the last one."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            answer = httpx.get(url, timeout=5, trust_env=False)
            if answer.status_code == 200 or time.monotonic() > deadline:
                return answer
        except httpx.TransportError:
            assert time.monotonic() < deadline, f"{url} does not answer"
        time.sleep(0.3)
