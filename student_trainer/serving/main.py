"""`distill serve`: the promoted student over HTTP, with a page to try it on."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.http.options import add_key_options, add_run_options

if TYPE_CHECKING:
    from shared.settings import Recipe

EPILOG = "All but --recipe can be given as variables: --registry is STUDENT_REGISTRY. Keys: STUDENT_API_KEYS=NAME=KEY,..., or a file."


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="distill serve", description=__doc__, epilog=EPILOG, argument_default=argparse.SUPPRESS)
    add = parser.add_argument_group("who answers").add_argument
    add("--registry", metavar="DIR", help="serve what is promoted there, now or later: RUN/registry")
    add("--model-dir", metavar="DIR", help="serve this serving folder instead: RUN/model/serving")
    add("--public-name", metavar="NAME", help="the model name that requests give; default student")
    add = parser.add_argument_group("who is shown beside it, on the page and as models of /v1/generate").add_argument
    add("--recipe", type=Path, metavar="YAML", help="its student before it was distilled, and its teacher if that has a URL")
    add("--base", metavar="MODEL", help="the undistilled student, a model reference or a serving folder")
    add("--base-quantization", metavar="Q", help="of a --base that has to be converted first; default int8")
    add("--teacher-url", metavar="URL", help="an OpenAI-compatible teacher, with its /v1")
    add("--teacher-model", metavar="NAME", help="its name there; default teacher")
    add("--teacher-key-file", metavar="FILE", help="a file that holds the API key it wants; or STUDENT_TEACHER_KEY")
    add("--run", metavar="DIR", help="a run directory whose live state the page shows")
    add = parser.add_argument_group("how it computes").add_argument
    add("--device", help="cpu (default) or cuda")
    add("--device-index", metavar="N,...", help="cuda: the GPUs, each with a copy of the student; default 0")
    add("--compute-type", metavar="T", help="a compute type of CTranslate2; default: as the weights are stored, on GPUs 16 bits")
    add("--threads", metavar="BxC", help="batches side by side x cores of each; default auto: measured at the start")
    add("--max-batch", metavar="N", help="completions decoded together; default 32")
    add("--max-batch-tokens", metavar="N", help="tokens read together by a decoder-only student: memory, 0.3 MB each; default 640")
    add = parser.add_argument_group("what one request may be").add_argument
    add("--max-queue", metavar="N", help="requests that wait; more are answered 429 at once; default 256")
    add("--deadline-s", metavar="S", help="for one answer, waiting included; default 60")
    add("--max-prompt-characters", metavar="N", help="default 20000")
    add("--max-n", metavar="N", help="completions of one request; default 16")
    add("--max-tokens", metavar="N", help="of one completion; default 512")
    add("--max-body-bytes", metavar="N", help="default 1048576")
    add_key_options(parser, without="whoever is on this machine, and nobody from elsewhere")
    add_run_options(parser, port=8080, log_level="warning")
    flags = vars(parser.parse_args(argv))
    recipe = flags.pop("recipe", None)

    from shared.settings import Recipe, load_settings
    from student_trainer.serving.settings import StudentServiceSettings

    if recipe is not None:
        flags = _unless_given(beside(load_settings(Recipe, flags={}, yaml_file=recipe)), flags) | flags
    settings = load_settings(StudentServiceSettings, flags=flags)
    keys = settings.keys(open_on_loopback=True)
    if settings.log_level != "warning":
        from shared.http.logs import configure

        configure(settings.log_level)

    from shared.http.serve import serve
    from student_trainer.serving.app import student_app
    from student_trainer.serving.metrics import StudentMeters

    if not keys.required and settings.no_auth:
        print(f"student: --no-auth: whoever reaches {settings.host} may ask, without a key", file=sys.stderr, flush=True)
    meters = StudentMeters()
    return serve(
        student_app(settings, keys=keys, meters=meters),
        host=settings.host,
        port=settings.port,
        name="student",
        metrics_port=settings.metrics_port,
        registry=meters.registry,
        drain_s=settings.drain_s,
        measured=True,
    )


def _unless_given(found: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """What a recipe says, without whom the user has named: the recipe's key is for the recipe's teacher alone."""
    named = {name for name in ("base", "teacher_url") if name in flags or os.environ.get(f"STUDENT_{name.upper()}")}
    whole = {"base": "base", "teacher_url": "teacher"}
    return {name: value for name, value in found.items() if not any(name.startswith(whole[given]) for given in named)}


def beside(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says of who is shown beside its student, as settings of the server."""
    found: dict[str, Any] = {"base": recipe.student.model, "base_quantization": recipe.export.quantization}
    teacher = recipe.teacher
    if teacher.url is not None and teacher.protocol != "custom":
        found |= {"teacher_url": teacher.url, "teacher_model": teacher.model}
        found |= {"teacher_key": teacher.api_key, "teacher_key_file": teacher.api_key_file}
    return {name: value for name, value in found.items() if value is not None}
