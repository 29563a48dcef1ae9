"""Settings and recipes: flag > environment variable > recipe YAML > default; what nobody knows is refused by name.

An empty variable is none: compose files pass `${X:-}`.
A secret is a field of type SecretStr with a twin `NAME_file`: a path whose content is the secret, as container engines mount them.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import parse_qsl, urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError as SourceError

from shared.errors import SettingsError
from shared.harvest.custom_api import SECRET, CustomApi

RESERVED = {"DISTILL_CACHE", "DISTILL_UID", "DISTILL_BATCH_API_KEY", "TEACHER_URL", "TEACHER_MODEL", "TEACHER_KEY_FILE"}
"""Variables with a prefix of ours that are no settings. DISTILL_CACHE: where converted weights and downloads are kept.
DISTILL_BATCH_API_KEY: what `distill batch` shows a student's server. The others are compose's (.env.example), and may stand in the
environment of whoever runs compose and `distill` in turn."""

Quantization = Literal["int8", "float16", "float32"]
DEFAULT_QUANTIZATION: Quantization = "int8"
"""Of students and of local teachers alike."""


def cache_dir() -> Path:
    """Where converted weights and downloads are kept: $DISTILL_CACHE, else ~/.cache/blackbox-distill."""
    return Path(os.environ.get("DISTILL_CACHE") or Path.home() / ".cache" / "blackbox-distill")


class Section(BaseModel):
    """A part of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DatasetSettings(Section):
    """Which rows; the same rows in the same splits on every machine."""

    name: Literal["sample", "meqsum", "file"] = "sample"
    """sample: 330 questions embedded in the package. meqsum: from `path`, else from its URL. file: any JSONL or CSV at `path`."""
    path: Path | None = None
    """meqsum: the xlsx file; file: a .jsonl or .csv."""
    hub: str | None = None
    """meqsum: a Hugging Face data set to read instead of the xlsx, e.g. albertvillanova/meqsum."""
    question_column: str = "question"
    summary_column: str | None = "summary"
    """file: None where there are no references."""
    seed: int = 13
    """Of the shuffle that makes the splits (meqsum, file)."""
    validation_rows: int = Field(100, ge=0)
    test_rows: int = Field(100, ge=1)
    """Rows split off for validation and test (meqsum, file); the sample's splits are fixed."""
    reserved_rows: int = Field(0, ge=0)
    """First rows of the train split that are kept out of every stage, e.g. those a teacher's adapter was trained on."""
    limit: int | None = Field(None, ge=1)
    """Use only the first rows of the train split."""
    test_limit: int | None = Field(None, ge=1)
    """Use only the first rows of the test split."""

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> DatasetSettings:
        if self.path is not None and self.hub is not None:
            raise ValueError("path and hub: give one of them")
        if self.name == "sample" and self.path is not None:
            raise ValueError("path: the sample is embedded; set name to file (a .jsonl or .csv) or meqsum (its .xlsx) to read a path")
        if self.name != "meqsum" and self.hub is not None:
            raise ValueError("hub: only name meqsum is read from the Hub; save another data set as .jsonl and set name to file")
        if self.name != "file" and (self.question_column, self.summary_column) != ("question", "summary"):
            raise ValueError(f"question_column, summary_column: only name file has columns of your own; {self.name} knows its own")
        return self


class TaskSettings(Section):
    """What is asked of teacher and student alike; the words stand in shared/prompts.py."""

    instruction: str = Field("", description="Empty: the question-summarisation instruction of shared/prompts.py.")
    max_question_chars: int = Field(900, ge=1)
    """Longer texts are cut in the middle, keeping their beginning and end."""
    shots: int = Field(3, ge=0, le=32)
    """Examples before the question in the few-shot baselines, drawn from train by seed."""


class LaunchSettings(Section):
    """A teacher of the recipe's own, to be asked over HTTP like any other: `distill run` starts it, or `distill teacher --recipe`."""

    engine: Literal["local", "scripted"]
    model: str = "embedded:smollm2-135m-questions"
    """local: a model reference (see shared/models.py)."""


class PriceSettings(Section):
    """What the teacher costs, in any one currency."""

    input_per_million: float = Field(ge=0)
    output_per_million: float = Field(ge=0)
    """For a million tokens."""


