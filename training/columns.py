"""Where the items of a training row are: which column of a table holds whose text and whose image."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from e5v_st.rows import Table

from .examples import COLUMNS, LABELS
from .sources import ROLES, Source

#: Names of a caption beside an image, where no column has a role.
CAPTIONS = ("text", "caption", "name", "sentence", "title")

#: A role, the number of a negative, and a kind: ``negative_2_image``.
_ROLE = re.compile(r"(?P<name>[A-Za-z]\w*?)(?P<number>_\d+)?(?P<kind>_text|_image)?")
_SAME = {name: role for role, names in zip(ROLES, COLUMNS, strict=True) for name in names}


@dataclass(frozen=True)
class Columns:
    """Where a row's items are.

    Attributes:
        of: Role, such as ``negative_2`` -> kind (``text``, ``image``, or ``any`` for a column that holds whole items)
            -> the table's column.
        label: The column of the score, if there is one.
    """

    of: Mapping[str, Mapping[str, str]]
    label: str | None = None

    @property
    def names(self) -> list[str]:
        """All columns of the table that are read."""
        items = [name for kinds in self.of.values() for name in kinds.values()]
        return items if self.label is None else [*items, self.label]

    @property
    def text_only(self) -> bool:
        """Whether no column can hold an image."""
        return all(set(kinds) == {"text"} for kinds in self.of.values())


def find_columns(source: Source, rows: Any, *, labelled: bool) -> Columns:
    """Returns where the items of each role are, by the source's ``columns`` or by the names in the table.

    Raises:
        ValueError: If anchor or positive is missing, a named column is not there, or there are scores that the loss
            does not use.
    """
    names = list(rows.column_names)
    found: dict[str, dict[str, str]] = {}
    wanted = source.columns or {name: name for name in names}
    for place, name in wanted.items():
        match = _ROLE.fullmatch(place)
        role = _SAME.get(match["name"]) if match else None
        if source.columns and (role is None or name not in names):
            problem = f"there is no column {name!r}" if role else f"{place!r} is no role"
            raise ValueError(
                f"{source.data}: {problem}; want roles such as anchor_text, positive_image, negative_2, and of the "
                f"columns {', '.join(map(repr, names))}"
            )
        if match and role:
            kind = (match["kind"] or "_any")[1:]
            found.setdefault(role + (match["number"] or ""), {})[kind] = name
    if not found:
        found = _guess_captioned(names)
    if missing := [role for role in ROLES[:2] if role not in found]:
        raise ValueError(
            f"{source.data} lacks the column {' and '.join(missing)}; it has {', '.join(map(repr, names))}. Name the "
            "columns so (also anchor_text, positive_image), or say which are meant with columns:"
        )
    labels = [name for name in names if name.lower() in LABELS]
    if labels and not labelled:
        raise ValueError(
            f"{source.data} has the column {labels[0]!r}, which this loss does not use: every row is a positive. Use a "
            "loss for graded pairs (cosent, mse), or leave out that column"
        )
    if labelled and not labels:
        raise ValueError(f"{source.data} lacks the column {' or '.join(map(repr, LABELS))}, which the loss needs")
    order = sorted(found, key=lambda role: (ROLES.index(role.partition("_")[0]), _number(role)))
    kinds = {role: _plain(rows, found[role]) for role in order}
    return Columns(kinds, labels[0] if labelled else None)


def _number(role: str) -> int:
    return int(role.partition("_")[2] or 0)


def _guess_captioned(names: Sequence[str]) -> dict[str, dict[str, str]]:
    image = next((name for name in ("image", "file_name") if name in names), None)
    caption = next((name for name in CAPTIONS if name in names), None)
    if image is None or caption is None:
        return {}
    return {"anchor": {"text": caption}, "positive": {"image": image}}


def _plain(rows: Any, kinds: Mapping[str, str]) -> dict[str, str]:
    """Says ``text`` of a column of whole items that can hold nothing but texts."""
    if set(kinds) != {"any"}:
        return dict(kinds)
    features = getattr(rows, "features", None)
    text = isinstance(rows, Table) and rows.path.name.lower().removesuffix(".gz").endswith((".csv", ".tsv"))
    if features is not None:
        text = getattr(features[kinds["any"]], "dtype", None) in ("string", "large_string")
    return {"text" if text else "any": kinds["any"]}
