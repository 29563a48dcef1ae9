"""Settings of the teacher's server: flags over TEACHER_* variables over defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from shared.settings import DEFAULT_QUANTIZATION, Quantization


class TeacherServiceSettings(BaseSettings):
    """Who answers, under which name, at which address."""

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

    api_keys: SecretStr | None = None
    """Who may ask: NAME=KEY, with commas between them."""
    api_keys_file: Path | None = None
    """Who may ask: a keys file (see shared/http/keys.py). Beside `api_keys`: both."""
    no_auth: bool = False
    """Answer whoever reaches the port, if no key is given."""
    requests_per_minute: int | None = Field(None, ge=1, le=100_000)
    """Of each key that has no limit of its own in the keys file; without keys, of all callers together. Likewise the next two."""
    characters_per_day: int | None = Field(None, ge=1)
    """Generated ones, from midnight to midnight UTC, while the server lives."""
    concurrent_requests: int | None = Field(None, ge=1)

    max_body_bytes: int = Field(1 << 20, ge=1024)
    max_prompt_characters: int = Field(100_000, ge=1)
    """Over all turns of a chat."""
    max_n: int = Field(64, ge=1, le=64)
    max_tokens: int = Field(4096, ge=1, le=4096)
    max_in_flight: int = Field(1024, ge=1)
    """Requests at the engine, of each worker; others wait."""
    max_queue: int = Field(1024, ge=0)
    """Requests that wait, of each worker; others are refused with 429."""
    queue_s: float = Field(60.0, gt=0)
    """Seconds that a request may wait."""
    workers: int = Field(1, ge=1, le=64)
    """upstream, scripted: processes that answer. A local model runs in one, on all cores."""
    drain_s: int | None = Field(None, ge=1)
    """Seconds that requests in flight get to finish after a signal to stop; None: 7, since container engines kill 10 s after theirs."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """info: a line for every request, without its texts."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    """0 picks a free one."""
    metrics_port: int | None = Field(None, ge=0, le=65535)
    """Numbers for Prometheus are told there, on the same host; None: nowhere. 0 picks a free one."""

    @field_validator("upstream_url", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _upstream_is_named(self) -> TeacherServiceSettings:
        if self.engine == "upstream" and not (self.upstream_url and self.upstream_model):
            raise ValueError("engine upstream needs upstream_url (with its /v1) and upstream_model")
        if self.engine == "local" and self.workers > 1:
            raise ValueError("workers: a local model runs in one process, which uses all cores; leave workers out")
        return self
