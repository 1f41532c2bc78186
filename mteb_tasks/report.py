"""Sets results beside the paper's: as text, as Markdown, and as one HTML page with images.

Reads the result files of ``mteb run`` and ``e5v eval``. The page needs nothing but itself, and fits a phone.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from e5v_st.files import write_atomically

from .paper import AVERAGES, PAPER, Key

TEMPLATE = Path(__file__).parent / "report.html.jinja"
STATISTICS = Path(__file__).parent / "stats"
META = "model_meta.json"
#: What reading a file raises that somebody else wrote, or that was cut off.
FAULTS = (OSError, ValueError, KeyError, TypeError, AttributeError)
#: Longest side of an image on the page in pixels, and examples shown of each subset.
THUMBNAIL, SHOWN = 160, 6
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
class Run:
    """The results of one model: ``scores`` by task and subset."""

    name: str
    revision: str
    folder: Path
    scores: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)

    def percent(self, key: Key) -> float | None:
        """Returns a score in percent; ``None`` where there is none (or none yet, as on hidden test parts)."""
        task, subset, score = key
        if subset == "average":
            parts = [self.percent((*each, score)) for each in AVERAGES[task]]
            return None if None in parts else sum(parts) / len(parts)
        value = self.scores.get((task, subset), {}).get(score)
        return 100 * value if _is_number(value) and isfinite(value) else None


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``e5v report``."""
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("results")], help="folders with results")
    parser.add_argument("--output", type=Path, help="where report.md and report.html go; default: the first folder")
    parser.add_argument("--no-pictures", action="store_true", help="do not load the datasets for the gallery")


def run(args: argparse.Namespace) -> int:
    """Prints the table, and writes ``report.md`` and ``report.html``.

    Raises:
        ValueError: If there are no results.
    """
    runs = collect(args.folders)
    if not runs:
        raise ValueError(f"there are no results in {', '.join(map(str, args.folders))}: run e5v eval or mteb run first")
    print(as_text(runs))
    output = args.output or args.folders[0]
    output.mkdir(parents=True, exist_ok=True)
    images = (lambda *_: {}) if args.no_pictures else load_contents
    for name, content in {"report.md": as_markdown(runs), "report.html": as_html(runs, images)}.items():
        write_atomically(output / name, content)
        print(output / name)
    return 0


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
    return Run(str(meta["name"]) + (f" ({settings})" if settings else ""), meta["revision"] or "", file.parent)


