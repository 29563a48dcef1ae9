"""Metrics of a server: what is counted under which labels, at a port of its own, and that no word of a caller gets into them."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from shared.errors import SettingsError, TeacherUnavailable
from shared.http.app import create_app
from shared.http.metrics import Measured, exposed
from shared.settings import load_settings
from student_trainer.serving.settings import StudentServiceSettings
from teacher_service.settings import TeacherServiceSettings

COMPLETIONS = "/v1/completions"
ASKED = {"model": "teacher", "prompt": "prompt-that-nobody-may-see", "user": "user-that-nobody-may-see"}


class Engine:
    """Waits for `gate`, then fails: enough to be counted."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()

    async def generate(self, request: object) -> list[object]:
        await self.gate.wait()
        raise TeacherUnavailable("gone")

    async def check(self) -> None: ...

    async def aclose(self) -> None: ...


async def failing(scope: object, receive: object, send: object) -> None:
    raise RuntimeError("before any answer")


class Face:
    """An application that is measured, and a client of it."""

    def __init__(self, app: object = None) -> None:
        self.registry, self.engine = CollectorRegistry(), Engine()
        measured = Measured(app or create_app(self.engine, model="teacher", title="T"), self.registry)  # type: ignore[arg-type]
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(measured, raise_app_exceptions=False), base_url="http://face")

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"distill_http_{name}", labels)

    def labels(self) -> list[dict[str, str]]:
        return [sample.labels for family in self.registry.collect() for sample in family.samples]


def test_requests_are_counted_by_route_method_and_status_and_timed_by_route() -> None:
    async def run(face: Face) -> None:
        face.engine.gate.set()
        for _ in range(2):
            await face.client.post(COMPLETIONS, json=ASKED)
        await face.client.post(COMPLETIONS, json={})
        await face.client.get(COMPLETIONS)
        await face.client.get("/healthz")

    asyncio.run(run(face := Face()))
    assert face.value("requests_total", route=COMPLETIONS, method="POST", status="503") == 2
    assert face.value("requests_total", route=COMPLETIONS, method="POST", status="422") == 1
    assert face.value("requests_total", route=COMPLETIONS, method="GET", status="405") == 1
    assert face.value("requests_total", route="/healthz", method="GET", status="200") == 1
    assert face.value("request_duration_seconds_count", route=COMPLETIONS) == 4
    assert face.value("request_duration_seconds_bucket", route="/healthz", le="+Inf") == 1
    assert face.value("requests_in_flight") == 0


def test_a_request_is_in_flight_until_it_is_answered_and_its_time_is_that_of_its_answer() -> None:
    async def run(face: Face) -> list[float | None]:
        asked = asyncio.create_task(face.client.post(COMPLETIONS, json=ASKED))
        await asyncio.sleep(0.1)
        during = face.value("requests_in_flight")
        face.engine.gate.set()
        await asked
        return [during, face.value("requests_in_flight")]

    begun = time.monotonic()
    assert asyncio.run(run(face := Face())) == [1, 0]
    assert 0.05 <= (face.value("request_duration_seconds_sum", route=COMPLETIONS) or 0) < time.monotonic() - begun


def test_paths_and_methods_that_no_route_knows_share_one_label_each() -> None:
    async def run(face: Face) -> None:
        for number in range(20):
            await face.client.get(f"/secret-{number}")
            await face.client.request(f"SECRET-{number}", COMPLETIONS)

    asyncio.run(run(face := Face()))
    assert face.value("requests_total", route="other", method="GET", status="404") == 20
    assert face.value("requests_total", route=COMPLETIONS, method="other", status="405") == 20


def test_templates_and_not_paths_are_labels() -> None:
    app = FastAPI()

    @app.get("/things/{thing}")
    async def thing(thing: str) -> str:
        return thing

    async def run(face: Face) -> None:
        for name in ("a", "b"):
            await face.client.get(f"/things/{name}")

    asyncio.run(run(face := Face(app)))
    assert face.value("requests_total", route="/things/{thing}", method="GET", status="200") == 2


