"""The rows of an index that are nearest to a query, exactly, with one shard in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .shards import count_shards, is_whole, job_of, shard_path

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Hit:
    """A row that was found: its number in the source, its id, and the cosine."""

    row: int
    name: str
    score: float


#: The rows of a shard that have an embedding: their numbers, ids, and embeddings ``(n, d)``.
Shard = tuple["np.ndarray", list[str], "np.ndarray"]


def read_shards(index: Path, job: dict[str, Any]) -> Iterator[Shard]:
    """Returns what reads one shard after the other.

    Raises:
        ValueError: If shards are missing, damaged, or of another job.
    """
    numbers = range(count_shards(job["rows"], job["rows_per_shard"]))
    missing = [number for number in numbers if not is_whole(shard_path(index, number))]
    if missing:
        raise ValueError(f"{index} lacks {len(missing)} of {len(numbers)} shards: run the same `e5v embed` again")
    others = [path.name for path in (shard_path(index, n) for n in numbers) if job_of(path) != job["job_sha256"]]
    if others:
        raise ValueError(f"{index} holds shards of another job ({', '.join(others)}): run the same `e5v embed` again")
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


def nearest(query: np.ndarray, shards: Iterable[Shard], top: int) -> list[Hit]:
    """Returns the rows with the highest cosine, best first; no more than one shard is in memory.

    Args:
        query: ``(d,)``.
        shards: See :func:`read_shards`.
        top: Maximum number of rows to return.

    Raises:
        ValueError: If the embeddings are not as long as the query's, or are not finite.
    """
    import numpy as np

    if not np.isfinite(query).all():
        raise ValueError("the query's embedding is not finite: load the model in bfloat16 or float32")
    best: list[Hit] = []
    for rows, names, embeddings in shards:
        if not len(rows):
            continue
        if embeddings.shape[1] != len(query):
            raise ValueError(f"the index has embeddings of {embeddings.shape[1]} numbers, the model of {len(query)}")
        broken = ~np.isfinite(embeddings).all(axis=1)
        if broken.any():
            raise ValueError(
                f"the index has {broken.sum()} embeddings that are not finite, the first in row {rows[broken][0]}: "
                "embed again in bfloat16 or float32, into a new folder"
            )
        found = _nearest_of(unit(query), unit(embeddings), min(top, len(rows)))
        best += [Hit(int(rows[place]), names[place], score) for place, score in found]
        best = sorted(best, key=lambda hit: -hit.score)[:top]
    return best


def unit(vectors: np.ndarray) -> np.ndarray:
    """Returns vectors ``(…, d)`` of length 1: those of a model that cuts or does not normalise them have another."""
    import numpy as np

    lengths: np.ndarray = np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    units: np.ndarray = vectors / lengths
    return units


def _nearest_of(query: np.ndarray, embeddings: np.ndarray, top: int) -> list[tuple[int, float]]:
    """Returns places and scores of the best."""
    import numpy as np

    scores = embeddings @ query
    places = np.argpartition(-scores, top - 1)[:top]
    return [(int(place), float(scores[place])) for place in places[np.argsort(-scores[places], kind="stable")]]
