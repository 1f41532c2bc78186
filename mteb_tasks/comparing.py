"""A run beside public numbers: by category, task by task, and whether it reproduces E5-V at all.

Numbers are compared only where they were made alike. What is left out, and why, is said: another image layout, another
wording of the prompt, embeddings that are normalised where a classifier sees their length, other data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .paper import PAPER
from .prompting import PUBLIC, chosen_for, kind_of
from .public_scores import BENCHMARKS, CATEGORIES, E5V, PublicTask, mean_of_types, public_tasks

if TYPE_CHECKING:
    from .runs import Run

#: Points within which a number counts as reproduced. Independent runs of the weights, in another version and another
#: precision, differ from the paper by 0.8 at most on COCO and Flickr30K, where the image layout is not the reason.
TOLERANCE = 1.0
#: Resamplings of a bootstrapped interval, and the part of them that lies within it.
RESAMPLINGS, LEVEL = 1000, 0.95
#: How far a score and the mean of its queries' scores may lie apart, which are rounded.
SAME = 1e-3
#: Types of tasks in which something sees the length of an embedding.
SEES_LENGTH = ("ImageClassification", "ImageClustering")


# ---- does it reproduce E5-V ----


@dataclass
class Verdict:
    """What a run's numbers say of whether it is E5-V.

    Attributes:
        differences: Run minus public number in points, of every number that can be compared.
        left_out: Number of numbers that cannot, by the reason.
    """

    differences: dict[str, float] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def far(self) -> dict[str, float]:
        """The numbers that are not reproduced, the farthest first."""
        ordered = sorted(self.differences.items(), key=lambda each: -abs(each[1]))
        return {label: value for label, value in ordered if abs(value) > TOLERANCE}

    @property
    def state(self) -> str:
        """``"yes"``, ``"no"``, or ``"unknown"`` where nothing can be compared."""
        return "unknown" if not self.differences else "no" if self.far else "yes"

    def __str__(self) -> str:
        count, far = len(self.differences), self.far
        if self.state == "unknown":
            return "nothing here can be compared with E5-V's numbers"
        if self.state == "no":
            label, value = next(iter(far.items()))
            return (
                f"does not reproduce E5-V: {len(far)} of {count} numbers differ by more than {TOLERANCE:g} point, "
                f"most of all {label} by {value:+.2f}"
            )
        label, value = max(self.differences.items(), key=lambda each: abs(each[1]))
        return (
            f"reproduces E5-V: {count} of {count} numbers lie within {TOLERANCE:g} point; "
            f"the largest difference is {value:+.2f} ({label})"
        )


def judge(run: Run, other_data: Sequence[str] = ()) -> Verdict:
    """Compares a run with the paper and with E5-V's public scores.

    Args:
        run: What was measured.
        other_data: Tasks that were measured on other data than the published.
    """
    verdict = Verdict()
    for key, expected in PAPER.items():
        value = None if key[1] == "average" else run.percent(key)
        if value is None:
            continue
        reason = _unlike_paper(run, key[0], other_data)
        label = " ".join((key[0].removeprefix("E5V"), *(() if key[1] == "default" else (key[1],)), key[2]))
        _note(verdict, label, value - expected, reason)
    for task in public_tasks().values():
        value = measured(run, task)
        if value is not None:
            _note(verdict, task.name, value - task.scores[E5V], unlike_public(run.settings, task))
    return verdict


def _note(verdict: Verdict, label: str, difference: float, reason: str | None) -> None:
    if reason is None:
        verdict.differences[label] = difference
    else:
        verdict.left_out[reason] += 1


def _unlike_paper(run: Run, task: str, other_data: Sequence[str]) -> str | None:
    if task in other_data:
        return "measured on other data than the published"
    if "STS" not in task and run.settings.get("image_layout") != "paper":
        return "the paper's images have the image layout 'paper' (e5v-paper, --image-layout paper)"
    return "another prompt" if run.settings.get("prompts") else None


def unlike_public(settings: Mapping[str, Any], task: PublicTask) -> str | None:
    """Returns why a score cannot be compared with E5-V's public one, or ``None`` if it can.

    Args:
        settings: Of the model entry, see ``models.load_e5v``.
        task: What was measured.
    """
    if settings.get("image_layout") == "paper" and "i" in task.category:
        return "public scores have the image layout 'upstream'"
    chosen = chosen_for(settings.get("prompts"), kind_of(task))
    if "it" in task.category and task.type != "Compositionality":
        if chosen.pop("composed", None) != PUBLIC:
            return f"public scores have another wording for an image with a text (--prompt all={PUBLIC})"
    else:
        chosen.pop("composed", None)  # no row has both
    if chosen:
        return "another prompt"
    if task.type in SEES_LENGTH and settings.get("normalize", True):
        return "public scores have embeddings that are not normalised, which classifiers and clusterings see"
    return None


# ---- categories ----


def measured(run: Run, task: PublicTask) -> float | None:
    """Returns a run's score of a task in percent: the mean over subsets and splits; ``None`` if a subset is missing."""
    own = {subset: scores for (name, subset), scores in run.scores.items() if name == task.name}
    if not own or set(task.subsets) - {subset.split(" (")[0] for subset in own}:
        return None
    return 100 * float(np.mean([scores["main_score"] for scores in own.values()]))


