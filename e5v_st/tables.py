"""Rows of local tables (CSV, TSV, JSON lines, JSON, Parquet), exactly as they stand in the file.

No type is guessed, and nothing is kept from an earlier read. A cell of a CSV is the text that stands there, and an id
of twenty digits in JSON keeps them all. A text file is read once for where its rows begin, and a row is parsed when it
is asked for, so a table takes 16 bytes of memory a row. The rules of each format are in ``docs/reference.md``.
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import io
import json
import math
import os
import re
import shutil
import tempfile
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from itertools import accumulate
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .files import hash_file
from .model.images_e5v import is_address

if TYPE_CHECKING:
    from datasets import Dataset

#: Longest field of a CSV or TSV, in characters; a quote that is never closed is read no further.
FIELD_LIMIT = 2**27
#: Rows of a Parquet file that are in memory together: each may hold an image.
PARQUET_ROWS = 64
#: What may stand between the fields of a file whose header seems to be a single field.
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
TRUTH_VALUES = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_CLOSED_QUOTES = re.compile(r'"(?:[^"]|"")*"')
_SHOWN = 5


@dataclass(frozen=True)
class Table:
    """Rows by number; the methods are those of ``datasets.Dataset`` that are needed here.

    Attributes:
        path: The file.
        column_names: Of every row: what a row lacks is ``None``, and so is an empty cell of a CSV or TSV.
        lines: Where each row begins in the file, from 1; the row's own number where the file has no lines.
        read: Reads the named columns of a row.
        unit: What ``lines`` counts, ``"line"`` or ``"row"``.
        notes: What a user should know of how the file was read.
        sha256: Of the file.
    """

    path: Path
    column_names: list[str]
    lines: Sequence[int]
    read: Callable[[int, Sequence[str]], dict[str, Any]]
    unit: str = "line"
    notes: list[str] = field(default_factory=list)
    sha256: str = ""

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, key: int | str) -> Any:
        """Returns a row by its number, or a column by its name."""
        if isinstance(key, str):
            return [row[key] for row in self.select_columns([key])]
        return self.read(range(len(self))[key], self.column_names)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.__getitem__, range(len(self)))

    def select_columns(self, names: Sequence[str]) -> Table:
        """Returns the table with these columns alone."""
        return replace(self, column_names=list(names))

    def where(self, row: int) -> str:
        """Returns file and line of a row, for a message."""
        return f"{self.path}, {self.unit} {self.lines[row]}"


# ---- opening ----


def is_table(path: Path) -> bool:
    """Whether a file's name says that it is a table."""
    return _suffix(path) in READERS


def _suffix(path: Path) -> str:
    """The suffix in lower case; of ``rows.csv.gz`` it is ``.csv``."""
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


def _refuse_same_names(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"it has {names.count(name)} columns named {name!r}: rename all but one")


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


# ---- text ----


def _open_text(path: Path, file: IO[bytes]) -> IO[bytes]:
    """Returns the text, uncompressed, from behind its byte order mark."""
    if path.suffix.lower() == ".gz":
        with gzip.open(file) as packed:
            file = tempfile.TemporaryFile()  # noqa: SIM115 - stays open as long as the table
            shutil.copyfileobj(packed, file)
        file.seek(0)
    start = file.read(3)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"it is UTF-16. Convert it, for example: {_convert('utf-16', path)}")
    file.seek(3 if start == b"\xef\xbb\xbf" else 0)
    return file


def _convert(encoding: str, path: Path) -> str:
    return f"iconv -f {encoding} -t utf-8 {path.name} > utf8-{path.name}"


def _decode(data: bytes, line: int, path: Path) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line += data[: error.start].count(b"\n")
        raise ValueError(
            f"line {line}: the byte 0x{data[error.start]:02x} is not UTF-8. "
            f"Convert the file, for example: {_convert('latin1', path)}"
        ) from None


def _text_table(
    path: Path,
    file: IO[bytes],
    names: Sequence[str],
    places: tuple[array[int], array[int]],
    parse: Callable[[str], dict[str, Any]],
    **more: Any,
) -> Table:
    """Makes a table of rows that begin at ``places[0]``, on the lines ``places[1]``."""
    starts, lines = places
    end = os.fstat(file.fileno()).st_size

    def read(row: int, names: Sequence[str]) -> dict[str, Any]:
        start = starts[row]
        stop = starts[row + 1] if row + 1 < len(starts) else end
        # Has no position in the file that threads could get wrong; empty lines after the row are read with it
        values = parse(os.pread(file.fileno(), stop - start, start).decode())
        return {name: values.get(name) for name in names}

    return Table(path, list(names), lines, read, **more)


