"""Rows of a file by number, and rows of text: where each begins, and how it is read when somebody asks for it.

A text file is read once, for where its rows begin. Here row 0 begins at byte 8, on line 2, and row 1 at byte 27, on
line 4:

    line 1   id,text
    line 2   1,"a dog,                starts   8   27
    line 3   running"                 lines    2    4
    line 4   2,a cat

Row 0 is then the bytes from 8 to 27, which are parsed anew each time. A table takes 16 bytes of memory a row.
"""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

#: Lines that a note names; the rest is counted.
_SHOWN = 5


@dataclass(frozen=True)
class Table:
    """Rows by number; the methods are those of ``datasets.Dataset`` that are needed here.

    Attributes:
        path: The file.
        column_names: Of every row. What a row lacks is ``None``, and so is an empty cell of a CSV or TSV.
        lines: The line that each row begins on, from 1. It is the row's own number if the file has no lines.
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


def open_text(path: Path, file: IO[bytes]) -> IO[bytes]:
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


def decode(data: bytes, line: int, path: Path) -> str:
    """Returns UTF-8 as text; raises ValueError, naming the line, for anything else.

    Args:
        data: Bytes of one line, or of several.
        line: The number of the first one.
        path: The file, for a command that converts it.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line += data[: error.start].count(b"\n")
        raise ValueError(
            f"line {line}: the byte 0x{data[error.start]:02x} is not UTF-8. "
            f"Convert the file, for example: {_convert('latin1', path)}"
        ) from None


def text_table(
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


def tell(what: str, lines: Sequence[int]) -> list[str]:
    """Says on which lines something was found, if it was; ``(s)`` is for several."""
    if not lines:
        return []
    plural = "s" if len(lines) > 1 else ""
    more = f" and {len(lines) - _SHOWN:,} more" if len(lines) > _SHOWN else ""
    shown = ", ".join(map(str, lines[:_SHOWN]))
    return [f"{len(lines):,} {what.replace('(s)', plural)}: line{plural} {shown}{more}"]


def refuse_same_names(names: Sequence[str]) -> None:
    """Raises ValueError if two columns have the same name."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"it has {names.count(name)} columns named {name!r}: rename all but one")
