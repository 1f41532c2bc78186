"""The tables of the report, and what else it says, as text and as Markdown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .comparing import Line, Verdict, benchmark_of, categories, interval, judge, missing_of_mieb
from .paper import AVERAGES, PAPER, Key
from .public_scores import E5V, public_tasks, source
from .runs import Run

STATISTICS = Path(__file__).parent / "stats"
#: What stands in front of a verdict.
MARKS = {"yes": "✓", "no": "✗", "unknown": "–"}
#: How scores are called on the page.
LABELS = {
    "hit_rate_at_": "R@{}",
    "recall_subset_at_": "R@{} within the subset",
    "family_hit_rate_at_": "R@{} within the family",
    "reference_only_hit_rate_at_": "R@{} by the reference alone",
    "reference_only_family_hit_rate_at_": "R@{} within the family, by the reference alone",
    "cosine_spearman": "Spearman",
}


@dataclass
class Row:
    """One line of the table, in percent: the paper's number and the chance level (where known), and each run's."""

    key: Key
    paper: float | None
    chance: float | None
    values: list[float | None]


def label_task(task: str, subset: str) -> str:
    """Returns a task and subset for people."""
    return task.removeprefix("E5V") + ("" if subset == "default" else f" {subset}")


def label_score(score: str) -> str:
    """Returns the name of a score for people: ``R@10`` for ``hit_rate_at_10``."""
    stem = max((stem for stem in LABELS if score.startswith(stem)), key=len, default="")
    return LABELS.get(stem, score).format(score.removeprefix(stem))


def make_rows(runs: Sequence[Run]) -> list[Row]:
    """Returns a row for each number of the paper, and for each hit rate or correlation that it does not have.

    Tasks of MIEB have tables of their own, by category.
    """
    others = {
        (task, subset, score)
        for run in runs
        for (task, subset), scores in run.scores.items()
        for score in _shown_scores(task, scores)
        if task not in public_tasks()
    }
    done = {task for run in runs for task, _ in run.scores}
    keys = [key for key in PAPER if done & {task for task, _ in AVERAGES.get(key[0], [key[:2]])}]
    keys += sorted(others, key=_order)
    rows = []
    for key in keys:
        chances = [run.percent((*key[:2], f"chance_{key[2]}")) for run in runs if key[:2] in run.scores]
        rows.append(Row(key, PAPER.get(key), next(iter(chances), None), [run.percent(key) for run in runs]))
    return rows


def _order(key: Key) -> tuple[str, str, str, int]:
    name, _, k = key[2].rpartition("_")
    return (key[0], key[1], name, int(k)) if k.isdigit() else (key[0], key[1], key[2], 0)


def _shown_scores(task: str, scores: Mapping[str, Any]) -> list[str]:
    if any(key[0] == task for key in PAPER):
        return []
    own = [name for name in scores if name.startswith(tuple(LABELS))]
    return own or ["main_score"]


def missing_tasks(run: Run) -> list[str]:
    """Returns the paper's tasks that a run has no results of, and subsets of others; none where it has none at all."""
    wanted = {part: None for key in PAPER for part in AVERAGES.get(key[0], [key[:2]]) if part[1] != "average"}
    done = {task for task, _ in run.scores}
    if not done & {task for task, _ in wanted}:
        return []
    missing = [part for part in wanted if part not in run.scores]
    return list(dict.fromkeys(f"{task} ({subset})" if task in done else task for task, subset in missing))


def other_sizes(run: Run) -> Iterator[tuple[str, str]]:
    """Yields the tasks that were measured on more or fewer rows than the published data have, each with what is so."""
    for (task, subset), scores in run.scores.items():
        rows: Counter[str] = Counter()
        for own in scores.get("details", {}).get("encoding", []):
            rows[own["role"]] += own["rows"]
        wanted = _published_rows(task, subset)
        others = [f"{rows[role]} rows ({role}), not {count}" for role, count in wanted.items() if rows[role] != count]
        if rows and others:
            yield task, f"not comparable with the paper: {label_task(task, subset)} has {', '.join(others)}"


