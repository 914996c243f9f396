"""Ledger of a run or a study: where it is, and the ids by which it knows the questions of that folder's runs."""

from rayrl.errors import RunDirectoryError
from rayrl.runs import storage
from rayrl.runs.run import CONFIG, LEDGER, identity, ledger_url, read_config
from rayrl.study.config import StudyConfig
from rayrl.study.results import CELLS

NOTE = "study.json"
"""In a study's folder: the place of its ledger."""


def note_ledger(study: StudyConfig, ledger: str) -> None:
    """Write down where the ledger of a study is."""
    storage.write_json(storage.join(storage.absolute(study.study_dir), NOTE), {"name": study.name, "ledger": ledger})


def find_ledger(run_dir: str) -> tuple[str, list[str]]:
    """Return the place of the ledger of a run or a study, and the ids of the run, or of the study and its runs.

    Raises:
        RunDirectoryError: the folder is neither a run nor a study.
        DataError: the config or the id of a run is damaged.
    """
    folder = storage.absolute(run_dir)
    if storage.exists(storage.join(folder, CONFIG)):
        return ledger_url(folder, read_config(folder)), [identity(folder)]
    note, own = storage.join(folder, NOTE), storage.join(folder, LEDGER)
    if not storage.exists(note) and not storage.exists(own):
        raise RunDirectoryError(
            f"run_dir must be the folder of a run (with {CONFIG} in it) or of a study (with {NOTE}), got {folder}; "
            "`rayrl runs FOLDER` lists the runs in a folder"
        )
    ledger = storage.read_json(note)["ledger"] if storage.exists(note) else own
    runs = [storage.join(folder, name) for name in storage.children(folder)]
    cells = storage.join(folder, CELLS)
    runs += [storage.join(cells, name) for name in storage.children(cells) if not name.endswith(".parquet")]
    ids = [identity(place) for place in (folder, *runs)]
    return ledger, [identifier for identifier in ids if identifier]
