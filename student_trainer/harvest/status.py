"""How a harvest stands, read off its files alone: nothing is locked and nothing opened for writing."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from shared.artifacts import read_json
from shared.contracts import CUT_OFF
from shared.errors import DataError
from shared.harvest.budget import Account
from shared.harvest.ledger import OK
from student_trainer.harvest.stage import ACCOUNT, STAGE, answers_held
from student_trainer.harvest.watch import FRESH_S, PROGRESS


def report(run: Path) -> str:
    """A few lines. Raises DataError for a folder that is no run."""
    if not (run / "run.json").is_file():
        raise DataError(f"{run} is no run directory (it has no run.json); give the directory that a stage wrote to")
    recipe, stage = read_json(run / "run.json").get("recipe", {}), run / STAGE
    held, elsewhere = answers_held(stage)
    counted = Counter(held.values())
    wanted = _lines(run / "dataset" / "train.jsonl") * recipe.get("harvest", {}).get("samples", 0)
    answers, failed = counted[OK] + counted[CUT_OFF], {kind: n for kind, n in sorted(counted.items()) if kind not in (OK, CUT_OFF)}
    lines = [
        f"{run}: {_state(stage, (stage / 'manifest.json').is_file())}",
        f"answers   {answers} of {wanted or '?'}, {counted[CUT_OFF]} of them cut off",
        f"failed    {sum(failed.values())}{': ' if failed else ''}{', '.join(f'{n} {k}' for k, n in failed.items())}",
    ]
    if elsewhere:
        lines.append(f"besides   answers in {elsewhere}, which are not counted here")
    account = _account(stage / ACCOUNT)
    if account is not None:
        cost = f", cost {account.cost:.4g}" if recipe.get("teacher", {}).get("price") else ""
        lines.append(f"spent     {account.requests} requests in {account.seconds:.0f} s of harvesting{cost}")
    return "\n".join(lines)


def _state(stage: Path, complete: bool) -> str:
    try:
        told: dict[str, Any] = json.loads((stage / PROGRESS).read_bytes())
        at = datetime.fromisoformat(told["at"])
    except (OSError, ValueError, KeyError):
        return "complete" if complete else "not begun"
    if told.get("state") == "ended":
        return "complete" if complete else f"ended before it was complete, {told['at']}; the same command goes on"
    age = (datetime.now(UTC) - at).total_seconds()
    if age > FRESH_S or not _lives(told):
        return f"dead: last heard of {told['at']}; the same command goes on"
    line = f"running (process {told['pid']} on {told['host']}), {told['rows_per_s']:.1f} answers/s, {told['in_flight']} in flight"
    line += f" of {told['concurrency']}, {told['refused']} x 429"
    return line + (f"; {told['waiting']}" if told.get("waiting") else "")


def _lives(told: dict[str, Any]) -> bool:
    if told.get("host") != platform.node():
        return True  # another container's processes cannot be seen
    try:
        os.kill(int(told["pid"]), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError):
        pass
    return True


def _account(file: Path) -> Account | None:
    try:
        return Account.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


def _lines(file: Path) -> int:
    try:
        with file.open("rb") as lines:
            return sum(1 for _ in lines)
    except OSError:
        return 0
