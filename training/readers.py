"""Rows of training data, wherever they are: a table, a local folder, or a dataset on the hub."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from e5v_st.files import hash_file, is_hub_id, locate
from e5v_st.tables import Table, is_table, load_folder, open_table

if TYPE_CHECKING:
    from datasets import Dataset

#: Datasets that are one file of a hub repository. E5-V's (ft_llm.py) are SimCSE's about 275,000 triplets from SNLI and
#: MultiNLI.
HUB_FILES = {"princeton-nlp/datasets-for-simcse": "nli_for_simcse.csv"}

ROOT = Path(__file__).parents[1]


def open_rows(source: str, split: str) -> tuple[Table | Dataset, Callable[[int], str], Path | None]:
    """Opens a file or a dataset.

    Args:
        source: A table (see ``e5v_st.tables``), a folder, or the id of a dataset on the hub.
        split: Which split of a folder or dataset is opened. A table is opened as a whole.

    Returns:
        The rows; what tells a user where the row of a number stands; and the file, if ``source`` is one.

    Raises:
        ValueError: If it cannot be read.
        OSError: If there is no such file or dataset.
    """
    path = find_file(source)
    if path is not None:
        table = open_table(path)
        return table, table.where, path
    if Path(source).is_dir():
        data = load_folder(Path(source), split)
    else:
        from datasets import load_dataset

        data = load_dataset(source, split=split)
    return data, lambda row: f"{source} ({split}), row {row + 1}", None


def find_file(source: str) -> Path | None:
    """Returns the file that ``source`` names, fetched from the hub if need be; ``None`` for a folder or dataset.

    A relative path is looked for in the current directory first, then where this package lies. So a recipe can name the
    files that come with it.

    Raises:
        FileNotFoundError: If it looks like a file, but there is none.
        ValueError: If it looks like a misspelt path, or what was fetched is not what the hub has.
    """
    if source in HUB_FILES:
        return fetch(source, HUB_FILES[source])
    source = os.path.expanduser(source)
    for path in (Path(source), ROOT / source):
        if path.is_file():
            return path
    if not Path(source).is_dir() and (is_table(Path(source)) or not is_hub_id(source)):
        raise FileNotFoundError(f"there is no file {source} (looked in {Path.cwd()} and {ROOT})")
    locate(source)  # refuses what is more likely a misspelt path
    return None


def fetch(repository: str, name: str) -> Path:
    """Downloads a file of a dataset on the hub, continuing an earlier download, and checks its hash.

    Raises:
        ValueError: If the file's SHA-256 is not the one that the hub has stored it under.
    """
    from huggingface_hub import hf_hub_download

    path = Path(hf_hub_download(repository, name, repo_type="dataset"))
    stored = path.resolve().name  # the cache names large files by the SHA-256 that the hub gives for them
    if len(stored) == 64 and stored != hash_file(path):
        raise ValueError(f"{path} is damaged: its SHA-256 is not {stored}. Delete {path.resolve()} and start again")
    return path
