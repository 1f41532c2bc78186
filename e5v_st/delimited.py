"""CSV and TSV: records, quotes and headers. What would be read wrongly is refused, with its line."""

from __future__ import annotations

import csv
import io
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .rows import Table, decode, open_text, refuse_same_names, tell, text_table

#: Longest field of a CSV or TSV, in characters; a quote that is never closed is read no further.
FIELD_LIMIT = 2**27
#: What may stand between the fields of a file whose header seems to be a single field.
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_CLOSED_QUOTES = re.compile(r'"(?:[^"]|"")*"')


def read_commas(path: Path, file: IO[bytes]) -> Table:
    """Reads a CSV."""
    return _read(path, file, ",")


def read_tabs(path: Path, file: IO[bytes]) -> Table:
    """Reads a TSV."""
    return _read(path, file, "\t")


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
        return decode(data, self.number, self.path)


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


def _read(path: Path, file: IO[bytes], delimiter: str) -> Table:
    file = open_text(path, file)
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

    notes += tell("empty line(s) left out", empty) + tell("quote(s) that may have swallowed rows", odd)
    return text_table(path, file, list(places), (starts, lines), parse, notes=notes)


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
    refuse_same_names(list(filter(None, names)))
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
