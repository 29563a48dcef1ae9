"""`distill fetch`: a model's Hugging Face folder in the cache, under a name that an engine without a network can be given."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def main(argv: list[str]) -> int:
    """Returns 0. Raises EngineError for a model that cannot be had, SettingsError for a folder in the link's place, StorageError."""
    parser = argparse.ArgumentParser(
        prog="distill fetch", description="Download or build a model for an engine that has no way to the internet."
    )
    parser.add_argument("model", metavar="MODEL", help="a Hub name, a folder, or embedded:NAME (see shared/models.py)")
    parser.add_argument(
        "--link", type=Path, required=True, metavar="PATH", help="a symbolic link to the model's folder, replaced if it is there"
    )
    arguments = parser.parse_args(argv)

    from shared.artifacts import temporary_name
    from shared.errors import SettingsError, storage_error
    from shared.models import offline_model

    folder = Path(offline_model(arguments.model)).resolve()
    if arguments.link.is_dir() and not arguments.link.is_symlink():
        raise SettingsError(f"--link {arguments.link}: a folder is in the way; give another path")
    new = temporary_name(arguments.link)
    try:
        new.unlink(missing_ok=True)
        # relative: the volume may be mounted elsewhere in the engine's container
        new.symlink_to(os.path.relpath(folder, arguments.link.parent.resolve()))
        new.replace(arguments.link)
    except OSError as exc:
        raise storage_error(exc, arguments.link) from exc
    print(f"fetch: {arguments.model} is {arguments.link} -> {folder}")
    return 0
