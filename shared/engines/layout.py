"""How many batches side by side, on how many cores each: found out by trying, since it depends on the model and on the machine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shared.contracts import GenerationRequest, Sampling
from shared.engines.local import Device, Layout, LocalModel, Prompt, available_cores

ROWS = 4
PROMPT_WORDS = 24
STEPS = 6
MOST_S = 1.0
"""Seconds after which no further layout is tried: who waits for a server to start would rather have it."""
TEXT = "a question of some length "


def layouts(cores: int) -> Iterator[Layout]:
    """Every way to share so many cores evenly, one core a batch first."""
    for each in range(1, cores + 1):
        if cores % each == 0:
            yield Layout(cores // each, each)


def measured(folder: Path, device: Device = Device()) -> tuple[LocalModel, dict[Layout, float]]:  # noqa: B008
    """The model in the fastest layout, and the tokens a second of each that was tried; of none where there is nothing to choose.

    Each has all cores read and decode the same: a small batch for every worker of the layout that has the most. Raises EngineError.
    """
    cores = available_cores()
    if device.kind == "cuda" or cores == 1:
        return LocalModel(folder, layout=Layout(1), device=device), {}
    speeds: dict[Layout, float] = {}
    best, began = Layout(cores), time.monotonic()
    model: LocalModel | None = None
    for layout in layouts(cores):
        model = None  # one copy in memory at a time
        model = LocalModel(folder, layout=layout, device=device)
        speeds[layout] = _speed(model, batches=cores, hopeless=speeds.get(best, 0.0) / 2)
        if speeds[layout] >= speeds[best]:
            best = layout
        if time.monotonic() - began > MOST_S:
            break
    if model is None or model.layout != best:
        model = None
        model = LocalModel(folder, layout=best, device=device)
    return model, speeds


def _speed(model: LocalModel, *, batches: int, hopeless: float) -> float:
    """Tokens read and decoded in a second, at best of two times, since others may be at work; below `hopeless` once is enough."""
    sampling = Sampling(max_tokens=STEPS)
    prompt = model.encode(GenerationRequest(prompt=" ".join((TEXT * PROMPT_WORDS).split()[:PROMPT_WORDS]), sampling=sampling))
    most = 0.0
    with ThreadPoolExecutor(model.workers) as threads:
        list(threads.map(lambda _: model.decode([prompt], lambda *_: True), range(model.workers)))  # every worker takes its memory
        for _ in range(2):
            began = time.perf_counter()
            made = sum(threads.map(lambda _: _decoded(model, prompt), range(batches)))
            most = max(most, made / (time.perf_counter() - began))
            if most < hopeless:
                break
    return most


def _decoded(model: LocalModel, prompt: Prompt) -> int:
    """Decode one batch; its tokens, read and made."""
    made = 0

    def heed(row: int, sample: int, token: int, last: bool) -> bool:
        nonlocal made
        made += 1
        return False

    model.decode([prompt] * ROWS, heed)
    return ROWS * len(prompt.tokens) + made
