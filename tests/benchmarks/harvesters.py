"""One harvest by one harvester, in a process of its own: what harvest.py compares.

    echo '{"url": "http://127.0.0.1:8000/v1", "prompt": "#{}: ...", "answer": "...", "prompts": 400, ...}' | python harvesters.py bare

reads one `Job` from standard input and prints one `Outcome` as its last line, both JSON. It is run by each harvester's own Python, so it
imports nothing but the standard library before that harvester. Everyone is asked for the same: chat, 64 tokens, one sample (ours, to go
on where it stopped, also four).
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

MODEL, MAX_TOKENS, TEMPERATURE = "mock-7b", 64, 0.8
NO_LIMIT = 10**9
"""Of requests a minute, for a harvester that assumes a low one where none is told."""


@dataclass(frozen=True, kw_only=True)
class Job:
    url: str
    prompt: str
    """Of each prompt; {} stands for its number, here and in `answer`."""
    answer: str
    prompts: int
    folder: str
    """On a real disk, for the ledger or whatever else the harvester writes."""
    in_flight: int = 64
    requests_per_minute: int | None = None
    """What the teacher allows, if the harvester is told."""
    held: int = 0
    """Ours: prompts whose answers are in the ledger before it starts."""
    samples: int = 1
    """Ours: answers a prompt."""

    def texts(self) -> list[str]:
        return [self.prompt.format(number) for number in range(self.prompts)]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    seconds: float
    """From the first thing done for the harvest to its end, without imports and without the start of Python."""
    began_at: float
    """CLOCK_MONOTONIC."""
    cpu_s: float
    """User and system time of this process and its children in these seconds."""
    lost: int
    """Prompts without an answer, or with another one than their own."""
    duplicated: int = 0
    """Ours: rows of prompts that have one already."""


def cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def measured(job: Job, work: Callable[[], dict[int, str]]) -> Outcome:
    """`work` gives the answers by prompt number."""
    before, began_at = cpu_s(), time.monotonic()
    answers = work()
    seconds, used = time.monotonic() - began_at, cpu_s() - before
    lost = sum(answers.get(number) != job.answer.format(number) for number in range(job.prompts))
    return Outcome(seconds=seconds, began_at=began_at, cpu_s=used, lost=lost)


def bare(job: Job) -> Outcome:
    """A loop over aiohttp that keeps answers in memory and knows neither limits nor errors."""
    import aiohttp

    answers: dict[int, str] = {}

    async def ask(session: aiohttp.ClientSession, prompts: Iterator[tuple[int, str]]) -> None:
        for number, text in prompts:
            body = {
                "model": MODEL,
                "messages": [{"role": "user", "content": text}],
                "n": 1,
                "max_tokens": MAX_TOKENS,
                "temperature": TEMPERATURE,
            }
            async with session.post(f"{job.url}/chat/completions", json=body) as response:
                answers[number] = (await response.json())["choices"][0]["message"]["content"]

    async def everything() -> dict[int, str]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=job.in_flight)) as session:
            prompts = enumerate(job.texts())
            await asyncio.gather(*(ask(session, prompts) for _ in range(job.in_flight)))
        return answers

    return measured(job, lambda: asyncio.run(everything()))


def ours(job: Job) -> Outcome:
    """The library, as `distill harvest` uses it: a ledger on a disk, closed and compacted within the time."""
    from shared.contracts import GenerationRequest, Message, Response, Sampling
    from shared.harvest.ask import Ask
    from shared.harvest.ledger import AnswerLedger
    from shared.harvest.scheduler import Limits, harvest
    from shared.http.client import OpenAITeacher

    sampling = Sampling(max_tokens=MAX_TOKENS, temperature=TEMPERATURE)

    def asks() -> Iterator[Ask]:
        for number in range(job.held + job.prompts):
            messages = (Message(role="user", content=job.prompt.format(number)),)
            request = GenerationRequest(messages=messages, n=job.samples, sampling=sampling)
            yield Ask(str(number), request, identity=job.url, model=MODEL)

    def held(number: int, sample: int, ask: Ask) -> Response:
        return Response(
            key=ask.key(sample),
            example_id=ask.example_id,
            sample=sample,
            status="ok",
            text=job.answer.format(number),
            finish_reason="stop",
            model=MODEL,
            latency_s=0.05,
            attempts=1,
            received_at="2026-01-01T00:00:00.000+00:00",
        )

    async def everything() -> None:
        teacher = OpenAITeacher(job.url, model=MODEL)
        limits = Limits(concurrency=job.in_flight, requests_per_minute=job.requests_per_minute)
        try:
            with AnswerLedger(Path(job.folder)) as ledger:
                await harvest(teacher, asks(), ledger, limits=limits, total=(job.held + job.prompts) * job.samples)
                ledger.compact()
        finally:
            await teacher.aclose()

    def work() -> dict[int, str]:
        asyncio.run(everything())
        return {}

    if job.held:
        with AnswerLedger(Path(job.folder)) as ledger:
            of_prompts = zip(range(job.held), asks(), strict=False)
            ledger.append([held(number, sample, ask) for number, ask in of_prompts for sample in range(job.samples)])
    outcome = measured(job, work)
    found = bytearray(job.held + job.prompts)  # not the rows: there may be a million
    more = 0
    with (Path(job.folder) / "responses.jsonl").open() as file:
        for line in file:
            row = Response.model_validate_json(line)
            number = int(row.example_id)
            right = row.status == "ok" and (row.sample > 0 or row.text == job.answer.format(number))
            more += found[number] == job.samples
            found[number] += right and found[number] < job.samples
    return replace(outcome, lost=len(found) - found.count(job.samples), duplicated=more)


def distilabel(job: Job) -> Outcome:
    """A pipeline of one step, with as many prompts in a batch as may be in flight; it knows no limit of requests."""
    from distilabel.models import OpenAILLM
    from distilabel.pipeline import Pipeline
    from distilabel.steps import LoadDataFromDicts
    from distilabel.steps.tasks import TextGeneration

    def work() -> dict[int, str]:
        with Pipeline(name="benchmark", cache_dir=job.folder) as pipeline:
            rows = [{"number": number, "instruction": text} for number, text in enumerate(job.texts())]
            loaded = LoadDataFromDicts(data=rows, batch_size=job.in_flight)
            llm = OpenAILLM(
                model=MODEL,
                base_url=job.url,
                api_key="none",
                generation_kwargs={"max_new_tokens": MAX_TOKENS, "temperature": TEMPERATURE},
            )
            loaded >> TextGeneration(llm=llm, input_batch_size=job.in_flight)
        found = pipeline.run(use_cache=False)["default"]["train"]
        return {row["number"]: row["generation"] for row in found}

    return measured(job, work)


def curator(job: Job) -> Outcome:
    """Its client for OpenAI-compatible servers, with its own assumed limits lifted."""
    import tiktoken

    # it would fetch one from the internet, only to estimate tokens
    byte_level = tiktoken.Encoding("bytes", pat_str=r"\S+|\s+", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={})
    tiktoken.get_encoding = lambda name: byte_level
    from bespokelabs import curator
    from datasets import Dataset

    class Asker(curator.LLM):
        def prompt(self, row: dict[str, Any]) -> str:
            return str(row["text"])

        def parse(self, row: dict[str, Any], response: str) -> dict[str, Any]:
            return {"number": row["number"], "answer": response}

    def work() -> dict[int, str]:
        llm = Asker(
            model_name=MODEL,
            backend="openai",
            generation_params={"max_tokens": MAX_TOKENS, "temperature": TEMPERATURE},
            backend_params={
                "base_url": job.url,
                "api_key": "none",
                "max_concurrent_requests": job.in_flight,
                "max_requests_per_minute": job.requests_per_minute or NO_LIMIT,
                "max_tokens_per_minute": NO_LIMIT,
                "require_all_responses": False,
            },
        )
        rows = Dataset.from_list([{"number": number, "text": text} for number, text in enumerate(job.texts())])
        return {row["number"]: row["answer"] for row in llm(rows, working_dir=job.folder).dataset}

    return measured(job, work)


HARVESTERS: dict[str, Callable[[Job], Outcome]] = {"bare": bare, "ours": ours, "distilabel": distilabel, "curator": curator}

if __name__ == "__main__":
    print(json.dumps(asdict(HARVESTERS[sys.argv[1]](Job(**json.load(sys.stdin))))))
