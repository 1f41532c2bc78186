"""The shards of an embedding job: Parquet files with checksums.

A shard is written to a temporary name, renamed, and then gets its checksum beside it. The metadata of its schema say
which job made it. A shard of this job with a right checksum is done, any other is made again. Names other than those of
shards begin with ``_`` or ``.``, which readers of a folder of Parquet files skip.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import hash_file, write_atomically

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

#: In the metadata of a shard's schema: the ``job_sha256`` of the manifest.
JOB_KEY = b"e5v_job_sha256"
#: Numbers in the embeddings of a shard: Arrow's lists have offsets of 32 bits.
MAX_NUMBERS = 2**31 - 1


def count_shards(rows: int, rows_per_shard: int) -> int:
    """Returns the number of shards of a job."""
    return -(-rows // rows_per_shard)


def check_size(rows: int, dimension: int | None) -> None:
    """Raises ValueError if a shard would hold more numbers than its column ``embedding`` can count.

    Args:
        rows: Of the largest shard.
        dimension: Of an embedding.
    """
    if dimension and rows * dimension > MAX_NUMBERS:
        raise ValueError(
            f"{rows} rows of {dimension} numbers are too many for one shard: "
            f"use --rows-per-shard {MAX_NUMBERS // dimension} or less"
        )


def rows_of_shard(rows: int, rows_per_shard: int, number: int) -> range:
    """Returns the numbers of the rows of a shard, in a job of ``rows`` rows."""
    return range(number * rows_per_shard, min((number + 1) * rows_per_shard, rows))


def shard_path(out: Path, number: int) -> Path:
    """Returns the path of a shard."""
    return out / f"shard-{number:05d}.parquet"


def checksum_path(path: Path) -> Path:
    """Returns the path of a shard's checksum."""
    return path.with_name(f"_{path.stem}.sha256")


def is_done(path: Path, job: str) -> bool:
    """Whether a shard is there, whole and unchanged, and of this job."""
    return is_whole(path) and job_of(path) == job


def is_whole(path: Path) -> bool:
    """Whether a shard is there, whole and unchanged, whichever job made it."""
    checksum = checksum_path(path)
    if not path.is_file() or not checksum.is_file():
        return False
    return checksum.read_text().strip() == hash_file(path)


def job_of(path: Path) -> str | None:
    """Returns the digest of the job that made a shard; ``None`` if the file does not say, or is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(path).metadata or {}
    except pa.ArrowException:
        return None
    return metadata[JOB_KEY].decode() if JOB_KEY in metadata else None


def write_shard(
    path: Path, ids: Sequence[str], embeddings: Sequence[np.ndarray | None], errors: Sequence[str | None], job: str
) -> None:
    """Writes a shard's table, which names its job, and the checksum."""
    import io

    import pyarrow.parquet as pq

    data = io.BytesIO()
    pq.write_table(make_table(ids, embeddings, errors).replace_schema_metadata({JOB_KEY: job}), data)
    write_atomically(path, data.getvalue())
    write_atomically(checksum_path(path), hashlib.sha256(data.getvalue()).hexdigest())


def make_table(ids: Sequence[str], embeddings: Sequence[np.ndarray | None], errors: Sequence[str | None]) -> pa.Table:
    """Returns the columns ``id``, ``embedding`` (float32, null if there is an error) and ``error``."""
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
    """Reads what is wrong with each row of a shard; ``None`` for a row with an embedding."""
    import pyarrow.parquet as pq

    return pq.read_table(path, columns=["error"])["error"].to_pylist()


def sweep(out: Path, names: set[str]) -> None:
    """Removes what killed processes left of these files, and of the checksums of shards."""
    names = names | {checksum_path(Path(name)).name for name in names}
    for part in out.glob(".*.part"):
        if part.name.rsplit(".", 2)[0].removeprefix(".") in names:
            part.unlink(missing_ok=True)
