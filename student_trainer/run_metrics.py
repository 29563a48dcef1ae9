"""Run directories as metrics, read off their files at every scrape: nothing is opened for writing and nothing locked.

Labels take few values. `run` is a folder's name, of the MAX_RUNS newest; it is absent for a registry outside the runs. Stages, states,
systems and metrics are those of the code and the recipe, reasons of failed answers are the names of error classes. A run has about 200
series.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import BaseModel, Field, ValidationError

from shared import registry as store
from shared.contracts import Manifest, Response
from shared.errors import DataError, DistillError
from shared.harvest.ledger import answer_files
from shared.settings import HarvestSettings, TrainSettings
from student_trainer.progress import STATES, TEACHER_LEDGER, stage_manifest, stage_states, stages_of

log = logging.getLogger(__name__)

MAX_RUNS = 20
OTHER = "other"
"""The reason of a failed answer whose reason names no class."""
EVENTS = ("promoted", "canary", "refused", "rolled back")
STEP_GAUGES = {
    "distill_training_step": ("step", "Optimizer steps done."),
    "distill_training_loss": ("loss", "NLL + lambda * L_OR of the last step."),
    "distill_training_nll": ("nll", "NLL of a chosen token in the last step, in nats."),
    "distill_training_odds_ratio": ("odds_ratio", "L_OR of a pair in the last step."),
    "distill_training_accuracy": ("accuracy", "Share of the last step's pairs whose chosen response is the more likely one."),
    "distill_training_margin": ("margin", "Mean log-probability of a chosen token less that of a rejected one, in nats."),
    "distill_training_learning_rate": ("learning_rate", "Learning rate of the last step."),
    "distill_training_tokens_per_second": ("tokens_per_s", "Tokens without padding by the seconds of the last step."),
}
"""Metric -> what it is called in a line of checkpoints/rN/log.jsonl (LogRow in training/record.py), and what it means."""
METRICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "distill_stage_state": ("1 for the state a stage is in, 0 for the others.", ("run", "stage", "state")),
    "distill_stage_rows": ("Whole lines of a stage's JSON Lines files.", ("run", "stage")),
    "distill_stage_seconds": ("Wall time of a stage that has finished.", ("run", "stage")),
    "distill_harvest_prompts": ("Prompts the teacher is to answer.", ("run",)),
    "distill_harvest_wanted_answers": ("Prompts by samples a prompt.", ("run",)),
    "distill_harvest_answers_total": ("Answers of the teacher collected.", ("run",)),
    "distill_harvest_failed_answers": ("Answers that failed, and were not had since, by the class of the reason.", ("run", "reason")),
    **{name: (text, ("run",)) for name, (_, text) in STEP_GAUGES.items()},
    "distill_training_wanted_steps": ("Optimizer steps of the whole training; by the epochs so far, unless the recipe says.", ("run",)),
    "distill_evaluation_score": ("A system's score on the test split, 0 to 1 but for length_ratio.", ("run", "system", "metric")),
    "distill_evaluation_gain": ("Distilled less the baseline of the promotion, 0 to 1.", ("run", "baseline", "metric")),
    "distill_evaluation_gain_low": ("Lower end of the gain's 95% interval.", ("run", "baseline", "metric")),
    "distill_evaluation_gain_high": ("Upper end of the gain's 95% interval.", ("run", "baseline", "metric")),
    "distill_promoted_info": ("1 for the version that is served.", ("run", "version", "name")),
    "distill_promoted_score": ("Score of the served version on its test split, 0 to 1.", ("run", "metric")),
    "distill_registry_events_total": ("Promotions, canaries, refusals and rollbacks so far.", ("run", "what")),
    "distill_monitor_errors": ("Files that could not be read at this scrape; the log names them.", ()),
}
"""What is exposed: name -> meaning, labels."""
ModelT = TypeVar("ModelT", bound=BaseModel)


class _Recipe(BaseModel):
    harvest: HarvestSettings
    train: TrainSettings


class _RunFile(BaseModel):
    """What is read of run.json."""

    recipe: _Recipe


class _Step(BaseModel):
    """What is read of a line of checkpoints/rN/log.jsonl; None: of no meaning without rejected responses."""

    step: int
    epoch: float = Field(gt=0)
    loss: float
    nll: float
    odds_ratio: float | None = None
    accuracy: float | None = None
    margin: float | None = None
    learning_rate: float
    tokens_per_s: float


class _Score(BaseModel):
    value: float


class _System(BaseModel):
    scores: dict[str, _Score]


class _Gain(BaseModel):
    theirs: str
    metric: str
    gain: float
    low: float | None
    high: float | None


class _Format(BaseModel):
    """Of a report; those of format 1 are of before, and left alone until the run is evaluated again."""

    format: int = 1


class _Report(BaseModel):
    """What is read of evaluation/report.json."""

    metric: str
    baseline: str
    systems: dict[str, _System]
    comparisons: list[_Gain]


class Rows:
    """The whole lines of a JSON Lines file, each read once however often it is looked at."""

    def __init__(self, path: Path, take: Callable[[bytes], None] | None = None) -> None:
        """`take` is called with every line, once."""
        self._path, self._take, self._inode = path, take, path.stat().st_ino
        self._offset = self.count = 0
        self.last = b""

    def replaced(self) -> bool:
        """Whether another file has taken the place of this one."""
        status = self._path.stat()
        return status.st_ino != self._inode or status.st_size < self._offset

    def look(self) -> None:
        """Read what was added. A last line that is being written waits for its end. Raises OSError."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset, self.count, self.last = self._offset + len(line), self.count + 1, line
                if self._take is not None:
                    self._take(line)


