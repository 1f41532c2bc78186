"""Embeddings on disk by content: what was encoded once is not encoded again, in another task or after a killed run.

The store is one SQLite file. Several processes may use it at once. A process that is killed loses what it had not yet
handed over, and nothing else. Rows carry a checksum; a row that does not match counts as missing. When the file grows
over its limit, the least recently used rows are dropped.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mteb.models.model_meta import ModelMeta

FILE = "embeddings.sqlite"
LIMIT_BYTES = 16 * 2**30
#: Part of the limit that is left after old rows were dropped.
KEPT = 0.8
#: Seconds to wait for another process's transaction.
PATIENCE = 120
#: Seconds after which a row that is found counts as used anew: readers seldom have to wait for each other.
REFRESH = 3600
#: SQLite's limit of variables in one statement is 999 in old versions.
MAX_VARIABLES = 900

_SCHEMA = "CREATE TABLE IF NOT EXISTS embeddings (key BLOB PRIMARY KEY, used INTEGER, checksum INTEGER, value BLOB)"
#: Which passes over a task's rows were completed, by model: a plan does not know the keys of contents it has not read.
_PASSES = "CREATE TABLE IF NOT EXISTS passes (model TEXT, label TEXT, PRIMARY KEY (model, label))"


def default_folder() -> Path | None:
    """Returns the folder that ``E5V_STORE`` names (``0`` or ``off``: none), by default one in the user's cache."""
    named = os.environ.get("E5V_STORE", "")
    if named.lower() in ("0", "false", "no", "off"):
        return None
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(cache) / "e5v"


def open_store(folder: str | Path | None) -> Store | None:
    """Opens a store, or says why embeddings are not kept; ``None`` keeps nothing."""
    if folder is None:
        return None
    try:
        return Store(folder)
    except (OSError, sqlite3.Error) as error:
        warnings.warn(f"embeddings are not kept: {folder} cannot be used ({error})", RuntimeWarning, stacklevel=2)
        return None


def pass_label(task: str, split: str, subset: str, role: str | None, holds: str) -> tuple[str, ...]:
    """Returns what a pass over a task's rows is called in the store.

    Args:
        task: Its name.
        split: Of the data.
        subset: Of the data.
        role: ``"query"``, ``"document"``, or nothing.
        holds: What the rows hold: ``"text"``, ``"image"`` or ``"composed"``.
    """
    return task, split, subset, role or "", holds


def entry_name(meta: ModelMeta) -> str:
    """Returns what the passes of a model entry go by in the store."""
    return f"{meta.name}@{meta.revision}"


class Store:
    """A bounded dictionary of float32 vectors on disk.

    A fault (a full disk, a damaged file) ends the keeping with a warning, never the run.

    Args:
        folder: Made where it does not exist. The file in it is ``embeddings.sqlite``.
        limit_bytes: Size at which rows are dropped.
    """

    def __init__(self, folder: str | Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self.path = Path(folder) / FILE
        self.limit_bytes = limit_bytes
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.database: sqlite3.Connection | None = _open(self.path)
        except sqlite3.OperationalError:  # such as a lock that others hold: nothing is wrong with the file
            raise
        except sqlite3.DatabaseError:
            os.replace(self.path, self.path.with_suffix(f".damaged-{time.time_ns()}"))
            self.database = _open(self.path)

    def get(self, keys: Iterable[bytes]) -> dict[bytes, np.ndarray]:
        """Returns the vectors of those keys that are there and sound."""
        found: dict[bytes, np.ndarray] = {}
        if self.database is None:
            return found
        now = int(time.time())
        stale = []
        wanted = list(dict.fromkeys(keys))
        with self._guarded() as database:
            for start in range(0, len(wanted), MAX_VARIABLES):
                part = wanted[start : start + MAX_VARIABLES]
                marks = ",".join("?" * len(part))
                query = f"SELECT key, used, checksum, value FROM embeddings WHERE key IN ({marks})"  # noqa: S608
                for key, used, checksum, value in database.execute(query, part):
                    if zlib.crc32(value) == checksum:
                        found[key] = np.frombuffer(value, "<f4")
                        stale += [key] if now - used >= REFRESH else []
        if stale:
            with self._transaction() as database:
                database.executemany("UPDATE embeddings SET used = ? WHERE key = ?", [(now, key) for key in stale])
        return found

    def put(self, vectors: Mapping[bytes, np.ndarray]) -> None:
        """Keeps vectors, in one transaction: all of them, or none where the process is killed."""
        if self.database is None:
            return
        now = int(time.time())
        values = {key: np.ascontiguousarray(vector, "<f4").tobytes() for key, vector in vectors.items()}
        rows = [(key, now, zlib.crc32(value), value) for key, value in values.items()]
        with self._transaction() as database:
            database.executemany("INSERT OR REPLACE INTO embeddings VALUES (?, ?, ?, ?)", rows)
            self._drop_old(database)

    def note_pass(self, model: str, label: Sequence[str]) -> None:
        """Notes that all contents of a pass are here.

        Args:
            model: Name and revision of the model's entry.
            label: Of the pass.
        """
        if self.database is not None:
            with self._transaction() as database:
                database.execute("INSERT OR REPLACE INTO passes VALUES (?, ?)", (model, json.dumps(label)))

    def passes(self, model: str) -> list[tuple[str, ...]]:
        """Returns the labels of the passes of a model that were completed; rows that were dropped since still count."""
        if self.database is None:
            return []
        with self._guarded() as database:
            rows = database.execute("SELECT label FROM passes WHERE model = ?", (model,)).fetchall()
            return [tuple(json.loads(row[0])) for row in rows]
        return []

    def _drop_old(self, database: sqlite3.Connection) -> None:
        size = _used_bytes(database)
        if size > self.limit_bytes:
            count = database.execute("SELECT COUNT(*) FROM embeddings").fetchone()[0]
            surplus = int(count * (1 - KEPT * self.limit_bytes / size)) + 1
            old = "SELECT rowid FROM embeddings ORDER BY used, rowid LIMIT ?"
            database.execute(f"DELETE FROM embeddings WHERE rowid IN ({old})", [surplus])  # noqa: S608

    @contextmanager
    def _guarded(self) -> Iterator[sqlite3.Connection]:
        try:
            yield self.database
        except sqlite3.Error as error:
            warnings.warn(f"embeddings are no longer kept in {self.path}: {error}", RuntimeWarning, stacklevel=4)
            self.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Waits for other writers at the start, where nothing can be lost yet."""
        with self._guarded() as database:
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
            except BaseException:
                database.execute("ROLLBACK")
                raise
            database.execute("COMMIT")

    def close(self) -> None:
        """Closes the file; from then on nothing is found and nothing is kept."""
        if self.database is not None:
            self.database.close()
            self.database = None


def _open(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)
    try:
        database.execute(_SCHEMA)
        database.execute(_PASSES)
    except sqlite3.DatabaseError:
        database.close()
        raise
    return database


def _used_bytes(database: sqlite3.Connection) -> int:
    """Bytes that hold something: the file itself does not shrink, its free pages are used again."""
    names = ("page_count", "freelist_count", "page_size")
    pages, free, page = (database.execute(f"PRAGMA {name}").fetchone()[0] for name in names)
    return (pages - free) * page
