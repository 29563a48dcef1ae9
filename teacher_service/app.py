"""The teacher's application: the shared HTTP face over the engine that its settings name, for those who hold a key."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import fields

from fastapi import FastAPI

from shared.engines import Engine
from shared.errors import SettingsError
from shared.http.app import create_app
from shared.http.face import Bounds
from shared.http.keys import KeyEntry, KeyLimits, Keys, parse_keys, read_keys
from shared.http.limits import Counts
from shared.http.metrics import Meters
from shared.settings import read_secret
from teacher_service.settings import TeacherServiceSettings
from teacher_service.upstream import UpstreamEngine


def teacher_app(settings: TeacherServiceSettings, *, keys: Keys, counts: Counts, meters: Meters) -> FastAPI:
    """Raises SettingsError and, for a model that cannot be loaded, EngineError."""
    engine = engine_of(settings)
    return create_app(
        engine,
        model=settings.public_name,
        title="Teacher",
        keys=keys,
        counts=counts,
        bounds=Bounds(**{bound.name: getattr(settings, bound.name) for bound in fields(Bounds) if hasattr(settings, bound.name)}),
        meters=meters,
        with_usage=settings.usage == "text",
        beside=engine.probing if isinstance(engine, UpstreamEngine) else nullcontext,
    )


def keys_of(settings: TeacherServiceSettings) -> Keys:
    """Who may ask. Raises SettingsError if nobody may and this was not said, and for keys that are weak or cannot be read."""
    entries: dict[str, KeyEntry] = read_keys(settings.api_keys_file) if settings.api_keys_file else {}
    for name, entry in parse_keys(settings.api_keys.get_secret_value() if settings.api_keys else "").items():
        if name in entries:
            raise SettingsError(f"api_keys: {name} stands in the keys file as well")
        entries[name] = entry
    if not entries and (settings.api_keys_file or settings.api_keys):
        raise SettingsError("api_keys, api_keys_file: no key is in them; put one there (`distill keygen NAME`), or leave them out")
    if not entries and not settings.no_auth:
        raise SettingsError(
            "no API key is given: make one with `distill keygen NAME` and name its file with --api-keys-file, or say --no-auth: "
            "then whoever reaches the port may ask"
        )
    general = KeyLimits(**{name: getattr(settings, name) for name in KeyLimits.model_fields})
    return Keys(entries, general)


def engine_of(settings: TeacherServiceSettings) -> Engine:
    """The engine that `settings` name; each imports only what it needs."""
    if settings.engine == "scripted":
        from shared.engines.scripted import ScriptedEngine

        return ScriptedEngine(delay_s=settings.delay_s)
    if settings.engine == "local":
        from shared.engines.local import LocalEngine, LocalModel
        from shared.models import serving_folder

        return LocalEngine(LocalModel(serving_folder(settings.model_ref, settings.quantization)))
    assert settings.upstream_model is not None
    return UpstreamEngine(
        settings.upstream_url,
        model=settings.upstream_model,
        api_key=read_secret(settings.upstream_key, settings.upstream_key_file, "upstream_key"),
        timeout_s=settings.upstream_timeout_s,
    )
