"""The teacher's application: the shared HTTP face over the engine that its settings name."""

from __future__ import annotations

from fastapi import FastAPI

from shared.engines import Engine
from shared.http.app import create_app
from shared.settings import read_secret
from teacher_service.settings import TeacherServiceSettings


def teacher_app(settings: TeacherServiceSettings) -> FastAPI:
    """Raises SettingsError and, for a model that cannot be loaded, EngineError."""
    return create_app(engine_of(settings), model=settings.public_name, title="Teacher")


def engine_of(settings: TeacherServiceSettings) -> Engine:
    """The engine that `settings` name; each imports only what it needs."""
    if settings.engine == "scripted":
        from shared.engines.scripted import ScriptedEngine

        return ScriptedEngine(delay_s=settings.delay_s)
    if settings.engine == "local":
        from shared.engines.local import LocalEngine, LocalModel
        from shared.models import serving_folder

        return LocalEngine(LocalModel(serving_folder(settings.model_ref, settings.quantization)))
    from teacher_service.upstream import UpstreamEngine

    assert settings.upstream_url is not None
    assert settings.upstream_model is not None
    return UpstreamEngine.at(
        settings.upstream_url,
        model=settings.upstream_model,
        api_key=read_secret(settings.upstream_key, settings.upstream_key_file, "upstream_key"),
        timeout_s=settings.upstream_timeout_s,
        max_attempts=settings.upstream_attempts,
    )
