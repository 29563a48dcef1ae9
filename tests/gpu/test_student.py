"""The student's engine on a real GPU: `pytest tests/gpu`, where there is one; on the same weights it says what it says on a processor."""

from __future__ import annotations

import asyncio
from pathlib import Path

import ctranslate2
import pytest
from tiny_servable import WORDS, servable_llama, servable_t5

from shared.contracts import GenerationRequest, Sampling
from shared.engines.batching import LocalEngine
from shared.engines.convert import convert
from shared.engines.local import Device, LocalModel

GPUS = ctranslate2.get_cuda_device_count()
pytestmark = pytest.mark.skipif(not GPUS, reason="CTranslate2 sees no CUDA device on this machine")
REQUESTS = [GenerationRequest(prompt=" ".join(WORDS[n : n + 9]), sampling=Sampling(max_tokens=12)) for n in range(40)]


@pytest.fixture(scope="module", params=[servable_llama, servable_t5])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("student")
    return convert(str(request.param(root / "hf")), root / "serving", name="tiny", quantization="float32")


def answers(model: LocalModel) -> list[str]:
    async def run() -> list[str]:
        engine = LocalEngine(model)
        try:
            return [c[0].text for c in await asyncio.gather(*(engine.generate(r) for r in REQUESTS))]
        finally:
            await engine.aclose()

    return asyncio.run(run())


def test_a_gpu_says_in_float32_what_a_processor_says(folder: Path) -> None:
    assert answers(LocalModel(folder, device=Device("cuda"))) == answers(LocalModel(folder, threads=1))


def test_float16_is_a_setting(folder: Path) -> None:
    assert len(answers(LocalModel(folder, device=Device("cuda", (0,), "float16")))) == len(REQUESTS)


@pytest.mark.skipif(GPUS < 2, reason="one GPU: no two copies to answer side by side")
def test_each_gpu_has_a_copy_that_answers(folder: Path) -> None:
    model = LocalModel(folder, device=Device("cuda", (0, 1)))
    assert model.workers == 2 * model.layout.workers
    assert answers(model) == answers(LocalModel(folder, threads=1))
