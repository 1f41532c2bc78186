"""Which source the next batch is from.

A batch is from one source, and the batches that several processes compute in one step are too: losses that gather the
rows of all processes would otherwise compare the items of one source with those of another.

    two processes; photos has 6 batches and weight 1, texts has 8 and weight 0.5

    step      1       2       3       4       5
    process 0 photos  texts   photos  photos  texts
    process 1 photos  texts   photos  photos  texts
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from sentence_transformers.base.sampler import MultiDatasetDefaultBatchSampler

#: Added to the epoch of a source that begins anew within an epoch, so that its rows come in another order.
_NEXT_PASS = 1_000_003


def steps_of(weight: float, batches: int, processes: int) -> int:
    """Returns in how many steps of an epoch the batches come from a source.

    Args:
        weight: The source's.
        batches: Of one pass over it.
        processes: Batches that are computed in one step.

    Example:
        >>> steps_of(0.5, batches=8, processes=2)
        2
    """
    return max(1, round(weight * batches / processes))


class WeightedBatchSampler(MultiDatasetDefaultBatchSampler):
    """Draws from several sources by their weights: one of weight 2 is seen twice in an epoch, one of 0.5 half.

    Args:
        dataset: All sources, one behind the other.
        batch_samplers: One for each source.
        weights: One for each source.
        processes: Batches that are computed in one step.
        generator: Draws the order.
        seed: Of the order.
    """

    def __init__(
        self,
        dataset: Any,
        batch_samplers: Sequence[Any],
        *,
        weights: Sequence[float],
        processes: int = 1,
        generator: torch.Generator | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(dataset, list(batch_samplers), generator=generator, seed=seed)
        self.processes = processes
        self.steps = [
            steps_of(weight, len(sampler), processes) for weight, sampler in zip(weights, batch_samplers, strict=True)
        ]

    def __len__(self) -> int:
        return sum(self.steps) * self.processes

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.Generator().manual_seed(self.seed + self.epoch)
        sources = torch.tensor([source for source, steps in enumerate(self.steps) for _ in range(steps)])
        batches = [self._batches_of(source) for source in range(len(self.steps))]
        for source in sources[torch.randperm(len(sources), generator=order)].tolist():
            for _ in range(self.processes):
                yield next(batches[source])

    def _batches_of(self, source: int) -> Iterator[list[int]]:
        """Yields the batches of a source, and begins anew behind the last."""
        parts: list[Any] = self.dataset.datasets[:source]
        offset = sum(map(len, parts))
        sampler = self.batch_samplers[source]
        epoch, passes = self.epoch, 0
        while True:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch + passes * _NEXT_PASS)
            count = 0
            for batch in sampler:
                count += 1
                yield [row + offset for row in batch]
            if not count:
                raise ValueError(
                    f"source {source + 1} has too few different rows for a batch of {sampler.batch_size}: "
                    "lower batch_size, or leave the source out"
                )
            passes += 1
