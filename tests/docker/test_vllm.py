"""The real engine behind the gateway: it answers through it, and through nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import httpx
import pytest
from awake import awake
from composed import ROOT, Project, docker

RECIPE = """
name: real-engine
dataset: {name: sample, limit: 4, test_limit: 4}
teacher: {url: "http://teacher:8000/v1"}
student: {model: "random:tiny-t5"}
harvest: {samples: 2, max_tokens: 16, max_failed_fraction: 0.5}
"""
PROBE = """
import socket, sys
for host in sys.argv[1:]:
    try:
        socket.create_connection((host, 8000), 2).close()
        print(host, "reached")
    except OSError as exc:
        print(host, "unreachable")
"""


@pytest.fixture(scope="module")
def project(built: dict[str, float], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """vLLM on the CPU with the embedded model, the gateway before it, and a harvest that has gone through both."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "real.yaml").write_text(RECIPE)
    folder.chmod(0o755)
    one = Project(TEACHER="vllm", VLLM_MODEL="embedded:smollm2-135m", RECIPES=str(folder), RECIPE="recipes/real.yaml")
    try:
        begun = time.monotonic()
        done = one.up("harvester", timeout_s=900)
        assert done.returncode == 0, done.stdout + one.compose("logs", "--no-color").stdout[-4000:]
        assert one.finish("harvester", timeout_s=300) == 0, one.logs("harvester")
        print(f"from nothing to 8 answers of vLLM in {time.monotonic() - begun:.0f} s")
        yield one
    finally:
        one.down()


def test_the_harvest_is_answered_by_the_real_engine(project: Project) -> None:
    lines = project.in_volume("runs", "cat /volume/default/responses/teacher/responses.jsonl").splitlines()
    answers = [json.loads(line) for line in lines]
    assert len(answers) == 8
    assert {answer["status"] for answer in answers} == {"ok"}
    assert all(answer["text"].strip() for answer in answers)


def test_the_gateway_shows_text_and_not_a_word_of_the_engine(project: Project) -> None:
    url = f"http://127.0.0.1:{project.teacher_port}/v1"
    name = "embedded:smollm2-135m"
    body = {"model": name, "messages": [{"role": "user", "content": "What is a cold?"}], "max_tokens": 16}
    answer = httpx.post(f"{url}/chat/completions", json=body, timeout=120, trust_env=False)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"].strip()
    assert answer.json()["model"] == name
    assert "vllm" not in (answer.text + str(answer.headers)).lower()
    assert [model["id"] for model in httpx.get(f"{url}/models", trust_env=False).json()["data"]] == [name]
    for field in ({"logprobs": True}, {"logit_bias": {"1": 5}}, {"return_token_ids": True}, {"echo": True}):
        assert httpx.post(f"{url}/chat/completions", json=body | field, trust_env=False).status_code == 422


def test_a_container_on_the_users_network_cannot_reach_the_engine_by_name_or_by_address(project: Project) -> None:
    template = "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}"
    engine = docker("inspect", "-f", template, project.container("vllm")).split()
    gateway = docker("inspect", "-f", template, project.container("teacher")).split()
    assert len(engine) == 1
    assert len(gateway) == 3
    on_engine_network = [a for a in gateway if a.rpartition(".")[0] == engine[0].rpartition(".")[0]]

    def reached(network: str, *hosts: str) -> dict[str, str]:
        light = "blackbox-distill/light:0.1.0"
        run = ["run", "--rm", "--network", f"{project.name}_{network}", "--entrypoint", "python", light, "-c", PROBE, *hosts]
        return dict(line.split() for line in docker(*run).splitlines())

    assert reached("engine", "vllm") == {"vllm": "reached"}  # else the probe could never succeed
    users = reached("api", "teacher", "vllm", *engine, *on_engine_network)
    assert users.pop("teacher") == "reached"
    assert set(users.values()) == {"unreachable"}
    assert set(reached("monitoring", "vllm", *engine).values()) == {"unreachable"}


def test_the_engine_has_no_way_out(project: Project) -> None:
    script = "import socket; print(len(open('/proc/net/route').read().splitlines()))"
    routes = project.compose("exec", "-T", "vllm", "python", "-c", script).stdout
    assert routes.strip() == "2"  # the heading, and the network itself: no default route


def test_the_engine_ends_within_10_s_of_a_signal_and_the_gateway_then_says_that_it_is_not_ready(project: Project) -> None:
    with awake() as seconds:
        docker("stop", "-t", "30", project.container("vllm"))
        assert seconds() < 10
    assert project.state("vllm")["ExitCode"] in (0, 143)
    assert httpx.get(f"http://127.0.0.1:{project.teacher_port}/readyz", timeout=30, trust_env=False).status_code == 503
    assert httpx.get(f"http://127.0.0.1:{project.teacher_port}/healthz", trust_env=False).status_code == 200


def test_the_gateway_before_a_gpu_is_the_one_that_is_tested_here() -> None:
    gpu, cpu = ((ROOT / f"docker/teacher/{name}.yaml").read_text() for name in ("gpu", "cpu-vllm"))

    def gateway(text: str) -> str:
        return text[text.index("\n  teacher:") :]

    assert gateway(gpu) == gateway(cpu)