class TeacherSettings(Section):
    """Who is asked: `url`, else `launch`. A URL takes the place of `launch`, so that one variable swaps the teacher of any recipe."""

    url: str | None = None
    """Base URL of an OpenAI-compatible API, with its /v1. protocol custom: the whole URL."""
    launch: LaunchSettings | None = None
    """None where a URL is given."""
    model: str | None = None
    """The public model name to ask for at `url`; default teacher. A launched teacher is asked for by the name of its own model."""
    protocol: Literal["chat", "completions", "custom"] = "chat"
    custom: CustomApi | None = None
    """protocol custom: what is sent, and where the answer says what."""
    api_key: SecretStr | None = Field(None, exclude=True)
    api_key_file: Path | None = Field(None, exclude=True)
    timeout_s: float = Field(120.0, gt=0)
    """Seconds allowed for one attempt at one request."""
    max_attempts: int = Field(5, ge=1)
    """Attempts at one request that fail while others are answered; then it is a failed row. Being told to wait (429) is no failure."""
    patience_s: float = Field(300.0, gt=0)
    """Seconds a teacher may stay dead before the harvest ends (before its first answer: at most 30)."""
    price: PriceSettings | None = None

    @field_validator("launch")
    @classmethod
    def _url_comes_first(cls, launch: LaunchSettings | None, others: ValidationInfo) -> LaunchSettings | None:
        return None if others.data.get("url") is not None else launch

    @model_validator(mode="after")
    def _somebody_is_asked(self) -> TeacherSettings:
        if self.url is None and self.launch is None:
            raise ValueError("give url or launch")
        if self.launch is not None and self.model is not None:
            raise ValueError("model: a launched teacher has the name of its own model; leave model out, or give url as well")
        if (self.protocol == "custom") != (self.custom is not None):
            raise ValueError("protocol, custom: the section describes the API of protocol custom, and of no other; give both or none")
        if self.custom is not None and self.url is None:
            raise ValueError("url: give the whole URL of the API that custom describes; a launched teacher needs no description")
        parts = urlsplit(self.url or "")
        if parts.username is not None or parts.password is not None or any(SECRET.search(name) for name, _ in parse_qsl(parts.query)):
            raise ValueError(
                "url: it holds a secret, and would be told in manifests and reports; give api_key_file, or protocol custom, which can send "
                'a key as another header, with "{api_key}" for it'
            )
        if self.url is not None and not (parts.scheme in ("http", "https") and parts.hostname):
            raise ValueError("url: give the whole of it, e.g. teacher.url=http://127.0.0.1:8000/v1")
        return self

    @property
    def chat(self) -> bool:
        """Whether it is asked by chat turns; else by plain text."""
        return self.protocol == "chat" if self.custom is None else self.custom.chat

    @property
    def public_name(self) -> str:
        """The model name to ask for. Another launched model has another one, so that no server of before answers in its place."""
        if self.launch is not None:
            return self.launch.model if self.launch.engine == "local" else self.launch.engine
        return self.model or "teacher"

    def address(self, given: str | None) -> str:
        """Where to ask; `given` is the URL at which a launched teacher is found today.

        Raises SettingsError without a URL, and for one that is not the recipe's: its answers would pass as the recipe's.
        """
        if given and self.url and given.rstrip("/") != self.url.rstrip("/"):
            raise SettingsError(
                f"--teacher-url {given}: the recipe's teacher is {self.url}; "
                f"to ask another one, give --set teacher.url={given} and another --out"
            )
        url = given or self.url
        if url is None:
            raise SettingsError(
                "teacher.url: the recipe launches its teacher: start it with `distill teacher --recipe R --no-auth` and give "
                "--teacher-url http://127.0.0.1:8000/v1 (`distill run` does both itself)"
            )
        return url

    @property
    def identity(self) -> str:
        """Who answers, independent of the port a launched teacher happens to get: part of every ledger key."""
        if self.url is not None:
            return self.url if self.custom is None else f"{self.url} (custom {self.custom.fingerprint})"
        assert self.launch is not None  # one of the two is given
        return f"launch:{self.launch.engine}" + (f":{self.launch.model}" if self.launch.engine == "local" else "")


