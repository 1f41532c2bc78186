"""A training step with images in two ways: plain sentence-transformers on the native export, and this package.

Both: the same pairs, ``CachedMultipleNegativesRankingLoss`` in mini-batches, float32, LoRA of rank 64 on all linear
layers of the language model, no dropout, activation checkpointing, AdamW. Reading and tiling the images counts, too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_model import SHAPES, WORDS, draw_picture

ROWS, MINI_BATCH = 12, 6
RANK, ALPHA, LEARNING_RATE = 64, 16, 4e-4

Pair = tuple[dict[str, Any], dict[str, Any]]
Step = Callable[[Sequence[Pair]], float]


def pairs(uses: int, steps: int, rows: int = ROWS) -> list[list[Pair]]:
    """Batches of an image with a modification text, and the image that is meant.

    Args:
        uses: How many rows of a batch have the same two images and texts of their own, in any order; FashionIQ has two
            texts for each pair of images.
        steps: The number of batches. Two rows to warm up stand before them.
        rows: Rows of a batch.
    """
    dice, noise = random.Random(0), np.random.default_rng(0)

    def batch(size: int, uses: int) -> list[Pair]:
        found = []
        for _ in range(size // uses):
            reference, target = (draw_picture(noise, dice.choice(SHAPES)) for _ in range(2))
            texts = (" ".join(dice.choices(WORDS, k=dice.randint(4, 14))) for _ in range(uses))
            found += [({"image": reference, "text": text}, {"image": target}) for text in texts]
        dice.shuffle(found)
        return found

    return [batch(2, 1), *(batch(rows, uses) for _ in range(steps))]


def load_plain(folder: Path) -> Step:
    """Stock sentence-transformers: no code of this package runs in a step."""
    from peft import LoraConfig
    from sentence_transformers import SentenceTransformer

    from e5v_st.hub.export import export

    native = folder.with_name(folder.name + "-native")
    if not native.is_dir():
        export(str(folder), str(native), native=True)
    model = SentenceTransformer(str(native), device="cpu").requires_grad_(False)
    targets = r".*language_model\..*\.(q|k|v|o|gate|up|down)_proj"
    model[0].model.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets))
    return _make_step(model)


def load_ours(folder: Path) -> Step:
    """This package, as its trainer makes a step."""
    from e5v_st.training.model import load_for_training

    model = load_for_training(
        str(folder), bits=32, text_only=False, lora_r=RANK, lora_alpha=ALPHA, lora_dropout=0.0
    ).cpu()
    step = _make_step(model)

    def remembered(batch: Sequence[Pair]) -> float:
        with model[0].one_step():
            return step(batch)

    return remembered


def _make_step(model: Any) -> Step:
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    for name, weight in trained:
        if "lora_A" in name:
            torch.nn.init.kaiming_uniform_(weight, a=5**0.5)
    loss_of = CachedMultipleNegativesRankingLoss(model, mini_batch_size=MINI_BATCH)
    optimizer = torch.optim.AdamW([weight for _, weight in trained], lr=LEARNING_RATE, weight_decay=0.0)

    def step(batch: Sequence[Pair]) -> float:
        columns = [model.preprocess(list(column)) for column in zip(*batch, strict=True)]
        loss = loss_of(columns, None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


WAYS: dict[str, Callable[[Path], Step]] = {"plain": load_plain, "ours": load_ours}
