"""From rows to training examples whose columns are items: texts, images, or both.

    row of the table                                  columns of the training data
    title       photo        worse                    anchor               positive              negative
    "red mug"   m/1.jpg      m/2.jpg           ->     {text: "red mug"}    {images: [m/1.jpg]}   {images: [m/2.jpg]}

Every image is opened once before the first step, so that what is missing or damaged is told by file and line, and no
training ends at night on row 80,000. The rows are kept in a file that is mapped into memory: paths stay paths, and
bytes and what addresses hold are kept as bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e5v_st.model.images_e5v import fetch_address, is_address, open_image, shorten
from e5v_st.model.items_e5v import image_key
from e5v_st.reading import leave_images_undecoded
from e5v_st.rows import Table
from e5v_st.tables import beside, is_table, open_table, read_number

from .columns import Columns, find_columns
from .examples import Report
from .readers import find_file, open_rows
from .row_file import WINDOW, ItemWriter
from .sources import Source
from .teacher import add_teacher

if TYPE_CHECKING:
    from datasets import Dataset

    from .losses import Kind
    from .recipes import Settings


def load_items(source: Source, *, on_bad_row: str = "stop", labelled: bool = False) -> tuple[Dataset, Report]:
    """Reads a source.

    Args:
        source: What the recipe says of it.
        on_bad_row: ``"stop"`` refuses a source with rows that cannot be used; ``"skip"`` leaves them out.
        labelled: Whether the loss wants a score for each row.

    Returns:
        A dataset with the columns ``anchor``, ``positive``, any negatives and, where wanted, ``label``; and what was
        found. Items are plain texts where the source holds no images; else ``{"text", "images"}``, where an image is
        ``{"bytes", "path"}``.

    Raises:
        ValueError: If columns are missing, rows cannot be used and are not to be skipped, or no row is left.
        OSError: If there is no such file or dataset.
    """
    rows, where, folder = open_source(source)
    columns = find_columns(source, rows, labelled=labelled)
    report = _describe(source, rows, columns)
    reader = RowReader(columns, folder, image_table(source.images) if source.images else None)
    writer = ItemWriter([*columns.of], columns.text_only, with_label=columns.label is not None)
    ids, seen, bad = [], set(), []
    numbered = _with_progress(_numbered(rows, columns, source.split), rows, source)
    for line, name, (items, key, problem) in _read_many(reader, numbered):
        if problem is not None:
            report.left_out.setdefault(problem.kind, []).append(line)
            bad.append(f"{where(line)}: {problem}")
            continue
        if key in seen:
            report.duplicates.append(line)
        seen.add(key)
        writer.add(items)
        ids.append(name)
    if bad and (on_bad_row == "stop" or not writer.rows):
        more = f"; and {len(bad) - 5:,} more" if len(bad) > 5 else ""
        hint = "" if on_bad_row == "skip" else ". Mend them, or leave them out: on_bad_row: skip"
        raise ValueError(f"{len(bad):,} rows cannot be used: {'; '.join(bad[:5])}{more}{hint}")
    if not writer.rows:
        raise ValueError(f"{source.data} has no rows of the split {source.split!r}")
    report.rows = writer.rows
    data = writer.finish()
    return (add_teacher(data, ids, source, report.sha256) if source.teacher else data), report


def load_sources(
    sources: Mapping[str, Source], settings: Settings
) -> tuple[dict[str, Dataset], dict[str, Report], dict[str, Kind]]:
    """Reads all sources of a training; see :func:`load_items`.

    Args:
        sources: By their names.
        settings: ``loss`` and ``on_bad_row`` are used.

    Returns:
        By the sources' names: the rows, what was found, and the kind of the loss.
    """
    from .losses import kind_of

    kinds = {name: kind_of(source.loss or settings.loss, f"{name}, loss") for name, source in sources.items()}
    data, reports = {}, {}
    for name, source in sources.items():
        data[name], reports[name] = load_items(source, on_bad_row=settings.on_bad_row, labelled=kinds[name].labelled)
    return data, reports, kinds


def _describe(source: Source, rows: Any, columns: Columns) -> Report:
    """Returns the report on a source of which no row has been read yet."""
    report = Report(source.data, columns=tuple(columns.names))
    if isinstance(rows, Table):
        report.sha256, report.notes = rows.sha256, rows.notes
    report.unused = tuple(name for name in rows.column_names if name not in (*columns.names, "split"))
    return report


# ---- which rows ----


def open_source(source: Source) -> tuple[Any, Callable[[int], str], Path]:
    """Opens a source; returns its rows, what tells where the row of a line stands, and the folder of its paths."""
    path = Path(source.data).expanduser()
    if path.name.endswith((".tar", ".tar.gz")) or any(mark in source.data for mark in "*{"):
        from .webdataset import Shards

        shards = Shards(source.data)
        return shards, shards.where, path.parent
    if path.is_dir() and (metadata := next(filter(Path.is_file, map(path.joinpath, METADATA)), None)):
        rows = open_table(metadata)
        return rows, _where_of_lines(rows), path
    rows, where, file = open_rows(source.data, source.split)
    if file is None:
        return leave_images_undecoded(rows), lambda line: where(line - 1), path
    return rows, _where_of_lines(rows), file.parent


#: The tables that may describe a folder of images, as in ``datasets``.
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def _where_of_lines(rows: Table) -> Callable[[int], str]:
    return lambda line: f"{rows.path}, {rows.unit} {line}"


def _numbered(rows: Any, columns: Columns, split: str) -> Iterator[tuple[int, str, Any]]:
    """Yields line (or number, from 1), id and content of each row of a split; ids are those of ``e5v embed``."""
    names, lines = list(rows.column_names), itertools.count(1)
    has_splits = isinstance(rows, Table) and "split" in names
    if isinstance(rows, Table):
        more = [name for name in ("id", "split") if name in names]
        rows, lines = rows.select_columns(list(dict.fromkeys([*columns.names, *more]))), rows.lines
    for number, (line, row) in enumerate(zip(lines, rows, strict=False)):
        if not has_splits or row["split"] == split:
            yield line, str(row["id"] if "id" in names else number), row


def _read_many(reader: RowReader, numbered: Iterator[Any]) -> Iterator[tuple[int, str, Read]]:
    """Yields line, id and items of rows in their order; threads open the images."""
    with ThreadPoolExecutor() as pool:
        while window := list(itertools.islice(numbered, WINDOW)):
            found = pool.map(partial(_try, reader), [row for *_, row in window])
            for (line, name, _), read in zip(window, found, strict=True):
                yield line, name, read


def _with_progress(numbered: Iterator[Any], rows: Any, source: Source) -> Iterator[Any]:
    from tqdm import tqdm

    from e5v_st.processes import rank

    total = len(rows) if hasattr(rows, "__len__") else None
    name = f"checking {Path(source.data).name}"
    return iter(tqdm(numbered, desc=name, total=total, unit=" rows", delay=5, disable=rank() != 0))


# ---- one row ----


#: The items of a row, what it has in common with rows that repeat it, and what is wrong with it.
Read = tuple[list[Any], Any, "BadRowError | None"]


class BadRowError(ValueError):
    """Why a row cannot be used; ``kind`` is the same for all rows with this problem."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(detail or kind)
        self.kind = kind