class BudgetSettings(Section):
    """Caps of a whole harvest, however often it is begun again. None: no cap. Never overshot: what a request may cost at most is set
    aside before it is sent."""

    cost: float | None = Field(None, gt=0)
    """In the currency of teacher.price. protocol custom: the template needs "{max_tokens}", else nobody knows the most."""
    requests: int | None = Field(None, ge=1)
    seconds: float | None = Field(None, gt=0)
    """Of harvesting, pauses between two commands left out; none is sent after them."""


RedactKind = Literal["email", "phone", "url", "ip", "card", "iban", "ssn", "birth_date"]


class HarvestSettings(Section):
    """How many answers, and how they are sampled."""

    samples: int = Field(4, ge=1, le=64)
    """Answers a prompt."""
    temperature: float = Field(0.8, ge=0, le=2)
    top_p: float = Field(0.95, gt=0, le=1)
    max_tokens: int = Field(48, ge=1, le=4096)
    stop: tuple[str, ...] = Field(("\n",), max_length=4)
    shots: int = Field(0, ge=0, le=32)
    """Examples before the question; a teacher that was not trained for the task needs some."""
    redact: tuple[RedactKind, ...] | None = None
    """What is taken out of every text before it leaves for the teacher (shared/redact.py); the student keeps it."""
    redact_region: str = "US"
    """Whose phone numbers need no +: two letters of ISO 3166."""
    concurrency: int = Field(64, ge=1, le=1024)
    """Most requests in flight; fewer where the teacher says no (429) or slows down. One asks for all missing samples of a prompt."""
    requests_per_minute: float | None = Field(None, gt=0)
    tokens_per_minute: float | None = Field(None, gt=0)
    """What the teacher allows a key, prompts and the most they may be answered with. None: found out from what it refuses."""
    max_failed_fraction: float = Field(0.05, ge=0, le=1)
    """Above it the stage fails, with its census."""
    max_answer_chars: int = Field(100_000, ge=1)
    """A longer answer is a failed row."""
    budget: BudgetSettings = BudgetSettings()


class StudentSettings(Section):
    """Who learns."""

    model: str = "google/flan-t5-base"
    """A model reference: Hub name, folder, embedded:NAME or random:NAME (see shared/models.py)."""


class SampleSettings(Section):
    """The undistilled student's own answers, the natural rejected side."""

    samples: int = Field(2, ge=0, le=64)
    temperature: float = Field(0.8, ge=0, le=2)
    top_p: float = Field(0.95, gt=0, le=1)
    max_tokens: int = Field(48, ge=1, le=4096)
    stop: tuple[str, ...] = Field(("\n",), max_length=4)


class TripletSettings(Section):
    """How answers become preferences."""

    ranking: Literal["reference", "consensus", "first"] = "reference"
    """reference: ROUGE-L F1 against the row's reference. consensus: mean ROUGE-L F1 with the prompt's other teacher samples
    (minimum Bayes risk). first: the order of arrival."""
    margin: float = Field(0.05, ge=0, le=1)
    """Pairs whose scores differ by less are ties and dropped."""
    max_similarity: float = Field(0.9, gt=0, le=1)
    """Pairs whose texts have a higher ROUGE-L F1 with each other are near-equal and dropped."""
    max_chosen: int = Field(1, ge=1, le=16)
    """Of the teacher's answers, best first; several are weighted in the NLL by their scores."""
    max_rejected: int = Field(2, ge=1, le=16)
    """Rejected answers kept a prompt."""
    rejected_from: tuple[Literal["student", "teacher"], ...] = Field(("student", "teacher"), min_length=1, max_length=2)
    """Whose answers may be rejected; the first named is drawn on before the second."""
    on_policy: float = Field(0.5, ge=0, le=1)
    """From the second round on: share of the student's rejected answers that the student as it then is has given, the rest being the
    undistilled one's (phi of ORPO-Distill, arXiv 2509.25100)."""


