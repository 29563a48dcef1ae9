"""The budget: set aside before, settled after, never overshot, and true whatever becomes of the process."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.contracts import Completion, GenerationRequest, Message, Sampling
from shared.errors import DataError, StorageError
from shared.harvest.budget import Budget, Prices, Reserved, estimated_tokens, tokens_of
from shared.harvest.custom_api import CustomApi
from shared.harvest.teacher import Answer, Refusal
from shared.settings import BudgetSettings, PriceSettings

PRICE = PriceSettings(input_per_million=1.0, output_per_million=10.0)


def request(prompt: str = "p" * 30, *, n: int = 1, max_tokens: int = 100) -> GenerationRequest:
    return GenerationRequest(prompt=prompt, n=n, sampling=Sampling(max_tokens=max_tokens))


def answer(*texts: str, tokens_in: int | None = None, tokens_out: int | None = None) -> Answer:
    return Answer(tuple(Completion(text=text, finish_reason="stop") for text in texts), tokens_in, tokens_out)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def reserved(budget: Budget, asked: GenerationRequest | None = None) -> Reserved:
    found = budget.reserve(asked or request())
    assert found is not None
    return found


# the rule


def test_a_token_is_estimated_for_every_three_bytes_of_utf_8_and_eight_for_a_message() -> None:
    assert [tokens_of(text) for text in ("", "a", "abc", "abcd", "äöü", "\ud83d")] == [0, 1, 1, 2, 2, 1]
    assert estimated_tokens(request("abcd")) == 2 + 8
    assert (
        estimated_tokens(GenerationRequest(messages=(Message(role="system", content="abc"), Message(role="user", content="d")))) == 2 + 16
    )


def test_what_is_set_aside_is_more_than_what_the_rule_says_for_the_same_request(tmp_path: Path) -> None:
    with Budget(tmp_path / "spent.json", BudgetSettings(), PRICE) as budget:
        asked = request("какой вопрос?", n=3, max_tokens=7)
        assert reserved(budget, asked).cost >= (estimated_tokens(asked) + 10 * 3 * 7) / 1e6


# settling


@pytest.mark.parametrize(
    ("came", "billed", "cost"),
    [
        (answer("abc", tokens_in=50, tokens_out=20), False, 250e-6),  # told
        (answer("abcdef", "abc"), False, (18 + 10 * 3) * 1e-6),  # by rule: 10 + 8 tokens in, 2 + 1 out
        (answer("abc", tokens_out=20), False, (18 + 200) * 1e-6),
        (answer("x" * 9000), False, (18 + 1000) * 1e-6),  # no more than it was allowed
        (Answer((Refusal("content_filter", "no"),)), False, (18 + 1000) * 1e-6),  # nobody knows how long it was
        (None, False, 0.0),  # refused, or never reached
    ],
)
def test_what_was_set_aside_is_replaced_by_what_it_was(tmp_path: Path, came: Answer | None, billed: bool, cost: float) -> None:
    with Budget(tmp_path / "spent.json", BudgetSettings(), PRICE) as budget:
        budget.settle(reserved(budget), came, billed=billed)
        assert budget.account.cost == pytest.approx(cost, abs=1e-15)
        assert budget.account.requests == 1


def test_a_request_that_broke_off_has_cost_what_was_set_aside(tmp_path: Path) -> None:
    with Budget(tmp_path / "spent.json", BudgetSettings(), PRICE) as budget:
        share = reserved(budget)
        budget.settle(share, None, billed=True)
        assert budget.account.cost == share.cost > 0


def test_without_a_price_requests_are_counted_and_nothing_costs(tmp_path: Path) -> None:
    with Budget(tmp_path / "spent.json", BudgetSettings(requests=2)) as budget:
        budget.settle(reserved(budget), answer("a", tokens_in=10**9, tokens_out=10**9), billed=False)
        assert not budget.priced
        assert (budget.account.requests, budget.account.cost) == (1, 0)


# caps


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cap=st.floats(0.0005, 0.02),
    steps=st.lists(st.tuples(st.booleans(), st.integers(1, 4), st.floats(0, 1), st.booleans()), max_size=60),
)
def test_no_order_of_reserving_and_settling_passes_the_cap_and_what_is_left_is_known_by_another_command(
    tmp_path: Path, cap: float, steps: list[tuple[bool, int, float, bool]]
) -> None:
    """A teacher takes at most what was set aside, and says so or not."""
    file = tmp_path / "spent.json"
    file.unlink(missing_ok=True)
    open_shares: list[Reserved] = []
    with Budget(file, BudgetSettings(cost=cap), PRICE) as budget:
        for reserving, n, used, told in steps:
            if reserving or not open_shares:
                if (share := budget.reserve(request(n=n))) is not None:
                    open_shares.append(share)
            else:
                share = open_shares.pop(0)
                most = share.request.n * share.request.sampling.max_tokens
                came = answer("a", tokens_in=40, tokens_out=int(used * most)) if told else None
                budget.settle(share, came, billed=not told)
            assert budget.account.cost <= cap
            assert budget.account.cost >= sum(share.cost for share in open_shares) - 1e-12
        spent = budget.account.cost
    with Budget(file, BudgetSettings(cost=cap), PRICE) as budget:
        assert budget.account.cost == spent


def test_a_cap_on_requests_holds_over_all_commands_and_is_raised_to_go_on(tmp_path: Path) -> None:
    file = tmp_path / "spent.json"
    for cap, allowed in ((3, 3), (3, 0), (5, 2)):
        with Budget(file, BudgetSettings(requests=cap)) as budget:
            assert sum(budget.reserve(request()) is not None for _ in range(9)) == allowed
            assert budget.explain() == f"harvest.budget.requests = {cap} ({cap} made)"


def test_a_cap_on_cost_says_what_is_spent(tmp_path: Path) -> None:
    with Budget(tmp_path / "spent.json", BudgetSettings(cost=0.001), PRICE) as budget:
        assert budget.reserve(request()) is None
        assert budget.explain().startswith("harvest.budget.cost = 0.001 (0 spent")


def test_a_cap_on_time_counts_harvesting_and_not_the_pauses_between_commands(tmp_path: Path) -> None:
    file, clock = tmp_path / "spent.json", Clock()
    with Budget(file, BudgetSettings(seconds=10), clock=clock) as budget:
        clock.now += 6
        assert budget.reserve(request()) is not None
    clock.now += 1000
    with Budget(file, BudgetSettings(seconds=10), clock=clock) as budget:
        assert budget.account.seconds == 6
        clock.now += 3.9
        assert not budget.late
        clock.now += 0.1
        assert budget.late
        assert budget.reserve(request()) is None
        assert budget.explain() == "harvest.budget.seconds = 10"


# the file


def test_the_account_is_one_line_that_jq_reads(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "spent.json"
    with Budget(file, BudgetSettings(), PRICE) as budget:
        budget.settle(reserved(budget), answer("a", tokens_in=1, tokens_out=1), billed=False)
    assert file.read_text().count("\n") == 1
    assert json.loads(file.read_text()).keys() == {"requests", "cost", "seconds"}
    assert json.loads(file.read_text())["cost"] == pytest.approx(11e-6)


def test_what_is_in_flight_when_the_process_is_killed_counts_as_spent(tmp_path: Path) -> None:
    file = tmp_path / "spent.json"
    code = """
        import os, signal, sys
        from pathlib import Path
        from shared.contracts import GenerationRequest, Sampling
        from shared.harvest.budget import Budget
        from shared.settings import BudgetSettings, PriceSettings

        budget = Budget(Path(sys.argv[1]), BudgetSettings(), PriceSettings(input_per_million=1.0, output_per_million=10.0))
        request = GenerationRequest(prompt="p" * 30, sampling=Sampling(max_tokens=100))
        shares = [budget.reserve(request) for _ in range(5)]
        for share in shares[:2]:
            budget.settle(share, None, billed=False)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code), file], env={**os.environ, "PYTHONPATH": os.getcwd()}, check=False)
    assert killed.returncode == -signal.SIGKILL
    with Budget(tmp_path / "other.json", BudgetSettings(), PRICE) as probe:
        share = reserved(probe).cost
    with Budget(file, BudgetSettings(), PRICE) as budget:
        assert budget.account.requests == 5
        assert budget.account.cost == pytest.approx(3 * share)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[1]",
        "null",
        "{}",
        "\0" * 160,
        '{"requests": "5", "cost": 0.0, "seconds": 0.0}',
        '{"requests": 5, "cost": null, "seconds": 0.0}',
        '{"requests": 5, "cost": NaN, "seconds": 0.0}',
        '{"requests": 5, "cost": -1.0, "seconds": 0.0}',
        '{"requests": 5, "cost": 0.0, "seconds": 0.0, "more": 1}',
    ],
)
def test_a_damaged_account_is_told_with_its_remedy_and_not_taken_for_nothing_spent(tmp_path: Path, content: str) -> None:
    file = tmp_path / "spent.json"
    file.write_text(content)
    with pytest.raises(DataError, match=r"spent\.json: not a readable account.*write there what you know"):
        Budget(file, BudgetSettings())
    assert file.read_text() == content


