"""Speed of a table of LanceDB: searches of 200,000 random embeddings, and 100 new images beside 10,000 that are there.

Random embeddings are the hardest case for an index: no row is near another. Times of a search are those of
``search_table`` on a table that is open, after a few searches; recall is against NumPy's exact ranks.

The 10,000 images get random embeddings, as only their hashes matter; the 100 new ones are embedded by the small model.

    taskset -c 0,1 python benchmarks/index_speed.py          # writes benchmarks/results/index_speed.json
    python benchmarks/index_speed.py --rows 1000000          # by hand
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

OUT = Path(__file__).parent / "results" / "index_speed.json"
DIMENSION, QUERIES, TOP = 256, 200, 10
#: Rows that are written together.
PART = 50_000


def make_table(path: Path, rows: int) -> tuple[Any, Any, float]:
    """Writes random embeddings as ``e5v index`` would, and makes the index; returns table, embeddings and seconds."""
    import numpy as np
    import pyarrow as pa

    from e5v_st.index.lance_table import JOB, create, keep_indices

    vectors = np.random.default_rng(0).normal(size=(rows, DIMENSION)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    job = dict.fromkeys(JOB) | {"format": 1, "dimension": DIMENSION, "columns": {"price": "int"}}
    table = create(path, job)
    for start in range(0, rows, PART):
        part = vectors[start : start + PART]
        numbers = range(start, start + len(part))
        columns = {
            "id": list(map(str, numbers)),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), DIMENSION),
            "price": [number % 1000 for number in numbers],
        }
        empty = {name: pa.nulls(len(part)) for name in table.schema.names if name not in columns}
        both = {**columns, **empty}
        table.add(pa.table({name: both[name] for name in table.schema.names}).cast(table.schema))
    began = time.perf_counter()
    keep_indices(table, path)
    return table, vectors, time.perf_counter() - began


def measure_search(table: Any, vectors: Any, where: str | None = None, exact: bool = False) -> dict[str, float]:
    """Returns the percentiles of the seconds of a search, and recall@10."""
    import numpy as np

    from e5v_st.index.table_search import search_table

    allowed = np.arange(len(vectors)) % 1000 < 100 if where else np.ones(len(vectors), bool)
    queries = np.random.default_rng(1).normal(size=(QUERIES, DIMENSION)).astype(np.float32)
    seconds, found = [], 0
    for number, query in enumerate(queries):
        began = time.perf_counter()
        rows = search_table(table, query, top=TOP, where=where, exact=exact)
        if number >= 5:  # the first ones read the index
            seconds.append(time.perf_counter() - began)
        scores = np.where(allowed, vectors @ query, -np.inf)
        best = {str(place) for place in np.argpartition(-scores, TOP)[:TOP]}
        found += len(best & {row["id"] for row in rows})
    return {
        "p50_ms": float(np.percentile(seconds, 50) * 1e3),
        "p95_ms": float(np.percentile(seconds, 95) * 1e3),
        "recall_at_10": found / (QUERIES * TOP),
    }


def _random_embeddings(model: Any, items: Any, **_: Any) -> Iterator[Any]:
    import numpy as np

    from e5v_st.encoder import Encoded

    dice = np.random.default_rng(2)
    for number, _item in enumerate(items):
        yield Encoded(number, dice.normal(size=192).astype(np.float32))


def _write_images(folder: Path, count: int, seed: int) -> None:
    import numpy as np
    from PIL import Image

    folder.mkdir(exist_ok=True)
    dice = np.random.default_rng(seed)
    for number in range(count):
        pixels = dice.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}-{number:05}.png")


def measure_growth(root: Path, there: int, new: int) -> dict[str, Any]:
    """Adds images to a table of many, and the same number to a table of as few; returns seconds and their ratio."""
    from e5v_st import encoder
    from e5v_st.cli import main

    stock, counted = encoder.stream_all, []

    def count(model: Any, items: Any, **more: Any) -> Any:
        items = list(items)
        counted.append(len(items))
        return stock(model, items, **more)

    def index(folder: Path) -> float:
        began = time.perf_counter()
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            assert main(["index", str(folder), f"{folder}.lance", "--model", "e5v-tiny", "--device", "cpu"]) == 0
        return time.perf_counter() - began

    seconds = {}
    for name, before in (("few", new), ("many", there)):
        folder = root / name
        _write_images(folder, before, seed=0)
        with mock.patch.object(encoder, "stream_all", _random_embeddings):
            index(folder)
        unchanged = index(folder)
        _write_images(folder, new, seed=1)
        with mock.patch.object(encoder, "stream_all", count):
            seconds[name] = {"rows_before": before, "nothing_new": unchanged, "seconds": index(folder)}
    ratio = seconds["many"]["seconds"] / seconds["few"]["seconds"]
    return {**seconds, "embedded": counted, "ratio": ratio}


def main() -> None:
    """Measures, prints, and writes JSON."""
    import lancedb

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--there", type=int, default=10_000)
    parser.add_argument("--new", type=int, default=100)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    machine = f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}"
    found: dict[str, Any] = {"lancedb": lancedb.__version__, "machine": machine, "rows": args.rows}
    with tempfile.TemporaryDirectory() as root:
        found["add"] = measure_growth(Path(root), args.there, args.new)
        table, vectors, found["index_seconds"] = make_table(Path(root) / "random.lance", args.rows)
        found["search"] = measure_search(table, vectors)
        found["search_with_a_filter"] = measure_search(table, vectors, where="price < 100")
        found["search_exact"] = measure_search(table, vectors, exact=True)
    print(json.dumps(found, indent=2))
    args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
