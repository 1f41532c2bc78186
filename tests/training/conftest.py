"""A recipe that trains the small golden checkpoint for a few steps, and the golden triplets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def golden_training(goldens: Path) -> dict[str, np.ndarray]:
    """Loss, gradient norm and prompts of the published script."""
    with np.load(goldens / "training.npz", allow_pickle=False) as found:
        return {name: found[name] for name in found if name != "released_prompts"}


@pytest.fixture(scope="session")
def triplets(golden_training) -> list[dict[str, str]]:
    return [
        dict(zip(("anchor", "positive", "negative"), map(str, row), strict=True)) for row in golden_training["triplets"]
    ]


@pytest.fixture
def recipe(small: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe (JSON is YAML) and its data: 40 triplets, 8 a step, 4 steps, a checkpoint after each."""
    rows = [
        {
            "anchor": f"Number {i} is on the mat.",
            "positive": f"There is a mat under {i}.",
            "negative": f"No {i} at all, {i * 7}.",
        }
        for i in range(40)
    ]
    data = tmp_path / "triplets.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))

    def write(**changes) -> Path:
        values = {
            "model": str(small),
            "data": str(data),
            "output_dir": str(tmp_path / "run"),
            "bits": 32,
            "batch_size": 8,
            "mini_batch_size": 8,
            "lora_r": 4,
            "gradient_checkpointing": False,
            "learning_rate": "4e-3",
            "warmup_steps": 0,
            "max_steps": 4,
            "save_steps": 1,
            "logging_steps": 1,
            "disable_tqdm": True,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps({**values, **changes}))
        return path

    return write


@pytest.fixture
def source_recipe(small: Path, tmp_path: Path) -> Callable[..., str]:
    """Writes a recipe with three sources (texts, captioned images, composed queries) of 12 rows, 4 a step."""
    numbers = np.random.default_rng(0)
    for row in range(12):
        pixels = numbers.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((60, 50)).save(tmp_path / f"{row}.png")
    sources = {
        "texts": [
            {"anchor": f"Number {n}.", "positive": f"It is {n}.", "negative": f"Not {n * 7}."} for n in range(12)
        ],
        "photos": [{"anchor_text": f"Picture {n}.", "positive_image": f"{n}.png"} for n in range(12)],
        "changes": [
            {"anchor_text": f"is {n}", "anchor_image": f"{n}.png", "positive_image": f"{(n + 1) % 12}.png"}
            for n in range(12)
        ],
    }
    for name, rows in sources.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def write(**changes: Any) -> str:
        values: dict[str, Any] = {
            "model": str(small),
            "train": [
                str(tmp_path / "texts.jsonl"),
                {"data": str(tmp_path / "photos.jsonl"), "weight": 2},
                {"data": str(tmp_path / "changes.jsonl"), "prompt": {"anchor": "fashioniq-query"}},
            ],
            "loss": {"name": "cached_mnrl", "directions": ["query_to_doc", "doc_to_query"], "false_negatives": 0.0},
            "matryoshka": [128, 32],
            "output_dir": str(tmp_path / "run"),
            "bits": 32,
            "batch_size": 4,
            "mini_batch_size": 3,
            "lora_r": 4,
            "gradient_checkpointing": False,
            "learning_rate": "4e-3",
            "warmup_steps": 0,
            "num_train_epochs": 1,
            "max_steps": 4,
            "save_steps": 100,
            "logging_steps": 1,
            "disable_tqdm": True,
        }
        path = tmp_path / "sources.yaml"
        path.write_text(json.dumps({**values, **changes}))
        return str(path)

    return write
