"""What a run leaves behind: the adapter, a card that tells how it came about, the recipe, and a plot of the loss."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformerTrainer

    from .data import Report

#: Ends of the names of scores that are drawn.
PLOTTED = ("spearman_cosine", "accuracy", "recall@1")

CARD = """---
{meta}---

# {title}

A LoRA that makes text and image embeddings of [{base}]({base_link}) one space, trained on text pairs alone as
[E5-V](https://arxiv.org/abs/2407.12580) is. Made by `training/train_nli.py`.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{title}", trust_remote_code=True)
embeddings = model.encode(["A dog sitting in the grass.", {{"image": "dog.jpg"}}])
```

## Data

{data}

## Evaluation

{scores}

Figures of this run, on the data that the recipe names; they are no leaderboard's.

## Training

{steps} steps of {batch_size} rows, {hours} on {device}. Loss {first_loss} at first, {last_loss} at last.

{plot}
The recipe, in full (`recipe.yaml`):

```yaml
{recipe}```
"""


def write_run(
    trainer: SentenceTransformerTrainer, settings: dict[str, Any], report: Report, scores: dict[str, dict[str, float]]
) -> None:
    """Saves the trained adapter with its card, recipe, log and plot in the output directory.

    Everything is written beside it first, and put in place when it is whole.

    Args:
        trainer: After training.
        settings: The script's arguments.
        report: On the training data.
        scores: ``before`` and ``after``, each a mapping of names to values.
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
    (new / "log_history.json").write_text(json.dumps(history, indent=1), encoding="utf8")
    (new / "evaluation.json").write_text(json.dumps(scores, indent=2), encoding="utf8")
    recipe = recipe_text(settings, trainer.args)
    (new / "recipe.yaml").write_text(recipe, encoding="utf8")
    plotted = plot(history, new / "loss.png")
    (new / "README.md").write_text(make_card(trainer, settings, report, scores, recipe, plotted), encoding="utf8")
    for path in sorted(new.iterdir()):
        target = folder / path.name
        if path.is_dir():
            shutil.rmtree(target, ignore_errors=True)
        os.replace(path, target)
    new.rmdir()


def recipe_text(settings: dict[str, Any], args: Any) -> str:
    """Returns the run's arguments as a recipe: all of this script's, and those of the trainer that are not default."""
    import yaml
    from sentence_transformers import SentenceTransformerTrainingArguments

    default = SentenceTransformerTrainingArguments(output_dir="runs").to_dict()
    machine = ("per_device_train_batch_size", "logging_dir", "run_name", "use_cpu", "activation_checkpointing_kwargs")
    changed = {
        name: value
        for name, value in args.to_dict().items()
        if value != default.get(name) and name not in machine and isinstance(value, (bool, int, float, str, dict))
    }
    own = {name: value for name, value in settings.items() if name != "resume"}
    return yaml.safe_dump({**own, **changed}, sort_keys=False, allow_unicode=True)


def plot(history: list[dict[str, Any]], path: Path) -> bool:
    """Draws the loss, and the scores during training, over the steps; returns whether matplotlib is there to do it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        for name, value in entry.items():
            if name == "loss" or (
                name.startswith("eval_") and name.split("_")[-1] in ("cosine", "accuracy", "recall@1")
            ):
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
    settings: dict[str, Any],
    report: Report,
    scores: dict[str, dict[str, float]],
    recipe: str,
    plotted: bool,
) -> str:
    """Returns the model card, Markdown with a YAML head."""
    import yaml

    adapter = trainer.model[0].model.peft_config["default"]
    base = adapter.base_model_name_or_path
    on_hub = not Path(base).is_absolute()
    meta: dict[str, Any] = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "sentence-similarity", "feature-extraction", "e5-v", "peft", "lora"],
    }
    if on_hub:
        meta |= {"base_model": base, "base_model_relation": "adapter"}
    if not Path(settings["data"]).suffix and settings["data"].count("/") == 1:
        meta["datasets"] = [settings["data"]]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    summary = next((entry for entry in reversed(trainer.state.log_history) if "train_runtime" in entry), {})
    hash_line = f"\nSHA-256 `{report.sha256}`" if report.sha256 else ""
    return CARD.format(
        meta=yaml.safe_dump(meta, sort_keys=False),
        title=Path(trainer.args.output_dir).resolve().name,
        base=base if on_hub else Path(base).name,
        base_link=f"https://huggingface.co/{base}" if on_hub else "#",
        data="\n".join(f"- {line}" for line in report.lines()) + hash_line,
        scores=score_table(scores),
        steps=trainer.state.global_step,
        batch_size=settings["batch_size"],
        hours=_duration(summary.get("train_runtime")),
        device=_device(trainer.args),
        first_loss=f"{losses[0]:.4f}" if losses else "not logged",
        last_loss=f"{losses[-1]:.4f}" if losses else "not logged",
        plot="![loss](loss.png)\n" if plotted else "",
        recipe=recipe,
    )


def score_table(scores: dict[str, dict[str, float]]) -> str:
    """Returns scores before and after training as a Markdown table."""
    names = list(dict.fromkeys(name for found in scores.values() for name in found))
    if not names:
        return "None was asked for (`--eval_sts`, `--eval_data`, `--eval_rows`, `--eval_images`)."
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
