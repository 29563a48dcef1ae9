"""Test scores in the model card of a promoted student: in its metadata, as the Hugging Face Hub reads them, and as a table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from evaluator.metrics.table import MAIN, METRICS
from evaluator.scores import Scored
from evaluator.systems import DISTILLED
from shared.errors import DataError

SECTION = "## Scores"
"""What `distill export` says of scores until there are any stands under this line (student_trainer/card.py)."""
METADATA = re.compile(r"---\n(.*?\n)?---\n", re.DOTALL)


def with_scores(card: str, scored: Mapping[str, Scored], *, name: str, dataset: str, verdict: str) -> str:
    """`card` with the distilled student's scores as `model-index`, and those of all systems in the place of its section on scores.

    A card without metadata or without that section gets them. name, dataset: the recipe's; verdict: why it was promoted, in one phrase.
    Raises DataError if the metadata are no YAML mapping.
    """
    found = METADATA.match(card)
    metadata, text = _read(found.group(1) or "" if found else ""), card[found.end() :] if found else f"\n{card}"
    task = metadata.get("pipeline_tag", "text-generation")
    metadata["model-index"] = [{"name": name, "results": [_result(scored[DISTILLED], task, dataset)]}]
    section = f"{SECTION}\n\n{_table(scored)}\n\nPromoted: {verdict}.\n\n"
    before, after = _around_section(text)
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n{before}{section}{after}".rstrip("\n") + "\n"


def _read(metadata: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(metadata) or {}
    except yaml.YAMLError as exc:
        raise DataError(
            f"model/README.md: its metadata are not readable YAML: {exc}; mend them, or remove model/ and export again"
        ) from exc
    if not isinstance(values, dict):
        raise DataError("model/README.md: its metadata are no mapping of names to values; mend them, or remove model/ and export again")
    return values


def _result(scored: Scored, task: str, dataset: str) -> dict[str, Any]:
    """The Hub's form of a result: scores in [0, 1], as everywhere in a run."""
    values = scored.values()
    return {
        "task": {"type": task},
        "dataset": {"type": dataset, "name": dataset, "split": "test", "args": {"rows": len(scored.ids)}},
        "metrics": [{"type": metric, "name": METRICS[metric].label, "value": values[metric]} for metric in MAIN],
    }


def _around_section(text: str) -> tuple[str, str]:
    """`text` before its section on scores, and from the next section on; all and nothing where there is none."""
    at = re.search(rf"^{SECTION}\n", text, re.MULTILINE)
    if at is None:
        return text.rstrip("\n") + "\n\n", ""
    following = re.compile(r"^## ", re.MULTILINE).search(text, at.end())
    return text[: at.start()], text[following.start() :] if following else ""


def _table(scored: Mapping[str, Scored]) -> str:
    rows = len(scored[DISTILLED].ids)
    lines = [f"| system | {' | '.join(METRICS[metric].label for metric in MAIN)} | words |", f"|---|{'---:|' * (len(MAIN) + 1)}"]
    for name, found in scored.items():
        values = found.values()
        shown = f"**{name}**" if name == DISTILLED else name
        points = " | ".join(f"{100 * values[metric]:.1f}" for metric in MAIN)
        lines.append(f"| {shown} | {points} | {found.mean_words:.1f} |")
    return f"Greedy answers to {rows} test rows, points of 100; this model is `{DISTILLED}`.\n\n" + "\n".join(lines)
