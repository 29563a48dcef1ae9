"""Settings of the teacher's server: flags over TEACHER_* variables over defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.settings import DEFAULT_QUANTIZATION, Quantization


class TeacherServiceSettings(BaseSettings):
    """Who answers, under which name, at which address."""

    model_config = SettingsConfigDict(env_prefix="TEACHER_", env_ignore_empty=True, extra="forbid", frozen=True)

    engine: Literal["upstream", "local", "scripted"] = "local"
    """upstream: another OpenAI-compatible server, e.g. vLLM. local: a model in this process. scripted: no model, for dry runs."""
    upstream_url: str | None = None
    """upstream: base URL with its /v1."""
    upstream_model: str | None = None
    """upstream: the name it knows the model by."""
    upstream_key: SecretStr | None = None
    upstream_key_file: Path | None = None
    upstream_timeout_s: float = Field(120.0, gt=0)
    """Seconds allowed for one attempt at one request."""
    upstream_attempts: int = Field(2, ge=1)
    """Attempts at one request; who asks this server retries by itself."""
    model_ref: str = "embedded:smollm2-135m-questions"
    """local: a model reference (see shared/models.py) or a serving folder."""
    quantization: Quantization = DEFAULT_QUANTIZATION
    """local: of a model that has to be converted first."""
    delay_s: float = Field(0.0, ge=0)
    """scripted: seconds before every answer."""
    public_name: str = Field("teacher", min_length=1)
    """The model name that requests give, and all that answers tell of the model."""
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    """0 picks a free one."""
    metrics_port: int | None = Field(None, ge=0, le=65535)
    """Numbers for Prometheus are told there, on the same host; None: nowhere. 0 picks a free one."""

    @model_validator(mode="after")
    def _upstream_is_named(self) -> TeacherServiceSettings:
        if self.engine == "upstream" and (self.upstream_url is None or self.upstream_model is None):
            raise ValueError("engine upstream needs upstream_url (with its /v1) and upstream_model")
        return self
