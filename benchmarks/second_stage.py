"""What the second stage changes on the embedded model: E5V(tiny) before and after it, over several seeds.

    python benchmarks/second_stage.py                      # all ways, seeds 0, 1 and 2 -> results/second_stage.json
    python benchmarks/second_stage.py --ways recipe --seeds 0

Each way is the recipe ``tiny_second_stage`` with the changes below. The pictures, names and pairs of E5V(tiny) are held
out of all of them. Ways are compared on the validation split, which the runs themselves measure; the test scores are
those of the benchmark. A finished run is kept in ``--folder`` and not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import yaml
from tiny_scores import load, scores_of

from e5v_st.mteb_tasks.emoji import (
    E5VEmojiComposedRetrieval,
    E5VEmojiI2TRetrieval,
    E5VEmojiSTS,
    E5VEmojiT2IRetrieval,
)
from e5v_st.published import TINY
from e5v_st.training.recipes import RECIPES, read_recipe
from e5v_st.training.train_nli import main as train

OUT = Path(__file__).parent / "results" / "second_stage.json"
TASKS = [E5VEmojiT2IRetrieval, E5VEmojiI2TRetrieval, E5VEmojiComposedRetrieval, E5VEmojiSTS]
#: (task, subset, score): what is told, with its label.
TOLD = {
    "T2I R@1, new combinations": ("E5VEmojiT2IRetrieval", "combination", "hit_rate_at_1"),
    "T2I R@1, new concepts": ("E5VEmojiT2IRetrieval", "concept", "hit_rate_at_1"),
    "T2I R@10, new concepts": ("E5VEmojiT2IRetrieval", "concept", "hit_rate_at_10"),
    "I2T R@10, new concepts": ("E5VEmojiI2TRetrieval", "concept", "hit_rate_at_10"),
    "composed R@1, new combinations": ("E5VEmojiComposedRetrieval", "combination", "hit_rate_at_1"),
    "composed R@1, new concepts": ("E5VEmojiComposedRetrieval", "concept", "hit_rate_at_1"),
    "composed among relatives, new concepts": ("E5VEmojiComposedRetrieval", "concept", "family_hit_rate_at_1"),
    "text Spearman": ("E5VEmojiSTS", "default", "cosine_spearman"),
}
#: Changes of the recipe.
WAYS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "projector and tower too": {"train_vision": "lora"},
}


def run(way: str, seed: int, folder: Path) -> dict[str, Any]:
    """Trains in one way, and returns its scores on the validation split and on the benchmark."""
    out = folder / f"{way.replace(' ', '-')}-{seed}"
    kept = out / "scores.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text(encoding="utf8")))
    values = {**read_recipe(RECIPES / "tiny_second_stage.yaml"), **WAYS[way], "seed": seed, "output_dir": str(out)}
    recipe = folder / f"{out.name}.yaml"
    recipe.write_text(yaml.safe_dump(values), encoding="utf8")
    if train([str(recipe), "--resume"]):
        raise SystemExit(f"{way}, seed {seed} failed")
    validation = json.loads((out / "evaluation.json").read_text(encoding="utf8"))
    found = {"validation": validation["after"], "test": told(scores_of(load(out), TASKS))}
    kept.write_text(json.dumps(found, indent=1), encoding="utf8")
    return found


def told(scores: dict[str, Any]) -> dict[str, float]:
    """Returns the scores that are told, in percent."""
    return {label: round(100 * scores[task][subset][name], 2) for label, (task, subset, name) in TOLD.items()}


def as_markdown(result: dict[str, Any]) -> str:
    """The table: before, and the mean and range over the seeds for each way."""
    lines = [f"| | before | {' | '.join(result['ways'])} |", "| --- | ---: |" + " ---: |" * len(result["ways"])]
    for label in TOLD:
        cells = []
        for runs in result["ways"].values():
            values = [each["test"][label] for each in runs.values()]
            spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {label} | {result['before'][label]:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Reads the command line, runs what is missing, writes the file and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "e5v-second-stage")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"before": told(scores_of(load(TINY), TASKS)), "ways": {}}
    for seed in args.seeds:
        for way in args.ways:
            result["ways"].setdefault(way, {})[str(seed)] = run(way, seed, args.folder)
            args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")
    print(as_markdown(result))


if __name__ == "__main__":
    main()
