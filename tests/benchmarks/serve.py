"""What serving costs: the student's server beside CTranslate2's offline limit and the servers that people write first, in one run.

    python tests/benchmarks/serve.py                    # a quarter of an hour
    python tests/benchmarks/serve.py --quick            # within a minute on 2 idle cores: one round, few prompts, rough
    python tests/benchmarks/serve.py --swap --start     # promotions under load, start and memory as well: five minutes more
    python tests/benchmarks/serve.py --only t5          # one model

Two models: SmolLM2 with the question adapter (decoder-only, int8, ends its answers itself), and a T5 of flan-t5-small's shape with random
weights, about 133 tokens a prompt and always 16 an answer. Prompts are the embedded sample's questions, worded as for training, greedy.
Beside the server, which is a process of its own as are the clients (aiohttp, a closed loop, all connections kept):
- the offline limit: one call of CTranslate2 over all prompts, the best of all layouts of the cores and of batches of 8, 16, 32 or all;
- the same by `LocalModel.generate`, whose batches hold prompts of like length: for a decoder-only model CTranslate2 reads what the
  shortest prompt of a batch lacks one token at a time, so that its own limit can be passed;
- the bare engine: `LocalModel.decode` of one prompt in the server's layout, in turns with the same prompt over HTTP, one at a time: the
  server adds HTTP, its queue and its threads to that;
- naive servers (naive_server.py): FastAPI and transformers' `generate`, one at a time and in fixed batches, in the faster dtype.
Only the server that is asked runs, the others are stopped meanwhile (SIGSTOP). Systems take turns within each round, and what is compared
is the median over rounds of the ratio or difference within a round, since machines are noisy. A rate is of a full load: the first answers
do not count, nor those that come once clients begin to end. Every answer is compared with the offline one to the same prompt; others are
counted and not refused, since what shares a batch moves int8 results a little, and transformers computes in another precision.
Prints a table; the last line is one JSON object, null where not measured. Exit code 1 only where something fails. It runs on Linux.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from itertools import count, product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import ctranslate2
import psutil
from gateway import Failed, Target, busy_s, processor, shown
from load import quantile

from shared.artifacts import make_once, new_directory
from shared.contracts import Example, GenerationRequest, Sampling, ServingConfig
from shared.datasets.load import load
from shared.engines.encoding import PromptEncoder
from shared.engines.local import COMPUTE_TYPES, Layout, LocalModel, holds_stop
from shared.models import hugging_face_model, serving_folder
from shared.prompts import clip, messages, zero_shot
from shared.registry import promote
from shared.settings import DatasetSettings, TaskSettings, cache_dir

HERE = Path(__file__).parent
TASK = TaskSettings(max_question_chars=400)
START_S = 120.0
"""Seconds in which a server must listen."""
ANSWER_S = 300.0
"""Seconds in which an answer must come."""
CHUNK = 4
"""Prompts that the server and the bare engine answer in turns."""
SWAP_S = 10.0
"""Seconds from a promotion on that count as around it, and those before it that it is compared with."""
AFTER_REQUESTS = 500
"""During which memory is read, and after them again."""
IDLE_S = 3.0
"""Seconds between those and the last reading."""
T5_REVISION = 1
"""Raised when the random T5 changes, so that a cached one of before is not taken for it."""

LIMIT, OWN, BARE, ONE, BATCHED = "offline limit", "offline, own batches", "bare engine, 1", "naive, one at a time", "naive, batches of 16"
DTYPES = ("float32", "bfloat16")
BATCH = 16
"""Of naive_server.py, which is not imported here: it loads torch."""
SERVER = "server, {}"
MEASURES = (
    "of_offline_limit_32",
    "of_own_offline_32",
    "vs_one_at_a_time",
    "vs_naive_batching",
    "p50_added_ms",
    "p99_over_p50_32",
    "other_answers_32",
)
TARGETS = {
    "swap_failed": Target("none", lambda value: value == 0),
    "swap_p99_ratio": Target("at most 2", lambda value: value <= 2),
    "start_s": Target("under 3", lambda value: value < 3),
    **dict.fromkeys(("rss_start_mb", "rss_peak_mb", "rss_idle_mb"), Target("under 500", lambda value: value < 500)),
}


def tell(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


# ---- models and prompts


@dataclass(frozen=True)
class Subject:
    """A model, and what it is asked."""

    name: str
    title: str
    folder: Path
    """Its serving folder."""
    weights: Path
    """Its folder in Hugging Face format."""
    requests: list[GenerationRequest]
    path: str
    """Of the route that carries these requests as they are."""

    def body(self, index: int) -> bytes:
        """Request `index` as JSON."""
        request = self.requests[index]
        sampling = request.sampling
        asked = {"messages": [m.model_dump() for m in request.messages]} if request.messages else {"prompt": request.prompt}
        said = {"model": "student", "max_tokens": sampling.max_tokens, "temperature": 0, "stop": list(sampling.stop)}
        return json.dumps(asked | said).encode()


def questions(number: int) -> list[str]:
    rows: list[Example] = [row for split in load(DatasetSettings(), cache_dir()).splits.values() for row in split]
    return [rows[i % len(rows)].question for i in range(number)]


def smollm2(number: int) -> Subject:
    reference = "embedded:smollm2-135m-questions"
    sampling = Sampling(max_tokens=48, stop=("\n",))
    requests = [GenerationRequest(messages=messages(TASK, question), sampling=sampling) for question in questions(number)]
    weights = Path(hugging_face_model(reference))
    return Subject("smollm2", "SmolLM2-135M, int8", serving_folder(reference, "int8"), weights, requests, "/v1/chat/completions")


def t5(number: int) -> Subject:
    weights = make_once(cache_dir() / "huggingface" / f"random-flan-t5-small-{T5_REVISION}", "config.json", _build_t5)
    requests = [GenerationRequest(prompt=zero_shot(TASK, question), sampling=Sampling(max_tokens=16)) for question in questions(number)]
    folder = serving_folder(str(weights), "int8")
    return Subject("t5", "T5 of flan-t5-small's shape, int8", folder, weights, requests, "/v1/completions")


SUBJECTS = {"smollm2": smollm2, "t5": t5}


def _build_t5(out: Path) -> None:
    """Random weights whose answers never end, and a tokenizer of T5's size that cuts these questions into about as many tokens as T5's."""
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    from shared.embedded.random_t5 import _tokenizer

    tell(f"building a random T5, once, in {out}")
    pieces = json.loads(_tokenizer().backend_tokenizer.to_str())
    vocabulary = pieces["model"]["vocab"]
    # every row of the head has a text, so that answers can be compared; no merge leads to these
    vocabulary |= {f"▁filler{i}": i for i in range(len(vocabulary), 32128)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(pieces)), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32128,
        d_model=512,
        d_ff=1024,
        d_kv=64,
        num_layers=8,
        num_heads=6,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    model = T5ForConditionalGeneration(config)
    head = torch.randn(config.vocab_size, config.d_model)
    head[:3] = 0  # of 32,128 random logits the largest is never below 0: no answer ends, none holds a special token
    model.lm_head.weight = torch.nn.Parameter(head)
    model.config.tie_word_embeddings = False  # transformers sets it again when it builds the model
    with new_directory(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


# ---- CTranslate2 itself


@dataclass(frozen=True)
class Setting:
    """How CTranslate2 uses the cores, and how many prompts it decodes side by side."""

    workers: int
    cores: int
    batch: int
    """0: all of them."""

    def __str__(self) -> str:
        return f"{self.workers} x {self.cores}, batches of {self.batch or 'all'}"


def layouts() -> list[tuple[int, int]]:
    """Workers and cores of each, all cores used: from one core a worker to one worker with all."""
    cores = len(os.sched_getaffinity(0))
    return [(cores // each, each) for each in (2**i for i in range(cores.bit_length())) if each < cores] + [(1, cores)]


class Offline:
    """A serving folder in CTranslate2, asked directly."""

    def __init__(self, subject: Subject) -> None:
        self._folder = subject.folder
        self._config = ServingConfig.model_validate_json((subject.folder / "serving.json").read_bytes())
        encoder = PromptEncoder.from_folder(subject.folder, self._config)
        self._tokenizer = encoder.tokenizer
        self._tokens = [[self._tokenizer.id_to_token(i) for i in encoder.encode(request)] for request in subject.requests]
        sampling = subject.requests[0].sampling
        self._stop = sampling.stop
        texts = self._tokenizer.decode_batch([[i] for i in range(self._tokenizer.get_vocab_size())])
        ends = [
            self._tokenizer.token_to_id(self._config.eos_token),
            *(i for i, text in enumerate(texts) if any(s in text for s in self._stop)),
        ]
        self._options: dict[str, Any] = {"beam_size": 1, "end_token": ends}
        self._encodes = self._config.kind == "encoder-decoder"
        if self._encodes:
            self._options |= {"max_input_length": 0, "max_decoding_length": sampling.max_tokens, "min_decoding_length": 0}
        else:
            self._options |= {"max_length": sampling.max_tokens, "include_prompt_in_result": False, "return_end_token": True}
        self._loaded: tuple[tuple[int, int], Any] | None = None

    @property
    def prompt_tokens(self) -> float:
        """Of a prompt, on average."""
        return sum(map(len, self._tokens)) / len(self._tokens)

    def answers(self, setting: Setting) -> tuple[float, list[str]]:
        """Seconds of one call over all prompts, and its answers."""
        ask = self._ask(setting)
        ask(self._tokens[:1], 0)  # memory of a first call
        began = time.perf_counter()
        results = ask(self._tokens, setting.batch)
        spent = time.perf_counter() - began
        return spent, [self._text(result) for result in results]

    def _ask(self, setting: Setting) -> Callable[[list[list[str]], int], list[Any]]:
        layout = setting.workers, setting.cores
        if self._loaded is None or self._loaded[0] != layout:
            self._loaded = None  # two copies at a time are not needed
            options = {"device": "cpu", "compute_type": COMPUTE_TYPES["cpu"][self._config.quantization]}
            kind = ctranslate2.Translator if self._encodes else ctranslate2.Generator
            self._loaded = layout, kind(str(self._folder), inter_threads=setting.workers, intra_threads=setting.cores, **options)
        engine = self._loaded[1]
        call = engine.translate_batch if self._encodes else engine.generate_batch
        return lambda tokens, batch: call(tokens, max_batch_size=batch, **self._options)

    def _text(self, result: Any) -> str:
        ids = [self._tokenizer.token_to_id(t) for t in result.hypotheses[0]] if self._encodes else result.sequences_ids[0]
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text[: min((at for stop in self._stop if (at := text.find(stop)) >= 0), default=len(text))].lstrip()

    def unload(self) -> None:
        self._loaded = None


# ---- servers


class Program:
    """A server in a process of its own that prints "... listening on URL", with what it says in a file."""

    _numbers = count()

    def __init__(self, command: list[str], folder: Path) -> None:
        number = next(self._numbers)
        self._out, self._err = folder / f"{number}.out", folder / f"{number}.log"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("STUDENT_")}  # of this shell
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment)

    @property
    def url(self) -> str:
        """Without /v1, waited for. Raises Failed."""
        deadline = time.monotonic() + START_S
        while "listening on " not in (said := self._out.read_text()) or not said.endswith("\n"):
            self.fail_unless_alive(deadline)
        return said.partition("listening on ")[2].split()[0].removesuffix("/v1")

    @property
    def layout(self) -> Layout | None:
        """In which layout of batches and cores the student's server computes, as it says at its start; None: it does not."""
        found = re.search(r"^student: (\d+)x(\d+) ", self._out.read_text(), re.MULTILINE)
        return Layout(int(found[1]), int(found[2])) if found else None

    def fail_unless_alive(self, deadline: float) -> None:
        """Wait a moment. Raises Failed with the end of its log if it has ended or the time is up."""
        if self._process.poll() is not None or time.monotonic() > deadline:
            raise Failed(f"{self._process.args!r} did not start:\n" + "\n".join(self._err.read_text().splitlines()[-15:]))
        time.sleep(0.01)

    def memory_mb(self) -> tuple[float, float]:
        """Resident memory, and what of it no other process shares."""
        found = [process.memory_full_info() for process in self._processes()]
        return sum(info.rss for info in found) / 2**20, sum(info.uss for info in found) / 2**20

    def pause(self) -> None:
        for process in self._processes():
            process.suspend()

    def resume(self) -> None:
        for process in self._processes():
            process.resume()

    def _processes(self) -> list[psutil.Process]:
        first = psutil.Process(self._process.pid)
        return [first, *first.children(recursive=True)]

    def stop(self) -> None:
        if self._process.poll() is None:
            self.resume()  # a stopped process hears no signal
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