@dataclass
class Line:
    """A line of the table of categories: means over the tasks that the run has, in percent.

    Attributes:
        label: Of the category, or of a mean over all of them.
        done: Number of tasks that the run has.
        count: Number of tasks that there are.
        value: The run's.
        public: Of each model on the same tasks, where all of these are known.
        tasks: The tasks of a category, by their names, with the same numbers.
    """

    label: str
    done: int
    count: int
    value: float | None
    public: dict[str, float | None]
    tasks: dict[str, Line] = field(default_factory=dict)

    @property
    def difference(self) -> float | None:
        """The run minus E5-V's public number."""
        public = self.public.get(E5V)
        return None if self.value is None or public is None else self.value - public


def benchmark_of(run: Run) -> str | None:
    """Returns the smallest of MIEB's benchmarks that has all of a run's tasks of MIEB; ``None`` if it has none."""
    done = {name for name, _ in run.scores} & set(public_tasks())
    fitting = (name for name in BENCHMARKS if all(name in public_tasks()[task].benchmarks for task in done))
    return next(fitting) if done else None


def categories(run: Run, models: Sequence[str]) -> list[Line]:
    """Returns the lines of the table of categories, and a mean of types for every benchmark that is complete.

    Args:
        run: What was measured.
        models: Whose public scores stand beside it.
    """
    benchmark = benchmark_of(run)
    if benchmark is None:
        return []
    tasks = [task for task in public_tasks().values() if benchmark in task.benchmarks]
    values = {task.name: measured(run, task) for task in tasks}
    lines = []
    for kind, label in CATEGORIES.items():
        own = [task for task in tasks if task.type == kind]
        done = [task for task in own if values[task.name] is not None]
        if own:
            line = Line(label, len(done), len(own), *_means(values, done, models, _mean))
            line.tasks = {task.name: Line(task.name, 1, 1, *_means(values, [task], models, _mean)) for task in done}
            lines.append(line)
    for name in BENCHMARKS:
        own = [task for task in tasks if name in task.benchmarks]
        if name in BENCHMARKS[: BENCHMARKS.index(benchmark) + 1] and None not in [values[task.name] for task in own]:
            means = _means(values, own, models, mean_of_types)
            lines.append(Line(f"mean of types, {name}", len(own), len(own), *means))
    return lines


def missing_of_mieb(run: Run) -> list[str]:
    """Returns the tasks of the run's benchmark that it has no result of, or not of all subsets."""
    benchmark = benchmark_of(run)
    return [
        task.name for task in public_tasks().values() if benchmark in task.benchmarks and measured(run, task) is None
    ]


def _mean(scores: Mapping[str, float | None], tasks: Sequence[PublicTask]) -> float | None:
    own = [scores.get(task.name) for task in tasks]
    return None if None in own or not own else float(np.mean(own))  # type: ignore[arg-type]


def _means(
    values: Mapping[str, float | None], tasks: Sequence[PublicTask], models: Sequence[str], mean: Any
) -> tuple[float | None, dict[str, float | None]]:
    public = {model: mean({task.name: task.scores.get(model) for task in tasks}, tasks) for model in models}
    return mean(values, tasks), public


# ---- intervals ----


def interval(scores: Mapping[str, Any], score: str) -> tuple[float, float] | None:
    """Returns the bootstrapped interval of a mean over queries in percent, where the queries' own scores are kept.

    Queries are drawn with replacement, one by one. Five captions of one image count as five queries, so the interval
    says how much chance lies in the choice of queries, and not of images.

    Args:
        scores: Of one task and subset, with ``details``.
        score: Such as ``hit_rate_at_5``, or the main score's name.
    """
    values = _scores_of_queries(scores.get("details") or {}, score)
    if values is None or not len(values):
        return None
    if score in scores and abs(values.mean() - scores[score]) > SAME:
        return None  # they are scores of something else
    # Drawing queries one by one is drawing how often each value comes: the same distribution, and fast for any number
    distinct, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(values), counts / len(values), RESAMPLINGS)
    means = drawn @ distinct / len(values)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return 100 * float(low), 100 * float(high)


def _scores_of_queries(details: Mapping[str, Any], score: str) -> np.ndarray | None:
    if (kept := details.get("queries", {}).get(score)) is not None:
        return np.asarray(kept, np.float64)
    name, _, k = score.rpartition("_")
    if name == "hit_rate_at" and k.isdigit() and "first_hits" in details:
        ranks = np.asarray(details["first_hits"])
        return ((ranks > 0) & (ranks <= int(k))).astype(np.float64)
    return None
