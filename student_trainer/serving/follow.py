"""Who is served: one student at a time, replaced while requests are under way, as the registry says."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from shared.contracts import Completion, Example, GenerationRequest
from shared.engines import Engine
from shared.errors import DataError
from shared.http.problems import NotReady
from shared.registry import Canary, Promoted, canary, current, history, serving_path, verify
from shared.settings import TaskSettings

LOOK_S = 1.0
"""Seconds between two looks at the registry's pointer."""
RETRY_S = 30.0
"""Seconds until what could not be served is tried again: what was in the way, a file system or a want of memory, may have passed."""
RETIRE_S = 60.0
"""Seconds that requests in flight get to finish on a student that has been replaced."""
SAMPLES = 8
MOST_RETIRING = 2
"""Replaced students that still answer; another is loaded when one of them has ended."""
RETRY_AFTER_S = 5.0
"""What callers are told to wait while nothing is served."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Student:
    """What is served: a folder, the task it was trained for, and which version of it this is."""

    folder: Path
    version: str
    task: TaskSettings
    name: str = ""
    """The recipe's name; empty for a folder that was never promoted."""
    scores: dict[str, float] = field(default_factory=dict)
    """On the test split, each in [0, 1]; empty where nothing was measured."""
    promoted_at: str | None = None
    """UTC, ISO 8601."""
    samples: tuple[str, ...] = ()
    """Some questions of its test split."""
    report: Path | None = None
    """The report of its evaluation, as a page."""


@dataclass
class Loaded:
    """A student that can answer, and how many requests it is answering."""

    student: Student
    engine: Engine
    kind: Literal["encoder-decoder", "decoder-only"]
    fits: Callable[[GenerationRequest], bool] = lambda request: True
    """Whether the model can read a whole prompt and still answer."""
    in_flight: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)


def verified(registry: Path, promoted: Promoted) -> Student:
    """The student that was promoted. Raises DataError if its files are not those that were, or its task is not readable."""
    verify(registry, promoted)
    try:
        task = TaskSettings.model_validate(promoted.task)
    except ValidationError as exc:
        raise DataError(f"{registry}: the task of version {promoted.version} is not readable: {exc.errors()[0]['msg']}") from exc
    folder = serving_path(registry, promoted)
    report = folder.parent / "report.html"
    return Student(
        folder,
        promoted.version,
        task,
        promoted.name,
        promoted.scores,
        promoted.promoted_at,
        _samples(folder.parent / "test.jsonl"),
        report if report.is_file() else None,
    )


def _samples(file: Path) -> tuple[str, ...]:
    """The first SAMPLES questions of a split, if it is there: the page can do without them."""
    try:
        with file.open("rb") as rows:
            return tuple(Example.model_validate_json(row).question for row in islice(rows, SAMPLES))
    except (OSError, ValidationError):
        return ()


class Served:
    """An `Engine` whose student can be replaced while it answers, and one more that is tried on a share of what it is asked.

    Belongs to one event loop.
    """

    def __init__(self, loaded: Loaded | None = None, *, retire_s: float = RETIRE_S) -> None:
        self.loaded, self._retire_s = loaded, retire_s
        self.reason: str | None = "starting" if loaded is None else None
        """Why nothing is served, or why the student promoted last is not; for callers."""
        self.tried: Loaded | None = None
        """The canary."""
        self.share = 0.0
        """Of the requests, that the canary gets."""
        self._due = 0.0

    @contextlib.contextmanager
    def borrow(self) -> Iterator[Loaded]:
        """Who answers the next request, not closed before the block ends even if replaced meanwhile. Raises NotReady."""
        loaded = self._next()
        if loaded is None:
            raise NotReady(str(self.reason), retry_after_s=RETRY_AFTER_S)
        loaded.in_flight += 1
        loaded.idle.clear()
        try:
            yield loaded
        finally:
            loaded.in_flight -= 1
            if not loaded.in_flight:
                loaded.idle.set()

    def _next(self) -> Loaded | None:
        if self.loaded is None or self.tried is None:
            return self.loaded
        self._due += self.share  # spread evenly: of 10% every tenth
        if self._due < 1:
            return self.loaded
        self._due -= 1
        return self.tried

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        with self.borrow() as loaded:
            return await loaded.engine.generate(request)

    async def check(self) -> None:
        if self.loaded is None:
            raise NotReady(str(self.reason), retry_after_s=RETRY_AFTER_S)
        await self.loaded.engine.check()

    def seat(self, loaded: Loaded) -> list[Loaded]:
        """From now on `loaded` answers, and no canary does: a canary is tried beside one version. Returns who is to be retired."""
        before = [one for one in (self.loaded, self.tried) if one is not None and one is not loaded]
        self.loaded, self.reason, self.tried, self.share = loaded, None, None, 0.0
        return before

    def try_out(self, loaded: Loaded | None, share: float = 0.0) -> list[Loaded]:
        """From now on `loaded` gets that share of the requests. Returns who is to be retired."""
        before, self.tried, self.share, self._due = self.tried, loaded, share, 0.0
        return [before] if before is not None and before is not loaded else []

    async def retire(self, before: Loaded) -> None:
        """Return when one who answers no new requests has finished its own, or has had the time to, and is closed."""
        try:
            # an engine that closes refuses the requests in its queue: they are let through first
            if before.in_flight:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._retire_s):
                        await before.idle.wait()
        finally:
            await before.engine.aclose()

    async def aclose(self) -> None:
        for loaded in (self.loaded, self.tried):
            if loaded is not None:
                await loaded.engine.aclose()