def test_an_application_that_fails_before_it_answers_is_counted_as_an_error_and_is_in_flight_no_more() -> None:
    async def run(face: Face) -> None:
        await face.client.get("/x")

    asyncio.run(run(face := Face(failing)))
    assert face.value("requests_total", route="other", method="GET", status="500") == 1
    assert face.value("requests_in_flight") == 0


def test_nothing_that_a_caller_writes_is_a_label() -> None:
    async def run(face: Face) -> None:
        face.engine.gate.set()
        for path in (COMPLETIONS, "/see/here", f"{COMPLETIONS}?see=me"):
            await face.client.post(path, json=ASKED, headers={"authorization": "Bearer key-to-see", "user-agent": "see"})

    asyncio.run(run(face := Face()))
    assert "see" not in str(face.labels())
    assert "teacher" not in str(face.labels())


def test_a_registry_is_exposed_until_the_block_ends() -> None:
    face = Face()
    with exposed(face.registry, host="127.0.0.1", port=0, option="--metrics-port") as url:
        assert "distill_http_requests_in_flight 0.0" in httpx.get(url, trust_env=False).text
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, trust_env=False)


def test_a_port_that_is_none_is_named_with_the_remedy() -> None:
    with (
        pytest.raises(SettingsError, match="--port 70000: ports go"),
        exposed(CollectorRegistry(), host="127.0.0.1", port=70000, option="--port"),
    ):
        pass


@pytest.fixture
def teacher() -> Iterator[subprocess.Popen[str]]:
    """A scripted teacher with metrics, as a process."""
    command = [sys.executable, "-m", "shared.cli", "teacher", "--no-auth", "--engine", "scripted", "--port", "0"]
    variables = {**os.environ, "TEACHER_METRICS_PORT": "0"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)
    yield process
    process.kill()
    process.communicate()


def test_a_service_tells_its_numbers_at_another_port_and_there_alone(teacher: subprocess.Popen[str]) -> None:
    assert teacher.stdout is not None
    base = teacher.stdout.readline().strip().rpartition(" ")[2]
    line = teacher.stdout.readline().strip()
    assert line.startswith("teacher (scripted): metrics on http://127.0.0.1:")
    with httpx.Client(trust_env=False) as client:
        assert client.post(f"{base}/completions", json={"model": "teacher", "prompt": "Is it flu?"}).status_code == 200
        assert client.get(f"{base.removesuffix('/v1')}/metrics").status_code == 404
        told = client.get(line.rpartition(" ")[2]).text
    assert f'distill_http_requests_total{{method="POST",route="{COMPLETIONS}",status="200"}} 1.0' in told
    assert "_created" not in told
    teacher.send_signal(signal.SIGTERM)
    assert teacher.communicate(timeout=20)[0] == ""
    assert teacher.returncode == 0


def served(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shared.cli", "teacher", "--no-auth", "--engine", "scripted", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_taken_metrics_port_is_named_with_the_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        done = served("--port", "0", "--metrics-port", port)
    assert done.returncode == SettingsError.exit_code
    assert f"--metrics-port {port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_one_port_for_both_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    done = served("--port", port, "--metrics-port", port)
    assert done.returncode == SettingsError.exit_code
    assert f"--metrics-port {port}" in done.stderr


@pytest.mark.parametrize(
    ("model", "prefix", "flags"), [(TeacherServiceSettings, "TEACHER", {}), (StudentServiceSettings, "STUDENT", {"registry": "r"})]
)
def test_the_port_is_a_setting_of_both_services_and_none_unless_given(
    monkeypatch: pytest.MonkeyPatch, model: type[TeacherServiceSettings], prefix: str, flags: dict[str, str]
) -> None:
    assert load_settings(model, flags=flags).metrics_port is None
    monkeypatch.setenv(f"{prefix}_METRICS_PORT", "9464")
    assert load_settings(model, flags=flags).metrics_port == 9464
    with pytest.raises(SettingsError, match="--metrics-port: "):
        load_settings(model, flags={**flags, "metrics_port": "65536"})
