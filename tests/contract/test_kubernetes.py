"""docker/kubernetes without a cluster: Kubernetes's schemas, and what they cannot see: commands, settings, routes, who refers to whom."""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import jsonschema
import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement

from shared.cli import COMMANDS
from shared.commands import assignments
from shared.errors import DistillError, SettingsError
from shared.http.keys import Keys, read_keys
from shared.http.limits import Counts
from shared.http.metrics import Meters
from shared.settings import Recipe, load_settings
from student_trainer.serving.app import student_app
from student_trainer.serving.metrics import StudentMeters
from student_trainer.serving.settings import StudentServiceSettings
from teacher_service.app import teacher_app
from teacher_service.settings import TeacherServiceSettings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docker" / "kubernetes"
OLDEST, NEWEST = "1.30", "1.37"
"""Versions of Kubernetes whose schemas the documents must follow; `preStop.sleep` is on by default since the first."""
APPLIED_BY_HAND = {"rayjob.yaml", "secret.example.yaml"}
NO_DOCUMENTS = {"kustomization.yaml", "adapter-values.yaml"}
MADE_BY_HAND = {"recipes"}
"""ConfigMaps that the user makes: kubectl create configmap recipes --from-file=recipes"""
OURS = "blackbox-distill/"
NAMESPACE = "blackbox-distill"

Document = dict[str, Any]


def read(file: str) -> list[Document]:
    return list(yaml.safe_load_all((FOLDER / file).read_text()))


FILES = sorted({file.name for file in FOLDER.glob("*.yaml")} - NO_DOCUMENTS)
DOCUMENTS = [(file, document) for file in FILES for document in read(file)]
BY_NAME = {(document["kind"], document["metadata"]["name"]): document for _, document in DOCUMENTS}


def kind(name: str) -> dict[str, Document]:
    return {of: document for (k, of), document in BY_NAME.items() if k == name}


class Container(NamedTuple):
    """One container, the pod template it is in, and whose that is."""

    owner: str
    template: Document
    spec: Document

    @property
    def mounts(self) -> dict[str, tuple[Document, bool]]:
        """Path -> the volume that is seen there, and whether it may be written."""
        volumes = {volume["name"]: volume for volume in self.template["spec"]["volumes"]}
        mounts = self.spec.get("volumeMounts", [])
        return {mount["mountPath"]: (volumes[mount["name"]], not mount.get("readOnly", False)) for mount in mounts}

    @property
    def environment(self) -> dict[str, str]:
        """By name; a variable of its own comes before one of a ConfigMap."""
        variables: dict[str, str] = {}
        for source in self.spec.get("envFrom", []):
            variables |= kind("ConfigMap")[source["configMapRef"]["name"]]["data"]
        return variables | {variable["name"]: variable["value"] for variable in self.spec.get("env", [])}

    @property
    def port(self) -> Callable[[str], int]:
        return {port["name"]: port["containerPort"] for port in self.spec.get("ports", [])}.__getitem__


def templates() -> Iterator[tuple[str, Document]]:
    """Every pod template, by whose it is."""
    for (of, name), document in BY_NAME.items():
        if of == "RayJob":
            cluster = document["spec"]["rayClusterSpec"]
            yield "ray-head", cluster["headGroupSpec"]["template"]
            for group in cluster["workerGroupSpecs"]:
                yield f"ray-{group['groupName']}", group["template"]
        elif "template" in document.get("spec", {}):
            yield name, document["spec"]["template"]


TEMPLATES = dict(templates())
CONTAINERS = [
    Container(owner, template, spec)
    for owner, template in TEMPLATES.items()
    for spec in template["spec"].get("initContainers", []) + template["spec"]["containers"]
]
JOBS = {"prepare", "run"}


def container(name: str) -> Container:
    (found,) = (one for one in CONTAINERS if one.spec["name"] == name and not one.owner.startswith("ray-"))
    return found


