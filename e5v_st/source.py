"""Where the rows of an embedding job come from: a folder of images, a table, or a data set of the hub."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import hash_file, locate

TABLES = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
IMAGE_COLUMNS = ("image", "img", "image_path", "path", "file", "file_name")
TEXT_COLUMNS = ("text", "caption", "sentence", "query", "title")


@dataclass(frozen=True)
class Source:
    """Rows by number: ``ids[i]`` names row i, ``rows[i]`` is a file, or holds an item in its columns.

    Attributes:
        ids: As they stand in the shards.
        rows: Paths of images, or dictionaries.
        columns: Where a row's image and its text are; both ``None`` for a folder of images.
        folder: What paths are relative to.
        content: A hash of what the rows are made from: a folder's names and sizes, a file's bytes, or the data set's
            own fingerprint.
    """

    ids: Sequence[str]
    rows: Sequence[Any]
    columns: tuple[str | None, str | None]
    folder: Path
    content: str

    def item(self, row: int) -> Any:
        """Returns what a row embeds."""
        return _to_item(self.rows[row], *self.columns, self.folder)


def open_source(
    source: str,
    *,
    split: str = "train",
    config: str | None = None,
    id_column: str | None = None,
    image: str | None = None,
    text: str | None = None,
) -> Source:
    """Opens a folder of images, a table, or a hub data set.

    Args:
        source: A path, or a data set's id.
        split: Of a data set.
        config: Of a data set that has several.
        id_column: Names the rows; ``id`` where ``None`` and there is one, else they are numbered.
        image: The column of the images; guessed where neither it nor ``text`` is given.
        text: The column of the texts.

    Raises:
        ValueError: If there is nothing to embed in it, or a named column is not there.
    """
    from .encoder import leave_images_undecoded
    from .items_e5v import IMAGE_SUFFIXES

    path = Path(os.path.expanduser(source))
    if path.is_dir():
        named = (file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        files = sorted(file for file in named if not file.is_dir())
        if not files:
            raise ValueError(f"the folder {source} has no images ({', '.join(IMAGE_SUFFIXES)})")
        # A name need not be UTF-8, which Parquet wants: other bytes are written as \xNN
        names = [os.fsencode(file.relative_to(path).as_posix()).decode("utf8", "backslashreplace") for file in files]
        sizes = [file.stat().st_size if file.exists() else None for file in files]
        return Source(names, files, (None, None), path, hashlib.sha256(repr((names, sizes)).encode()).hexdigest())
    is_table = path.suffix.lower() in TABLES
    rows = open_table(path) if is_table else _open_data_set(source, config, split)
    names = rows.column_names
    for name in (id_column, image, text):
        if name is not None and name not in names:
            raise ValueError(f"{source} has no column {name!r}, but {', '.join(names)}")
    if image is None and text is None:
        image, text = _guess_columns(names)
    if image is None and text is None:
        raise ValueError(f"{source} has the columns {', '.join(names)}: say which with --image-column or --text-column")
    content = hash_file(path) if is_table else rows._fingerprint
    id_column = id_column or ("id" if "id" in names else None)
    ids = [str(value) for value in rows[id_column]] if id_column else [str(i) for i in range(len(rows))]
    # What is in other columns, as sounds, need not be readable
    rows = leave_images_undecoded(rows.select_columns([name for name in names if name in (image, text)]))
    return Source(ids, rows, (image, text), path.parent, content)


def _guess_columns(names: Sequence[str]) -> tuple[str | None, str | None]:
    text = next((name for name in TEXT_COLUMNS if name in names), None)
    # Beside a text, an address is more likely that of a page
    candidates = IMAGE_COLUMNS if text else (*IMAGE_COLUMNS, "url")
    return next((name for name in candidates if name in names), None), text


def open_table(path: Path) -> Any:
    """Opens a file of :data:`TABLES` as a data set of ``datasets``; raises ValueError if it cannot be read."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    kind = TABLES[path.suffix.lower()]
    try:
        more = _csv_options(path, "\t" if path.suffix.lower() == ".tsv" else ",") if kind == "csv" else {}
        return load_dataset(kind, data_files=str(path), split="train", **more)
    except (DatasetGenerationError, ValueError, StopIteration) as error:  # the last for an empty JSON file
        reason = str(error.__cause__ or error) or "it holds no rows"
        raise ValueError(f"{path} cannot be read: {reason}") from error


def _csv_options(path: Path, separator: str) -> dict[str, Any]:
    """Cells are the text that stands there ("007" is no number, "NA" no gap); an empty one is a missing value."""
    import pandas as pd
    from datasets import Features, Value

    names = pd.read_csv(path, sep=separator, nrows=0, index_col=False).columns
    features = Features({name: Value("string") for name in names})
    # Without index_col, a row with a comma too many would move into the columns before
    return {"sep": separator, "features": features, "keep_default_na": False, "na_values": [""], "index_col": False}


def _open_data_set(name: str, config: str | None, split: str) -> Any:
    from datasets import load_dataset

    if locate(name) is not None:
        raise ValueError(f"{name} is a file of another kind, want a folder, or one of {', '.join(TABLES)}")
    try:
        return load_dataset(name, config, split=split)
    except ValueError as error:  # it names the configurations or splits that there are
        reason = " ".join(str(error).partition("\nExample of usage")[0].split())
        raise ValueError(f"{name} cannot be opened with --config {config} --split {split}: {reason}") from error


def _to_item(row: Any, image: str | None, text: str | None, folder: Path) -> Any:
    if isinstance(row, Path):
        return {"image": row}
    item = {}
    if image is not None and row[image] is not None:
        item["image"] = _beside(row[image], folder)
    if text is not None and row[text] is not None:
        item["text"] = row[text]
    return item


def _beside(image: Any, folder: Path) -> Any:
    """The image of a cell, with relative paths taken from the table's folder."""
    if isinstance(image, list):
        return [_beside(each, folder) for each in image]
    if isinstance(image, dict) and image.get("bytes") is None:
        image = image.get("path")
    return folder / image if isinstance(image, str) and "://" not in image else image