class TrainSettings(Section):
    """ORPO: loss = NLL(chosen) + orpo_lambda * L_OR (Hong et al., 2024) + KL terms; formulas in student_trainer/training/losses.py."""

    trainer: Literal["packed", "trl"] = "packed"
    """packed: a prompt computed once for all its responses. trl: TRL's experimental ORPOTrainer, a row a pair, as a baseline."""
    rounds: int = Field(1, ge=1, le=16)
    """After each round but the last the student answers anew and triplets are rebuilt (triplets.on_policy). Each has all of `epochs`."""
    orpo_lambda: float = Field(0.1, ge=0)
    """0 is sequence-level distillation (SFT on the chosen)."""
    kl_reference: float = Field(0.0, ge=0)
    """Weight of the token KL(student || initial student) along the chosen responses."""
    kl_teacher_sequence: float = Field(0.0, ge=0)
    """Weight of KL(the teacher's samples || student) over whole answers."""
    kl_teacher_token: float = Field(0.0, ge=0)
    """Experimental. Weight of the token KL(prefix tree of the teacher's samples || student)."""
    kl_teacher_pseudocount: float = Field(1.0, ge=0)
    """Of kl_teacher_token: samples' worth of the uniform distribution at every node; 0 makes it kl_teacher_sequence."""
    epochs: float = Field(3.0, gt=0)
    """Of a round."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps of a round; overrides epochs."""
    batch_size: int = Field(8, ge=1)
    """Prompts a device and micro-batch."""
    gradient_accumulation: int = Field(1, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    scheduler: Literal["linear", "cosine", "constant"] = "linear"
    warmup_fraction: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0)
    max_prompt_tokens: int = Field(512, ge=8)
    max_response_tokens: int = Field(64, ge=2)
    frozen_layers: int = Field(0, ge=0)
    """Lowest blocks (and the embeddings, if any) that are not trained."""
    lora_rank: int = Field(0, ge=0)
    """0: the weights themselves are trained; else LoRA of this rank on all linear layers."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16: autocast over float32 weights. auto: bf16 where the processor computes it natively."""
    activation_checkpointing: bool = False
    """Computes activations again instead of keeping them: a third more work, much less memory."""
    fsdp: bool = False
    """Under torchrun: shard weights, gradients and optimizer over the processes (FSDP2) instead of keeping a copy in each (DDP)."""
    validate_every: float = Field(1.0, ge=0)
    """Epochs between validations (ROUGE-L of greedy answers), the best of which gives the student; 0: none, the last step does."""
    validation_rows: int = Field(32, ge=1)
    """Of the validation split, at most."""
    validation_max_tokens: int = Field(48, ge=1, le=4096)
    """Of a validation's greedy answer; best as in the evaluation."""
    validation_stop: tuple[str, ...] = Field(("\n",), max_length=4)
    """Texts that end it."""
    patience: int | None = Field(None, ge=1)
    """Validations without a better score after which a round ends early; None: never."""
    checkpoint_minutes: float = Field(5.0, gt=0)
    """Between checkpoints; a killed run goes on from the last."""
    checkpoint_steps: int | None = Field(None, ge=1)
    """Optimizer steps after which there is one as well."""
    keep_checkpoints: int = Field(1, ge=1)
    report_to: tuple[str, ...] = ("tensorboard",)
    """Beside log.jsonl, of which they show the same: whatever transformers reports to (tensorboard, wandb, mlflow, ...)."""

    @model_validator(mode="after")
    def _patience_has_validations(self) -> TrainSettings:
        if self.patience is not None and not self.validate_every:
            raise ValueError(
                "patience, validate_every: patience counts validations, and validate_every=0 makes none; give train.validate_every, or "
                "leave train.patience out"
            )
        return self

    @property
    def learns_samples(self) -> bool:
        """Whether the loss reads all of the teacher's answers, not the chosen ones alone."""
        return bool(self.kl_teacher_sequence or self.kl_teacher_token)


class ExportSettings(Section):
    """The form in which a student is served."""

    quantization: Quantization = DEFAULT_QUANTIZATION


def _refuse_more_than_a_base(url: str) -> None:
    """Of the model validators of URLs that are told in reports; a field's would repeat what was given. Raises ValueError."""
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None or parts.query:
        raise ValueError("url: user:password@ and ?... would be told in reports; give the base URL alone, and a key by api_key_file")