@dataclass(frozen=True)
class RowReader:
    """Makes items of a row, and opens its images.

    Attributes:
        columns: Where they are.
        folder: What paths are relative to.
        images: Looks up the image of an id.
    """

    columns: Columns
    folder: Path
    images: Callable[[Any], Any] | None = None

    def __call__(self, row: Mapping[str, Any]) -> tuple[list[Any], Any]:
        """Returns the items of a row, and what it has in common with rows that repeat it.

        Raises:
            BadRowError: If something is missing or cannot be read.
        """
        items: list[Any] = []
        keys = []
        for role, kinds in self.columns.of.items():
            item = self._item(row, role, kinds)
            keys.append((item["text"], tuple(self._key(image, role) for image in item["images"])))
            items.append(item)
        roles = list(self.columns.of)
        for role, key in zip(roles, keys, strict=True):
            if role.startswith("negative") and key in keys[:2]:
                raise BadRowError(
                    "a negative that equals its anchor or positive", f"the {role} equals its anchor or positive"
                )
        if self.columns.label is not None:
            name = self.columns.label
            try:
                items.append(read_number(row[name], f"column {name!r}"))
            except ValueError as error:
                raise BadRowError("no score", str(error)) from None
        return items, tuple(keys)

    def _item(self, row: Mapping[str, Any], role: str, kinds: Mapping[str, str]) -> dict[str, Any]:
        text: Any = None
        images: list[dict[str, Any]] = []
        for kind, name in kinds.items():
            own_text, own_image = _parts(kind, row[name])
            if not isinstance(own_text, str | None):
                raise BadRowError(
                    f"a value of type {type(own_text).__name__} for a text",
                    f"column {name!r}: got {shorten(repr(own_text))}, want a text",
                )
            if own_text and own_text.strip():
                text = own_text
            if not _is_empty(own_image):
                images += self._images(own_image, name)
        if text is None and not images:
            raise BadRowError(f"nothing for the {role}", f"there is nothing for the {role}")
        return {"text": text, "images": images}

    def _images(self, value: Any, name: str) -> list[dict[str, Any]]:
        values = value if isinstance(value, (list, tuple)) else [value]
        return [self._image(each, name) for each in values]

    def _image(self, value: Any, name: str) -> dict[str, Any]:
        if self.images is not None:
            try:
                value = self.images(value)
            except KeyError:
                raise BadRowError(
                    "an image that is not there", f"column {name!r}: no image has the id {value!r}"
                ) from None
        if isinstance(value, (bytes, bytearray)):
            return {"bytes": bytes(value), "path": None}
        if isinstance(value, Mapping) and value.get("bytes") is not None:
            return {"bytes": value["bytes"], "path": value.get("path")}
        value = beside(value, self.folder)
        if isinstance(value, str) and is_address(value):
            try:
                return {"bytes": fetch_address(value), "path": None}
            except ValueError as error:
                raise BadRowError("an image that cannot be read", f"column {name!r}: {error}") from None
        if isinstance(value, (str, Path)):
            return {"bytes": None, "path": str(value)}
        raise BadRowError(
            "an image that cannot be read", f"column {name!r}: got a {type(value).__name__}, want an image"
        )

    def _key(self, image: Mapping[str, Any], role: str) -> Any:
        try:
            return _key_of_file(image["path"]) if image["bytes"] is None else image_key(open_image(image["bytes"]))
        except ValueError as error:
            raise BadRowError("an image that cannot be read", f"{role}: {error}") from None


