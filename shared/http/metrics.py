"""Metrics of a server for Prometheus, at a port of their own: what callers of the API see stays text.

distill_http_requests_total{route, method, status}      requests answered
distill_http_request_duration_seconds{route}            from the request's first byte to the answer's last
distill_http_requests_in_flight                         requests being answered now

Labels take few values: routes are templates, and paths and methods that no route knows share one. Nothing a caller writes is among them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, start_http_server

from shared.errors import SettingsError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

OTHER = "other"
"""The label of every path that is no route, and of every method that no route knows."""
METHODS = ("GET", "HEAD", "POST", "OPTIONS")
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Seconds: from a health check to the longest answer that the client waits for by default."""


class Measured:
    """An ASGI application that counts and times the requests of another."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        # else a second series for each, which tells only when this process began
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._app = app
        self._requests = Counter("distill_http_requests", "Requests answered.", ("route", "method", "status"), registry=registry)
        self._seconds = Histogram(
            "distill_http_request_duration_seconds",
            "From the request to the end of its answer.",
            ("route",),
            buckets=BUCKETS,
            registry=registry,
        )
        self._in_flight = Gauge("distill_http_requests_in_flight", "Requests being answered now.", registry=registry)

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
            self._requests.labels(route, method, status).inc()
            self._seconds.labels(route).observe(time.perf_counter() - began)


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