@contextmanager
def started(command: list[str], folder: Path) -> Iterator[Program]:
    program = Program(command, folder)
    try:
        yield program
    finally:
        program.stop()


def student(*options: str) -> list[str]:
    """The command of the student's server, to be asked without a key."""
    command = [sys.executable, "-m", "shared.cli", "serve"]
    told = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    return [*command, *(["--no-auth"] if "--no-auth" in told else []), *(() if "--port" in options else ("--port", "0")), *options]


def ready(url: str) -> bool:
    """Whether /readyz answers 200."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/readyz", timeout=10) as answer:
            return bool(answer.status == 200)
    except (urllib.error.HTTPError, OSError):
        return False


def wait_ready(program: Program, url: str) -> None:
    """Raises Failed."""
    deadline = time.monotonic() + START_S
    while not ready(url):
        program.fail_unless_alive(deadline)


# ---- load, in a process of its own


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of one route, over and over, by clients that each wait for their answer."""

    url: str
    bodies: list[bytes]
    in_flight: int
    warm_up: int = 0
    """Answers that come before the first that counts."""
    requests: int
    """Answers that count; clients end then."""
    exact: bool = False
    """Ask no more than that, though the last answers then come under less load: fixed batches are none the slower for it."""
    most_s: float = 3600.0
    """Seconds after which clients end in any case."""