def commands() -> list[tuple[Container, list[str]]]:
    """Everything that runs `distill`, and what it is given."""
    by_image = [(one, one.spec["args"]) for one in CONTAINERS if one.spec["image"].startswith(OURS) and "args" in one.spec]
    submitted = shlex.split(BY_NAME["RayJob", "harvest"]["spec"]["entrypoint"])
    assert submitted[0] == "distill"
    head = next(one for one in CONTAINERS if one.owner == "ray-head")
    return [*by_image, (head, submitted[1:])]


COMMAND_LINES = commands()


class Parsed(Exception):
    """Raised in place of doing what was asked."""


def parsed(line: list[str], patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command's own parser makes of it. An option that it does not know ends the test with SystemExit."""
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self: argparse.ArgumentParser, arguments: Any = None, namespace: Any = None) -> Any:
        raise Parsed(vars(parse(self, arguments, namespace)))

    with patch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        with pytest.raises(Parsed) as found:
            importlib.import_module(COMMANDS[line[0]][0]).main(line[1:])
    return dict(found.value.args[0])


class Configured(NamedTuple):
    """What a command line and the variables beside it come to, by the code that reads them."""

    recipe: Recipe | None
    server: TeacherServiceSettings | StudentServiceSettings | None


SERVERS = {"teacher": TeacherServiceSettings, "serve": StudentServiceSettings}


def configured(one: Container, line: list[str], patch: pytest.MonkeyPatch) -> Configured:
    """Raises SettingsError for a variable of our prefixes that is no setting, and for a value that none may have."""
    given = parsed(line, patch)
    file = given.pop("recipe", None)
    for name in [name for name in os.environ if name.startswith(("DISTILL_", "TEACHER_", "STUDENT_"))]:
        patch.delenv(name)
    for name, value in one.environment.items():
        patch.setenv(name, value)
    recipe = None
    if file is not None:
        path = ROOT / Path("/work", file).relative_to("/work")
        recipe = load_settings(Recipe, flags=assignments(given.get("settings", [])), yaml_file=path)
    if line[0] not in SERVERS:
        return Configured(recipe, None)
    given.pop("until_stdin_closes", None)
    return Configured(recipe, load_settings(SERVERS[line[0]], flags=given))


def server(name: str, patch: pytest.MonkeyPatch) -> Any:
    one = container(name)
    return configured(one, one.spec["args"], patch).server