def _parts(kind: str, value: Any) -> tuple[Any, Any]:
    """Returns text and image of a cell; a string is an image in a column of images alone."""
    if kind == "image":
        return None, value
    if kind == "text" or isinstance(value, str):
        return value, None
    if isinstance(value, Mapping) and not {"bytes", "path"} & set(value):
        return value.get("text"), value.get("image")
    return None, value


def _is_empty(image: Any) -> bool:
    return image is None or (isinstance(image, str) and not image.strip()) or image == []


@lru_cache(maxsize=100_000)
def _key_of_file(path: str) -> Any:
    """What stands for the image in a file; the same file is opened once, where many rows show it."""
    return image_key(open_image(path))


def _try(reader: RowReader, row: Mapping[str, Any]) -> Read:
    try:
        return (*reader(row), None)
    except BadRowError as problem:
        return [], None, problem


@cache
def image_table(name: str) -> Callable[[Any], Any]:
    """Returns what looks up an image by what stands in a column of images.

    Args:
        name: A folder, whose paths they are, or a table with the columns ``id`` and ``image``.

    Raises:
        ValueError: If the table lacks one of these.
        OSError: If there is neither.
    """
    if Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
        return lambda value: beside(value, folder)
    path = find_file(name)
    if path is None or not is_table(path):
        raise ValueError(f"got images: {name}, want a folder, or a table with the columns id and image")
    table = open_table(path)
    if missing := {"id", "image"} - set(table.column_names):
        raise ValueError(f"{name} lacks the column {' and '.join(sorted(missing))}, which images: needs")
    found = {row["id"]: beside(row["image"], path.parent) for row in table.select_columns(["id", "image"])}
    return lambda value: found[value]
