"""What training says of itself while it goes on: a ledger line an optimizer step, a line on the terminal."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from shared.artifacts import Ledger
from shared.commands import Progress
from shared.contracts import Contract


class LogRow(Contract):
    """One optimizer step. Log-probabilities are means over a response's tokens, in nats."""

    step: int
    epoch: float
    loss: float
    nll: float
    """A chosen token."""
    odds_ratio: float | None = None
    """L_OR a pair; like the next five None without rejected responses."""
    accuracy: float | None = None
    """Share of pairs whose chosen response is the more likely one, by mean log-probability."""
    logp_chosen: float | None = None
    logp_rejected: float | None = None
    margin: float | None = None
    """logp_chosen - logp_rejected."""
    kl_reference: float | None = None
    """A chosen token; None where its weight is 0, like the next two."""
    kl_teacher_sequence: float | None = None
    """A prompt."""
    kl_teacher_token: float | None = None
    """A prompt."""
    grad_norm: float
    learning_rate: float
    tokens_per_s: float
    """Tokens of packed rows, without padding, by the seconds of the step."""
    padding_ratio: float
    """All cells of the step's rows by those that hold a token."""


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Writes a log line for every step, once: steps repeated after a kill are in the log already."""

    def __init__(self, log: Ledger[LogRow], *, what: str = "train") -> None:
        logged = log.rows()
        self._log, self._logged, self._what = log, logged[-1].step if logged else 0, what

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress = Progress(self._what, state.max_steps, unit="steps", done=state.global_step, every_s=5.0)

    def record(self, row: LogRow) -> None:
        if row.step > self._logged:
            self._log.append(row)
            self._logged = row.step
        note = f"loss {row.loss:.3f}, nll {row.nll:.3f}"
        if row.odds_ratio is not None:
            note += f", odds ratio {row.odds_ratio:.3f}, accuracy {row.accuracy:.2f}, margin {row.margin:.2f}"
        self._progress.step(note=f"{note}, {row.tokens_per_s:.0f} tokens/s")
