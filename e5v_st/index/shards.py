"""The files of an embedding job: a manifest that tells what they were made from, and Parquet shards with checksums.

A shard is written to a temporary name, renamed, and then gets its checksum beside it: a shard with a right checksum is
done, any other is made again. Names other than those of shards begin with ``_`` or ``.``, which readers of a folder of
Parquet files skip.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import hash_file, write_atomically
from ..provenance import DIGESTS, NAMES, check_same_models

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

MANIFEST = "_manifest.json"
#: Before the first release. Such a manifest does not know its weights: its index can be neither continued nor searched.
OLD_MANIFEST = "manifest.json"


# ---- the manifest ----


def check_job(out: Path, job: dict[str, Any], *, repaired: bool = False) -> None:
    """Raises ValueError if a folder holds another job; where source and model lie does not matter, what they hold does.

    Args:
        out: The folder.
        job: This job.
        repaired: Whether the content may have changed, but for the rows' names.
    """
    refuse_old(out)
    if not (out / MANIFEST).is_file():
        return
    there = read_manifest(out / MANIFEST)
    may_change = {"source", *NAMES, *DIGESTS, *(["content"] if repaired else [])}
    changed = sorted(name for name in job if name not in may_change and there.get(name) != job[name])
    if changed == ["content"]:
        raise ValueError(
            f"{out} was made from another content of {job['source']}: choose another folder, or delete this one; "
            "--retry-errors computes only the rows again that have an error"
        )
    if changed:
        what = ", ".join(f"{name} {there.get(name)!r} (now {job[name]!r})" for name in changed)
        raise ValueError(f"{out} holds another job: {what}. Choose another folder, or delete this one.")
    check_same_models(there, job, out)


def refuse_old(out: Path) -> None:
    """Raises ValueError if a folder holds an index that does not know its weights."""
    if (out / OLD_MANIFEST).is_file() and not (out / MANIFEST).is_file():
        raise ValueError(
            f"{out} holds an index of an older version ({OLD_MANIFEST}), which does not know the weights that made it: "
            "embed into a new folder, or delete this one"
        )


def start_job(out: Path, job: dict[str, Any], *, repaired: bool = False) -> None:
    """Writes the manifest, where it is not there as it should be; see :func:`check_job`.

    Raises:
        ValueError: If another job has begun in the folder meanwhile.
    """
    out.mkdir(parents=True, exist_ok=True)
    check_job(out, job, repaired=repaired)
    path = out / MANIFEST
    if not path.is_file() or read_manifest(path) != job:
        write_atomically(path, json.dumps(job, indent=2))


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads the description of a job; raises ValueError, naming the file, if it is none."""
    try:
        job = json.loads(path.read_text(encoding="utf8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete the folder, or choose another") from error
    if not isinstance(job, dict):
        raise ValueError(f"{path} holds a {type(job).__name__}, want the description of a job")
    return job


# ---- shards ----


def count_shards(rows: int, rows_per_shard: int) -> int:
    """Number of shards of a job."""
    return -(-rows // rows_per_shard)


def rows_of_shard(rows: int, rows_per_shard: int, number: int) -> range:
    """Numbers of a shard's rows, of a job of so many."""
    return range(number * rows_per_shard, min((number + 1) * rows_per_shard, rows))


def shard_path(out: Path, number: int) -> Path:
    """Where a shard stands."""
    return out / f"shard-{number:05d}.parquet"


def checksum_path(path: Path) -> Path:
    """Where the checksum of a shard stands."""
    return path.with_name(f"_{path.stem}.sha256")


def is_done(path: Path) -> bool:
    """Whether a shard is there, whole and unchanged."""
    checksum = checksum_path(path)
    if not path.is_file() or not checksum.is_file():
        return False
    return checksum.read_text().strip() == hash_file(path)


def write_shard(
    path: Path, ids: Sequence[str], embeddings: Sequence[np.ndarray | None], errors: Sequence[str | None]
) -> None:
    """Writes a shard's table, and the checksum."""
    import io

    import pyarrow.parquet as pq

    data = io.BytesIO()
    pq.write_table(make_table(ids, embeddings, errors), data)
    write_atomically(path, data.getvalue())
    write_atomically(checksum_path(path), hashlib.sha256(data.getvalue()).hexdigest())


def make_table(ids: Sequence[str], embeddings: Sequence[np.ndarray | None], errors: Sequence[str | None]) -> pa.Table:
    """Columns ``id``, ``embedding`` (float32, null where there is an error) and ``error``."""
    import numpy as np
    import pyarrow as pa

    empty = np.zeros(0, np.float32)
    offsets = np.cumsum([0, *(0 if e is None else len(e) for e in embeddings)], dtype=np.int32)
    values = np.concatenate([empty, *(e for e in embeddings if e is not None)])
    missing = pa.array([e is None for e in embeddings], pa.bool_())
    vectors = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), mask=missing)
    return pa.table(
        {"id": pa.array(list(ids), pa.string()), "embedding": vectors, "error": pa.array(list(errors), pa.string())}
    )


def read_shard(path: Path) -> tuple[list[np.ndarray | None], list[str | None]]:
    """Reads embeddings and errors, as :func:`make_table` takes them."""
    import pyarrow.parquet as pq

    embeddings = pq.read_table(path, columns=["embedding"])["embedding"]
    return [row.values.to_numpy() if row.is_valid else None for row in embeddings], read_errors(path)


def read_errors(path: Path) -> list[str | None]:
    """Reads what is wrong with each row of a shard, ``None`` where it has an embedding."""
    import pyarrow.parquet as pq

    return pq.read_table(path, columns=["error"])["error"].to_pylist()


def sweep(out: Path, names: set[str]) -> None:
    """Removes what processes left that were killed while they wrote these files, shards with their checksums."""
    names = names | {checksum_path(Path(name)).name for name in names}
    for part in out.glob(".*.part"):
        if part.name.rsplit(".", 2)[0].removeprefix(".") in names:
            part.unlink(missing_ok=True)
