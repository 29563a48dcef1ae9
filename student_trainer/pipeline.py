"""`distill run`: all stages on this machine, each a process of its own, in the order compose uses, ending with the student served.

However this process ends, its stages and its teacher end with it.
"""

from __future__ import annotations

import argparse
import os
import resource
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from shared.cli import PART_OF_A_RUN
from shared.commands import assignments
from shared.errors import INTERRUPTED, DistillError, SettingsError, TeacherUnavailable

if TYPE_CHECKING:
    from shared.artifacts import Run
    from shared.settings import LaunchSettings, Recipe

STAGES = {
    "harvest": "responses/teacher",
    "sample": "responses/student-r0",
    "triplets": "triplets/r0",
    "train": "checkpoints/r0",
    "export": "model",
    "evaluate": "evaluation",
}
"""Command -> the folder of the run it completes (train: one a round, the first of them), in order."""
ASKS_TEACHER = ("harvest", "evaluate")
TEACHER_START_S = 240.0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="distill run", description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True, metavar="YAML", help="what to do; recipes/ has some")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run directory; default: runs/RECIPE-NAME")
    parser.add_argument("--dataset", metavar="NAME", help="sample, meqsum, or the path of a .jsonl, .csv or MeQSum .xlsx file")
    parser.add_argument("--limit", type=int, metavar="N", help="use only the first N rows of the train split")
    parser.add_argument("--retry-failed", action="store_true", help="ask the teacher again for the samples that failed")
    parser.add_argument("--answers-from", metavar="RUN", help="take what that run's teacher has answered to the same requests")
    parser.add_argument("--no-serve", action="store_true", help="end after the evaluation and the promotion")
    parser.add_argument("--port", type=int, default=8080, help="of the student's server; default 8080")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="settings", help="one recipe setting")
    arguments = parser.parse_args(argv)

    from shared.artifacts import Run
    from shared.embedded.weights import ORIGIN
    from shared.registry import stays_rolled_back
    from shared.settings import Recipe, evaluation_settings, load_settings
    from student_trainer.progress import unfinished

    flags = dataset_flags(arguments, assignments(arguments.settings))
    recipe = load_settings(Recipe, flags=flags, yaml_file=arguments.recipe)
    out = arguments.out or Path("runs") / recipe.name
    run = Run.open(out, recipe)
    shared = ["--recipe", str(arguments.recipe), "--out", str(out)]
    for name, value in flags.items():
        shared += ["--set", f"{name}={_yaml_scalar(value)}"]

    if not arguments.no_serve:
        _refuse_taken_port(arguments.port)
    begun = time.monotonic()
    print(f"run {out}: recipe {recipe.name}, student {recipe.student.model}, teacher {recipe.teacher.identity}", flush=True)
    if "embedded:" in recipe.student.model + recipe.teacher.identity:
        print(f"embedded weights: {ORIGIN}", flush=True)
    left = unfinished(out)
    judged = run.manifest(STAGES["evaluate"])
    if judged and dict(judged.settings) != evaluation_settings(recipe):  # the same students and teacher, to be evaluated in another way
        left.append(STAGES["evaluate"])
    asks = arguments.retry_failed or any(STAGES[command] in left for command in ASKS_TEACHER)
    teacher = recipe.teacher.launch if asks else None
    if left or asks:
        run_command("prepare", shared)
    prepared = time.monotonic() - begun
    key = secrets.token_urlsafe(32)  # the launched teacher answers this run alone
    with launched_teacher(run, teacher, key) if teacher else nullcontext() as url:
        for command in STAGES:
            asking = url if command in ASKS_TEACHER else None
            extra = ["--teacher-url", asking] if asking else []
            if arguments.retry_failed and command == "harvest":
                extra.append("--retry-failed")
            if arguments.answers_from and command == "harvest":
                extra += ["--answers-from", arguments.answers_from]
            run_command(command, shared + extra, {"DISTILL_TEACHER__API_KEY": key} if asking else {})
    _print_times(run, time.monotonic() - begun, prepared)
    if "evaluation" in left or not stays_rolled_back(out / "registry", out):
        run_command("promote", shared)
    if arguments.no_serve:
        print(f"to serve it: distill serve --registry {out / 'registry'}")
        return 0
    ask = """-H 'content-type: application/json' -d '{"question": "..."}'"""
    print(f"to ask it: curl http://127.0.0.1:{arguments.port}/v1/generate {ask}", flush=True)
    return _become("serve", ["--registry", str(out / "registry"), "--run", str(out), "--port", str(arguments.port), *_beside(recipe)])


