"""The stage responses/teacher: sampled answers of the teacher to every training prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Self

from shared.artifacts import Run, Stage, read_json
from shared.collect import Collected
from shared.commands import interruptible
from shared.contracts import CUT_OFF, Example, GenerationRequest, Sampling
from shared.datasets.stage import prepare, shots
from shared.errors import HarvestTooThin, RunMismatch, SettingsError
from shared.harvest.ask import Ask
from shared.harvest.budget import Account, Budget, estimated_tokens
from shared.harvest.ledger import OK, AnswerLedger, AnswerReader, Held, answer_files, kinds
from shared.harvest.scheduler import LOOKED_UP, MOST_MARKS, Limits, harvest
from shared.http.client import refuse_too_many, teacher_of
from shared.prompts import messages, plain
from shared.redact import Redaction
from shared.settings import Recipe
from student_trainer.harvest.watch import Watch

STAGE = "responses/teacher"
ACCOUNT = "spent.json"
CLUSTER = "cluster.json"
"""There while a harvest on a cluster is under way."""
SAMENESS = 0.05
"""At most this share of prompts with different samples makes sampling look switched off."""
ALIKE = 1024
"""Prompts that are put in the order of their length, so that an engine batches like with like."""
SHOWN_REQUESTS = 3


def run_stage(
    run: Run,
    *,
    teacher_url: str | None = None,
    retry: frozenset[str] = frozenset(),
    metrics_file: Path | None = None,
    answers_from: Path | None = None,
) -> int:
    """Collect what is missing and write the manifest. Returns the exit code.

    answers_from: a run whose answers to the same requests are taken over first. A first Ctrl-C or SIGTERM ends the harvest with everything
    kept, a second one at once.
    Raises SettingsError (no URL, bad key file, a run without answers), TeacherError, HarvestTooThin (above harvest.max_failed_fraction),
    BudgetSpent, StorageError, Stopped.
    """
    recipe = run.recipe
    train = prepare(run)["train"]
    stage = run.stage(STAGE, inputs=["dataset"])
    # segments beside it: what was asked again was cut short
    if stage.complete and not retry and len(answer_files(stage.path)) == 1 and not (stage.path / CLUSTER).exists():
        print(f"{STAGE}: complete, nothing to do")
        return 0
    refuse_other_way(stage.path)
    refuse_too_many(recipe.harvest.concurrency, "harvest.concurrency")
    prompts = Prompts.of(run, train)
    teacher = teacher_of(recipe.teacher, teacher_url)
    watch = Watch(stage.path, run.path.name, metrics_file)
    with (
        AnswerLedger(stage.path) as ledger,
        Budget(stage.path / ACCOUNT, recipe.harvest.budget, recipe.teacher.price, custom=recipe.teacher.custom) as budget,
        interruptible() as stopping,
    ):
        if answers_from is not None:
            print(f"{STAGE}: {take_over(answers_from, ledger, prompts)} answers taken over from {answers_from}", flush=True)

        async def collect() -> Collected:
            try:
                return await harvest(
                    teacher,
                    prompts,
                    ledger,
                    limits=Limits.of(recipe),
                    total=len(train) * recipe.harvest.samples,
                    retry=retry,
                    budget=budget,
                    watch=watch,
                    stopping=stopping,
                )
            finally:
                await teacher.aclose()

        collected = asyncio.run(collect())
        stopping.raise_if_asked()
        check(recipe, collected)
        answers = ledger.compact()
    finish(stage, answers, collected, teacher_url=teacher_url, account=budget.account, redacted=prompts.redaction.counts)
    return 0


def take_over(run: Path, ledger: AnswerLedger, prompts: Iterable[Ask]) -> int:
    """Copy from another run's ledger the answers to what would be asked in the very same words here, and is not there yet, whichever
    example they were given to. Returns the rows copied.

    Raises SettingsError for a run without answers, StorageError, DataError.
    """
    taken = 0
    with other_answers(run, ledger.folder) as other:
        for wanted, found in _looked_up(prompts, other):
            here = ledger.find([key for _, _, key in wanted])
            rows = [
                other.read(found[key, ask.example_id]).model_copy(update={"example_id": ask.example_id, "sample": sample})
                for ask, sample, key in wanted
                if (key, ask.example_id) in found and (key, hash(ask.example_id)) not in here
            ]
            ledger.append(rows)
            taken += len(rows)
    ledger.sync()
    return taken


def other_answers(run: Path, stage: Path) -> AnswerReader:
    """The answers of another run than that of `stage`. Raises SettingsError for a run without any, StorageError, DataError."""
    source = run / STAGE
    if not answer_files(source) or source.resolve() == stage.resolve():
        raise SettingsError(f"--answers-from {run}: expected another run, with the answers of a teacher in {STAGE}/")
    return AnswerReader(source)


Sample = tuple[Ask, int, str]
"""A sample of an ask, by its number, and its key."""


def _looked_up(prompts: Iterable[Ask], other: AnswerReader) -> Iterator[tuple[list[Sample], dict[tuple[str, str], Held]]]:
    """Samples of the prompts, some at once, with the answers that `other` has to them by key and example id."""
    left = iter(prompts)
    while asks := list(islice(left, LOOKED_UP)):
        wanted = [(ask, sample, key) for ask in asks for sample, key in enumerate(ask.sample_keys())]
        for first in range(0, len(wanted), MOST_MARKS):
            part = wanted[first : first + MOST_MARKS]
            there: dict[str, dict[int, Held]] = {}
            for (key, example), held in other.find([key for _, _, key in part]).items():
                if held.kind in (OK, CUT_OFF):
                    there.setdefault(key, {})[example] = held
            # its own; else that of another example that asks the same, and rather a whole one
            yield (
                part,
                {
                    (key, ask.example_id): of_key.get(hash(ask.example_id)) or max(of_key.values(), key=lambda held: held.kind == OK)
                    for ask, _, key in part
                    if (of_key := there.get(key))
                },
            )


def finish(
    stage: Stage, answers: Path, collected: Collected, *, teacher_url: str | None, account: Account, redacted: Mapping[str, int]
) -> None:
    """Write the manifest of a harvest that is complete, and say so. `account`: of all commands together."""
    recipe, counts = stage.run.recipe, collected.counts()
    counts |= {"requests": account.requests, "seconds": account.seconds}
    if recipe.teacher.price is not None:
        counts["cost"] = round(account.cost, 6)
    if recipe.harvest.redact is not None:
        counts["redacted"] = dict(sorted(redacted.items()))
    settings = {
        "teacher": recipe.teacher.model_dump(mode="json"),
        "asked_at": recipe.teacher.address(teacher_url),
        "harvest": recipe.harvest.model_dump(mode="json"),
    }
    stage.finish([answers], settings=settings, counts=counts)
    print(f"{STAGE}: {collected.explain()}")


def refuse_other_way(stage: Path) -> None:
    """Raises RunMismatch where a harvest on a cluster is under way: its answers are in partitions, and would be asked for again."""
    if (stage / CLUSTER).exists():
        raise RunMismatch(f"{stage / CLUSTER}: this harvest was begun on a cluster; go on with the same --on")


def answers_held(stage: Path) -> tuple[dict[tuple[str, str], str], str]:
    """As `kinds`, with what a harvest on a cluster has so far; and the URI of what is in a bucket and was not read, else nothing.

    Raises DataError.
    """
    found, note = kinds(stage), stage / CLUSTER
    layout = read_json(note) if note.exists() else {}
    where, folder = str(layout.get("storage", "")), str(layout.get("folder", ""))
    if "://" in where:
        return found, where
    return {**found, **kinds(Path(where) / folder)} if where else found, ""


@dataclass
class Prompts:
    """What is asked: one prompt for each of some training examples, with `harvest.shots` others solved before it.

    Raises SettingsError where redaction is wanted and its libraries are missing.
    """

    recipe: Recipe
    examples: Sequence[Example]
    drawn: Sequence[Example] = ()
    """Solved ones: the shots and one to spare, since a row that is itself among them would tell its own answer."""
    redaction: Redaction = field(init=False)

    @classmethod
    def of(cls, run: Run, train: Sequence[Example]) -> Self:
        """Those of a whole harvest. Raises DataError if there are too few rows for the shots, and what the class raises."""
        return cls(run.recipe, train, drawn_shots(run, train))

    def __post_init__(self) -> None:
        settings = self.recipe.harvest
        self.redaction = Redaction(settings.redact, region=settings.redact_region)

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Ask]:
        recipe = self.recipe
        settings, teacher = recipe.harvest, recipe.teacher
        sampling = Sampling(
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            stop=settings.stop,
            seed=recipe.seed * 1000,
        )
        self.redaction.counts.clear()
        solved = [self.redaction.of(shot) for shot in self.drawn]
        self.redaction.counts.clear()  # a shot leaves with every prompt: its hits are counted where it is itself the question
        for first in range(0, len(self.examples), ALIKE):
            for example in sorted(self.examples[first : first + ALIKE], key=lambda example: len(example.question)):
                asked = self.redaction.of(example)
                before = [shot for shot in solved if shot.id != example.id][: settings.shots]
                if teacher.chat:
                    request = GenerationRequest(
                        messages=messages(recipe.task, asked.question, before), n=settings.samples, sampling=sampling
                    )
                else:
                    request = GenerationRequest(prompt=plain(recipe.task, asked.question, before), n=settings.samples, sampling=sampling)
                yield Ask(example.id, request, identity=teacher.identity, model=teacher.public_name, protocol=teacher.protocol)


def drawn_shots(run: Run, train: Sequence[Example]) -> tuple[Example, ...]:
    """Raises DataError if there are too few."""
    wanted = run.recipe.harvest.shots
    return shots(run, train, wanted + 1) if wanted else ()


def check(recipe: Recipe, collected: Collected) -> None:
    """Raise HarvestTooThin if too much failed; say so if sampling seems to have no effect."""
    if collected.failed_fraction > recipe.harvest.max_failed_fraction:
        most = max(collected.failed, key=lambda kind: collected.failed[kind])
        raise HarvestTooThin(
            f"{collected.explain()}: more than harvest.max_failed_fraction = {recipe.harvest.max_failed_fraction:g} failed, "
            f"most with: {collected.said.get(most, most)}. All rows are kept; mend the cause and run the same command with --retry-failed"
        )
    if collected.one_text:
        print(f"{STAGE}: warning: the teacher gives one and the same text whatever it is asked: is it the model you mean?")
    elif recipe.harvest.temperature > 0 and collected.several and collected.varied <= SAMENESS * collected.several:
        print(
            f"{STAGE}: warning: the samples of a prompt are nearly always the same text: "
            "does the teacher heed temperature, seed and n? There is nothing to rank among equal answers"
        )


def dry_run(run: Run, *, teacher_url: str | None = None, retry: frozenset[str] = frozenset(), answers_from: Path | None = None) -> int:
    """Print what a harvest would send, what it may cost and three requests in full; send nothing, lock nothing. Returns the exit code."""
    recipe = run.recipe
    train = prepare(run)["train"]
    prompts = Prompts.of(run, train)
    held, _ = answers_held(run.path / STAGE)
    if answers_from is not None:
        with other_answers(answers_from, run.path / STAGE) as other:
            for _, there in _looked_up(prompts, other):
                for place, answer in there.items():
                    held.setdefault(place, answer.kind)
    launched = "http://launched.teacher/v1" if recipe.teacher.launch else None
    teacher = teacher_of(recipe.teacher, teacher_url or launched)
    requests = samples = inputs = 0
    shown: list[str] = []
    for ask in prompts:
        missing = [i for i, key in enumerate(ask.sample_keys()) if held.get((key, ask.example_id)) in (None, *retry)]
        if not missing:
            continue
        made = -(-len(missing) // (teacher.most_choices or len(missing)))
        requests += made
        samples += len(missing)
        inputs += made * estimated_tokens(ask.request, recipe.teacher.custom)
        if len(shown) < SHOWN_REQUESTS:
            shown.append(teacher.rendered(ask.part(range(missing[0], missing[0] + -(-len(missing) // made)))))
    print(*(f"request {number}: {text}\n" for number, text in enumerate(shown, 1)), sep="\n")
    outputs = samples * recipe.harvest.max_tokens
    print(f"{STAGE}: {requests} requests for {samples} of {len(train) * recipe.harvest.samples} answers; nothing was sent")
    if (cap := recipe.harvest.budget.requests) is not None and requests > cap:
        print(f"harvest.budget.requests is {cap}: it will end there")
    bounded = recipe.teacher.custom is None or recipe.teacher.custom.bounded
    out = f"at most {outputs} out" if bounded else 'nobody knows how many out: teacher.custom.body has no "{max_tokens}"'
    print(f"about {inputs} tokens in (one for every 3 bytes of UTF-8, and 8 a message), {out}")
    if price := recipe.teacher.price:
        cost = (inputs * price.input_per_million + outputs * bounded * price.output_per_million) / 1e6
        most = recipe.harvest.budget.cost
        print(
            f"about {cost:.4g} {'at most' if bounded else 'and the answers'} by teacher.price"
            f"{f'; harvest.budget.cost is {most:g}' if most is not None else ''}"
        )
    if recipe.harvest.redact is not None:
        found = ", ".join(f"{count} {kind}" for kind, count in sorted(prompts.redaction.counts.items())) or "nothing"
        print(f"taken out before it would be sent: {found}")
    return 0
