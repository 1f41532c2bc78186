"""Local tables (CSV, TSV, JSON lines, JSON, Parquet), exactly as they stand in the file.

No type is guessed, and nothing is kept from an earlier read. A cell of a CSV is the text that stands there, and an id
of twenty digits in JSON keeps them all. The rules of each format are in ``docs/reference.md``; ``delimited.py`` reads
CSV and TSV, and ``rows.py`` finds rows of text.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import tempfile
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from decimal import Decimal
from itertools import accumulate
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .delimited import read_commas, read_tabs
from .files import hash_file
from .model.images_e5v import is_address
from .rows import Table, decode, open_text, refuse_same_names, tell, text_table

if TYPE_CHECKING:
    from datasets import Dataset

#: Rows of a Parquet file that are in memory together: each may hold an image.
PARQUET_ROWS = 64
TRUTH_VALUES = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


# ---- opening ----


def is_table(path: Path) -> bool:
    """Whether a file's name says that it is a table."""
    return _suffix(path) in READERS


def _suffix(path: Path) -> str:
    """Returns the suffix in lower case; of ``rows.csv.gz`` it is ``.csv``."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def open_table(path: Path) -> Table:
    """Opens a table; text may be compressed (``.gz``).

    Raises:
        ValueError: If its format is not known, or it cannot be read; the message names file and line. A row that is
            asked for after the file has changed raises it too.
        FileNotFoundError: If it is not there.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if not is_table(path):
        raise ValueError(f"{path} is of an unknown format, want one of {', '.join(READERS)} (text may be .gz)")
    try:
        file = path.open("rb")  # closed with the last table that reads from it
        state = _state(file)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        table = READERS[_suffix(path)](path, file)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error

    def read(row: int, names: Sequence[str]) -> dict[str, Any]:
        if _state(file) != state:
            raise ValueError(f"{path} has changed since it was opened: start again")
        return table.read(row, names)

    return replace(table, sha256=digest, read=read)


def _state(file: IO[bytes]) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def load_folder(folder: Path, split: str) -> Dataset:
    """Loads one split of a folder that ``load_dataset`` understands.

    ``datasets`` keeps what it has read by the paths and times of files; here it has a cache for each content.
    """
    import datasets

    names = sorted(glob.glob("**/*", root_dir=folder, recursive=True))
    files = [(name, hash_file(folder / name)) for name in names if (folder / name).is_file()]
    content = hashlib.sha256(repr(files).encode(errors="surrogateescape")).hexdigest()
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "by-content" / content
    return datasets.load_dataset(str(folder), split=split, cache_dir=str(cache))


# ---- what cells hold ----


def read_number(value: Any, where: str) -> float:
    """Returns the number that a cell holds, also where it is written as text; raises ValueError if it is not one."""
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, Decimal, str)) or "_" in str(value):
            raise ValueError
        number = float(value)
        if not math.isfinite(number):
            raise ValueError
    except (ValueError, OverflowError):
        raise ValueError(f"{where}: got {value!r}, want a number (as 3.5)") from None
    return number


def read_truth(value: Any, where: str) -> bool:
    """Returns the truth value that a cell holds, also if it is written as text; raises ValueError if it is not one."""
    truth = TRUTH_VALUES.get(str(value).strip().lower())
    if truth is None:
        raise ValueError(f"{where}: got {value!r}, want true or false")
    return truth


def beside(image: Any, folder: Path) -> Any:
    """Returns the image of a cell, with relative paths taken from the table's folder.

    Args:
        image: A path, an address, ``{"bytes", "path"}`` or a list of them; anything else is left as it is.
        folder: The table's.
    """
    if isinstance(image, list):
        return [beside(each, folder) for each in image]
    if isinstance(image, dict) and image.get("bytes") is None:
        image = image.get("path")
    return folder / image if isinstance(image, str) and not is_address(image) else image


# ---- JSON ----


def _read_json_lines(path: Path, file: IO[bytes]) -> Table:
    return _index_json(path, open_text(path, file))


def _index_json(path: Path, file: IO[bytes], unit: str = "line") -> Table:
    names: dict[str, None] = {}
    starts, lines, empty = array("q"), array("q"), array("q")
    start = file.tell()
    for line, data in enumerate(file, start=1):  # split at LF alone: U+2028 and its like may stand in a text
        if data.strip(b" \t\r\n"):
            names.update(dict.fromkeys(_parse_object(decode(data, line, path), f"{unit} {line}")))
            starts.append(start)
            lines.append(line)
        else:
            empty.append(line)
        start += len(data)
    return text_table(
        path, file, names, (starts, lines), json.loads, unit=unit, notes=tell("empty line(s) left out", empty)
    )


def _parse_object(text: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text, object_pairs_hook=_refuse_same_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}), want an object with the columns on each line") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: got a {type(row).__name__}, want an object with the columns")
    return row


def _refuse_same_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


def _read_json(path: Path, file: IO[bytes]) -> Table:
    """Reads a list of objects, or JSON lines."""
    file = open_text(path, file)
    begin = file.tell()
    while (first := file.read(1)).isspace():
        pass
    file.seek(begin)
    if first != b"[":
        return _index_json(path, file)
    try:
        rows = json.loads(decode(file.read(), 1, path), object_pairs_hook=_refuse_same_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from error
    as_lines = tempfile.TemporaryFile()  # noqa: SIM115 - stays open as long as the table
    as_lines.writelines(json.dumps(row).encode() + b"\n" for row in rows)
    as_lines.seek(0)
    return _index_json(path, as_lines, "row")


# ---- Parquet ----


class _ParquetRows:
    """Reads rows of a Parquet file, at best in their order: a few are in memory, those before are read again."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        import pyarrow.parquet as pq

        self.path, self.file = path, pq.ParquetFile(file)
        groups = range(self.file.num_row_groups)
        self.bounds = [0, *accumulate(self.file.metadata.row_group(group).num_rows for group in groups)]
        self.names: Sequence[str] = ()
        self.batches: Iterator[Any] = iter(())
        self.first, self.batch = 0, []

    def __call__(self, row: int, names: Sequence[str]) -> dict[str, Any]:
        import pyarrow as pa

        group = bisect_right(self.bounds, row) - 1
        try:
            if names != self.names or not self.bounds[group] <= self.first <= row:
                self.batches = self.file.iter_batches(PARQUET_ROWS, row_groups=[group], columns=names)
                self.names, self.first, self.batch = names, self.bounds[group], []
            while row >= self.first + len(self.batch):
                self.first += len(self.batch)
                self.batch = next(self.batches).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.path} cannot be read: row {row + 1}: {error}") from error
        return dict(self.batch[row - self.first])  # the caller's own


def _read_parquet(path: Path, file: IO[bytes]) -> Table:
    import pyarrow as pa

    try:
        rows = _ParquetRows(path, file)
    except pa.ArrowException as error:
        raise ValueError(str(error)) from error
    names = rows.file.schema_arrow.names
    refuse_same_names(names)
    return Table(path, names, range(1, rows.bounds[-1] + 1), rows, unit="row")


READERS: dict[str, Callable[[Path, IO[bytes]], Table]] = {
    ".csv": read_commas,
    ".tsv": read_tabs,
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
