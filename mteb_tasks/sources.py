"""Where the data come from: the published datasets by id, or a local copy of the same schema (``E5V_DATA=dir``)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from e5v_st.tables import load_folder

if TYPE_CHECKING:
    from datasets import Dataset

#: Revisions of the published datasets that are known in full; the others have had one upload and are read at ``main``.
REVISIONS = {
    "royokong/coco_test": "main",
    "royokong/flickr30k_test": "e5d418e5d73970abdca4f9d97914e1b4cce76478",
    "royokong/fashioniq_val": "main",
    "royokong/fashioniq_val_imgs": "4eb0446c2ab6917f65ff11ee8f063fba5f98a6ff",
    "royokong/cirr_val": "main",
    "royokong/cirr_test": "main",
    "royokong/cirr_imgs": "main",
}


def load_split(repo: str, split: str, columns: Iterable[str], revision: str | None = None) -> Dataset:
    """Loads one split of a dataset.

    With ``E5V_DATA=dir`` it is read from ``dir/<repo>`` or ``dir/<name>``: a folder that ``load_dataset`` understands
    (such as a download of the hub's repository), or one that ``save_to_disk`` made. What a folder holds is what counts:
    a file that has changed is read again, also if its time has not.

    Args:
        repo: The hub's id.
        split: Name of the split.
        columns: Columns that must be there.
        revision: Of the hub's repository; :data:`REVISIONS` by default.

    Raises:
        FileNotFoundError: If ``E5V_DATA`` is set and does not hold the dataset.
        ValueError: If a column is missing.
    """
    from datasets import load_dataset

    local = local_copy(repo)
    if local is not None and _was_saved_to_disk(local):
        data = _load_saved(local, split)
    elif local is not None:
        data = load_folder(local, split)
    else:
        data = load_dataset(repo, split=split, revision=revision or REVISIONS.get(repo, "main"))
    missing = set(columns) - set(data.column_names)
    if missing:
        raise ValueError(f"{local or repo} ({split}) has the columns {data.column_names}, want also {sorted(missing)}")
    return data


def local_copy(repo: str) -> Path | None:
    """Returns the folder in ``E5V_DATA`` that holds a dataset, or ``None`` where the variable is not set.

    Raises:
        FileNotFoundError: If it is set, but the dataset is not there.
    """
    folder = os.environ.get("E5V_DATA")
    if not folder:
        return None
    places = [Path(folder) / repo, Path(folder) / repo.split("/")[-1]]
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(f"E5V_DATA={folder} does not hold {repo}: want a folder {places[0]} or {places[1]}")


def _was_saved_to_disk(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file()


def _load_saved(folder: Path, split: str) -> Dataset:
    from datasets import load_from_disk

    data = load_from_disk(str(folder))
    return data[split] if isinstance(data, dict) else data
