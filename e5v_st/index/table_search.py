"""``e5v search`` on a table of LanceDB: by an embedding, by words, or by both, with a filter.

Where a table has an index of its embeddings, candidates come from there, and their scores are exact: LanceDB reads the
embeddings of ten times as many rows as are wanted, and compares them with the query.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .lance_table import PARTITIONS, index_of, one_of, open_lance, read_table_job
from .nearest import unit

if TYPE_CHECKING:
    import numpy as np

MODES = ("vector", "text", "hybrid")
#: Candidates by the index whose exact scores are computed, for each row that is wanted.
REFINE = 10
#: Columns that no search returns.
HIDDEN = ("vector", "content", "details", "thumbnail")
#: What a search by words, or by both, calls its score. Cosines are computed from LanceDB's distance.
_SCORES = {"vector": "_distance", "text": "_score", "hybrid": "_relevance_score"}


def open_for_search(path: Path) -> tuple[Any, dict[str, Any]]:
    """Opens a table and reads what made it; raises ValueError if there is none, or none of ``e5v index``."""
    table = open_lance(path)
    if table is None:
        raise ValueError(f"there is no table {path}: make one with `e5v index SOURCE {path}`")
    return table, read_table_job(table, path)


def search_table(
    table: Any,
    vector: np.ndarray | None,
    text: str | None = None,
    *,
    mode: str = "vector",
    where: str | None = None,
    top: int = 10,
    text_column: str = "text",
    thumbnails: bool = False,
    exact: bool = False,
) -> list[dict[str, Any]]:
    """Finds rows of a table, best first.

    Args:
        table: Of LanceDB.
        vector: The query's embedding ``(d,)``; ``None`` for a search by words alone.
        text: The query's words; not needed for a search by the embedding.
        mode: ``"vector"`` ranks by cosine, ``"text"`` by BM25, ``"hybrid"`` by the ranks in both.
        where: A condition in SQL, such as ``width > 800 AND text IS NOT NULL``. It is applied before the search.
        top: Maximum number of rows.
        text_column: The column that ``"text"`` and ``"hybrid"`` search.
        thumbnails: Whether the rows have their thumbnails.
        exact: Whether to compare every row, whatever index there is.

    Returns:
        Rows with ``score`` and the table's columns, but for those that serve the table alone.

    Raises:
        ValueError: If the condition cannot be read, the embedding has another length, or the text column has no index.
    """
    import numpy as np

    if vector is not None:
        wanted = table.schema.field("vector").type.list_size
        if len(vector) != wanted:
            raise ValueError(f"the table has embeddings of {wanted} numbers, the model of {len(vector)}")
        if not np.isfinite(vector).all():
            raise ValueError("the query's embedding is not finite: load the model in bfloat16 or float32")
        vector = unit(vector)
    if mode != "vector" and index_of(table, text_column) is None:
        raise ValueError(f"the column {text_column!r} has no full-text index: `e5v index … --full-text {text_column}`")
    columns = [name for name in table.schema.names if name not in HIDDEN or (thumbnails and name == "thumbnail")]
    query = _start(table, vector, text, mode, text_column)
    if where:
        query = query.where(where, prefilter=True)
    if mode != "text":
        query = query.distance_type("cosine").nprobes(PARTITIONS).refine_factor(REFINE)
        query = query.bypass_vector_index() if exact else query
    score = _SCORES[mode]
    # A hybrid search adds its score itself, and refuses to be asked for it
    query = query.select(columns if mode == "hybrid" else [*columns, score]).limit(top)
    try:
        rows = query.to_arrow().to_pylist()
    except (ValueError, RuntimeError) as error:
        what = f"the condition {where!r} cannot be read" if where else "the table cannot be searched"
        raise ValueError(f"{what}: {' '.join(str(error).split())}") from error
    return [{"score": _score(row[score], mode), **{name: row[name] for name in columns}} for row in rows]


def _start(table: Any, vector: np.ndarray | None, text: str | None, mode: str, text_column: str) -> Any:
    if mode == "vector":
        return table.search(vector, vector_column_name="vector")
    if mode == "text":
        return table.search(text, query_type="fts", fts_columns=text_column)
    both = table.search(query_type="hybrid", vector_column_name="vector", fts_columns=text_column)
    return both.vector(vector).text(text)


def _score(value: float, mode: str) -> float:
    return 1 - value if mode == "vector" else value


def vector_of(table: Any, name: str) -> np.ndarray:
    """Returns the embedding of a row by its id; raises ValueError if it is not there."""
    import numpy as np

    found = table.search().where(one_of("id", [name])).select(["vector"]).limit(1).to_arrow()
    if not found.num_rows:
        raise ValueError(f"the table has no row {name!r}")
    return np.array(found["vector"][0].as_py(), np.float32)
