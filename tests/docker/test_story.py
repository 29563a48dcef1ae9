"""`docker compose up` as a user lives it: from nothing to a served student, and on from there."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from awake import awake
from composed import ROOT, Project, docker, environment, ready, recipe

QUESTION = "My mother is 80 and keeps falling at night. She takes a water pill. Could the pill be the reason?"
ASK = """
import json, sys, urllib.request
url, body = sys.argv[1:]
request = urllib.request.Request(url, body.encode(), {"content-type": "application/json"})
print(json.dumps(json.load(urllib.request.urlopen(request, timeout=60))))
"""


@pytest.fixture(scope="module")
def served(built: dict[str, float]) -> Iterator[Project]:
    """A project whose smoke run has ended with a promoted student."""
    project = Project()
    try:
        begun = time.monotonic()
        done = project.up()
        assert done.returncode == 0, done.stdout + project.compose("logs", "--no-color").stdout
        assert project.finish() == 0, project.logs("evaluator")
        print(f"from nothing to a promoted student in {time.monotonic() - begun:.0f} s")
        yield project
    finally:
        project.down()


def user_asks(project: Project, url: str, body: str) -> str:
    """What a container on the users' network is answered."""
    network = f"{project.name}_api"
    light = "blackbox-distill/light:0.1.0"
    return docker("run", "--rm", "--network", network, "--entrypoint", "python", light, "-c", ASK, url, body)


def test_the_student_is_up_before_anything_is_promoted_and_says_what_it_waits_for(project: Project) -> None:
    assert project.up("student").returncode == 0
    base = f"http://127.0.0.1:{project.student_port}"
    assert ready(f"{base}/healthz").status_code == 200
    for _ in range(60):  # until its first look at the registry
        answer = httpx.get(f"{base}/readyz", trust_env=False, timeout=30)
        assert answer.status_code == 503
        if "no student is promoted yet" in answer.json()["reason"]:
            break
        time.sleep(1)
    assert "no student is promoted yet" in answer.json()["reason"]


def test_jobs_end_with_0_and_servers_stay_healthy(served: Project) -> None:
    states = served.states()
    assert {name: state["ExitCode"] for name, state in states.items() if state["State"] == "exited"} == dict.fromkeys(
        ("prepare", "harvester", "sampler", "triplets", "trainer", "evaluator"), 0
    )
    assert {name: state["Health"] for name, state in states.items() if state["State"] == "running"} == {
        "teacher": "healthy",
        "student": "healthy",
    }


def test_the_student_becomes_ready_without_a_restart(served: Project) -> None:
    answer = ready(f"http://127.0.0.1:{served.student_port}/readyz")
    assert answer.status_code == 200
    assert docker("inspect", "-f", "{{.RestartCount}}", served.container("student")).strip() == "0"
    page = httpx.get(f"http://127.0.0.1:{served.student_port}/", trust_env=False)
    assert page.headers["content-type"].startswith("text/html")


def test_both_apis_answer_a_container_on_the_users_network(served: Project) -> None:
    ready(f"http://127.0.0.1:{served.student_port}/readyz")
    chat = json.dumps({"model": "scripted", "messages": [{"role": "user", "content": QUESTION}]})
    assert '"choices"' in user_asks(served, "http://teacher:8000/v1/chat/completions", chat)
    assert '"answers"' in user_asks(served, "http://student:8080/v1/generate", json.dumps({"question": QUESTION}))


def test_the_logs_tell_the_story_in_order(served: Project) -> None:
    logs = served.compose("logs", "--no-color").stdout
    for line in (
        "prepare: the rows are in",
        "responses/teacher: 48 prompts",
        "triplets from 48",
        "train: 90/90",
        "export:",
        "promoted: version",
    ):
        assert line in logs
    assert "Traceback" not in logs
    assert "serving version" in served.logs("student")


def test_run_again_everything_says_that_it_is_complete_and_nothing_changes(served: Project) -> None:
    def files() -> str:
        return served.in_volume("runs", "find /volume -type f -not -path '*/.locks/*' -exec sha256sum {} + | sort")

    before = files()
    began = time.time()
    assert served.up().returncode == 0
    assert served.finish() == 0
    logs = served.compose("logs", "--no-color", "--since", str(int(began))).stdout
    for stage in ("prepare", "responses/teacher", "responses/student-r0", "triplets/r0", "checkpoints/r0", "export", "evaluation"):
        assert f"{stage}: complete, nothing to do" in logs, stage
    assert "is served already, nothing to do" in logs
    assert files() == before


