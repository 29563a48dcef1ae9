"""The local engine: exact against transformers, cut at stop texts, the same for the same seed, batched for many askers."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import ctranslate2
import pytest
import torch
from tiny_servable import WORDS, servable_llama, servable_t5
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from shared.contracts import Completion, GenerationRequest, Message, Sampling, ServingConfig
from shared.engines import batching
from shared.engines.batching import LocalEngine, _Job, _Text
from shared.engines.convert import convert
from shared.engines.layout import layouts, measured
from shared.engines.local import Device, Heed, Layout, LocalModel, Prompt, available_cores, compute_type
from shared.errors import EngineError, RequestRefused, TeacherBusy, TeacherLate, TeacherUnavailable

T = TypeVar("T")
PROMPTS = [
    " ".join(WORDS[start : start + length]) for start, length in [(0, 3), (9, 5), (20, 1), (30, 12), (2, 40), (50, 5), (7, 7), (40, 9)]
]
KINDS = ["decoder-only", "encoder-decoder"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Hugging Face folder and float32 serving folder of each kind."""
    root = tmp_path_factory.mktemp("models")
    made = {"decoder-only": servable_llama(root / "llama"), "encoder-decoder": servable_t5(root / "t5")}
    return {kind: (hf, convert(str(hf), root / f"{hf.name}-serving", name="tiny", quantization="float32")) for kind, hf in made.items()}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, tuple[Path, Path]]) -> dict[str, LocalModel]:
    return {kind: LocalModel(serving, threads=1) for kind, (_, serving) in folders.items()}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(loaded: dict[str, LocalModel], kind: str) -> LocalModel:
    return loaded[kind]


def asks(n: int = 1, **sampling: Any) -> list[GenerationRequest]:
    return [GenerationRequest(prompt=p, n=n, sampling=Sampling(**{"max_tokens": 12, **sampling})) for p in PROMPTS]


def test_greedy_text_is_that_of_transformers(folders: dict[str, tuple[Path, Path]], model: LocalModel, kind: str) -> None:
    auto = AutoModelForCausalLM if kind == "decoder-only" else AutoModelForSeq2SeqLM
    reference, tokenizer = auto.from_pretrained(folders[kind][0]).eval(), AutoTokenizer.from_pretrained(folders[kind][0])
    expected = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            ids = reference.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
        expected.append(tokenizer.decode(ids[inputs["input_ids"].shape[1] :] if kind == "decoder-only" else ids, skip_special_tokens=True))
    assert len(set(expected)) > 3  # else equal texts would prove little
    assert [completions[0].text for completions in model.generate(asks())] == expected


def test_a_converted_t5_gives_the_probabilities_of_transformers_not_their_scaled_likes(folders: dict[str, tuple[Path, Path]]) -> None:
    # an untied T5 (flan-T5) does not scale its logits: scaled ones have the same greedy answers and samples like noise
    hf, serving = folders["encoder-decoder"]
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(hf).eval(), AutoTokenizer.from_pretrained(hf)
    source, target = tokenizer("word1 word2 word3"), ["word4", "word5", "</s>"]
    labels = torch.tensor([tokenizer.convert_tokens_to_ids(target)])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([source["input_ids"]]), labels=labels).logits
    expected = torch.log_softmax(logits[0], -1).gather(1, labels[0][:, None])[:, 0]
    translator = ctranslate2.Translator(str(serving), compute_type="float32")
    (score,) = translator.score_batch([tokenizer.convert_ids_to_tokens(source["input_ids"])], [target[:-1]])
    assert score.log_probs == pytest.approx(expected.tolist(), abs=1e-3)


def test_a_model_that_cannot_be_found_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot load the model"):
        convert(str(tmp_path / "nothing"), tmp_path / "out", name="n", quantization="float32")


def test_a_chat_is_rendered_by_the_template_of_the_model(loaded: dict[str, LocalModel]) -> None:
    chat = GenerationRequest(messages=(Message(role="user", content="word5 word6"),), sampling=Sampling(max_tokens=8))
    plain = GenerationRequest(prompt="user word5 word6 word0", sampling=Sampling(max_tokens=8))
    model = loaded["decoder-only"]
    assert model.generate([chat]) == model.generate([plain])


def test_answers_stand_in_the_order_of_their_requests_whatever_shares_a_batch(model: LocalModel) -> None:
    mixed = [r for pair in zip(asks(), asks(max_tokens=5), strict=True) for r in pair]
    assert model.generate(mixed) == [model.generate([r])[0] for r in mixed]


