"""What a maximum of image tokens saves and costs: scores, tokens and time of one LLaVA-NeXT under several budgets.

    python benchmarks/image_budget.py                # -> benchmarks/results/image_budget.json and its tables

1. The embedded model on the tasks of E5V(tiny) with images. Its pictures fit into one tile, so that they are also shown
   on wide pages: in the middle, at their own size (a budget then takes detail), and twice as large.
2. Tokens of an image of royokong/e5-v at COCO's usual sizes; only grids are needed for it.
3. Processor time for COCO's usual sizes on a model with random weights and the real tiles (``random_model.py``), in
   turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_model import SHAPES, draw_picture, make_checkpoint
from tiny_scores import scores_of

from e5v_st.mteb_tasks.emoji import E5VEmojiComposedRetrieval, E5VEmojiT2IRetrieval
from e5v_st.mteb_tasks.models import make_meta
from e5v_st.published import TINY

OUT = Path(__file__).parent / "results" / "image_budget.json"
#: Budgets of the embedded model: all of its grids, those of two tiles, one tile.
TINY_BUDGETS = (None, 33, 21)
#: The same of royokong/e5-v.
BUDGETS = (None, 1776, 1176)
#: The pages on which pictures are shown: width and height, and the picture's side; ``None`` leaves them as they are.
PAGES = {"as they are": None, "in the middle of a page": (160, 120, 60), "large on a page": (160, 120, 120)}


def on_page(image: Any, width: int, height: int, side: int) -> Any:
    """Returns a white page with an image in its middle."""
    from PIL import Image

    page = Image.new("RGB", (width, height), "white")
    page.paste(image.convert("RGB").resize((side, side)), ((width - side) // 2, (height - side) // 2))
    return page


def shown_on(task: type, page: tuple[int, int, int] | None) -> type:
    """Returns a task whose images stand on pages."""
    if page is None:
        return task

    class Shown(task):
        def load_subset(self, subset: str, split: str) -> Any:
            found = super().load_subset(subset, split)
            for part in ("queries", "corpus"):
                if "image" in found[part].column_names:
                    found[part] = found[part].map(lambda row: {"image": on_page(row["image"], *page)})
            return found

    return Shown


def measure_scores() -> dict[str, Any]:
    """Returns, for each kind of page and budget, the scores, the tokens of an image, and its seconds."""
    found: dict[str, Any] = {}
    for name, page in PAGES.items():
        tasks = [shown_on(task, page) for task in (E5VEmojiT2IRetrieval, E5VEmojiComposedRetrieval)]
        size = page[:2] if page else (60, 60)
        found[name] = {}
        for budget in TINY_BUDGETS:
            settings = {"max_image_tokens": budget} if budget else {}
            model = make_meta(str(TINY), store=False, dtype="float32", **settings).load_model(device="cpu")
            rows = scores_of(model, tasks)
            found[name][str(budget)] = {
                "tokens": count(model.model[0], size),
                **{
                    f"{task} {subset}": row["hit_rate_at_1"]
                    for task, own in rows.items()
                    for subset, row in own.items()
                },
            }
    return found


def count(transformer: Any, size: tuple[int, int]) -> int:
    """Returns how many tokens an image of this width and height takes."""
    from PIL import Image

    return transformer.reader.count([Image.new("RGB", size)])[0]


def count_published() -> dict[str, Any]:
    """Returns the tokens and tiles of an image of royokong/e5-v: of each of COCO's sizes, and on average."""
    from e5v_st.costs import find_counter

    found: dict[str, Any] = {}
    for budget in BUDGETS:
        counter = find_counter("royokong/e5-v", max_image_tokens=budget)
        counts = {f"{width}x{height}": counter.image(height, width) for width, height in SHAPES}
        tokens, patches = (statistics.mean(each) for each in zip(*counts.values(), strict=True))
        sizes = {size: tokens for size, (tokens, _) in counts.items()}
        found[str(budget)] = {"tokens": tokens, "tiles": patches / 577, "sizes": sizes}
    return found


def measure_time(images: int, runs: int) -> dict[str, Any]:
    """Returns the processor's seconds for images of COCO's sizes under each budget, medians of runs in turns."""
    import e5v_st

    noise = np.random.default_rng(0)
    items = [draw_picture(noise, SHAPES[i % len(SHAPES)]) for i in range(images)]
    with tempfile.TemporaryDirectory() as temporary:
        model = e5v_st.load(make_checkpoint(Path(temporary) / "model"), device="cpu")
    times: dict[str, list[float]] = {str(budget): [] for budget in BUDGETS}
    for run in range(runs + 1):
        for budget in BUDGETS:
            start = time.process_time()
            e5v_st.encode_all(model, items, max_image_tokens=budget, progress=False)
            if run:  # the first one warms up
                times[str(budget)].append(time.process_time() - start)
    seconds = {budget: statistics.median(values) for budget, values in times.items()}
    return {budget: {"seconds": own, "part": own / seconds["None"]} for budget, own in seconds.items()}


def how_measured(runs: int) -> dict[str, Any]:
    """Returns the command, the machine and how busy it is."""
    return {
        "command": " ".join(["python", "benchmarks/image_budget.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32",
        "load_average": os.getloadavg()[0],
        "runs": runs,
    }


def as_markdown(found: dict[str, Any]) -> str:
    """Returns the tables of docs/speed.md."""
    lines = ["| images | budget | tokens of an image | text to image | composed |", "| --- | ---: | ---: | --- | --- |"]
    for page, budgets in found["scores"].items():
        for budget, row in budgets.items():
            scores = [
                " / ".join(
                    f"{100 * row[f'{task.metadata.name} {subset}']:.1f}" for subset in ("combination", "concept")
                )
                for task in (E5VEmojiT2IRetrieval, E5VEmojiComposedRetrieval)
            ]
            lines.append(f"| {page} | {tell(budget)} | {row['tokens']} | {scores[0]} | {scores[1]} |")
    lines += ["", "| budget | tokens of an image | tiles | time |", "| ---: | ---: | ---: | ---: |"]
    for budget, row in found["published"].items():
        part = found["time"][budget]["part"]
        lines.append(f"| {tell(budget)} | {row['tokens']:,.0f} | {row['tiles']:.1f} | {part:.2f} |")
    return "\n".join(lines)


def tell(budget: str) -> str:
    """Returns a budget for people."""
    return "none" if budget == "None" else f"{int(budget):,}"


def main() -> None:
    """Measures, prints the tables and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16, help="for the times")
    parser.add_argument("--runs", type=int, default=5, help="for the times")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    found = {**how_measured(args.runs), "published": count_published(), "time": measure_time(args.images, args.runs)}
    found["scores"] = measure_scores()
    args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf8")
    print(as_markdown(found))


if __name__ == "__main__":
    main()