def values(tree: Any, key: str) -> Iterator[Any]:
    """Every value under `key`, at any depth."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name == key:
                yield value
            yield from values(value, key)
    elif isinstance(tree, list):
        for value in tree:
            yield from values(value, key)


def compose(file: str) -> Any:
    """A compose file with the defaults of its variables."""
    return yaml.safe_load(re.sub(r"\$\{[A-Z_]+:?-?([^}]*)}", r"\1", (ROOT / file).read_text()))


COMPOSE, COMPOSE_TEACHER = compose("compose.yaml"), compose("docker/teacher/gpu.yaml")


# The documents themselves ----------------------------------------------------------------------------------------------------


def validate(document: Document, version: str = NEWEST) -> None:
    """Raises ValidationError. No package that pip installs has KubeRay's schema: its pod templates are Kubernetes's own, and RAY_JOB lists
    those of its other fields that we use."""
    if document["kind"] == "RayJob":
        jsonschema.validate(document, RAY_JOB)
        cluster = document["spec"]["rayClusterSpec"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            validate({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "template"}, "template": group["template"]}, version)
    else:
        assert kubernetes_validate.validate(document, version, strict=True) == version


def exactly(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    properties = required | (optional or {})
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


START = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}
RAY_JOB = exactly(
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": exactly({"name": {"type": "string", "maxLength": 47}, "namespace": {"type": "string"}}),
        "spec": exactly(
            {
                "entrypoint": {"type": "string"},
                "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
                "rayClusterSpec": exactly(
                    {
                        "rayVersion": {"type": "string"},
                        # without a token whoever reaches the cluster runs code in it
                        "authOptions": exactly({"mode": {"const": "token"}}),
                        "headGroupSpec": exactly({"rayStartParams": START, "template": {"type": "object"}}),
                        "workerGroupSpecs": {
                            "type": "array",
                            "items": exactly(
                                {"groupName": {"type": "string"}, "template": {"type": "object"}, "rayStartParams": START},
                                {"replicas": COUNT, "minReplicas": COUNT, "maxReplicas": COUNT},
                            ),
                        },
                    }
                ),
            },
            {"backoffLimit": COUNT, "shutdownAfterJobFinishes": {"type": "boolean"}, "ttlSecondsAfterFinished": COUNT},
        ),
    }
)


@pytest.mark.parametrize("document", BY_NAME.values(), ids=map("-".join, BY_NAME))
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_document_follows_the_schema_of_its_kind(document: Document, version: str) -> None:
    validate(document, version)


@pytest.mark.parametrize(
    ("of", "name", "path"),
    [
        ("Deployment", "student", ("spec", "template", "spec", "containers", 0)),
        ("Job", "run", ("spec", "podFailurePolicy", "rules", 0)),
        ("HorizontalPodAutoscaler", "student", ("spec", "metrics", 0, "pods", "target")),
        ("NetworkPolicy", "vllm", ("spec", "ingress", 0)),
        ("RayJob", "harvest", ("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "resources")),
        ("RayJob", "harvest", ("spec", "rayClusterSpec", "headGroupSpec")),
    ],
)
def test_a_field_that_nobody_knows_is_refused_wherever_it_stands(of: str, name: str, path: tuple[str | int, ...]) -> None:
    document = copy.deepcopy(BY_NAME[of, name])
    place: Any = document
    for step in path:
        place = place[step]
    place["misspelt"] = 1
    with pytest.raises(Exception, match="misspelt"):
        validate(document)


def test_apply_k_takes_every_file_but_those_that_are_applied_by_hand() -> None:
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    assert set(kustomization) == {"apiVersion", "kind", "resources"}
    assert set(kustomization["resources"]) == set(FILES) - APPLIED_BY_HAND
    assert kustomization["resources"][0] == "base.yaml"  # the namespace comes first
    assert len(BY_NAME) == len(DOCUMENTS), "two documents of one kind have one name"
    assert {document["metadata"].get("namespace") for document in BY_NAME.values() if document["kind"] != "Namespace"} == {NAMESPACE}
    assert set(kind("Namespace")) == {NAMESPACE}


# What our own code makes of them ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("one", "line"), COMMAND_LINES, ids=[f"{one.owner}-{line[0]}" for one, line in COMMAND_LINES])
def test_every_command_parses_and_every_variable_beside_it_is_a_setting(one: Container, line: list[str], monkeypatch: Any) -> None:
    configured(one, line, monkeypatch)
    others = {name for name in one.environment if not name.startswith(("DISTILL_", "TEACHER_", "STUDENT_"))}
    told_by_compose = {name for variables in values([COMPOSE, COMPOSE_TEACHER], "environment") for name in variables}
    assert others <= told_by_compose | {"RAY_USAGE_STATS_ENABLED"}


def test_an_option_that_no_command_knows_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        parsed(["harvest", "--recipe", "r", "--out", "o", "--no-such-option"], monkeypatch)


def test_every_container_of_ours_keeps_the_entrypoint_of_its_image_but_those_that_wait_for_a_file() -> None:
    with_command = {one.spec["name"] for one in CONTAINERS if one.spec["image"].startswith(OURS) and "command" in one.spec}
    assert with_command == {"prepared"}
    for name in ("prepared", "fetched"):
        *bounded, script = container(name).spec["command"]
        assert bounded == ["timeout", "3600", "sh", "-c"]
        assert subprocess.run(["sh", "-n", "-c", script]).returncode == 0


def test_the_stages_are_those_of_compose_in_the_same_order() -> None:
    services = {"harvest": "harvester", "sample": "sampler", "triplets": "triplets", "train": "trainer", "evaluate": "evaluator"}
    of_the_run = [one for one in CONTAINERS if one.owner == "run" and "args" in one.spec]
    assert [one.spec["name"] for one in of_the_run] == list(services)
    for one, service in zip(of_the_run, services.values(), strict=True):
        assert one.spec["args"] == COMPOSE["services"][service]["command"]
        assert one.spec["image"] == COMPOSE["services"][service]["image"]
    prepare = [part for part in COMPOSE["services"]["prepare"]["command"] if part != "--require-gpu"]  # it needs none itself
    assert container("prepare").spec["args"] == prepare


def test_the_engine_is_closed_by_the_flags_that_compose_gives_it() -> None:
    ours, theirs = container("vllm").spec, COMPOSE_TEACHER["services"]["vllm"]
    assert ours["command"] == theirs["entrypoint"]
    # which GPUs it has, and the model's name
    others = ("--gpu-memory-utilization=", "--tensor-parallel-size=", "--data-parallel-size=", "--served-model-name=", "/cache/")
    assert [a for a in ours["args"] if not a.startswith(others)] == [a for a in theirs["command"] if not a.startswith(others)]
    assert container("vllm").environment.items() <= theirs["environment"].items()


def test_one_model_is_fetched_loaded_shown_and_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else an engine's answers would pass for those of another one."""
    gateway = server("teacher", monkeypatch)
    public = kind("ConfigMap")["teacher"]["data"]["DISTILL_TEACHER__MODEL"]
    _, fetched, _, link = next(line for _, line in COMMAND_LINES if line[0] == "fetch")
    folder, *options = container("vllm").spec["args"]
    served = next(option.partition("=")[2] for option in options if option.startswith("--served-model-name="))
    assert public == fetched == gateway.public_name
    assert served == gateway.upstream_model == public.rpartition("/")[2]
    assert folder == link == f"/cache/{served}"
    assert f"[ -e {folder} ]" in container("fetched").spec["command"][-1]


