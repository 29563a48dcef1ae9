"""The model card of an exported student: RUN/model/README.md, in the format of the Hugging Face Hub.

It says nothing that is not recorded in the run, and no secret: of a teacher's URL neither credentials nor query.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import yaml

from shared.artifacts import Run, sha256_file
from shared.contracts import ServingConfig
from shared.prompts import SUMMARISE_QUESTION
from shared.settings import DatasetSettings, TeacherSettings

SCORES = "## Scores"
"""The section that a promotion rewrites: evaluator/card.py looks for this line."""
TAGS = ("blackbox-distill", "orpo", "knowledge-distillation", "ctranslate2")
EMBEDDED = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What every embedded:NAME was made from, as the Hub knows it."""
STOCK = "embedded:smollm2-135m"
"""Has the weights of EMBEDDED as they are."""
DATA_LICENCES = {
    "sample": "CC0 1.0",
    "meqsum": "CC BY 4.0; Ben Abacha and Demner-Fushman, *On the Summarization of Consumer Health Questions*, ACL 2019",
}
ENGLISH = ("sample", "meqsum")
"""Data sets whose language is known."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
MEDICAL = (
    "**Not medical advice, and no medical device.** This model restates the question that a message asks. It must not be used to answer "
    "it, to diagnose, to treat or to triage. A restated question may have lost or changed what matters (a dose, a duration, a "
    "negation): read the message itself before anybody acts on it."
)
NOT_TESTED = (
    "No test row has been looked at yet: test scores come with the promotion, whose registry keeps a copy of this card that has them."
)
CAUTION = (
    "The model's answers may be wrong, incomplete or made up, whatever the scores say. Check them before anybody acts on them, and do not "
    "use the model where a wrong answer does harm."
)


def model_card(run: Run, folder: Path, *, origin: Mapping[str, str], parity: str) -> str:
    """The card of what is in `folder`: `hf`, `serving` and, after LoRA, `adapter`.

    origin: of the undistilled student, see `export.origin_of`; parity: how alike `hf` and `serving` answer, in one phrase.
    """
    serving = ServingConfig.model_validate_json((folder / "serving" / "serving.json").read_bytes())
    sections = [
        f"---\n{yaml.safe_dump(front_matter(run, serving, origin), sort_keys=False, allow_unicode=True)}---",
        f"# {run.recipe.name}",
        MEDICAL if asks_for_a_summary(run) else CAUTION,
        "## What it is\n\n" + _what_it_is(run, serving),
        "## How it was made\n\n" + _items(_steps(run)),
        "## Data and licences\n\n" + _items(_licences(run, origin)),
        f"{SCORES}\n\n{_validation(run)}\n\n{NOT_TESTED}",
        "## How to use it\n\n" + _usage(run, serving),
        f"## Files\n\n{_files(folder)}\n\nChecked at export: {parity}.",
        "## Limits\n\n" + _items(_limits(run)),
    ]
    return "\n\n".join(sections) + "\n"


def asks_for_a_summary(run: Run) -> bool:
    """Whether the task is the one this project is about: a health message as one short question."""
    return run.recipe.task.instruction in ("", SUMMARISE_QUESTION)


def front_matter(run: Run, serving: ServingConfig, origin: Mapping[str, str]) -> dict[str, Any]:
    """The Hub's metadata. What has no name there, as a local folder, is left out."""
    base, dataset = hub_name(run.recipe.student.model), run.recipe.dataset.hub
    if "license" in origin:
        licence = {"license": origin["license"].lower()}
    else:  # offline nobody knows, but a student is bound by its base model's
        licence = {"license": "other", "license_name": "of-the-base-model"}
        licence |= {"license_link": f"https://huggingface.co/{base}"} if base else {}
    return {
        **licence,
        **({"base_model": base, "base_model_relation": "finetune"} if base else {}),
        "pipeline_tag": "summarization" if serving.kind == "encoder-decoder" and asks_for_a_summary(run) else "text-generation",
        **({"language": "en"} if run.recipe.dataset.name in ENGLISH else {}),
        "library_name": "transformers",
        "tags": list(TAGS),
        **({"datasets": [dataset]} if dataset and hub_name(dataset) else {}),
    }


def hub_name(reference: str) -> str | None:
    """The name under which the Hub knows a model or a data set; None for folders and random weights."""
    if reference.startswith("embedded:"):
        return EMBEDDED
    return reference if HUB_NAME.fullmatch(reference) and not Path(reference).exists() else None


