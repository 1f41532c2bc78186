"""The results of models, as mteb's files have them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from .paper import AVERAGES, Key

META = "model_meta.json"
#: What reading a file raises that somebody else wrote, or that was cut off.
FAULTS = (OSError, ValueError, KeyError, TypeError, AttributeError)


@dataclass
class Run:
    """The results of one model: ``scores`` by task and subset, ``settings`` of its entry."""

    name: str
    revision: str
    folder: Path
    scores: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def percent(self, key: Key) -> float | None:
        """Returns a score in percent; ``None`` where there is none (or none yet, as on hidden test parts)."""
        task, subset, score = key
        if subset == "average":
            parts = [self.percent((*each, score)) for each in AVERAGES[task]]
            known = [part for part in parts if part is not None]
            return sum(known) / len(known) if len(known) == len(parts) else None
        value: Any = self.scores.get((task, subset), {}).get(score)
        return 100 * value if is_number(value) and isfinite(value) else None


def collect(folders: Sequence[Path]) -> list[Run]:
    """Returns the runs in some folders, wherever in them the results lie.

    A file that is not what it should be is left out, and named on stderr.
    """
    entries = {path.resolve(): path for folder in folders for path in sorted(folder.rglob(META))}
    runs = []
    for entry in entries.values():
        try:
            found = _read_meta(entry)
        except FAULTS as error:
            _skip(entry.parent, f"{META} is not one of mteb's: {error!r}")
            continue
        for file in sorted(entry.parent.glob("*.json")):
            if file.name == META:
                continue
            try:
                found.scores.update(_read_scores(file))
            except FAULTS as error:
                _skip(file, f"it is not a result file of mteb: {error!r}")
        if found.scores:
            runs.append(found)
    return sorted(runs, key=lambda run: (run.name, run.revision))


def _skip(path: Path, reason: str) -> None:
    print(f"left out {path}: {reason}", file=sys.stderr)


def _read_meta(file: Path) -> Run:
    """Reads a model's name, with what mteb says of an experiment on it, and its revision."""
    meta = json.loads(file.read_text(encoding="utf8"))
    settings = ", ".join(f"{key}={value}" for key, value in sorted((meta.get("experiment_kwargs") or {}).items()))
    name = str(meta["name"]) + (f" ({settings})" if settings else "")
    return Run(name, meta["revision"] or "", file.parent, settings=dict(meta.get("loader_kwargs") or {}))


def _read_scores(file: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Reads scores by task and subset; where there are several splits, the subset's name says which."""
    content = json.loads(file.read_text(encoding="utf8"))
    splits, task, found = content["scores"], content["task_name"], {}
    if not splits or not all(splits.values()):
        raise ValueError("it has no scores, or a split without any")
    for split, rows in splits.items():
        for row in rows:
            if not is_number(row["main_score"]) or not isinstance(row.get("details", {}), dict):
                raise TypeError(f"main_score {row['main_score']!r}")
            found[task, row["hf_subset"] if len(splits) == 1 else f"{row['hf_subset']} ({split})"] = row
    return found


def is_number(value: Any) -> bool:
    """Whether a value is a number; a truth value is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)
