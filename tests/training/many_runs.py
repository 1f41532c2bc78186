"""Trains several times, one run after the other, in the processes that torchrun starts: imports cost the most.

    torchrun --nproc_per_node 2 many_runs.py RUNS.json

RUNS.json is a list of a function's name and its arguments.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path


def train_texts(*words: str) -> None:
    """Runs the training script."""
    from e5v_st.training.train_nli import main

    if main(words):
        raise SystemExit(f"failed: {words}")


def train_images(model: str, pictures: Sequence[str], out: str, cached: bool) -> None:
    """Trains on images, texts and images with a text, in batches that the first process makes and splits."""
    from datasets import Dataset
    from safetensors.torch import save_file
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer import losses
    from transformers import set_seed

    from e5v_st.training.model import load_for_training

    set_seed(0)
    trained = load_for_training(model, bits=32, text_only=False, lora_r=4, lora_dropout=0)
    rows = [
        {
            "anchor": pictures[number % 8] if number % 3 else f"Number {number}.",
            "positive": {"image": pictures[(number + 3) % 8], "text": f"is {number}"},
            "negative": pictures[(number + 5) % 8] if number % 4 else f"Not {number}.",
        }
        for number in range(12)
    ]
    loss = losses.MultipleNegativesRankingLoss(trained)
    if cached:
        loss = losses.CachedMultipleNegativesRankingLoss(trained, mini_batch_size=2, gather_across_devices=True)
    args = SentenceTransformerTrainingArguments(
        output_dir=out,
        per_device_train_batch_size=6,
        max_steps=3,
        learning_rate=0.1,
        optim="sgd",
        use_cpu=True,
        dataloader_pin_memory=False,
        accelerator_config={"split_batches": True, "dispatch_batches": True},
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SentenceTransformerTrainer(model=trained, args=args, train_dataset=Dataset.from_list(rows), loss=loss)
    trainer.train()
    if trainer.is_world_process_zero():
        weights = {name: weight.data for name, weight in trained.named_parameters() if weight.requires_grad}
        save_file(weights, Path(out) / "adapter_model.safetensors")


def run(runs: Sequence[Sequence[object]]) -> None:
    """Runs functions of this file, each given as its name and its arguments."""
    for name, *arguments in runs:
        globals()[str(name)](*arguments)


if __name__ == "__main__":
    run(json.loads(Path(sys.argv[1]).read_text(encoding="utf8")))
