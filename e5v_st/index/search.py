"""Finds what ``e5v embed`` or ``e5v index`` has stored: by a text, an image, or an image with a modification text."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..devices import check_device
from ..files import printable, write_atomically
from ..model.prompts_e5v import IMAGE, SENTENCE
from ..options import add_device, check_unicode, find_prompt, load_for
from ..provenance import find_origin
from ..starting import import_for_good
from .lance_table import is_lance
from .manifest import DIGESTS, MANIFEST, check_same_models, describe_models, find_recorded, read_manifest, refuse_old
from .nearest import Hit, nearest, read_shards
from .page import find_images, render_page, show_image
from .table_search import MODES, open_for_search, search_table

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer

#: What a manifest must say to be searched.
JOB = (
    *("source", "model", "adapter", "dtype", "quantize", "image_layout", "max_image_tokens", "exif", "prompt"),
    *("image_column", "text_column", "rows", "rows_per_shard", "job_sha256", *DIGESTS),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``e5v search``."""
    parser.add_argument("index", type=Path, help="a folder that `e5v embed` wrote, or a table of `e5v index`")
    parser.add_argument("query", nargs="?", help="a text")
    parser.add_argument("--image", help="an image (path or URL). With a text: the image, changed as the text says")
    parser.add_argument(
        "--prompt", help="a prompt's name or a template (default: the index's, where it is for what the query holds)"
    )
    parser.add_argument("--top", type=int, default=10, help="default: %(default)s")
    for kind in ("model", "adapter"):
        parser.add_argument(f"--{kind}", help=f"where the {kind} of the index is now, if it has moved")
    add_device(parser)
    parser.add_argument("--html", type=Path, help="also write a page with the images found")
    parser.add_argument("--json", action="store_true", help="print the rows found as JSON")
    table = parser.add_argument_group("of tables alone")
    table.add_argument("--where", help='a condition in SQL on the columns, as "width > 800"')
    table.add_argument(
        "--mode",
        choices=MODES,
        default="vector",
        help="by the embedding, by words (full text), or both (default: vector)",
    )
    table.add_argument("--in-column", default="text", help="the column that words are looked for in (default: text)")
    table.add_argument("--exact", action="store_true", help="compare every row, whatever index there is")


def run(args: argparse.Namespace) -> int:
    """Runs ``e5v search``: prints ranks, cosines and ids."""
    text = check_unicode(args.query, "the query") if args.query and not args.query.isspace() else None
    if text is None and args.image is None:
        raise ValueError("got neither a text nor --image: say what to search for")
    if args.top < 1:
        raise ValueError(f"got --top {args.top}, want at least 1")
    check_device(args.device)
    item: dict[str, Any] = {} if args.image is None else {"image": args.image}
    if text is not None:
        item["text"] = text
    if is_lance(args.index):
        return _run_on_table(args, item)
    if args.where is not None or args.mode != "vector":
        raise ValueError(
            f"{args.index} is a folder of shards, which --where and --mode are not for: make a table with "
            f"`e5v index {args.index} TABLE.lance`"
        )
    job = read_job(args.index)
    shards = read_shards(args.index, job)
    model, adapter = find_models(args, job)
    query = _embed(args, item, job, model, adapter)
    found = nearest(query, shards, args.top)
    if not found:
        raise ValueError(f"{args.index} has no embeddings: every row failed, see the column 'error'")
    _print_hits(args, [{"score": hit.score, "id": hit.name} for hit in found])
    if args.html is not None:
        _write_page(args, found, [show_image(*place) for place in find_images(args.index, job, found)])
    return 0


def _run_on_table(args: argparse.Namespace, item: dict[str, Any]) -> int:
    """Runs ``e5v search`` on a table of LanceDB; see ``table_search``."""
    if args.mode != "vector" and "text" not in item:
        raise ValueError(f"got --mode {args.mode} without a text: say what to search for")
    table, job = open_for_search(args.index)
    query = None
    if args.mode != "text":
        model, adapter = find_models(args, job)
        query = _embed(args, item, job, model, adapter)
    rows = search_table(
        table,
        query,
        item.get("text"),
        mode=args.mode,
        where=args.where,
        top=args.top,
        text_column=args.in_column,
        thumbnails=args.html is not None and bool(job["thumbnails"]),
        exact=args.exact,
    )
    images = [show_image(Path(), row.pop("thumbnail", None)) for row in rows]
    if not rows:
        print("[]" if args.json else f"{args.index} has no such rows")
        return 0
    _print_hits(args, rows)
    if args.html is not None:
        _write_page(args, [Hit(place, row["id"], row["score"]) for place, row in enumerate(rows)], images)
    return 0


