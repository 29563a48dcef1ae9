"""The servers that people write first, for serve.py to measure: FastAPI around transformers' `generate`, one at a time or in fixed batches.

    python tests/benchmarks/naive_server.py --model smollm2=FOLDER --model t5=FOLDER     # prints "naive: listening on URL"

POST /{how}/{dtype}/{model}/v1/chat/completions and .../v1/completions take and give the parts of the OpenAI API that serve.py needs.
how: `one` (a lock: whoever comes next waits) or `batched` (the first BATCH requests that wait, once GATHER_S have passed or there are as
many; the next batch when this one is answered whole). dtype: float32 or bfloat16. A model is loaded in a dtype at its first request.

They are not made slow: a stop text ends decoding by its tokens (transformers' own `stop_strings` looks at the text of every step), and
nothing is computed for a request but its answer.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # read while they are imported

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import logging

BATCH = 16
GATHER_S = 0.02
"""Seconds that a batch waits for more requests at most."""
How = Literal["one", "batched"]
Dtype = Literal["float32", "bfloat16"]


class Body(BaseModel):
    """A request: `messages` of a chat, or a `prompt`. What else it holds is not looked at: it is always greedy."""

    messages: list[dict[str, str]] | None = None
    prompt: str | None = None
    max_tokens: int
    stop: list[str] = []


@dataclass
class Waiting:
    """A request in a queue."""

    body: Body
    answer: asyncio.Future[str]


class Model:
    """A folder in Hugging Face format, loaded in one dtype."""

    def __init__(self, folder: str, dtype: Dtype) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        kinds = (AutoModelForSeq2SeqLM, AutoModelForCausalLM)
        encoder_decoder = "T5" in (Path(folder) / "config.json").read_text()
        self._model = kinds[not encoder_decoder].from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self._encoder_decoder = encoder_decoder
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        texts = self._tokenizer.batch_decode([[i] for i in range(len(self._tokenizer))])
        self._newlines = [i for i, text in enumerate(texts) if "\n" in text]
        self.lock = asyncio.Lock()
        self.queue: asyncio.Queue[Waiting] = asyncio.Queue()
        self.worker: asyncio.Task[None] | None = None

    def _text(self, body: Body) -> str:
        if body.messages is None:
            return body.prompt or ""
        return str(self._tokenizer.apply_chat_template(body.messages, tokenize=False, add_generation_prompt=True))

    def generate(self, bodies: list[Body]) -> list[str]:
        """The greedy answers to a batch whose requests are of one kind, and want the same number of tokens and the same stop."""
        plain = bodies[0].messages is None  # a chat template writes the special tokens itself
        inputs = self._tokenizer([self._text(body) for body in bodies], return_tensors="pt", padding=True, add_special_tokens=plain)
        ends = [self._tokenizer.eos_token_id, *(self._newlines if bodies[0].stop else [])]
        options: dict[str, Any] = {"max_new_tokens": bodies[0].max_tokens, "do_sample": False, "eos_token_id": ends}
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                pad_token_id=self._tokenizer.pad_token_id,
                **options,
            )
        answers = out if self._encoder_decoder else out[:, inputs["input_ids"].shape[1] :]
        return [text.split("\n")[0] if bodies[0].stop else text for text in self._tokenizer.batch_decode(answers, skip_special_tokens=True)]

    async def one(self, body: Body) -> str:
        async with self.lock:
            return (await asyncio.to_thread(self.generate, [body]))[0]

    async def batched(self, body: Body) -> str:
        self.worker = self.worker or asyncio.create_task(self._work())
        waiting = Waiting(body, asyncio.get_running_loop().create_future())
        self.queue.put_nowait(waiting)
        return await waiting.answer

    async def _work(self) -> None:
        while True:
            batch = [await self.queue.get()]
            try:
                async with asyncio.timeout(GATHER_S):
                    while len(batch) < BATCH:
                        batch.append(await self.queue.get())
            except TimeoutError:
                pass
            try:
                answers = await asyncio.to_thread(self.generate, [waiting.body for waiting in batch])
            except Exception as exc:  # those who wait must hear of it
                for waiting in batch:
                    waiting.answer.set_exception(exc)
                continue
            for waiting, answer in zip(batch, answers, strict=True):
                if not waiting.answer.done():
                    waiting.answer.set_result(answer)


def naive_app(folders: dict[str, str]) -> FastAPI:
    app = FastAPI()
    models: dict[tuple[str, str], Model] = {}

    async def answered(how: How, dtype: Dtype, model: str, body: Body) -> str:
        if (model, dtype) not in models:
            models[model, dtype] = Model(folders[model], dtype)
        loaded = models[model, dtype]
        return (await (loaded.one(body) if how == "one" else loaded.batched(body))).lstrip()

    @app.post("/{how}/{dtype}/{model}/v1/chat/completions")
    async def chat(how: How, dtype: Dtype, model: str, body: Body) -> dict[str, Any]:
        return {"choices": [{"message": {"role": "assistant", "content": await answered(how, dtype, model, body)}}]}

    @app.post("/{how}/{dtype}/{model}/v1/completions")
    async def complete(how: How, dtype: Dtype, model: str, body: Body) -> dict[str, Any]:
        return {"choices": [{"text": await answered(how, dtype, model, body)}]}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER", help="a folder in Hugging Face format")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    print(f"naive: listening on http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    app = naive_app(dict(named.split("=", 1) for named in args.model))
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])


if __name__ == "__main__":
    main()
