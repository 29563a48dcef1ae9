"""The words in which a task is put to a model, zero- and few-shot, as chat turns or as plain text: the only place.

A prompt is built from a task's settings and a question alone, so that teacher, student, training and serving agree to the letter.
"""

from __future__ import annotations

from collections.abc import Sequence

from shared.contracts import Example, Message
from shared.settings import TaskSettings

SUMMARISE_QUESTION = "Summarize this health message as one short question."
GAP = " ... "


def clip(text: str, max_chars: int) -> str:
    """`text` with runs of white space folded, and its middle cut out if it is longer than `max_chars` characters.

    People greet first and often ask last, so both ends are kept.
    """
    text = " ".join(text.split())
    if len(text) <= max_chars:
        return text
    keep = max_chars - len(GAP)
    if keep < 2:  # no room for both ends
        return text[:max_chars]
    head = (keep + 1) // 2
    return text[:head].rstrip() + GAP + text[len(text) - (keep - head) :].lstrip()


def zero_shot(task: TaskSettings, question: str) -> str:
    """The task as one text: the `prompt` of a triplet, the input of an encoder-decoder, the user's turn of a chat."""
    return f"{task.instruction or SUMMARISE_QUESTION}\n\n{clip(question, task.max_question_chars)}"


def messages(task: TaskSettings, question: str, shots: Sequence[Example] = ()) -> tuple[Message, ...]:
    """The task as chat turns; each shot is a turn of the user and one of the assistant."""
    turns: list[Message] = []
    for shot in shots:
        turns += [Message(role="user", content=zero_shot(task, shot.question)), Message(role="assistant", content=shot.summary or "")]
    return (*turns, Message(role="user", content=zero_shot(task, question)))


def plain(task: TaskSettings, question: str, shots: Sequence[Example] = ()) -> str:
    """The task as plain text, for encoder-decoders and completion APIs. Without shots it is `zero_shot`."""
    if not shots:
        return zero_shot(task, question)
    instruction = task.instruction or SUMMARISE_QUESTION
    solved = [f"Message: {clip(s.question, task.max_question_chars)}\nQuestion: {s.summary}" for s in shots]
    return "\n\n".join([instruction, *solved, f"Message: {clip(question, task.max_question_chars)}\nQuestion:"])
