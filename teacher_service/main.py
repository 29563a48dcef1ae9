"""`distill teacher`: a black-box teacher over HTTP, text in and text out."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from shared.errors import SettingsError
from shared.http.options import add_key_options, add_run_options

EPILOG = (
    "Every option can be given as a variable: --upstream-url is TEACHER_UPSTREAM_URL. Keys: TEACHER_API_KEYS=NAME=KEY,... for who may ask, "
    "TEACHER_UPSTREAM_KEY for the engine, or in files."
)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="distill teacher", description=__doc__, epilog=EPILOG, argument_default=argparse.SUPPRESS)
    parser.add_argument("--recipe", type=Path, metavar="YAML", help="serve the teacher that this recipe launches")
    add = parser.add_argument_group("who answers").add_argument
    add("--engine", help="upstream (OpenAI-compatible URLs), local (a model in this process; default) or scripted")
    add("--upstream-url", metavar="URL", action="append", help="base URL with its /v1; several for several servers of one model")
    add("--upstream-model", metavar="NAME", help="the model's name there")
    add("--upstream-key-file", metavar="FILE", help="a file that holds the API key it wants")
    add("--upstream-timeout-s", metavar="S", help="for one whole answer, or for the next piece of a streamed one; default 120")
    add("--model-ref", metavar="MODEL", help="local: default embedded:smollm2-135m-questions")
    add("--quantization", help="local: int8 (default), float16 or float32")
    add("--delay-s", metavar="S", help="scripted: seconds before every answer")
    add("--public-name", metavar="NAME", help="the model name that requests give; default teacher")
    add("--usage", help="text (default): answers tell their characters and words; none: they do not")
    add_key_options(parser, without="none is answered")
    add = parser.add_argument_group("what one request may be").add_argument
    add("--max-body-bytes", metavar="N", help="default 1048576")
    add("--max-prompt-characters", metavar="N", help="default 100000")
    add("--max-n", metavar="N", help="completions of one request; default 64")
    add("--max-tokens", metavar="N", help="of one completion; default 4096")
    add("--max-in-flight", metavar="N", help="requests at the engine, of each worker; default 1024")
    add("--max-queue", metavar="N", help="requests that wait; more are answered 429 at once; default 1024")
    add("--queue-s", metavar="S", help="longest wait; default 60")
    add_run_options(parser, port=8000, log_level="info")
    add = parser.add_argument_group("processes").add_argument
    add("--workers", metavar="N", help="processes that answer, of an upstream gateway; limits hold for all together; default 1")
    add("--until-stdin-closes", action="store_true", default=False, help="end with the process that started this one")
    flags = vars(parser.parse_args(argv))
    until_stdin_closes = flags.pop("until_stdin_closes")
    if recipe := flags.pop("recipe", None):
        flags = launched_by(recipe, flags)

    from shared.http.logs import configure
    from shared.http.metrics import Meters, many_processes
    from shared.settings import load_settings
    from teacher_service.settings import TeacherServiceSettings

    settings = load_settings(TeacherServiceSettings, flags=flags)
    configure(settings.log_level)
    if settings.workers > 1 and settings.metrics_port is not None:
        many_processes()

    from shared.http.limits import Counts
    from shared.http.serve import serve
    from teacher_service.app import teacher_app

    keys, meters = settings.keys(), Meters()
    counts = Counts(keys.keys, workers=settings.workers)
    app = teacher_app(settings, keys=keys, counts=counts, meters=meters)
    name = f"teacher ({settings.engine})"
    if not keys.required:
        print(f"{name}: --no-auth: whoever reaches {settings.host} may ask, without a key", file=sys.stderr, flush=True)
    return serve(
        app,
        host=settings.host,
        port=settings.port,
        name=name,
        until_stdin_closes=until_stdin_closes,
        metrics_port=settings.metrics_port,
        registry=meters.registry,
        drain_s=settings.drain_s,
        workers=settings.workers,
        counts=counts,
        spare_files=settings.max_in_flight if settings.engine == "upstream" else 0,
    )


def launched_by(file: Path, flags: dict[str, Any]) -> dict[str, Any]:
    """`flags` and what a recipe says of the teacher it launches. Raises SettingsError if it launches none, or if both say who it is."""
    from shared.settings import Recipe, load_settings

    for name in ("engine", "model_ref", "public_name"):
        variable = f"TEACHER_{name.upper()}"
        given = f"--{name.replace('_', '-')}" if name in flags else variable if os.environ.get(variable) else None
        if given:
            raise SettingsError(f"{given}: --recipe {file} says who the teacher is; leave one of the two out")
    teacher = load_settings(Recipe, flags={}, yaml_file=file).teacher
    if teacher.launch is None:
        raise SettingsError(
            f"--recipe {file}: the recipe's teacher is at {teacher.url}: there is nothing to launch; "
            "the stages ask it there (to serve another one: --engine and --model-ref without --recipe; with compose: TEACHER_URL and "
            "TEACHER_MODEL)"
        )
    who = {"engine": teacher.launch.engine, "public_name": teacher.public_name}
    return flags | who | ({"model_ref": teacher.launch.model} if teacher.launch.engine == "local" else {})
