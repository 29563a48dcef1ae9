"""Answers of a model that is on every node: chunks of prompts on Ray Data's actors, each with a copy of the model."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

from shared.cluster.ways import connected, error_of, refuse_unless_ready, workers_of
from shared.collect import Answered, Answering, Chunk, answered_by
from shared.errors import DistillError


class Actor:
    """An actor of Ray Data's."""

    def __init__(self, reference: str, quantization: str) -> None:
        self._given = reference, quantization
        self._model: Any = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        from shared.engines.local import LocalModel
        from shared.models import serving_folder

        try:
            if self._model is None:
                self._model = LocalModel(serving_folder(*self._given), threads=1)
            return {"answered": [pickle.dumps(answered_by(self._model, pickle.loads(chunk))) for chunk in batch["chunk"]]}
        except DistillError as exc:
            told = type(exc).__name__, f"node {os.uname().nodename}: {exc}"
            return {"answered": [pickle.dumps(told) for _ in batch["chunk"]]}


def elsewhere(on: str, reference: str, quantization: str, *, workers: int | None) -> Answering:
    """What answers chunks on a cluster. Each node has the model, or makes it, as `serving_folder` does.

    What it yields is in any order. It raises SettingsError for a cluster that cannot be used, EngineError.
    """

    def answer(chunks: Sequence[Chunk]) -> Iterator[Answered]:
        if not chunks:
            return
        with connected(on) as ray:
            refuse_unless_ready(ray, None)
            number = min(workers_of(ray, workers), len(chunks))
            rows = ray.data.from_items([{"chunk": pickle.dumps(chunk)} for chunk in chunks], override_num_blocks=len(chunks))
            rows = rows.map_batches(Actor, fn_constructor_args=(reference, quantization), batch_size=1, concurrency=number, num_cpus=1)
            for row in rows.iter_rows():
                found = pickle.loads(row["answered"])
                if not isinstance(found, Answered):
                    raise error_of(*found)
                yield found

    return answer