def base_name(reference: str) -> str:
    """Under which name others find the very weights of a base model, if they can: of a folder on this machine its last part."""
    return EMBEDDED if reference == STOCK else named(reference)


def public_url(url: str) -> str:
    """`url` without what may be a secret: user, password, query, fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def teacher_in_words(teacher: TeacherSettings) -> str:
    """Who answered, and where."""
    name = _code(teacher.public_name)
    if teacher.url is None:
        return f"{name}, launched by the recipe and asked over HTTP"
    custom = f", an API of its own (description {teacher.custom.fingerprint})" if teacher.custom else ""
    return f"{name} at {_code(public_url(teacher.url))}{custom}"


def source_in_words(dataset: DatasetSettings, source: Mapping[str, str]) -> str:
    """Where the rows came from, by the dataset stage's own record; of a file on this machine only its name."""
    location = source["location"]
    if dataset.path is not None:
        location = Path(location).name
    return f"{_code(location)}, SHA-256 `{source['sha256']}`"


def _what_it_is(run: Run, serving: ServingConfig) -> str:
    recipe = run.recipe
    task = recipe.task.instruction or SUMMARISE_QUESTION
    return (
        f"{_code(named(recipe.student.model))} ({serving.kind}), distilled from the answers of a black-box teacher: text alone, no "
        "log-probabilities, no token ids. It was trained for one task, worded so:\n\n"
        f"> {_line(task)}"
    )


def named(reference: str) -> str:
    """A model reference without the way to a folder on this machine."""
    return reference if ":" in reference or hub_name(reference) else Path(reference).name


def _steps(run: Run) -> Iterator[str]:
    recipe, settings, rounds = run.recipe, run.recipe.train, range(run.recipe.train.rounds)
    yield f"Teacher: {teacher_in_words(recipe.teacher)}"
    if harvest := run.manifest("responses/teacher"):
        yield (
            f"Teacher answers: {harvest.counts.get('answers', '?')} to {harvest.counts.get('prompts', '?')} prompts, sampled at a "
            f"temperature of {recipe.harvest.temperature:g} with {recipe.harvest.shots} examples before each question"
        )
    made = [manifest for number in rounds if (manifest := run.manifest(f"triplets/r{number}"))]
    if counts := [str(manifest.counts["triplets"]) for manifest in made if "triplets" in manifest.counts]:
        yield f"Triplets (prompt, chosen, rejected), a round: {', '.join(counts)}; ranked by {recipe.triplets.ranking}"
    yield f"Rounds: {settings.rounds}{_later_rounds(run)}"
    weighted = {name: getattr(settings, name) for name in ("kl_reference", "kl_teacher_sequence", "kl_teacher_token")}
    terms = "".join(f", {name} {weight:g}" for name, weight in weighted.items() if weight)
    yield f"Loss: ORPO (Hong et al., 2024), lambda {settings.orpo_lambda:g}{terms}; trainer {settings.trainer}"
    yield f"Length: {f'{settings.max_steps} steps' if settings.max_steps else f'{settings.epochs:g} epochs'} a round, seed {recipe.seed}"
    what = f"LoRA of rank {settings.lora_rank}, merged into hf/" if settings.lora_rank else "the weights themselves"
    yield f"Trained: {what}; {settings.frozen_layers} lowest layers frozen; learning rate {settings.learning_rate:g}"
    best = _best_validation(run)
    yield (
        f"Checkpoint: step {best['step']}, by validation ROUGE-L {100 * best['rouge_l']:.1f}" if best else "Checkpoint: after the last step"
    )


def _later_rounds(run: Run) -> str:
    """What the student's own answers were to the rounds after the first, as their triplets record it; nothing where nothing is recorded."""
    later = [manifest for number in range(1, run.recipe.train.rounds) if (manifest := run.manifest(f"triplets/r{number}"))]
    rejected: Counter[str] = sum((Counter(manifest.counts.get("rejected_sources", {})) for manifest in later), Counter())
    if not rejected:
        return ""
    return (
        f"; of the {rejected.total()} answers that those after the first rejected, {rejected['current-student']} were given by the student "
        "as it then was"
    )


