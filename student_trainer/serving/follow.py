"""Who is served: one student at a time, replaced while requests are under way, as the registry says."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from shared.contracts import Completion, GenerationRequest
from shared.engines import Engine
from shared.errors import DataError
from shared.http.problems import NotReady
from shared.registry import Promoted, current, history, serving_path, verify
from shared.settings import TaskSettings

LOOK_S = 1.0
"""Seconds between two looks at the registry's pointer."""
RETRY_S = 30.0
"""Seconds until what could not be served is tried again: what was in the way, a file system or a want of memory, may have passed."""
RETIRE_S = 60.0
"""Seconds that requests in flight get to finish on a student that has been replaced."""
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


@dataclass
class Loaded:
    """A student that can answer, and how many requests it is answering."""

    student: Student
    engine: Engine
    kind: Literal["encoder-decoder", "decoder-only"]
    in_flight: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)


def load(student: Student) -> Loaded:
    """The student in memory. Raises EngineError for a folder that cannot be loaded."""
    from shared.engines.local import LocalEngine, LocalModel

    model = LocalModel(student.folder)
    return Loaded(student, LocalEngine(model), model.config.kind)


def verified(registry: Path, promoted: Promoted) -> Student:
    """The student that was promoted. Raises DataError if its files are not those that were, or its task is not readable."""
    verify(registry, promoted)
    try:
        task = TaskSettings.model_validate(promoted.task)
    except ValidationError as exc:
        raise DataError(f"{registry}: the task of version {promoted.version} is not readable: {exc.errors()[0]['msg']}") from exc
    folder = serving_path(registry, promoted)
    return Student(folder, promoted.version, task, promoted.name, promoted.scores, promoted.promoted_at)


class Served:
    """An `Engine` whose student can be replaced while it answers. Belongs to one event loop."""

    def __init__(self, loaded: Loaded | None = None, *, retire_s: float = RETIRE_S) -> None:
        self.loaded, self._retire_s = loaded, retire_s
        self.reason: str | None = "starting" if loaded is None else None
        """Why nothing is served, or why the student promoted last is not; for callers."""

    @contextlib.contextmanager
    def borrow(self) -> Iterator[Loaded]:
        """Who is served now, not closed before the block ends even if replaced meanwhile. Raises NotReady."""
        loaded = self.loaded
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

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        with self.borrow() as loaded:
            return await loaded.engine.generate(request)

    async def check(self) -> None:
        with self.borrow() as loaded:
            await loaded.engine.check()

    async def replace(self, loaded: Loaded) -> None:
        """From now on `loaded` answers; returns when the one before has finished its requests and is closed."""
        before, self.loaded, self.reason = self.loaded, loaded, None
        if before is None:
            return
        # an engine that closes refuses the requests in its queue: they are let through first
        if before.in_flight:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._retire_s):
                    await before.idle.wait()
        await before.engine.aclose()

    async def aclose(self) -> None:
        if self.loaded is not None:
            await self.loaded.engine.aclose()


class Follower:
    """Serves what the registry says: the first promotion, every later one, and rollbacks."""

    def __init__(self, registry: Path, served: Served, *, load: Callable[[Student], Loaded] = load, retry_s: float = RETRY_S) -> None:
        self._registry, self._served, self._load, self._retry_s = registry, served, load, retry_s
        self._failed: Promoted | None = None
        self._retry_at = 0.0
        self._logged: str | None = None

    async def look(self) -> None:
        """Serve what is promoted now, unless it is served already.

        What cannot be served leaves who is served in place, and is tried again after `retry_s`. The log gets the error, one line
        while it stays the same; callers do not, since engines and file systems tell what is inside.
        """
        try:
            found = await asyncio.to_thread(_look_at, self._registry)
        except Exception as exc:
            self._refuse("what is promoted cannot be told", exc)
            return
        if isinstance(found, str):
            self._say(found, f"{found}; waiting for a promotion in {self._registry}")
            return
        served = self._served.loaded
        if served is not None and served.student.version == found.version:
            self._served.reason = self._logged = None
            return
        if found != self._failed:
            self._served.reason = f"loading promoted version {found.version}"
        elif time.monotonic() < self._retry_at:
            return
        try:
            student = await asyncio.to_thread(verified, self._registry, found)
            loaded = await asyncio.to_thread(self._load, student)
            print(f"student: serving {_told(student)}", flush=True)
        except Exception as exc:  # whatever it was, who is served goes on answering
            self._failed, self._retry_at = found, time.monotonic() + self._retry_s
            self._refuse(f"promoted version {found.version} cannot be served", exc)
            return
        self._logged = None
        await self._served.replace(loaded)

    @contextlib.asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Look now and every LOOK_S seconds, beside the block: a student that takes long to load keeps nothing else waiting."""
        task = asyncio.create_task(self._follow())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def _follow(self) -> None:
        while True:
            try:
                await self.look()
            except Exception:  # an engine that does not close, or what nobody foresaw: the next promotion is to be served all the same
                log.exception("student: an error while following %s, which goes on", self._registry)
            await asyncio.sleep(LOOK_S)

    def _refuse(self, reason: str, exc: Exception) -> None:
        self._say(f"{reason}; the log tells why", f"{reason}: {type(exc).__name__}: {exc}")

    def _say(self, told: str, logged: str) -> None:
        """`told` to callers, `logged` to the log unless it was the last that was."""
        self._served.reason = told
        if logged != self._logged:
            stays = self._served.loaded
            log.warning("student: %s%s", logged, f"; version {stays.student.version} stays served" if stays else "")
        self._logged = logged


def _look_at(registry: Path) -> Promoted | str:
    """What is promoted, or that nothing is. Raises as `current` does."""
    if promoted := current(registry):
        return promoted
    events = history(registry)
    refused = f" (the last one was refused: {events[-1].reason})" if events and events[-1].what == "refused" else ""
    return f"no student is promoted yet{refused}"


def _told(student: Student) -> str:
    scores = ", ".join(f"{metric} {score:.3f}" for metric, score in student.scores.items())
    return f"version {student.version} of {student.name}" + (f" ({scores})" if scores else "")