@dataclass(frozen=True)
class Said:
    """One request: which, when (seconds of the monotonic clock), and what came."""

    index: int
    began: float
    ended: float
    text: str | None
    """None: no answer."""
    version: str | None = None
    error: str = ""


@dataclass(frozen=True)
class Result:
    """All of a load's answers in the order in which they came; the `counted` ones came under full load."""

    said: list[Said]
    counted: list[Said]
    per_s: float

    def ms(self, q: float) -> float:
        return quantile([said.ended - said.began for said in self.counted], q) * 1e3

    def others(self, expected: list[str]) -> float:
        """The share of answers that are not those expected."""
        return sum(said.text != expected[said.index] for said in self.said) / len(self.said)


def asked(asked_load: Load) -> Result:
    """Raises Failed where an answer is none."""
    result = asyncio.run(_asked(asked_load))
    for said in result.said:
        if said.text is None:
            raise Failed(f"{asked_load.url}: {said.error}")
    return result


def tried(asked_load: Load) -> Result:
    """`asked`, where requests may fail."""
    return asyncio.run(_asked(asked_load))


async def _asked(load: Load) -> Result:
    said: list[Said] = []
    indices = count()
    wanted = load.warm_up + load.requests
    until = time.monotonic() + load.most_s
    began = time.monotonic()

    async def client(session: aiohttp.ClientSession) -> None:
        while len(said) < wanted and time.monotonic() < until:
            index = next(indices)
            if load.exact and index >= wanted:
                return
            said.append(await _say(session, load.url, load.bodies, index % len(load.bodies)))

    async with _session(load.in_flight) as session:
        await asyncio.gather(*(client(session) for _ in range(load.in_flight)))
    counted = said[load.warm_up : wanted]
    if not counted:
        raise Failed(f"{load.url}: no answer within {load.most_s:g} s counted")
    since = said[load.warm_up - 1].ended if load.warm_up else began
    return Result(said, counted, len(counted) / (counted[-1].ended - since))


