"""The command table: light to load, honest exit codes, a way back after Ctrl-C."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types
from collections.abc import Callable

import pytest

from shared import __version__, errors
from shared.cli import COMMANDS, main
from shared.commands import Progress, stage_parser

HEAVY = {
    "ctranslate2", "datasets", "fastapi", "httpx", "jinja2", "nltk", "numpy", "pandas", "pydantic", "pydantic_settings",
    "rouge_score", "tokenizers", "torch", "transformers", "trl", "uvicorn", "yaml",
}  # fmt: skip


def command(monkeypatch: pytest.MonkeyPatch, body: Callable[[list[str]], int]) -> None:
    """Make `distill harvest` run `body`."""
    module = types.ModuleType("a_command")
    module.main = body  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_command", module)
    monkeypatch.setitem(COMMANDS, "harvest", ("a_command", "for this test"))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_loads_no_heavy_library(name: str) -> None:
    code = f"""
import json, sys
from shared.cli import main
try:
    main([{name!r}, "--help"])
except SystemExit as exc:
    print(json.dumps([exc.code, sorted({{m.partition(".")[0] for m in sys.modules}})]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    shown, _, last = done.stdout.rstrip().rpartition("\n")
    exit_code, modules = json.loads(last)
    assert exit_code == 0
    assert shown.startswith(f"usage: distill {name}")
    assert HEAVY.isdisjoint(modules)


def test_the_usage_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\w", shown, re.MULTILINE) for name in COMMANDS)
    assert main([]) == 2


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"distill {__version__}\n"


def test_a_misspelt_command_is_refused_with_the_nearest_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["havrest"]) == 2
    assert "unknown command 'havrest'; did you mean harvest?" in capsys.readouterr().err


def test_a_wrong_option_ends_with_the_code_of_wrong_settings() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["harvest", "--recpie", "x"])
    assert caught.value.code == errors.SettingsError.exit_code


def test_every_error_is_one_line_and_has_its_own_exit_code_and_some_tell_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    documented = dict(re.findall(r"^ *(\w+) +(\d+)(?: |$)", errors.__doc__ or "", re.MULTILINE))
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.DistillError)]
    assert {c.__name__ for c in classes} == set(documented)
    for error in classes:

        def fail(argv: list[str], error: type[errors.DistillError] = error) -> int:
            raise error("what is wrong; what to do")

        command(monkeypatch, fail)
        assert main(["harvest"]) == error.exit_code == int(documented[error.__name__])
        again = "once that is mended, to go on:\n  distill harvest\n" if error.goes_on else ""
        assert capsys.readouterr().err == f"distill harvest: what is wrong; what to do\n{again}"
    assert {c.__name__ for c in classes if c.goes_on} >= {"TeacherUnavailable", "BudgetSpent", "Stopped"}


def test_an_error_of_our_own_making_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(argv: list[str]) -> int:
        raise ZeroDivisionError

    command(monkeypatch, fail)
    with pytest.raises(ZeroDivisionError):
        main(["harvest"])


def test_after_an_interrupt_the_same_command_is_printed_ready_to_paste() -> None:
    code = """
import sys, types
from shared import cli
def interrupted(argv):
    raise KeyboardInterrupt
sys.modules["a_command"] = types.SimpleNamespace(main=interrupted)
cli.COMMANDS["harvest"] = ("a_command", "")
sys.exit(cli.main(["harvest", "--out", "my run", "--set", "harvest.stop=[a]"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert "everything done so far is kept" in done.stderr
    assert done.stderr.endswith("\n  distill harvest --out 'my run' --set 'harvest.stop=[a]'\n")


ENDS_LATE = """
import os, sys, types
from shared import cli
class Late:
    def __del__(self, write=os.write):  # as of libraries, while CPython takes itself down and signals kill it
        write(1, b"late")
def harvest(argv):
    sys.late = Late()
    print("done")
    return 3
sys.modules["a_command"] = types.SimpleNamespace(main=harvest)
cli.COMMANDS["harvest"] = ("a_command", "")
sys.argv = ["distill", "harvest"]
cli.entry()
"""


def test_a_command_that_is_done_ends_at_once_with_its_code_and_loses_no_line() -> None:
    done = subprocess.run([sys.executable, "-c", ENDS_LATE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "done\n")


def test_a_stage_needs_a_recipe_and_a_run_directory(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        stage_parser("train", "text").parse_args([])
    assert "--recipe, --out" in capsys.readouterr().err


def test_progress_of_a_stage_that_waits_is_told_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("harvest", 10, every_s=0)
    progress.tick()
    assert capsys.readouterr().err.count("harvest: 0/10 rows") == 2


def test_progress_in_a_log_tells_the_beginning_and_the_end_and_not_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("harvest", 10, unit="answers", done=4, every_s=3600)
    for _ in range(6):
        progress.step()
    told = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in told] == ["harvest: 4/10 answers", "harvest: 10/10 answers"]
    assert told[0].endswith(", time left not known yet")
    assert told[-1].endswith("/s")
