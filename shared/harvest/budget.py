"""What a harvest may cost: set aside before a request is sent, settled after it, and never overshot."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.contracts import Completion, GenerationRequest
from shared.errors import DataError, storage_error
from shared.harvest.custom_api import CustomApi
from shared.harvest.teacher import Answer
from shared.settings import BudgetSettings, PriceSettings

BYTES_A_TOKEN = 3
"""Of UTF-8 text, where the teacher does not say what it has counted: English has 4 to 5, other languages 2 to 4."""
TOKENS_A_MESSAGE = 8
"""Beside its text, for its role and its marks."""
TOKENS_A_REQUEST = 128
"""Set aside for what a chat template adds of its own, such as a system prompt."""
WIDTH = 160
"""Bytes of the account: one line, written in place."""


@dataclass(frozen=True, slots=True)
class Reserved:
    """What one request may cost at most."""

    request: GenerationRequest
    cost: float


class Account(BaseModel):
    """What a harvest has used so far, all commands together; of requests whose fate nobody knows the most they can have cost."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    requests: int = Field(ge=0)
    cost: float = Field(ge=0)
    seconds: float = Field(ge=0)


def estimated_tokens(request: GenerationRequest, custom: CustomApi | None = None) -> int:
    """Tokens of what is sent, by rule: one for every 3 bytes of UTF-8, and 8 a message. `custom`: the API it is sent to, all of whose
    filled template counts.
    """
    sizes = _sizes(request, custom)
    return sum(math.ceil(size / BYTES_A_TOKEN) for size in sizes) + TOKENS_A_MESSAGE * len(sizes)


def _sizes(request: GenerationRequest, custom: CustomApi | None) -> list[int]:
    """Bytes of each text that is sent."""
    if custom is not None:
        return [len(json.dumps(custom.asked(request, model="", api_key=None), ensure_ascii=False).encode(errors="replace"))]
    texts = [message.content for message in request.messages or ()] if request.prompt is None else [request.prompt]
    return [len(text.encode(errors="replace")) for text in texts]


def tokens_of(text: str) -> int:
    return math.ceil(len(text.encode(errors="replace")) / BYTES_A_TOKEN)


def reached(caps: BudgetSettings, account: Account, *, late: bool) -> str:
    """Which cap is reached, for a message."""
    if late:
        return f"harvest.budget.seconds = {caps.seconds:g}"
    if caps.requests is not None and account.requests >= caps.requests:
        return f"harvest.budget.requests = {caps.requests} ({account.requests} made)"
    return f"harvest.budget.cost = {caps.cost:g} ({account.cost:.6g} spent, and the next request might cost more than what is left)"


class Prices:
    """What requests cost by teacher.price. What is sent has at most as many tokens as bytes, and an answer at most max_tokens where they
    are sent.
    """

    def __init__(self, price: PriceSettings | None, custom: CustomApi | None = None) -> None:
        """`custom`: teacher.custom, by which more may be sent than the prompt, and no bound of the answer."""
        self._in, self._out = (price.input_per_million / 1e6, price.output_per_million / 1e6) if price else (0.0, 0.0)
        self.priced, self._custom = price is not None, custom
        self._bounded = custom is None or custom.bounded

    def most(self, request: GenerationRequest) -> float:
        """What it may cost."""
        if not self.priced:
            return 0.0
        sizes = _sizes(request, self._custom)
        tokens = sum(sizes) + TOKENS_A_MESSAGE * len(sizes) + TOKENS_A_REQUEST
        return self._in * tokens + self._out * request.n * request.sampling.max_tokens

    def of(self, request: GenerationRequest, answer: Answer) -> float:
        """What it has cost: by the teacher's count, else by rule."""
        counted = answer.input_tokens if answer.input_tokens is not None else estimated_tokens(request, self._custom)
        return self._in * counted + self._out * self._answered_tokens(request, answer)

    def _answered_tokens(self, request: GenerationRequest, answer: Answer) -> int:
        if answer.output_tokens is not None:
            return answer.output_tokens
        asked = request.sampling.max_tokens
        # of an answer that was kept back nobody knows its length
        counts = [tokens_of(choice.text) if isinstance(choice, Completion) else asked for choice in answer.choices]
        return sum(min(asked, count) if self._bounded else count for count in counts)


