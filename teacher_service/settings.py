"""Settings of the teacher's server: flags over TEACHER_* variables over defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from shared.http.settings import ServerSettings
from shared.settings import DEFAULT_QUANTIZATION, Quantization


class TeacherServiceSettings(ServerSettings):
    """Who answers, under which name, to whom."""

    model_config = SettingsConfigDict(env_prefix="TEACHER_", env_ignore_empty=True, extra="forbid", frozen=True)

    engine: Literal["upstream", "local", "scripted"] = "local"
    """upstream: another OpenAI-compatible server, e.g. vLLM. local: a model in this process. scripted: no model, for dry runs."""
    upstream_url: Annotated[tuple[str, ...], NoDecode] = ()
    """upstream: base URLs with their /v1, of servers of one and the same model; as a variable with commas between them."""
    upstream_model: str | None = None
    """upstream: the name it knows the model by."""
    upstream_key: SecretStr | None = None
    upstream_key_file: Path | None = None
    upstream_timeout_s: float = Field(120.0, gt=0)
    """Seconds allowed for one whole answer, or for the next piece of a streamed one."""
    model_ref: str = "embedded:smollm2-135m-questions"
    """local: a model reference (see shared/models.py) or a serving folder."""
    quantization: Quantization = DEFAULT_QUANTIZATION
    """local: of a model that has to be converted first."""
    delay_s: float = Field(0.0, ge=0)
    """scripted: seconds before every answer."""
    public_name: str = Field("teacher", min_length=1)
    """The model name that requests give, and all that answers tell of the model."""
    usage: Literal["text", "none"] = "text"
    """text: answers tell their characters and words. Tokens are never told: they are the engine's."""

    max_in_flight: int = Field(1024, ge=1)
    """Requests at the engine, of each worker; others wait."""
    max_queue: int = Field(1024, ge=0)
    """Requests that wait, of each worker; others are refused with 429."""
    queue_s: float = Field(60.0, gt=0)
    """Seconds that a request may wait."""
    workers: int = Field(1, ge=1, le=64)
    """upstream, scripted: processes that answer. A local model runs in one, on all cores."""

    port: int = Field(8000, ge=0, le=65535)
    """0 picks a free one."""

    @field_validator("upstream_url", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _upstream_is_named(self) -> TeacherServiceSettings:
        if self.engine == "upstream" and not (self.upstream_url and self.upstream_model):
            raise ValueError("engine upstream needs --upstream-url (with its /v1) and --upstream-model")
        if self.engine == "local" and self.workers > 1:
            raise ValueError("--workers: a local model runs in one process, which uses all cores; leave it out")
        return self