def test_the_same_seed_draws_the_same_samples_and_another_seed_others(model: LocalModel) -> None:
    requests = asks(n=6, temperature=1.0, top_p=0.95)
    first = model.generate(requests, seed=3)
    model.generate(requests)
    assert model.generate(requests, seed=3) == first
    assert model.generate(requests, seed=4) != first
    assert all(len(completions) == 6 for completions in first)
    assert all(len({c.text for c in completions}) > 1 for completions in first)


@pytest.mark.parametrize("seed", [None, 3])
def test_the_first_of_several_samples_is_no_likelier_than_the_last(model: LocalModel, seed: int | None) -> None:
    """CTranslate2 hands them over likeliest first: the first of four would nearly always be the greedy one, the last hardly ever."""
    times, (prompt, *_) = 256, asks(4, max_tokens=1, temperature=0.8)
    ((greedy, *_),) = model.generate([prompt.model_copy(update={"sampling": Sampling(max_tokens=1, temperature=0)})])
    answers = model.generate([prompt] * times, seed=seed)
    greedy_at = [sum(completions[place] == greedy for completions in answers) for place in range(4)]
    assert 0.1 * times < sum(greedy_at) / 4 < 0.9 * times  # else any order would look like this
    assert max(greedy_at) - min(greedy_at) < 0.25 * times, greedy_at


def test_greedy_samples_of_one_prompt_are_all_the_same(model: LocalModel) -> None:
    for completions in model.generate(asks(n=3)):
        assert completions == [completions[0]] * 3


def test_text_ends_exactly_before_the_first_stop_text(model: LocalModel) -> None:
    requests = asks(max_tokens=40)
    whole = [completions[0] for completions in model.generate(requests)]
    cut = [completions[0] for completions in model.generate(asks(max_tokens=40, stop=("\n",)))]
    assert sum("\n" in c.text for c in whole) >= 3
    assert [c.text for c in cut] == [c.text.partition("\n")[0] for c in whole]
    assert all(c.finish_reason == "stop" for c, w in zip(cut, whole, strict=True) if "\n" in w.text)


def test_a_stop_text_over_several_tokens_is_cut_out_as_well(model: LocalModel) -> None:
    whole = model.generate(asks())[0][0].text
    words = whole.split(" ")
    stop = f"{words[2]} {words[3]}"
    assert model.generate(asks(stop=(stop,)))[0][0] == Completion(text=whole[: whole.index(stop)], finish_reason="stop")


def test_finish_reason_is_length_only_when_all_tokens_were_spent(model: LocalModel) -> None:
    completions = [c for row in model.generate(asks(n=30, temperature=2.0), seed=1) for c in row]
    lengths = {reason: {len(c.text.split(" ")) for c in completions if c.finish_reason == reason} for reason in ("stop", "length")}
    assert max(lengths["length"]) == 12
    assert max(lengths["stop"]) <= 11


def test_a_prompt_that_is_too_long_is_refused_before_any_work_and_without_token_counts(model: LocalModel) -> None:
    long = GenerationRequest(prompt="word1 " * 600)
    assert not model.fits(long)
    assert model.fits(asks()[0])
    with pytest.raises(RequestRefused, match="3600 characters"):
        model.generate([*asks(), long])


def test_an_answer_must_fit_behind_its_prompt_in_a_decoder_only_model(loaded: dict[str, LocalModel]) -> None:
    assert loaded["decoder-only"].fits(GenerationRequest(prompt="word1 " * 100, sampling=Sampling(max_tokens=28)))
    assert not loaded["decoder-only"].fits(GenerationRequest(prompt="word1 " * 100, sampling=Sampling(max_tokens=29)))


@pytest.mark.parametrize("missing", ["serving.json", "tokenizer.json", "model.bin"])
def test_an_incomplete_folder_is_refused_with_a_remedy(folders: dict[str, tuple[Path, Path]], tmp_path: Path, missing: str) -> None:
    broken = Path(shutil.copytree(folders["decoder-only"][1], tmp_path / "broken"))
    (broken / missing).unlink()
    with pytest.raises(EngineError, match="export"):
        LocalModel(broken)


@pytest.mark.parametrize("corrupt", ["serving.json", "tokenizer.json", "model.bin"])
def test_a_corrupt_folder_is_refused_with_a_remedy(folders: dict[str, tuple[Path, Path]], tmp_path: Path, corrupt: str) -> None:
    broken = Path(shutil.copytree(folders["decoder-only"][1], tmp_path / "broken"))
    (broken / corrupt).write_bytes((broken / corrupt).read_bytes()[:200])
    with pytest.raises(EngineError, match="export the model again"):
        LocalModel(broken)


