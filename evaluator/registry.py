"""`distill registry`: which students have been promoted, what happened to them, and in what two of them differ. Reads only."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaluator.report.contract import Report
    from evaluator.scores import Scored
    from evaluator.significance import Comparison
    from shared.contracts import Example
    from shared.registry import Canary, Event, Promoted

MAIN = ("rouge1", "rouge2", "rougeL", "bleu")
"""Scores that a list has room for; `--json` has all."""
FEW = 5
UNREPORTED = ("rougeL", 10_000, 0)
"""Metric, resamples and seed of a paired comparison where B has no report that tells those of its gate."""


def main(argv: list[str]) -> int:
    """Returns 0. Raises DataError for what is damaged, after printing all that is not, and for versions that cannot be compared."""
    parser = argparse.ArgumentParser(
        prog="distill registry",
        description="Look into a registry of promoted students; `distill promote` and `distill rollback` change it.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="every version, the newest first, and which of them is served")
    listing.add_argument("--json", action="store_true", help="print one JSON object instead, with all scores")
    told = commands.add_parser("history", help="every promotion, canary, rollback and refusal, with its reason, oldest first")
    comparing = commands.add_parser(
        "diff",
        help="two versions: settings, scores, files, and a paired comparison on their test rows",
        description="Show how B differs from A. Ends with exit code 4 if both were scored, but not on the same test rows.",
    )
    for name in ("a", "b"):
        comparing.add_argument(
            name, metavar=name.upper(), help="a version's id, the beginning of it or of the hash in it, or: current, canary, previous"
        )
    for command in (listing, told, comparing):
        add_where(command)
    arguments = parser.parse_args(argv)
    registry = where(arguments)
    if arguments.command == "list":
        show_list(registry, as_json=arguments.json)
    elif arguments.command == "history":
        show_history(registry)
    else:
        show_diff(registry, arguments.a, arguments.b)
    return 0


def add_where(parser: argparse.ArgumentParser) -> None:
    """The options that say which registry is meant; `where` reads them."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--registry", type=Path, metavar="DIR", help="where promoted students are kept")
    group.add_argument("--out", type=Path, metavar="RUN", help="a run directory: the registry in it")


def where(arguments: argparse.Namespace) -> Path:
    """The registry that the options of `add_where` name. Raises DataError for an --out that is no run directory."""
    if arguments.registry is not None:
        return Path(arguments.registry)
    run = Path(arguments.out)
    if not (run / "run.json").exists():
        from shared.errors import DataError

        raise DataError(f"--out {run} is no run directory (it has no run.json); give the one of a run, or --registry")
    return run / "registry"


def show_list(registry: Path, *, as_json: bool) -> None:
    """Print every version and what has been refused since the last promotion, canary or rollback. A damaged version is a row like
    others.

    Raises DataError, after all that can be told, if a pointer or the history is damaged.
    """
    from shared import registry as store
    from shared.errors import DataError

    troubles: list[DataError] = []
    known, served, tried, events = store.versions(registry), None, None, []
    try:
        served = store.current(registry)
        tried = store.canary(registry)
    except DataError as exc:
        troubles.append(exc)
    try:
        events = store.history(registry)
    except DataError as exc:
        troubles.append(exc)
    for pointer in (served, tried.promoted if tried else None):
        if pointer is not None and pointer.version not in known:
            known[pointer.version] = DataError(f"versions/{pointer.version}/promoted.json is gone")
    rows = [_row(version, found, served, tried, events) for version, found in sorted(known.items(), reverse=True)]
    last = next((event for event in reversed(events) if event.what != "refused"), None)
    refused = events[events.index(last) + 1 :] if last else events
    if as_json:
        told = {
            "served": served.version if served else None,
            "canary": {"version": tried.promoted.version, "share": tried.share} if tried else None,
            "versions": rows,
            "refused": [event.model_dump() for event in refused],
        }
        print(json.dumps(told, indent=2, ensure_ascii=False))
    else:
        _print_list(registry, rows, tried, last, refused)
    if troubles:
        raise troubles[0]