def test_the_job_run_waits_for_what_prepare_writes_last() -> None:
    out = container("prepare").spec["args"][-1]
    assert f"[ -e {out}/dataset/manifest.json ]" in container("prepared").spec["command"][-1]


def exit_codes(tree: type[DistillError]) -> Iterator[int]:
    yield tree.exit_code
    for below in tree.__subclasses__():
        if below.__module__ == "shared.errors":
            yield from exit_codes(below)


def test_a_job_is_begun_again_only_after_what_another_attempt_may_mend() -> None:
    again = {1, 7, 10, 11, 143}  # unforeseen, teacher, disk or lock, engine (memory), told to end
    for name in JOBS:
        spec = BY_NAME["Job", name]["spec"]
        codes, disrupted = spec["podFailurePolicy"]["rules"]
        assert codes["action"] == "FailJob"
        assert codes["onExitCodes"] == {"operator": "In", "values": sorted(set(exit_codes(DistillError)) - again)}
        assert disrupted["action"] == "Ignore"  # a drained node is no failure
        assert spec["template"]["spec"]["restartPolicy"] == "Never"  # else no such policy is allowed
        assert spec["backoffLimit"] >= 6  # the engine takes minutes to come up


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_probes_ask_routes_that_the_server_has_at_the_port_where_it_listens(name: str, monkeypatch: Any, tmp_path: Path) -> None:
    one, settings = container(name), server(name, monkeypatch)
    if name == "teacher":
        app: Any = teacher_app(settings, keys=Keys({}), counts=Counts(Keys({}).keys), meters=Meters())
    else:
        app = student_app(settings.model_copy(update={"registry": tmp_path, "teacher_key_file": None}), meters=StudentMeters())
    routes = {route.path for route in app.routes}
    probes = {probe: one.spec[probe]["httpGet"] for probe in one.spec if probe.endswith("Probe")}
    assert {probe: get["path"] for probe, get in probes.items()}.items() >= {
        "readinessProbe": "/readyz",
        "livenessProbe": "/healthz",
    }.items()
    assert {get["path"] for get in probes.values()} <= routes
    assert {one.port(get["port"]) for get in probes.values()} == {settings.port}
    assert one.port("metrics") == settings.metrics_port
    assert one.template["metadata"]["annotations"] == {"prometheus.io/scrape": "true", "prometheus.io/port": str(settings.metrics_port)}
    assert settings.host == "0.0.0.0"


