"""The scripted engine: the same question asked anywhere gets the same answer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from shared.contracts import Completion, GenerationRequest, Message, Sampling
from shared.engines.scripted import ScriptedEngine
from shared.errors import RequestRefused

PROMPT = "Summarize this.\n\nI take ibuprofen against migraine."


def answers(prompt: str = PROMPT, n: int = 1, **sampling: Any) -> list[Completion]:
    return asyncio.run(ScriptedEngine().generate(GenerationRequest(prompt=prompt, n=n, sampling=Sampling(**sampling))))


def test_a_greedy_answer_asks_about_the_two_longest_words_of_the_last_paragraph() -> None:
    assert answers() == [Completion(text="What should I know about ibuprofen and migraine?", finish_reason="stop")]


def test_a_chat_is_answered_like_its_last_message_as_plain_text() -> None:
    chat = GenerationRequest(messages=(Message(role="user", content="other words"), Message(role="user", content=PROMPT)))
    assert asyncio.run(ScriptedEngine().generate(chat)) == answers()


def test_greedy_samples_are_all_the_same_and_warm_ones_vary() -> None:
    assert len({c.text for c in answers(n=8)}) == 1
    assert len({c.text for c in answers(n=8, temperature=0.8, seed=0)}) > 3


def test_a_sample_asked_for_alone_is_the_one_that_came_among_many() -> None:
    many = answers(n=8, temperature=0.8, seed=10)
    assert [answers(temperature=0.8, seed=10 + i)[0] for i in range(8)] == many


def test_a_sampled_answer_is_fixed_for_all_processes_and_versions() -> None:
    assert answers(temperature=0.8, seed=1)[0].text == "What causes migraine?"


def test_an_answer_of_more_words_than_allowed_is_cut_off_for_its_length() -> None:
    assert answers(max_tokens=3) == [Completion(text="What should I", finish_reason="length")]
    assert answers(max_tokens=8)[0].finish_reason == "stop"
    assert answers(max_tokens=7)[0].finish_reason == "length"


def test_an_answer_ends_before_a_stop_text() -> None:
    assert answers(stop=(" know",)) == [Completion(text="What should I", finish_reason="stop")]


def test_a_prompt_without_words_has_an_answer_and_one_without_text_is_refused() -> None:
    assert answers("12 34")[0].text == "What should I know about this?"
    with pytest.raises(RequestRefused):
        answers(" \n ")