class SlowModel:
    """Stands for a LocalModel: answers with the prompt's first word, `open` lets a batch go, keeps the words of every batch."""

    def __init__(self) -> None:
        self.open, self.batches, self.fails, self.workers = threading.Semaphore(0), [], False, 1
        self.spread, self.config = 16, SimpleNamespace(kind="decoder-only")
        self.words: list[str] = []
        self.tokenizer = None

    def encode(self, request: GenerationRequest) -> Prompt:
        if request.prompt == "too long":
            raise RequestRefused("too long")
        return Prompt((request.prompt or "").split() or [""], request.n, request.sampling)

    def quick(self, request: GenerationRequest) -> bool:
        return True

    def decode(self, prompts: list[Prompt], heed: Heed) -> None:
        self.open.acquire()
        self.batches.append(sorted(p.tokens[0] for p in prompts))
        if self.fails:
            raise EngineError("broken")
        for row, prompt in enumerate(prompts):
            self.words.append(prompt.tokens[0])
            for sample in range(prompt.samples):
                heed(row, sample, len(self.words) - 1, True)

    def completion(self, ids: list[int], stop: tuple[str, ...]) -> Completion:
        return Completion(text=self.words[ids[0]], finish_reason="stop")


def ask(text: str, **values: Any) -> GenerationRequest:
    return GenerationRequest(prompt=text, sampling=Sampling(**values))


def scenario(steps: Any, kind: type[SlowModel] = SlowModel, **options: Any) -> SlowModel:
    """Run `steps(engine, model)` on an engine over a slow model."""

    async def run() -> SlowModel:
        model = kind()
        engine = LocalEngine(model, **options)  # type: ignore[arg-type]
        try:
            await asyncio.wait_for(steps(engine, model), 20)
        finally:
            for _ in range(100):
                model.open.release()
            await engine.aclose()
        return model

    return asyncio.run(run())


async def started(engine: LocalEngine, *requests: GenerationRequest) -> list[asyncio.Task[list[Completion]]]:
    tasks = [asyncio.create_task(engine.generate(r)) for r in requests]
    await asyncio.sleep(0.02)  # all are in the queue, the first with the model
    return tasks


def test_requests_that_arrive_while_a_batch_is_decoded_share_the_next_one() -> None:
    async def steps(engine: LocalEngine, model: SlowModel) -> None:
        first = await started(engine, ask("a"))
        rest = await started(engine, ask("b"), ask("c"), ask("d", temperature=1.0), ask("e"))
        for _ in range(3):
            model.open.release()
        answers = await asyncio.gather(*first, *rest)
        assert [a[0].text for a in answers] == ["a", "b", "c", "d", "e"]

    assert scenario(steps).batches == [["a"], ["b", "c", "e"], ["d"]]


def test_prompts_of_like_length_share_a_batch_and_the_oldest_is_never_passed_over() -> None:
    async def steps(engine: LocalEngine, model: SlowModel) -> None:
        first = await started(engine, ask("a"))
        rest = await started(engine, ask("b " * 40), ask("c"), ask("d " * 41), ask("e"))
        for _ in range(3):
            model.open.release()
        await asyncio.gather(*first, *rest)

    assert scenario(steps).batches == [["a"], ["b", "d"], ["c", "e"]]


def test_a_prompt_of_one_token_beside_longer_ones_changes_no_answer(loaded: dict[str, LocalModel]) -> None:
    model = loaded["decoder-only"]
    requests = [ask(text, max_tokens=8) for text in ("word5", "word1 word2", "word7 word3 word9 word4")]
    assert len(model.encode(requests[0]).tokens) == 1
    together, alone = model.generate(requests), [model.generate([r])[0] for r in requests]
    assert together == alone


def test_a_batch_holds_no_more_completions_than_allowed() -> None:
    async def steps(engine: LocalEngine, model: SlowModel) -> None:
        first = await started(engine, ask("a"))
        rest = await started(engine, *[ask(c) for c in "bcdef"])
        for _ in range(4):
            model.open.release()
        await asyncio.gather(*first, *rest)

    assert scenario(steps, max_batch=2).batches == [["a"], ["b", "c"], ["d", "e"], ["f"]]


def test_a_batch_reads_no_more_tokens_than_allowed_but_for_a_prompt_that_is_longer_alone() -> None:
    async def steps(engine: LocalEngine, model: SlowModel) -> None:
        first = await started(engine, ask("a"))
        rest = await started(engine, *[ask(f"{c} " * 30, max_tokens=6) for c in "bcd"], ask("long " * 300))
        for _ in range(5):
            model.open.release()
        await asyncio.gather(*first, *rest)

    # each of b, c and d weighs 30 + (30 + 6) / 6 = 36
    assert scenario(steps, batch_tokens=72).batches == [["a"], ["b", "c"], ["d"], ["long"]]