def _session(connections: int) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=connections, keepalive_timeout=60)
    return aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(total=ANSWER_S), headers={"content-type": "application/json"}
    )


async def _say(session: aiohttp.ClientSession, url: str, bodies: Sequence[bytes], index: int) -> Said:
    began = time.monotonic()
    try:
        async with session.post(url, data=bodies[index]) as response:
            raw = await response.read()
        ended = time.monotonic()
        if response.status != 200:
            return Said(index, began, ended, None, error=f"{response.status}: {raw[:300].decode(errors='replace')}")
        answer = json.loads(raw)
    except (aiohttp.ClientError, TimeoutError, ValueError) as exc:
        return Said(index, began, time.monotonic(), None, error=f"{type(exc).__name__}: {exc}")
    if "answers" in answer:
        return Said(index, began, ended, answer["answers"][0]["text"], answer.get("version"))
    choice = answer["choices"][0]
    return Said(index, began, ended, choice["text"] if "text" in choice else choice["message"]["content"])


@dataclass(frozen=True)
class Paired:
    """Seconds of the same prompts over HTTP and by the engine alone."""

    http: list[float]
    bare: list[float]

    @property
    def added_ms(self) -> float:
        return (quantile(self.http, 0.5) - quantile(self.bare, 0.5)) * 1e3


def paired(url: str, subject: Subject, layout: Layout | None, requests: int, http_first: bool) -> Paired:
    """One at a time, CHUNK over HTTP and the same CHUNK by the engine in this layout. Raises Failed."""
    model = LocalModel(subject.folder, layout=layout)
    model.keep_prefix(subject.requests)  # as the server does
    return asyncio.run(_paired(url, subject, model, requests, http_first))


