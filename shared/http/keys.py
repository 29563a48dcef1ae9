"""API keys of a server: named, kept as hashes, compared in constant time.

A keys file is YAML, one entry a key; `distill keygen NAME` makes a key and its entry:

    alice: {sha256: 9f86d0...}
    harvest: {sha256: 60303a..., requests_per_minute: 600, concurrent_requests: 64, characters_per_day: 2000000}
    bob: {sha256: fcde2b..., revoked: true}
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.errors import DistillError, SettingsError

MIN_LENGTH = 20
MIN_DISTINCT = 10
"""Characters of a key, and different ones among them: fewer can be guessed. A key of `distill keygen` has 43 drawn from 64."""
KNOWN = (
    "",
    "EMPTY",
    "none",
    "dummy",
    "test",
    "secret",
    "password",
    "changeme",
    "admin",
    "not-needed",
    "sk-1234",
    "sk-no-key-required",
    "token-abc123",
)
"""Keys of other projects' examples, which are the first that anybody tries; in a hash they would not be seen otherwise."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Unauthorised(DistillError):
    """No key, or one that is not known: 401."""


class Forbidden(DistillError):
    """A key that is known and may not be used: 403."""


class KeyLimits(BaseModel):
    """How much one key may ask for; None: as much as it likes. Of a keys file's entry None is whatever the server's settings say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_minute: int | None = Field(None, ge=1, le=100_000)
    """In any 60 seconds."""
    characters_per_day: int | None = Field(None, ge=1)
    """Generated ones, from midnight to midnight UTC."""
    concurrent_requests: int | None = Field(None, ge=1)

    def over(self, general: KeyLimits) -> KeyLimits:
        """These limits, with the general ones where there are none."""
        own = self.model_dump(include=set(KeyLimits.model_fields), exclude_none=True)
        return KeyLimits(**general.model_dump(include=set(KeyLimits.model_fields)) | own)


class KeyEntry(KeyLimits):
    """One key of a keys file."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the key itself."""
    revoked: bool = False


@dataclass(frozen=True)
class Key:
    """Who asks. `index`: its place among the server's keys."""

    index: int
    name: str
    digest: bytes
    limits: KeyLimits
    revoked: bool = False


class Keys:
    """The keys of one server; none: whoever reaches it may ask, as "anonymous"."""

    def __init__(self, entries: Mapping[str, KeyEntry], general: KeyLimits | None = None) -> None:
        """`general`: limits of keys that have none of their own. Raises SettingsError for a weak key, and for one with two names."""
        general = general or KeyLimits()
        self.required = bool(entries)
        """Whether a request without a key is refused."""
        self.keys = [
            Key(index, name, bytes.fromhex(entry.sha256), entry.over(general), entry.revoked)
            for index, (name, entry) in enumerate(entries.items())
        ] or [Key(0, "anonymous", b"", general)]
        known = {digest(key) for key in KNOWN}
        by_digest: dict[bytes, str] = {}
        for key in self.keys:
            if key.digest in known:
                raise SettingsError(
                    f"api key {key.name}: it is one of the keys that everybody knows; make another with `distill keygen {key.name}`"
                )
            if other := by_digest.get(key.digest):
                raise SettingsError(f"api keys {other} and {key.name} are the same key; give each its own")
            by_digest[key.digest] = key.name

    def known(self, authorization: str | None) -> Key:
        """Whose "Bearer KEY" this is. Takes as long for one key as for another. Raises Unauthorised, Forbidden."""
        if not self.required:
            return self.keys[0]
        if authorization is None:
            raise Unauthorised("no API key: send one as the header Authorization: Bearer KEY")
        scheme, _, value = authorization.partition(" ")
        if scheme.lower() != "bearer" or not value.strip():
            raise Unauthorised("the header Authorization is not of the form: Bearer KEY")
        asked, found = digest(value.strip()), None
        for key in self.keys:
            if hmac.compare_digest(asked, key.digest):
                found = key
        if found is None:
            raise Unauthorised("this API key is not known here")
        if found.revoked:
            raise Forbidden("this API key has been revoked")
        return found


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_keys(file: Path) -> dict[str, KeyEntry]:
    """The entries of a keys file; none of an empty one. Raises SettingsError that names the entry and the remedy."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise SettingsError(f"api_keys_file: {file}: {getattr(exc, 'strerror', None) or 'not UTF-8 text'}") from exc
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except yaml.YAMLError as exc:
        line = getattr(getattr(exc, "problem_mark", None), "line", 0) + 1
        raise SettingsError(
            f"api_keys_file: {file}: line {line}: no YAML; an entry is NAME: {{sha256: HASH}}, as `distill keygen` prints it"
        ) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"api_keys_file: {file}: entries are NAME: {{sha256: HASH}}, as `distill keygen` prints them")
    names = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    entries = {}
    for name, entry in content.items():
        where = f"api_keys_file: {file}: {name}"
        if names.count(str(name)) > 1:
            raise SettingsError(f"{where}: two entries have this name")
        if isinstance(entry, str) or not isinstance(entry, dict):  # not quoted: it may be the key itself
            raise SettingsError(
                f"{where}: an entry is {{sha256: HASH}}, never the key itself; `distill keygen --hash` reads a key and prints its entry"
            )
        try:
            entries[named(name)] = KeyEntry.model_validate(entry)
        except ValidationError as exc:
            error = exc.errors()[0]
            what = (
                "64 hexadecimal digits"
                if error["loc"] == ("sha256",)
                else "unknown"
                if error["type"] == "extra_forbidden"
                else error["msg"]
            )
            raise SettingsError(f"{where}: {'.'.join(map(str, error['loc']))}: {what}") from None
    return entries


def parse_keys(text: str) -> dict[str, KeyEntry]:
    """The entries of "alice=KEY,bob=KEY", as an environment variable gives them. Raises SettingsError, which never quotes a key."""
    entries = {}
    for number, part in enumerate(filter(None, (part.strip() for part in text.split(","))), start=1):
        name, equals, key = part.partition("=")
        if not equals:
            raise SettingsError(f"api_keys: number {number} is not of the form NAME=KEY")
        if named(name) in entries:
            raise SettingsError(f"api_keys: two keys are called {name}")
        refuse_weak(name, key)
        entries[name] = KeyEntry(sha256=digest(key).hex())
    return entries


def refuse_weak(name: str, key: str) -> None:
    """Raises SettingsError for a key that can be guessed or that no header can hold."""
    remedy = f"make one with `distill keygen {name}`"
    if len(key) < MIN_LENGTH or len(set(key)) < MIN_DISTINCT:
        raise SettingsError(f"api key {name}: too weak: it needs {MIN_LENGTH} characters, {MIN_DISTINCT} of them different; {remedy}")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise SettingsError(f"api key {name}: it may hold printable ASCII characters without blanks only; {remedy}")


def named(name: object) -> str:
    """The name of a key. Raises SettingsError for what cannot be one."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SettingsError(f"api keys: {str(name)[:64]!r} is no name: letters, digits, dots, dashes and underscores, up to 64")
    return name
