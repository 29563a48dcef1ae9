"""Keys: what is asked alike has the same key, and nothing else has."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shared.contracts import GenerationRequest, Message, Sampling
from shared.harvest.ask import Ask

BASE = Ask("e", GenerationRequest(prompt="p", n=2, sampling=Sampling(seed=1)), "http://a/v1", "m", "completions")


def asking(request: GenerationRequest) -> Ask:
    return Ask(BASE.example_id, request, BASE.identity, BASE.model, BASE.protocol)


def chat(*turns: tuple[str, str]) -> Ask:
    return asking(GenerationRequest.model_validate({"messages": tuple({"role": role, "content": text} for role, text in turns)}))


def test_a_key_changes_with_everything_that_is_asked() -> None:
    others = [
        Ask("e", BASE.request, "http://b/v1", BASE.model, BASE.protocol),
        Ask("e", BASE.request, BASE.identity, "n", BASE.protocol),
        Ask("e", BASE.request, BASE.identity, BASE.model, "chat"),
        asking(GenerationRequest(prompt="q", sampling=Sampling(seed=1))),
        asking(GenerationRequest(messages=(Message(role="user", content="p"),), sampling=Sampling(seed=1))),
    ]
    samplings = [
        Sampling(),
        Sampling(seed=2),
        Sampling(seed=1, temperature=0.5),
        Sampling(seed=1, top_p=0.5),
        Sampling(seed=1, stop=("\n",)),
        Sampling(seed=1, max_tokens=9),
    ]
    others += [asking(GenerationRequest(prompt="p", sampling=sampling)) for sampling in samplings]
    keys = [BASE.key(0), BASE.key(1), *(other.key(0) for other in others)]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 64 and int(key, 16) >= 0 for key in keys)


def test_a_key_does_not_change_with_the_example_nor_the_number_of_samples() -> None:
    assert Ask("other", BASE.request, BASE.identity, BASE.model, BASE.protocol).key(1) == BASE.key(1)
    assert asking(BASE.request.model_copy(update={"n": 9})).key(1) == BASE.key(1)


def test_keys_are_the_same_in_another_process() -> None:
    """They stand in ledgers: a change of this value asks everybody's teachers for everything again."""
    assert BASE.key(0) == "5a04c34c242bc50e99cc1c1c9433c4b4c01df31c418100c69eb5ca44887ffb57"


def test_a_system_prompt_a_shot_and_where_a_turn_ends_are_part_of_what_is_asked() -> None:
    asks = [
        chat(("user", "a")),
        chat(("system", "s"), ("user", "a")),
        chat(("system", "S"), ("user", "a")),
        chat(("user", "b"), ("assistant", "c"), ("user", "a")),
        chat(("user", 'b"assistant"c"user"a')),
        chat(("user", "b"), ("user", "a")),
        chat(("user", "ba")),
        chat(("assistant", "a")),
    ]
    assert len({ask.key(0) for ask in asks}) == len(asks)


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(max_size=5)), min_size=1, max_size=4), st.data())
def test_two_chats_share_a_key_only_if_they_are_the_same(turns: list[tuple[str, str]], data: st.DataObject) -> None:
    other = data.draw(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(max_size=5)), min_size=1, max_size=4))
    assert (chat(*turns).key(0) == chat(*other).key(0)) == (turns == other)


def test_a_prompt_that_is_no_whole_text_has_a_key() -> None:
    assert asking(GenerationRequest(prompt="half \ud83d of a smile")).key(0) != asking(GenerationRequest(prompt="half ? of a smile")).key(0)


def test_a_part_is_asked_for_as_it_was_in_the_whole() -> None:
    ask = asking(GenerationRequest(prompt="p", n=5, sampling=Sampling(seed=100)))
    assert ask.part(range(5)) == ask.request
    part = ask.part(range(3, 5))
    assert (part.n, part.sampling.seed, part.prompt) == (2, 103, "p")
    assert asking(GenerationRequest(prompt="p", n=5)).part(range(3, 5)).sampling.seed is None
