"""Chat templates: which are taken, and what is said of those that fail."""

from __future__ import annotations

import pytest
import tiny_models

from shared.contracts import GenerationRequest, Message
from shared.engines.encoding import PromptEncoder
from shared.errors import EngineError

ASKED = GenerationRequest(messages=(Message(role="user", content="w1 w2"),))


def encoder(template: str | dict[str, str]) -> PromptEncoder:
    made = tiny_models.tokenizer(appends_eos=False)
    made.chat_template = template
    return PromptEncoder.from_transformers(made)


@pytest.mark.parametrize("template", ["{% for %}", "{% generation %}{% endgeneration %}"])
def test_a_template_that_is_none_is_told(template: str) -> None:
    with pytest.raises(EngineError, match="chat template cannot be read"):
        encoder(template)


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ 1 + 'a' }}", "{{ 1 / 0 }}", "{{ messages[7].content.x }}"])
def test_a_template_that_fails_in_any_way_is_told(template: str) -> None:
    with pytest.raises(EngineError, match="chat template refuses these messages"):
        encoder(template).encode(ASKED)


def test_of_several_templates_the_one_for_plain_chat_is_taken() -> None:
    plain = "{{ messages[0].content }}"
    assert encoder({"default": plain, "tool_use": "w9"}).encode(ASKED) == encoder(plain).encode(ASKED)
    with pytest.raises(EngineError, match="chat templates for tool_use and none for plain chat"):
        encoder({"tool_use": "w9"})
