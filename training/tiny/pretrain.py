"""Step one of the embedded default: a small LLaVA-NeXT learns, from scratch, to say what it sees and reads in one word.

    python -m training.tiny.pretrain --output_dir runs/tiny-step-one

It stands for what LLaVA-NeXT brings to E5-V, on the data of ``mteb_tasks/data`` and on its ``train`` split alone.
Prompts are E5-V's own. What is learnt, all of it at the last token of the prompt, where E5-V reads its embedding:

- *words*: the LM head gives the words of the name (0.7) and of the keywords (0.3), as a bag. It does so for an image,
  for a text (name or shuffled keywords), and for an image with a modification text (the words of the changed image).
  For a gloss it gives the noun;
- *images and texts*: each image in the batch finds its own text, and each text its image (temperature 0.05). Half of
  the images are pairs that differ only in skin tone or gender. An image with its modification text finds the changed
  image.

Every batch depends on the seed and the number of the step alone, so a run that was stopped and goes on with
``--resume``, from its last saved state, sees the same batches. The result is written in the format of the published
checkpoint: old key names, half precision, an image token one beyond the embedding, a processor without ``patch_size``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from .data import Row, load_data, pictures, read
from .model import build_model, image_tokens, last_states, normalised
from .publish import export, write_json
from .scoring import evaluate, open_plain, recalls
from .settings import Settings
from .state import load_state, save_state
from .step import Trainer, learning_rate, make_optimizer
from .tokenizer import train_tokenizer


def validation_recall(trainer: Trainer) -> float:
    """Returns text -> image R@1 on the validation split in percent, for the log."""
    import numpy as np
    import torch
    from torch.nn import functional as F

    rows = [row for row in read("emoji.parquet") if row["split"] == "validation" and row["gallery"]]
    pixels = torch.from_numpy(np.stack([np.asarray(p) for p in pictures(rows)])).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        sees = image_tokens(trainer.model, normalised(pixels))
        images = last_states(trainer.model, trainer.prompts(["image"] * len(rows), [""] * len(rows)), sees)
        texts = last_states(trainer.model, trainer.prompts(["text"] * len(rows), [row["name"] for row in rows]))
    return recalls(F.normalize(texts, dim=-1) @ F.normalize(images, dim=-1).T, range(len(rows)))["R@1"]


def train(settings: Settings) -> Trainer:
    """Trains, saving the state every ``save_every`` steps and on Ctrl-C."""
    import torch
    from tqdm import tqdm

    torch.set_num_threads(settings.threads)
    data = load_data()
    trainer = Trainer(settings, data, train_tokenizer(data))
    optimizer = make_optimizer(settings, trainer.model)
    state = settings.output_dir / "state.safetensors"
    start = load_state(state, trainer.model, optimizer) if settings.resume else 0
    log, begun = settings.output_dir / "log.jsonl", time.monotonic()
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    step = start
    try:
        for step in (bar := tqdm(range(start, settings.steps), initial=start, total=settings.steps, unit="step")):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step)
            with torch.autocast("cpu", torch.bfloat16):
                losses = trainer.losses(step)
            total = sum(losses.values())
            if not total.isfinite():
                raise FloatingPointError(f"the loss is {total.item()} at step {step}: lower --lr")
            optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
            optimizer.step()
            bar.set_postfix(loss=f"{total.item():.3f}")
            saves = (step + 1) % settings.save_every == 0
            if saves:
                save_state(state, settings, trainer.model, optimizer, step + 1)
            if saves or (step + 1) % 20 == 0:
                line: Row = {"step": step + 1, **{k: round(v.item(), 3) for k, v in losses.items()}}
                line["seconds"] = round(time.monotonic() - begun, 1)
                if saves:
                    line["validation R@1"] = validation_recall(trainer)
                with log.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    except KeyboardInterrupt:
        # The step that was cut short may have changed some weights: the state of the last full save stands.
        sys.exit(f"stopped at step {step}; go on with --resume --output_dir {settings.output_dir}")
    return trainer


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Reads the command line: one option for each field of :class:`Settings`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Settings):
        if field.name == "resume":
            parser.add_argument("--resume", action="store_true", help="go on from the state in output_dir")
        else:
            kind = type(field.default) if field.name != "output_dir" else Path
            parser.add_argument(f"--{field.name}", type=kind, default=field.default, help=f"default: {field.default}")
    return Settings(**vars(parser.parse_args(arguments)))


def main() -> None:
    """Trains, exports, opens the export in plain transformers and scores it, trained and untrained."""
    settings = parse()
    begun = time.monotonic()
    trainer = train(settings)
    minutes = round((time.monotonic() - begun) / 60, 1)
    model_dir = settings.output_dir / "model"
    export(trainer.model, trainer.tokenizer, model_dir)
    export(build_model(settings.seed), trainer.tokenizer, settings.output_dir / "untrained")
    splits = ("validation", "combination", "concept")
    report = {
        "command": "python " + " ".join(sys.argv),
        **asdict(settings),
        "minutes": minutes,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "trained": evaluate(*open_plain(model_dir), splits),
        "untrained": evaluate(*open_plain(settings.output_dir / "untrained"), splits),
    }
    write_json(settings.output_dir / "step_one.json", json.loads(json.dumps(report, default=str)))
    print(json.dumps(report["trained"], indent=2))


if __name__ == "__main__":
    main()
