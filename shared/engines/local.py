"""A model in this process: CTranslate2 in batches, for stages; servers put a `LocalEngine` (batching.py) over it."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from shared.commands import install
from shared.contracts import Completion, GenerationRequest, Sampling, ServingConfig
from shared.engines.encoding import PromptEncoder
from shared.errors import EngineError, RequestRefused

TOP_K = 50
"""Samples are drawn from the 50 likeliest tokens: without a bound CTranslate2 sorts the whole vocabulary at every step."""
SEEDED_WORKERS = 2
"""Workers of seeded sampling, each with a copy of the model. Part of what is sampled: with others the same seed gives other texts."""
BATCH_ROWS = 32
"""Completions decoded side by side; more hardly raise the throughput of a processor and cost memory."""
COMPUTE_TYPES = {
    "cpu": {"int8": "int8_float32", "float16": "float32", "float32": "float32"},
    "cuda": {"int8": "int8_float16", "float16": "float16", "float32": "float32"},
}
"""What is computed in, by how the weights are stored: few processors have 16-bit arithmetic that is worth its loss. Of encoder-decoders in
float16 see `compute_type`."""
LEAST = 1e-4
"""Of a temperature or a top_p: below it the likeliest token is drawn all the same."""
QUICK_CHARACTERS = 2000
"""Of a prompt: to encode these takes no more than to hand it over to a thread."""
KNOWN_STOPS = 8
"""Sets of stop texts whose tokens are remembered: to find them takes a tenth of a second, to keep them up to 3 MB each."""
LEEWAY = 4
"""Tokens without text that may stand within a stop text."""
LENGTH_SPREAD = 16
"""Most tokens by which prompts of one batch differ: a decoder-only model reads what the shortest lacks one token at a time."""


class Layout(NamedTuple):
    """How processor cores are used: `workers` batches side by side, each on so many `cores`. On GPUs: batches side by side on each."""

    workers: int
    cores: int = 1

    def __str__(self) -> str:
        return f"{self.workers}x{self.cores}"


class Device(NamedTuple):
    """Where a model computes."""

    kind: Literal["cpu", "cuda"] = "cpu"
    indices: tuple[int, ...] = (0,)
    """cuda: the GPUs, each with a copy of the model."""
    compute_type: str | None = None
    """A compute type of CTranslate2; None: by how the weights are stored (COMPUTE_TYPES)."""


@dataclass(frozen=True)
class Prompt:
    """An encoded request."""

    tokens: list[str]
    n: int
    sampling: Sampling
    beam_size: int = 1
    known: int = 0
    """Tokens at its beginning that the model has read already (see `LocalModel.keep_prefix`)."""
    ends: frozenset[int] = frozenset()
    """With a beam, tokens whose text holds a stop text: decoding may end there. Else `holds_stop` is asked at every token."""

    @property
    def decoding(self) -> tuple[Sampling, int]:
        """What prompts of one batch have in common: their sampling without its seed, and the samples to draw (greedy: one)."""
        return self.sampling.model_copy(update={"seed": None}), self.samples

    @property
    def length(self) -> int:
        """Tokens to be read."""
        return len(self.tokens) - self.known

    @property
    def rows(self) -> int:
        """What is decoded side by side for it."""
        return self.samples * self.beam_size

    @property
    def samples(self) -> int:
        """Answers to be decoded; greedy ones are all alike."""
        return 1 if self.sampling.temperature == 0 else self.n


Heed = Callable[[int, int, int, bool], bool]
"""Told of every token as it is decoded: prompt of the batch, sample, token id, whether the model ends it. Returns whether to end it."""


class LocalModel:
    """A serving folder (model.bin, tokenizer.json, serving.json), loaded.

    Not safe to call from several threads at once, but for `decode`; `LocalEngine` is.
    """

    def __init__(self, folder: Path, *, threads: int | None = None, layout: Layout | None = None, device: Device = Device()) -> None:  # noqa: B008
        """`threads`: processor cores to use, all that this process may use by default, one a batch; `layout`: otherwise.

        Raises EngineError.
        """
        self.config = read_config(folder)
        self._folder, self._device = folder, device
        # batches side by side, one core each: several cores on the small matrices of one step mostly wait for each other
        self.layout = layout or Layout(threads or available_cores())
        self.workers = self.layout.workers * len(device.indices)
        """Batches that are decoded side by side."""
        self._prefix: list[str] = []
        self._holding: dict[tuple[str, ...], frozenset[int]] = {}
        self._encoder = PromptEncoder.from_folder(folder, self.config)
        tokenizer = self._encoder.tokenizer
        self._eos = tokenizer.token_to_id(self.config.eos_token)
        if self._eos is None:
            raise EngineError(
                f"{folder}: tokenizer.json has no token {self.config.eos_token!r}, as serving.json says; export the model again"
            )
        self._engine: Any = self._load(*self.layout)

    @property
    def _encodes(self) -> bool:
        return self.config.kind == "encoder-decoder"

    @property
    def spread(self) -> int | None:
        """Most tokens by which prompts of one batch may differ; None: any."""
        return None if self._encodes else LENGTH_SPREAD

    def _load(self, workers: int, cores: int) -> Any:
        try:
            import ctranslate2
        except ImportError as exc:
            raise EngineError(f"the local engine needs CTranslate2: {install('local')}") from exc
        kind = ctranslate2.Translator if self._encodes else ctranslate2.Generator
        try:
            return kind(
                str(self._folder),
                device=self._device.kind,
                device_index=list(self._device.indices),
                compute_type=compute_type(self.config, self._device, ctranslate2.get_supported_compute_types),
                inter_threads=workers,
                intra_threads=cores,
            )
        except (RuntimeError, ValueError) as exc:
            remedy = "export the model again" if self._device == Device() else "see --device, --device-index and --compute-type"
            raise EngineError(f"{self._folder} cannot be loaded, {remedy}: {exc}") from exc

    def fits(self, request: GenerationRequest) -> bool:
        """Whether the model can read the whole prompt and still answer."""
        return self._fits(self._encoder.encode(request), request.sampling)

    def _fits(self, ids: list[int], sampling: Sampling) -> bool:
        answer = 0 if self._encodes else sampling.max_tokens
        return len(ids) + answer <= self.config.max_input_tokens

    def quick(self, request: GenerationRequest) -> bool:
        """Whether to `encode` it takes no more than a millisecond or so."""
        characters = len(request.prompt or "") + sum(len(m.content) for m in request.messages or ())
        stop = request.sampling.stop
        return characters <= QUICK_CHARACTERS and (not stop or request.beam_size == 1 or stop in self._holding)

    def keep_prefix(self, requests: Sequence[GenerationRequest]) -> int:
        """Compute what these prompts begin with, an instruction or shots, once for all prompts that do; returns its tokens.

        For decoder-only models: an encoder reads every token in the light of all others.
        """
        if not self._encodes:
            alike = zip(*(self.encode(request).tokens for request in requests), strict=False)
            common = [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, alike)]
            self._prefix = common[:-1]  # its last token may be another one before other text
        return len(self._prefix)

    def encode(self, request: GenerationRequest) -> Prompt:
        """The request in the model's tokens. Raises RequestRefused if it is too long, EngineError if the chat template refuses it."""
        ids = self._encoder.encode(request)
        if not ids:
            raise RequestRefused("the prompt is empty")
        if not self._fits(ids, request.sampling):
            # said in characters: how the model counts stays inside
            characters = len(request.prompt or "") + sum(len(m.content) for m in request.messages or ())
            raise RequestRefused(
                f"the prompt ({characters} characters) with its answer is too long for this model; shorten it or max_tokens",
                kind="too_long",
            )
        tokens, kept = [str(self._encoder.tokenizer.id_to_token(i)) for i in ids], len(self._prefix)
        known = kept if len(tokens) > kept and tokens[:kept] == self._prefix else 0
        ends = self._ids_holding(request.sampling.stop) if request.beam_size > 1 else frozenset()
        return Prompt(tokens, request.n, request.sampling, request.beam_size, known, ends)

    def generate(self, requests: Sequence[GenerationRequest], *, seed: int | None = None) -> list[list[Completion]]:
        """Completions of each request, in order: `request.n` of them; at temperature 0 all `n` are the same greedy one.

        Text ends before the first stop text, and white space at its beginning is removed (small models open with a blank).
        Samples come from the TOP_K likeliest tokens, in no order. With a `seed` the same requests give the same samples on the
        same machine; CTranslate2 draws from one generator a batch, so the seeds of single requests are not looked at.
        Raises RequestRefused (before any work) and EngineError.
        """
        prompts = [self.encode(request) for request in requests]
        if seed is None or all(p.sampling.temperature == 0 for p in prompts):
            return self._complete(prompts, [self._shared], self.workers, Random(seed))
        self._engine = None  # more copies of a model than needed may not fit
        return self._complete(prompts, [self._seeded(seed + i) for i in range(SEEDED_WORKERS)], SEEDED_WORKERS, Random(seed))

    @property
    def _shared(self) -> Any:
        """The engine whose workers take batches as they come."""
        if self._engine is None:
            self._engine = self._load(*self.layout)
        return self._engine

    def _seeded(self, seed: int) -> Any:
        """An engine whose only worker draws from this seed.

        CTranslate2 seeds a worker when it draws its first number: only a new worker obeys a seed, and draws once here to take it.
        """
        import ctranslate2

        ctranslate2.set_random_seed(seed % (2**32 - 1) + 1)  # 0 stands for "not seeded"
        engine = self._load(1, max(1, self.workers // SEEDED_WORKERS))
        first = [[self.config.eos_token]]
        if self._encodes:
            engine.translate_batch(first, max_decoding_length=1, sampling_topk=2, beam_size=1)
        else:
            engine.generate_batch(first, max_length=1, sampling_topk=2)
        return engine

    def decode(self, prompts: Sequence[Prompt], heed: Heed) -> None:
        """Decode prompts of equal temperature, top_p, samples, beam size and prefix as one batch; `heed` gets their tokens and ends them.

        With a beam the tokens come when all are known. As many threads as there are `workers` may call it at the same time.
        Raises EngineError.
        """
        first = prompts[0]
        longest = max(prompt.sampling.max_tokens for prompt in prompts)
        options: dict[str, Any] = {
            "beam_size": first.beam_size,
            "num_hypotheses": first.samples,
            "end_token": [self._eos],
            "return_end_token": True,
        }
        options |= _drawing(first.sampling)
        if first.beam_size == 1:
            options["callback"] = lambda step: heed(step.batch_id, step.hypothesis_id, step.token_id, step.is_last)
        else:
            options |= {"end_token": [self._eos, *first.ends]}
        if first.known:
            options["static_prompt"] = self._prefix
        try:
            results = self._shared_batch([prompt.tokens[prompt.known :] for prompt in prompts], longest, options)
        except (RuntimeError, ValueError) as exc:
            raise EngineError(f"the model failed to answer: {exc}") from exc
        if first.beam_size > 1:
            for row, result in enumerate(results):
                ids = self._ids(result)[0][: prompts[row].sampling.max_tokens]
                for place, token in enumerate(ids, start=1):
                    heed(row, 0, token, place == len(ids))

    def _shared_batch(self, tokens: list[list[str]], longest: int, options: dict[str, Any]) -> list[Any]:
        if self._encodes:
            return list(
                self._shared.translate_batch(tokens, max_input_length=0, max_decoding_length=longest, min_decoding_length=0, **options)
            )
        return list(self._shared.generate_batch(tokens, max_length=longest, include_prompt_in_result=False, **options))

    def ends(self, token: int) -> bool:
        """Whether the model itself ends an answer with this token."""
        return token == self._eos

    @property
    def tokenizer(self) -> Any:
        """A `tokenizers.Tokenizer`."""
        return self._encoder.tokenizer

    def _complete(self, prompts: Sequence[Prompt], engines: Sequence[Any], workers: int, chance: Random) -> list[list[Completion]]:
        groups: dict[tuple[Sampling, int], list[int]] = defaultdict(list)
        for index, prompt in enumerate(prompts):
            groups[prompt.decoding].append(index)
        # all batches are handed over before the first is awaited: no worker idles
        pending: list[tuple[list[int], Sampling, list[Any]]] = []
        for (sampling, samples), indices in groups.items():
            rows = min(BATCH_ROWS, -(-len(indices) * samples // workers))
            for batch in _batches(prompts, indices, max(1, rows // samples), self.spread):
                engine = engines[len(pending) % len(engines)]
                pending.append((batch, sampling, self._submit(engine, [prompts[i].tokens for i in batch], samples, sampling)))
        results: list[list[Completion]] = [[] for _ in prompts]
        for batch, sampling, handles in pending:
            for index, handle in zip(batch, handles, strict=True):
                try:
                    answers = self._ids(handle.result())
                    # they come likeliest first: who takes some of them must not get other ones than had fewer been asked for
                    chance.shuffle(answers)
                except RuntimeError as exc:
                    raise EngineError(f"the model failed to answer: {exc}") from exc
                completions = [self.completion(ids[: sampling.max_tokens], sampling.stop) for ids in answers]
                results[index] = completions * prompts[index].n if sampling.temperature == 0 else completions
        return results

    def _submit(self, engine: Any, tokens: list[list[str]], samples: int, sampling: Sampling) -> list[Any]:
        """Start decoding one batch, shortest prompt first; one handle a prompt."""
        options: dict[str, Any] = {
            "beam_size": 1,
            "num_hypotheses": samples,
            "end_token": [self._eos, *self._ids_holding(sampling.stop)],
            "return_end_token": True,
            "asynchronous": True,
        }
        options |= _drawing(sampling)
        if self._encodes:
            options |= {"max_input_length": 0, "max_decoding_length": sampling.max_tokens, "min_decoding_length": 0}
            return list(engine.translate_batch(tokens, **options))
        return list(engine.generate_batch(tokens, max_length=sampling.max_tokens, include_prompt_in_result=False, **options))

    def _ids(self, result: Any) -> list[list[int]]:
        """Token ids of each sample, with the token that ended it."""
        if not self._encodes:
            return list(result.sequences_ids)
        to_id = self._encoder.tokenizer.token_to_id
        # T5's matrices have more rows than its vocabulary has words: such a row is a token without text
        return [[i for token in tokens if (i := to_id(token)) is not None] for tokens in result.hypotheses]

    def _ids_holding(self, stop: tuple[str, ...]) -> frozenset[int]:
        """Tokens whose text holds one of the stop texts: decoding may end there. A stop that spans tokens is cut out afterwards."""
        found = self._holding.get(stop)
        if found is None:
            found = frozenset(i for i, text in enumerate(self._texts) if any(s in text for s in stop)) if stop else frozenset()
            if len(self._holding) >= KNOWN_STOPS:
                self._holding.clear()
            self._holding[stop] = found
        return found

    @cached_property
    def _texts(self) -> list[str]:
        """The text of each token of the vocabulary."""
        tokenizer = self._encoder.tokenizer
        return list(tokenizer.decode_batch([[i] for i in range(tokenizer.get_vocab_size())]))

    def completion(self, ids: list[int], stop: tuple[str, ...]) -> Completion:
        """The answer that these tokens are."""
        ended = bool(ids) and ids[-1] == self._eos
        text = self._encoder.tokenizer.decode(ids, skip_special_tokens=True)
        cuts = [at for s in stop if (at := text.find(s)) >= 0]
        return Completion(text=text[: min(cuts, default=len(text))].lstrip(), finish_reason="stop" if ended or cuts else "length")


def holds_stop(tokenizer: Any, ids: list[int], stop: tuple[str, ...]) -> bool:
    """Whether these tokens hold a stop text, if they did not without the last: only what a stop can span is looked at.

    A token with text has at least one byte of it; LEEWAY is for those without.
    """
    if not stop:
        return False
    text = tokenizer.decode(ids[-max(len(s.encode()) for s in stop) - LEEWAY :], skip_special_tokens=True)
    return any(s in text for s in stop)


def _batches(prompts: Sequence[Prompt], indices: list[int], size: int, spread: int | None) -> Iterator[list[int]]:
    """Indices in batches of at most `size` prompts whose lengths differ by at most `spread` tokens, shortest first.

    A prompt of one token never shares a batch with longer ones: CTranslate2 4.8 would give back the rest of theirs as an answer.
    """
    batch: list[int] = []
    for index in sorted(indices, key=lambda i: len(prompts[i].tokens)):
        first, this = (len(prompts[i].tokens) for i in (batch[0] if batch else index, index))
        if len(batch) == size or (spread is not None and (this - first > spread or first == 1 < this)):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def compute_type(config: ServingConfig, device: Device, supported: Callable[[str, int], set[str]]) -> str:
    """What a model computes in: what the device is told, else by how its weights are stored.

    An encoder-decoder stored in float16 takes bfloat16 on a GPU, whose range is that of float32: T5's activations overflow in float16, and
    nothing but <pad> comes out (CTranslate2's issues 1074 and 1679). Where a GPU has no bfloat16 it takes float32, since CTranslate2 falls
    back by itself only from what nobody asked for. supported: `ctranslate2.get_supported_compute_types`.
    """
    if device.compute_type is not None:
        return device.compute_type
    chosen = COMPUTE_TYPES[device.kind][config.quantization]
    if chosen != "float16" or config.kind != "encoder-decoder":
        return chosen
    return "bfloat16" if all("bfloat16" in supported(device.kind, index) for index in device.indices) else "float32"


def read_config(folder: Path) -> ServingConfig:
    file = folder / "serving.json"
    try:
        return ServingConfig.model_validate_json(file.read_bytes())
    except OSError as exc:
        raise EngineError(f"{folder} is not a serving folder ({file.name}: {exc.strerror}); `distill export` writes one") from exc
    except ValidationError as exc:
        error = exc.errors()[0]
        raise EngineError(f"{file}: {'.'.join(map(str, error['loc']))}: {error['msg']}; export the model again") from exc


def _drawing(sampling: Sampling) -> dict[str, Any]:
    """CTranslate2's options for how tokens are chosen."""
    if sampling.temperature == 0:
        return {}
    # CTranslate2 counts in 32 bits: a smaller one would be 0 there, which it refuses or divides by
    top_p, temperature = max(sampling.top_p, LEAST), max(sampling.temperature, LEAST)
    return {"sampling_topk": TOP_K, "sampling_topp": top_p, "sampling_temperature": temperature}


def available_cores(limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Processor cores that this process may use, at least one. `limit`: where a container reads how much it is given (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = limit.read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no container, or "max"
        return cores
