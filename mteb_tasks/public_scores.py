"""The public scores of E5-V and of six other models on the 130 tasks of MIEB, which travel with the package.

``data/public_scores.json`` names its source: mteb's public repository of results, at one commit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from e5v_st.files import read_json

FILE = Path(__file__).parent / "data" / "public_scores.json"
E5V = "royokong/e5-v"
#: Other models that the report has beside E5-V unless somebody names others: the best public one, and a CLIP.
USUAL = ("LCO-Embedding/LCO-Embedding-Omni-7B", "google/siglip-so400m-patch14-384")
#: What mteb's types of tasks are called in the report, in its order. mteb's mean of types is the mean over these.
CATEGORIES = {
    "Any2AnyRetrieval": "retrieval",
    "Any2AnyMultilingualRetrieval": "multilingual retrieval",
    "Compositionality": "compositionality",
    "DocumentUnderstanding": "documents",
    "VisionCentricQA": "vision-centric QA",
    "VisualSTS(eng)": "visual STS, English",
    "VisualSTS(multi)": "visual STS, other languages",
    "ImageClassification": "classification",
    "ImageClustering": "clustering",
    "ZeroShotClassification": "zero-shot classification",
}
#: Benchmarks from the smallest to the largest; each holds the ones before it.
BENCHMARKS = ("MIEB(lite)", "MIEB(eng)", "MIEB(Multilingual)")


@dataclass(frozen=True)
class PublicTask:
    """A task of MIEB.

    Attributes:
        name: mteb's.
        type: mteb's type of tasks, a key of :data:`CATEGORIES`.
        category: What finds what, such as ``"it2t"``.
        main_score: mteb's name of the score.
        benchmarks: Those of :data:`BENCHMARKS` that have it.
        scores: In percent by model.
        subsets: E5-V's scores by subset, where there are several.
    """

    name: str
    type: str
    category: str
    main_score: str
    benchmarks: tuple[str, ...]
    scores: Mapping[str, float]
    subsets: Mapping[str, float]


@cache
def public_tasks() -> dict[str, PublicTask]:
    """Returns the tasks of MIEB by their names."""
    known = read_json(FILE)
    return {
        name: PublicTask(
            name,
            row["type"],
            row["category"],
            row["main_score"],
            tuple(row["benchmarks"]),
            {model: score for model, score in zip(known["models"], row["scores"], strict=True) if score is not None},
            known["e5v_by_subset"].get(name, {}),
        )
        for name, row in known["tasks"].items()
    }


def public_models() -> list[str]:
    """Returns the models whose scores are known, E5-V first."""
    return list(read_json(FILE)["models"])


def source() -> str:
    """Returns where the scores are from."""
    return str(read_json(FILE)["source"])


def find_models(names: Iterable[str]) -> list[str]:
    """Returns the whole names of models; a part of a name will do.

    Raises:
        ValueError: If a name is none of theirs, or of several.
    """
    found = []
    for name in names:
        fitting = [model for model in public_models() if name.lower() in model.lower()]
        if len(fitting) != 1:
            raise ValueError(f"got {name!r}, want one of the models with public scores: {', '.join(public_models())}")
        found += fitting
    return found


def mean_of_types(scores: Mapping[str, float | None], tasks: Iterable[PublicTask]) -> float | None:
    """Returns the mean over types of the mean over the tasks of a type, as mteb's leaderboard has it.

    Args:
        scores: By task.
        tasks: Those to take.

    Returns:
        ``None`` if a task has no score: a mean over fewer tasks is another number.
    """
    types: dict[str, list[float]] = {}
    for task in tasks:
        score = scores.get(task.name)
        if score is None:
            return None
        types.setdefault(task.type, []).append(score)
    means = [sum(own) / len(own) for own in types.values()]
    return sum(means) / len(means) if means else None