async def _paired(url: str, subject: Subject, model: LocalModel, requests: int, http_first: bool) -> Paired:
    found = Paired([], [])
    bodies = [subject.body(i) for i in range(len(subject.requests))]

    async with _session(1) as session:

        async def by_server(index: int) -> None:
            said = await _say(session, url, bodies, index)
            if said.text is None:
                raise Failed(f"{url}: {said.error}")
            found.http.append(said.ended - said.began)

        def by_engine(index: int) -> None:
            began = time.monotonic()
            _decoded(model, subject.requests[index])
            found.bare.append(time.monotonic() - began)

        with ThreadPoolExecutor(model.workers) as threads:  # every worker keeps its own prefix
            list(threads.map(by_engine, range(model.workers)))
        await by_server(0)
        found.bare.clear()
        found.http.clear()
        for chunk, start in enumerate(range(0, requests, CHUNK)):
            indices = [i % len(bodies) for i in range(start, min(start + CHUNK, requests))]
            for server in (True, False) if (chunk % 2 == 0) == http_first else (False, True):
                for index in indices:
                    await by_server(index) if server else by_engine(index)
    return found


def _decoded(model: LocalModel, request: GenerationRequest) -> str:
    prompt = model.encode(request)
    ids: list[int] = []

    def heed(row: int, sample: int, token: int, last: bool) -> bool:
        ids.append(token)
        return last or len(ids) >= request.sampling.max_tokens or holds_stop(model.tokenizer, ids, request.sampling.stop)

    model.decode([prompt], heed)
    return model.completion(ids, request.sampling.stop).text


# ---- measuring


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    prompts: int
    rounds: int
    in_flight: tuple[int, ...]
    batches: tuple[int, ...]
    """Of the offline limit; 0: all."""
    alone: int
    """Requests at 1 in flight, and of the pairs with the bare engine."""
    naive_one: int
    """Counted requests of the naive server that answers one at a time."""
    naive_batches: int
    """Counted batches of the other one."""
    warm: bool = True
    """Whether naive servers answer something that does not count first, and the student as many requests as are in flight; else half."""


FULL = Size(prompts=128, rounds=3, in_flight=(1, 8, 32, 64), batches=(8, 16, 32, 0), alone=48, naive_one=16, naive_batches=4)
QUICK = Size(prompts=32, rounds=1, in_flight=(1, 32), batches=(16,), alone=8, naive_one=2, naive_batches=1, warm=False)


@dataclass
class Row:
    """A line of the table: what each round found."""

    per_s: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)

    def add(self, result: Result, expected: list[str]) -> None:
        self.per_s.append(result.per_s)
        self.p50_ms.append(result.ms(0.5))
        self.p99_ms.append(result.ms(0.99))
        self.others.append(result.others(expected))


