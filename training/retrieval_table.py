"""Retrieval on tables of one's own: what is asked, what there is, and what is right.

    folder/queries.csv     id, text and/or image
    folder/corpus.csv      id, text and/or image
    folder/relevant.csv    query, document          one row for each right answer, by their ids

Each may also be JSON lines or Parquet. Paths of images are relative to the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from e5v_st.index.source import open_source
from e5v_st.tables import READERS, open_table


def read_retrieval(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, set[str]]]:
    """Reads the three tables.

    Returns:
        Queries and corpus, each id -> item; and query id -> ids of its right answers.

    Raises:
        ValueError: If a column is missing, an id stands twice or has no row, or a query has no right answer.
        FileNotFoundError: If a table is missing.
    """
    queries, corpus = (_read_items(find_table(folder, name)) for name in ("queries", "corpus"))
    path = find_table(folder, "relevant")
    table = open_table(path)
    if missing := {"query", "document"} - set(table.column_names):
        raise ValueError(f"{path} lacks the column {' and '.join(sorted(missing))}")
    relevant: dict[str, set[str]] = {}
    for number, row in enumerate(table):
        for name, known in (("query", queries), ("document", corpus)):
            if str(row[name]) not in known:
                raise ValueError(f"{table.where(number)}: there is no {name} {row[name]!r}")
        relevant.setdefault(str(row["query"]), set()).add(str(row["document"]))
    if unanswered := [name for name in queries if name not in relevant]:
        raise ValueError(f"{path} has no right answer for {len(unanswered)} queries, such as {unanswered[0]!r}")
    return queries, corpus, relevant


def find_table(folder: Path, name: str) -> Path:
    """Returns the table of a name in a folder, whatever its format."""
    for suffix in READERS:
        if (path := folder.expanduser() / f"{name}{suffix}").is_file():
            return path
    raise FileNotFoundError(f"{folder} has no {name}.csv (or {', '.join(READERS)})")


def _read_items(path: Path) -> dict[str, Any]:
    source = open_source(str(path), id_column="id")
    found: dict[str, Any] = {}
    for number, name in enumerate(source.ids):
        if name in found:
            raise ValueError(f"{path}: the id {name!r} stands twice")
        found[name] = source.item(number)
        if not found[name]:
            raise ValueError(f"{path}: there is nothing for the id {name!r}")
    return found