def _published_rows(task: str, subset: str) -> dict[str, int]:
    """Returns how many queries and documents, or sentences of pairs, a task's published data have."""
    if not any(key[0] == task for key in PAPER):
        return {}
    (split,) = json.loads((STATISTICS / f"{task}.json").read_text(encoding="utf8")).values()
    known = (split.get("hf_subset_descriptive_stats") or {}).get(subset, split)
    pairs = known["num_samples"] if known.get("num_queries") is None else None
    counts = {"query": known.get("num_queries"), "document": known.get("num_documents"), "input": pairs and 2 * pairs}
    return {role: count for role, count in counts.items() if count is not None}


def verdicts(runs: Sequence[Run]) -> list[Verdict]:
    """Returns for each run whether it reproduces E5-V."""
    return [judge(run, [task for task, _ in other_sizes(run)]) for run in runs]


def headlines(runs: Sequence[Run]) -> list[str]:
    """Returns the first lines of a report: for each run, whether it reproduces E5-V."""
    return [f"{MARKS[own.state]} {run.name} {own}" for run, own in zip(runs, verdicts(runs), strict=True)]


def paper_table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Returns head and lines of the table of the paper's numbers, and of others that are not MIEB's."""
    head = ["task", "score", "chance", "paper"]
    names = Counter(run.name for run in runs)
    for run in runs:
        head += [run.name if names[run.name] == 1 else f"{run.name} @{run.revision[:7]}", "difference"]
    lines = []
    for row in make_rows(runs):
        line = [label_task(*row.key[:2]), label_score(row.key[2]), _number(row.chance), _number(row.paper)]
        for run, value in zip(runs, row.values, strict=True):
            known = run.scores.get(row.key[:2], {})
            line += [_number(value) + _within(value, interval(known, row.key[2])), _difference(value, row.paper)]
        lines.append(line)
    return head, lines


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _difference(value: float | None, public: float | None) -> str:
    return "" if value is None or public is None else f"{value - public:+.2f}"


def _within(value: float | None, ends: tuple[float, float] | None) -> str:
    return "" if value is None or ends is None else f" [{ends[0]:.1f}, {ends[1]:.1f}]"


def table_of_categories(run: Run, models: Sequence[str], *, tasks: bool = False) -> list[list[str]]:
    """Returns the table of categories with its head; empty if a run has no task of MIEB.

    Args:
        run: What was measured.
        models: Whose public scores stand beside it, E5-V first.
        tasks: Whether each category's tasks stand below it.
    """
    lines = categories(run, models)
    if not lines:
        return []
    head = [benchmark_of(run) or "", "tasks", "run", "E5-V", "difference", *(m.split("/")[-1] for m in models[1:])]
    table = [head]
    for line in lines:
        table.append(_cells(line, models, f"{line.done} of {line.count}"))
        for name, own in line.tasks.items() if tasks else ():
            cells = _cells(own, models, "")
            cells[2] += _within(own.value, _interval_of(run, name))
            table.append([f"  {name}", *cells[1:]])
    return table


def _cells(line: Line, models: Sequence[str], done: str) -> list[str]:
    public = [_number(line.public[model]) for model in models]
    return [line.label, done, _number(line.value), public[0], _difference(line.value, line.public[E5V]), *public[1:]]


def _interval_of(run: Run, task: str) -> tuple[float, float] | None:
    """Returns the interval of a task's main score; that of several subsets is not known."""
    own = [scores for (name, _), scores in run.scores.items() if name == task]
    return interval(own[0], public_tasks()[task].main_score) if len(own) == 1 else None


