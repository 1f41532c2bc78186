"""What goes into a table: rows that are still to be embedded, or rows that `e5v embed` or a cluster has embedded.

Both have the same methods, so that ``e5v index`` need not know which it has.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..model.images_e5v import is_address, open_image
from ..tables import read_number, read_truth
from .manifest import MANIFEST
from .nearest import read_shards
from .source import Source

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer

#: Rows whose images are in memory together while they are hashed, in threads.
HASHED_TOGETHER = 64
#: One row: its number, its embedding or ``None``, and what was wrong with it.
Embedded = tuple[int, "np.ndarray | None", "str | None"]


class Items:
    """Rows of a folder of images, a table or a dataset, to be embedded.

    Args:
        source: The rows.
        types: The further columns to keep, with their types; see ``lance_table.TYPES``.
        thumbnails: Longest side of the small copy that is kept of each image; ``None`` for no copy.
    """

    embedded = False

    def __init__(self, source: Source, types: Mapping[str, str], thumbnails: int | None) -> None:
        self.source, self.types, self.thumbnails = source, types, thumbnails
        self.ids = source.ids
        self.columns = source.columns
        # A row is read once for its hashes and once to be embedded: Parquet is slow where reads go back and forth
        self._others = list(source.others) if source.others is not None else []
        self._cells: list[dict[str, Any]] = []
        self._held: dict[int, Any] = {}

    def digests(self) -> Iterator[tuple[str, str]]:
        """Yields of each row the hash of what is embedded, and the hash of all else that the table keeps of it.

        Raises:
            ValueError: If a cell is not of its column's type.
        """
        self._cells = []
        rows = iter(range(len(self.ids)))
        with ThreadPoolExecutor() as threads:
            while numbers := list(itertools.islice(rows, HASHED_TOGETHER)):
                items = [self.source.item(row) for row in numbers]
                self._cells += map(self._read_cells, numbers, items)
                for row, content in zip(numbers, threads.map(digest_item, items), strict=True):
                    yield content, _digest(repr(self._cells[row]))

    def embed(
        self, rows: Sequence[int], model: SentenceTransformer, prompt: str | None, batch_tokens: int | None
    ) -> Iterator[Embedded]:
        """Yields embeddings of rows, in their order."""
        from ..encoder import stream_all

        results = stream_all(
            model,
            self._hold(rows),
            prompt=prompt,
            batch_tokens=batch_tokens,
            on_error="skip",
            total=len(rows),
        )
        with closing(results):
            for row, result in zip(rows, results, strict=True):
                error = result.error and self.source.explain(row, result.error.removeprefix(f"item {result.index}: "))
                yield row, result.embedding, error
                self._held.pop(row, None)

    def _hold(self, rows: Sequence[int]) -> Iterator[Any]:
        """Yields items, and keeps each until its result has come."""
        for row in rows:
            self._held[row] = self.source.item(row)
            yield self._held[row]

    def cells(self, row: int) -> dict[str, Any]:
        """Returns what the table keeps of a row besides its embedding, but for what is read from its image."""
        return self._cells[row]

    def image_cells(self, row: int) -> dict[str, Any]:
        """Returns width, height and thumbnail of a row's image."""
        item = self._held[row] if row in self._held else self.source.item(row)
        image = item.get("image")
        return measure(image[0] if isinstance(image, list) and image else image, self.thumbnails)

    def _read_cells(self, row: int, item: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {"image": self._image_name(row, item.get("image")), "text": item.get("text")}
        for name, kind in self.types.items():
            found[name] = CONVERTERS[kind](self._others[row][name], f"row {row}, column {name!r}")
        return found

    def _image_name(self, row: int, image: Any) -> str | None:
        if self.columns == (None, None):
            return self.ids[row]
        image = image.get("path") if isinstance(image, Mapping) else image
        if isinstance(image, Path):
            return os.path.relpath(image, self.source.folder)
        return image if isinstance(image, str) and not image.startswith("data:") else None


class Shards:
    """Rows of a folder of shards: what `e5v embed` wrote, or Parquet files with the columns ``id`` and ``embedding``.

    Where the source of the shards is here and unchanged, a row has the hashes and cells that it has in a run with the
    source itself, so that such a run goes on from the shards. Else the embedding stands for the content.

    Args:
        folder: Holds the shards.
        job: The manifest of `e5v embed`; ``None`` for the files of a cluster, which do not say what made them.
        items: The rows of the source, if they are those of the manifest.
    """

    embedded = True

    def __init__(self, folder: Path, job: dict[str, Any] | None, items: Items | None = None) -> None:
        self.folder, self.job, self.items = folder, job, items
        self.ids: list[str] = []
        self._rows: list[int] = []  # of the source: those with an error have no embedding
        self._digests: list[tuple[str, str]] = []
        for rows, names, vectors in self._read():
            self.ids += names
            self._rows += rows
            self._digests += [] if items else [(_digest(vector.tobytes()), "") for vector in vectors]

    @property
    def columns(self) -> tuple[str | None, str | None]:
        """The columns of images and texts that were embedded."""
        return (self.job["image_column"], self.job["text_column"]) if self.job else (None, None)

    def digests(self) -> Iterator[tuple[str, str]]:
        """Yields of each row the hash of its content, and that of its details."""
        if self.items is None:
            return iter(self._digests)
        of_source = list(self.items.digests())
        return (of_source[row] for row in self._rows)

    def embed(self, rows: Sequence[int], *_: Any) -> Iterator[Embedded]:
        """Yields embeddings of rows as they stand in the shards, in their order."""
        wanted, start = iter(rows), 0
        row = next(wanted, None)
        for _rows, names, vectors in self._read():
            while row is not None and row < start + len(names):
                yield row, vectors[row - start], None
                row = next(wanted, None)
            start += len(names)

    def cells(self, row: int) -> dict[str, Any]:
        """Returns what the table keeps of a row besides its embedding."""
        if self.items is not None:
            return self.items.cells(self._rows[row])
        images = self.job is not None and self.columns == (None, None)  # a folder of images, whose ids are paths
        return {"image": self.ids[row] if images else None, "text": None}

    def image_cells(self, row: int) -> dict[str, Any]:
        """Returns width, height and thumbnail of a row's image, if it is here."""
        return self.items.image_cells(self._rows[row]) if self.items is not None else {}

    def _read(self) -> Iterator[tuple[list[int], list[str], np.ndarray]]:
        if self.job is not None:
            return ((rows.tolist(), names, vectors) for rows, names, vectors in read_shards(self.folder, self.job))
        return (([0] * len(names), names, vectors) for names, vectors in _read_parquet(self.folder))


def is_shards(folder: Path) -> bool:
    """Whether a folder holds embeddings: of `e5v embed`, or of a cluster (Parquet files and no images)."""
    import pyarrow.parquet as pq

    if (folder / MANIFEST).is_file():
        return True
    first = next(iter(sorted(folder.glob("*.parquet"))), None) if folder.is_dir() else None
    return first is not None and {"id", "embedding"} <= set(pq.read_schema(first).names)


def _read_parquet(folder: Path) -> Iterator[tuple[list[str], np.ndarray]]:
    import numpy as np
    import pyarrow.parquet as pq

    for path in sorted(folder.glob("*.parquet")):
        table = pq.read_table(path, columns=["id", "embedding"])
        table = table.filter(table["embedding"].is_valid())
        flat = table["embedding"].combine_chunks().flatten().to_numpy().astype(np.float32, copy=False)
        names = [str(name) for name in table["id"].to_pylist()]
        yield names, flat.reshape(len(names), -1) if names else np.zeros((0, 0), np.float32)


# ---- cells ----


def _to_text(value: Any, where: str) -> str | None:
    if isinstance(value, (dict, list, bytes)):
        raise ValueError(f"{where}: got a {type(value).__name__}, want a text, a number or a truth value")
    return None if value is None else str(value)


def _to_int(value: Any, where: str) -> int | None:
    if value is None:
        return None
    number = read_number(value, where)
    if number != int(number):
        raise ValueError(f"{where}: got {value!r}, want a whole number")
    return (
        value
        if isinstance(value, int)
        else int(str(value))
        if str(value).strip().lstrip("+-").isdigit()
        else int(number)
    )


def _optional(read: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    return lambda value, where: None if value is None else read(value, where)


#: types of ``--columns`` -> what reads a cell of this type, and names the cell if it is of another
CONVERTERS: dict[str, Callable[[Any, str], Any]] = {
    "text": _to_text,
    "int": _to_int,
    "float": _optional(read_number),
    "bool": _optional(read_truth),
}


def measure(image: Any, thumbnails: int | None) -> dict[str, Any]:
    """Returns ``width``, ``height`` and, on request, ``thumbnail`` of an image.

    Args:
        image: As an item has it. An image at an address is fetched for a thumbnail alone.
        thumbnails: Longest side of the thumbnail.
    """
    from PIL import Image as PILImage

    if image is None:
        return {}
    try:
        if thumbnails:
            pixels = open_image(image)
            width, height = pixels.size
            pixels.thumbnail((thumbnails, thumbnails))
            jpeg = io.BytesIO()
            pixels.save(jpeg, "JPEG", quality=85)
            return {"width": width, "height": height, "thumbnail": jpeg.getvalue()}
        if isinstance(image, dict):
            image = image.get("bytes")
        if isinstance(image, str) and is_address(image):
            return {}
        with PILImage.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return {"width": opened.width, "height": opened.height}
    except (OSError, ValueError, PILImage.DecompressionBombError):
        return {}  # it was embedded; that its size is not known is no reason to lose it


# ---- hashes ----


def _digest(content: str | bytes) -> str:
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def digest_item(item: Mapping[str, Any]) -> str:
    """Returns a hash of what an item embeds: its text, and the bytes of its images.

    Args:
        item: See ``Source.item``. An image at an address counts by its address: nobody asks whether it has changed.
    """
    state = hashlib.blake2b(digest_size=16)
    for part in _parts(item):
        state.update(len(part).to_bytes(8, "little") + part)
    return state.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    """Yields the bytes of a value, each kind of value with a mark of its own."""
    if isinstance(value, Mapping) and value.get("bytes") is not None:
        yield from (b"file", _hash_bytes(value["bytes"]))
    elif isinstance(value, Mapping):
        for name in sorted(value):
            yield name.encode()
            yield from _parts(value[name])
    elif isinstance(value, (list, tuple)):
        yield b"list%d" % len(value)
        yield from itertools.chain.from_iterable(map(_parts, value))
    elif isinstance(value, Path):
        yield from (b"file", _hash_file(value))
    elif isinstance(value, bytes):
        yield from (b"file", _hash_bytes(value))
    else:
        yield from (b"text", str(value).encode(errors="surrogatepass"))


def _hash_bytes(data: bytes) -> bytes:
    return hashlib.blake2b(data).digest()


def _hash_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").digest()
    except OSError:
        return b"missing"


def find_twice(ids: Iterable[str]) -> str | None:
    """Returns an id that stands twice, if there is one."""
    seen: set[str] = set()
    return next((name for name in ids if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]
