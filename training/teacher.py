"""A teacher's stored embeddings become the scores that a model is trained to give.

    teacher: {anchor: anchors/, positive: positives/, negative: negatives/}

Each folder holds what ``e5v embed`` made of the same table, one of a column, so that a row's embedding is found by the
row's id. For row 7, the label is what the teacher thinks of anchor 7 and each document of row 7:

    label[7] = [cos(anchor, positive), cos(anchor, negative)]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .sources import Source

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset


def add_teacher(data: Dataset, ids: Sequence[str], source: Source, sha256: str | None) -> Dataset:
    """Adds the column ``label``: a teacher's similarities of each row's anchor to its documents.

    Args:
        data: The rows, with the columns ``anchor``, ``positive`` and any negatives.
        ids: Of the rows, as ``e5v embed`` names them.
        source: Its ``teacher`` says where the embeddings are.
        sha256: Of the source's file.

    Returns:
        The rows with a number for each document, or one number where there is one document.

    Raises:
        ValueError: If a column has no teacher, or an index is of another table or lacks a row.
    """
    import numpy as np

    found = {role: read_embeddings(Path(folder), ids, sha256) for role, folder in source.teacher.items()}
    roles = [role for role in data.column_names if role != "label"]
    if missing := [role for role in roles if role not in found]:
        raise ValueError(
            f"{source.data}: the loss learns from a teacher, but teacher: names no index of {', '.join(missing)}"
        )
    scores = np.stack([(found["anchor"] * found[role]).sum(1) for role in roles[1:]], axis=1)
    return data.add_column("label", (scores if scores.shape[1] > 1 else scores[:, 0]).tolist())


def read_embeddings(index: Path, ids: Sequence[str], sha256: str | None) -> np.ndarray:
    """Returns the unit embeddings ``(n, d)`` of rows, from a folder of ``e5v embed``.

    Raises:
        ValueError: If it is not of this table, or lacks a row.
    """
    import numpy as np

    from e5v_st.index.nearest import read_shards, unit
    from e5v_st.index.search import read_job

    job = read_job(index)
    if sha256 is not None and job["content"] != sha256:
        raise ValueError(f"{index} was made from another table, or another state of it: run e5v embed on this one")
    places = {name: place for place, name in enumerate(ids)}
    found: Any = None
    there = np.zeros(len(ids), bool)
    for _, names, vectors in read_shards(index, job):
        if found is None:
            found = np.zeros((len(ids), vectors.shape[1]), np.float32)
        own = [row for row, name in enumerate(names) if name in places]
        rows = [places[names[row]] for row in own]
        found[rows] = unit(vectors[own])
        there[rows] = True
    if not there.all():
        lacking = [name for name, has in zip(ids, there, strict=True) if not has]
        raise ValueError(f"{index} has no embedding of {len(lacking)} rows, such as {lacking[0]!r}")
    embeddings: np.ndarray = found
    return embeddings