def all_remarks(runs: Sequence[Run]) -> list[str]:
    """Returns what else is to be said: revisions, missing tasks, what is not compared and why, speed."""
    remarks = []
    for run in runs:
        remarks.append(f"{run.name}: revision {run.revision}, from {run.folder}")
        if missing := missing_tasks(run):
            remarks.append(f"{run.name}: no results of {', '.join(missing)}")
        if missing := missing_of_mieb(run):
            remarks.append(
                f"{run.name}: no results of {len(missing)} tasks of {benchmark_of(run)}: {', '.join(missing)}"
            )
        remarks += [f"{run.name}: {line}" for _, line in other_sizes(run)]
        for reason, count in judge(run, [task for task, _ in other_sizes(run)]).left_out.items():
            remarks.append(f"{run.name}: {count} numbers are not compared with E5-V's: {reason}")
        if ("E5VCIRRTest", "default") in run.scores:
            files = run.scores["E5VCIRRTest", "default"].get("details", {}).get("submissions", [])
            remarks.append(f"{run.name}: CIRR's test server scores {', '.join(files)}")
        remarks += [f"{run.name}: {line}" for line in speed(run)]
    return remarks


def speed(run: Run) -> list[str]:
    """Returns what encoded how fast: one line for the hardware, one for all rows together."""
    details = [scores["details"] for scores in run.scores.values() if "details" in scores]
    passes = [own for detail in details for own in detail.get("encoding", [])]
    counted = [own for own in passes if own.get("encoded") is not None]
    machines = {", ".join(f"{k} {v}" for k, v in detail.get("hardware", {}).items()) for detail in details} - {""}
    if not counted:
        return sorted(machines)
    rows, encoded = (sum(own[name] for own in counted) for name in ("rows", "encoded"))
    seconds = sum(own["seconds"] for own in counted)
    rate = f"{encoded / seconds:.1f} a second" if seconds else "at once"
    return [*sorted(machines), f"{rows} rows, {encoded} contents encoded by rank 0 in {seconds:.0f} s, {rate}"]


def as_text(runs: Sequence[Run], models: Sequence[str] = (E5V,)) -> str:
    """Returns the tables and remarks for a terminal.

    Args:
        runs: What to show.
        models: Whose public scores on MIEB stand beside them, E5-V first.
    """
    parts = []
    head, lines = paper_table(runs)
    if lines or not any(table_of_categories(run, models) for run in runs):
        parts += _align([head, *lines], left=2)
    for run in runs:
        if table := table_of_categories(run, models, tasks=True):
            parts += [""] * bool(parts) + [f"{run.name} by category", *_align(table, left=1)]
    return "\n".join([*parts, "", *all_remarks(runs)])


def _align(table: Sequence[Sequence[str]], left: int) -> list[str]:
    """Returns the lines of a table for a terminal; the first columns are aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    pad = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    return ["  ".join(f(cell, w) for f, cell, w in zip(pad, line, widths, strict=True)).rstrip() for line in table]


def as_markdown(runs: Sequence[Run], models: Sequence[str] = (E5V,)) -> str:
    """Returns the verdicts, tables and remarks as Markdown; see :func:`as_text`."""
    head, lines = paper_table(runs)
    parts = ["# E5-V: results and public numbers", "", *(f"**{line}**  " for line in headlines(runs)), ""]
    tables = [table_of_categories(run, models, tasks=True) for run in runs]
    if lines or not any(tables):
        parts += [*_rows([head, *lines], left=2), ""]
    for run, table in zip(runs, tables, strict=True):
        if table:
            parts += [f"## {run.name} by category", "", *_rows(table, left=1), ""]
    if any(tables):
        parts += [f"Public scores: {source()}.", ""]
    return "\n".join([*parts, *(f"- {line}" for line in all_remarks(runs)), ""])


def _rows(table: Sequence[Sequence[str]], left: int) -> list[str]:
    head, *lines = table
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return [f"| {' | '.join(line)} |" for line in [head, rule, *lines]]
