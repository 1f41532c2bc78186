"""How far two models are apart: who measures it, with how much memory, and what is not a number."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch

import e5v_st
from e5v_st import probes


def test_the_unquantised_model_is_gone_before_the_other_is_loaded(small):
    seen = []

    def load(**kwargs):
        model = e5v_st.load(small, **{"device": "cpu", **kwargs})
        seen.append(weakref.ref(model[0].model))
        return model

    probes.embed_unquantised(load)
    assert [reference() for reference in seen] == [None]


def test_a_full_gpu_means_the_cpu(small, monkeypatch, capsys):
    def load(quantize, device="cuda"):
        if device == "cuda":
            raise torch.OutOfMemoryError("no room")
        return e5v_st.load(small, device=device, quantize=quantize)

    assert probes.embed_unquantised(load).dtype == "float32"
    assert "does not fit on the GPU" in capsys.readouterr().out


def test_of_several_processes_one_measures(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert probes.embed_unquantised(lambda **_: pytest.fail("the second process loads nothing twice")) is None
    probes.print_cosines(None, "int8", None)
    assert capsys.readouterr().out == ""


def test_embeddings_that_are_not_numbers_have_no_cosine():
    bad, good = np.full((2, 3), np.nan, np.float32), np.eye(2, 3, dtype=np.float32)
    with pytest.raises(ValueError, match="not numbers"):
        probes.cosines({"texts": bad}, {"texts": good})
    np.testing.assert_array_equal(probes.cosines({"texts": good}, {"texts": good})["texts"], [1, 1])