class Answers:
    """A ledger of answers, segment by segment. Of several rows for one sample the last counts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._begin()

    def _begin(self) -> None:
        self._segments: dict[Path, Rows] = {}
        self._failed: dict[tuple[str, str], str] = {}
        self._answered: set[int] = set()
        """Hashes, which take less room than keys and examples."""
        self.damaged: Counter[Path] = Counter()

    def look(self) -> None:
        """Read what was added, or everything if the segments were compacted since. Raises OSError."""
        files = answer_files(self._folder)
        if list(self._segments) != files[: len(self._segments)] or any(rows.replaced() for rows in self._segments.values()):
            self._begin()
        for file in files:
            if file not in self._segments:
                self._segments[file] = Rows(file, partial(self._take, file))
            self._segments[file].look()

    def _take(self, file: Path, line: bytes) -> None:
        try:
            row = Response.model_validate_json(line)
        except ValidationError:
            self.damaged[file] += 1
            return
        place = (row.key, row.example_id)
        if row.status == "failed":
            reason = (row.reason or "").partition(":")[0]
            self._failed[place] = reason if reason.isidentifier() else OTHER
            self._answered.discard(hash(place))
        else:
            self._failed.pop(place, None)
            self._answered.add(hash(place))

    @property
    def answered(self) -> int:
        return len(self._answered)

    @property
    def rows(self) -> int:
        """Whole lines."""
        return sum(segment.count for segment in self._segments.values())

    def failed(self) -> Counter[str]:
        return Counter(self._failed.values())


class RunMetrics(Collector):
    """The run directories below a folder. A file that cannot be read is counted and named in the log, and the rest is told."""

    def __init__(self, runs: Path, *, registry: Path | None = None) -> None:
        self._runs, self._registry = runs, registry
        self._files: dict[Path, Rows] = {}
        self._ledgers: dict[Path, Answers] = {}
        self._known_errors: set[str] = set()
        self._scraping = threading.Lock()

    def collect(self) -> Iterator[Metric]:
        with self._scraping:
            scrape = _Scrape(self._files, self._ledgers)
            found: list[tuple[float, Path]] = []
            with scrape.reading():
                for folder in self._runs.iterdir():
                    with scrape.reading():
                        if (folder / "run.json").is_file():
                            found.append(((folder / "run.json").stat().st_mtime, folder))
            for _, run in sorted(found)[-MAX_RUNS:]:
                scrape.run(run)
            if self._registry is not None:
                scrape.registry("", self._registry)
            scrape.add("distill_monitor_errors", len(scrape.errors))
            for error in sorted(scrape.errors - self._known_errors):
                log.warning("%s", error)
            self._files, self._ledgers, self._known_errors = scrape.files, scrape.ledgers, scrape.errors
        yield from scrape.families.values()


class _Scrape:
    """One reading of everything."""

    def __init__(self, files: dict[Path, Rows], ledgers: dict[Path, Answers]) -> None:
        self._files_before, self._ledgers_before = files, ledgers
        self.files: dict[Path, Rows] = {}
        self.ledgers: dict[Path, Answers] = {}
        self.errors: set[str] = set()
        self.families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {
            name: (CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily)(name, text, labels=labels)
            for name, (text, labels) in METRICS.items()
        }

    def add(self, metric: str, value: float | None, *labels: str) -> None:
        if value is not None:
            self.families[metric].add_metric(labels, value)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """What cannot be read in this block is noted; the block ends there."""
        try:
            yield
        except (DistillError, OSError) as exc:
            self.errors.add(str(exc).partition("\n")[0])

    def run(self, folder: Path) -> None:
        name, recipe = folder.name, None
        with self.reading():
            described = _read(folder / "run.json", _RunFile)
            recipe = described.recipe if described else None
        self._stages(name, folder, recipe)
        with self.reading():
            self._harvest(name, folder, recipe)
        with self.reading():
            self._training(name, folder, recipe)
        with self.reading():
            self._evaluation(name, folder)
        self.registry(name, folder / "registry")

    def _stages(self, run: str, folder: Path, recipe: _Recipe | None) -> None:
        manifests: dict[str, Manifest] = {}
        stages = stages_of(recipe.train.rounds if recipe else 1)
        for stage in stages:
            with self.reading():
                if stage == TEACHER_LEDGER:
                    ledger = self._ledger(folder / stage)
                    rows = ledger.rows if ledger else None
                else:
                    files = sorted((folder / stage).glob("*.jsonl"))
                    rows = sum(self._rows(file).count for file in files) if files else None
                self.add("distill_stage_rows", rows, run, stage)
            with self.reading():
                manifest = stage_manifest(folder, stage)
                if manifest:
                    manifests[stage] = manifest
                    self.add("distill_stage_seconds", manifest.seconds, run, stage)
        with self.reading():
            for stage, state in stage_states(folder, stages, manifests).items():
                for other in STATES:
                    self.add("distill_stage_state", other == state, run, stage, other)

    def _harvest(self, run: str, folder: Path, recipe: _Recipe | None) -> None:
        prompts = self._seen(folder / "dataset" / "train.jsonl")
        if prompts:
            self.add("distill_harvest_prompts", prompts.count, run)
            if recipe:
                self.add("distill_harvest_wanted_answers", prompts.count * recipe.harvest.samples, run)
        if ledger := self._ledger(folder / TEACHER_LEDGER):
            self.add("distill_harvest_answers_total", ledger.answered, run)
            for reason, count in ledger.failed().items():
                self.add("distill_harvest_failed_answers", count, run, reason)
            for file, lines in ledger.damaged.items():
                raise DataError(f"{file}: {lines} lines are no answers")

    def _training(self, run: str, folder: Path, recipe: _Recipe | None) -> None:
        """Of the newest round that has begun."""
        logs = sorted((folder / "checkpoints").glob("r*/log.jsonl"), key=lambda file: int(file.parent.name[1:]))
        rows = self._seen(file) if logs and (file := logs[-1]) else None
        if not rows or not rows.last:
            return
        step = _parsed(_Step, rows.last, file)
        for metric, (field, _) in STEP_GAUGES.items():
            self.add(metric, getattr(step, field), run)
        if recipe:
            by_epochs = round(recipe.train.epochs * step.step / step.epoch)
            self.add("distill_training_wanted_steps", recipe.train.max_steps or by_epochs, run)

    def _evaluation(self, run: str, folder: Path) -> None:
        file = folder / "evaluation" / "report.json"
        made = _read(file, _Format)
        report = _read(file, _Report) if made and made.format == 2 else None
        if not report:
            return
        for system, found in report.systems.items():
            for metric, score in found.scores.items():
                self.add("distill_evaluation_score", score.value, run, system, metric)
        for compared in report.comparisons:
            if (compared.theirs, compared.metric) == (report.baseline, report.metric):
                self.add("distill_evaluation_gain", compared.gain, run, report.baseline, compared.metric)
                self.add("distill_evaluation_gain_low", compared.low, run, report.baseline, compared.metric)
                self.add("distill_evaluation_gain_high", compared.high, run, report.baseline, compared.metric)

    def registry(self, run: str, folder: Path) -> None:
        with self.reading():
            if promoted := store.current(folder):
                self.add("distill_promoted_info", 1, run, promoted.version, promoted.name)
                for metric, value in promoted.scores.items():
                    self.add("distill_promoted_score", value, run, metric)
        with self.reading():
            if events := store.history(folder):
                for what in EVENTS:
                    self.add("distill_registry_events_total", sum(event.what == what for event in events), run, what)

    def _seen(self, path: Path) -> Rows | None:
        """The rows of a file, None where there is none."""
        return self._rows(path) if path.is_file() else None

    def _ledger(self, folder: Path) -> Answers | None:
        """The teacher's answers below a folder, None where there are none."""
        if folder not in self.ledgers and answer_files(folder):
            ledger = self._ledgers_before.get(folder) or Answers(folder)
            ledger.look()
            self.ledgers[folder] = ledger
        return self.ledgers.get(folder)

    def _rows(self, path: Path) -> Rows:
        if path not in self.files:
            rows = self._files_before.get(path)
            if rows is None or rows.replaced():
                rows = Rows(path)
            rows.look()
            self.files[path] = rows
        return self.files[path]


def _read(path: Path, model: type[ModelT]) -> ModelT | None:
    """What is needed of a JSON file, None where there is none. Raises DataError, OSError."""
    try:
        return _parsed(model, path.read_bytes(), path)
    except FileNotFoundError:
        return None


def _parsed(model: type[ModelT], content: bytes, path: Path) -> ModelT:
    try:
        return model.model_validate_json(content)
    except ValidationError as exc:
        error = exc.errors()[0]
        raise DataError(f"{path}: {'.'.join(map(str, error['loc']))}: {error['msg']}") from exc
