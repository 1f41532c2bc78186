"""Hard negatives: for each anchor of a training table, what an index holds that is near, but not its positive.

    e5v mine pairs.csv index/ --out mined.parquet --range 10:100 --margin 0.05

What is nearest to an anchor is often right as well, so the first ranks are passed over, and so is all that is not
farther from the anchor than its positive, by a margin:

    rank    1     2    …   9   |  10    11    12   …  100  |
    score  0.93  0.91     0.84 | 0.83  0.78  0.77          |     positive 0.85, margin 0.05: above 0.80 may be right too
           passed over         | no    this one first      |

The index is a folder of ``e5v embed``; its model embeds anchors and positives.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e5v_st.options import add_device

if TYPE_CHECKING:
    import numpy as np

#: From this cosine to the positive on, a row of the index is the positive itself.
SAME = 0.9999
#: Anchors that are compared with a shard at once.
ANCHORS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``e5v mine``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.add_argument("data", help="pairs: a table, .tar shards or a hub dataset with the columns of e5v train")
    parser.add_argument("index", type=Path, help="a folder of e5v embed, whose rows are the candidates")
    parser.add_argument("--out", type=Path, required=True, help="the table to write (.parquet)")
    parser.add_argument("--columns", nargs="*", default=[], metavar="ROLE=COLUMN", help="as anchor_text=title")
    parser.add_argument("--images", default="", help="a folder, or a table with id and image, for columns of images")
    parser.add_argument("--range", default="10:100", help="ranks that negatives are taken from (default: %(default)s)")
    parser.add_argument("--margin", type=float, default=0.05, help="less than the positive's (default: %(default)s)")
    parser.add_argument(
        "--negatives", type=int, default=1, help="of each row; rows with fewer are left out (default: %(default)s)"
    )
    for kind in ("model", "adapter"):
        parser.add_argument(f"--{kind}", help=f"where the {kind} of the index is now, if it has moved")
    add_device(parser)


@dataclass(frozen=True)
class Found:
    """The negatives of one row: their numbers in the index and their scores, best first; and what was passed over.

    Attributes:
        rows: Numbers of rows of the index's source.
        scores: Cosines to the anchor.
        seen: Candidates within the ranks.
        suspects: Those of them that may be right as well.
    """

    rows: Sequence[int]
    scores: Sequence[float]
    seen: int
    suspects: int


def run(args: argparse.Namespace) -> int:
    """Runs ``e5v mine``: writes the rows for which there is a negative, and prints how many may be false.

    Raises:
        ValueError: If an argument, the data or the index is not right.
    """
    from e5v_st.index.search import find_models, open_model, read_job

    from .collate import read_cell
    from .item_rows import load_items
    from .sources import Source

    first, last = read_range(args.range)
    if args.negatives < 1:
        raise ValueError(f"got --negatives {args.negatives}, want at least 1")
    if args.out.suffix != ".parquet":
        raise ValueError(f"got --out {args.out}, want a .parquet file")
    columns = dict(pair.split("=", 1) if "=" in pair else (pair, pair) for pair in args.columns)
    job = read_job(args.index)
    model, adapter = find_models(args, job)
    candidates = open_candidates(args.index, job)
    data, report = load_items(Source(args.data, columns=columns, images=args.images))
    for line in report.lines():
        print(line)
    with open_model(job, model=model, adapter=adapter, device=args.device) as loaded:
        how = {"show_progress_bar": True, "convert_to_numpy": True}
        anchors, positives = (
            loaded.encode([read_cell(cell) for cell in data[role]], **how) for role in ("anchor", "positive")
        )
    found = mine(anchors, positives, args.index, job, first, last, args.margin, args.negatives)
    rows = write_mined(args.out, data, found, candidates, args.negatives)
    seen, suspects = (sum(getattr(each, name) for each in found) for name in ("seen", "suspects"))
    share = 100 * suspects / max(seen, 1)
    print(
        f"{args.out}: {rows:,} of {len(data):,} rows have {args.negatives} negative(s). Of {seen:,} candidates within "
        f"the ranks {args.range}, {suspects:,} ({share:.1f} %) may be right as well and were passed over"
    )
    return 0


def read_range(text: str) -> tuple[int, int]:
    """Returns the ranks that ``10:100`` names; raises ValueError for anything else.

    Example:
        >>> read_range("10:100")
        (10, 100)
    """
    first, mark, last = text.partition(":")
    if not (mark and first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise ValueError(f"got --range {text}, want two ranks from 1, such as 10:100")
    return int(first), int(last)


def mine(
    anchors: np.ndarray,
    positives: np.ndarray,
    index: Path,
    job: dict[str, Any],
    first: int,
    last: int,
    margin: float,
    wanted: int,
) -> list[Found]:
    """Finds the negatives of rows.

    Args:
        anchors: Their embeddings ``(n, d)``.
        positives: Those of the positives ``(n, d)``.
        index: A folder of ``e5v embed``.
        job: What its manifest says.
        first: The first rank that a negative may have, from 1, where the positive itself has none.
        last: The last one.
        margin: By how much a negative must be farther from the anchor than the positive.
        wanted: Negatives of a row, at most.
    """
    import numpy as np

    from e5v_st.index.nearest import unit

    anchors, positives = unit(anchors), unit(positives)
    own = (anchors * positives).sum(1)
    found = []
    for start in range(0, len(anchors), ANCHORS):
        part = slice(start, start + ANCHORS)
        rows, scores = _nearest(anchors[part], positives[part], index, job, last)
        for names, values, right in zip(rows, scores, own[part], strict=True):
            there = np.isfinite(values[first - 1 : last])
            ranked, near = names[first - 1 : last][there], values[first - 1 : last][there]
            clear = near < right - margin
            taken = np.flatnonzero(clear)[:wanted]
            found.append(Found(ranked[taken].tolist(), near[taken].tolist(), len(near), int((~clear).sum())))
    return found


def _nearest(
    anchors: np.ndarray, positives: np.ndarray, index: Path, job: dict[str, Any], top: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and cosines ``(n, top)`` of what is nearest to anchors and is not the positive; -inf where there is less."""
    import numpy as np

    from e5v_st.index.nearest import read_shards, unit

    rows = np.zeros((len(anchors), 0), np.int64)
    scores = np.zeros((len(anchors), 0), np.float32)
    for numbers, _, embeddings in read_shards(index, job):
        embeddings = unit(embeddings)
        own = anchors @ embeddings.T
        own[positives @ embeddings.T > SAME] = -np.inf
        scores = np.concatenate([scores, own], axis=1)
        rows = np.concatenate([rows, np.broadcast_to(numbers, own.shape)], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :top]
        scores, rows = np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)
    return rows, scores


