"""What is asked of a model, and the key by which an answer is known again."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from shared.artifacts import canonical
from shared.contracts import GenerationRequest, Sampling


@dataclass(frozen=True)
class Ask:
    """One prompt to be answered `request.n` times by one model."""

    example_id: str
    request: GenerationRequest
    identity: str
    """Who answers: a URL, or whatever else tells one model from all others."""
    model: str
    """The public name of the model that is asked for."""
    protocol: str = "chat"

    def key(self, sample: int) -> str:
        """The SHA-256 of all that is asked with sample `sample` (from 0).

        How many samples are wanted is no part of it, nor is the example: what is asked alike has the same key.
        """
        return hashlib.sha256(b"%s#%d" % (self._asked(), sample)).hexdigest()

    def sample_keys(self) -> list[str]:
        """The keys of all samples, in order."""
        asked = self._asked()
        return [hashlib.sha256(b"%s#%d" % (asked, sample)).hexdigest() for sample in range(self.request.n)]

    def _asked(self) -> bytes:
        request = self.request
        asked = _WHOM.of(self).copy()
        if request.prompt is not None:
            asked.update(_text("prompt", request.prompt))
        for message in request.messages or ():
            asked.update(_text(message.role, message.content))
        return asked.digest()

    def part(self, samples: range) -> GenerationRequest:
        """The request for some consecutive samples: a part asked for later is asked for as it was in the whole."""
        request = self.request
        if len(samples) == request.n:
            return request
        sampling = request.sampling
        if sampling.seed is not None:
            sampling = sampling.model_copy(update={"seed": sampling.seed + samples[0]})
        return request.model_copy(update={"n": len(samples), "sampling": sampling})


def _text(role: str, text: str) -> bytes:
    """After its length, so that no text can pass for two; half a surrogate pair has a form, too."""
    data = text.encode(errors="surrogatepass")
    return b"%s %d " % (role.encode(), len(data)) + data


class _Whom:
    """What all prompts of a harvest have in common, hashed once."""

    def __init__(self) -> None:
        self._sampling: Sampling | None = None
        self._who = ("", "", "")
        self._hash = hashlib.sha256()

    def of(self, ask: Ask) -> hashlib._Hash:
        sampling = ask.request.sampling
        # one object for all prompts, as a rule: to compare two of them would cost more than all the rest
        if sampling is not self._sampling or (ask.identity, ask.protocol, ask.model) != self._who:
            self._sampling, self._who = sampling, (ask.identity, ask.protocol, ask.model)
            asked = {"identity": ask.identity, "protocol": ask.protocol, "model": ask.model, "sampling": sampling.model_dump(mode="json")}
            self._hash = hashlib.sha256(canonical(asked))
        return self._hash


_WHOM = _Whom()