class Follower:
    """Serves what the registry says: the first promotion, every later one, rollbacks, and canaries."""

    def __init__(
        self,
        registry: Path,
        served: Served,
        *,
        load: Callable[[Student], Loaded],
        retry_s: float = RETRY_S,
        changed: Callable[[Served], None] = lambda served: None,
    ) -> None:
        """`load`: the student in memory, ready to answer at once. `changed` is called when somebody else is served or tried."""
        self._registry, self._served, self._load, self._retry_s, self._changed = registry, served, load, retry_s, changed
        self._failed: dict[str, tuple[Promoted, float]] = {}
        """What could not be served or tried, by which of the two, and when to try again."""
        self._logged: str | None = None
        self._canary_logged: str | None = None
        self._retiring: set[asyncio.Task[None]] = set()

    async def look(self) -> None:
        """Serve what is promoted now, unless it is served already, and try the canary.

        What cannot be served leaves who is served in place, and is tried again after `retry_s`. The log gets the error, one line
        while it stays the same; callers do not, since engines and file systems tell what is inside.
        """
        try:
            found, tried = await asyncio.to_thread(_look_at, self._registry)
        except Exception as exc:
            self._refuse("what is promoted cannot be told", exc)
            return
        if isinstance(found, str):
            self._say(found, f"{found}; waiting for a promotion in {self._registry}")
            return
        before = self._served.loaded
        await self._serve(found)
        if self._served.loaded is before:  # else that has taken its time: what is to be tried is looked up again
            await self._try(tried)

    async def _serve(self, found: Promoted) -> None:
        served, tried = self._served.loaded, self._served.tried
        if served is not None and served.student.version == found.version:
            self._served.reason = self._logged = None
            self._tell_anew(served, found)
            return
        if tried is not None and tried.student.version == found.version:  # it was tried, and is promoted now
            student = tried.student
            tried.student = replace(student, scores=found.scores, promoted_at=found.promoted_at)
            loaded: Loaded | None = tried
        else:
            if not self._wanted("served", found):
                return
            self._served.reason = f"loading promoted version {found.version}"
            loaded = await self._loaded("served", found)
        if loaded is None:
            return
        if loaded is not tried and not await self._stands(lambda: current(self._registry), found):
            await loaded.engine.aclose()
            return
        print(f"student: serving {_told(loaded.student)}", flush=True)
        self._logged = None
        self._retire(self._served.seat(loaded))
        self._changed(self._served)

    async def _try(self, found: Canary | DataError | None) -> None:
        tried = self._served.tried
        if isinstance(found, DataError):  # whoever is tried goes on being tried
            self._warn("what is to be tried cannot be told", found)
            return
        if found is None:
            if tried is not None:
                print(f"student: version {tried.student.version} is tried no more", flush=True)
                self._try_out(None)
            return
        if tried is not None and tried.student.version == found.promoted.version:
            self._tell_anew(tried, found.promoted)
            if found.share != self._served.share:
                print(f"student: trying version {tried.student.version} on {found.share:.0%} of the requests", flush=True)
                self._try_out(tried, found.share)
            return
        if self._wanted("tried", found.promoted) and (loaded := await self._loaded("tried", found.promoted)):
            if not await self._stands(self._tried_now, found.promoted):
                await loaded.engine.aclose()
                return
            print(f"student: trying {_told(loaded.student)} on {found.share:.0%} of the requests", flush=True)
            self._try_out(loaded, found.share)

    def _try_out(self, tried: Loaded | None, share: float = 0.0) -> None:
        self._retire(self._served.try_out(tried, share))
        self._changed(self._served)

    def _tell_anew(self, loaded: Loaded, found: Promoted) -> None:
        """Tell the scores of a version that was evaluated and promoted anew."""
        student = replace(loaded.student, scores=found.scores, promoted_at=found.promoted_at)
        if student != loaded.student:
            loaded.student = student
            self._changed(self._served)

    def _retire(self, before: list[Loaded]) -> None:
        """Let those who are replaced finish, beside all else: what the registry says next is not to wait for their slowest request."""
        for loaded in before:
            task = asyncio.create_task(self._served.retire(loaded))
            self._retiring.add(task)
            task.add_done_callback(self._retired)

    def _retired(self, task: asyncio.Task[None]) -> None:
        self._retiring.discard(task)
        if not task.cancelled() and (exc := task.exception()):
            log.error("student: a replaced student did not close: %s: %s", type(exc).__name__, exc)

    async def settled(self) -> None:
        """Return when all who were replaced have finished and are closed."""
        while self._retiring:
            await asyncio.wait(self._retiring)

    def _tried_now(self) -> Promoted | None:
        tried = canary(self._registry)
        return tried.promoted if tried else None

    async def _stands(self, looked_up: Callable[[], Promoted | None], found: Promoted) -> bool:
        """Whether what was loaded is still wanted: a rollback may have come meanwhile. What cannot be told is taken to be as it was."""
        try:
            now = await asyncio.to_thread(looked_up)
        except Exception:
            return True
        return now is not None and now.version == found.version

    def _wanted(self, what: str, found: Promoted) -> bool:
        """Whether to load this now: it has not failed, or that is a while ago."""
        failed, retry_at = self._failed.get(what, (None, 0.0))
        return failed != found or time.monotonic() >= retry_at

    async def _loaded(self, what: Literal["served", "tried"], found: Promoted) -> Loaded | None:
        while len(self._retiring) > MOST_RETIRING:  # memory
            await asyncio.wait(self._retiring, return_when=asyncio.FIRST_COMPLETED)
        try:
            student = await asyncio.to_thread(verified, self._registry, found)
            loaded = await asyncio.to_thread(self._load, student)
        except Exception as exc:  # whatever it was, who is served goes on answering
            self._failed[what] = found, time.monotonic() + self._retry_s
            if what == "served":
                self._refuse(f"promoted version {found.version} cannot be served", exc)
            else:
                self._warn(f"canary {found.version} cannot be tried", exc)
            return None
        self._failed.pop(what, None)
        return loaded

    @contextlib.asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Look now and every LOOK_S seconds, beside the block: a student that takes long to load keeps nothing else waiting."""
        task = asyncio.create_task(self._follow())
        try:
            yield
        finally:
            for ending in (task, *self._retiring):
                ending.cancel()
            await asyncio.wait([task, *self._retiring])

    async def _follow(self) -> None:
        while True:
            try:
                await self.look()
            except Exception:  # an engine that does not close, or what nobody foresaw: the next promotion is to be served all the same
                log.exception("student: an error while following %s, which goes on", self._registry)
            await asyncio.sleep(LOOK_S)

    def _warn(self, what: str, exc: Exception) -> None:
        """One line in the log while it stays the same."""
        said = f"student: {what}: {type(exc).__name__}: {exc}"
        if said != self._canary_logged:
            log.warning("%s", said)
        self._canary_logged = said

    def _refuse(self, reason: str, exc: Exception) -> None:
        self._say(f"{reason}; the log tells why", f"{reason}: {type(exc).__name__}: {exc}")

    def _say(self, told: str, logged: str) -> None:
        """`told` to callers, `logged` to the log unless it was the last that was."""
        self._served.reason = told
        if logged != self._logged:
            stays = self._served.loaded
            log.warning("student: %s%s", logged, f"; version {stays.student.version} stays served" if stays else "")
        self._logged = logged


def _look_at(registry: Path) -> tuple[Promoted | str, Canary | DataError | None]:
    """What is promoted, or that nothing is, and what is tried beside it. Raises as `current` does."""
    if promoted := current(registry):
        try:
            return promoted, canary(registry)
        except DataError as exc:  # a damaged canary keeps nobody from being served
            return promoted, exc
    events = history(registry)
    refused = f" (the last one was refused: {events[-1].reason})" if events and events[-1].what == "refused" else ""
    return f"no student is promoted yet{refused}", None


def _told(student: Student) -> str:
    scores = ", ".join(f"{metric} {score:.3f}" for metric, score in student.scores.items())
    return f"version {student.version} of {student.name}" + (f" ({scores})" if scores else "")
