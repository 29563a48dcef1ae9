"""The images: small, without root, without what they need not have, the same each time."""

from __future__ import annotations

import json

import pytest
from composed import ROOT, docker

IMAGES = {"light": "light:0.1.0", "student": "student:0.1.0", "trainer": "trainer:0.1.0-cpu", "vllm": "vllm-cpu:0.1.0"}
LIMIT_MB = {"light": 250, "student": 450}

pytestmark = pytest.mark.usefixtures("built")


def image(name: str) -> str:
    return f"blackbox-distill/{IMAGES[name]}"


def inside(name: str, script: str) -> str:
    return docker("run", "--rm", "--network", "none", "--entrypoint", "sh", image(name), "-c", script)


def test_images_keep_within_their_sizes() -> None:
    sizes = {name: int(docker("image", "inspect", "-f", "{{.Size}}", image(name))) / 1e6 for name in IMAGES}
    print({name: f"{size:.0f} MB" for name, size in sizes.items()})
    for name, limit in LIMIT_MB.items():
        assert sizes[name] <= limit, name


@pytest.mark.parametrize("name", IMAGES)
def test_images_run_as_a_user_that_owns_no_program(name: str) -> None:
    assert docker("image", "inspect", "-f", "{{.Config.User}}", image(name)).strip() == "10001:0"
    assert inside(name, "id -u; find /opt -writable -not -type l | head -3") == "10001\n"


@pytest.mark.parametrize("name", IMAGES)
def test_images_carry_labels(name: str) -> None:
    labels = json.loads(docker("image", "inspect", "-f", "{{json .Config.Labels}}", image(name)))
    assert {"org.opencontainers.image." + key for key in ("title", "licenses", "version")} <= labels.keys()


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("light", ["torch", "transformers", "ctranslate2", "tokenizers", "datasets", "vllm"]),
        ("student", ["torch", "transformers", "datasets", "vllm"]),
        ("trainer", ["fastapi", "vllm"]),
        ("vllm", ["shared", "student_trainer", "ctranslate2"]),
    ],
)
def test_images_lack_what_they_do_not_need(name: str, absent: list[str]) -> None:
    probe = f"from importlib.util import find_spec; print([m for m in {absent} if find_spec(m)])"
    assert inside(name, f'python -c "{probe}"') == "[]\n"


@pytest.mark.parametrize("name", ["light", "student", "trainer"])
def test_packages_are_exactly_those_of_the_lists(name: str) -> None:
    lists = {"light": ["light"], "student": ["student"], "trainer": ["trainer", "torch-cpu", "embedded"]}[name]
    lines = [line for one in lists for line in (ROOT / f"docker/locks/{one}.txt").read_text().splitlines()]
    listed = {line.split()[0].lower() for line in lines if "==" in line and not line.startswith(" ")}
    probe = "from importlib import metadata as m; print(*(f'{d.name}=={d.version}' for d in m.distributions()))"
    found = {one.lower().replace("_", "-").replace(".", "-") for one in inside(name, f'python -c "{probe}"').split()}
    listed = {one.replace("_", "-").replace(".", "-") for one in listed}
    assert found == listed | {"blackbox-distill==0-1-0"}


@pytest.mark.parametrize("name", ["light", "student", "trainer"])
def test_of_the_working_tree_only_our_packages_come_in(name: str) -> None:
    unwanted = "-name .env -o -name .git -o -path '/opt/*.pyc'"
    assert inside(name, f"ls -A /work; find / -xdev \\( {unwanted} \\) 2>/dev/null || true") == ""
    packages = {"bin", "blackbox_distill-0.1.0.dist-info", "shared", "teacher_service", "student_trainer", "evaluator"}
    assert set(inside(name, "ls -A /opt/code").split()) == packages


def test_the_same_input_gives_the_same_files() -> None:
    def digests(tag: str) -> str:
        script = "cd /opt && find . -type f -print0 | sort -z | xargs -0 sha256sum && find . -printf '%M %U %G %p %l\\n' | sort"
        return docker("run", "--rm", "--network", "none", "--entrypoint", "sh", tag, "-c", script)

    again = "blackbox-distill/light:again"
    build = ["build", "-q", "--no-cache", "--network", "host", "--build-context", "wheels=docker/wheels", "-f", "docker/Dockerfile"]
    docker(*build, "--target", "light", "-t", again, str(ROOT), timeout_s=300)
    try:
        assert digests(again) == digests(image("light"))
    finally:
        docker("rmi", again)
