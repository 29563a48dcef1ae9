"""A real vLLM on this machine's processor, started once for all tests here, and gateways in front of it. `make test-vllm` runs them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from leaks import ENGINE_NAME

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("VLLM_PYTHON") or ROOT / ".venv-vllm/bin/python")
READY_S = 600.0
"""Seconds in which an engine must answer after its start; an idle machine needs 30, one that shares its cores has taken five minutes."""
MODEL = "embedded:smollm2-135m"
READS_TOKENS = 2048
HARDENED = ["--max-logprobs", "0", "--generation-config", "vllm", "--disable-fastapi-docs", "--fingerprint-mode", "none"]
"""As the compose files start it: all that vLLM can be told to keep to itself."""


class Engine:
    """One vLLM, always at the same port; `start` it, `kill` it, start it again."""

    def __init__(self, model: Path, folder: Path) -> None:
        """`model`: a Hugging Face folder; `folder`: for its log and its cache."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.model, self._cache, self._log = model, folder / "cache", folder / "vllm.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}/v1"

    def start(self) -> None:
        """Start it and wait until it answers; fails with its log if it does not."""
        command = [PYTHON, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", self.model, "--served-model-name", ENGINE_NAME]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", "bfloat16", "--max-model-len", str(READS_TOKENS)]
        command += ["--max-num-seqs", "32", "--enforce-eager", "--shutdown-timeout", "5", *HARDENED]
        variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CACHE_ROOT": str(self._cache)}
        # nobind: vLLM would hold on to one core, of two or four that others want too
        variables |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                list(map(str, command)), stdout=log, stderr=subprocess.STDOUT, env=os.environ | variables, start_new_session=True
            )
        until = time.monotonic() + READY_S
        while time.monotonic() < until and self._process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://{self.address}/health", trust_env=False, timeout=5).status_code == 200:
                    return
            time.sleep(0.5)
        ended = self._process.poll()
        self.kill()
        pytest.fail(f"vLLM did not come up within {READY_S:g} s (exit code {ended}); its log ends:\n{self._log.read_text()[-6000:]}")

    def kill(self) -> None:
        """SIGKILL to all its processes."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def kill_core(self) -> None:
        """SIGKILL to the process that holds the model; its server then ends by itself."""
        assert self._process is not None
        (core,) = [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and self._is_core(int(entry.name), self._process.pid)
        ]
        os.kill(core, signal.SIGKILL)
        self._process.wait(60)
        self.kill()

    @staticmethod
    def _is_core(pid: int, group: int) -> bool:
        try:
            return os.getpgid(pid) == group and b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes()
        except (ProcessLookupError, FileNotFoundError):
            return False

    def metric(self, name: str, **labels: str) -> float:
        """The sum of one of its metrics over all series that have these labels."""
        found = 0.0
        for line in httpx.get(f"http://{self.address}/metrics", trust_env=False, timeout=30).text.splitlines():
            if re.match(rf"{re.escape(name)}[{{ ]", line) and all(f'{key}="{value}"' in line for key, value in labels.items()):
                found += float(line.rpartition(" ")[2])
        return found


@dataclass(frozen=True)
class Gateway:
    """A running `distill teacher`."""

    process: subprocess.Popen[str]
    port: int

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"


Start = Callable[..., Gateway]


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """vLLM with the embedded model, hardened by its flags, under a name that is recognised when it leaks."""
    if not PYTHON.exists():
        pytest.fail(f"{PYTHON} is not there: `make vllm-cpu` sets up an environment with vLLM, `make test-vllm` runs these tests")
    folder = tmp_path_factory.mktemp("vllm")
    fetch = [sys.executable, "-m", "shared.cli", "fetch", MODEL, "--link", str(folder / "weights")]
    fetched = subprocess.run(fetch, capture_output=True, text=True)
    assert fetched.returncode == 0, fetched.stderr
    one = Engine(folder / "weights", folder)
    try:
        one.start()
        yield one
    finally:
        one.kill()


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Start a gateway before the engine at a URL, with further options and variables; they end with the module."""
    running: list[subprocess.Popen[str]] = []

    def begin(url: str, *options: str, **variables: str) -> Gateway:
        command = [sys.executable, "-m", "shared.cli", "teacher", "--engine", "upstream", "--upstream-url", url]
        command += ["--upstream-model", ENGINE_NAME, "--port", "0", "--until-stdin-closes", "--log-level", "warning", *options]
        pipe = subprocess.PIPE
        # its log goes to the tests' own standard error: shown where a test fails
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=os.environ | variables)
        running.append(process)
        assert process.stdout is not None
        line = next((line.strip() for line in process.stdout if "listening on" in line), "")
        assert line, f"the gateway did not start: exit code {process.wait(10)}"
        return Gateway(process, int(line.removesuffix("/v1").rpartition(":")[2]))

    yield begin
    for process in running:
        process.terminate()
    for process in running:
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