def _row(
    version: str, found: Promoted | Exception, served: Promoted | None, tried: Canary | None, events: Sequence[Event]
) -> dict[str, Any]:
    """One version as `list --json` gives it. Of the served one and the canary the scores are those that it was last promoted with."""
    pointers = {pointer.version: pointer for pointer in (served, tried.promoted if tried else None) if pointer is not None}
    state = _state(version, found, served, tried, events)
    promoted = pointers.get(version, found)
    error = str(found) if isinstance(found, Exception) else None
    if isinstance(promoted, Exception):
        return {"version": version, "state": state, "error": error, "name": None, "promoted_at": None, "scores": {}, "run": None}
    return {
        "version": version,
        "state": state,
        "error": error,
        "name": promoted.name,
        "promoted_at": promoted.promoted_at if isinstance(found, Exception) else found.promoted_at,
        "scores": promoted.scores,
        "run": promoted.run,
    }


def _state(version: str, found: Promoted | Exception, served: Promoted | None, tried: Canary | None, events: Sequence[Event]) -> str:
    """served; canary: on a share of the requests; previous: what a rollback goes back to; earlier: what further ones do; rolled back:
    was served; tried: was a canary and no more; never served: none of these.
    """
    if served is None:
        return "unknown"
    if version == served.version:
        return "served"
    if tried and version == tried.promoted.version:
        return "canary"
    if version in served.served_before:
        return "previous" if version == served.served_before[-1] else "earlier"
    if any(event.version == version for event in events):
        return "rolled back"
    begun = None if isinstance(found, Exception) else found.promoted_at
    return "tried" if any(event.what == "canary" and event.at == begun for event in events) else "never served"


def _print_list(registry: Path, rows: Sequence[dict[str, Any]], tried: Canary | None, last: Event | None, refused: Sequence[Event]) -> None:
    if rows:
        metrics = [metric for metric in MAIN if any(metric in row["scores"] for row in rows)]
        table = [["VERSION", "NAME", "PROMOTED (UTC)", *metrics, "STATE", "RUN"]]
        for row in rows:
            share = f" {tried.share * 100:g}%" if tried and row["state"] == "canary" else ""
            state = row["state"] + share + (", damaged" if row["error"] else "")
            scores = [_points(row["scores"].get(metric)) for metric in metrics]
            table.append([row["version"], row["name"] or "-", _time(row["promoted_at"]), *scores, state, row["run"] or "-"])
        print("\n".join(_aligned(table, right=range(3, 3 + len(metrics)))))
    else:
        print(f"{registry}: nothing has been promoted yet" + ("" if registry.exists() else " (there is no such directory)"))
    for row in rows:
        if row["error"]:
            print(f"damaged: {row['error']}")
    if last:
        print(f"{last.what} {_time(last.at)}: {last.reason}")
    for event in refused[-FEW:]:
        print(f"refused {_time(event.at)}: {event.reason} ({event.run})")
    if len(refused) > FEW:
        print(f"{len(refused) - FEW} earlier refusals: `distill registry history`")


def show_history(registry: Path) -> None:
    """Print one line an event, oldest first. Raises DataError for a damaged history."""
    from shared.registry import history

    events = history(registry)
    if not events:
        print(f"{registry}: nothing has been promoted yet")
        return
    table = [["AT (UTC)", "WHAT", "SERVED AFTER IT", "RUN", "REASON"]]
    table += [[_time(e.at), e.what, e.version or "-", e.run or "-", e.reason] for e in events]
    print("\n".join(_aligned(table)))


