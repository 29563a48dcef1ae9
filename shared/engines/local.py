"""A model in this process: CTranslate2 in batches, for stages (`LocalModel`) and, with dynamic batching, for servers (`LocalEngine`)."""

from __future__ import annotations

import asyncio
import math
import os
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from shared.contracts import Completion, GenerationRequest, Sampling, ServingConfig
from shared.engines.encoding import PromptEncoder
from shared.errors import EngineError, RequestRefused, TeacherBusy, TeacherUnavailable

TOP_K = 50
"""Samples are drawn from the 50 likeliest tokens: without a bound CTranslate2 sorts the whole vocabulary at every step."""
SEEDED_WORKERS = 2
"""Workers of seeded sampling, each with a copy of the model. Part of what is sampled: with others the same seed gives other texts."""
BATCH_ROWS = 32
"""Completions decoded side by side; more hardly raise the throughput of a processor and cost memory."""
COMPUTE_TYPES = {"int8": "int8_float32", "float16": "float32", "float32": "float32"}
"""What a processor computes in, by how the weights are stored: few have 16-bit arithmetic that is worth its loss."""
LENGTH_SPREAD = 16
"""Most tokens by which prompts of one batch differ: a decoder-only model reads what the shortest lacks one token at a time."""


@dataclass(frozen=True)
class _Prompt:
    """An encoded request."""

    tokens: list[str]
    n: int
    sampling: Sampling

    @property
    def decoding(self) -> tuple[Sampling, int]:
        """What prompts of one batch have in common: their sampling without its seed, and the samples to draw (greedy: one)."""
        return self.sampling.model_copy(update={"seed": None}), 1 if self.sampling.temperature == 0 else self.n


class LocalModel:
    """A serving folder (model.bin, tokenizer.json, serving.json), loaded.

    Not safe to call from several threads at once, but for `complete`; `LocalEngine` is.
    """

    def __init__(self, folder: Path, *, threads: int | None = None) -> None:
        """`threads`: processor cores to use, all that this process may use by default. Raises EngineError."""
        self.config = _read_config(folder)
        self._folder = folder
        # batches side by side, one core each: several cores on the small matrices of one step mostly wait for each other
        self.workers = threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        self._encoder = PromptEncoder.from_folder(folder, self.config)
        tokenizer = self._encoder.tokenizer
        self._eos = tokenizer.token_to_id(self.config.eos_token)
        if self._eos is None:
            raise EngineError(
                f"{folder}: tokenizer.json has no token {self.config.eos_token!r}, as serving.json says; export the model again"
            )
        self._engine: Any = self._load(self.workers, 1)

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
            raise EngineError("the local engine needs CTranslate2: pip install 'blackbox-distill[local]'") from exc
        kind = ctranslate2.Translator if self._encodes else ctranslate2.Generator
        try:
            return kind(
                str(self._folder),
                device="cpu",
                compute_type=COMPUTE_TYPES[self.config.quantization],
                inter_threads=workers,
                intra_threads=cores,
            )
        except (RuntimeError, ValueError) as exc:
            raise EngineError(f"{self._folder} cannot be loaded, export the model again: {exc}") from exc

    def fits(self, request: GenerationRequest) -> bool:
        """Whether the model can read the whole prompt and still answer."""
        return self._fits(self._encoder.encode(request), request.sampling)

    def _fits(self, ids: list[int], sampling: Sampling) -> bool:
        answer = 0 if self._encodes else sampling.max_tokens
        return len(ids) + answer <= self.config.max_input_tokens

    def encode(self, request: GenerationRequest) -> _Prompt:
        """The request in the model's tokens. Raises RequestRefused if it is too long, EngineError if the chat template refuses it."""
        ids = self._encoder.encode(request)
        if not ids:
            raise RequestRefused("the prompt is empty")
        if not self._fits(ids, request.sampling):
            # said in characters: how the model counts stays inside
            characters = len(request.prompt or "") + sum(len(m.content) for m in request.messages or ())
            raise RequestRefused(
                f"the prompt ({characters} characters) with its answer is too long for this model; shorten it or max_tokens"
            )
        return _Prompt([str(self._encoder.tokenizer.id_to_token(i)) for i in ids], request.n, request.sampling)

    def generate(self, requests: Sequence[GenerationRequest], *, seed: int | None = None) -> list[list[Completion]]:
        """Completions of each request, in order: `request.n` of them; at temperature 0 all `n` are the same greedy one.

        Text ends before the first stop text, and white space at its beginning is removed (small models open with a blank).
        Samples come from the TOP_K likeliest tokens. With a `seed` the same requests give the same samples on the same
        machine; CTranslate2 draws from one generator a batch, so the seeds of single requests are not looked at.
        Raises RequestRefused (before any work) and EngineError.
        """
        prompts = [self.encode(request) for request in requests]
        if seed is None or all(p.sampling.temperature == 0 for p in prompts):
            return self._complete(prompts, [self._shared], self.workers)
        self._engine = None  # more copies of a model than needed may not fit
        return self._complete(prompts, [self._seeded(seed + i) for i in range(SEEDED_WORKERS)], SEEDED_WORKERS)

    @property
    def _shared(self) -> Any:
        """The engine whose workers take batches as they come."""
        if self._engine is None:
            self._engine = self._load(self.workers, 1)
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

    def complete(self, prompts: Sequence[_Prompt]) -> list[list[Completion]]:
        """`generate` on one core, of prompts that are encoded already; `workers` threads may call it at the same time."""
        return self._complete(prompts, [self._shared], 1)

    def _complete(self, prompts: Sequence[_Prompt], engines: Sequence[Any], workers: int) -> list[list[Completion]]:
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
                except RuntimeError as exc:
                    raise EngineError(f"the model failed to answer: {exc}") from exc
                completions = [self._completion(ids[: sampling.max_tokens], sampling.stop) for ids in answers]
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
        if sampling.temperature > 0:
            options |= {"sampling_topk": TOP_K, "sampling_topp": sampling.top_p, "sampling_temperature": sampling.temperature}
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

    def _ids_holding(self, stop: tuple[str, ...]) -> list[int]:
        """Tokens whose text holds one of the stop texts: decoding may end there. A stop that spans tokens is cut out afterwards."""
        if not stop:
            return []
        return [i for i, text in enumerate(self._texts) if any(s in text for s in stop)]

    @cached_property
    def _texts(self) -> list[str]:
        """The text of each token of the vocabulary."""
        tokenizer = self._encoder.tokenizer
        return list(tokenizer.decode_batch([[i] for i in range(tokenizer.get_vocab_size())]))

    def _completion(self, ids: list[int], stop: tuple[str, ...]) -> Completion:
        ended = bool(ids) and ids[-1] == self._eos
        text = self._encoder.tokenizer.decode(ids, skip_special_tokens=True)
        cuts = [at for s in stop if (at := text.find(s)) >= 0]
        return Completion(text=text[: min(cuts, default=len(text))].lstrip(), finish_reason="stop" if ended or cuts else "length")


