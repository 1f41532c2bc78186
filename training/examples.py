"""From rows to training examples: pairs or triplets of texts, checked row by row, and the rows of an evaluation.

What is wrong with a file is counted and reported with line numbers. Nothing is dropped without saying so.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from e5v_st.tables import Table, beside, read_truth

from .readers import open_rows

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

#: Names that the columns may have, in the order anchor, positive, hard negative (the last may be missing).
COLUMNS = (("sent0", "anchor", "query", "premise"), ("sent1", "positive", "target"), ("hard_neg", "negative"))
#: Columns that say whether, or how much, two texts mean the same: without them, every row would be a positive.
LABELS = ("label", "labels", "score", "scores")
#: Columns of an evaluation that hold images.
IMAGES = ("image", "reference", "target")
#: How the names of hard negatives begin.
NEGATIVES = ("negative", "hard_neg")

_SHOWN = 5


@dataclass
class Report:
    """What was found in a training file.

    Attributes:
        source: The file or dataset.
        rows: Number of complete rows.
        columns: Names of the columns that were read.
        unused: Names of the other columns.
        sha256: Of a file.
        notes: How the file was read.
        incomplete: Rows that lack a text and are left out, by line of the file; by row number, from 1, where it has no
            lines (Parquet and datasets).
        not_text: Rows with something else in place of a text, by its type; left out, and numbered in the same way.
        left_out: Rows that cannot be used for another reason, by that reason; numbered in the same way.
        duplicates: Rows that repeat an earlier row word for word and are kept, numbered in the same way.
    """

    source: str
    rows: int = 0
    columns: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    sha256: str | None = None
    notes: list[str] = field(default_factory=list)
    incomplete: list[int] = field(default_factory=list)
    not_text: dict[str, list[int]] = field(default_factory=dict)
    left_out: dict[str, list[int]] = field(default_factory=dict)
    duplicates: list[int] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Returns the report in words, a line for each fact."""
        found = [f"{self.source}: {self.rows:,} rows of {', '.join(self.columns)}", *self.notes]
        if self.unused:
            found.append(f"columns that are not used: {', '.join(self.unused)}")
        if self.incomplete:
            found.append(f"{len(self.incomplete):,} rows with an empty text are left out: {_some(self.incomplete)}")
        for kind, lines in self.not_text.items():
            found.append(f"{len(lines):,} rows with a value of type {kind}, not a text, are left out: {_some(lines)}")
        for reason, lines in self.left_out.items():
            found.append(f"{len(lines):,} rows with {reason} are left out: {_some(lines)}")
        if self.duplicates:
            found.append(f"{len(self.duplicates):,} rows repeat an earlier one and are kept: {_some(self.duplicates)}")
        return found


def _some(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - _SHOWN:,} more" if len(numbers) > _SHOWN else ""
    return f"line{'s' * (len(numbers) > 1)} " + ", ".join(map(str, numbers[:_SHOWN])) + more


def load_triplets(source: str) -> tuple[Dataset, Report]:
    """Reads pairs or triplets.

    Args:
        source: A table (see ``e5v_st.tables``), a folder or the id of a dataset on the hub. Of the last two, the
            ``train`` split is read. Columns are named as in :data:`COLUMNS`.

    Returns:
        A dataset with the columns ``anchor``, ``positive`` and, for triplets, ``negative``; and what was found.

    Raises:
        ValueError: If columns are missing or would change the meaning of the others, the file cannot be read, or no row
            is left.
        OSError: If there is no such file or dataset.
    """
    from datasets import Dataset

    rows, _, _ = open_rows(source, "train")
    is_file = isinstance(rows, Table)
    report = Report(source, sha256=rows.sha256 if is_file else None, notes=rows.notes if is_file else [])
    names = _find_columns(source, rows.column_names)
    report.columns = tuple(names)
    report.unused = tuple(name for name in rows.column_names if name not in names)
    columns: list[list[str]] = [[] for _ in names]
    seen: set[tuple[str, ...]] = set()
    for line, row in zip(rows.lines if is_file else range(1, len(rows) + 1), rows, strict=True):
        texts = tuple(row[name] for name in names)
        other = next((text for text in texts if not isinstance(text, str | None)), None)
        if other is not None:
            report.not_text.setdefault(type(other).__name__, []).append(line)
            continue
        if not all(text and text.strip() for text in texts):
            report.incomplete.append(line)
            continue
        if texts in seen:
            report.duplicates.append(line)
        seen.add(texts)
        for column, text in zip(columns, texts, strict=True):
            column.append(text)
    if not seen:
        raise ValueError(f"{source} has no complete row: {'; '.join(report.lines())}")
    report.rows = len(columns[0])
    return Dataset.from_dict(dict(zip(("anchor", "positive", "negative"), columns, strict=False))), report


def _find_columns(source: str, found: list[str]) -> list[str]:
    """Returns the names of the anchor, the positive and, where there is one, the negative column."""
    names = [next((name for name in wanted if name in found), None) for wanted in COLUMNS]
    if names[0] is None or names[1] is None:
        missing = [" or ".join(wanted) for wanted, name in zip(COLUMNS[:2], names, strict=False) if name is None]
        raise ValueError(f"{source} lacks the column {' and '.join(missing)}; it has {', '.join(map(repr, found))}")
    labels = [name for name in found if name.lower() in LABELS]
    if labels:
        raise ValueError(
            f"{source} has the column {' and '.join(map(repr, labels))}, which training does not use: every row is a "
            "positive. Keep the rows whose two texts mean the same, and leave out that column"
        )
    negatives = [name for name in found if name.lower().startswith(NEGATIVES)]
    if negatives and names[2] is None:
        raise ValueError(
            f"{source} has the column {' and '.join(map(repr, negatives))}, want {' or '.join(COLUMNS[2])}: a row has "
            "one hard negative, a text. Rename the column to use, or leave all out"
        )
    return [name for name in names if name is not None]


def read_split(source: str, split: str) -> list[tuple[str, dict[str, Any]]]:
    """Returns the rows of a file or dataset that belong to a split, each with where it stands.

    A file belongs to the split as a whole unless it has a column ``split``. Rows whose column ``gallery`` is false are
    left out. Paths in the columns of images (:data:`IMAGES`) of a file are relative to its folder.

    Raises:
        ValueError: If the file cannot be read, or its column ``split`` or ``gallery`` holds something else.
    """
    rows, where, path = open_rows(source, split)
    names = rows.column_names
    for note in rows.notes if isinstance(rows, Table) else ():
        logger.warning("%s: %s", source, note)
    found = []
    for number, row in enumerate(rows):
        if path is not None and "split" in names and row["split"] is None:
            raise ValueError(f"{where(number)}: the column 'split' is empty")
        if "split" in names and row["split"] != split:
            continue
        shown = row.get("gallery")
        if shown is not None and not read_truth(shown, f"{where(number)}, column 'gallery'"):
            continue
        for name in IMAGES:
            if path is not None and name in names:
                row[name] = beside(row[name], path.parent)
        found.append((where(number), row))
    return found