def test_a_request_whose_asker_has_gone_is_not_decoded() -> None:
    async def steps(engine: LocalEngine, model: SlowModel) -> None:
        first = await started(engine, ask("a"))
        gone, stays = await started(engine, ask("b"), ask("c"))
        gone.cancel()
        model.open.release()
        model.open.release()
        await asyncio.gather(*first, stays)

    assert scenario(steps).batches == [["a"], ["c"]]


def test_a_full_queue_asks_to_come_again() -> None:
    async def steps(engine: LocalEngine, model: SlowModel) -> None:
        tasks = await started(engine, ask("a"))
        tasks += await started(engine, ask("b"), ask("c"))
        with pytest.raises(TeacherUnavailable, match="try again") as refused:
            await engine.generate(ask("d"))
        assert refused.value.retry_after_s is not None
        assert 1 <= refused.value.retry_after_s <= 30
        for task in tasks:
            task.cancel()

    scenario(steps, max_waiting=2)


def test_a_failed_batch_fails_its_askers_and_no_one_else() -> None:
    async def steps(engine: LocalEngine, model: SlowModel) -> None:
        model.fails = True
        (first,) = await started(engine, ask("a"))
        model.open.release()
        with pytest.raises(EngineError, match="broken"):
            await first
        model.fails = False
        model.open.release()
        assert (await engine.generate(ask("b")))[0].text == "b"

    scenario(steps)


def test_a_refused_request_does_not_reach_the_batch_of_others() -> None:
    async def steps(engine: LocalEngine, model: SlowModel) -> None:
        with pytest.raises(RequestRefused):
            await engine.generate(ask("too long"))

    assert scenario(steps).batches == []


def test_closing_finishes_the_batch_at_work_and_refuses_those_that_wait() -> None:
    async def steps(engine: LocalEngine, model: SlowModel) -> None:
        (at_work,) = await started(engine, ask("a"))
        (waiting,) = await started(engine, ask("b"))
        model.open.release()
        await engine.aclose()
        assert (await at_work)[0].text == "a"
        with pytest.raises(TeacherUnavailable, match="shutting down"):
            await waiting
        with pytest.raises(TeacherUnavailable):
            await engine.check()

    assert scenario(steps).batches == [["a"]]


def test_many_tasks_are_answered_by_a_real_model_each_with_its_own_text(loaded: dict[str, LocalModel]) -> None:
    model = loaded["decoder-only"]
    expected = [c[0].text for c in model.generate(asks())]

    async def run() -> list[str]:
        engine = LocalEngine(model)
        try:
            return [c[0].text for c in await asyncio.gather(*(engine.generate(r) for r in asks() * 4))]
        finally:
            await engine.aclose()

    assert asyncio.run(run()) == expected * 4


def engine_over(model: LocalModel, steps: Callable[[LocalEngine], Awaitable[T]], **options: Any) -> T:
    """What `steps(engine)` gives, on an engine over a real model."""

    async def run() -> T:
        engine = LocalEngine(model, **options)
        try:
            return await asyncio.wait_for(steps(engine), 60)
        finally:
            await engine.aclose()

    return asyncio.run(run())


