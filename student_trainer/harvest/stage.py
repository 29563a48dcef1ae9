"""The stage responses/teacher: sampled answers of the teacher to every training prompt."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

from shared.artifacts import Ledger, Run
from shared.collect import Ask, Collected, answers, collect
from shared.contracts import Example, GenerationRequest, Response, Sampling
from shared.datasets.stage import prepare, shots
from shared.engines import Engine
from shared.errors import HarvestTooThin
from shared.prompts import messages, plain
from shared.settings import Recipe, read_secret

STAGE = "responses/teacher"
LEDGER = "responses.jsonl"
SAMENESS = 0.05
"""At most this share of prompts with different samples makes sampling look switched off."""


def harvest(run: Run, *, teacher_url: str | None = None, retry_failed: bool = False) -> int:
    """Collect what is missing and write the manifest. Returns the exit code.

    Raises SettingsError (no URL, bad key file), TeacherError, HarvestTooThin (above harvest.max_failed_fraction), StorageError.
    """
    recipe = run.recipe
    train = prepare(run)["train"]
    stage = run.stage(STAGE, inputs=["dataset"])
    if stage.complete and not retry_failed:
        print(f"{STAGE}: complete, nothing to do")
        return 0
    url = recipe.teacher.address(teacher_url)
    key = read_secret(recipe.teacher.api_key, recipe.teacher.api_key_file, "teacher.api_key")
    asks = teacher_asks(run, train)
    with Ledger(stage.path / LEDGER, Response) as ledger:
        collected = asyncio.run(_collect(recipe, url, key, asks, ledger, retry_failed=retry_failed))
        rows = answers(asks, ledger)
    check(recipe, collected, rows)
    settings = {"teacher": recipe.teacher.model_dump(mode="json"), "asked_at": url, "harvest": recipe.harvest.model_dump(mode="json")}
    stage.finish([stage.path / LEDGER], settings=settings, counts=collected.counts())
    print(f"{STAGE}: {collected.explain()}")
    return 0


def teacher_asks(run: Run, examples: Sequence[Example]) -> list[Ask]:
    """One ask for each training example, with `harvest.shots` others solved before it. Raises DataError if there are too few."""
    recipe = run.recipe
    settings, teacher = recipe.harvest, recipe.teacher
    sampling = Sampling(
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        stop=settings.stop,
        seed=recipe.seed * 1000,
    )
    # one to spare: a row that is itself among the shots would tell its own answer
    drawn = shots(run, examples, settings.shots + 1) if settings.shots else ()
    asks = []
    for example in examples:
        solved = [shot for shot in drawn if shot.id != example.id][: settings.shots]
        if teacher.protocol == "chat":
            request = GenerationRequest(messages=messages(recipe.task, example.question, solved), n=settings.samples, sampling=sampling)
        else:
            request = GenerationRequest(prompt=plain(recipe.task, example.question, solved), n=settings.samples, sampling=sampling)
        asks.append(Ask(example.id, request, identity=teacher.identity, model=teacher.public_name, protocol=teacher.protocol))
    return asks


def check(recipe: Recipe, collected: Collected, rows: Sequence[Sequence[Response]]) -> None:
    """Raise HarvestTooThin if too much failed; say so if sampling seems to have no effect."""
    failed = Counter(row.reason for of_prompt in rows for row in of_prompt if row.status == "failed")
    if collected.failed_fraction > recipe.harvest.max_failed_fraction:
        raise HarvestTooThin(
            f"{collected.explain()}: more than harvest.max_failed_fraction = {recipe.harvest.max_failed_fraction:g} failed, "
            f"most with: {failed.most_common(1)[0][0]}. All rows are kept; mend the cause and run the same command with --retry-failed"
        )
    texts = [[row.text for row in of_prompt if row.status == "ok"] for of_prompt in rows]
    varied = [len(set(found)) > 1 for found in texts if len(found) > 1]
    if recipe.harvest.temperature > 0 and varied and sum(varied) <= SAMENESS * len(varied):
        print(
            f"{STAGE}: warning: the samples of a prompt are nearly always the same text: "
            "does the teacher heed temperature, seed and n? There is nothing to rank among equal answers"
        )


async def _collect(
    recipe: Recipe, url: str, key: str | None, asks: Sequence[Ask], ledger: Ledger[Response], *, retry_failed: bool
) -> Collected:
    from shared.http.client import HttpEngine

    teacher = recipe.teacher
    engine: Engine = HttpEngine(
        url,
        model=teacher.public_name,
        protocol=teacher.protocol,
        api_key=key,
        timeout_s=teacher.timeout_s,
        max_attempts=teacher.max_attempts,
    )
    try:
        return await collect(engine, asks, ledger, concurrency=recipe.harvest.concurrency, what="harvest", retry_failed=retry_failed)
    finally:
        await engine.aclose()
