"""The report as one HTML page: the verdict first, then categories, the paper's table, images and plots.

The page needs nothing but itself, and fits a phone.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .comparing import TOLERANCE, Verdict
from .public_scores import E5V, source
from .report_tables import MARKS, all_remarks, label_task, paper_table, table_of_categories, verdicts
from .runs import Run

TEMPLATE = Path(__file__).parent / "report.html.jinja"
#: Longest side of an image on the page in pixels, and examples shown of each subset.
THUMBNAIL, SHOWN = 160, 6


def as_html(
    runs: Sequence[Run], contents: Callable[[str, str], Mapping[str, Any]], models: Sequence[str] = (E5V,)
) -> str:
    """Returns the page.

    Args:
        runs: What to show.
        contents: Returns the images and texts of a task's subset; see :func:`load_contents`.
        models: Whose public scores on MIEB stand beside the runs, E5-V first.
    """
    import jinja2

    head, lines = paper_table(runs)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf8"))
    galleries = list(_galleries(runs, contents))
    plots = list(_plots(runs))
    boards = [board for run in runs if (board := _board(run, models))]
    return template.render(
        verdicts=[_banner(run, own) for run, own in zip(runs, verdicts(runs), strict=True)],
        tolerance=f"{TOLERANCE:g}",
        boards=boards,
        source=source(),
        head=head if lines or not boards else (),
        lines=lines,
        remarks=all_remarks(runs),
        galleries=galleries,
        plots=plots,
    )


def _banner(run: Run, verdict: Verdict) -> dict[str, Any]:
    left_out = [f"{count} not compared: {reason}" for reason, count in verdict.left_out.items()]
    return {
        "state": verdict.state,
        "mark": MARKS[verdict.state],
        "name": run.name,
        "text": str(verdict),
        "left_out": left_out,
    }


def _board(run: Run, models: Sequence[str]) -> dict[str, Any] | None:
    """Returns the table of categories of a run: rows of cells, each category with the rows of its tasks."""
    head, *lines = table_of_categories(run, models, tasks=True) or [[]]
    rows: list[dict[str, Any]] = []
    for cells in lines:
        row = {"cells": cells, "far": _farness(cells[4]), "tasks": []}
        if cells[0].startswith("  "):
            rows[-1]["tasks"].append(row)
        else:
            rows.append(row)
    return {"name": run.name, "head": head, "rows": rows} if rows else None


def _farness(difference: str) -> str:
    """Returns the colour's name of a difference: near, below or above."""
    if not difference:
        return ""
    return "near" if abs(float(difference)) <= TOLERANCE else "below" if float(difference) < 0 else "above"


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

    loaded: Any = mteb.get_task(task)
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