def test_a_stop_text_that_spans_tokens_ends_the_decoding_there(model: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    heed = _Job.heed
    monkeypatch.setattr(_Job, "heed", lambda job, index, token, last: decoded.append(token) or heed(job, index, token, last))

    async def one(engine: LocalEngine, stop: tuple[str, ...] = ()) -> tuple[str, int]:
        decoded.clear()
        (found,) = await engine.generate(GenerationRequest(prompt=PROMPTS[0], sampling=Sampling(max_tokens=40, stop=stop)))
        return found.text, len(decoded)

    async def steps(engine: LocalEngine) -> None:
        text, whole = await one(engine)
        words = text.split()
        spanning = text[text.index(words[2]) : text.index(words[3], text.index(words[2])) + 2]  # into the second word
        assert len(spanning.split()) == 2
        cut, fewer = await one(engine, (spanning,))
        assert cut == text[: text.index(spanning)]
        assert fewer <= 10 < whole

    engine_over(model, steps)


def test_who_hears_of_tokens_in_the_models_own_thread_does_not_hold_the_model(model: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A swapped model would end in its own thread, with the whole server: rarely, and for no reason that a log could tell."""
    jobs: list[_Job] = []
    heed = _Job.heed
    monkeypatch.setattr(_Job, "heed", lambda job, index, token, last: jobs.append(job) or heed(job, index, token, last))

    async def steps(engine: LocalEngine) -> None:
        await engine.generate(ask(PROMPTS[0]))
        assert not [value for job in jobs for value in vars(job).values() if isinstance(value, (LocalModel, LocalEngine))]

    engine_over(model, steps)
    assert jobs


def test_after_batches_that_fail_in_a_row_it_is_not_ready_and_tries_on() -> None:
    async def steps(engine: LocalEngine, model: SlowModel) -> None:
        model.fails = True
        for number in range(1, 5):
            model.open.release()
            with pytest.raises(EngineError):
                await engine.generate(ask("a"))
            if number < 3:
                await engine.check()
            else:
                with pytest.raises(TeacherUnavailable, match="batches have failed"):
                    await engine.check()
        model.fails = False
        model.open.release()
        await engine.generate(ask("b"))
        async with asyncio.timeout(5):  # who is answered is told before the batch has ended
            while engine._failed:
                await asyncio.sleep(0.01)
        await engine.check()

    scenario(steps)


def test_who_has_waited_long_enough_is_refused_and_who_is_being_answered_is_not() -> None:
    async def steps(engine: LocalEngine, model: SlowModel) -> None:
        first = asyncio.create_task(engine.generate(ask("first")))
        while engine.waiting or not first:
            await asyncio.sleep(0)
        await asyncio.sleep(0.02)
        with pytest.raises(TeacherBusy, match=r"not begun within 0\.05 s"):
            await engine.generate(ask("second"))
        assert engine.waiting == 0
        model.open.release()
        assert [c.text for c in await first] == ["first"]

    scenario(steps, wait_s=0.05)


def test_a_stream_goes_on_behind_bytes_that_are_no_text(model: LocalModel) -> None:
    """As tokenizers does it with Llama 2's bytes: an error that has no class of its own."""

    class Confused:
        def __init__(self) -> None:
            self.left = 2

        def step(self, tokenizer: Any, token: int) -> str:
            self.left -= 1
            if self.left < 0:
                raise Exception("Invalid prefix encountered while decoding stream")
            return "x"

    ids = model.tokenizer.encode("word1 word2 word3 word4 word5 word6", add_special_tokens=False).ids
    text = _Text(model, ())
    text._decoder = Confused()  # type: ignore[assignment]
    said = "".join(text.add(ids[:n], False)[0] for n in range(1, len(ids)))
    assert said.startswith("xx")
    assert len(said) > 2


async def heard(engine: LocalEngine, request: GenerationRequest) -> tuple[list[list[str]], list[Completion]]:
    """The pieces of each choice of a stream, and the completions that they make."""
    said: list[list[str]] = [[] for _ in range(request.n)]
    reasons: list[Any] = [None] * request.n
    async for choice, text, reason in engine.stream(request):
        assert reasons[choice] is None
        said[choice].append(text)
        reasons[choice] = reason
    return said, [Completion(text="".join(s), finish_reason=r) for s, r in zip(said, reasons, strict=True)]


VARIED = [
    {"max_tokens": 12},
    {"max_tokens": 3},
    {"max_tokens": 40, "stop": ("\n",)},
    {"max_tokens": 40, "stop": ("word1",)},
    {"max_tokens": 1},
    {"max_tokens": 30, "stop": ("next3", "end5\nn", "zzz")},
    {"max_tokens": 60, "stop": ("word2 word",)},
]
"""Bounds and stop texts that single requests have, of one batch."""


def test_each_request_of_a_batch_has_its_own_bound_and_its_own_stop_texts(model: LocalModel) -> None:
    requests = [GenerationRequest(prompt=p, sampling=Sampling(**v)) for p in PROMPTS for v in VARIED]
    expected = model.generate(requests)

    async def steps(engine: LocalEngine) -> list[list[Completion]]:
        return list(await asyncio.gather(*(engine.generate(r) for r in requests)))

    assert engine_over(model, steps) == expected


def test_the_pieces_of_a_stream_are_together_what_is_answered_whole(model: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [GenerationRequest(prompt=p, sampling=Sampling(**v)) for p in PROMPTS for v in VARIED]
    expected = model.generate(requests)
    heed = _Job.heed

    def in_turns(job: _Job, index: int, token: int, last: bool) -> bool:
        """A model this small may have said all before the loop looks: each token waits until the asker has heard of the one before."""
        ends = heed(job, index, token, last)
        for _ in range(2):  # turns enough of the loop for the asker to be woken and to read
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), job._loop).result(30)
        return ends

    monkeypatch.setattr(_Job, "heed", in_turns)

    async def steps(engine: LocalEngine) -> list[tuple[list[list[str]], list[Completion]]]:
        return list(await asyncio.gather(*(heard(engine, r) for r in requests)))

    found = engine_over(model, steps)
    assert [completions for _, completions in found] == expected
    assert sum(len(pieces) for said, _ in found for pieces in said) > 2 * len(requests)


def test_greedy_samples_of_a_stream_are_all_the_same_and_drawn_ones_are_not(model: LocalModel) -> None:
    async def steps(engine: LocalEngine) -> list[list[Completion]]:
        sampled = {"max_tokens": 20, "temperature": 1.5}
        found = await asyncio.gather(
            *(heard(engine, GenerationRequest(prompt=PROMPTS[0], n=3, sampling=Sampling(**v))) for v in ({"max_tokens": 20}, sampled))
        )
        return [completions for _, completions in found]

    greedy, drawn = engine_over(model, steps)
    assert greedy == model.generate([GenerationRequest(prompt=PROMPTS[0], n=3, sampling=Sampling(max_tokens=20))])[0]
    assert len({c.text for c in drawn}) > 1


def test_the_smallest_temperature_and_top_p_draw_the_likeliest_tokens(model: LocalModel) -> None:
    greedy = [c[0].text for c in model.generate(asks())]

    async def steps(engine: LocalEngine) -> list[str]:
        return [
            (await engine.generate(r))[0].text for v in ({"temperature": 5e-324}, {"temperature": 1.0, "top_p": 5e-324}) for r in asks(**v)
        ]

    assert engine_over(model, steps) == greedy * 2


def test_a_beam_finds_what_ctranslate2_finds_and_ends_at_the_stop_text(model: LocalModel) -> None:
    sampling = Sampling(max_tokens=12, stop=("\n",))
    requests = [GenerationRequest(prompt=p, beam_size=4, sampling=sampling) for p in PROMPTS if len(p.split()) == 5]

    async def steps(engine: LocalEngine) -> list[Completion]:
        return [(await engine.generate(r))[0] for r in requests]

    for request, found in zip(requests, engine_over(model, steps), strict=True):
        tokens, options = [model.encode(request).tokens], {"beam_size": 4, "end_token": [model._eos, *model._ids_holding(("\n",))]}
        if model.config.kind == "encoder-decoder":
            (beam,) = model._shared.translate_batch(
                tokens, max_decoding_length=12, min_decoding_length=0, return_end_token=True, max_input_length=0, **options
            )
            ids = model._ids(beam)[0]
        else:
            (beam,) = model._shared.generate_batch(tokens, max_length=12, include_prompt_in_result=False, return_end_token=True, **options)
            ids = beam.sequences_ids[0]
        assert found == model.completion(ids, ("\n",))


def test_prompts_that_share_a_prefix_are_answered_as_without_it_and_others_too(folders: dict[str, tuple[Path, Path]]) -> None:
    plain, keeping = (LocalModel(folders["decoder-only"][1], threads=1) for _ in range(2))
    prefix = "word9 word8 word7 word6 word5 "
    requests = [GenerationRequest(prompt=prefix + p, sampling=Sampling(max_tokens=12)) for p in PROMPTS] + asks()
    assert keeping.keep_prefix(requests[: len(PROMPTS)]) == 4  # the last of the five may be another token before other text
    known = [keeping.encode(r).known for r in requests]
    assert known == [4] * len(PROMPTS) + [0] * len(PROMPTS)

    async def steps(engine: LocalEngine) -> list[list[Completion]]:
        return list(await asyncio.gather(*(engine.generate(r) for r in requests * 3)))

    assert engine_over(keeping, steps) == plain.generate(requests) * 3
    assert keeping.generate(requests) == plain.generate(requests)


def test_an_encoder_keeps_no_prefix(loaded: dict[str, LocalModel]) -> None:
    assert loaded["encoder-decoder"].keep_prefix(asks()) == 0


def test_a_short_answer_does_not_wait_for_a_long_one_of_its_batch(loaded: dict[str, LocalModel]) -> None:
    heard = threading.Event()
    waited: list[bool] = []

    class Held(LocalModel):
        """Of a batch of two, goes on with the long answer once the short one has been heard."""

        def decode(self, prompts: Any, heed: Heed) -> None:
            tokens: Counter[int] = Counter()

            def held(row: int, *told: Any) -> bool:
                tokens[row] += 1
                if len(prompts) == 2 and tokens[row] == 4:
                    waited.append(heard.wait(30))
                return heed(row, *told)

            super().decode(prompts, held)

    model = loaded["encoder-decoder"]
    model.__class__ = Held
    long, short = (GenerationRequest(prompt=PROMPTS[3], sampling=Sampling(max_tokens=n)) for n in (64, 2))

    async def steps(engine: LocalEngine) -> None:
        tasks = [asyncio.create_task(engine.generate(long))]
        await asyncio.sleep(0.01)  # the next two wait and share a batch
        tasks.append(asyncio.create_task(engine.generate(long)))
        await engine.generate(short)
        heard.set()
        await asyncio.gather(*tasks)

    try:
        engine_over(model, steps)
    finally:
        model.__class__ = LocalModel
    assert waited == [True]


def test_who_leaves_in_the_middle_of_a_batch_ends_its_own_work_and_no_one_elses(loaded: dict[str, LocalModel]) -> None:
    decoded: list[int] = []

    class Counting(LocalModel):
        def decode(self, prompts: Any, heed: Heed) -> None:
            def counted(row: int, *told: Any) -> bool:
                decoded.append(row)
                time.sleep(0.005)
                return heed(row, *told)

            super().decode(prompts, counted)

    model = loaded["encoder-decoder"]
    model.__class__ = Counting
    request = GenerationRequest(prompt=PROMPTS[3], sampling=Sampling(max_tokens=400, temperature=1.0))

    async def steps(engine: LocalEngine) -> None:
        stream = engine.stream(request)
        async for _ in stream:
            break
        await stream.aclose()
        told = len(decoded)
        await asyncio.sleep(0.3)
        assert len(decoded) <= told + 3

    try:
        engine_over(model, steps)
    finally:
        model.__class__ = LocalModel


def test_what_does_not_begin_in_time_is_to_come_again_and_what_does_not_end_in_time_is_late() -> None:
    async def steps(engine: LocalEngine, model: SlowModel) -> None:
        (first,), (second,) = await started(engine, ask("a")), await started(engine, ask("b"))
        with pytest.raises(TeacherLate, match=r"within 0\.1 s"):
            await first
        with pytest.raises(TeacherBusy, match="not begun") as refused:
            await second
        assert refused.value.retry_after_s
        model.open.release()
        assert engine.waiting == 0

    assert scenario(steps, deadline_s=0.1).batches == [["a"]]


def test_what_batches_took_is_given_back_once_while_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[list[str]]] = []

    async def steps(engine: LocalEngine, model: SlowModel) -> None:
        monkeypatch.setattr(batching, "give_back_now", lambda: given.append(list(model.batches)))
        first = await started(engine, ask("a"))
        await asyncio.sleep(0.2)
        assert not given  # a batch is being decoded
        model.open.release()
        await asyncio.gather(*first)
        while not given:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        assert given == [[["a"]]]
        second = await started(engine, ask("b"))  # it still answers
        model.open.release()
        await asyncio.gather(*second)

    monkeypatch.setattr(batching, "IDLE_S", 0.05)
    assert scenario(steps).batches == [["a"], ["b"]]


