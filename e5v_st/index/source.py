"""Where the rows of an embedding job come from: a folder of images, a table, or a dataset on the hub."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import locate
from ..model.images_e5v import shorten
from ..rows import Table
from ..tables import READERS, beside, is_table, open_table

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
        content: A hash of what the rows are made from: a folder's names and sizes, a file's bytes, or the dataset's
            own fingerprint.
        notes: What a user should know of how the source was read.
        numbered: Whether the ids are the rows' numbers, as there is no column of ids.
        others: The rows with the further columns that were asked for; ``None`` without them.
    """

    ids: Sequence[str]
    rows: Sequence[Any]
    columns: tuple[str | None, str | None]
    folder: Path
    content: str
    notes: Sequence[str] = ()
    numbered: bool = False
    others: Any = None

    def item(self, row: int) -> Any:
        """Returns what a row embeds."""
        return _to_item(self.rows[row], *self.columns, self.folder)

    def explain(self, row: int, error: str) -> str:
        """Returns what is wrong with a row, and where the row is in a table.

        Args:
            row: Its number.
            error: What is wrong with its item.
        """
        if self.item(row):
            return f"row {row}: {error}"
        columns = " and ".join(repr(name) for name in self.columns if name is not None)
        where = f" ({self.rows.where(row)})" if isinstance(self.rows, Table) else ""
        return f"row {row}: nothing is in {columns}{where}: fill it in, or leave the row out"


def open_source(
    source: str,
    *,
    split: str | None = None,
    config: str | None = None,
    id_column: str | None = None,
    image: str | None = None,
    text: str | None = None,
    others: Sequence[str] = (),
) -> Source:
    """Opens a folder of images, a table, or a dataset on the hub.

    Args:
        source: A path, or a dataset's id.
        split: Of a dataset on the hub, ``train`` by default.
        config: Of a dataset on the hub that has several configurations.
        id_column: Names the rows. With ``None``, ``id`` does if there is such a column; else the rows are numbered.
        image: The column of the images. It is guessed if neither it nor ``text`` is given.
        text: The column of the texts.
        others: Further columns to keep beside the embeddings.

    Raises:
        ValueError: If there is nothing to embed in it, a named column is not there, an option is not for this kind of
            source, or an id is missing or not exact.
    """
    path = Path(os.path.expanduser(source))
    of_hub = {"--split": split, "--config": config}
    if path.is_dir():
        of_table = {"--id-column": id_column, "--image-column": image, "--text-column": text}
        of_table["--columns"] = ", ".join(others) or None
        _refuse_given({**of_hub, **of_table}, f"{source} is a folder of images")
        return _open_folder(path)
    if is_table(path):
        _refuse_given(of_hub, f"{source} is a file")
    rows = open_table(path) if is_table(path) else _open_dataset(source, config, split or "train")
    names = rows.column_names
    if not len(rows):
        raise ValueError(f"{source} cannot be read: it holds no rows")
    for name in (id_column, image, text, *others):
        if name is not None and name not in names:
            raise ValueError(f"{source} has no column {name!r}, but {', '.join(map(repr, names))}")
    if image is None and text is None:
        image, text = _guess_columns(names)
    if image is None and text is None:
        raise ValueError(
            f"{source} has the columns {', '.join(map(repr, names))}: say which with --image-column or --text-column"
        )
    content, notes = (rows.sha256, rows.notes) if isinstance(rows, Table) else (rows._fingerprint, ())
    id_column = id_column or ("id" if "id" in names else None)
    ids = _read_ids(rows, id_column) if id_column else list(map(str, range(len(rows))))
    notes = [*notes, _say_columns(names, image, text)]
    # Other columns, such as sounds, need not be readable
    used = rows.select_columns([name for name in names if name in (image, text)])
    beside_them = rows.select_columns(list(others)) if others else None
    return Source(ids, used, (image, text), path.parent, content, notes, numbered=id_column is None, others=beside_them)


