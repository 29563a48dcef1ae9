"""The words of the task: cut to length, alike for all, zero-shot and few-shot."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from shared.contracts import Example
from shared.prompts import GAP, SUMMARISE_QUESTION, clip, messages, plain, zero_shot
from shared.settings import TaskSettings

TASK = TaskSettings()
SHOTS = (Example(id="a", question="Long  A", summary="A?"), Example(id="b", question="Long B", summary="B?"))


@given(st.text(), st.integers(1, 60))
@example("x" * 61, 60)
@example("ab cd", 1)
def test_a_clipped_text_is_never_longer_than_allowed_and_a_short_one_is_only_folded(text: str, most: int) -> None:
    folded, clipped = " ".join(text.split()), clip(text, most)
    assert len(clipped) <= most
    if len(folded) <= most:
        assert clipped == folded
    assert clip(text, 10_000) == folded


def test_the_middle_is_cut_and_both_ends_are_kept() -> None:
    clipped = clip("first " + "x" * 500 + " last?", 40)
    assert clipped.startswith("first ")
    assert clipped.endswith(" last?")
    assert GAP in clipped


def test_zero_shot_is_the_instruction_and_the_question_in_every_form() -> None:
    text = f"{SUMMARISE_QUESTION}\n\nWhat is it?"
    assert zero_shot(TASK, "What  is it?") == plain(TASK, "What is it?") == text
    assert [(m.role, m.content) for m in messages(TASK, "What is it?")] == [("user", text)]


def test_an_instruction_of_ones_own_takes_the_place_of_ours() -> None:
    task = TaskSettings(instruction="Do it.")
    assert zero_shot(task, "q") == "Do it.\n\nq"
    assert plain(task, "q", SHOTS).startswith("Do it.\n\n")


def test_shots_are_turns_of_a_chat_or_solved_examples_of_a_plain_text() -> None:
    turns = messages(TASK, "q", SHOTS)
    assert [m.role for m in turns] == ["user", "assistant", "user", "assistant", "user"]
    assert [m.content for m in turns[1::2]] == ["A?", "B?"]
    assert plain(TASK, "q", SHOTS) == (
        f"{SUMMARISE_QUESTION}\n\nMessage: Long A\nQuestion: A?\n\nMessage: Long B\nQuestion: B?\n\nMessage: q\nQuestion:"
    )