def _beside(recipe: Recipe) -> list[str]:
    """The options of `distill serve` that show the undistilled student, and a teacher that still answers, beside the student."""
    from student_trainer.serving.main import beside

    found = beside(recipe)
    if key := found.pop("teacher_key", None):
        os.environ["STUDENT_TEACHER_KEY"] = key.get_secret_value()  # others can read a command line
    return [word for name, value in found.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def dataset_flags(arguments: argparse.Namespace, given: dict[str, Any]) -> dict[str, Any]:
    """--dataset and --limit as recipe settings beside those that --set has `given`, which hold. Raises SettingsError.

    What the recipe says of its own data is put out of force where it means nothing in other: where that is, its columns, and the rows
    reserved for the embedded sample's adapter.
    """
    flags: dict[str, Any] = {}
    if name := arguments.dataset:
        if name in ("sample", "meqsum"):
            flags |= {"dataset.name": name, "dataset.path": None}
        elif not Path(name).suffix:
            raise SettingsError(f"--dataset {name}: expected sample, meqsum or the path of a .jsonl, .csv or .xlsx file")
        else:
            flags |= {
                "dataset.name": "meqsum" if Path(name).suffix.lower() == ".xlsx" else "file",
                "dataset.path": str(Path(name).resolve()),
            }
        flags["dataset.hub"] = None
        if flags["dataset.name"] != "file":
            flags |= {"dataset.question_column": "question", "dataset.summary_column": "summary"}
        if name != "sample":
            flags["dataset.reserved_rows"] = 0
    if arguments.limit is not None:
        flags["dataset.limit"] = arguments.limit
    return {**given, **{name: value for name, value in flags.items() if name not in given}}


def _yaml_scalar(value: Any) -> str:
    import json

    return json.dumps(value)  # every JSON value is a YAML value


def run_command(command: str, options: list[str], variables: Mapping[str, str] | None = None) -> None:
    """Run one stage as a child, with more environment `variables`. Raises StageFailed with the child's own exit code."""
    code = _run_child(command, options, variables or {})
    if code == INTERRUPTED or code == -signal.SIGINT:
        raise KeyboardInterrupt
    if code != 0:
        raise StageFailed(command, code)


class StageFailed(DistillError):
    """A stage ended with an error and has said why; nothing of what was done before is lost."""

    def __init__(self, command: str, code: int) -> None:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        super().__init__(f"`distill {command}` {how}; once that is mended, run the same command again: finished stages are kept")
        self.exit_code = code if code > 0 else 128 - code


def _run_child(command: str, options: list[str], variables: Mapping[str, str]) -> int:
    """Run `distill COMMAND` to its end. Raises KeyboardInterrupt after a Ctrl-C, once the child has saved and stopped."""
    arguments = [sys.executable, "-m", "shared.cli", command, *options]
    # a child whose standard input closes ends: it never goes on without this process
    child = subprocess.Popen(arguments, stdin=subprocess.PIPE, env={**_quiet(), **variables, PART_OF_A_RUN: "1"})
    try:
        return child.wait()
    except KeyboardInterrupt:
        try:
            child.wait(10)  # a terminal has told it already
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGINT)  # `kill -INT` of this process alone has not
            child.wait()
        raise
    finally:
        if child.poll() is None:  # a second Ctrl-C: it gives up what it was saving, as asked
            child.kill()
            child.wait()


def _become(command: str, options: list[str]) -> NoReturn:
    """Go on as `distill COMMAND`, in place of this process: whoever ends this one ends it."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "shared.cli", command, *options])


@contextmanager
def launched_teacher(run: Run, launch: LaunchSettings, key: str) -> Iterator[str]:
    """The recipe's own teacher as a process on a free port of the loopback, for who has `key`; its base URL.

    Ends with the block, or with this process.
    """
    port = _free_port()
    command = [sys.executable, "-m", "shared.cli", "teacher", "--engine", launch.engine, "--port", str(port)]
    command += ["--public-name", run.recipe.teacher.public_name, "--until-stdin-closes", "--log-level", "warning"]
    if launch.engine == "local":
        command += ["--model-ref", launch.model]
    log = run.path / "teacher.log"
    print(f"teacher: {launch.engine} {launch.model if launch.engine == 'local' else ''} starting; its log is {log}", flush=True)
    with log.open("ab") as output:
        # in a process group of its own: a Ctrl-C must end the stage that asks it, not the one who answers
        variables = {**_quiet(), "TEACHER_API_KEYS": f"run={key}"}
        variables.pop("TEACHER_API_KEYS_FILE", None)
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=variables, start_new_session=True)
        try:
            _wait_until_ready(process, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], base: str, log: Path) -> None:
    """Poll /readyz. Raises TeacherUnavailable with the end of the log if the teacher dies or takes too long."""
    import httpx

    begun = told = time.monotonic()
    with httpx.Client(trust_env=False, timeout=5) as client:
        while process.poll() is None and time.monotonic() - begun < TEACHER_START_S:
            try:
                if client.get(f"{base}/readyz").status_code == 200:
                    print(f"teacher: ready at {base}/v1 after {time.monotonic() - begun:.0f} s", flush=True)
                    return
            except httpx.TransportError:
                pass
            if time.monotonic() - told > 10:
                told = time.monotonic()
                print(f"teacher: still starting, {told - begun:.0f} s", flush=True)
            time.sleep(0.2)
    tail = log.read_text(errors="replace").strip().splitlines()[-5:]
    raise TeacherUnavailable(f"the launched teacher did not become ready; the end of {log}:\n  " + "\n  ".join(tail))


def _refuse_taken_port(port: int) -> None:
    """Tell now what would otherwise come to light after all the work."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as exc:
            raise SettingsError(f"--port {port}: {exc.strerror}; give another --port for the student's server, or --no-serve") from exc


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _quiet() -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1"}


def _print_times(run: Run, wall: float, prepared: float) -> None:
    from student_trainer.progress import stages_of

    stages = stages_of(run.recipe.train.rounds)
    rows = [(folder, manifest.seconds) for folder in stages if (manifest := run.manifest(folder))]
    # kilobytes on Linux, bytes on macOS
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    print("\ntime by stage (s):  " + "  ".join(f"{folder} {seconds:.0f}" for folder, seconds in rows))
    print(f"this command: {wall:.0f} s, {prepared:.0f} s of them to prepare; its largest process took {peak:,.0f} MB\n", flush=True)
