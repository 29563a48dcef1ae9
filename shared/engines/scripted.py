"""A pretended teacher without weights: answers are a pure function of what is asked, for tests and dry runs."""

from __future__ import annotations

import asyncio
import hashlib
import random
import re

from shared.contracts import Completion, GenerationRequest, Sampling
from shared.errors import RequestRefused

GREEDY = "What should I know about {}?"
SAMPLED = (
    "What are the treatments for {}?",
    "What causes {}?",
    "How is {} treated?",
    "Where can I find information on {}?",
    "What should I know about {}?",
    "Is {} dangerous?",
)
_WORD = re.compile(r"[^\W\d_][^\W\d_'-]{2,}")


class ScriptedEngine:
    """An `Engine` that asks a short question about long words of the last paragraph of the prompt or of the last turn that has text.

    The same prompt, temperature and seed give the same text in every process; sample i uses seed + i. A token is a word.
    """

    def __init__(self, *, delay_s: float = 0.0) -> None:
        """`delay_s`: seconds before every answer, as a real teacher takes them."""
        self._delay_s = delay_s

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        """`request.n` completions. Raises RequestRefused for a prompt without text."""
        texts = [request.prompt or ""] if request.messages is None else [m.content for m in request.messages if m.content.strip()]
        text = texts[-1] if texts else ""
        if not text.strip():
            raise RequestRefused("the prompt is empty")
        await asyncio.sleep(self._delay_s)
        return [answer(text, request.sampling, sample) for sample in range(request.n)]

    async def check(self) -> None:
        """Always ready."""

    async def aclose(self) -> None:
        """Nothing to let go of."""


def answer(text: str, sampling: Sampling, sample: int) -> Completion:
    """The scripted answer number `sample` to a prompt."""
    words = list(dict.fromkeys(_WORD.findall(text.strip().rpartition("\n\n")[2]))) or ["this"]
    longest = sorted(words, key=len, reverse=True)
    if sampling.temperature == 0:
        template, topic = GREEDY, longest[:2]
    else:
        asked = f"{text}\0{sampling.temperature}\0{(sampling.seed or 0) + sample}"
        chance = random.Random(hashlib.sha256(asked.encode()).digest())
        template, topic = chance.choice(SAMPLED), chance.sample(longest[:6], min(len(longest), chance.randint(1, 3)))
    spoken = template.format(" and ".join(topic)).split(" ")
    said = " ".join(spoken[: sampling.max_tokens])
    cuts = [at for stop in sampling.stop if (at := said.find(stop)) >= 0]
    ended = bool(cuts) or len(spoken) <= sampling.max_tokens
    return Completion(text=said[: min(cuts, default=len(said))], finish_reason="stop" if ended else "length")