class Clients:
    """A process that asks."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self.pool = pool

    def run(self, program: Program, work: Callable[..., Any], *arguments: Any) -> Any:
        """`work` in that process, while `program` runs and no other server. Raises Failed."""
        program.resume()
        try:
            return self.pool.submit(work, *arguments).result()
        finally:
            program.pause()


class Measured:
    """One model: the rounds, and what they found."""

    def __init__(self, subject: Subject, size: Size, *, server: Program, naive: Program, clients: Clients) -> None:
        self._subject, self._size, self._server, self._naive, self._clients = subject, size, server, naive, clients
        self._offline = Offline(subject)
        self._bodies = [subject.body(i) for i in range(len(subject.requests))]
        self._added_ms: list[float] = []
        self.title, self.prompt_tokens, self.layout = subject.title, self._offline.prompt_tokens, server.layout
        self.rows: dict[str, Row] = defaultdict(Row)
        self.dtypes: dict[str, str] = {}
        """The faster one, of each naive server."""

    def run(self) -> None:
        """Raises Failed."""
        size = self._size
        tell(f"{self.title}: {len(self._bodies)} prompts of {self.prompt_tokens:.0f} tokens on average; the offline limit")
        self._find_limit()
        self._find_dtypes()
        steps = [partial(self._ask_server, in_flight) for in_flight in size.in_flight]
        steps += [self._ask_offline, self._ask_own, self._ask_pairs, partial(self._ask_naive, ONE), partial(self._ask_naive, BATCHED)]
        for number in range(size.rounds):
            for step in steps if number % 2 == 0 else steps[::-1]:  # against drift
                step()
            tell(f"  round {number + 1} of {size.rounds}: " + ", ".join(f"{name} {row.per_s[-1]:.1f}/s" for name, row in self.rows.items()))

    def _find_limit(self) -> None:
        """The fastest setting of CTranslate2, whose answers are those expected."""
        tried: dict[Setting, tuple[float, list[str]]] = {}
        for (workers, cores), batch in product(layouts(), self._size.batches):
            setting = Setting(workers, cores, batch)
            tried[setting] = self._offline.answers(setting)
            tell(f"  {setting}: {len(self._bodies) / tried[setting][0]:.1f}/s")
        self.limit = min(tried, key=lambda setting: tried[setting][0])
        self._expected = tried[self.limit][1]

    def _find_dtypes(self) -> None:
        """Measured, but for the one round of --quick: there by what the processor knows."""
        if self._size.rounds == 1:
            fast = re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", Path("/proc/cpuinfo").read_text()) is not None
            self.dtypes = {ONE: "float32", BATCHED: "bfloat16" if fast else "float32"}
            for dtype in set(self.dtypes.values()):
                self._load_naive(dtype)
            return
        for dtype in DTYPES:
            self._load_naive(dtype)
        for row in (ONE, BATCHED):
            found = {dtype: self._naive_result(row, dtype) for dtype in DTYPES}
            tell(f"  {row}: " + ", ".join(f"{dtype} {result.per_s:.2f}/s" for dtype, result in found.items()))
            self.dtypes[row] = max(found, key=lambda dtype: found[dtype].per_s)

    def _ask_offline(self) -> None:
        seconds, answers = self._offline.answers(self.limit)
        self._offline.unload()
        row = self.rows[LIMIT]
        row.per_s.append(len(answers) / seconds)
        row.others.append(sum(a != b for a, b in zip(answers, self._expected, strict=True)) / len(answers))

    def _ask_own(self) -> None:
        model = LocalModel(self._subject.folder, layout=self.layout)
        model.generate(self._subject.requests[:1])
        began = time.perf_counter()
        answers = [completions[0].text for completions in model.generate(self._subject.requests)]
        self.rows[OWN].per_s.append(len(answers) / (time.perf_counter() - began))
        self.rows[OWN].others.append(sum(a != b for a, b in zip(answers, self._expected, strict=True)) / len(answers))

    def _ask_server(self, in_flight: int) -> None:
        alone = in_flight == 1
        load = Load(
            url=self._server.url + self._subject.path,
            bodies=self._bodies,
            in_flight=in_flight,
            warm_up=in_flight if self._size.warm else -(-in_flight // 2),
            requests=self._size.alone if alone else max(self._size.prompts, in_flight),
        )
        self.rows[SERVER.format(in_flight)].add(self._clients.run(self._server, asked, load), self._expected)

    def _ask_pairs(self) -> None:
        http_first = len(self._added_ms) % 2 == 0
        url = self._server.url + self._subject.path
        pairs: Paired = self._clients.run(self._server, paired, url, self._subject, self.layout, self._size.alone, http_first)
        self._added_ms.append(pairs.added_ms)
        row = self.rows[BARE]
        row.per_s.append(len(pairs.bare) / sum(pairs.bare))
        row.p50_ms.append(quantile(pairs.bare, 0.5) * 1e3)
        row.p99_ms.append(quantile(pairs.bare, 0.99) * 1e3)

    def _ask_naive(self, row: str) -> None:
        self.rows[row].add(self._naive_result(row, self.dtypes[row]), self._expected)

    def _naive_url(self, how: str, dtype: str) -> str:
        return f"{self._naive.url}/{how}/{dtype}/{self._subject.name}{self._subject.path}"

    def _load_naive(self, dtype: str) -> None:
        """It loads a model when it is asked first."""
        self._clients.run(
            self._naive, asked, Load(url=self._naive_url("one", dtype), bodies=self._bodies, in_flight=1, requests=1, exact=True)
        )

    def _naive_result(self, row: str, dtype: str) -> Result:
        """One warm-up request, or batch, then those that count; one more request, or batch, waits all the while."""
        at_once = 1 if row == ONE else BATCH
        load = Load(
            url=self._naive_url("one" if row == ONE else "batched", dtype),
            bodies=self._bodies,
            in_flight=2 * at_once if self._size.warm else at_once,
            warm_up=at_once if self._size.warm else 0,
            requests=self._size.naive_one if row == ONE else BATCH * self._size.naive_batches,
            exact=True,
        )
        result: Result = self._clients.run(self._naive, asked, load)
        return result

    def values(self) -> dict[str, float]:
        """By the names of MEASURES."""
        server = self.rows[SERVER.format(32)]
        return {
            "of_offline_limit_32": self._ratio(LIMIT),
            "of_own_offline_32": self._ratio(OWN),
            "vs_one_at_a_time": self._ratio(ONE),
            "vs_naive_batching": self._ratio(BATCHED),
            "p50_added_ms": median(self._added_ms),
            "p99_over_p50_32": median(a / b for a, b in zip(server.p99_ms, server.p50_ms, strict=True)),
            "other_answers_32": median(server.others),
        }

    def _ratio(self, other: str) -> float:
        """Of rates: the median over rounds of the server's at 32 in flight over another's."""
        return median(a / b for a, b in zip(self.rows[SERVER.format(32)].per_s, self.rows[other].per_s, strict=True))


def measure_swaps(subject: Subject, folder: Path, clients: Clients) -> dict[str, float]:
    """Two versions in turns, promoted while 32 clients ask. Raises Failed."""
    tell("promotions under load: a minute")
    registry = folder / "registry"
    versions: list[str] = []

    def serve(name: str) -> float:
        """Promote the folder under this name; the moment."""
        began = time.monotonic()
        promoted = promote(
            registry, subject.folder, name=name, task=TASK.model_dump(), scores={}, run="benchmark", reason="benchmarks/serve.py"
        )
        versions.append(promoted.version)
        return began

    serve("one")
    bodies = [json.dumps({"question": clip(question, TASK.max_question_chars)}).encode() for question in questions(FULL.prompts)]
    with started(student("--registry", str(registry)), folder) as server:
        url = server.url
        wait_ready(server, url)
        load = Load(url=f"{url}/v1/generate", bodies=bodies, in_flight=32, requests=10**9, most_s=6 * SWAP_S)
        asking = clients.pool.submit(tried, load)
        swaps = []
        time.sleep(1.5 * SWAP_S)  # of which the first third is no full load
        for name in ("two", "one"):
            swaps.append(serve(name))
            time.sleep(2 * SWAP_S)
        result: Result = asking.result()
    failed = [said for said in result.said if said.text is None]
    for said in failed[:3]:
        print(f"a request failed: {said.error}")
    served = [said.version for said in result.said if said.version]
    print(f"\npromotions under 32 in flight: {len(result.said)} requests, {len(failed)} failed; answers by version, in order of promotion: "
          + ", ".join(str(served.count(version)) for version in dict.fromkeys(versions)))  # fmt: skip
    if len(set(served)) != len(set(versions)):
        raise Failed(f"promoted {sorted(set(versions))}, answers came from {sorted(set(served))}")
    ratios = []
    for at in swaps:
        before = [said.ended - said.began for said in result.said if at - SWAP_S <= said.ended < at]
        around = [said.ended - said.began for said in result.said if at <= said.ended < at + SWAP_S]
        ratios.append(quantile(around, 0.99) / quantile(before, 0.99))
        told = f"{quantile(before, 0.99):.2f} s before, {quantile(around, 0.99):.2f} s in the {SWAP_S:g} s from then on"
        print(f"a promotion: p99 {told}; {len(before)} and {len(around)} answers")
    return {"swap_failed": len(failed), "swap_p99_ratio": max(ratios)}


def measure_starts(subject: Subject, folder: Path, clients: Clients, *, starts: int, requests: int) -> dict[str, float]:
    """From the process's start until it is ready, and its memory. Raises Failed."""
    tell(f"{starts} starts, and memory after {requests} requests")
    seconds = []
    for number in range(starts):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = student("--model-dir", str(subject.folder), "--port", str(port))
        began = time.monotonic()
        with started(command, folder) as server:
            wait_ready(server, f"http://127.0.0.1:{port}")
            seconds.append(time.monotonic() - began)
            if number == starts - 1:
                at_start = server.memory_mb()
                bodies = [subject.body(i) for i in range(len(subject.requests))]
                load = Load(url=server.url + subject.path, bodies=bodies, in_flight=32, requests=requests)
                under_load = clients.pool.submit(asked, load)
                peak = 0.0
                while not under_load.done():
                    peak = max(peak, server.memory_mb()[0])
                    time.sleep(0.1)
                under_load.result()
                time.sleep(IDLE_S)
                after = server.memory_mb()
    print(f"\nfrom start to /readyz, {subject.title}: " + " ".join(f"{s:.2f}" for s in seconds) + " s")
    print(f"memory, MB resident (its own): {at_start[0]:.0f} ({at_start[1]:.0f}) at the start, at most {peak:.0f} while {requests} "
          f"requests were answered, {after[0]:.0f} ({after[1]:.0f}) {IDLE_S:g} s after them")  # fmt: skip
    return {"start_s": median(seconds), "rss_start_mb": at_start[0], "rss_peak_mb": peak, "rss_idle_mb": after[0]}