def _read_scores(file: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Reads scores by task and subset; where there are several splits, the subset's name says which."""
    content = json.loads(file.read_text(encoding="utf8"))
    splits, task, found = content["scores"], content["task_name"], {}
    if not splits or not all(splits.values()):
        raise ValueError("it has no scores, or a split without any")
    for split, rows in splits.items():
        for row in rows:
            if not _is_number(row["main_score"]) or not isinstance(row.get("details", {}), dict):
                raise TypeError(f"main_score {row['main_score']!r}")
            found[task, row["hf_subset"] if len(splits) == 1 else f"{row['hf_subset']} ({split})"] = row
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def make_rows(runs: Sequence[Run]) -> list[Row]:
    """Returns a row for each number of the paper, and for each hit rate or correlation that it does not have."""
    others = {
        (task, subset, score)
        for run in runs
        for (task, subset), scores in run.scores.items()
        for score in _shown_scores(task, scores)
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


def other_sizes(run: Run) -> Iterator[str]:
    """Yields which tasks were measured on more or fewer rows than the published data have."""
    for (task, subset), scores in run.scores.items():
        rows: Counter[str] = Counter()
        for own in scores.get("details", {}).get("encoding", []):
            rows[own["role"]] += own["rows"]
        wanted = _published_rows(task, subset)
        others = [f"{rows[role]} rows ({role}), not {count}" for role, count in wanted.items() if rows[role] != count]
        if rows and others:
            yield f"not comparable with the paper: {label_task(task, subset)} has {', '.join(others)}"


def _published_rows(task: str, subset: str) -> dict[str, int]:
    """Returns how many queries and documents, or sentences of pairs, a task's published data have."""
    if not any(key[0] == task for key in PAPER):
        return {}
    (split,) = json.loads((STATISTICS / f"{task}.json").read_text(encoding="utf8")).values()
    known = (split.get("hf_subset_descriptive_stats") or {}).get(subset, split)
    pairs = known["num_samples"] if known.get("num_queries") is None else None
    counts = {"query": known.get("num_queries"), "document": known.get("num_documents"), "input": pairs and 2 * pairs}
    return {role: count for role, count in counts.items() if count is not None}


def _table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    head = ["task", "score", "chance", "paper"]
    names = Counter(run.name for run in runs)
    for run in runs:
        head += [run.name if names[run.name] == 1 else f"{run.name} @{run.revision[:7]}", "difference"]
    lines = []
    for row in make_rows(runs):
        line = [label_task(*row.key[:2]), label_score(row.key[2]), _number(row.chance), _number(row.paper)]
        for value in row.values:
            both = value is not None and row.paper is not None
            line += [_number(value), f"{value - row.paper:+.2f}" if both else ""]
        lines.append(line)
    return head, lines


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _remarks(runs: Sequence[Run]) -> list[str]:
    remarks = []
    for run in runs:
        remarks.append(f"{run.name}: revision {run.revision}, from {run.folder}")
        if missing := missing_tasks(run):
            remarks.append(f"{run.name}: no results of {', '.join(missing)}")
        remarks += [f"{run.name}: {line}" for line in other_sizes(run)]
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


def as_text(runs: Sequence[Run]) -> str:
    """Returns the table and remarks for a terminal."""
    head, lines = _table(runs)
    widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]
    pad = [str.ljust, str.ljust] + [str.rjust] * (len(head) - 2)
    rows = ["  ".join(f(cell, w) for f, cell, w in zip(pad, line, widths, strict=True)) for line in [head, *lines]]
    return "\n".join([*(row.rstrip() for row in rows), "", *_remarks(runs)])


def as_markdown(runs: Sequence[Run]) -> str:
    """Returns the table and remarks as Markdown."""
    head, lines = _table(runs)
    rule = ["---", "---"] + ["---:"] * (len(head) - 2)
    rows = [f"| {' | '.join(line)} |" for line in [head, rule, *lines]]
    return "\n".join(["# E5-V: results and the paper", "", *rows, "", *(f"- {line}" for line in _remarks(runs)), ""])


def as_html(runs: Sequence[Run], contents: Callable[[str, str], Mapping[str, Any]]) -> str:
    """Returns the page.

    Args:
        runs: What to show.
        contents: Returns the images and texts of a task's subset; see :func:`load_contents`.
    """
    import jinja2

    head, lines = _table(runs)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf8"))
    galleries = list(_galleries(runs, contents))
    plots = list(_plots(runs))
    return template.render(head=head, lines=lines, remarks=_remarks(runs), galleries=galleries, plots=plots)


def _galleries(runs: Sequence[Run], contents: Callable[[str, str], Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for run in runs:
        for (task, subset), scores in run.scores.items():
            shown = scores.get("details", {}).get("examples", [])[:SHOWN]
            if not shown:
                continue
            sides = contents(task, subset)
            examples = [
                {
                    "query": _content(sides.get("queries"), example["query"]),
                    "best": [
                        {
                            **_content(sides.get("corpus"), entry["id"]),
                            "score": f"{entry['score']:.3f}",
                            "right": entry["id"] in example["relevant"],
                        }
                        for entry in example["best"]
                    ],
                }
                for example in shown
            ]
            yield {"title": f"{label_task(task, subset)}: {run.name}", "examples": examples}


def load_contents(task: str, subset: str) -> dict[str, Any]:
    """Loads queries and documents of a task's subset; nothing if the data are not at hand."""
    import mteb

    loaded = mteb.get_task(task)
    try:
        loaded.load_data()
    except (OSError, ValueError) as error:
        print(f"no images of {task}: {error}")
        return {}
    split = loaded.dataset[subset][loaded.metadata.eval_splits[0]]
    return {
        side: (split[side], {name: row for row, name in enumerate(split[side]["id"])}) for side in ("queries", "corpus")
    }


def _content(side: Any, name: str) -> dict[str, str]:
    if side is None or name not in side[1]:
        return {"text": name}
    row = side[0][side[1][name]]
    found = {"text": str(row["text"])} if row.get("text") else {}
    return {**found, "image": thumbnail(row["image"])} if row.get("image") is not None else found


def thumbnail(image: Any) -> str:
    """Returns a small JPEG as a data address."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _plots(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """Yields points in a square of 100 for the plots of the modality gap; queries and documents apart."""
    for run in runs:
        for (task, subset), scores in run.scores.items():
            flat = scores.get("details", {}).get("projection")
            if not flat:
                continue
            points = flat["query"] + flat["document"]
            low = [min(point[axis] for point in points) for axis in (0, 1)]
            width = max(max(point[axis] for point in points) - low[axis] for axis in (0, 1)) or 1
            squares = {
                side: [[round(100 * (point[axis] - low[axis]) / width, 1) for axis in (0, 1)] for point in flat[side]]
                for side in ("query", "document")
            }
            kinds = ("texts", "images") if "T2I" in task else ("images", "texts")
            yield {
                "title": f"{label_task(task, subset)}: {run.name}",
                "gap": f"{flat['gap']:.3f}",
                "kinds": kinds,
                **squares,
            }