def _licences(run: Run, origin: Mapping[str, str]) -> Iterator[str]:
    recipe = run.recipe
    licence = DATA_LICENCES.get(recipe.dataset.name, "not recorded: that of whoever gave the file")
    rows = run.manifest("dataset")
    assert rows is not None  # the parity check has read them
    kept = ", ".join(f"{count} {split}" for split, count in rows.counts["kept"].items())
    source = source_in_words(recipe.dataset, rows.counts["source"])
    yield f"Data set: `{recipe.dataset.name}` ({kept} rows), from {source}. Licence: {licence}"
    base = {"reference": named(origin["reference"]), **{key: value for key, value in origin.items() if key != "reference"}}
    told = "; ".join(f"{key} {_code(value)}" for key, value in base.items())
    yield f"Base model: {told}" + ("" if "license" in origin else "; its licence is not recorded here, and applies")
    yield "Teacher: the terms of use of the teacher apply to what is made of its answers, this model among it"


def _validation(run: Run) -> str:
    """A sentence on the checkpoint that was chosen, if one was by validation."""
    best = _best_validation(run)
    if not best:
        return "No checkpoint was chosen by validation: this is the student after the last step."
    return (
        f"Validation ROUGE-L {100 * best['rouge_l']:.1f} (F1, points of 100, mean over at most {run.recipe.train.validation_rows} rows) at "
        f"step {best['step']}: the best of its round, and therefore the checkpoint that was taken. A score that chose is too hopeful."
    )


def _best_validation(run: Run) -> dict[str, Any] | None:
    trained = run.manifest(f"checkpoints/r{run.recipe.train.rounds - 1}")
    return trained.counts.get("best_validation") if trained else None


def _usage(run: Run, serving: ServingConfig) -> str:
    recipe = run.recipe
    seq2seq = serving.kind == "encoder-decoder"
    auto = "AutoModelForSeq2SeqLM" if seq2seq else "AutoModelForCausalLM"
    turns = '[{"role": "user", "content": prompt}]'
    encode = (
        f'tokenizer.apply_chat_template({turns}, add_generation_prompt=True, return_tensors="pt", return_dict=True)'
        if serving.chat_template and not seq2seq
        else 'tokenizer(prompt, return_tensors="pt")'
    )
    answer = "answer" if seq2seq else 'answer[inputs["input_ids"].shape[1] :]'
    ended = "".join(f".split({stop!r})[0]" for stop in recipe.evaluate.stop)
    prompt = f"{recipe.task.instruction or SUMMARISE_QUESTION}\n\n"
    return f"""Put the question as the model was trained to read it; greedy answers are what was evaluated. In this folder:

```python
from transformers import {auto}, AutoTokenizer

# on the Hub: from_pretrained("the name of this repository", subfolder="hf")
model, tokenizer = {auto}.from_pretrained("hf"), AutoTokenizer.from_pretrained("hf")
prompt = {prompt!r} + "My mother is 80 and keeps falling at night. Could her water pill be the reason?"
inputs = {encode}
answer = model.generate(**inputs, max_new_tokens={recipe.evaluate.max_tokens}, do_sample=False)[0]
print(tokenizer.decode({answer}, skip_special_tokens=True){ended}.strip())
```

Served by CTranslate2, without torch, once it is promoted; the server words the prompt itself:

```
distill serve --registry RUN/registry
curl http://127.0.0.1:8080/v1/generate -H 'content-type: application/json' -d '{{"question": "..."}}'
```"""


def _files(folder: Path) -> str:
    """A table of the files that a user may want to check."""
    weights = [*sorted((folder / "hf").glob("*.safetensors")), *sorted((folder / "adapter").glob("*.safetensors"))]
    named = [*weights, folder / "serving" / "model.bin", folder / "serving" / "tokenizer.json"]
    rows = [f"| `{file.relative_to(folder)}` | `{sha256_file(file)}` |" for file in named]
    return "\n".join(["| file | SHA-256 |", "|---|---|", *rows])


def _limits(run: Run) -> Iterator[str]:
    recipe = run.recipe
    yield "One task, one data set, one training seed; other texts, other languages and other tasks were not looked at"
    yield "It learned from a teacher's answers, and has the teacher's errors and prejudices, beside its own"
    yield "ROUGE and BLEU count words in common with a reference: a high score is no proof that an answer is true or complete"
    yield (
        f"Questions of more than {recipe.task.max_question_chars} characters are cut in their middle when it is served, answers end after "
        f"{recipe.evaluate.max_tokens} tokens in the evaluation"
    )
    if recipe.student.model.startswith("random:"):
        yield "It began from random weights: it shows that the parts fit together, and is of no use"


def _items(lines: Iterator[str]) -> str:
    return "\n".join(f"- {line}." for line in lines)


def _line(text: str) -> str:
    """On one line, where it can begin no heading and end no section."""
    return " ".join(text.split())


def _code(text: str) -> str:
    """As Markdown shows it letter by letter, on one line."""
    text = _line(text)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"
