"""What compose makes of the files, before anything runs: every combination is whole, hardened, and clean to the linters."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from composed import CPU, ROOT, environment

GPU = "compose.yaml"
REPLICAS = "docker/nginx/compose.yaml"
BALANCED = f"{CPU} {REPLICAS}"
"""Two files, the second over the first."""
URL = {"TEACHER_URL": "https://api.example.com/v1", "TEACHER_MODEL": "big-model"}
COMBINATIONS: list[tuple[str, dict[str, str]]] = [
    (GPU, {}),
    (GPU, URL),
    (CPU, {}),
    (CPU, URL),
    (CPU, {"TEACHER": "vllm"}),
    (BALANCED, {}),
]
JOBS = {"prepare", "harvester", "sampler", "triplets", "trainer", "evaluator"}


def resolved(file: str, variables: dict[str, str], profile: str = "") -> dict[str, Any]:
    """What `docker compose config` makes of a file, or of several with spaces between them."""
    files = [part for one in file.split() for part in ("-f", one)]
    profiles = ["--profile", profile] if profile else []
    done = subprocess.run(
        ["docker", "compose", *files, *profiles, "config", "--format", "json"],
        cwd=ROOT,
        env=environment(**variables),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refused(file: str, **variables: str) -> str:
    done = subprocess.run(
        ["docker", "compose", "-f", file, "config", "-q"], cwd=ROOT, env=environment(**variables), capture_output=True, text=True
    )
    assert done.returncode != 0
    return done.stderr


@pytest.mark.parametrize(("file", "variables"), COMBINATIONS)
def test_every_combination_has_the_services_it_is_for_and_no_other(file: str, variables: dict[str, str]) -> None:
    teacher = set() if "TEACHER_URL" in variables else {"teacher", "vllm", "weights"} if file == GPU or variables else {"teacher"}
    balancer = {"balancer"} if REPLICAS in file else set()
    assert set(resolved(file, variables)["services"]) == JOBS | {"student"} | teacher | balancer


@pytest.mark.parametrize(("file", "variables"), COMBINATIONS)
def test_monitoring_is_a_profile_of_every_combination(file: str, variables: dict[str, str]) -> None:
    assert set(resolved(file, variables, "monitoring")["services"]) >= {"prometheus", "grafana", "monitor"}


@pytest.mark.parametrize(("file", "variables"), COMBINATIONS)
def test_every_container_is_hardened(file: str, variables: dict[str, str]) -> None:
    for name, service in resolved(file, variables, "monitoring")["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["init"] is True, name
        assert re.fullmatch(r"[1-9]\d*:\d+", service["user"]), name
        limits = service["deploy"]["resources"]["limits"]
        assert limits["memory"], name
        assert limits["pids"], name
        assert service["logging"]["options"]["max-size"], name
        assert not service.get("privileged"), name
        assert all(port["host_ip"] == "127.0.0.1" for port in service.get("ports", ())), name
        assert ":" in service["image"], name
        assert not service["image"].endswith(":latest"), name


@pytest.mark.parametrize(("file", "variables"), COMBINATIONS)
def test_every_server_has_a_health_check_with_a_start_period(file: str, variables: dict[str, str]) -> None:
    for name, service in resolved(file, variables, "monitoring")["services"].items():
        if name not in JOBS | {"weights"}:
            assert service["healthcheck"]["test"], name
            assert service["healthcheck"]["start_period"], name


@pytest.mark.parametrize(("file", "variables"), [c for c in COMBINATIONS if "TEACHER_URL" not in c[1] and (c[0] == GPU or c[1])])
def test_only_the_gateway_shares_a_network_with_the_engine_and_that_network_leads_nowhere(file: str, variables: dict[str, str]) -> None:
    config = resolved(file, variables, "monitoring")
    assert set(config["services"]["vllm"]["networks"]) == {"engine"}
    assert {name for name, service in config["services"].items() if "engine" in service.get("networks", ())} == {"vllm", "teacher"}
    assert config["networks"]["engine"]["internal"] is True
    assert "ports" not in config["services"]["vllm"]


@pytest.mark.parametrize(("file", "variables"), COMBINATIONS)
def test_what_needs_no_network_has_none(file: str, variables: dict[str, str]) -> None:
    services = resolved(file, variables)["services"]
    assert {name for name, service in services.items() if service.get("network_mode") == "none"} == {"sampler", "triplets", "trainer"}


@pytest.mark.parametrize(("file", "variables"), COMBINATIONS)
def test_the_registry_is_written_by_the_evaluator_alone_and_models_by_those_that_make_them(file: str, variables: dict[str, str]) -> None:
    writers: dict[str, set[str]] = {"registry": set(), "models": set(), "runs": set()}
    for name, service in resolved(file, variables, "monitoring")["services"].items():
        for mount in service.get("volumes", ()):
            if mount["type"] == "volume" and not mount.get("read_only") and mount["source"] in writers:
                writers[mount["source"]].add(name)
    assert writers["registry"] == {"evaluator"}
    assert writers["models"] <= {"prepare", "weights", "vllm"}
    assert writers["runs"] == JOBS


def test_the_cpu_file_differs_in_teacher_recipe_torch_and_limits_and_in_nothing_else() -> None:
    gpu, cpu = resolved(GPU, {**URL, "RECIPE": "r"}), resolved(CPU, {**URL, "RECIPE": "r"})
    for name in JOBS | {"student"}:
        one, other = gpu["services"][name], cpu["services"][name]
        for service in (one, other):
            service.pop("deploy")
            service["command"] = [c for c in service["command"] if c != "--require-gpu"]
            if "--teacher-url" in service["command"]:  # a launched teacher's address is no part of its recipe
                at = service["command"].index("--teacher-url")
                del service["command"][at : at + 2]
            if name in ("prepare", "trainer"):
                service.pop("image")
                service.pop("build", None)
        assert one == other, name
    for part in ("volumes", "networks", "secrets"):
        assert gpu[part] == cpu[part]


@pytest.mark.parametrize("file", [GPU, CPU])
def test_half_a_teacher_is_refused_with_what_to_set(file: str) -> None:
    assert "TEACHER_MODEL is missing a value: set it to the name of the model at TEACHER_URL" in refused(
        file, TEACHER_URL="https://a.example/v1"
    )
    assert "TEACHER_URL is missing a value: TEACHER_MODEL names a model there, so set both" in refused(file, TEACHER_MODEL="big-model")


def test_two_teachers_are_refused() -> None:
    for url in (URL, {"TEACHER_URL": URL["TEACHER_URL"]}):
        assert "TEACHER starts an engine here, TEACHER_URL asks one elsewhere; unset one of them" in refused(CPU, **url, TEACHER="vllm")
    assert "that of the engine TEACHER starts is VLLM_MODEL" in refused(CPU, TEACHER_MODEL="m", TEACHER="vllm")


def test_an_unknown_engine_is_refused() -> None:
    assert "docker/teacher/cpu-vlm.yaml" in refused(CPU, TEACHER="vlm")


def test_one_service_an_image_builds_it_and_none_is_looked_for_in_a_registry() -> None:
    for file, variables in COMBINATIONS:
        services = resolved(file, variables, "monitoring")["services"].values()
        built = [service["image"] for service in services if "build" in service]
        assert sorted(built) == sorted(set(built))
        ours = {service["image"]: service["pull_policy"] for service in services if service["image"].startswith("blackbox-distill/")}
        assert set(ours) == set(built)
        assert set(ours.values()) == {"never"}


@pytest.mark.parametrize(("file", "variables"), [(GPU, {}), (CPU, {"TEACHER": "vllm"})])
def test_another_model_means_another_engine_and_another_public_name(file: str, variables: dict[str, str]) -> None:
    """Else its answers, or those of the engine that still runs, would be taken for the other one's."""
    engines = []
    for model in ("org/one", "org/two"):
        services = resolved(file, {**variables, "VLLM_MODEL": model})["services"]
        assert services["harvester"]["environment"]["DISTILL_TEACHER__MODEL"] == model
        assert services["teacher"]["environment"]["TEACHER_PUBLIC_NAME"] == model
        engines.append(services["vllm"])
    assert engines[0] != engines[1]  # compose then makes another container