def test_idle_workers_share_what_waits() -> None:
    class Two(SlowModel):
        def __init__(self) -> None:
            super().__init__()
            self.workers = 2

    async def run() -> list[list[str]]:
        model = Two()
        engine = LocalEngine(model)  # type: ignore[arg-type]
        first = await started(engine, ask("a"), ask("b"))  # both workers have one
        rest = await started(engine, *[ask(c) for c in "cdefgh"])
        for _ in range(8):
            model.open.release()
        await asyncio.gather(*first, *rest)
        await engine.aclose()
        return model.batches

    batches = asyncio.run(asyncio.wait_for(run(), 20))
    assert sorted(word for batch in batches for word in batch) == list("abcdefgh")


@pytest.mark.parametrize(("cores", "expected"), [(1, ["1x1"]), (2, ["2x1", "1x2"]), (6, ["6x1", "3x2", "2x3", "1x6"])])
def test_layouts_share_all_cores(cores: int, expected: list[str]) -> None:
    assert [str(layout) for layout in layouts(cores)] == expected


def test_the_layout_is_the_one_that_was_fastest(folders: dict[str, tuple[Path, Path]], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.engines.layout.available_cores", lambda: 2)
    model, speeds = measured(folders[kind][1])
    assert model.layout == max(speeds, key=lambda layout: speeds[layout])
    assert Layout(2, 1) in speeds
    assert model.workers == model.layout.workers


def test_a_gpu_that_is_not_there_is_told_with_the_options_to_look_at(folders: dict[str, tuple[Path, Path]]) -> None:
    with pytest.raises(EngineError, match="--device"):
        LocalModel(folders["decoder-only"][1], device=Device("cuda", (7,)))


@pytest.mark.parametrize(
    ("kind", "quantization", "device", "has", "expected"),
    [
        ("encoder-decoder", "float16", Device("cuda"), [{"float16", "bfloat16"}], "bfloat16"),
        ("encoder-decoder", "float16", Device("cuda"), [{"float16"}], "float32"),
        ("encoder-decoder", "float16", Device("cuda", (0, 1)), [{"float16", "bfloat16"}, {"float16"}], "float32"),
        ("encoder-decoder", "float16", Device("cuda", (0,), "float16"), [{"float16", "bfloat16"}], "float16"),
        ("encoder-decoder", "float16", Device(), [], "float32"),
        ("encoder-decoder", "int8", Device("cuda"), [], "int8_float16"),
        ("encoder-decoder", "float32", Device("cuda"), [], "float32"),
        ("decoder-only", "float16", Device("cuda"), [], "float16"),
    ],
)
def test_on_a_gpu_an_encoder_decoder_of_float16_computes_with_the_range_of_float32(
    kind: str, quantization: str, device: Device, has: list[set[str]], expected: str
) -> None:
    config = ServingConfig(name="t", kind=kind, eos_token="</s>", max_input_tokens=9, quantization=quantization)  # type: ignore[arg-type]
    assert compute_type(config, device, lambda where, index: has[index]) == expected


def test_ctranslate2_refuses_a_compute_type_that_is_asked_for_and_not_there(folders: dict[str, tuple[Path, Path]]) -> None:
    missing = {"bfloat16", "float16", "int16"} - ctranslate2.get_supported_compute_types("cpu", 0)
    assert missing  # no processor has all
    with pytest.raises(EngineError, match="compute type, but the target device or backend do not support"):
        LocalModel(folders["encoder-decoder"][1], device=Device(compute_type=missing.pop()))


def test_those_who_leave_make_room_at_once() -> None:
    async def steps(engine: LocalEngine, model: SlowModel) -> None:
        await started(engine, ask("a"))
        for _ in range(3):
            tasks = await started(engine, ask("b"), ask("c"))
            assert engine.waiting == 2
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert engine.waiting == 0
        model.open.release()

    assert scenario(steps, max_waiting=2).batches == [["a"]]


def test_a_full_queue_is_told_before_a_prompt_is_encoded() -> None:
    async def steps(engine: LocalEngine, model: SlowModel) -> None:
        await started(engine, ask("a"))
        waiting = await started(engine, ask("b"))
        with pytest.raises(TeacherBusy):
            await engine.generate(ask("too long"))
        for task in waiting:
            task.cancel()
        model.open.release()

    scenario(steps, max_waiting=1)


def test_a_beam_counts_as_the_rows_that_it_takes() -> None:
    async def steps(engine: LocalEngine, model: SlowModel) -> None:
        first = await started(engine, ask("a"))
        rest = await started(engine, *[GenerationRequest(prompt=c, beam_size=4, sampling=Sampling()) for c in "bcd"])
        for _ in range(3):
            model.open.release()
        await asyncio.gather(*first, *rest)

    class Beams(SlowModel):
        def encode(self, request: GenerationRequest) -> Prompt:
            return replace(super().encode(request), beam_size=request.beam_size)

    assert scenario(steps, Beams, max_batch=8).batches == [["a"], ["b", "c"], ["d"]]


@pytest.mark.parametrize("stop", [("\n\n",), ("\nHello",), ("world", "\n\n\n"), (" wor",)])
def test_stop_texts_that_begin_with_blanks_end_a_stream_where_they_end_the_whole_answer(stop: tuple[str, ...]) -> None:
    tokenizer = Tokenizer(models.WordLevel({"\n": 0, "Hello": 1, " world": 2, " wo": 3, "</s>": 4}, unk_token="</s>"))
    tokenizer.decoder = decoders.Fuse()

    class Spoken:
        """What a LocalModel knows of texts."""

        def __init__(self) -> None:
            self.tokenizer = tokenizer

        def ends(self, token: int) -> bool:
            return token == 4

        def completion(self, ids: list[int], stop: tuple[str, ...]) -> Completion:
            text = tokenizer.decode([i for i in ids if i != 4])
            cuts = [at for s in stop if (at := text.find(s)) >= 0]
            return Completion(text=text[: min(cuts, default=len(text))].lstrip(), finish_reason="stop")

    for ids in ([0, 0, 1, 2, 4], [0, 1, 3, 2, 4], [1, 0, 0, 0, 2, 4], [1, 2, 2, 4]):
        model, said = Spoken(), ""
        text = _Text(model, stop)  # type: ignore[arg-type]
        for end in range(1, len(ids)):
            said += text.add(ids[:end], False)[0]
        said += text.add(ids, True)[0]
        assert said == model.completion(ids, stop).text


@pytest.mark.parametrize(("said", "cores"), [("max 100000", 8), ("200000 100000", 2), ("50000 100000", 1), ("3200000 100000", 8), ("", 8)])
def test_a_container_has_the_cores_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, cores: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    (tmp_path / "cpu.max").write_text(said)
    assert available_cores(tmp_path / "cpu.max") == cores
    assert available_cores(tmp_path / "none") == 8