def show_diff(registry: Path, first: str, second: str) -> None:
    """Print in what version `second` (B) differs from `first` (A): settings, scores, served files, and B against A on their test rows.

    Raises DataError for a version that is not there or is damaged; after the rest, if both have test rows and not the same.
    """
    from shared.errors import DataError
    from shared.registry import find

    a, b = find(registry, first), find(registry, second)
    for letter, version in (("A", a), ("B", b)):
        print(f"{letter}  {version.version}  {version.name}  {version.run}")
    if a.version == b.version:
        print("\nA and B are the same version")
        return
    folders = [registry / "versions" / version.version for version in (a, b)]
    reports: list[Report | None] = []
    notes = []
    for letter, folder in zip("AB", folders, strict=True):
        try:
            reports.append(_report(folder))
        except DataError as exc:
            reports.append(None)
            notes.append(f"the report of {letter} is not readable: {exc}")
    comparison, refused = None, None
    if missing := [letter for letter, folder in zip("AB", folders, strict=True) if not _has_test_rows(folder)]:
        notes.append(
            f"no paired comparison: no predictions and test rows were kept of {' and '.join(missing)}; whether the scores of A and B are "
            "of the same rows is not known"
        )
    else:
        try:
            of_b = reports[1]
            metric, resamples, seed = (of_b.metric, of_b.resamples, of_b.seed) if of_b else UNREPORTED
            if metric == "bertscore":  # two versions may have been scored by two encoders
                metric = UNREPORTED[0]
                notes.append(f"the gate of B looks at BERTScore; they are compared in {metric}, which needs no encoder")
            comparison = paired(folders[1], folders[0], metric, resamples=resamples, seed=seed)
        except DataError as exc:
            refused = exc
    print(f"\n{_settings(a, b, reports)}\n\n{_scores(a, b, reports[1], comparable=refused is None)}\n\n{_files(a, b)}")
    if comparison:
        print(f"\n{_in_words(comparison, reports[1])}")
    for note in notes:
        print(f"\n{note}")
    if refused:
        sys.stdout.flush()
        raise DataError(f"{registry}: no paired comparison of {a.version} and {b.version}: {refused}") from refused


def paired(ours: Path, theirs: Path, metric: str, *, resamples: int, seed: int) -> Comparison:
    """The gain of one version over another on the same test rows, from what is kept in their folders. No model is needed.

    Raises DataError with the ids if their test rows differ, be it in the text alone: many data sets call their rows row-1, row-2, ...
    """
    from evaluator.scores import compare
    from evaluator.significance import refuse_unpaired
    from shared.errors import DataError

    (our_test, our_scores), (their_test, their_scores) = _scored(ours), _scored(theirs)
    refuse_unpaired(our_scores.ids, their_scores.ids)
    if other := [i for i in our_scores.ids if our_test[i] != their_test[i]]:
        some = ", ".join(other[:FEW]) + (f" and {len(other) - FEW} more" if len(other) > FEW else "")
        raise DataError(f"their test rows have the same ids and not the same text or reference, so they cannot be compared: {some}")
    return compare(our_scores, their_scores, metric, resamples=resamples, seed=seed)


def _scored(folder: Path) -> tuple[dict[str, Example], Scored]:
    """A version's test rows by id, and its student's scores on them. Raises DataError."""
    from evaluator.scores import score
    from evaluator.systems import DISTILLED
    from shared.artifacts import read_jsonl
    from shared.contracts import Example, Prediction
    from shared.errors import DataError

    test = read_jsonl(folder / "test.jsonl", Example)
    file = folder / "predictions.jsonl"
    own = [prediction for prediction in read_jsonl(file, Prediction) if prediction.system == DISTILLED]
    if not own:
        raise DataError(f"{file} has no answers of the system {DISTILLED}")
    return {example.id: example for example in test}, score(own, test)[DISTILLED]


def _has_test_rows(folder: Path) -> bool:
    return (folder / "test.jsonl").exists() and (folder / "predictions.jsonl").exists()