def test_the_engine_is_probed_where_compose_probes_it() -> None:
    asked = urlsplit(re.search(r"'(http[^']+)'", COMPOSE_TEACHER["services"]["vllm"]["healthcheck"]["test"][-1])[1])  # type: ignore[index]
    one = container("vllm")
    for probe in ("startupProbe", "livenessProbe"):
        get = one.spec[probe]["httpGet"]
        assert (get["path"], one.port(get["port"])) == (asked.path, asked.port)


@pytest.mark.parametrize(("name", "longest"), [("teacher", "upstream_timeout_s"), ("student", "deadline_s")])
def test_a_server_that_is_stopped_gets_the_time_to_end_its_longest_answer(name: str, longest: str, monkeypatch: Any) -> None:
    one, settings = container(name), server(name, monkeypatch)
    waits = one.spec["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert settings.drain_s >= getattr(settings, longest)
    assert one.template["spec"]["terminationGracePeriodSeconds"] > waits + settings.drain_s + 1  # then it ends itself


def test_the_student_computes_with_the_cores_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert server("student", monkeypatch).layout is None  # measured, with the cores of the limit
    resources = container("student").spec["resources"]
    assert int(resources["limits"]["cpu"]) == int(resources["requests"]["cpu"]) > 1


def test_the_autoscaler_asks_for_a_metric_that_a_student_tells() -> None:
    scaler = BY_NAME["HorizontalPodAutoscaler", "student"]["spec"]
    (metric,) = scaler["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert {family.name: family.type for family in StudentMeters().registry.collect()}[name] == "gauge"
    (rule,) = yaml.safe_load((FOLDER / "adapter-values.yaml").read_text())["rules"]["custom"]
    assert rule["seriesQuery"].partition("{")[0] == name
    target = scaler["scaleTargetRef"]
    deployment = BY_NAME[target["kind"], target["name"]]
    assert deployment["apiVersion"] == target["apiVersion"]
    assert "replicas" not in deployment["spec"]  # else every apply would undo what the autoscaler has done
    budget = BY_NAME["PodDisruptionBudget", "student"]["spec"]
    assert budget["maxUnavailable"] < scaler["minReplicas"]  # one is always there, and a node can be drained
    assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"  # also before the first promotion, when none is ready


# Who refers to whom ----------------------------------------------------------------------------------------------------------


def selects(selector: Document, labels: dict[str, str]) -> bool:
    """A label selector of Kubernetes, of the kinds used here; an empty one selects everything."""
    assert set(selector) <= {"matchLabels", "matchExpressions"}
    expressions = selector.get("matchExpressions", [])
    assert {expression["operator"] for expression in expressions} <= {"In"}
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(expression["key"]) in expression["values"] for expression in expressions
    )


def test_what_a_pod_is_given_is_there() -> None:
    secret = BY_NAME["Secret", "keys"]["stringData"]
    for owner, template in TEMPLATES.items():
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        used = {mount["name"] for one in CONTAINERS if one.owner == owner for mount in one.spec.get("volumeMounts", [])}
        assert used == set(volumes), owner
        for volume in volumes.values():
            if claim := volume.get("persistentVolumeClaim"):
                assert claim["claimName"] in kind("PersistentVolumeClaim")
            elif of := volume.get("configMap"):
                assert of["name"] in MADE_BY_HAND
            elif of := volume.get("secret"):
                assert of["secretName"] == "keys"
                assert {item["key"] for item in of["items"]} <= set(secret)
                assert of["defaultMode"] == 0o440  # for the group, which is fsGroup
            else:
                assert volume["emptyDir"]["sizeLimit"]
    for one in CONTAINERS:
        assert {source["configMapRef"]["name"] for source in one.spec.get("envFrom", [])} <= set(kind("ConfigMap"))


@pytest.mark.parametrize(("one", "line"), COMMAND_LINES, ids=[f"{one.owner}-{line[0]}" for one, line in COMMAND_LINES])
def test_every_path_that_a_command_names_is_mounted_and_every_secret_among_them_is_given(one: Container, line: list[str]) -> None:
    texts = [part.partition("=")[2] or part for part in line] + list(one.environment.values())
    for path in (text for text in texts if text.startswith("/")):
        assert any(Path(path).is_relative_to(mount) for mount in one.mounts), path
        if path.startswith("/run/secrets/"):
            items = one.mounts["/run/secrets"][0]["secret"]["items"]
            assert Path(path).name in {item["path"] for item in items}
            assert all(item["key"] == item["path"] for item in items)
    assert all((ROOT / text).exists() for text in texts if text.startswith("recipes/"))
    if any(text.startswith("recipes/") for text in texts):
        assert one.mounts["/work/recipes"][0]["configMap"]["name"] == "recipes"


def test_services_lead_to_pods_and_urls_to_services(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, service in kind("Service").items():
        assert service["spec"].get("type", "ClusterIP") == "ClusterIP", name  # nothing is shown outside
        (found,) = (
            template for template in TEMPLATES.values() if service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
        )
        (port,) = service["spec"]["ports"]
        names = {port["name"]: port["containerPort"] for one in found["spec"]["containers"] for port in one["ports"]}
        assert names[port["targetPort"]] == port["port"], name
    asked = {
        kind("ConfigMap")["teacher"]["data"]["DISTILL_TEACHER__URL"]: "teacher",
        server("teacher", monkeypatch).upstream_url[0]: "vllm",
    }
    for url, name in asked.items():
        parts = urlsplit(url)
        assert (parts.hostname, parts.port, parts.path) == (name, kind("Service")[name]["spec"]["ports"][0]["port"], "/v1")


def test_controllers_select_their_own_pods_and_nobody_elses() -> None:
    for of in ("Deployment", "PodDisruptionBudget"):
        for name, document in kind(of).items():
            chosen = {
                owner for owner, template in TEMPLATES.items() if selects(document["spec"]["selector"], template["metadata"]["labels"])
            }
            assert chosen == {name}


@pytest.mark.parametrize(("one", "line"), COMMAND_LINES, ids=[f"{one.owner}-{line[0]}" for one, line in COMMAND_LINES])
def test_whoever_asks_the_teacher_does_so_by_the_gateways_name_and_key(one: Container, line: list[str], monkeypatch: Any) -> None:
    recipe = configured(one, line, monkeypatch).recipe
    if recipe is None:
        assert line[0] in ("teacher", "fetch")
        return
    assert recipe.teacher.url == "http://teacher:8000/v1"
    assert recipe.teacher.public_name == kind("ConfigMap")["teacher"]["data"]["DISTILL_TEACHER__MODEL"]
    assert recipe.teacher.api_key_file == Path("/run/secrets/teacher_key")


def test_both_servers_want_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("teacher", "student"):
        settings = server(name, monkeypatch)
        assert not settings.no_auth
        assert settings.api_keys_file.name in BY_NAME["Secret", "keys"]["stringData"]


def test_the_example_of_a_secret_opens_no_door(tmp_path: Path) -> None:
    for name in ("teacher_api_keys", "student_api_keys"):
        (file := tmp_path / name).write_text(BY_NAME["Secret", "keys"]["stringData"][name])
        with pytest.raises(SettingsError, match="sha256"):
            read_keys(file)


# Who may reach whom ----------------------------------------------------------------------------------------------------------

PODS = {owner: (NAMESPACE, template["metadata"]["labels"]) for owner, template in TEMPLATES.items()} | {
    "stranger": (NAMESPACE, {"app": "stranger"}),
    "visitor": ("default", {"app": "teacher"}),  # another namespace's pod of the same name
    "prometheus": ("monitoring", {}),
    "operator": ("kuberay", {"app.kubernetes.io/name": "kuberay-operator"}),
    "dns": ("kube-system", {"k8s-app": "kube-dns"}),
    "hub": (None, {}),  # outside the cluster
}
"""Pods by their namespace and labels."""


def is_peer(peer: Document, pod: str) -> bool:
    namespace, labels = PODS[pod]
    assert set(peer) <= {"podSelector", "namespaceSelector"}
    if namespace is None:
        return False
    if "namespaceSelector" in peer:
        there = selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace})
    else:
        there = namespace == NAMESPACE
    return there and selects(peer.get("podSelector", {}), labels)