def _embed(
    args: argparse.Namespace, item: dict[str, Any], job: dict[str, Any], model: Path, adapter: Path | None
) -> np.ndarray:
    """Embeds the query of a command line. With ``--json``, notes go where they do not mix with the result."""
    with redirect_stdout(sys.stderr if args.json else sys.stdout):
        query: np.ndarray = embed_query(item, job, model=model, adapter=adapter, device=args.device, prompt=args.prompt)
        return query


def _print_hits(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    if args.json:
        print(json.dumps([{"rank": rank, **row} for rank, row in enumerate(rows, start=1)], indent=2))
        return
    for rank, row in enumerate(rows, start=1):
        print(f"{rank:4}  {row['score']:.4f}  {printable(row['id'])}")


def _write_page(args: argparse.Namespace, found: list[Hit], images: list[str]) -> None:
    label = " + ".join(filter(None, (args.image, args.query)))
    write_atomically(args.html, render_page(label, found, images))
    where = sys.stderr if args.json else sys.stdout
    print(f"page: {args.html.resolve()}, {sum(map(bool, images))} of {len(found)} with an image", file=where)


def read_job(index: Path) -> dict[str, Any]:
    """Reads the description of the job that made an index; raises ValueError if there is none, or half of one."""
    path = index / MANIFEST
    refuse_old(index)
    if not path.is_file():
        raise ValueError(f"{index} is not an index: it has no {MANIFEST}. Make one with `e5v embed SOURCE {index}`")
    job = read_manifest(path)
    lacking = [name for name in JOB if name not in job]
    if lacking:
        raise ValueError(f"{path} does not say {', '.join(lacking)}: run the same `e5v embed` into a new folder")
    return job


def find_models(args: argparse.Namespace, job: dict[str, Any]) -> tuple[Path, Path | None]:
    """Finds the model and the adapter that made an index, even if they have moved; raises ValueError for others."""
    model, adapter = (
        find_origin(named) if (named := getattr(args, kind)) else find_recorded(job, kind, args.index)
        for kind in ("model", "adapter")
    )
    if model is None:
        raise ValueError(f"{args.index / MANIFEST} does not say which model made the index: say with --model")
    check_same_models(job, describe_models(model, adapter, args.index), args.index)
    return model.folder, adapter.folder if adapter else None


def embed_query(
    item: dict[str, Any],
    job: dict[str, Any],
    *,
    model: Path,
    adapter: Path | None,
    device: str | None,
    prompt: str | None = None,
) -> np.ndarray:
    """Embeds a query as the rows of an index were embedded.

    Args:
        item: See ``items_e5v.read_item``.
        job: What the manifest says.
        model: The model's folder.
        adapter: The adapter's.
        device: Of torch.
        prompt: A prompt's name or a template. With ``None``, it is the index's where that is for such an item.
    """
    with open_model(job, model=model, adapter=adapter, device=device) as loaded:
        return embed_with(loaded, item, job, prompt)


def embed_with(model: SentenceTransformer, item: dict[str, Any], job: dict[str, Any], prompt: str | None) -> np.ndarray:
    """Embeds a query with a model that is loaded; see :func:`embed_query`."""
    own = find_prompt(model, prompt)
    of_index = find_prompt(model, job["prompt"])
    if own is None and of_index is not None:
        if _fits(of_index, item, job):
            own = of_index
        else:
            print(
                f"the index was made with --prompt {printable(job['prompt'])}, which is not for such a query: it "
                "gets the default prompt; --prompt gives it another"
            )
    embedding: np.ndarray = model.encode(item, prompt=own)
    return embedding


@contextmanager
def open_model(job: dict[str, Any], *, model: Path, adapter: Path | None, device: str | None) -> Iterator[Any]:
    """Loads the model of an index with its settings, for as long as the context lasts; see :func:`embed_query`."""
    names = ("dtype", "quantize", "image_layout", "max_image_tokens")
    args = argparse.Namespace(**{name: job[name] for name in names}, model=model, adapter=adapter, device=device)
    import_for_good("sentence_transformers")  # most of the time from typing a search to its first result
    with _environment("E5V_EXIF", str(int(job["exif"]))):
        yield load_for(args)


def _fits(prompt: str, item: dict[str, Any], job: dict[str, Any]) -> bool:
    """Whether a prompt of an index is for a query: for what both hold, a text, an image, or both.

    Args:
        prompt: A template, or an instruction that is put in front of a text or an image.
        item: The query.
        job: What the manifest says of the index.
    """
    marks = {name for name, mark in (("text", SENTENCE), ("image", IMAGE)) if mark in prompt}
    if marks:
        return marks == set(item)
    columns = {name for name in ("text", "image") if job[f"{name}_column"] is not None}
    return set(item) <= (columns or {"image"})  # a folder of images has no columns


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
