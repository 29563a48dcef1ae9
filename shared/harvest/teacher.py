"""What a harvest asks: one attempt at one request, whatever protocol the teacher speaks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from shared.contracts import Completion, GenerationRequest
from shared.errors import FailureClass


@dataclass(frozen=True, slots=True)
class Refusal:
    """A choice that is no answer, and why."""

    kind: FailureClass
    message: str

    @property
    def reason(self) -> str:
        """As a ledger line has it: the class first."""
        return f"{self.kind}: {self.message}"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one request: at most `n` choices, in the teacher's order, and what it says it has counted."""

    choices: tuple[Completion | Refusal, ...]
    input_tokens: int | None = None
    output_tokens: int | None = None
    """Of all choices together. None: the teacher does not say."""
    version: str | None = None
    """Of the model that has answered, where it says so."""


class Teacher(Protocol):
    """One attempt at a time: who asks decides on repeating."""

    @property
    def most_choices(self) -> int | None:
        """Choices a request may ask for; None: as many as one likes."""
        ...

    async def ask(self, request: GenerationRequest) -> Answer:
        """Raises by what can be done about it:

        TeacherBusy (429; may say when to come back), TeacherLate (no answer in time), TeacherFailed (5xx, or an answer that broke
        off or cannot be read), plain TeacherUnavailable (never reached: nothing was sent): worth another attempt.
        RequestRefused: this request alone; of it RequestForbidden (403): unless nothing was answered so far. NotTheApi: an answer of
        something else, the wrong URL if it is the first one.
        Any other TeacherRejected: asking cannot help (key refused, certificate, out of credit).
        """
        ...

    def rendered(self, request: GenerationRequest) -> str:
        """What would be sent, for a person to read: method, URL and body, and of the headers the names alone."""
        ...

    async def aclose(self) -> None: ...