def test_an_account_that_a_person_wrote_is_gone_on_with(tmp_path: Path) -> None:
    file = tmp_path / "spent.json"
    file.write_text('{"requests": 120, "cost": 1, "seconds": 60}\n')
    with Budget(file, BudgetSettings(requests=121)) as budget:
        assert budget.reserve(request()) is not None
        assert budget.reserve(request()) is None
        assert budget.account.cost == 1
    assert json.loads(file.read_text())["requests"] == 121


def test_an_account_that_cannot_be_opened_or_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="folder"):
        Budget(tmp_path / "folder", BudgetSettings())
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        Budget(tmp_path / "file" / "spent.json", BudgetSettings())
    with Budget(tmp_path / "spent.json", BudgetSettings(requests=3)) as budget, no_room(), pytest.raises(StorageError, match="spent"):
        budget.reserve(request())


@contextmanager
def no_room() -> Iterator[None]:
    """No file may have any bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


# an API of its own


def test_all_of_a_template_is_set_aside_and_estimated() -> None:
    body = {"rules": "r" * 5000, "input": "{prompt}", "limit": "{max_tokens}"}
    api = CustomApi(body=body, text="out")
    sent = len(json.dumps({**body, "input": "p" * 30, "limit": 100}, separators=(",", ":")))
    assert Prices(PRICE, api).most(request()) >= (sent * 1 + 100 * 10) / 1e6
    assert sent / 3 <= estimated_tokens(request(), api) < sent / 2
    assert Prices(PRICE, api).of(request(), answer("abc")) >= (sent / 3 * 1 + 1 * 10) / 1e6


def test_an_answer_is_not_counted_as_shorter_than_it_is_where_no_bound_was_sent() -> None:
    words = answer("abc" * 500)  # 500 tokens by rule
    for body, counted in (({"input": "{prompt}", "limit": "{max_tokens}"}, 100), ({"input": "{prompt}"}, 500)):
        api = CustomApi(body=body, text="out")
        prices = Prices(PriceSettings(input_per_million=0, output_per_million=1e6), api)
        assert prices.of(request(max_tokens=100), words) == pytest.approx(counted)
        assert prices.of(request(max_tokens=100), Answer((Refusal("no_text", "?"),))) == pytest.approx(100)