def allows(direction: str, pod: str, other: str, port: int) -> bool:
    """Whether the policies of `pod` let it speak with `other`: no policy of that direction, or a rule of any of them."""
    namespace, labels = PODS[pod]
    if namespace != NAMESPACE:
        return True
    of_it = [p["spec"] for p in kind("NetworkPolicy").values() if selects(p["spec"]["podSelector"], labels)]
    of_it = [spec for spec in of_it if direction in spec["policyTypes"]]
    side = "from" if direction == "Ingress" else "to"
    rules = [rule for spec in of_it for rule in spec.get(direction.lower(), [])]
    return not of_it or any(
        (side not in rule or any(is_peer(peer, other) for peer in rule[side]))
        and ("ports" not in rule or port in [entry["port"] for entry in rule["ports"]])
        for rule in rules
    )


def admitted(target: str, port: int) -> set[str]:
    """Whom the target's own policies let in, whether they may send there or not."""
    return {pod for pod in PODS if pod != target and allows("Ingress", target, pod, port)}


def reaching(target: str, port: int) -> set[str]:
    return {pod for pod in admitted(target, port) if allows("Egress", pod, target, port)}


RAY = {"ray-head", "ray-workers"}
ASK = {"run", "student"} | RAY


def test_the_gateway_alone_reaches_the_engine_and_the_engine_reaches_nobody() -> None:
    assert reaching("vllm", 8000) == admitted("vllm", 8000) == {"teacher"}
    assert all(admitted("vllm", port) == set() for port in (22, 443, 9464))
    for pod in PODS:
        assert not any(allows("Egress", "vllm", pod, port) for port in (53, 80, 443, 8000, 8080)), pod