def test_several_gpus_are_for_one_engine_which_splits_its_model_over_them_and_copies_it() -> None:
    several = {"VLLM_TENSOR_PARALLEL": "2", "VLLM_DATA_PARALLEL": "4", "VLLM_GPUS": "8"}
    for variables, tensor, data, gpus in (({}, 1, 1, 1), (several, 2, 4, 8)):
        vllm = resolved(GPU, variables)["services"]["vllm"]
        assert {f"--tensor-parallel-size={tensor}", f"--data-parallel-size={data}"} <= set(vllm["command"])
        (device,) = vllm["deploy"]["resources"]["reservations"]["devices"]
        assert device["count"] == gpus


def test_what_has_no_password_is_not_opened_with_the_servers() -> None:
    services = resolved(CPU, {"BIND": "0.0.0.0"}, "monitoring")["services"]
    hosts = {name: port["host_ip"] for name, service in services.items() for port in service.get("ports", ())}
    assert hosts == {"teacher": "0.0.0.0", "student": "0.0.0.0", "prometheus": "127.0.0.1", "grafana": "127.0.0.1"}


def test_replicas_have_no_port_of_their_own_and_the_balancer_has_theirs() -> None:
    services = resolved(BALANCED, {"STUDENT_PORT": "9999"})["services"]
    assert not services["student"].get("ports")
    assert [(port["host_ip"], port["published"], port["target"]) for port in services["balancer"]["ports"]] == [("127.0.0.1", "9999", 8080)]
    assert set(services["balancer"]["networks"]) < set(services["student"]["networks"])


