"""A recipe that trains the small golden checkpoint for a few steps, and the golden triplets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


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