def test_the_gateway_is_reached_by_those_who_ask_the_teacher_and_its_numbers_by_prometheus() -> None:
    assert reaching("teacher", 8000) == admitted("teacher", 8000) == ASK
    assert reaching("teacher", 9464) == admitted("teacher", 9464) == {"prometheus"}


def test_the_student_is_reached_by_whoever_may_send_and_its_numbers_by_prometheus() -> None:
    assert reaching("student", 8080) == {"visitor", "prometheus", "operator", "dns", "hub"}
    assert reaching("student", 9464) == {"prometheus"}


def test_jobs_are_reached_by_nobody_and_rays_nodes_by_each_other_and_their_operator() -> None:
    for job in JOBS:
        assert all(admitted(job, port) == set() for port in (80, 443, 8000, 8080))
    assert reaching("ray-head", 6379) == admitted("ray-head", 6379) == {"ray-workers"}
    assert reaching("ray-head", 8265) == admitted("ray-head", 8265) == {"ray-workers", "operator"}


def test_only_prepare_gets_out_and_only_those_who_look_up_names_reach_dns() -> None:
    assert {pod for pod, (namespace, _) in PODS.items() if namespace == NAMESPACE and allows("Egress", pod, "hub", 443)} == {"prepare"}
    assert {pod for pod, (namespace, _) in PODS.items() if namespace == NAMESPACE and allows("Egress", pod, "dns", 53)} == {
        "teacher",
        "prepare",
        *ASK,
    }