def test_the_example_names_every_variable_of_the_files_with_its_default() -> None:
    told = dict(re.findall(r"^#([A-Z_]+)=(\S*)", (ROOT / ".env.example").read_text(), re.MULTILINE))
    files = [ROOT / GPU, ROOT / CPU, *(ROOT / "docker").rglob("*.yaml")]
    text = "\n".join(file.read_text() for file in files)
    assert told.keys() == set(re.findall(r"\$\{([A-Z_]+)", text)) - {"TEACHER_OR_TEACHER_URL"}
    for name, default in told.items():
        defaults = set(re.findall(rf"\$\{{{name}:?-([^$}}]+)}}", text)) - {"docker/none", "http://teacher:8000/v1"}
        assert (default in defaults) if default else not defaults, name


LINTED = [GPU, CPU, *(str(f.relative_to(ROOT)) for f in sorted((ROOT / "docker").glob("*/*.yaml")) if f.parent.name != "kubernetes")]


@pytest.mark.parametrize("file", LINTED)
def test_the_files_follow_the_compose_specification(file: str, tmp_path: Path) -> None:
    plain = tmp_path / "compose.yaml"
    plain.write_text((ROOT / file).read_text().replace("!reset ", ""))  # compose's own tag, which the checker does not know
    subprocess.run([Path(sys.executable).with_name("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", plain], check=True)


@pytest.mark.parametrize(("file", "variables"), COMBINATIONS)
def test_the_security_linter_finds_nothing_but_what_is_excused_here(file: str, variables: dict[str, str], tmp_path: Path) -> None:
    """CL-0019: images we build have no digest before they are built. CL-0026: heavy jobs may have all cores; a limit above what a machine
    has would keep them from starting. CL-0022: vLLM compiles kernels and loads them from its temporary folder."""
    merged = tmp_path / "compose.yaml"
    merged.write_text(yaml.safe_dump(resolved(file, variables, "monitoring")))
    lint = [Path(sys.executable).with_name("compose-lint"), "--format", "json", merged]
    found = json.loads(subprocess.run(lint, capture_output=True, text=True).stdout)
    rules = {(finding["rule_id"], finding.get("service")) for finding in found["findings"]}
    assert {rule for rule, _ in rules} <= {"CL-0019", "CL-0026", "CL-0022"}, rules
    assert {service for rule, service in rules if rule == "CL-0022"} <= {"vllm"}


@pytest.mark.parametrize("file", ["Dockerfile", "vllm-cpu.Dockerfile"])
def test_hadolint_finds_nothing(file: str) -> None:
    done = subprocess.run([Path(sys.executable).with_name("hadolint"), ROOT / "docker" / file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
