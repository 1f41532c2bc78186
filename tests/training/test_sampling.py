"""Batches of several sources: their shares, and one source for all processes of a step."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.base.sampler import DefaultBatchSampler, NoDuplicatesBatchSampler
from torch.utils.data import ConcatDataset, RandomSampler

from e5v_st.training.sampling import WeightedBatchSampler, steps_of

SIZE = 3


def make(sizes: list[int], weights: list[float], processes: int = 1, duplicates: bool = True) -> WeightedBatchSampler:
    parts = [Dataset.from_dict({"text": [f"{part}-{row}" for row in range(size)]}) for part, size in enumerate(sizes)]
    generator = torch.Generator()
    how = {"batch_size": SIZE, "drop_last": True, "generator": generator, "seed": 0}
    samplers = [
        DefaultBatchSampler(RandomSampler(part, generator=generator), **how)
        if duplicates
        else NoDuplicatesBatchSampler(part, **how)
        for part in parts
    ]
    return WeightedBatchSampler(ConcatDataset(parts), samplers, weights=weights, processes=processes, seed=0)


def source_of(batch: list[int], sizes: list[int]) -> int:
    bounds = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    found = {next(number for number, bound in enumerate(bounds) if row < bound) for row in batch}
    assert len(found) == 1, "a batch is from one source"
    return found.pop()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(3, 30), st.sampled_from([0.5, 1.0, 2.0, 3.0])), min_size=1, max_size=4),
    st.integers(1, 3),
    st.booleans(),
)
def test_each_source_has_its_share_and_a_step_one_source(parts, processes, duplicates):
    sizes, weights = [size for size, _ in parts], [weight for _, weight in parts]
    sampler = make(sizes, weights, processes, duplicates)
    sampler.set_epoch(1)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    sources = [source_of(batch, sizes) for batch in batches]
    for start in range(0, len(sources), processes):
        assert len(set(sources[start : start + processes])) == 1
    steps = Counter(sources[::processes])
    for number, (size, weight) in enumerate(parts):
        assert steps[number] == steps_of(weight, size // SIZE, processes)


def test_a_source_of_weight_two_is_seen_twice_in_another_order():
    sampler = make([9], [2.0], duplicates=False)
    batches = list(sampler)
    first, second = batches[:3], batches[3:]
    for rows in (first, second):
        assert sorted(chain.from_iterable(rows)) == list(range(9))
    assert first != second


def test_an_epoch_is_repeated_exactly_and_the_next_is_another():
    sampler = make([9, 12], [1.0, 1.0], duplicates=False)
    orders = []
    for epoch in (0, 0, 1):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[1] != orders[2]


def test_a_source_that_cannot_fill_a_batch_is_refused():
    part = Dataset.from_dict({"text": ["the same"] * 9})
    inner = NoDuplicatesBatchSampler(part, batch_size=SIZE, drop_last=True, generator=torch.Generator(), seed=0)
    with pytest.raises(ValueError, match="source 1 has too few different rows for a batch of 3"):
        list(WeightedBatchSampler(ConcatDataset([part]), [inner], weights=[1.0]))