class SystemSettings(Section):
    """One more system beside those that are always evaluated; exactly one of `url`, `run` and `predictions` says where its answers are."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=40)
    """Its name in the report, and in promote.baseline."""
    url: str | None = None
    """Base URL of an OpenAI-compatible API, with its /v1; asked as the teacher is, each answer once."""
    model: str = "model"
    """url: the name to ask for."""
    protocol: Literal["chat", "completions"] = "chat"
    api_key_file: Path | None = Field(None, exclude=True)
    timeout_s: float = Field(120.0, gt=0)
    few_shot: bool = False
    """url, run: whether task.shots examples are given before the question."""
    run: Path | None = None
    """Another run directory with an exported student (model/), e.g. one with train.orpo_lambda=0: SFT."""
    predictions: Path | None = None
    """A .jsonl of {"example_id": ..., "text": ...}, one line a test row; other fields are not read."""

    @field_validator("name")
    @classmethod
    def _no_other_files_name(cls, name: str) -> str:
        if re.search(r"-\d{6}$", name) or name.startswith("judge-") or name == "bertscore":
            raise ValueError(f"{name}: answers are kept in files of such names already; choose another")
        return name

    @model_validator(mode="after")
    def _one_source(self) -> SystemSettings:
        if sum(source is not None for source in (self.url, self.run, self.predictions)) != 1:
            raise ValueError(f"{self.name}: give exactly one of url, run and predictions")
        if self.url is not None:
            _refuse_more_than_a_base(self.url)
        return self


class JudgeSettings(Section):
    """A language model that says which of two answers is better, over any OpenAI-compatible API that chats; two requests a test row and
    system."""

    url: str
    """Base URL with its /v1."""
    model: str
    """The name to ask for."""
    api_key: SecretStr | None = Field(None, exclude=True)
    api_key_file: Path | None = Field(None, exclude=True)
    timeout_s: float = Field(120.0, gt=0)
    """Seconds allowed for one attempt at one request; attempts and patience are the teacher's."""
    concurrency: int = Field(8, ge=1)
    """Most requests in flight."""
    against: tuple[str, ...] = ()
    """Systems the distilled student is compared with; none: promote.baseline."""
    rows: int | None = Field(None, ge=1)
    """Only the first so many test rows."""
    max_tokens: int = Field(64, ge=1, le=4096)
    """Of one answer. The verdict is one word; a model that thinks aloud first needs more."""
    criteria: str = Field(
        "The better answer does what the task says, keeps to what the input says, leaves out nothing that matters, and adds nothing. "
        "Neither the order of the answers nor their length is a reason by itself.",
        min_length=1,
    )
    """What makes an answer better, in words for the judge."""

    @model_validator(mode="after")
    def _no_secret(self) -> JudgeSettings:
        _refuse_more_than_a_base(self.url)
        return self


class BertScoreSettings(Section):
    """BERTScore, computed on this machine."""

    model: Path
    """A folder in Hugging Face format with a BERT-like encoder, e.g. of roberta-large. Nothing is downloaded."""
    layer: int | None = Field(None, ge=0)
    """Whose vectors are compared; 0 is the embeddings, None the last. The authors' choice: roberta-large 17, bert-base-uncased 9,
    distilbert-base-uncased 5, microsoft/deberta-xlarge-mnli 40."""
    batch_size: int = Field(32, ge=1)
    """Answers scored at once."""


