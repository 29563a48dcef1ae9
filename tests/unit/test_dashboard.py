"""What docker/monitoring asks Prometheus for is what servers and monitor expose, all of it, and needs nothing from outside."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from monitored import full_run
from prometheus_client import CollectorRegistry
from prometheus_client.samples import Sample

from shared.engines.scripted import ScriptedEngine
from shared.http.app import create_app
from shared.http.metrics import Measured, Meters
from student_trainer.run_metrics import RunMetrics

MONITORING = Path(__file__).parents[2] / "docker" / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana" / "dashboards" / "blackbox-distill.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(target["expr"], target["legendFormat"]) for panel in PANELS for target in panel["targets"]]
BY_PROMETHEUS = {"job", "instance"}
"""Labels that Prometheus adds."""


def read_yaml(name: str) -> Any:
    return yaml.safe_load((MONITORING / name).read_text())


class Refusing(ScriptedEngine):
    async def generate(self, request: object) -> Any:
        raise RuntimeError("an answer with a status of 500")


async def ask(registry: CollectorRegistry) -> None:
    app = Measured(create_app(Refusing(), model="student", title="Student", meters=Meters(registry)), registry)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://student") as client:
        for body in ({}, {"model": "student", "prompt": "Is it flu?"}):
            await client.post("/v1/completions", json=body)


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Every series of a server that was asked and of a monitor over a run that has got to its end."""
    runs = tmp_path_factory.mktemp("runs")
    full_run(runs / "mine")
    registry = CollectorRegistry()
    asyncio.run(ask(registry))
    registry.register(RunMetrics(runs))
    return [sample for family in registry.collect() for sample in family.samples]


def selectors() -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Metric and matchers (label, operator, value) of each selector of the dashboard."""
    for expression, _ in QUERIES:
        for name, inside in re.findall(r"(distill_\w+)(?:\{([^}]*)\})?", expression):
            yield name, re.findall(r'(\w+)(=~|!~|=)"([^"]*)"', inside.replace("$run", ".*"))


def matches(sample: Sample, name: str, matchers: list[tuple[str, str, str]]) -> bool:
    def fits(label: str, operator: str, value: str) -> bool:
        found = re.fullmatch(re.escape(value) if operator == "=" else value, sample.labels.get(label, ""))
        return (found is None) == (operator == "!~")

    return sample.name == name and all(fits(*matcher) for matcher in matchers if matcher[0] not in BY_PROMETHEUS)


def test_every_selector_of_the_dashboard_finds_a_series(exposed: list[Sample]) -> None:
    found = list(selectors())
    assert len(found) > 30
    assert [s for s in found if not any(matches(sample, *s) for sample in exposed)] == []


def test_everything_that_is_exposed_is_on_the_dashboard(exposed: list[Sample]) -> None:
    shown = {name for name, _ in selectors()}
    # a histogram is shown by its buckets
    assert {re.sub("_(sum|count)$", "_bucket", sample.name) for sample in exposed} == shown


def test_legends_and_groupings_name_labels_that_exist(exposed: list[Sample]) -> None:
    known = {label for sample in exposed for label in sample.labels} | BY_PROMETHEUS
    for expression, legend in QUERIES:
        grouped = {label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(", ")}
        assert grouped | set(re.findall(r"{{(\w+)}}", legend)) <= known


def test_the_dashboard_needs_no_plugin_and_asks_the_provisioned_source() -> None:
    (source,) = read_yaml("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    asked = [panel["datasource"] for panel in PANELS] + [t["datasource"] for panel in PANELS for t in panel["targets"]]
    asked += [variable["datasource"] for variable in DASHBOARD["templating"]["list"]]
    assert all(found == {"type": source["type"], "uid": source["uid"]} for found in asked)
    assert {panel["type"] for panel in PANELS} == {"timeseries", "stat", "table", "state-timeline"}
    assert source["jsonData"]["timeInterval"] == read_yaml("prometheus.yml")["global"]["scrape_interval"]


def test_every_panel_says_what_it_shows_and_in_which_unit_and_none_hides_another() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken = set()
    for panel in DASHBOARD["panels"]:
        x, y, w, h = (panel["gridPos"][key] for key in "xywh")
        cells = {(column, line) for column in range(x, x + w) for line in range(y, y + h)}
        assert x + w <= 24
        assert not taken & cells, panel["title"]
        taken |= cells
        assert panel["type"] == "row" or (panel["title"] and panel["description"] and panel["fieldConfig"]["defaults"]["unit"])


def test_there_is_a_row_for_each_part_and_a_choice_of_runs() -> None:
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Run", "Teacher", "Harvest", "Training", "Evaluation", "Student"]
    (variable,) = DASHBOARD["templating"]["list"]
    assert (variable["name"], variable["query"]["query"]) == ("run", "label_values(distill_stage_state, run)")


def test_prometheus_asks_the_servers_and_the_monitor_by_their_names_in_compose() -> None:
    jobs = read_yaml("prometheus.yml")["scrape_configs"]
    targets = {job["job_name"]: [t for config in job.get("static_configs", ()) for t in config["targets"]] for job in jobs}
    assert targets == {"teacher": ["teacher:9464"], "student": [], "monitor": ["monitor:9464"]}
    (replicas,) = (found for job in jobs for found in job.get("dns_sd_configs", ()))  # each address that compose's DNS has of the name
    assert (replicas["names"], replicas["type"], replicas["port"]) == (["student"], "A", 9464)
    named = {job for job_names in re.findall(r'job=~?"([^"]*)"', " ".join(e for e, _ in QUERIES)) for job in job_names.split("|")}
    assert named == targets.keys()
