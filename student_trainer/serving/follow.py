"""Who is served: one student at a time, replaced while requests are under way, as the registry says."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from shared.contracts import Completion, GenerationRequest
from shared.engines import Engine
from shared.errors import DataError, DistillError
from shared.http.app import NotReady
from shared.registry import Promoted, current, history, serving_path, verify
from shared.settings import TaskSettings

LOOK_S = 1.0
"""Seconds between two looks at the registry's pointer."""
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
        self.reason: str | None = None
        """Why nothing is served, or why the student promoted last is not."""

    @contextlib.contextmanager
    def borrow(self) -> Iterator[Loaded]:
        """Who is served now, not closed before the block ends even if replaced meanwhile. Raises NotReady."""
        loaded = self.loaded
        if loaded is None:
            raise NotReady(self.reason or "starting", retry_after_s=RETRY_AFTER_S)
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
        try:
            # an engine that closes refuses the requests in its queue: they are let through first
            if before.in_flight:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._retire_s):
                        await before.idle.wait()
        finally:
            await before.engine.aclose()

    async def aclose(self) -> None:
        if self.loaded is not None:
            await self.loaded.engine.aclose()


class Follower:
    """Serves what the registry says: the first promotion, every later one, and rollbacks."""

    def __init__(self, registry: Path, served: Served, *, load: Callable[[Student], Loaded] = load) -> None:
        self._registry, self._served, self._load = registry, served, load
        self._seen: Promoted | str | None = None

    async def look(self) -> None:
        """Serve what is promoted now, unless the last look saw the same.

        What cannot be served is refused, once, with a line in the log; what is served stays.
        """
        found = await asyncio.to_thread(_look_at, self._registry)
        if found == self._seen:
            return
        self._seen = found
        if isinstance(found, str):
            self._refuse(found)
            return
        try:
            student = await asyncio.to_thread(verified, self._registry, found)
            loaded = await asyncio.to_thread(self._load, student)
        except Exception as exc:  # whatever it was, who is served goes on answering and the next promotion is looked at
            self._refuse(f"promoted version {found.version} cannot be served: {exc}")
            return
        print(f"student: serving {_told(student)}", flush=True)
        await self._served.replace(loaded)

    @contextlib.asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Look once, so that a student promoted before is served from the first request on; then every LOOK_S seconds."""
        await self.look()
        task = asyncio.create_task(self._follow())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()

    def _refuse(self, reason: str) -> None:
        self._served.reason = reason
        stays = self._served.loaded
        log.warning("student: %s%s", reason, f"; version {stays.student.version} stays served" if stays else "")


def _look_at(registry: Path) -> Promoted | str:
    """What is promoted, or why nothing can be served."""
    try:
        if promoted := current(registry):
            return promoted
        events = history(registry)
    except (DistillError, OSError) as exc:
        return f"what is promoted cannot be told: {exc}"
    refused = f" (the last one was refused: {events[-1].reason})" if events and events[-1].what == "refused" else ""
    return f"no student is promoted yet{refused}; waiting for a promotion in {registry}"


def _told(student: Student) -> str:
    scores = ", ".join(f"{metric} {score:.3f}" for metric, score in student.scores.items())
    return f"version {student.version} of {student.name}" + (f" ({scores})" if scores else "")
