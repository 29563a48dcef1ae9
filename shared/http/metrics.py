"""Metrics of a server for Prometheus, at a port of their own: what callers of the API see stays text.

distill_http_requests_total{route, method, status}      requests answered
distill_http_request_duration_seconds{route}            from the request's first byte to the answer's last
distill_http_requests_in_flight                         requests being answered now
distill_engine_duration_seconds                         what of an answer's time the engine took
distill_overhead_seconds                                what the server itself took: neither its engine, nor its queue, nor its caller
distill_queue_duration_seconds                          what requests waited for a place at the engine that found none free
distill_queue_length                                    requests that wait for one now
distill_refusals_total{reason}                          requests refused, by why
distill_characters_total{side}                          characters of prompts and of completions

Labels take few values: routes are templates, and paths and methods that no route knows share one. Nothing a caller writes is among them.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, start_http_server, values
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from shared.errors import SettingsError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

OTHER = "other"
"""The label of every path that is no route, and of every method that no route knows."""
METHODS = ("GET", "HEAD", "POST", "OPTIONS")
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Seconds: from a health check to the longest answer that the client waits for by default."""
OWN_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5)
"""Seconds: what a server adds to its engine's time."""


class Meters:
    """What a server counts about the requests it hands to its engine, in a registry of its own unless one is given."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        # else a second series for each, which tells only when this process began
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry or CollectorRegistry()
        self.engine_s = Histogram("distill_engine_duration_seconds", "The engine's share.", buckets=BUCKETS, registry=self.registry)
        self.own_s = Histogram("distill_overhead_seconds", "The server's own share.", buckets=OWN_BUCKETS, registry=self.registry)
        self.queue_s = Histogram(
            "distill_queue_duration_seconds", "Waiting for the engine.", buckets=(0.001, *BUCKETS), registry=self.registry
        )
        self.queue = Gauge("distill_queue_length", "Requests that wait now.", registry=self.registry, multiprocess_mode="livesum")
        self._refusals = Counter("distill_refusals", "Requests refused.", ("reason",), registry=self.registry)
        characters = Counter("distill_characters", "Characters of texts.", ("side",), registry=self.registry)
        self.prompt, self.completion = characters.labels("prompt"), characters.labels("completion")

    def refused(self, reason: str) -> None:
        self._refusals.labels(reason).inc()


class Measured:
    """An ASGI application that counts and times the requests of another."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._app = app
        self._known: dict[tuple[str, str, str], tuple[Counter, Histogram]] = {}
        self._requests = Counter("distill_http_requests", "Requests answered.", ("route", "method", "status"), registry=registry)
        self._seconds = Histogram(
            "distill_http_request_duration_seconds",
            "From the request to the end of its answer.",
            ("route",),
            buckets=BUCKETS,
            registry=registry,
        )
        self._in_flight = Gauge(
            "distill_http_requests_in_flight", "Requests being answered now.", registry=registry, multiprocess_mode="livesum"
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = "500"  # what uvicorn answers for an application that fails before it does
        began = time.perf_counter()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        self._in_flight.inc()
        try:
            await self._app(scope, receive, watched)
        finally:
            self._in_flight.dec()
            route = scope["route"].path if "route" in scope else OTHER  # the router has put it there
            method = scope["method"] if scope["method"] in METHODS else OTHER
            counter, seconds = self._series(route, method, status)
            counter.inc()
            seconds.observe(time.perf_counter() - began)

    def _series(self, route: str, method: str, status: str) -> tuple[Counter, Histogram]:
        """The two series of such a request; looked up once, since prometheus_client takes longer than all the rest here."""
        key = route, method, status
        if key not in self._known:
            self._known[key] = self._requests.labels(*key), self._seconds.labels(route)
        return self._known[key]


def many_processes() -> None:
    """Let the workers of this server count into files that its first process adds up. To be called before anything is counted."""
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="distill-metrics-")
    atexit.register(shutil.rmtree, os.environ["PROMETHEUS_MULTIPROC_DIR"], ignore_errors=True)
    values.ValueClass = values.get_value_class()  # type: ignore[no-untyped-call]


def forget_process(pid: int) -> None:
    """What a worker that is no more was at work on is under way no more."""
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        mark_process_dead(pid)  # type: ignore[no-untyped-call]


def told_of(registry: CollectorRegistry) -> CollectorRegistry:
    """What is to be exposed of `registry`: itself, or with `many_processes` the sums over all of them."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return registry
    sums = CollectorRegistry()
    MultiProcessCollector(sums)  # type: ignore[no-untyped-call]
    return sums


@contextmanager
def exposed(registry: CollectorRegistry, *, host: str, port: int, option: str) -> Iterator[str]:
    """Serve `registry` from a thread until the block ends; yields its URL. Port 0 picks a free one.

    `option` is what the user calls the port. Raises SettingsError that names it if the address cannot be had.
    """
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OverflowError as exc:
        raise SettingsError(f"{option} {port}: ports go from 0 (picks a free one) to 65535") from exc
    except OSError as exc:
        raise SettingsError(f"{option} {port} on --host {host}: {exc.strerror}; give another (0 picks a free port)") from exc
    shown = f"[{host}]" if ":" in host else host
    try:
        yield f"http://{shown}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
