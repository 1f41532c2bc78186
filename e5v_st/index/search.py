"""Finds what ``e5v embed`` has stored: by words, by a picture, or by a picture with a change in words."""

from __future__ import annotations

import argparse
import base64
import html
import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from ..devices import check_device
from ..files import hash_file, printable, write_atomically
from ..model.images_e5v import image_suffixes, open_image
from ..provenance import DIGESTS, check_same_models, describe_models, find_origin, find_recorded
from ..tables import is_table, open_table
from .shards import MANIFEST, count_shards, is_done, read_manifest, refuse_old, shard_path

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

#: What a manifest must say to be searched.
JOB = ("source", "model", "adapter", "dtype", "quantize", "image_layout", "exif", "rows", "rows_per_shard", *DIGESTS)


#: What browsers show as it is; Pillow's names.
BROWSER_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "WEBP")
#: Longest side of a copy of any other image, in pixels.
SHOWN_SIZE = 512


@dataclass(frozen=True)
class Hit:
    """A row that was found: its number in the source, its id, and the cosine."""

    row: int
    name: str
    score: float


#: The rows of a shard that have an embedding: their numbers, ids, and embeddings ``(n, d)``.
Shard = tuple["np.ndarray", list[str], "np.ndarray"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``e5v search``."""
    parser.add_argument("index", type=Path, help="a folder that `e5v embed` wrote")
    parser.add_argument("query", nargs="?", help="words")
    parser.add_argument("--image", help="a picture (path or URL); with words: the picture with that change")
    parser.add_argument("--top", type=int, default=10, help="default: %(default)s")
    for kind in ("model", "adapter"):
        parser.add_argument(f"--{kind}", help=f"where the {kind} of the index is now, if it has moved")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    parser.add_argument("--html", type=Path, help="also write a page with the pictures found")


def run(args: argparse.Namespace) -> int:
    """Runs ``e5v search``: prints ranks, cosines and ids."""
    words = args.query if args.query and not args.query.isspace() else None
    if words is None and args.image is None:
        raise ValueError("got neither words nor --image: say what to search for")
    if args.top < 1:
        raise ValueError(f"got --top {args.top}, want at least 1")
    check_device(args.device)
    job = read_job(args.index)
    item: dict[str, Any] = {} if args.image is None else {"image": args.image}
    if words is not None:
        item["text"] = words
    shards = read_shards(args.index, job)
    query = embed_query(item, job, device=args.device, **find_models(args, job))
    found = nearest(query, shards, args.top)
    if not found:
        raise ValueError(f"{args.index} has no embeddings: every row failed, see the column 'error'")
    for rank, hit in enumerate(found, start=1):
        print(f"{rank:4}  {hit.score:.4f}  {printable(hit.name)}")
    if args.html is not None:
        label = " + ".join(filter(None, (args.image, words)))
        pictures = [show_picture(*place) for place in find_pictures(args.index, job, found)]
        write_atomically(args.html, render_page(label, found, pictures))
        print(f"page: {args.html.resolve()}, {sum(map(bool, pictures))} of {len(found)} with a picture")
    return 0


def read_job(index: Path) -> dict[str, Any]:
    """Reads the description of the job that made an index; raises ValueError where there is none, or half of one."""
    path = index / MANIFEST
    refuse_old(index)
    if not path.is_file():
        raise ValueError(f"{index} is no index: it has no {MANIFEST}. Make one with `e5v embed SOURCE {index}`")
    job = read_manifest(path)
    lacking = [name for name in JOB if name not in job]
    if lacking:
        raise ValueError(f"{path} does not say {', '.join(lacking)}: run the same `e5v embed` into a new folder")
    return job


def read_shards(index: Path, job: dict[str, Any]) -> Iterator[Shard]:
    """Returns what reads one shard after the other.

    Raises:
        ValueError: If shards are missing or damaged.
    """
    numbers = range(count_shards(job["rows"], job["rows_per_shard"]))
    missing = [number for number in numbers if not is_done(shard_path(index, number))]
    if missing:
        raise ValueError(f"{index} lacks {len(missing)} of {len(numbers)} shards: run the same `e5v embed` again")
    return (_read_shard(shard_path(index, number), number * job["rows_per_shard"]) for number in numbers)


def _read_shard(path: Path, first: int) -> Shard:
    import numpy as np
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["id", "embedding"])
    valid = table["embedding"].is_valid()
    rows = first + np.flatnonzero(valid.to_numpy())
    table = table.filter(valid)
    flat = table["embedding"].combine_chunks().flatten().to_numpy()
    return rows, table["id"].to_pylist(), flat.reshape(len(rows), -1) if len(rows) else np.zeros((0, 0), np.float32)


def find_models(args: argparse.Namespace, job: dict[str, Any]) -> dict[str, Path | None]:
    """Finds the model and the adapter that made an index, also where they have moved; raises ValueError for others."""
    model, adapter = (
        find_origin(named) if (named := getattr(args, kind)) else find_recorded(job, kind, args.index)
        for kind in ("model", "adapter")
    )
    check_same_models(job, describe_models(model, adapter, args.index), args.index)
    return {"model": model.folder, "adapter": adapter and adapter.folder}


def embed_query(
    item: dict[str, Any], job: dict[str, Any], *, model: Path, adapter: Path | None, device: str | None
) -> np.ndarray:
    """Embeds a query as the rows of an index were embedded.

    Args:
        item: See ``items_e5v.read_item``.
        job: What the manifest says.
        model: The model's folder.
        adapter: The adapter's.
        device: Of torch.
    """
    from .embed import load_for

    names = ("dtype", "quantize", "image_layout")
    args = argparse.Namespace(**{name: job[name] for name in names}, model=model, adapter=adapter, device=device)
    with _environment("E5V_EXIF", str(int(job["exif"]))):
        return load_for(args).encode(item)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Sets a variable of the environment for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        os.environ.update({} if before is None else {name: before})


def nearest(query: np.ndarray, shards: Iterable[Shard], top: int) -> list[Hit]:
    """Returns the rows with the highest cosine, best first; no more than one shard is in memory.

    Args:
        query: ``(d,)``, L2-normalised.
        shards: See :func:`read_shards`.
        top: Most rows to return.

    Raises:
        ValueError: If the embeddings are not as long as the query's.
    """
    best: list[Hit] = []
    for rows, names, embeddings in shards:
        if not len(rows):
            continue
        if embeddings.shape[1] != len(query):
            raise ValueError(f"the index has embeddings of {embeddings.shape[1]} numbers, the model of {len(query)}")
        found = _nearest_of(query, embeddings, min(top, len(rows)))
        best += [Hit(int(rows[place]), names[place], score) for place, score in found]
        best = sorted(best, key=lambda hit: -hit.score)[:top]
    return best


def _nearest_of(query: np.ndarray, embeddings: np.ndarray, top: int) -> list[tuple[int, float]]:
    """Places and scores of the best; by FAISS where it is installed."""
    import numpy as np

    try:
        import faiss
    except ImportError:
        scores = embeddings @ query
        places = np.argpartition(-scores, top - 1)[:top]
        return [(int(place), float(scores[place])) for place in places[np.argsort(-scores[places], kind="stable")]]
    scores, places = faiss.knn(query[None], embeddings, top, metric=faiss.METRIC_INNER_PRODUCT)
    return [(int(place), float(score)) for place, score in zip(places[0], scores[0], strict=True)]


# ---- what is shown ----


def find_pictures(index: Path, job: dict[str, Any], found: list[Hit]) -> list[tuple[Path, Any]]:
    """Returns for each hit the source's folder, and its picture's path in there, its bytes, or ``None``."""
    source, column = index / str(job["source"]), job.get("image_column")
    if source.is_dir():
        return [(source, hit.name) for hit in found]
    nothing = [(source.parent, None)] * len(found)
    if column is None or not is_table(source) or not source.is_file():
        return nothing
    if hash_file(source) != job.get("content"):  # a table that has changed would show somebody else's picture
        return nothing
    try:
        table = open_table(source)
        if column not in table.column_names:
            return nothing
        rows = table.select_columns([column])
        # In the order of the table, which is how Parquet is read fast
        cells = {row: rows[row][column] for row in sorted(hit.row for hit in found) if row < len(rows)}
    except ValueError:  # somebody else's index may name anything
        return nothing
    return [(source.parent, cells.get(hit.row)) for hit in found]


def show_picture(folder: Path, picture: Any) -> str:
    """Returns a picture as HTML, if it is one: an index may be somebody else's, and name any file of this machine."""
    from PIL import Image as PILImage

    if isinstance(picture, dict):
        picture = picture["bytes"] if picture.get("bytes") is not None else picture.get("path")
    try:
        if isinstance(picture, str):
            place, path = PurePath(picture), folder / picture
            if place.is_absolute() or ".." in place.parts or path.suffix.lower() not in image_suffixes():
                return ""
            picture = path.read_bytes() if path.is_file() else None
        if not isinstance(picture, bytes):
            return ""
        with PILImage.open(io.BytesIO(picture)) as image:
            kind = image.get_format_mimetype()
            if image.format not in BROWSER_FORMATS:
                kind, picture = "image/png", _as_png(image)
    except (OSError, ValueError, PILImage.DecompressionBombError):
        return ""
    return f'<img alt="" src="data:{kind};base64,{base64.b64encode(picture).decode()}">'


def _as_png(image: Image) -> bytes:
    """A small copy in a format that any browser shows, with the pixels that the model gets."""
    png = io.BytesIO()
    copy = open_image(image)
    copy.thumbnail((SHOWN_SIZE, SHOWN_SIZE))
    copy.save(png, "PNG")
    return png.getvalue()


def render_page(query: str, found: list[Hit], pictures: list[str]) -> str:
    """A page with the results and their pictures, or the ids alone."""
    figures = "".join(
        f"<figure>{picture}<figcaption><b>{rank}. {hit.score:.3f}</b><br>{html.escape(hit.name)}</figcaption></figure>"
        for rank, (hit, picture) in enumerate(zip(found, pictures, strict=True), start=1)
    )
    return (
        '<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        "<title>E5-V search</title><style>body{font:16px system-ui,sans-serif;margin:2rem}"
        "main{display:flex;flex-wrap:wrap;gap:1rem}figure{margin:0;width:12rem;overflow-wrap:anywhere}"
        f"img{{max-width:12rem;max-height:12rem}}</style><h1>{html.escape(query)}</h1><main>{figures}</main></html>\n"
    )
