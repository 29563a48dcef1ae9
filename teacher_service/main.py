"""`distill teacher`: a black-box teacher over HTTP, text in and text out."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from shared.errors import SettingsError

EPILOG = "Every option can be given as a variable: --upstream-url is TEACHER_UPSTREAM_URL; a key as TEACHER_UPSTREAM_KEY or in a file."


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="distill teacher", description=__doc__, epilog=EPILOG, argument_default=argparse.SUPPRESS)
    parser.add_argument("--recipe", type=Path, metavar="YAML", help="serve the teacher that this recipe launches")
    parser.add_argument("--engine", help="upstream (an OpenAI-compatible URL), local (a model in this process; default) or scripted")
    parser.add_argument("--upstream-url", metavar="URL", help="base URL with its /v1")
    parser.add_argument("--upstream-model", metavar="NAME", help="the model's name there")
    parser.add_argument("--upstream-key-file", metavar="FILE", help="a file that holds its API key")
    parser.add_argument("--model-ref", metavar="MODEL", help="local: default embedded:smollm2-135m-questions")
    parser.add_argument("--quantization", help="local: int8 (default), float16 or float32")
    parser.add_argument("--delay-s", metavar="S", help="scripted: seconds before every answer")
    parser.add_argument("--public-name", metavar="NAME", help="the model name that requests give; default teacher")
    parser.add_argument("--host", help="default 127.0.0.1: this machine alone")
    parser.add_argument("--port", help="default 8000; 0 picks a free one")
    parser.add_argument("--metrics-port", metavar="PORT", help="tell numbers for Prometheus there, on the same host; default: nowhere")
    parser.add_argument("--until-stdin-closes", action="store_true", default=False, help="end with the process that started this one")
    flags = vars(parser.parse_args(argv))
    until_stdin_closes = flags.pop("until_stdin_closes")
    if recipe := flags.pop("recipe", None):
        flags = launched_by(recipe, flags)

    from shared.http.serve import serve
    from shared.settings import load_settings
    from teacher_service.app import teacher_app
    from teacher_service.settings import TeacherServiceSettings

    settings = load_settings(TeacherServiceSettings, flags=flags)
    app = teacher_app(settings)
    name = f"teacher ({settings.engine})"
    return serve(
        app,
        host=settings.host,
        port=settings.port,
        name=name,
        until_stdin_closes=until_stdin_closes,
        metrics_port=settings.metrics_port,
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
            "the stages ask it there (to serve another one: --engine and --model-ref without --recipe)"
        )
    who = {"engine": teacher.launch.engine, "public_name": teacher.public_name}
    return flags | who | ({"model_ref": teacher.launch.model} if teacher.launch.engine == "local" else {})
