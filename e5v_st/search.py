"""Finds what ``e5v embed`` has stored: by words, by a picture, or by a picture with a change in words."""

from __future__ import annotations

import argparse
import base64
import html
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from .embed import MANIFEST, is_done, read_manifest, shard_path
from .items_e5v import IMAGE_SUFFIXES

if TYPE_CHECKING:
    import numpy as np

#: What a manifest must say to be searched.
JOB = ("source", "model", "adapter", "dtype", "quantize", "image_layout", "rows", "rows_per_shard")
#: Rows that are compared at once where FAISS is not installed.
BLOCK = 65536


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``e5v search``."""
    parser.add_argument("index", type=Path, help="a folder that `e5v embed` wrote")
    parser.add_argument("query", nargs="?", help="words")
    parser.add_argument("--image", help="a picture (path or URL); with words: the picture with that change")
    parser.add_argument("--top", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    parser.add_argument("--html", type=Path, help="also write a page with the pictures found")


def run(args: argparse.Namespace) -> int:
    """Runs ``e5v search``: prints ranks, cosines and ids."""
    words = args.query if args.query and not args.query.isspace() else None
    if words is None and args.image is None:
        raise ValueError("got neither words nor --image: say what to search for")
    if args.top < 1:
        raise ValueError(f"got --top {args.top}, want at least 1")
    job = read_job(args.index)
    item: dict[str, Any] = {} if args.image is None else {"image": args.image}
    if words is not None:
        item["text"] = words
    ids, embeddings = read_index(args.index, job)
    query = embed_query(item, job, args.device)
    found = [(ids[row], score) for row, score in nearest(query, embeddings, args.top)]
    for rank, (name, score) in enumerate(found, start=1):
        print(f"{rank:4}  {score:.4f}  {printable(name)}")
    if args.html is not None:
        label = " + ".join(filter(None, (args.image, words)))
        args.html.write_text(render_page(label, found, Path(job["source"])), encoding="utf8")
        print(f"with pictures: {args.html.resolve()}")
    return 0


def read_job(index: Path) -> dict[str, Any]:
    """Reads the description of the job that made an index; raises ValueError where there is none, or half of one."""
    path = index / MANIFEST
    if not path.is_file():
        raise ValueError(f"{index} is no index: it has no {MANIFEST}. Make one with `e5v embed SOURCE {index}`")
    job = read_manifest(path)
    lacking = [name for name in JOB if name not in job]
    if lacking:
        raise ValueError(f"{path} does not say {', '.join(lacking)}: run the same `e5v embed` into a new folder")
    return job


def read_index(index: Path, job: dict[str, Any]) -> tuple[list[str], np.ndarray]:
    """Reads ids and embeddings ``(n, d)`` of all rows that have one.

    Raises:
        ValueError: If shards are missing or damaged.
    """
    import numpy as np

    shards = range(-(-job["rows"] // job["rows_per_shard"]))
    missing = [number for number in shards if not is_done(shard_path(index, number))]
    if missing:
        raise ValueError(f"{index} lacks {len(missing)} of {len(shards)} shards: run the same `e5v embed` again")
    parts = list(_read_shards(index, shards))
    ids = [name for names, _ in parts for name in names]
    if not ids:
        raise ValueError(f"{index} has no embeddings: every row failed, see the column 'error'")
    return ids, np.concatenate([block for _, block in parts if len(block)])


def _read_shards(index: Path, shards: range) -> Iterator[tuple[list[str], np.ndarray]]:
    import numpy as np
    import pyarrow.parquet as pq

    for number in shards:
        table = pq.read_table(shard_path(index, number), columns=["id", "embedding"])
        table = table.filter(table["embedding"].is_valid())
        flat = table["embedding"].combine_chunks().flatten().to_numpy()
        yield table["id"].to_pylist(), flat.reshape(len(table), -1) if len(table) else np.zeros((0, 0), np.float32)


def embed_query(item: dict[str, Any], job: dict[str, Any], device: str | None) -> np.ndarray:
    """Embeds a query with the model that made the index."""
    from .embed import load_for

    names = ("model", "adapter", "dtype", "quantize", "image_layout")
    args = argparse.Namespace(**{name: job.get(name) for name in names})
    args.device = device
    return load_for(args).encode(item)


def nearest(query: np.ndarray, embeddings: np.ndarray, top: int) -> list[tuple[int, float]]:
    """Rows with the highest cosine, best first; with FAISS where installed, else exactly, block by block."""
    import numpy as np

    top = min(top, len(embeddings))
    try:
        import faiss
    except ImportError:
        blocks = [embeddings[start : start + BLOCK] @ query for start in range(0, len(embeddings), BLOCK)]
        scores = np.concatenate(blocks)
        rows = np.argpartition(-scores, top - 1)[:top]
        rows = rows[np.argsort(-scores[rows], kind="stable")]
        return [(int(row), float(scores[row])) for row in rows]
    index = faiss.IndexFlatIP(embeddings.shape[1])
    index.add(np.ascontiguousarray(embeddings))
    scores, rows = index.search(query[None], top)
    return [(int(row), float(score)) for row, score in zip(rows[0], scores[0], strict=True)]


def printable(name: str) -> str:
    """A name on one line: what would move the cursor is written as an escape."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in name)


def render_page(query: str, found: list[tuple[str, float]], folder: Path) -> str:
    """A page with the results; pictures below the folder are shown, of all else the ids."""
    figures = "".join(
        f"<figure>{_picture(folder, name)}<figcaption><b>{rank}. {score:.3f}</b><br>{html.escape(name)}</figcaption>"
        "</figure>"
        for rank, (name, score) in enumerate(found, start=1)
    )
    return (
        '<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        "<title>E5-V search</title><style>body{font:16px system-ui,sans-serif;margin:2rem}"
        "main{display:flex;flex-wrap:wrap;gap:1rem}figure{margin:0;width:12rem;overflow-wrap:anywhere}"
        f"img{{max-width:12rem;max-height:12rem}}</style><h1>{html.escape(query)}</h1><main>{figures}</main></html>\n"
    )


def _picture(folder: Path, name: str) -> str:
    """The picture itself, if it is one: an index may be somebody else's, and name any file of this machine."""
    from PIL import Image

    place, path = PurePath(name), folder / name
    if place.is_absolute() or ".." in place.parts or path.suffix.lower() not in IMAGE_SUFFIXES or not path.is_file():
        return ""
    try:
        with Image.open(path) as image:
            kind = image.get_format_mimetype()
    except (OSError, Image.DecompressionBombError):
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="" src="data:{kind};base64,{data}">'
