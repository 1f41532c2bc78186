"""Scores for a model's card, from mteb's result files: of one model and one revision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from e5v_st.files import read_json
from e5v_st.model_files import revision_of

META = "model_meta.json"
#: The beginning of the names that the entries of directories have.
LOCAL = "local/"


@dataclass
class Measured:
    """The scores of a model: one for each task, split and subset.

    Attributes:
        name: As ``model_meta.json`` has it, with mteb's settings of an experiment.
        revision: Likewise; empty where it is not known.
        scores: With the keys ``task``, ``revision`` (of the data), ``split``, ``subset`` and ``score``.
    """

    name: str
    revision: str
    scores: list[dict[str, Any]]

    @property
    def label(self) -> str:
        """Name and revision, as ``--results-model`` takes them."""
        return f"{self.name}@{self.revision}" if self.revision else self.name


def read_results(folder: Path, run: Path, repo_id: str | None = None, wanted: str | None = None) -> Measured:
    """Reads the scores of a model below a folder; those that are not numbers (as of a hidden test part) are left out.

    Args:
        folder: With mteb's result files.
        run: The model's own folder: its results are those of ``local/<folder>``.
        repo_id: Where it goes; its results may be those of that name as well.
        wanted: ``NAME`` or ``NAME@REVISION`` of the results to take, whatever the folder's name.

    Raises:
        ValueError: If there are no results or those of several models or revisions, none of them is wanted or the
            model's own, they are of other weights than the model has now, or a file has another form.
    """
    found = _group(folder)
    known = ", ".join(sorted(own.label for own in found))
    hint = "say which with --results-model NAME or NAME@REVISION"
    fitting = [own for own in found if wanted is None or _is_meant(own, wanted)]
    if not fitting:
        raise ValueError(f"{folder} has no results of {wanted}, but of {known}")
    if len(fitting) > 1:
        raise ValueError(f"{folder} has results of {', '.join(sorted(own.label for own in fitting))}: {hint}")
    (measured,) = fitting
    if wanted is None:
        _check_own(measured, run, repo_id, hint)
    measured.scores = [score for score in measured.scores if isfinite(score["score"])]
    if not measured.scores:
        raise ValueError(f"{folder} has no score of {measured.label} that is a number")
    return measured


def _is_meant(own: Measured, wanted: str) -> bool:
    return wanted == own.name or ("@" in wanted and own.label.startswith(wanted))


def _check_own(measured: Measured, run: Path, repo_id: str | None, hint: str) -> None:
    """Raises ValueError if results are another model's, or of other weights than those in its folder now."""
    own = f"{LOCAL}{run.resolve().name}"
    if measured.name not in (own, repo_id):
        raise ValueError(f"the results are those of {measured.label}, not of {own}: if they are this model's, {hint}")
    if measured.name == own and measured.revision != (now := revision_of(str(run), loaded=True)):
        raise ValueError(
            f"the results are those of revision {measured.revision}, but {run} has changed since and is {now}: measure "
            f"it again; if they are this model's all the same, {hint}"
        )


def _group(folder: Path) -> list[Measured]:
    """Returns all results below a folder by model and revision."""
    files = {file: read_json(file) for file in sorted(Path(folder).rglob("*.json")) if file.name != META}
    results = {file: content for file, content in files.items() if isinstance(content, dict) and "scores" in content}
    if not results:
        raise ValueError(f"{folder} has no result files of mteb (JSON with 'task_name' and 'scores')")
    found: dict[str, dict[tuple[str, str, str], dict[str, Any]]] = {}
    models = {}
    for file, result in results.items():
        model = _read_model(file.parent / META)
        models[model.label] = model
        known = found.setdefault(model.label, {})
        try:
            scores = {(own["task"], own["split"], own["subset"]): own for own in _scores_in(result)}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{file} is not a result file of mteb: {error!r}") from None
        for key, own in scores.items():
            if repr(known.setdefault(key, own)) != repr(own):
                raise ValueError(f"{file} has another score of {own['task']} than a second file of {model.label}")
    for label, scores in found.items():
        models[label].scores = list(scores.values())
    return list(models.values())


def _read_model(file: Path) -> Measured:
    meta = read_json(file)
    try:
        settings = ", ".join(f"{key}={value}" for key, value in sorted((meta.get("experiment_kwargs") or {}).items()))
        return Measured(str(meta["name"]) + (f" ({settings})" if settings else ""), str(meta["revision"] or ""), [])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} does not name a model and its revision: {error!r}") from None


def _scores_in(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for split, rows in sorted(result["scores"].items()):
        for row in rows:
            yield {
                "task": result["task_name"],
                "revision": result.get("dataset_revision"),
                "split": split,
                "subset": row.get("hf_subset", "default"),
                "score": float(row["main_score"]),
            }
