"""API keys: whose they are, which are refused, and that neither file nor error ever shows one."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pytest

from shared.errors import SettingsError
from shared.http.keygen import main as keygen
from shared.http.keys import Forbidden, KeyEntry, KeyLimits, Keys, Unauthorised, parse_keys, read_keys

ALICE, BOB = "alice-key-0123456789-abcdef", "bob-key-9876543210-ghijkl"


def entry(key: str, **more: object) -> KeyEntry:
    return KeyEntry(sha256=hashlib.sha256(key.encode()).hexdigest(), **more)  # type: ignore[arg-type]


def keys_file(folder: Path, text: str) -> Path:
    file = folder / "keys.yaml"
    file.write_text(text)
    return file


def test_each_key_is_known_by_its_own_name() -> None:
    keys = Keys({"alice": entry(ALICE), "bob": entry(BOB)})
    assert [keys.known(f"Bearer {key}").name for key in (ALICE, BOB)] == ["alice", "bob"]
    assert keys.known(f"bearer  {BOB} ").name == "bob"


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", ALICE, f"Basic {ALICE}", f"Bearer {ALICE}x", f"Bearer {ALICE[:-1]}", "Bearer é"]
)
def test_without_a_known_key_nobody_is_let_in(header: str | None) -> None:
    with pytest.raises(Unauthorised) as refused:
        Keys({"alice": entry(ALICE)}).known(header)
    assert ALICE not in str(refused.value)


def test_a_hash_is_no_key() -> None:
    with pytest.raises(Unauthorised):
        Keys({"alice": entry(ALICE)}).known(f"Bearer {hashlib.sha256(ALICE.encode()).hexdigest()}")


def test_a_revoked_key_is_forbidden_and_not_unknown() -> None:
    with pytest.raises(Forbidden):
        Keys({"alice": entry(ALICE, revoked=True)}).known(f"Bearer {ALICE}")


def test_where_no_key_is_given_everybody_is_the_same_caller() -> None:
    keys = Keys({}, KeyLimits(requests_per_minute=3))
    assert not keys.required
    assert keys.known(None) is keys.known("Bearer anything")
    assert keys.known(None).limits.requests_per_minute == 3


def test_a_keys_own_limit_comes_before_the_general_one() -> None:
    general = KeyLimits(requests_per_minute=10, concurrent_requests=2)
    keys = Keys({"alice": entry(ALICE, requests_per_minute=99)}, general)
    assert keys.keys[0].limits == KeyLimits(requests_per_minute=99, concurrent_requests=2)


def test_one_key_under_two_names_is_refused() -> None:
    with pytest.raises(SettingsError, match="alice and bob are the same key"):
        Keys({"alice": entry(ALICE), "bob": entry(ALICE)})


def test_a_key_that_everybody_knows_is_refused_even_as_a_hash() -> None:
    with pytest.raises(SettingsError, match="alice"):
        Keys({"alice": entry("sk-1234")})


@pytest.mark.parametrize("key", ["", "short", "a" * 40, "abc" * 20, "0123456789 0123456789 abc", "schlüssel-0123456789-abcdef"])
def test_a_weak_key_in_a_variable_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(SettingsError, match="api key alice") as refused:
        parse_keys(f"alice={key}")
    assert not key or key not in str(refused.value)


def test_keys_of_a_variable() -> None:
    assert parse_keys(f" alice={ALICE}, bob={BOB},") == {"alice": entry(ALICE), "bob": entry(BOB)}
    assert parse_keys("") == {}


@pytest.mark.parametrize("text", [ALICE, f"alice={ALICE},{BOB}", f"alice={ALICE},alice={BOB}", f"a b={ALICE}"])
def test_what_is_no_list_of_names_and_keys_is_refused_without_showing_a_key(text: str) -> None:
    with pytest.raises(SettingsError) as refused:
        parse_keys(text)
    assert ALICE not in str(refused.value)
    assert BOB not in str(refused.value)


def test_what_keygen_prints_is_an_entry_of_a_keys_file_and_opens_with_the_key_it_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert keygen(["alice"]) == 0
    said = capsys.readouterr()
    key = said.err.strip().rpartition(" ")[2]
    assert key not in said.out
    assert Keys(read_keys(keys_file(tmp_path, said.out))).known(f"Bearer {key}").name == "alice"
    assert keygen(["alice"]) == 0
    assert capsys.readouterr().err.strip().rpartition(" ")[2] != key


def test_keygen_makes_the_entry_of_a_key_that_exists(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(ALICE + "\n"))
    assert keygen(["alice", "--hash"]) == 0
    assert read_keys(keys_file(tmp_path, capsys.readouterr().out)) == {"alice": entry(ALICE)}


def test_an_empty_file_holds_no_keys(tmp_path: Path) -> None:
    assert read_keys(keys_file(tmp_path, "")) == {}
    assert read_keys(keys_file(tmp_path, "# nobody yet\n")) == {}


HASH = entry(ALICE).sha256


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"alice: {ALICE}", "alice: an entry is"),
        ("alice: {sha256: abc}", "alice: sha256: 64 hexadecimal digits"),
        ("alice: {}", "alice: sha256"),
        (f"alice: {{sha256: {HASH}, rpm: 4}}", "alice: rpm: unknown"),
        (f"alice: {{sha256: {HASH}, requests_per_minute: 0}}", "alice: requests_per_minute"),
        (f"alice: {{sha256: {HASH}}}\nalice: {{sha256: {HASH}}}", "alice: two entries"),
        (f"'a b': {{sha256: {HASH}}}", "'a b' is no name"),
        ("- alice", "entries are NAME"),
        ("alice: {", "line"),
    ],
)
def test_a_wrong_entry_is_named_with_the_remedy_and_never_quoted(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SettingsError) as refused:
        read_keys(keys_file(tmp_path, text))
    assert said in str(refused.value)
    assert ALICE not in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"api_keys_file: .*nowhere"):
        read_keys(tmp_path / "nowhere")