def _tell(what: str, lines: Sequence[int]) -> list[str]:
    """Says on which lines something was found, if it was; ``(s)`` is for several."""
    if not lines:
        return []
    plural = "s" if len(lines) > 1 else ""
    more = f" and {len(lines) - _SHOWN:,} more" if len(lines) > _SHOWN else ""
    shown = ", ".join(map(str, lines[:_SHOWN]))
    return [f"{len(lines):,} {what.replace('(s)', plural)}: line{plural} {shown}{more}"]


# ---- CSV and TSV ----


class _Lines:
    """Lines of a file as text, and where the last one ended; a line ends in LF, CR LF or CR, as for ``csv``."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self.file = path, file
        self.offset, self.number = file.tell(), 0
        self.waiting: list[bytes] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        data = self.waiting.pop() if self.waiting else next(self.file)
        if data.count(b"\r") > data.endswith(b"\r\n"):  # by itself it ends a line too, which files do not split at
            data, *more = filter(None, re.split(rb"(?<=\r)(?!\n)", data))
            self.waiting += reversed(more)
        self.offset += len(data)
        self.number += 1
        return _decode(data, self.number, self.path)


@dataclass(frozen=True)
class _Record:
    """A record of a CSV or TSV: where it begins, its first and last line, and its fields (none of an empty line)."""

    start: int
    line: int
    last_line: int
    fields: list[str]


def _records(lines: _Lines, delimiter: str, quoting: int) -> Iterator[_Record]:
    csv.field_size_limit(FIELD_LIMIT)
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    while True:
        start, line = lines.offset, lines.number + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            until = f" (read up to line {lines.number})" if lines.number > line else ""
            raise ValueError(
                f"line {line}{until}: its quotes do not fit: {error}. "
                "A text that holds quotes stands in quotes as a whole, and each quote in it is written twice"
            ) from error
        yield _Record(start, line, lines.number, fields)


def _read_separated(path: Path, file: IO[bytes], delimiter: str = ",") -> Table:
    file = _open_text(path, file)
    begin = file.tell()
    _check_delimiter(path, file, delimiter)
    file.seek(begin)
    quoting, notes = _find_quoting(path, file) if delimiter == "\t" else (csv.QUOTE_MINIMAL, [])
    file.seek(begin)
    names: list[str] = []
    starts, lines, empty, odd = array("q"), array("q"), array("q"), array("q")
    for record in _records(_Lines(path, file), delimiter, quoting):
        fields = record.fields
        if not fields or (len(names) > 1 and len(fields) == 1 and not fields[0].strip()):
            empty.append(record.line)
        elif not names:
            names = _check_header(fields)
        else:
            _check_fields(fields, names, record.line)
            starts.append(record.start)
            lines.append(record.line)
            if record.last_line > record.line and _looks_like_rows(fields, delimiter):
                odd.append(record.line)
    if not names:
        raise ValueError("it is empty, want the names of the columns on its first line")
    places = {name: place for place, name in enumerate(names) if name}

    def parse(text: str) -> dict[str, Any]:
        csv.field_size_limit(FIELD_LIMIT)
        fields = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True))
        return {name: fields[place] or None for name, place in places.items()}

    notes += _tell("empty line(s) left out", empty) + _tell("quote(s) that may have swallowed rows", odd)
    return _text_table(path, file, list(places), (starts, lines), parse, notes=notes)


def _read_tabs(path: Path, file: IO[bytes]) -> Table:
    return _read_separated(path, file, "\t")


def _check_delimiter(path: Path, file: IO[bytes], delimiter: str) -> None:
    header = next((text for text in _Lines(path, file) if text.strip()), "").strip("\r\n")
    other = next((sign for sign in DELIMITERS if sign in header), None)
    if other is not None and delimiter not in header:
        advice = "name it .tsv" if other == "\t" else f"save it with {DELIMITERS[delimiter]}"
        raise ValueError(
            f"its first line, {header[:80]!r}, has {DELIMITERS[other]} between the names of the columns, "
            f"want {DELIMITERS[delimiter]}: {advice}"
        )


def _check_header(names: list[str]) -> list[str]:
    """Returns the names; a column without one, as pandas writes its index, cannot be asked for."""
    _refuse_same_names(list(filter(None, names)))
    if not any(names):
        raise ValueError("no column has a name on its first line")
    return names


def _check_fields(fields: list[str], names: list[str], line: int) -> None:
    """Raises ValueError where a field would be lost, or is lacking; what has neither name nor content may do either."""
    if any(fields[len(names) :]):
        raise ValueError(
            f"line {line}: {len(fields) - len(names)} more fields than the header names. "
            "A text that holds a delimiter stands in quotes"
        )
    if any(names[len(fields) :]):
        raise ValueError(f"line {line}: got {len(fields)} fields, want the {len(names)} that the header names")


def _looks_like_rows(fields: list[str], delimiter: str) -> bool:
    """Whether each line of a record has as many fields as the record, if quotes are taken for characters."""
    lines = list(filter(None, re.split(r"[\r\n]", delimiter.join(fields))))
    return min(len(fields), len(lines)) > 1 and all(line.count(delimiter) == len(fields) - 1 for line in lines)


def _find_quoting(path: Path, file: IO[bytes]) -> tuple[int, list[str]]:
    """Finds out whether quotes in a TSV enclose fields (as pandas writes them) or are characters of the texts.

    They are characters where one opens a field and does not close it on its line. The exception is a file whose lines
    do not all have as many fields as the header, but whose records do, if quotes enclose tabs or line breaks.

    Returns:
        A constant of ``csv``, and what to tell the user.
    """
    begin, width, open_line, ragged = file.tell(), 0, 0, False
    for line, text in enumerate(_Lines(path, file), start=1):
        if not text.strip(" \r\n"):
            continue
        fields = text.rstrip("\r\n").split("\t")
        width = width or len(fields)
        ragged |= len(fields) != width
        if not open_line and '"' in text and not all(map(_is_sound, fields)):
            open_line = line
    if not open_line:
        return csv.QUOTE_MINIMAL, []
    file.seek(begin)
    if ragged and _quotes_fit(path, file, width):
        return csv.QUOTE_MINIMAL, []
    return csv.QUOTE_NONE, [
        f"quotes are read as characters, since one that opens on line {open_line} is not closed there"
    ]


def _is_sound(field: str) -> bool:
    return not field.startswith('"') or _CLOSED_QUOTES.fullmatch(field) is not None


def _quotes_fit(path: Path, file: IO[bytes], width: int) -> bool:
    """Whether quotes give every row its fields.

    A field that holds both a tab and a line break may hold a row that a stray quote has swallowed: it does not fit.
    """
    try:
        for record in _records(_Lines(path, file), "\t", csv.QUOTE_MINIMAL):
            if len(record.fields) not in (0, width):
                return False
            if any("\t" in field and ("\n" in field or "\r" in field) for field in record.fields):
                return False
    except ValueError:
        return False
    return True


# ---- JSON ----


def _read_json_lines(path: Path, file: IO[bytes]) -> Table:
    return _index_json(path, _open_text(path, file))


def _index_json(path: Path, file: IO[bytes], unit: str = "line") -> Table:
    names: dict[str, None] = {}
    starts, lines, empty = array("q"), array("q"), array("q")
    start = file.tell()
    for line, data in enumerate(file, start=1):  # split at LF alone: U+2028 and its like may stand in a text
        if data.strip(b" \t\r\n"):
            names.update(dict.fromkeys(_parse_object(_decode(data, line, path), f"{unit} {line}")))
            starts.append(start)
            lines.append(line)
        else:
            empty.append(line)
        start += len(data)
    return _text_table(
        path, file, names, (starts, lines), json.loads, unit=unit, notes=_tell("empty line(s) left out", empty)
    )


def _parse_object(text: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text, object_pairs_hook=_refuse_same_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON ({error}), want an object with the columns on each line") from error
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
    """A list of objects, or JSON lines."""
    file = _open_text(path, file)
    begin = file.tell()
    while (first := file.read(1)).isspace():
        pass
    file.seek(begin)
    if first != b"[":
        return _index_json(path, file)
    try:
        rows = json.loads(_decode(file.read(), 1, path), object_pairs_hook=_refuse_same_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON ({error})") from error
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
    _refuse_same_names(names)
    return Table(path, names, range(1, rows.bounds[-1] + 1), rows, unit="row")


READERS: dict[str, Callable[[Path, IO[bytes]], Table]] = {
    ".csv": _read_separated,
    ".tsv": _read_tabs,
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
