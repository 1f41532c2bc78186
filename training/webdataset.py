"""Rows of ``.tar`` shards as webdataset writes them: files that share a name up to its first dot are one row.

00017.jpg                 image            00018.anchor.txt       anchor_text
00017.txt                 text             00018.positive.jpg     positive_image
00017.json                its keys         00018.json             its keys
"""

from __future__ import annotations

import glob
import json
import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from e5v_st.model.images_e5v import image_suffixes

#: Rows whose names of columns are taken for those of all.
LOOKED_AT = 100


class Shards:
    """The rows of one or more archives, in their order.

    Args:
        pattern: A path, with ``*`` or ``{000..041}`` for several.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If one is not an archive of such rows.
    """

    def __init__(self, pattern: str) -> None:
        self.paths = [Path(found) for name in expand_braces(pattern) for found in sorted(glob.glob(name))]
        if not self.paths:
            raise FileNotFoundError(f"there is no file {pattern}")
        self._names: list[str] = []
        first = [row for _, row in zip(range(LOOKED_AT), self, strict=False)]
        self.column_names = list(dict.fromkeys(name for row in first for name in row))
        if not self.column_names:
            raise ValueError(f"{pattern} holds no rows")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._names = []
        for path in self.paths:
            for name, row in _rows_of(path):
                self._names.append(f"{path}, row {name}")
                known = getattr(self, "column_names", ())
                yield {**dict.fromkeys(known), **row}

    def where(self, line: int) -> str:
        """Returns archive and name of a row that has been read, for a message."""
        return self._names[line - 1]


def expand_braces(pattern: str) -> list[str]:
    """Returns the names that ``{000..041}`` stands for.

    Example:
        >>> expand_braces("train-{08..10}.tar")
        ['train-08.tar', 'train-09.tar', 'train-10.tar']
    """
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [name for number in numbers for name in expand_braces(pattern.replace(match[0], number, 1))]


def _rows_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with tarfile.open(path) as archive:
            files = (member for member in archive if member.isfile())
            for name, members in groupby(files, lambda member: _split_name(member.name)[0]):
                row: dict[str, Any] = {}
                for member in members:
                    file = archive.extractfile(member)
                    row |= _columns_of(
                        _split_name(member.name)[1], file.read() if file else b"", f"{path}, {member.name}"
                    )
                yield name, row
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _split_name(name: str) -> tuple[str, str]:
    """``"a/00017.positive.jpg"`` -> ``("a/00017", "positive.jpg")``."""
    path = PurePosixPath(name)
    stem, _, ending = path.name.partition(".")
    return str(path.with_name(stem)) if stem else str(path), ending


def _columns_of(ending: str, content: bytes, where: str) -> dict[str, Any]:
    role, _, suffix = ending.rpartition(".")
    prefix = f"{role}_" if role else ""
    suffix = suffix.lower()
    try:
        if suffix == "txt":
            return {f"{prefix}text": content.decode()}
        if suffix == "json":
            values = json.loads(content)
            if not isinstance(values, dict):
                raise ValueError(f"it holds a {type(values).__name__}, want an object")
            return values
    except ValueError as error:
        raise ValueError(f"{where} cannot be read: {error}") from error
    return {f"{prefix}image": content} if f".{suffix}" in image_suffixes() else {}
