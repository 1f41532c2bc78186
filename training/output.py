"""What a run leaves behind: the adapter, a card that tells how it came about, the recipe, a log and a plot.

The card here is for the run: rows of data, hours, device. ``e5v push`` writes the one that goes to the hub, with the
repository's name, licence, results and code, from this run's files (``e5v_st.run_files``).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e5v_st.files import is_hub_id
from e5v_st.run_files import CARD, EVALUATION, LOG, PLOT, RECIPE

from .first_stage import describe_first_stage
from .recipes import SCORES, Settings, recipe_text

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformerTrainer

    from .examples import Report

#: Ends of the names of scores that are drawn.
DRAWN = ("_cosine", "_accuracy", "_recall@1", "_ndcg@10")

TEMPLATE = """---
{meta}
---

# {title}

A LoRA that makes text and image embeddings of [{base}]({base_link}) one space, trained {training} with the
recipe of [E5-V](https://arxiv.org/abs/2407.12580). Made by `e5v train`.
{first_stage}
```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{title}", trust_remote_code=True)
embeddings = model.encode(["A dog sitting in the grass.", {{"image": "dog.jpg"}}])
```

## Data

{data}

## Evaluation

{scores}

Scores of this run, on the data that the recipe names. They are not from a leaderboard.

## Training

{steps} steps of {batch_size} rows, {hours} on {device}. Loss {first_loss} at first, {last_loss} at last.

{plot}
The recipe, in full (`recipe.yaml`):

```yaml
{recipe}```
"""


def write_run(
    trainer: SentenceTransformerTrainer,
    settings: Settings,
    reports: Sequence[Report],
    scores: dict[str, dict[str, float]],
) -> None:
    """Saves the trained adapter with its card, recipe, log and plot in the output directory.

    Everything is written to a folder in it first, and moved to its place when all of it is whole:

        run/.saving-PID/adapter_model.safetensors, README.md, …   ->   run/adapter_model.safetensors, README.md, …

    Args:
        trainer: After training.
        settings: Our arguments.
        reports: On the training data, one for each source.
        scores: ``before`` and ``after``, each a mapping of names to values.

    Raises:
        OSError: If something cannot be written.
    """
    from safetensors import SafetensorError

    folder = Path(trainer.args.output_dir)
    new = folder / f".saving-{os.getpid()}"
    for unfinished in folder.glob(".saving-*"):  # of a process that was killed here
        shutil.rmtree(unfinished, ignore_errors=True)
    try:
        trainer.model.save_pretrained(str(new), create_model_card=False)
    except SafetensorError as error:
        raise OSError(f"cannot write {new}: {error}") from error
    history = trainer.state.log_history
    recipe = recipe_text(settings, trainer.args)
    (new / LOG).write_text(json.dumps(history, indent=1), encoding="utf8")
    (new / EVALUATION).write_text(json.dumps(scores, indent=2), encoding="utf8")
    (new / RECIPE).write_text(recipe, encoding="utf8")
    plotted = plot(history, new / PLOT)
    (new / CARD).write_text(make_card(trainer, settings, reports, scores, recipe, plotted), encoding="utf8")
    for path in sorted(new.iterdir()):
        target = folder / path.name
        if path.is_dir():
            shutil.rmtree(target, ignore_errors=True)
        os.replace(path, target)
    new.rmdir()


def plot(history: list[dict[str, Any]], path: Path) -> bool:
    """Draws the loss, and the scores during training, over the steps; returns whether it did.

    Without matplotlib, or without a loss in the log, there is no plot.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        for name, value in entry.items():
            if name == "loss" or (name.startswith("eval_") and name.endswith(DRAWN)):
                curves.setdefault(name.removeprefix("eval_"), []).append((entry["step"], value))
    if "loss" not in curves:
        return False
    figure = Figure(figsize=(8, 4), layout="constrained")
    left = figure.subplots()
    left.plot(*zip(*curves.pop("loss"), strict=True), color="black", label="loss")
    left.set(xlabel="step", ylabel="loss")
    left.set_ylim(bottom=0)
    if curves:
        right = left.twinx()
        for name, points in curves.items():
            right.plot(*zip(*points, strict=True), marker="o", label=name)
        right.set_ylabel("score")
        right.legend(loc="lower right")
    left.legend(loc="upper right")
    figure.savefig(path, dpi=120)
    return True


def make_card(
    trainer: SentenceTransformerTrainer,
    settings: Settings,
    reports: Sequence[Report],
    scores: dict[str, dict[str, float]],
    recipe: str,
    plotted: bool,
) -> str:
    """Returns the model card of the run, Markdown with a YAML head."""
    from huggingface_hub import ModelCardData

    base = trainer.model[0].model.peft_config["default"].base_model_name_or_path
    on_hub = not Path(base).is_absolute()
    on_hub_too = [each.source for each in reports if is_hub_id(each.source) and not Path(each.source).exists()]
    meta = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "sentence-similarity", "feature-extraction", "e5-v", "peft", "lora"],
        base_model=base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        datasets=on_hub_too or None,
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    summary = next((entry for entry in reversed(trainer.state.log_history) if "train_runtime" in entry), {})
    return TEMPLATE.format(
        meta=meta.to_yaml(),
        title=Path(trainer.args.output_dir).resolve().name,
        base=base if on_hub else Path(base).name,
        base_link=f"https://huggingface.co/{base}" if on_hub else "#",
        data="\n\n".join(map(_describe, reports)),
        training="on the data below" if settings.train else "on text pairs alone",
        first_stage=f"\nIt goes on from the adapter {describe_first_stage(settings.init_adapter)}.\n"
        if settings.init_adapter
        else "",
        scores=score_table(scores),
        steps=trainer.state.global_step,
        batch_size=settings.batch_size,
        hours=_duration(summary.get("train_runtime")),
        device=_device(trainer.args),
        first_loss=f"{losses[0]:.4f}" if losses else "not logged",
        last_loss=f"{losses[-1]:.4f}" if losses else "not logged",
        plot=f"![loss]({PLOT})\n" if plotted else "",
        recipe=recipe,
    )


def _describe(report: Report) -> str:
    """Returns what a card says of a source."""
    digest = f"\n- SHA-256 `{report.sha256}`" if report.sha256 else ""
    return "\n".join(f"- {line}" for line in report.lines()) + digest


def score_table(scores: dict[str, dict[str, float]]) -> str:
    """Returns scores before and after training as a Markdown table."""
    names = list(dict.fromkeys(name for found in scores.values() for name in found))
    if not names:
        return f"None was asked for ({', '.join(f'`--{name}`' for name in SCORES)})."
    lines = ["| | before | after |", "| --- | ---: | ---: |"]
    for name in names:
        cells = (scores.get(when, {}).get(name) for when in ("before", "after"))
        lines.append(f"| {name} | " + " | ".join("" if cell is None else f"{cell:.4f}" for cell in cells) + " |")
    return "\n".join(lines)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "time not logged"
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.2f} h"


def _device(args: Any) -> str:
    import torch

    name = torch.cuda.get_device_name() if args.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"{args.world_size} x {name}" if args.world_size > 1 else name