def _refuse_given(options: Mapping[str, str | None], kind: str) -> None:
    """Raises ValueError if one of these options was given."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{kind}, which {' and '.join(given)} cannot be used for: leave that out")


def _read_ids(rows: Any, column: str) -> list[str]:
    ids = []
    for row, value in enumerate(rows[column]):
        where = rows.where(row) if isinstance(rows, Table) else f"row {row}"
        try:
            ids.append(to_name(value))
        except ValueError as error:
            raise ValueError(f"{where}: {error} in the column {column!r}") from error
    return ids


def to_name(value: Any) -> str:
    """Returns what names a row. Half of a character, which JSON can hold and UTF-8 cannot, stays its escape.

    Raises:
        ValueError: If nothing is there, or something that has several spellings, such as 1e5 and 100000.0.
    """
    if value is None or isinstance(value, (bool, float, list, dict)):
        got = "no id" if value is None else f"the id {shorten(repr(value))}, a {type(value).__name__}"
        raise ValueError(f"got {got}, want a text or a whole number")
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise ValueError(f"got the id {shorten(repr(value))}, which is not UTF-8, want a text") from None
    return str(value).encode(errors="backslashreplace").decode()


def _say_columns(names: Sequence[str], image: str | None, text: str | None) -> str:
    """Says which columns are embedded, and which others a user may have meant."""
    if image is not None and text is not None:
        used = (
            f"images are in the column {image!r}, texts in {text!r}, and a row with both is one embedding; "
            "--image-column or --text-column takes one of them alone"
        )
    else:
        used = f"images are in the column {image!r}" if text is None else f"texts are in the column {text!r}"
    others = [
        repr(name) for name in (*IMAGE_COLUMNS, "url", *TEXT_COLUMNS) if name in names and name not in (image, text)
    ]
    return f"{used}; not used: {', '.join(others)}" if others else used


def _open_folder(path: Path) -> Source:
    from .image_folders import find_images

    files, left_out = find_images(path)
    if not files:
        raise ValueError(f"the folder {path} has no images; {left_out or 'it is empty'}")
    # A name need not be UTF-8, which Parquet wants: other bytes are written as \xNN
    names = [os.fsencode(file.relative_to(path).as_posix()).decode("utf8", "backslashreplace") for file in files]
    sizes = [file.stat().st_size if file.exists() else None for file in files]
    content = hashlib.sha256(repr((names, sizes)).encode()).hexdigest()
    return Source(names, files, (None, None), path, content, [left_out] if left_out else [])


def _guess_columns(names: Sequence[str]) -> tuple[str | None, str | None]:
    text = next((name for name in TEXT_COLUMNS if name in names), None)
    # Beside a text, an address is more likely that of a page
    candidates = IMAGE_COLUMNS if text else (*IMAGE_COLUMNS, "url")
    return next((name for name in candidates if name in names), None), text


def _open_dataset(name: str, config: str | None, split: str) -> Any:
    from datasets import load_dataset

    from ..reading import leave_images_undecoded

    if locate(name) is not None:
        raise ValueError(f"{name} is a file of another kind, want a folder, or one of {', '.join(READERS)}")
    try:
        return leave_images_undecoded(load_dataset(name, config, split=split))
    except ValueError as error:  # it names the configurations or splits that there are
        reason = " ".join(str(error).partition("\nExample of usage")[0].split())
        raise ValueError(f"{name} cannot be opened with --config {config} --split {split}: {reason}") from error


def _to_item(row: Any, image: str | None, text: str | None, folder: Path) -> Any:
    if isinstance(row, Path):
        return {"image": row}
    item = {}
    if image is not None and not is_blank(row[image]):
        item["image"] = beside(row[image], folder)
    if text is not None and not is_blank(row[text]):
        item["text"] = row[text]
    return item


def is_blank(cell: Any) -> bool:
    """Whether nothing is in a cell, in a format that has nulls or in one that has empty texts alone."""
    return cell is None or (isinstance(cell, str) and not cell.strip())
