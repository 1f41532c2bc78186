"""Batches on a device: memory that runs out, and threads that die while they prepare."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import e5v_st
from e5v_st import encode_all
from e5v_st.encoder import stream_all


def test_a_thread_that_dies_while_collating_names_its_items_and_hangs_nothing(model, monkeypatch):
    stock = model[0].collate

    def collate(batch, **options):
        if any(item.sentence == "b" for item in batch):
            raise ZeroDivisionError("simulated")
        return stock(batch, **options)

    monkeypatch.setattr(model[0], "collate", collate)
    with pytest.raises(RuntimeError, match=r"batch could be made of the items \[301\]: ZeroDivisionError"):
        encode_all(model, [*"a" * 301, "b"], progress=False, batch_tokens=1)


def test_out_of_memory_halves_the_batch_and_remembers(small, items, monkeypatch, caplog):
    model = e5v_st.load(small, device="cpu")
    expected = model.encode([{"text": f"text {i}"} for i in range(32)])
    stock, sizes = model[0].forward, []

    def forward(features, **kwargs):
        sizes.append(len(features["input_ids"]))
        if sizes[-1] > 5:
            raise torch.OutOfMemoryError("simulated")
        return stock(features, **kwargs)

    monkeypatch.setattr(model[0], "forward", forward)
    found = encode_all(model, [{"text": f"text {i}"} for i in range(32)], batch_tokens=400, progress=False)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert sum(size > 5 for size in sizes) <= 3
    assert "out of memory" in caplog.text


def test_a_single_item_that_does_not_fit_raises(small, monkeypatch):
    model = e5v_st.load(small, device="cpu")

    def forward(features, **kwargs):
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(model[0], "forward", forward)
    with pytest.raises(torch.OutOfMemoryError):
        encode_all(model, ["a", "b"], progress=False)


def test_a_single_item_that_does_not_fit_is_skipped_on_request(small, monkeypatch):
    model = e5v_st.load(small, device="cpu")
    stock = model[0].forward

    def forward(features, **kwargs):
        if features["input_ids"].shape[1] > 100:
            raise torch.OutOfMemoryError("simulated")
        return stock(features, **kwargs)

    monkeypatch.setattr(model[0], "forward", forward)
    results = list(stream_all(model, ["a", "long " * 200, "b"], on_error="skip", progress=False))
    assert [result.error for result in results] == [None, "item 1: simulated", None]