HigherIsBetter = Literal["rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "sacrebleu", "chrf", "exact_match", "bertscore"]
Guarded = Literal["rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "sacrebleu", "chrf", "exact_match", "bertscore", "empty", "cut_off"]
"""Metrics of evaluator/metrics/table.py that a gate may look at, and bertscore where evaluate.bertscore is given."""


class EvaluateSettings(Section):
    """How systems are compared. A run may be evaluated again with others: what was answered is not asked again."""

    max_tokens: int = Field(48, ge=1, le=4096)
    """Of every system's greedy answer."""
    stop: tuple[str, ...] = Field(("\n",), max_length=4)
    systems: tuple[SystemSettings, ...] = ()
    """More systems to compare."""
    resamples: int = Field(10_000, ge=100, le=1_000_000)
    """Of the bootstrap, and exchanges of the randomisation test."""
    seed: int = Field(0, ge=0)
    allow_overlap: tuple[str, ...] = ()
    """Ids of test rows that may share text with a row of train or validation, or kinds of sharing: question, summary, near-question
    (shared/datasets/overlap.py). Any other that does ends the run."""
    judge: JudgeSettings | None = None
    bertscore: BertScoreSettings | None = None

    @field_validator("systems")
    @classmethod
    def _names_differ(cls, systems: tuple[SystemSettings, ...]) -> tuple[SystemSettings, ...]:
        names = [system.name for system in systems]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the name {twice[0]} is given twice; every system needs one of its own")
        return systems


class PromoteSettings(Section):
    """When a student replaces what is served."""

    metric: HigherIsBetter = "rougeL"
    baseline: str = "student-zero-shot"
    margin: float = Field(0.0, ge=0)
    """The gain must exceed this, in the metric's own unit (0 to 1)."""
    alpha: float = Field(0.05, gt=0, lt=1)
    """Both tests must find the gain above the margin with a smaller two-sided p: paired bootstrap and approximate randomisation (which for
    BLEU and chrF looks at the gain alone)."""
    min_rows: int = Field(20, ge=2)
    """Fewer scored test rows decide nothing."""
    no_regression: dict[Guarded, float] = Field(default_factory=dict)
    """Metric -> how much worse than the baseline the student may be in it, in the metric's own unit, e.g. {bleu: 0, cut_off: 0.02}."""

    @field_validator("no_regression")
    @classmethod
    def _losses_are_positive(cls, allowed: dict[Guarded, float]) -> dict[Guarded, float]:
        for metric, loss in allowed.items():
            if not 0 <= loss <= 1:
                raise ValueError(f"{metric}: the allowed loss is between 0 and 1, e.g. 0.01 for a point of 100")
        return allowed


class Recipe(BaseSettings):
    """Everything that makes a run what it is. Environment: DISTILL_TRAIN__EPOCHS=2 is train.epochs."""

    model_config = SettingsConfigDict(
        env_prefix="DISTILL_",
        env_nested_delimiter="__",
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        nested_model_default_partial_update=True,
    )

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    seed: int = Field(0, ge=0, lt=2**31)
    dataset: DatasetSettings = DatasetSettings()
    task: TaskSettings = TaskSettings()
    teacher: TeacherSettings
    student: StudentSettings = StudentSettings()
    harvest: HarvestSettings = HarvestSettings()
    sample: SampleSettings = SampleSettings()
    triplets: TripletSettings = TripletSettings()
    train: TrainSettings = TrainSettings()
    export: ExportSettings = ExportSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    promote: PromoteSettings = PromoteSettings()

    @model_validator(mode="after")
    def _a_budget_has_a_price(self) -> Recipe:
        if self.harvest.budget.cost is not None and self.teacher.price is None:
            raise ValueError(
                "harvest.budget.cost: teacher.price is needed to count it; give teacher.price.input_per_million and "
                "teacher.price.output_per_million, or cap harvest.budget.requests"
            )
        return self

    @model_validator(mode="after")
    def _a_budget_has_a_bound(self) -> Recipe:
        if self.harvest.budget.cost is not None and self.teacher.custom is not None and not self.teacher.custom.bounded:
            raise ValueError(
                "harvest.budget.cost: teacher.custom.body does not say how long an answer may be, so nobody knows what a request costs at "
                'most; write "{max_tokens}" where the API takes that bound, or cap harvest.budget.requests'
            )
        return self

    @model_validator(mode="after")
    def _a_gain_can_pass(self) -> Recipe:
        least = 2 / (self.evaluate.resamples + 1)
        if self.promote.alpha <= least:
            raise ValueError(
                f"promote.alpha, evaluate.resamples: no p is below {least:.2g} with {self.evaluate.resamples} resamples; raise one of them"
            )
        return self

    @model_validator(mode="after")
    def _bertscore_has_a_model(self) -> Recipe:
        if "bertscore" in (self.promote.metric, *self.promote.no_regression) and self.evaluate.bertscore is None:
            raise ValueError("promote: bertscore needs evaluate.bertscore.model, the folder of an encoder")
        return self

    @model_validator(mode="after")
    def _later_rounds_have_answers(self) -> Recipe:
        """Else every round would be trained on the triplets of the first, whatever share is asked for."""
        if self.train.rounds > 1 and self.triplets.on_policy > 0:
            otherwise = "; or give triplets.on_policy=0, for rounds that go on with the triplets of the first, or train.rounds=1"
            if self.sample.samples == 0:
                raise ValueError(
                    f"train.rounds={self.train.rounds}, sample.samples=0: after the first round the student's own answers are rejected, "
                    f"and it gives none; raise sample.samples{otherwise}"
                )
            if "student" not in self.triplets.rejected_from:
                raise ValueError(
                    f"train.rounds={self.train.rounds}, triplets.rejected_from: after the first round the student's own answers are "
                    f"rejected, and only the teacher's may be; name student there{otherwise}"
                )
        return self

    @model_validator(mode="after")
    def _trl_can_express_it(self) -> Recipe:
        """TRL has no KL terms and no weights of chosen responses, and computes the rejected ones at any lambda."""
        if self.train.trainer == "trl":
            kl = ("kl_reference", "kl_teacher_sequence", "kl_teacher_token")
            wrong = [f"train.{name}" for name, weight in self.train.model_dump(include=set(kl)).items() if weight]
            wrong += ["triplets.max_chosen"] * (self.triplets.max_chosen > 1) + ["train.orpo_lambda=0"] * (not self.train.orpo_lambda)
            if wrong:
                raise ValueError(f"train.trainer=trl cannot express {', '.join(wrong)}; give train.trainer=packed, or leave that out")
        return self


PROCEDURE = (
    "teacher.timeout_s",
    "teacher.max_attempts",
    "teacher.patience_s",
    "teacher.price",
    "teacher.custom.error",
    "teacher.custom.retry_after_s",
    "teacher.custom.input_tokens",
    "teacher.custom.output_tokens",
    "harvest.concurrency",
    "harvest.requests_per_minute",
    "harvest.tokens_per_minute",
    "harvest.max_failed_fraction",
    "harvest.budget",
    # a training step is the same however it is laid out: out of memory, one goes on with a smaller layout
    "train.batch_size",
    "train.gradient_accumulation",
    "train.activation_checkpointing",
    "train.checkpoint_minutes",
    "train.checkpoint_steps",
    "train.keep_checkpoints",
    "train.report_to",
    # nothing is trained on them, and the evaluation that they shape is made anew
    "evaluate",
    "promote",
)
"""Settings and sections a run may go on with others than it began with: they say how it proceeds, or how its outcome is judged."""

SettingsT = TypeVar("SettingsT", bound=BaseSettings)


def evaluation_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings an evaluation was made with, as its manifest keeps them: with others it is made anew."""
    return {name: getattr(recipe, name).model_dump(mode="json") for name in ("task", "evaluate", "promote")}


def load_settings(model: type[SettingsT], *, flags: Mapping[str, Any], yaml_file: Path | None = None) -> SettingsT:
    """One settings object from its layers: `flags` (dotted or plain names) over environment over YAML over defaults.

    Raises SettingsError that names each wrong field, its source where it is known, and the nearest right name.
    """
    names = list(dotted_names(model))
    _refuse_unknown_variables(model, names)
    recipe = read_yaml(yaml_file) if yaml_file else {}
    overrides = _nest(flags, names)

    class Layered(model):  # type: ignore[valid-type,misc]
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (_Layer(settings_cls, overrides), env_settings, _Layer(settings_cls, recipe))

    try:
        layered: Any = Layered()
    except (ValidationError, SourceError) as exc:
        raise SettingsError(explain(exc, names, yaml_file)) from exc
    layered.__class__ = model
    return layered  # type: ignore[no-any-return]


class _Layer(PydanticBaseSettingsSource):
    """A plain mapping as one layer of settings."""

    def __init__(self, settings_cls: type[BaseSettings], values: dict[str, Any]) -> None:
        super().__init__(settings_cls)
        self._values = values

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return self._values.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return self._values


def read_secret(value: SecretStr | None, file: Path | None, field: str) -> str | None:
    """The secret given directly, else the content of its file, else None; an empty one is none.

    Raises SettingsError for an unreadable or empty file.
    """
    if value is not None and value.get_secret_value().strip():
        return value.get_secret_value().strip()
    if file is None:
        return None
    try:
        secret = file.read_text().strip()
    except PermissionError as exc:
        raise SettingsError(
            f"{field}_file: {file} may not be read by this user (id {os.getuid()}); chmod 644, or run as its owner (compose: DISTILL_UID)"
        ) from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise SettingsError(f"{field}_file: cannot read {file}: {getattr(exc, 'strerror', None) or exc}") from exc
    if not secret:
        raise SettingsError(f"{field}_file: {file} is empty; put the key there, alone on a line")
    return secret


def dotted_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every settable name of a settings model: `train.epochs`, ..."""
    for name, field in model.model_fields.items():
        nested = _section(field.annotation)
        yield prefix + name
        if nested:
            yield from dotted_names(nested, f"{prefix}{name}.")


def _section(annotation: Any) -> type[BaseModel] | None:
    options = getattr(annotation, "__args__", (annotation,))
    return next((a for a in options if isinstance(a, type) and issubclass(a, BaseModel)), None)


def nearest(name: str, names: list[str]) -> str:
    """'; did you mean X?' or, where nothing is near, nothing."""
    leaf = {n.rpartition(".")[2]: n for n in names}
    close = difflib.get_close_matches(name, names, 1, 0.75) or [
        leaf[c] for c in difflib.get_close_matches(name.rpartition(".")[2], list(leaf), 1, 0.75)
    ]
    return f"; did you mean {close[0]}?" if close else ""


def explain(exc: ValidationError | SourceError, names: list[str], recipe: Path | None) -> str:
    """A ValidationError as one sentence a field, without pydantic's own vocabulary. Fields without sections are a command's options."""
    where, options = f"{recipe}: " if recipe else "", not any("." in name for name in names)
    if isinstance(exc, SourceError):
        return f"{where}{exc}: {exc.__cause__}"
    lines = []
    for error in exc.errors():
        field = ".".join(str(part) for part in error["loc"])
        if field and options:
            field = f"--{error['loc'][0]}".replace("_", "-")
        if not field:  # what concerns several sections names its fields itself
            lines.append(error["msg"].removeprefix("Value error, "))
            continue
        if error["type"] == "extra_forbidden":
            lines.append(f"{field}: unknown setting{nearest(field, names)}")
        elif error["type"] == "missing":
            lines.append(f"{field}: required, and neither flag, environment nor recipe gives it")
        else:
            given = "" if isinstance(error["input"], (dict, BaseModel)) else f" (got {error['input']!r})"
            said = error["msg"].removeprefix("Value error, ")
            if error["type"] == "tuple_type":
                said = f"expected a list, e.g. {json.dumps([str(error['input'])])}"
            lines.append(f"{field}: {said}{given}")
    return where + "; ".join(lines)


def _refuse_unknown_variables(model: type[BaseSettings], names: list[str]) -> None:
    prefix = model.model_config.get("env_prefix", "").upper()
    known = {prefix + n.upper().replace(".", "__") for n in names} | RESERVED
    for variable in sorted(os.environ):
        if variable.upper().startswith(prefix) and variable.upper() not in known:
            raise SettingsError(f"{variable}: unknown environment variable{nearest(variable.upper(), sorted(known))}; unset it or mend it")


def _nest(flags: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flags.items():
        if name not in names:
            raise SettingsError(f"{name}: unknown setting{nearest(name, names)}")
        *parents, leaf = name.split(".")
        section = nested
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise SettingsError(f"{name}: {parent} is a section and was given the value {section!r}; name one of its settings")
        if isinstance(section.get(leaf), dict):
            raise SettingsError(f"{name}: given both as a whole and setting by setting; choose one way")
        section[leaf] = value
    return nested


def read_yaml(path: Path) -> dict[str, Any]:
    """A recipe's own words, before flags and environment. Raises SettingsError."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise SettingsError(f"recipe {path}: {exc.strerror}; give --recipe the path of a YAML file (recipes/ has some)") from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise SettingsError(f"recipe {path} is not readable YAML: {exc}") from exc
    if not isinstance(content, dict):
        raise SettingsError(f"recipe {path}: expected a mapping of settings, found {type(content).__name__}")
    for name in content:
        if not isinstance(name, str):
            raise SettingsError(f"recipe {path}: {name!r}: names of settings are text")
    return content
