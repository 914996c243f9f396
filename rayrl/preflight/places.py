"""Places of the user's files, looked up before any is opened: a wrong working directory is the most common mistake."""

import os
from collections.abc import Iterator

from rayrl.config import PreferenceDataConfig, RunConfig
from rayrl.data.files import find_files, is_hub_name, suffix_of
from rayrl.errors import ConfigError, DataError


def check_places(config: RunConfig) -> None:
    """Refuse files that are not there, with the setting that names them and the folder that they are looked for in.

    Names that may be the hub's, URLs and patterns are left to their readers.

    Raises:
        DataError: no such file or folder, or a link to nowhere.
        ConfigError: a split of something that has none.
    """
    for setting, path in _named(config):
        may_be_elsewhere = "://" in path or any(letter in path for letter in "*?[")
        if may_be_elsewhere or os.path.exists(path) or (is_hub_name(path) and suffix_of(path) is None):
            continue
        if os.path.islink(path):
            raise DataError(
                f"{setting}: {path} is a link to {os.readlink(path)}, which does not exist; mend the link, or name the "
                "file"
            )
        where = "" if os.path.isabs(path) else f" in {os.getcwd()}, where relative paths start"
        raise DataError(
            f"{setting}: {path} does not exist{where}; correct it"
            f"{', or run from the folder that it starts at' if where else ''}"
        )
    tables = {"pool": config.pool, "seed_data": config.seed_data, "preferences.data": _pairs(config)}
    for setting, table in tables.items():
        if table is not None and table.split != "train" and "://" not in table.path and find_files(table.path):
            raise ConfigError(
                f'{setting}.split must be left out for a file, which has no splits, got "{table.split}"; leave it out, '
                f"or name the split's file in {setting}.path"
            )


def _named(config: RunConfig) -> Iterator[tuple[str, str]]:
    """List the settings that name a file to read, and the files."""
    paths = {
        "rubric.template": config.rubric.template,
        "rubric.pairwise_template": config.rubric.pairwise_template,
        "pool.path": config.pool.path,
        "seed_data.path": config.seed_data and config.seed_data.path,
        "preferences.data.path": (pairs := _pairs(config)) and pairs.path,
        "evaluate.reference_answers.path": config.evaluate.reference_answers and config.evaluate.reference_answers.path,
    }
    yield from ((setting, path) for setting, path in paths.items() if path)
    yield from ((table.setting, table.path) for table in config.oracle.tables())


def _pairs(config: RunConfig) -> PreferenceDataConfig | None:
    return None if config.preferences is None else config.preferences.data
