"""A table of LanceDB: rows by id, each with its embedding, and in the table's metadata what made them.

A table is a folder (``photos.lance``). Each change of it is one new version, which is there as a whole or not at all; a
reader keeps the version that it has opened. One process writes at a time.

    id  vector  content  details  image  text  width  height  [thumbnail]  [further columns]
                │        └ hash of the row's other cells
                └ hash of what was embedded

Needs the extra ``index``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..starting import collector_paused
from .manifest import DIGESTS

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIX = ".lance"
#: The key of this package in the metadata of a table's schema.
METADATA_KEY = b"e5v"
#: Of what the metadata and the columns mean. Later versions read older ones.
FORMAT = 1
#: From so many rows on, a search by the index is worth its loss of exactness.
ANN_ROWS = 50_000
#: Parts of an index. Each is searched, so that no row is lost whose neighbours are in another part.
PARTITIONS = 64
#: Rows of one list of ids in a condition.
CONDITION_ROWS = 1000
#: types of ``--columns`` -> names of types in Arrow
TYPES = {"text": "string", "int": "int64", "float": "float64", "bool": "bool"}
#: Names in the folder of a table.
PARTS = {"data", "_versions", "_transactions", "_indices", "_deletions", "_refs"}
#: What a table's metadata must say.
JOB = (
    *("format", "source", "model", "adapter", "dtype", "quantize", "image_layout", "max_image_tokens", "exif"),
    *("prompt", "image_column", "text_column", "columns", "thumbnails", "dimension", *DIGESTS),
)


# ---- opening ----


def is_lance(path: Path) -> bool:
    """Whether a path's name says that it is a table of LanceDB."""
    return path.suffix == SUFFIX


def check_table_name(path: Path) -> None:
    """Raises ValueError if LanceDB cannot have a table of this name."""
    if not is_lance(path) or not re.fullmatch(r"[A-Za-z0-9_.\-]+", path.name):
        raise ValueError(
            f"got the table {path}, want a name of letters, digits, '-', '_' and '.' that ends with {SUFFIX}, "
            f"as photos{SUFFIX}"
        )
    if str(path).startswith(("s3:", "gs:", "az:")):
        raise ValueError(f"got the table {path}, want a folder on this machine: its lock is a file beside it")


def open_lance(path: Path) -> Any | None:
    """Opens a table; ``None`` if there is none.

    Raises:
        ValueError: If something else has this name.
    """
    if not any(path.glob("_versions/*.manifest")):  # what a killed process left before the first version is not a table
        if path.exists() and not (path.is_dir() and {part.name for part in path.iterdir()} <= PARTS):
            raise ValueError(f"{path} is not a table of LanceDB: choose another name")
        return None
    try:
        return _connect(path).open_table(path.resolve().stem)
    except (ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"{path} cannot be opened: {' '.join(str(error).split())}") from error


def _connect(path: Path) -> Any:
    with collector_paused():
        import lancedb

    return lancedb.connect(path.resolve().parent)


def read_table_job(table: Any, path: Path) -> dict[str, Any]:
    """Reads from a table's metadata what made it.

    Raises:
        ValueError: If the table is not one of ``e5v index``, or of a later version.
    """
    text = (table.schema.metadata or {}).get(METADATA_KEY)
    if text is None:
        raise ValueError(f"{path} does not say which model made it: make a table with `e5v index SOURCE {path}`")
    job: dict[str, Any] = json.loads(text)
    if job.get("format", 0) > FORMAT:
        raise ValueError(f"{path} was made by a later version, in format {job['format']}: this one reads {FORMAT}")
    lacking = [name for name in JOB if name not in job]
    if lacking:
        raise ValueError(f"{path} does not say {', '.join(lacking)}: make a new table")
    return job


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Lets one process write a table at a time. The lock ends with the process, however that ends.

    Raises:
        ValueError: If another process has it.
    """
    import fcntl  # of Unix alone; who reads needs no lock

    real = path.resolve()  # a link is another name of the same table
    place = real.with_name(f".{real.name}.lock")
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing {path}: run this again when it has ended") from None
        yield


# ---- writing ----


def make_schema(job: Mapping[str, Any]) -> pa.Schema:
    """Returns the columns of a table, with what made it as metadata."""
    import pyarrow as pa

    fields: dict[str, Any] = {
        "id": pa.string(),
        "vector": pa.list_(pa.float32(), job["dimension"]),
        **dict.fromkeys(("content", "details", "image", "text"), pa.string()),
        **dict.fromkeys(("width", "height"), pa.int64()),
    }
    if job["thumbnails"]:
        fields["thumbnail"] = pa.binary()
    fields |= {name: pa.type_for_alias(TYPES[kind]) for name, kind in job["columns"].items()}
    return pa.schema(list(fields.items()), metadata={METADATA_KEY: json.dumps(job)})


def create(path: Path, job: Mapping[str, Any]) -> Any:
    """Makes an empty table."""
    with _told(path):
        return _connect(path).create_table(path.resolve().stem, schema=make_schema(job))


def put(table: Any, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Adds rows, and replaces those with the same ids, in one step."""
    import pyarrow as pa

    with _told(path):
        merge = table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
        merge.execute(pa.Table.from_pylist(list(rows), schema=table.schema))


