"""What both servers' settings have in common: who may ask, how much one request may be, and how a server runs."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings

from shared.errors import SettingsError
from shared.http.face import Bounds
from shared.http.keys import KeyEntry, KeyLimits, Keys, parse_keys, read_keys

LOOPBACK = ("127.0.0.1", "localhost", "::1")
NAMES_OF_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
"""As a Host header tells them."""


class ServerSettings(BaseSettings):
    """Settings of a server that answers to keys."""

    api_keys: SecretStr | None = None
    """Who may ask: NAME=KEY, with commas between them."""
    api_keys_file: Path | None = None
    """Who may ask: a keys file (see keys.py). Beside `api_keys`: both."""
    no_auth: bool = False
    """Answer whoever reaches the port, if no key is given."""
    requests_per_minute: int | None = Field(None, ge=1, le=100_000)
    """Of each key that has no limit of its own in the keys file; without keys, of all callers together. Likewise the next two."""
    characters_per_day: int | None = Field(None, ge=1)
    """Generated ones, from midnight to midnight UTC, while the server lives."""
    concurrent_requests: int | None = Field(None, ge=1)

    max_body_bytes: int = Field(1 << 20, ge=1024)
    max_prompt_characters: int = Field(100_000, ge=1)
    """Over all turns of a chat."""
    max_n: int = Field(64, ge=1, le=64)
    max_tokens: int = Field(4096, ge=1, le=4096)
    drain_s: int | None = Field(None, ge=1)
    """Seconds that requests in flight get to finish after a signal to stop; None: 7, since container engines kill 10 s after theirs."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """info: a line for every request, without its texts."""

    host: str = "127.0.0.1"
    metrics_port: int | None = Field(None, ge=0, le=65535)
    """Numbers for Prometheus are told there, on the same host; None: nowhere. 0 picks a free one."""

    @property
    def bounds(self) -> Bounds:
        """What one request may be."""
        return Bounds(**{bound.name: getattr(self, bound.name) for bound in fields(Bounds) if hasattr(self, bound.name)})

    def keys(self, *, open_on_loopback: bool = False) -> Keys:
        """Who may ask. `open_on_loopback`: without keys, whoever is on this machine may, if nobody else can reach the port.

        Raises SettingsError if nobody may and this was not said, and for keys that are weak or cannot be read.
        """
        entries: dict[str, KeyEntry] = read_keys(self.api_keys_file) if self.api_keys_file else {}
        for name, entry in parse_keys(self.api_keys.get_secret_value() if self.api_keys else "").items():
            if name in entries:
                raise SettingsError(f"api_keys: {name} stands in the keys file as well")
            entries[name] = entry
        if not entries and (self.api_keys_file or self.api_keys):
            raise SettingsError("api_keys, api_keys_file: no key is in them; put one there (`distill keygen NAME`), or leave them out")
        if not entries and not self.no_auth and not (open_on_loopback and self.host in LOOPBACK):
            where = f" and --host {self.host} is reached from elsewhere" if open_on_loopback else ""
            raise SettingsError(
                f"no API key is given{where}: make one with `distill keygen NAME` and name its file with --api-keys-file, or say "
                "--no-auth: then whoever reaches the port may ask"
            )
        general = KeyLimits(**{name: getattr(self, name) for name in KeyLimits.model_fields})
        return Keys(entries, general)
