"""The teacher's application: the shared HTTP face over the engine that its settings name, for those who hold a key."""

from __future__ import annotations

from contextlib import nullcontext

from fastapi import FastAPI

from shared.engines import Engine
from shared.engines.upstream import UpstreamEngine
from shared.http.app import create_app
from shared.http.keys import Keys
from shared.http.limits import Counts
from shared.http.metrics import Meters
from shared.settings import read_secret
from teacher_service.settings import TeacherServiceSettings


def teacher_app(settings: TeacherServiceSettings, *, keys: Keys, counts: Counts, meters: Meters) -> FastAPI:
    """Raises SettingsError and, for a model that cannot be loaded, EngineError."""
    engine = engine_of(settings)
    return create_app(
        engine,
        model=settings.public_name,
        title="Teacher",
        keys=keys,
        counts=counts,
        bounds=settings.bounds,
        meters=meters,
        with_usage=settings.usage == "text",
        beside=engine.probing if isinstance(engine, UpstreamEngine) else nullcontext,
    )


def engine_of(settings: TeacherServiceSettings) -> Engine:
    """The engine that `settings` name; each imports only what it needs."""
    if settings.engine == "scripted":
        from shared.engines.scripted import ScriptedEngine

        return ScriptedEngine(delay_s=settings.delay_s)
    if settings.engine == "local":
        from shared.engines.batching import LocalEngine
        from shared.engines.local import LocalModel
        from shared.models import serving_folder

        model = LocalModel(serving_folder(settings.model_ref, settings.quantization))
        # those that wait do so in its own queue, where batches are made of them
        return LocalEngine(model, max_waiting=max(1, settings.max_queue), wait_s=settings.queue_s)
    assert settings.upstream_model is not None
    return UpstreamEngine(
        settings.upstream_url,
        model=settings.upstream_model,
        api_key=read_secret(settings.upstream_key, settings.upstream_key_file, "upstream_key"),
        timeout_s=settings.upstream_timeout_s,
    )
