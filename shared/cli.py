"""`distill`: a table of names to modules, loaded when asked for, so that services never import each other."""

from __future__ import annotations

import importlib
import os
import select
import signal
import sys
import threading
from itertools import pairwise

COMMANDS = {
    "run": ("student_trainer.pipeline", "all stages on this machine, ending with the student served"),
    "prepare": ("student_trainer.prepare", "fetch the rows and make the models a run needs, so that nothing later does"),
    "fetch": ("student_trainer.fetch", "download or build a model for an engine that has no network"),
    "teacher": ("teacher_service.main", "serve a black-box teacher over HTTP: text in, text out"),
    "keygen": ("shared.http.keygen", "make an API key for those who may ask the teacher"),
    "harvest": ("student_trainer.harvest.run", "ask the teacher for its answers, each kept in a ledger"),
    "sample": ("student_trainer.sample", "let the undistilled student answer the same prompts"),
    "triplets": ("student_trainer.triplets.run", "rank the answers into (prompt, chosen, rejected)"),
    "train": ("student_trainer.training.run", "train the student on the triplets with ORPO"),
    "export": ("student_trainer.export", "turn the checkpoint into a folder that can be served"),
    "evaluate": ("evaluator.run", "score student, teacher and baselines on the test split"),
    "promote": ("evaluator.promote", "make the student the served one, if it is provably better"),
    "rollback": ("evaluator.rollback", "serve the previously promoted student again"),
    "registry": ("evaluator.registry", "which students were promoted, their history, and how two of them differ"),
    "serve": ("student_trainer.serving.main", "serve the promoted student over HTTP"),
    "batch": ("student_trainer.batch.run", "answer every row of a JSON Lines or CSV file by the served student"),
    "status": ("student_trainer.status", "what a run directory has done and what is left"),
    "monitor": ("student_trainer.monitor", "tell Prometheus how far the runs are"),
}


PART_OF_A_RUN = "_DISTILL_PART_OF_A_RUN"
"""Set by `distill run` for the stages it starts; their standard input closes when the run is gone, however it went."""


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0, that of its error class (shared/errors.py), or 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from shared import __version__

        print(f"distill {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(argv[0], COMMANDS, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        print(f"distill: unknown command {argv[0]!r}{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    # libraries we use must neither phone home nor wait for a network that is not there
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from shared.errors import INTERRUPTED, DistillError

    try:
        if (cluster := _through_ray_client(argv)) is not None:
            from shared.cluster.client import done_there

            code = done_there(cluster, argv)
            if any(kind.exit_code == code and kind.goes_on for kind in DistillError.__subclasses__()):
                print(f"once that is mended, to go on:\n  {_again(argv)}", file=sys.stderr)
            return code
        return int(importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:]))
    except DistillError as exc:
        print(f"distill {argv[0]}: {exc}", file=sys.stderr)
        if exc.goes_on and not os.environ.get(PART_OF_A_RUN):
            print(f"once that is mended, to go on:\n  {_again(argv)}", file=sys.stderr)
        return exc.exit_code
    except BaseException as exc:
        if not _interrupted(exc):
            raise
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not garble the farewell
        if not os.environ.get(PART_OF_A_RUN):  # else the whole run tells how to go on
            print(f"\nstopped; everything done so far is kept. To go on:\n  {_again(argv)}", file=sys.stderr)
        return INTERRUPTED


def _through_ray_client(argv: list[str]) -> str | None:
    """The cluster that does the command where it is ray://HOST:PORT, for which shared/cluster/client.py tells the reason."""
    given = [value for option, value in pairwise(argv) if option == "--on"] + [word[5:] for word in argv if word.startswith("--on=")]
    return next((value for value in given if value.startswith("ray://")), None)


def _again(argv: list[str]) -> str:
    """The command that goes on where this one has ended, as one types it."""
    import shlex
    import shutil

    name = os.path.basename(sys.argv[0])
    ours = sys.argv[0] if name == "distill" and not shutil.which(name) else "distill"
    return f"{ours} {shlex.join(argv)}"


def _interrupted(exc: BaseException | None) -> bool:
    """Whether a Ctrl-C is at the bottom of an error: libraries that are being imported turn it into errors of their own."""
    while exc is not None:
        if isinstance(exc, KeyboardInterrupt):
            return True
        exc = exc.__cause__ or exc.__context__
    return False


def entry() -> None:
    """What the console script runs: `main`, ending the process with its exit code."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # an end without tidying up loses no line
    _end_when_told_to()
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # not sys.exit: while it takes itself down, CPython lets signals kill it that were handled until then
    os._exit(code)


def _end_when_told_to() -> None:
    """On SIGTERM end this process at once with 143, whatever it is doing; a part of a run ends so when the run is gone.

    Nothing is tidied up, since what is on disk survives worse. A thread does it, woken by the C half of Python's signal handling:
    Python's own handlers have to wait for whatever call into a library is under way. Without a handler PID 1 of a container would
    not hear the signal. Servers put their own handler in place of this one.
    """
    from shared.errors import TERMINATED

    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGTERM, _told_to_end)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    # a forked child would wake its parent
    os.register_at_fork(after_in_child=lambda: (signal.set_wakeup_fd(-1), signal.signal(signal.SIGTERM, signal.SIG_DFL)))
    part = bool(os.environ.get(PART_OF_A_RUN))

    def told() -> bool:
        ready, _, _ = select.select([woken, 0] if part else [woken], [], [])
        return 0 in ready or (signal.SIGTERM in os.read(woken, 64) and signal.getsignal(signal.SIGTERM) is _told_to_end)

    def wait() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # else it would take in a Ctrl-C that `uninterrupted` keeps waiting
        while not told():
            pass
        if not part:  # else the whole run tells
            name = " ".join(["distill", *sys.argv[1:2]])
            os.write(2, f"{name}: told to end; everything done so far is kept, and the same command goes on from there\n".encode())
        os._exit(TERMINATED)

    threading.Thread(target=wait, daemon=True).start()


def _told_to_end(signum: int, frame: object) -> None:
    """Nothing: the thread that waits for it has been woken."""


def usage() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items())
    about = "Black-box knowledge distillation, end to end."
    return f"usage: distill COMMAND [options]\n\n{about}\n\n{rows}\n\n`distill COMMAND --help` tells the options."


if __name__ == "__main__":
    entry()
