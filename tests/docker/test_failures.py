"""What goes wrong goes wrong at once, with a sentence, and nothing after it starts."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
from composed import Project, docker, recipe


def not_started(project: Project) -> set[str]:
    return {name for name, state in project.states().items() if state["State"] == "created"}


def test_a_recipe_that_does_not_parse_stops_all_that_would_read_it(project: Project, tmp_path: Path) -> None:
    done = project.up(**recipe(tmp_path, harvest="harvestt"))
    assert done.returncode != 0
    assert 'service "prepare" didn\'t complete successfully: exit 2' in done.stdout
    assert "harvestt: unknown setting; did you mean harvest?" in project.logs("prepare")
    assert not_started(project) == {"teacher", "harvester", "sampler", "triplets", "trainer", "evaluator"}
    # the recipe names who is shown beside it: it tries again and again, and needs nobody once the recipe is mended
    deadline = time.monotonic() + 60
    while "harvestt: unknown setting; did you mean harvest?" not in project.logs("student"):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert project.state("student")["State"] in ("running", "restarting")


def test_a_recipe_that_is_not_there_is_named(project: Project) -> None:
    assert project.up(RECIPE="recipes/none.yaml").returncode != 0
    assert "recipe recipes/none.yaml: No such file" in project.logs("prepare")
    assert project.state("prepare")["ExitCode"] == 2


def test_a_data_file_that_is_not_there_stops_the_chain_with_the_code_of_data_errors(project: Project, tmp_path: Path) -> None:
    variables = recipe(tmp_path, **{"name: sample, limit: 48, test_limit: 40": "name: file, path: recipes/none.jsonl"})
    assert project.up(**variables).returncode != 0
    assert project.state("prepare")["ExitCode"] == 4
    assert "recipes/none.jsonl" in project.logs("prepare")
    assert "harvester" in not_started(project)


def test_a_dead_teacher_stops_the_chain_after_the_harvester_and_the_next_up_goes_on(project: Project, tmp_path: Path) -> None:
    variables = recipe(tmp_path, **{"launch: {engine: scripted}": "launch: {engine: scripted}\n  max_attempts: 1"})
    done = project.up(**variables, TEACHER_URL="http://127.0.0.1:9/v1", TEACHER_MODEL="m")
    assert done.returncode != 0
    assert 'service "harvester" didn\'t complete successfully: exit 7' in done.stdout
    assert "http://127.0.0.1:9/v1" in project.logs("harvester")
    assert not_started(project) == {"triplets", "trainer", "evaluator"}
    assert "teacher" not in project.states()


def test_a_student_that_does_not_win_ends_the_one_command_for_scripts_with_3(project: Project, tmp_path: Path) -> None:
    # promotion asks for a gain that cannot be had
    variables = recipe(tmp_path, **{"epochs: 30": "epochs: 1", "export:": "promote: {margin: 0.9}\nexport:"})
    done = project.compose("up", "--no-build", "--exit-code-from", "evaluator", "evaluator", **variables)
    assert done.returncode == 3
    assert "not promoted" in done.stdout
    assert project.in_volume("registry", "ls -A /volume/versions 2>/dev/null || true") == ""


def test_a_port_in_use_is_named(project: Project) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", project.student_port))
        taken.listen()
        done = project.up("student")
    assert done.returncode != 0
    assert f"127.0.0.1:{project.student_port}" in done.stdout
    assert "address already in use" in done.stdout or "port is already allocated" in done.stdout


def test_a_key_file_that_is_not_there_is_named_before_anything_starts(project: Project, tmp_path: Path) -> None:
    missing = str(tmp_path / "no-key")
    done = project.up("harvester", TEACHER_URL="http://127.0.0.1:9/v1", TEACHER_MODEL="m", TEACHER_KEY_FILE=missing)
    assert done.returncode != 0
    assert missing in done.stdout
    assert project.states().get("harvester", {"State": "created"})["State"] == "created"


def test_a_runs_volume_of_another_version_is_refused_and_left_as_it_is(project: Project) -> None:
    assert project.up("prepare").returncode == 0
    assert project.finish("prepare") == 0
    light, volume = "blackbox-distill/light:0.1.0", f"{project.name}_runs:/volume"
    age = 'sed -i \'s/"format": 3/"format": 2/\' /volume/default/run.json'
    docker("run", "--rm", "--network", "none", "-v", volume, "--entrypoint", "sh", light, "-c", age)
    before = project.in_volume("runs", "sha256sum /volume/default/run.json")
    assert project.up("harvester").returncode != 0
    assert project.state("prepare")["ExitCode"] == 6
    assert "format 3" in project.logs("prepare")
    assert project.in_volume("runs", "sha256sum /volume/default/run.json") == before


def test_a_full_disk_in_the_runs_volume_is_named_and_keeps_what_was_written(built: dict[str, float]) -> None:
    project = Project()
    options = ["--opt", "type=tmpfs", "--opt", "device=tmpfs", "--opt", "o=size=64k,uid=10001,mode=775"]
    docker("volume", "create", *options, f"{project.name}_runs")
    try:
        assert project.up("harvester").returncode != 0
        assert project.state("prepare")["ExitCode"] == 10
        assert "no space left on the device" in project.logs("prepare")
    finally:
        project.down()
        docker("volume", "rm", "-f", f"{project.name}_runs")


def test_without_a_gpu_compose_yaml_tells_the_command_that_needs_none(built: dict[str, float]) -> None:
    # the image with CUDA is several GB; what it says about a missing driver, the one without says as well
    docker("tag", "blackbox-distill/trainer:0.1.0-cpu", "blackbox-distill/trainer:0.1.0-cuda")
    project = Project(file="compose.yaml")
    try:
        done = project.compose("run", "--rm", "--no-deps", "prepare")
        assert done.returncode == 2
        assert "docker compose -f compose.cpu.yaml up" in done.stdout
    finally:
        project.down()
        docker("rmi", "blackbox-distill/trainer:0.1.0-cuda")


@pytest.mark.parametrize("service", ["prepare", "harvester", "sampler", "triplets", "trainer", "evaluator"])
def test_no_job_can_write_outside_its_volumes(project: Project, service: str) -> None:
    script = "touch /opt/x /work/x /work/recipes/x /etc/x 2>&1 | grep -c 'Read-only file system'"
    done = project.compose("run", "--rm", "--no-deps", "--entrypoint", "sh", service, "-c", script)
    assert done.stdout.split()[-1] == "4"