def open_candidates(index: Path, job: dict[str, Any]) -> Any:
    """Returns the source that an index was made from; raises ValueError if it has changed since."""
    from e5v_st.index.source import open_source

    local = index / str(job["source"])
    name = str(local) if local.exists() else str(job["source"])
    columns = {"image": job.get("image_column"), "text": job.get("text_column")}
    source = open_source(name, **{kind: value for kind, value in columns.items() if value})
    if source.content != job["content"]:
        raise ValueError(f"{name} has changed since {index} was made: run e5v embed into a new folder")
    return source


def write_mined(out: Path, data: Any, found: Sequence[Found], candidates: Any, wanted: int) -> int:
    """Writes the rows that have the wanted negatives, as a table for ``e5v train``; returns their number."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from e5v_st.files import write_atomically

    roles = ["negative"] if wanted == 1 else [f"negative_{number + 1}" for number in range(wanted)]
    table: list[dict[str, Any]] = []
    for row, negatives in zip(data, found, strict=True):
        if len(negatives.rows) < wanted:
            continue
        written = {**_columns("anchor", row["anchor"]), **_columns("positive", row["positive"])}
        for role, number, score in zip(roles, negatives.rows, negatives.scores, strict=True):
            written |= _columns(role, _as_cell(candidates.item(number)))
            written |= {f"{role}_id": candidates.ids[number], f"{role}_cosine": score}
        table.append(written)
    if not table:
        raise ValueError(f"no row has {wanted} negative(s): widen --range, or lower --margin or --negatives")
    sink = pa.BufferOutputStream()
    pq.write_table(_without_empty(pa.Table.from_pylist(table)), sink)
    write_atomically(out, sink.getvalue().to_pybytes())
    return len(table)


def _columns(role: str, cell: Any) -> dict[str, Any]:
    if isinstance(cell, str):
        return {f"{role}_text": cell, f"{role}_image": None}
    images = [{"bytes": image["bytes"], "path": image["path"]} for image in cell["images"]]
    return {f"{role}_text": cell["text"], f"{role}_image": images or None}


def _as_cell(item: dict[str, Any]) -> dict[str, Any]:
    image = item.get("image")
    images = image if isinstance(image, list) else [] if image is None else [image]
    return {"text": item.get("text"), "images": [_as_image(each) for each in images]}


def _as_image(image: Any) -> dict[str, Any]:
    if isinstance(image, (bytes, bytearray)):
        return {"bytes": bytes(image), "path": None}
    if isinstance(image, dict):
        return {"bytes": image.get("bytes"), "path": image.get("path")}
    return {"bytes": None, "path": str(Path(image).absolute()) if isinstance(image, Path) else str(image)}


def _without_empty(table: Any) -> Any:
    return table.drop_columns([name for name in table.column_names if table[name].null_count == len(table)])
