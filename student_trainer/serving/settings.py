"""Settings of the student's server: flags over STUDENT_* variables over defaults."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from shared.engines.local import BATCH_ROWS, Layout
from shared.http.settings import ServerSettings
from shared.settings import DEFAULT_QUANTIZATION, Quantization


class StudentServiceSettings(ServerSettings):
    """Which student, how it computes, who is shown beside it. Exactly one of `registry` and `model_dir`."""

    # compose passes a variable that nobody set as an empty one
    model_config = SettingsConfigDict(env_prefix="STUDENT_", extra="forbid", frozen=True, env_ignore_empty=True)

    registry: Path | None = None
    """Serve what is promoted there, now or later; it need not exist yet."""
    model_dir: Path | None = None
    """Serve this serving folder, promoted or not, with the default task."""
    public_name: str = Field("student", min_length=1)
    """The model name that requests give."""

    device: Literal["cpu", "cuda"] = "cpu"
    device_index: Annotated[tuple[int, ...], NoDecode] = (0,)
    """cuda: the GPUs, each with a copy of the student."""
    compute_type: str | None = None
    """A compute type of CTranslate2; None: by how the weights are stored, on GPUs in 16 bits."""
    threads: str = "auto"
    """cpu: BATCHESxCORES, e.g. 2x1: batches decoded side by side, and cores of each. auto: the fastest, measured with the first student."""
    max_batch: int = Field(BATCH_ROWS, ge=1, le=1024)
    """Completions of one batch."""
    max_batch_tokens: int = Field(640, ge=1)
    """Tokens of one batch of a decoder-only student. With 50,000 words they take 0.3 MB each, in every batch side by side."""
    max_queue: int = Field(256, ge=1)
    """Requests that wait for a batch; others are refused with 429."""
    deadline_s: float = Field(60.0, gt=0)
    """Seconds for one answer, waiting included."""

    base: str | None = None
    """The undistilled student (a model reference or a serving folder), to be asked as `base`; loaded when it is asked first."""
    base_quantization: Quantization = DEFAULT_QUANTIZATION
    teacher_url: str | None = None
    """An OpenAI-compatible URL with its /v1, to be asked as `teacher`."""
    teacher_model: str = "teacher"
    """The teacher's name there."""
    teacher_key: SecretStr | None = None
    teacher_key_file: Path | None = None
    run: Path | None = None
    """A run directory whose live state GET /v1/run tells."""

    max_prompt_characters: int = Field(20_000, ge=1)
    """Of one prompt, over all turns of a chat."""
    max_n: int = Field(16, ge=1, le=64)
    max_tokens: int = Field(512, ge=1, le=4096)
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    """info: a line for every request, without its texts."""
    port: int = Field(8080, ge=0, le=65535)
    """0 picks a free one."""

    @property
    def layout(self) -> Layout | None:
        """What `threads` says; None: nothing."""
        return None if self.threads == "auto" else Layout(*map(int, self.threads.split("x")))

    @field_validator("threads")
    @classmethod
    def _is_a_layout(cls, value: str) -> str:
        if value != "auto" and not re.fullmatch(r"[1-9]\d{0,2}x[1-9]\d{0,2}", value):
            raise ValueError("auto, or BATCHESxCORES as in 2x1")
        return value

    @field_validator("device_index", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_source(self) -> StudentServiceSettings:
        if (self.registry is None) == (self.model_dir is None):
            raise ValueError("give exactly one of --registry DIR and --model-dir DIR")
        return self
