"""Settings of the student's server: flags over STUDENT_* variables over defaults."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class StudentServiceSettings(BaseSettings):
    """Which student, at which address. Exactly one of `registry` and `model_dir`."""

    # compose passes a variable that nobody set as an empty one
    model_config = SettingsConfigDict(env_prefix="STUDENT_", extra="forbid", frozen=True, env_ignore_empty=True)

    registry: Path | None = None
    """Serve what is promoted there, now or later; it need not exist yet."""
    model_dir: Path | None = None
    """Serve this serving folder, promoted or not, with the default task."""
    public_name: str = Field("student", min_length=1)
    """The model name that requests give."""
    host: str = "127.0.0.1"
    port: int = Field(8080, ge=0, le=65535)
    """0 picks a free one."""
    metrics_port: int | None = Field(None, ge=0, le=65535)
    """Numbers for Prometheus are told there, on the same host; None: nowhere. 0 picks a free one."""

    @model_validator(mode="after")
    def _one_source(self) -> StudentServiceSettings:
        if (self.registry is None) == (self.model_dir is None):
            raise ValueError("give exactly one of registry (--registry DIR) and model_dir (--model-dir DIR)")
        return self
