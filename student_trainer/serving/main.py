"""`distill serve`: the promoted student over HTTP."""

from __future__ import annotations

import argparse

EPILOG = "Every option can be given as a variable: --registry is STUDENT_REGISTRY."


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="distill serve", description=__doc__, epilog=EPILOG, argument_default=argparse.SUPPRESS)
    parser.add_argument("--registry", metavar="DIR", help="serve what is promoted there, now or later: RUN/registry")
    parser.add_argument("--model-dir", metavar="DIR", help="serve this serving folder instead: RUN/model/serving")
    parser.add_argument("--public-name", metavar="NAME", help="the model name that requests give; default student")
    parser.add_argument("--host", help="default 127.0.0.1: this machine alone")
    parser.add_argument("--port", help="default 8080; 0 picks a free one")
    parser.add_argument("--metrics-port", metavar="PORT", help="tell numbers for Prometheus there, on the same host; default: nowhere")
    flags = vars(parser.parse_args(argv))

    from shared.http.serve import serve
    from shared.settings import load_settings
    from student_trainer.serving.app import student_app
    from student_trainer.serving.settings import StudentServiceSettings

    settings = load_settings(StudentServiceSettings, flags=flags)
    return serve(student_app(settings), host=settings.host, port=settings.port, name="student", metrics_port=settings.metrics_port)