def remove(table: Any, ids: Sequence[str], path: Path) -> None:
    """Removes rows by their ids."""
    with _told(path):
        for start in range(0, len(ids), CONDITION_ROWS):
            table.delete(one_of("id", ids[start : start + CONDITION_ROWS]))


def one_of(column: str, values: Sequence[str]) -> str:
    """Returns the condition that a column holds one of these texts."""
    quoted = ", ".join("'" + value.replace("'", "''") + "'" for value in values)
    return f"{column} IN ({quoted})"


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Makes what LanceDB raises for a disk an OSError that names the table."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        reason = str(error).split(", /")[0]  # the rest is where in LanceDB's own source it happened
        raise OSError(f"cannot write {path}: {' '.join(reason.split())}") from error


# ---- indices ----


def keep_indices(table: Any, path: Path, text_columns: Sequence[str] = ()) -> None:
    """Brings the indices of a table up to date: makes those that are missing, and adds new rows to the others.

    Args:
        table: The table.
        path: Where it is.
        text_columns: Columns that get an index for full-text search.
    """
    from lancedb.index import FTS

    with _told(path):
        index = index_of(table, "vector")
        state = table.index_stats(index.name) if index else None
        # The clusters of an index are those of the rows that were there when it was made
        outgrown = state is not None and state.num_unindexed_rows > state.num_indexed_rows
        table.optimize()
        for name in text_columns:
            if index_of(table, name) is None:
                table.create_index(name, config=FTS())
        if table.count_rows() >= ANN_ROWS and (index is None or outgrown):
            _make_ann(table)


def _make_ann(table: Any) -> None:
    from lancedb.index import IvfRq, IvfSq

    parts: dict[str, Any] = {"distance_type": "cosine", "num_partitions": PARTITIONS}
    if table.schema.field("vector").type.list_size % 8:  # RaBitQ cannot, and truncated embeddings may be of any length
        config: Any = IvfSq(**parts)
    else:  # with a byte for each number: faster to make than IVF-PQ, and better at the same speed (docs/speed.md)
        config = IvfRq(**parts, num_bits=8)
    table.create_index("vector", config=config, replace=True)


def index_of(table: Any, column: str) -> Any | None:
    """Returns the index of a column, if there is one."""
    return next((index for index in table.list_indices() if index.columns == [column]), None)


def describe_table(table: Any, path: Path) -> list[str]:
    """Says in lines what a table holds: rows, size, model, settings, columns and the state of its indices."""
    job = read_table_job(table, path)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    settings = ", ".join(
        f"{name} {job[name]}" for name in ("dtype", "quantize", "image_layout", "prompt") if job[name] is not None
    )
    adapter = f" with the adapter {job['adapter']}" if job["adapter"] else ""
    lines = [
        f"rows: {table.count_rows():,}, of {job['dimension']} numbers each, version {table.version}",
        f"size: {size / 2**20:.1f} MiB, with the versions before",
        f"model: {job['model']}{adapter}, weights {job['weights_sha256'][:12]}, {settings}",
        f"made by: e5v-st {job['versions']['e5v-st']}, from {job['source']}",
        f"columns: {', '.join(name for name in table.schema.names)}",
    ]
    for index in table.list_indices():
        state = table.index_stats(index.name)
        lines.append(
            f"index of {', '.join(index.columns)}: {index.index_type}, {state.num_indexed_rows:,} rows in it, "
            f"{state.num_unindexed_rows:,} not yet"
        )
    if index_of(table, "vector") is None:
        lines.append(f"index of vector: none, every row is compared (from {ANN_ROWS:,} rows on there is one)")
    return lines
