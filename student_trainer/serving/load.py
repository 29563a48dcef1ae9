"""Students into memory: measured, warmed, ready to answer at once; and the undistilled one beside them, when it is asked first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

from shared.contracts import Completion, GenerationRequest, Message, Sampling
from shared.engines import Piece
from shared.engines.batching import LocalEngine
from shared.engines.layout import measured
from shared.engines.local import Device, Layout, LocalModel
from shared.engines.memory import give_back_large_blocks, give_back_now
from shared.prompts import messages, plain
from shared.settings import TaskSettings
from student_trainer.serving.follow import Loaded, Student
from student_trainer.serving.metrics import StudentMeters
from student_trainer.serving.settings import StudentServiceSettings

DECODING = Sampling(max_tokens=64, stop=("\n",))
"""Greedy, one line: as students are evaluated, with some room."""
PROBES = ("a", "What is it?", "1")
"""Questions that have nothing in common: what their prompts have is the task's."""


class Loader:
    """Loads students as the settings say. In which layout of batches and cores is found out with the first."""

    def __init__(self, settings: StudentServiceSettings, meters: StudentMeters) -> None:
        self._settings, self._meters = settings, meters
        self._device = Device(settings.device, settings.device_index, settings.compute_type)
        self._layout: Layout | None = settings.layout

    def __call__(self, student: Student) -> Loaded:
        """The student in memory, its task's own part of every prompt read. Raises EngineError for a folder that cannot be loaded."""
        model = self._model(student.folder)
        kind = model.config.kind
        if kind == "decoder-only":  # the logits of every token it reads
            give_back_large_blocks()
        probes = [worded(student.task, kind, question, DECODING) for question in PROBES]
        model.keep_prefix(probes)
        for probe in probes[: model.workers] * -(-model.workers // len(probes)):
            model.decode([model.encode(probe)], lambda *_: True)
        give_back_now()
        return Loaded(student, self._engine(model), kind, model.fits)

    def base(self, folder: Callable[[], Path]) -> Base:
        """An engine over the model in a folder that is looked for when it is asked first."""
        return Base(lambda: self._with_kind(folder()))

    def _with_kind(self, folder: Path) -> tuple[LocalEngine, bool]:
        model = self._model(folder)
        return self._engine(model), model.config.kind == "decoder-only"

    def _model(self, folder: Path) -> LocalModel:
        if self._layout is not None:
            return LocalModel(folder, layout=self._layout, device=self._device)
        model, speeds = measured(folder, self._device)
        self._layout = model.layout
        if speeds:
            tried = ", ".join(f"{layout} {speed:,.0f}" for layout, speed in speeds.items())
            print(f"student: {model.layout} (batches side by side x cores each; tokens/s of {tried})", flush=True)
        return model

    def _engine(self, model: LocalModel) -> LocalEngine:
        settings = self._settings
        tokens = settings.max_batch_tokens if model.config.kind == "decoder-only" else None
        return LocalEngine(
            model,
            max_batch=settings.max_batch,
            batch_tokens=tokens,
            max_waiting=settings.max_queue,
            deadline_s=settings.deadline_s,
            told=self._meters.batch,
        )


class Base:
    """An `Engine` that is loaded when it is asked first: the undistilled student, which people ask on the page alone."""

    def __init__(self, load: Callable[[], tuple[LocalEngine, bool]]) -> None:
        """`load`: the engine, and whether it is one for chats. May raise EngineError: it is tried again when it is asked again."""
        self._load = load
        self._loading: asyncio.Task[tuple[LocalEngine, bool]] | None = None

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        engine, chats = await self._engine()
        return await engine.generate(_put(request, chats))

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        engine, chats = await self._engine()
        stream = engine.stream(_put(request, chats))
        try:
            async for piece in stream:
                yield piece
        finally:
            await stream.aclose()

    async def check(self) -> None:
        """Always ready to be loaded."""

    async def aclose(self) -> None:
        if self._loading is not None and self._loading.done() and not self._loading.exception():
            await self._loading.result()[0].aclose()

    async def _engine(self) -> tuple[LocalEngine, bool]:
        if self._loading is None or (self._loading.done() and self._loading.exception()):
            self._loading = asyncio.create_task(asyncio.to_thread(self._load))
        return await asyncio.shield(self._loading)  # it is loaded once, also if who asked first has left


def worded(task: TaskSettings, kind: str, question: str, sampling: Sampling) -> GenerationRequest:
    """The question as the student was trained and evaluated on it: plain text for an encoder-decoder, else a chat."""
    if kind == "encoder-decoder":
        return GenerationRequest(prompt=plain(task, question), sampling=sampling)
    return GenerationRequest(messages=messages(task, question), sampling=sampling)


def _put(request: GenerationRequest, chats: bool) -> GenerationRequest:
    """A plain prompt as the one turn of a chat, for a model that reads chats."""
    if not chats or request.prompt is None:
        return request
    return request.model_copy(update={"messages": (Message(role="user", content=request.prompt),), "prompt": None})