def print_table(found: Measured) -> None:
    print(f"\n{found.title}: {found.prompt_tokens:.0f} tokens a prompt; batches side by side x cores each: the offline limit's "
          f"{found.limit}, the server's {found.layout or 'unknown'}; naive: {', '.join(found.dtypes.values())}")  # fmt: skip
    print(f"{'':28}" + "".join(f"{heading:>16}" for heading in ("req/s", "p50 ms", "p99 ms", "other answers")))
    for name in (LIMIT, OWN, *(SERVER.format(n) for n in (1, 8, 32, 64)), BARE, ONE, BATCHED):
        if name in found.rows:
            row = found.rows[name]
            numbers = [shown(median(values) if values else None) for values in (row.per_s, row.p50_ms, row.p99_ms)]
            others = f"{median(row.others):.0%}" if row.others else "-"
            print(f"{name:28}" + "".join(f"{text:>16}" for text in (*numbers, others)), flush=True)


def measure(size: Size, *, names: list[str], swap: bool, start: bool) -> None:
    """The whole run. Raises Failed."""
    began, busy = time.monotonic(), busy_s()
    own = sum(os.times()[:4])
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("ctranslate2", "transformers", "torch", "fastapi", "uvicorn"))
    print(f"machine: {len(os.sched_getaffinity(0))} cores, {processor()}, Python {platform.python_version()}, {versions}")
    rounds = "one round" if size.rounds == 1 else f"medians of {size.rounds} rounds"
    print(f"{rounds} in which systems take turns; server, clients and engine share the cores")
    values: dict[str, Any] = {name: {} for name in MEASURES}
    values |= dict.fromkeys(("swap_failed", "swap_p99_ratio", "start_s", "rss_start_mb", "rss_peak_mb", "rss_idle_mb"))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        subjects = [SUBJECTS[name](size.prompts) for name in names]
        models = [part for subject in subjects for part in ("--model", f"{subject.name}={subject.weights}")]
        commands = [student("--model-dir", str(subject.folder)) for subject in subjects]
        with ExitStack() as running:
            clients = Clients(running.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn"))))
            naive = running.enter_context(started([sys.executable, str(HERE / "naive_server.py"), *models], folder))
            servers = [running.enter_context(started(command, folder)) for command in commands]
            for server in servers:
                wait_ready(server, server.url)
            for program in (naive, *servers):
                assert program.url
                program.pause()
            for subject, server in zip(subjects, servers, strict=True):
                found = Measured(subject, size, server=server, naive=naive, clients=clients)
                found.run()
                print_table(found)
                for name, value in found.values().items():
                    values[name][subject.name] = round(value, 3)
            for server in servers:
                server.stop()
            naive.stop()
            if swap:
                values |= measure_swaps(subjects[0], folder, clients)
            if start:
                values |= measure_starts(subjects[0], folder, clients, starts=5, requests=AFTER_REQUESTS)
    print_verdict(values)
    wall = time.monotonic() - began
    others = max(0.0, busy_s() - busy - (sum(os.times()[:4]) - own)) / wall
    print(f"{wall:.0f} s, in which other programs took {others:.2f} of {os.cpu_count()} cores: trust the numbers only below 0.1")
    values = {name: round(value, 3) if isinstance(value, float) else value for name, value in values.items()}
    print(json.dumps(values | {"quick": size == QUICK, "cores": os.cpu_count(), "cores_taken_by_others": round(others, 2)}))


def print_verdict(values: dict[str, Any]) -> None:
    print(f"\n{'measure':26}" + "".join(f"{name:>12}" for name in SUBJECTS))
    for name in MEASURES:
        print(f"{name:26}" + "".join(f"{shown(values[name].get(subject)):>12}" for subject in SUBJECTS))
    for name, value in values.items():
        if name not in MEASURES and value is not None:
            target = TARGETS.get(name)
            verdict = "" if target is None else f"  {target.wording} ({'met' if target.met(value) else 'MISSED'})"
            print(f"{name:26}{shown(value):>12}{verdict}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within a minute: one round, few prompts")
    parser.add_argument("--swap", action="store_true", help="promotions under load as well")
    parser.add_argument("--start", action="store_true", help="starts and memory as well")
    parser.add_argument("--only", choices=SUBJECTS, help="one of the two models")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not at once: servers must be stopped
    try:
        measure(QUICK if args.quick else FULL, names=[args.only] if args.only else list(SUBJECTS), swap=args.swap, start=args.start)
    except Failed as exc:
        print(f"serving benchmark: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
