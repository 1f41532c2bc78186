"""The loss, made from the settings. Another loss of sentence-transformers goes here."""

from __future__ import annotations

from typing import Any

from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)

from .recipes import Settings


def make_loss(model: Any, settings: Settings, batch_size: int, world_size: int) -> Any:
    """Returns the contrastive loss over the rows of all processes.

    Each anchor is scored against every positive and every hard negative of the step. With four rows, for anchor 1:

        positives       0  [1]  2  3       1 is right, at scale 1 / temperature
        hard negatives  0   1   2  3       all wrong, its own too

    It is the loss of ft_llm.py, apart from the gradient, which that script divides by the number of processes.

    Args:
        model: As ``load_for_training`` returns it.
        settings: ``temperature`` and ``mini_batch_size`` are used.
        batch_size: Rows of one process. More than ``mini_batch_size`` are gradient-cached, with the same gradient.
        world_size: Number of processes.
    """
    shared = {"scale": 1 / settings.temperature, "gather_across_devices": world_size > 1}
    if batch_size > settings.mini_batch_size:
        return CachedMultipleNegativesRankingLoss(model, mini_batch_size=settings.mini_batch_size, **shared)
    return MultipleNegativesRankingLoss(model, **shared)