def test_files_belong_to_the_user_of_the_containers(served: Project) -> None:
    for volume in ("runs", "registry", "models"):
        assert served.in_volume(volume, "find /volume -printf '%U:%G\\n' | sort -u") == "10001:0\n", volume


def test_another_teacher_is_asked_by_its_url_alone_and_old_answers_are_not_taken_for_its_own(served: Project) -> None:
    other = f"{served.name}-other"
    light = "blackbox-distill/light:0.1.0"
    command = ["teacher", "--no-auth", "--engine", "scripted", "--public-name", "other", "--host", "0.0.0.0"]
    docker("run", "-d", "--rm", "--init", "--name", other, "--network", f"{served.name}_api", light, *command)
    try:
        swap = {"TEACHER_URL": f"http://{other}:8000/v1", "TEACHER_MODEL": "other"}
        assert {"teacher", "vllm"}.isdisjoint(served.compose("config", "--services", **swap).stdout.split())

        assert served.up("harvester", **swap).returncode != 0  # the same run: it belongs to the first teacher
        assert served.state("prepare")["ExitCode"] == 6
        assert "teacher.model: the run has None, you ask for 'other'" in served.logs("prepare")

        served.compose("stop", "teacher")  # whoever answers now, it is not the first one
        assert served.up("harvester", **swap, RUN="second").returncode == 0
        assert served.finish("harvester") == 0
        models = served.in_volume("runs", 'grep -ho \'"model":"[a-z]*"\' /volume/second/responses/teacher/responses.jsonl | sort | uniq -c')
        assert models.split() == ["192", '"model":"other"']
    finally:
        docker("rm", "-f", other)


