"""One tree of errors: a class names the boundary that failed and what the caller can do; its exit code is its own.

DistillError                     1
  SettingsError                  2   mend the recipe, the flag or the environment variable
  PromotionRefused               3   the student did not win; what was served stays served
  DataError                      4   mend the data file
    LeakageError                 5   test rows would reach training
  RunMismatch                    6   another recipe or another version owns this directory, or it is something else
  TeacherError                   7
    TeacherUnavailable           7   worth retrying: refused, reset, timed out, 5xx, 429
      TeacherBusy                7   it says so itself: 429, or a full queue
      TeacherLate                7   no answer in time
      TeacherFailed              7   it answered that it failed, or broke off
    TeacherRejected              7   retrying cannot help: key refused, certificate, out of credit
      NotTheApi                  7   an answer of something else: the wrong URL if it is the first, else a fault
      RequestRefused             7   this one request was refused: a failed row
        RequestForbidden         7   the same by 403, unless nothing was answered so far: then it may be the key
  HarvestTooThin                 8   too few usable answers
  StageOrder                     9   a stage this one reads has not been finished
  StorageError                  10   no space, read-only, locked by another writer
  EngineError                   11   a local engine cannot load or answer
  TrainingError                 12   nothing to train on, loss not finite
  BudgetSpent                   13   a cap of harvest.budget is reached: all answers are kept
  Stopped                      143   by SIGTERM, with everything kept
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Literal

FailureClass = Literal["refused", "too_long", "content_filter", "no_text", "empty", "over_long", "unanswered"]
"""Why a row failed. refused: the teacher would not have this request (4xx). too_long: prompt and answer do not fit the model.
content_filter: it would not let its answer out. no_text: an answer of something else. empty: nothing but blanks. over_long: more text
than harvest.max_answer_chars. unanswered: every attempt failed while others were answered."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells expect it."""
TERMINATED = 143
"""Exit code of a job after SIGTERM, which is how containers are stopped; servers finish what is in flight and end with 0."""


class DistillError(Exception):
    """Base of all errors that a user can act on; the message names the field or file and the remedy."""

    exit_code = 1
    goes_on = False
    """Whether the same command goes on from where it ended: what was done is kept."""


class SettingsError(DistillError):
    exit_code = 2


class PromotionRefused(DistillError):
    exit_code = 3


class DataError(DistillError):
    exit_code = 4


class LeakageError(DataError):
    exit_code = 5


class RunMismatch(DistillError):
    exit_code = 6


class TeacherError(DistillError):
    exit_code = 7
    goes_on = True


class TeacherUnavailable(TeacherError):
    """The teacher did not answer this time: worth retrying. `retry_after_s`: what it asked for, if it did; `maybe_billed`: it may
    have answered, though nothing usable came.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None, maybe_billed: bool = False) -> None:
        super().__init__(message)
        self.retry_after_s, self.maybe_billed = retry_after_s, maybe_billed


class TeacherBusy(TeacherUnavailable):
    """The teacher works, and takes no more requests just now."""


class TeacherLate(TeacherUnavailable):
    """The teacher took longer than it was given."""


class TeacherFailed(TeacherUnavailable):
    """The teacher was reached, and failed: HTTP 500, or an answer that broke off."""


class TeacherRejected(TeacherError):
    """The teacher answered and refused, or answered something else than its API promises: retrying cannot help."""


class NotTheApi(TeacherRejected):
    """Something answered that is not the API asked for: a wrong URL where it is the first answer, a fault where others were right."""


class RequestRefused(TeacherRejected):
    """The teacher refused this one request (400, 413, 422): a failed row, not a failed harvest.

    `kind`: a FailureClass; `maybe_billed`: an answer came, and is of no use.
    """

    def __init__(self, message: str, *, kind: FailureClass = "refused", maybe_billed: bool = False) -> None:
        super().__init__(message)
        self.kind, self.maybe_billed = kind, maybe_billed


class RequestForbidden(RequestRefused):
    """HTTP 403: of a key that was answered before this one request alone is refused (moderation), else it may be the key."""


class HarvestTooThin(DistillError):
    exit_code = 8


class StageOrder(DistillError):
    exit_code = 9


class StorageError(DistillError):
    exit_code = 10


class EngineError(DistillError):
    exit_code = 11


class TrainingError(DistillError):
    exit_code = 12


class BudgetSpent(DistillError):
    exit_code = 13
    goes_on = True


class Stopped(DistillError):
    """By SIGTERM, with everything kept."""

    exit_code = TERMINATED
    goes_on = True


def storage_error(exc: OSError, path: Path) -> StorageError:
    """The `StorageError` that says what a failed write at `path` means and what to do about it."""
    remedy = {
        errno.ENOSPC: "no space left on the device; free some and run the same command again: what was written is kept",
        errno.EDQUOT: "disk quota exceeded; free some and run the same command again: what was written is kept",
        errno.EROFS: "the file system is read-only; give a writable --out",
        errno.EACCES: "permission denied; give an --out that this user may write",
        errno.EISDIR: "a folder stands where this file belongs; move it away and run the same command again",
        errno.EPERM: "operation not permitted; give an --out that this user may write",
    }.get(exc.errno or 0, exc.strerror or repr(exc))
    return StorageError(f"{path}: {remedy}")