class Purse(Protocol):
    """What a harvest is paid from: a `Budget`, or what a worker of a cluster has leased of one."""

    priced: bool

    def reserve(self, request: GenerationRequest) -> Reserved | None: ...
    def settle(self, reserved: Reserved, answer: Answer | None, *, billed: bool) -> None: ...
    def explain(self) -> str: ...
    def sync(self) -> None: ...
    @property
    def spent(self) -> float: ...
    @property
    def late(self) -> bool: ...


class Budget:
    """The account of one harvest in a file, true after a SIGKILL at any instant: what is in flight counts as spent."""

    def __init__(
        self,
        file: Path,
        caps: BudgetSettings,
        price: PriceSettings | None = None,
        *,
        custom: CustomApi | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`custom`: as for `Prices`. Raises DataError for a damaged account, StorageError."""
        self._caps, self._clock = caps, clock
        self._prices = Prices(price, custom)
        self.priced = self._prices.priced
        self._path = file
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            found = os.pread(self._file, WIDTH, 0)
        except OSError as exc:
            raise storage_error(exc, file) from exc
        try:
            self.account = Account.model_validate_json(found) if found.strip() else Account(requests=0, cost=0.0, seconds=0.0)
        except ValidationError as exc:
            os.close(self._file)
            raise DataError(
                f"{file}: not a readable account of what the harvest has cost; write there what you know it has, like "
                '{"requests": 120, "cost": 0.5, "seconds": 60.0}'
            ) from exc
        self._before_s, self._started = self.account.seconds, clock()
        self._set_aside = 0.0

    def reserve(self, request: GenerationRequest) -> Reserved | None:
        """Set aside what a request may cost at most; None if that does not fit beside what is spent and set aside. Raises StorageError."""
        account, caps = self.account, self._caps
        cost = self._prices.most(request)
        if caps.requests is not None and account.requests + 1 > caps.requests:
            return None
        if caps.cost is not None and account.cost + cost > caps.cost:
            return None
        if self.late:
            return None
        account.requests += 1
        account.cost += cost
        self._set_aside += cost
        self._write()
        return Reserved(request, cost)

    def settle(self, reserved: Reserved, answer: Answer | None, *, billed: bool) -> None:
        """Replace what was set aside by what it was: by the teacher's count, else by rule; all of it if nobody knows.

        `answer`: None where none came; `billed`: whether it may have been charged all the same (it broke off, or came too late).
        """
        self._set_aside -= reserved.cost
        if not self.priced or (answer is None and billed):
            return
        cost = 0.0 if answer is None else self._prices.of(reserved.request, answer)
        self.account.cost = max(0.0, self.account.cost + cost - reserved.cost)
        self._write()

    @property
    def spent(self) -> float:
        """Of the account's cost what is settled; the rest is set aside for requests in flight."""
        return max(0.0, self.account.cost - self._set_aside)

    @property
    def late(self) -> bool:
        """Whether the time is up."""
        return self._caps.seconds is not None and self._before_s + self._clock() - self._started >= self._caps.seconds

    def explain(self) -> str:
        """Which cap is reached, for a message."""
        return reached(self._caps, self.account, late=self.late)

    def sync(self) -> None:
        """Make the account durable. Raises StorageError."""
        try:
            os.fsync(self._file)
        except OSError as exc:
            raise storage_error(exc, self._path) from exc

    def close(self) -> None:
        self._write()
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _write(self) -> None:
        account = self.account
        account.seconds = round(self._before_s + self._clock() - self._started, 3)
        line = f'{{"requests": {account.requests}, "cost": {account.cost!r}, "seconds": {account.seconds}}}'.ljust(WIDTH - 1) + "\n"
        try:
            os.pwrite(self._file, line.encode(), 0)
        except OSError as exc:
            raise storage_error(exc, self._path) from exc