def _report(folder: Path) -> Report | None:
    """What was attached as report.json; None where there is none, or one of before format 2. Raises DataError."""
    from pydantic import ValidationError

    from evaluator.report.contract import Report
    from shared.artifacts import read_json
    from shared.errors import DataError

    file = folder / "report.json"
    found = read_json(file) if file.exists() else None
    if not isinstance(found, dict) or found.get("format") != 2:
        return None
    try:
        return Report.model_validate(found)
    except ValidationError as exc:
        error = exc.errors()[0]
        raise DataError(f"{file}: {'.'.join(map(str, error['loc']))}: {error['msg']}") from exc


def _settings(a: Promoted, b: Promoted, reports: Sequence[Report | None]) -> str:
    """The settings that differ, a line each: those of the whole recipe where both reports have it, else those of the task."""
    known = [report.settings for report in reports if report]
    whole = len(known) == len(reports)
    left, right = (dict(_leaves(settings)) for settings in (known if whole else [{"task": a.task}, {"task": b.task}]))
    differing = [name for name in sorted(left.keys() | right.keys()) if left.get(name) != right.get(name)]
    scope = "" if whole else " (of the task alone: not both versions have a report with the others)"
    if not differing:
        return f"settings: no difference{scope}"
    table = [["  settings", "A", "B"], *([f"  {name}", _value(left.get(name)), _value(right.get(name))] for name in differing)]
    return "\n".join(_aligned(table)) + (f"\n {scope}" if scope else "")


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _value(value: Any, longest: int = 60) -> str:
    text = "-" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def _scores(a: Promoted, b: Promoted, report: Report | None, *, comparable: bool) -> str:
    """Scores side by side. Without a difference where the test rows are known not to be the same: it would be of nothing."""
    names = [*(m for m in MAIN if m in a.scores or m in b.scores), *sorted((a.scores.keys() | b.scores.keys()) - set(MAIN))]
    table = [["  scores", "A", "B", *(["B - A"] if comparable else [])]]
    for name in names:
        left, right, points = a.scores.get(name), b.scores.get(name), _in_points(report, name)
        row = [f"  {name}", _points(left, points), _points(right, points)]
        if comparable:
            row.append("-" if left is None or right is None else _points(right - left, points, sign="+"))
        table.append(row)
    return "\n".join(_aligned(table, right=range(1, len(table[0]))))


def _files(a: Promoted, b: Promoted) -> str:
    """Served files by the beginning of their hash."""
    names = sorted(a.sha256.keys() | b.sha256.keys())
    differing = [name for name in names if a.sha256.get(name) != b.sha256.get(name)]
    same = [name for name in names if name not in differing]
    table = [["  files", "A", "B"], *([f"  {n}", a.sha256.get(n, "-")[:12], b.sha256.get(n, "-")[:12]] for n in differing)]
    lines = _aligned(table) if differing else ["files: no difference"]
    return "\n".join([*lines, f"  the same: {', '.join(same)}"] if same and differing else lines)


def _in_words(comparison: Comparison, report: Report | None) -> str:
    points = _in_points(report, comparison.metric)
    gain, unit = _points(comparison.gain, points, sign="+"), " points" if points else ""
    doubt = comparison.note or ""
    if comparison.low is not None and comparison.high is not None and comparison.p is not None:
        low, high = (_points(end, points, sign="+") for end in (comparison.low, comparison.high))
        doubt = f"95% interval {low} to {high}, p = {comparison.p:.4f} two-sided"
    return f"paired: {comparison.metric} of B {gain}{unit} over A on the same {comparison.rows} test rows ({doubt})"


def _in_points(report: Report | None, metric: str) -> bool:
    """Whether a metric is shown times 100."""
    return report is None or metric not in report.metrics or report.metrics[metric].points


def _points(value: float | None, points: bool = True, *, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{100 * value:{sign}.1f}" if points else f"{value:{sign}.3f}"


def _time(at: str | None) -> str:
    """ISO 8601 as people read it, to the second."""
    return at[:19].replace("T", " ") if at else "-"


def _aligned(table: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    cells = ((f"{c:>{w}}" if i in right else f"{c:<{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in table)
    return ["  ".join(row).rstrip() for row in cells]