def _batches(prompts: Sequence[_Prompt], indices: list[int], size: int, spread: int | None) -> Iterator[list[int]]:
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


def _read_config(folder: Path) -> ServingConfig:
    file = folder / "serving.json"
    try:
        return ServingConfig.model_validate_json(file.read_bytes())
    except OSError as exc:
        raise EngineError(f"{folder} is not a serving folder ({file.name}: {exc.strerror}); `distill export` writes one") from exc
    except ValidationError as exc:
        error = exc.errors()[0]
        raise EngineError(f"{file}: {'.'.join(map(str, error['loc']))}: {error['msg']}; export the model again") from exc


class LocalEngine:
    """An `Engine` over a `LocalModel`: while batches are decoded, one a core, requests queue up; then those alike go out together.

    Alike are requests of equal decoding, and for a decoder-only model of like length.

    Seeds are not looked at (see `LocalModel.generate`). Belongs to the event loop that first asks it.
    """

    def __init__(self, model: LocalModel, *, max_batch: int = BATCH_ROWS, max_waiting: int = 512) -> None:
        """`max_batch`: completions of one batch; `max_waiting`: requests in the queue, above it TeacherBusy."""
        self._model, self._max_batch, self._max_waiting = model, max_batch, max_waiting
        self._waiting: deque[tuple[_Prompt, asyncio.Future[list[Completion]]]] = deque()
        self._arrived = asyncio.Event()
        self._workers: list[asyncio.Task[None]] = []
        self._closed = False

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        """`request.n` completions. Raises RequestRefused, TeacherBusy when the queue is full, EngineError."""
        await self.check()
        prompt = self._model.encode(request)
        if len(self._waiting) >= self._max_waiting:
            raise TeacherBusy("too many requests are waiting; try again", retry_after_s=1.0)
        if not self._workers:
            self._workers = [asyncio.create_task(self._work()) for _ in range(self._model.workers)]
        answer: asyncio.Future[list[Completion]] = asyncio.get_running_loop().create_future()
        self._waiting.append((prompt, answer))
        self._arrived.set()
        return await answer

    async def check(self) -> None:
        if self._closed:
            raise TeacherUnavailable("shutting down")

    async def aclose(self) -> None:
        """Finish the batches that are being decoded, refuse those that wait."""
        self._closed = True
        self._arrived.set()
        await asyncio.gather(*self._workers)
        for _, answer in self._waiting:
            if not answer.done():
                answer.set_exception(TeacherUnavailable("shutting down"))

    async def _work(self) -> None:
        while not self._closed:
            batch = self._next_batch()
            if not batch:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            try:
                results = await asyncio.to_thread(self._model.complete, [prompt for prompt, _ in batch])
            except Exception as exc:  # whatever it was, those who wait must hear of it and the next batch must go out
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(exc)
                continue
            for (_, answer), completions in zip(batch, results, strict=True):
                if not answer.done():
                    answer.set_result(completions)

    def _next_batch(self) -> list[tuple[_Prompt, asyncio.Future[list[Completion]]]]:
        """The oldest request and those that share its batch best; requests whose asker has gone are dropped."""
        self._waiting = deque(item for item in self._waiting if not item[1].done())
        if not self._waiting:
            return []
        oldest = self._waiting[0][0]
        size = max(1, self._max_batch // oldest.decoding[1])
        spread = math.inf if self._model.spread is None else self._model.spread / 2  # to either side
        alike = [
            (distance, place)
            for place, (prompt, _) in enumerate(self._waiting)
            if prompt.decoding == oldest.decoding and (distance := abs(len(prompt.tokens) - len(oldest.tokens))) <= spread
        ]
        taken = {place for _, place in sorted(alike)[:size]}
        batch = [item for place, item in enumerate(self._waiting) if place in taken]
        self._waiting = deque(item for place, item in enumerate(self._waiting) if place not in taken)
        return batch
