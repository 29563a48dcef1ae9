"""`distill batch`: a student's answers to every row of a file."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

URL = "http://127.0.0.1:8080/v1"
KEY_VARIABLE = "DISTILL_BATCH_API_KEY"
EPILOG = (
    "OUT is IN with the columns answer, finish_reason, version (of the student) and error. Answers are kept in OUT.batch/ as they come: "
    "stopped or killed, the same command goes on and asks nothing twice. Ends with 0 if every row was answered, with 8 if some were not."
)


def main(argv: list[str]) -> int:
    """Answer a file. Returns the exit code; raises as `answer_file` does."""
    parser = argparse.ArgumentParser(
        prog="distill batch", description="Let a served student answer every row of a JSON Lines or CSV file.", epilog=EPILOG
    )
    parser.add_argument("source", type=Path, metavar="IN", help="a .jsonl or .csv, UTF-8")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="the file to write, of the same kind: at the end, whole")
    parser.add_argument("--url", default=URL, help=f"of a `distill serve`, with its /v1; default {URL}")
    parser.add_argument("--model", metavar="NAME", help="one of those the server has (GET /v1/student); default its student")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help=f"the key, if the server asks for one; or set {KEY_VARIABLE}")
    parser.add_argument("--column", default="question", metavar="NAME", help="the column with the questions; default question")
    parser.add_argument("--concurrency", type=int, default=32, metavar="N", help="requests in flight at most; default 32")
    parser.add_argument("--truncate", action="store_true", help="let the server cut longer questions in their middle, as in training")
    parser.add_argument("--retry-failed", action="store_true", help="ask again for the rows that have failed")
    arguments = parser.parse_args(argv)

    from pydantic import SecretStr

    from shared.errors import SettingsError
    from shared.settings import read_secret
    from student_trainer.batch.job import MOST_AT_ONCE, Job, answer_file

    if not 1 <= arguments.concurrency <= MOST_AT_ONCE:
        raise SettingsError(f"--concurrency {arguments.concurrency}: give a number from 1 to {MOST_AT_ONCE}")
    key = read_secret(SecretStr(os.environ.get(KEY_VARIABLE, "")), arguments.api_key_file, "api_key")
    return answer_file(
        Job(
            source=arguments.source,
            out=arguments.out,
            url=arguments.url,
            model=arguments.model,
            column=arguments.column,
            truncate=arguments.truncate,
        ),
        api_key=key,
        concurrency=arguments.concurrency,
        retry_failed=arguments.retry_failed,
    )