def test_the_key_of_a_teacher_comes_from_a_file_and_shows_nowhere_else(project: Project, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("not-a-real-key\n")
    key.chmod(0o644)
    variables = {"TEACHER_URL": "http://127.0.0.1:9/v1", "TEACHER_MODEL": "m", "TEACHER_KEY_FILE": str(key)}
    run = ["run", "--rm", "--no-deps", "--entrypoint", "sh"]
    seen = project.compose(*run, "harvester", "-c", 'cat "$DISTILL_TEACHER__API_KEY_FILE"; env | grep -c not-a-real', **variables).stdout
    assert seen.split()[-2:] == ["not-a-real-key", "0"]
    assert "No such file" in project.compose(*run, "trainer", "-c", "cat /run/secrets/teacher_key", **variables).stdout
    assert "not-a-real-key" not in project.compose("config", **variables).stdout


def test_a_teacher_with_a_keys_file_answers_the_jobs_by_their_key_and_nobody_without_one(project: Project, tmp_path: Path) -> None:
    keys, key = tmp_path / "keys.yaml", tmp_path / "key"
    made = subprocess.run([sys.executable, "-m", "shared.cli", "keygen", "jobs"], capture_output=True, text=True, check=True, cwd=ROOT)
    keys.write_text(made.stdout)
    key.write_text(made.stderr.strip().rpartition(" ")[2] + "\n")
    for file in (keys, key):
        file.chmod(0o644)
    variables = {"TEACHER_API_KEYS_FILE": str(keys), "TEACHER_KEY_FILE": str(key), "TEACHER_REQUESTS_PER_MINUTE": "1000"}
    assert project.up("harvester", **variables).returncode == 0
    assert project.finish("harvester") == 0, project.logs("harvester")
    asked = httpx.get(f"http://127.0.0.1:{project.teacher_port}/v1/models", trust_env=False)
    assert asked.status_code == 401
    log = project.logs("teacher")
    assert '"key":"jobs"' in log
    assert key.read_text().strip() not in log


def test_a_key_that_the_containers_cannot_read_is_told_before_any_work(project: Project, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("not-a-real-key\n")
    key.chmod(0o600)
    assert project.up("harvester", TEACHER_URL="http://127.0.0.1:9/v1", TEACHER_MODEL="m", TEACHER_KEY_FILE=str(key)).returncode != 0
    assert project.state("prepare")["ExitCode"] == 2
    assert "DISTILL_UID" in project.logs("prepare")


def test_another_user_goes_on_with_the_volumes_of_the_first(served: Project) -> None:
    assert served.up("evaluator", DISTILL_UID="4321").returncode == 0
    assert served.finish("evaluator") == 0, served.logs("evaluator")
    assert served.up("triplets", DISTILL_UID="4321", RUN="third").returncode == 0
    assert served.finish("triplets") == 0, served.logs("triplets")
    assert served.in_volume("runs", "find /volume/third -printf '%U:%G\\n' | sort -u") == "4321:0\n"


def until_trained(project: Project, steps: int) -> None:
    """Wait until the trainer has logged so many steps."""
    deadline = time.monotonic() + 300
    script = "cat /volume/default/checkpoints/r0/log.jsonl 2>/dev/null | wc -l"
    while int(project.in_volume("runs", script)) < steps:
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_a_killed_trainer_goes_on_from_its_checkpoint_and_a_stopped_one_ends_within_10_s(built: dict[str, float], tmp_path: Path) -> None:
    project = Project(**recipe(tmp_path, **{"epochs: 30": "epochs: 40", "checkpoint_steps: 20": "checkpoint_steps: 5"}))
    try:
        going = threading.Thread(target=project.up)  # it waits for the trainer, which is not to end
        going.start()
        until_trained(project, 12)
        docker("kill", project.container("trainer"))
        going.join()
        assert project.state("trainer")["ExitCode"] == 137
        assert project.state("evaluator")["State"] == "created"

        going = threading.Thread(target=project.up)
        going.start()
        until_trained(project, 30)
        with awake() as seconds:
            docker("stop", "-t", "30", project.container("trainer"))
            assert seconds() < 10
        going.join()
        assert project.state("trainer")["ExitCode"] == 143

        assert project.up().returncode == 0
        assert project.finish() == 0, project.logs("evaluator")
        steps = project.in_volume("runs", "grep -o '\"step\":[0-9]*' /volume/default/checkpoints/r0/log.jsonl | cut -d: -f2").split()
        assert steps == [str(step) for step in range(1, 121)]
        firsts = [line for line in project.logs("trainer").splitlines() if "/120 steps, 0.0/s" in line]
        assert len(firsts) == 3
        assert not firsts[1].startswith("train: 0/")
        assert not firsts[2].startswith("train: 0/")
    finally:
        project.down()


@pytest.mark.parametrize("service", ["teacher", "student"])
def test_servers_end_within_10_s_of_a_signal(served: Project, service: str) -> None:
    served.up("teacher", "student")
    port = {"teacher": served.teacher_port, "student": served.student_port}[service]
    ready(f"http://127.0.0.1:{port}/healthz")
    with awake() as seconds:
        docker("stop", "-t", "30", served.container(service))
        assert seconds() < 10
    assert served.state(service)["ExitCode"] in (0, 143)


def test_a_run_can_be_a_folder_of_the_users_own(built: dict[str, float], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    project = Project(RUNS=str(runs), DISTILL_UID="4321")
    try:
        subprocess.run(["chown", "4321", str(runs)], check=True)
        assert project.up("prepare", "triplets").returncode == 0
        assert project.finish("triplets") == 0, project.logs("triplets")
        assert (runs / "default" / "triplets" / "r0" / "triplets.jsonl").read_text().count("\n") == 96
        assert {path.stat().st_uid for path in runs.rglob("*")} == {4321}
    finally:
        project.down()


def test_down_with_volumes_leaves_nothing(built: dict[str, float]) -> None:
    project = Project()
    assert project.up("prepare").returncode == 0
    project.finish("prepare")
    project.down()
    for what in (["ps", "-aq"], ["volume", "ls", "-q"], ["network", "ls", "-q"]):
        assert docker(*what, "--filter", f"label=com.docker.compose.project={project.name}") == ""


def test_metrics_of_servers_and_runs_are_told_on_the_network_for_monitoring_and_not_on_the_host(served: Project) -> None:
    served.up("teacher", "student")
    done = served.compose("--profile", "monitoring", "up", "-d", "--no-build", "--no-deps", "monitor")
    assert done.returncode == 0, done.stdout
    fetch = "import sys, time, urllib.request as r\nfor u in sys.argv[1:]: print(r.urlopen(u, timeout=20).read().decode())"
    ready(f"http://127.0.0.1:{served.student_port}/healthz")
    light, network = "blackbox-distill/light:0.1.0", f"{served.name}_monitoring"
    urls = [f"http://{name}:9464/metrics" for name in ("teacher", "student", "monitor")]
    expected = (
        'distill_http_requests_total{method="GET",route="/healthz"',
        'distill_stage_state{run="default",stage="evaluation",state="done"} 1.0',
        "distill_promoted_info",
    )
    for _ in range(10):  # until all three are up and have looked
        time.sleep(1)
        told = docker("run", "--rm", "--network", network, "--entrypoint", "python", light, "-c", fetch, *urls, check=False)
        if all(line in told for line in expected):
            break
    assert [line for line in expected if line not in told] == []
    on_host = subprocess.run(["docker", "port", served.container("teacher")], env=environment(), capture_output=True, text=True).stdout
    assert "9464" not in on_host
