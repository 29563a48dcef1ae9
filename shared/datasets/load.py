"""From a recipe's data set settings to the splits they name."""

from __future__ import annotations

from pathlib import Path

from shared.datasets.rows import Dataset
from shared.settings import DatasetSettings


def load(settings: DatasetSettings, cache: Path) -> Dataset:
    """The data set of a recipe; downloads go below `cache`.

    Raises SettingsError for settings that do not fit together, DataError for a file that cannot be used.
    """
    if settings.name == "sample":
        from shared.datasets.sample import load_sample

        return load_sample(settings)
    if settings.name == "meqsum":
        from shared.datasets.meqsum import load_meqsum

        return load_meqsum(settings, cache)
    from shared.datasets.files import load_file

    return load_file(settings)
