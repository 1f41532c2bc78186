"""The sources that a training draws from: what a recipe's ``train`` says of each, checked.

    train:
      - data: products.parquet
        columns: {anchor_text: title, positive_image: photo}    # unless the columns are named so
        prompt: {anchor: composed, positive: image}             # unless by what the items hold
        weight: 2                                               # seen twice in an epoch
      - data: princeton-nlp/datasets-for-simcse

``item_rows.py`` reads the rows, ``sampling.py`` draws the batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

#: What a row holds, in the order in which losses take it. Negatives may be numbered: negative_1, negative_2, …
ROLES = ("anchor", "positive", "negative")


@dataclass(frozen=True)
class Source:
    """One entry of ``train``.

    Attributes:
        data: A table (see ``e5v_st.tables``), ``.tar`` shards, a folder, or a dataset's id on the hub.
        split: The split of a folder, a dataset, or a table with a column ``split``.
        columns: Role -> column, where columns have other names: ``anchor``, ``anchor_text``, ``positive_image``, ….
        images: Where a column of images holds no paths beside the table: a folder, or a table with the columns ``id``
            and ``image``, whose ids the column holds.
        prompt: Role -> a prompt's name or template; by default what an item holds decides. Negatives have the
            positive's.
        weight: How often the source is seen in an epoch; half of it with 0.5.
        loss: Its own loss, as the recipe's ``loss``; by default that one.
        teacher: Role -> a folder of ``e5v embed`` that holds the teacher's embedding of each row, by the row's id. In
            a recipe, one folder may stand for those in it that have the roles' names.
    """

    data: str
    split: str = "train"
    columns: Mapping[str, str] = field(default_factory=dict)
    images: str = ""
    prompt: Mapping[str, str] = field(default_factory=dict)
    weight: float = 1.0
    loss: Mapping[str, Any] = field(default_factory=dict)
    teacher: Mapping[str, str] = field(default_factory=dict)

    def prompt_of(self, role: str) -> str | None:
        """Returns the prompt of a column of the training data, such as ``negative_2``."""
        role = role.partition("_")[0]
        return self.prompt.get(role) or (self.prompt.get("positive") if role == "negative" else None)


#: Types of the attributes that are not texts.
_KINDS: dict[str, Any] = {
    "columns": Mapping,
    "prompt": Mapping,
    "loss": Mapping,
    "teacher": Mapping,
    "weight": (int, float),
}


def read_sources(entries: Any) -> list[Source]:
    """Reads ``train`` of a recipe.

    Args:
        entries: A list of mappings; an entry may be the data's name alone.

    Raises:
        ValueError: If an entry is not as :class:`Source` says; the message gives its number, from 1.

    Example:
        >>> read_sources(["pairs.csv"])[0].weight
        1.0
    """
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        raise ValueError(f"got train={entries!r}, want a list with an entry for each source")
    return [_read_source(entry, f"train, entry {number}") for number, entry in enumerate(entries, start=1)]


def name_sources(sources: Sequence[Source]) -> dict[str, Source]:
    """Returns sources by short names: of a file its stem, numbered where several have the same.

    Example:
        >>> list(name_sources([Source("a/pairs.csv"), Source("b/pairs.csv")]))
        ['pairs', 'pairs-2']
    """
    found: dict[str, Source] = {}
    for source in sources:
        stem = source.data.rstrip("/").rpartition("/")[2].partition(".")[0] or source.data
        taken = sum(name == stem or name.startswith(f"{stem}-") for name in found)
        found[f"{stem}-{taken + 1}" if taken else stem] = source
    return found


def _read_source(entry: Any, where: str) -> Source:
    entry = {"data": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, Mapping) or not isinstance(entry.get("data"), str):
        raise ValueError(f"{where}: got {entry!r}, want a mapping with data: and the name of a file or dataset")
    where = f"{where} ({entry['data']})"
    if isinstance(entry.get("teacher"), str):
        entry = {**entry, "teacher": _teachers_in(Path(entry["teacher"]).expanduser(), where)}
    names = [one.name for one in fields(Source)]
    check_names(entry, names, where)
    for name, value in entry.items():
        if isinstance(value, bool) or not isinstance(value, _KINDS.get(name, str)):
            raise ValueError(f"{where}: got {name}={value!r}, want {_wanted(name)}")
    for name in ("prompt", "teacher", "columns"):
        own = entry.get(name, {})
        if not all(isinstance(value, str) for value in own.values()):
            raise ValueError(f"{where}: got {name}={dict(own)!r}, want a text for each role")
        if name != "columns":
            check_names(own, ROLES, f"{where}, {name}")
    if not entry.get("weight", 1) > 0:
        raise ValueError(f"{where}: got weight={entry['weight']}, want more than 0: leave the source out")
    return Source(**entry)


def _teachers_in(folder: Path, where: str) -> dict[str, str]:
    found = {role: str(folder / role) for role in ROLES if (folder / role).is_dir()}
    if not found:
        raise ValueError(f"{where}: {folder} has none of the folders {', '.join(ROLES)}, each made by e5v embed")
    return found


def _wanted(name: str) -> str:
    if name == "weight":
        return "a number"
    return "a mapping" if name in _KINDS else "a text"


def check_names(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raises ValueError if a mapping has a key that is not known, and says which is meant."""
    for name in given:
        if name not in known:
            close = get_close_matches(str(name), known, 1)
            meant = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(f"{where}: there is no {name!r}{meant}, but {', '.join(known)}")