# What every container is denied ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", CONTAINERS, ids=lambda one: f"{one.owner}-{one.spec['name']}")
def test_every_container_is_hardened_as_in_compose(one: Container) -> None:
    pod, own = one.template["spec"], one.spec["securityContext"]
    assert pod["automountServiceAccountToken"] is False
    # else the variables TEACHER_PORT, STUDENT_PORT and VLLM_PORT, which Kubernetes makes of services, are taken for settings
    assert pod["enableServiceLinks"] is False
    context = pod["securityContext"]
    user = COMPOSE_TEACHER["services"]["vllm"]["user"] if one.owner == "vllm" else "10001:0"
    assert f"{context['runAsUser']}:{context['runAsGroup']}" == user
    assert context["runAsNonRoot"] is True
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert own == {"readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert one.spec["resources"]["requests"].keys() >= {"cpu", "memory"}
    assert one.spec["resources"]["limits"]["memory"]


def test_the_namespace_itself_refuses_what_is_not_hardened() -> None:
    assert BY_NAME["Namespace", NAMESPACE]["metadata"]["labels"] == {"pod-security.kubernetes.io/enforce": "restricted"}


def test_the_registry_is_written_by_the_evaluation_alone_and_models_by_the_job_that_makes_them() -> None:
    writers: dict[str, set[str]] = {}
    for one in CONTAINERS:
        for volume, written in one.mounts.values():
            if written and "persistentVolumeClaim" in volume:
                writers.setdefault(volume["persistentVolumeClaim"]["claimName"], set()).add(f"{one.owner}/{one.spec['name']}")
    assert writers["registry"] == {"run/evaluate"}
    assert writers["models"] == {"prepare/prepare", "prepare/weights"}
    assert not {writer for writer in writers["runs"] if writer.startswith(("student/", "vllm/", "teacher/"))}
    for name in writers:
        assert kind("PersistentVolumeClaim")[name]["spec"]["accessModes"] == ["ReadWriteMany"]  # pods on several nodes share them


def test_images_are_those_that_compose_builds_or_names() -> None:
    images = {image for image in values([COMPOSE, COMPOSE_TEACHER], "image")}
    ray = {one.spec["image"] for one in CONTAINERS if one.owner.startswith("ray-")}
    assert {one.spec["image"] for one in CONTAINERS} - ray <= images
    text = (FOLDER / "ray.Dockerfile").read_text()
    (base,) = re.findall(r"^FROM (\S+)$", text, re.MULTILINE)
    assert base == COMPOSE["x-trainer"]["image"]
    assert f"-t {ray.pop()} " in (FOLDER / "rayjob.yaml").read_text()
    assert not ray


def test_rays_version_is_that_of_the_extra_and_of_the_image() -> None:
    version = BY_NAME["RayJob", "harvest"]["spec"]["rayClusterSpec"]["rayVersion"]
    (built,) = map(Requirement, re.findall(r'"(ray\[[^"]+)"', (FOLDER / "ray.Dockerfile").read_text()))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (wanted,) = (requirement for requirement in map(Requirement, extras["cluster"]) if requirement.name == "ray")
    assert built.specifier.contains(version)
    assert wanted.specifier.contains(version)
    assert built.extras >= wanted.extras | {"default"}  # which KubeRay needs: what takes jobs and answers its probes


def test_hadolint_finds_nothing_in_rays_image() -> None:
    lint = [Path(sys.executable).with_name("hadolint"), "--format", "json", FOLDER / "ray.Dockerfile"]
    assert json.loads(subprocess.run(lint, capture_output=True, text=True).stdout) == []
