"""The dtype "fastest": measured once, printed, remembered; what is stored names the dtype that it was."""

from __future__ import annotations

import json

import numpy as np
import psutil
import pytest
import torch

import e5v_st
from e5v_st import fastest
from e5v_st.cli import main


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path / "cache" / "e5v" / "bfloat16.json"


def pretend(monkeypatch, gain):
    calls = []
    monkeypatch.setattr(fastest, "measure_gain", lambda: calls.append(gain) or gain)
    return calls


@pytest.mark.parametrize(("gain", "dtype"), [(0.4, "float32"), (1.49, "float32"), (1.5, "bfloat16"), (2.2, "bfloat16")])
def test_bfloat16_is_chosen_where_it_is_worth_it(monkeypatch, capsys, gain, dtype):
    pretend(monkeypatch, gain)
    assert fastest.choose_dtype("cpu") == dtype
    assert f"bfloat16 is {gain:.1f} times as fast as float32: the dtype is {dtype}" in capsys.readouterr().out


def test_the_speed_is_measured_once_for_a_machine(monkeypatch, cache):
    calls = pretend(monkeypatch, 2.0)
    assert [fastest.choose_dtype("cpu") for _ in range(3)] == ["bfloat16"] * 3
    assert len(calls) == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 61)
    fastest.choose_dtype("cpu")
    assert len(calls) == 2
    assert len(json.loads(cache.read_text())) == 2


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": "b"}'])
def test_a_damaged_memory_is_measured_again(monkeypatch, cache, content):
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    assert pretend(monkeypatch, 2.0) == []
    assert fastest.choose_dtype("cpu") == "bfloat16"


def test_what_is_measured_is_a_ratio_of_two_products(monkeypatch):
    monkeypatch.setattr(fastest, "_SECONDS", 0.01)
    assert 0.01 < fastest.measure_gain() < 100


def test_a_gpu_has_bfloat16_without_measuring(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    calls = pretend(monkeypatch, 0.1)
    assert fastest.choose_dtype() == fastest.choose_dtype("cuda:1") == "bfloat16"
    assert (fastest.choose_dtype("cpu"), calls) == ("float32", [0.1])


def test_load_says_how_far_bfloat16_is_from_float32(monkeypatch, capsys):
    pretend(monkeypatch, 2.0)
    model = e5v_st.load("e5v-tiny", device="cpu", model_kwargs={"dtype": "fastest"})
    assert model[0].model.dtype == torch.bfloat16
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("bfloat16: cosine"))
    assert "cosine to the same model in float32: 8 texts mean" in line
    expected = e5v_st.load("e5v-tiny", device="cpu", model_kwargs={"dtype": "bfloat16"}).encode("A dog.")
    np.testing.assert_array_equal(model.encode("A dog."), expected)


def test_where_float32_is_fastest_nothing_is_compared(monkeypatch, capsys):
    pretend(monkeypatch, 1.0)
    model = e5v_st.load("e5v-tiny", device="cpu", model_kwargs={"torch_dtype": "fastest"})
    assert model[0].model.dtype == torch.float32
    assert "cosine" not in capsys.readouterr().out


def test_a_model_that_does_not_fit_in_float32_is_not_compared(monkeypatch, capsys):
    pretend(monkeypatch, 2.0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1})())
    e5v_st.load("e5v-tiny", device="cpu", model_kwargs={"dtype": "fastest"})
    assert "not compared with float32: it takes 0.0 GB" in capsys.readouterr().out


def test_an_index_names_the_dtype_that_it_was(monkeypatch, capsys, tmp_path):
    pretend(monkeypatch, 2.0)
    texts = tmp_path / "texts.csv"
    texts.write_text("text\nA dog.\nA cat.\n")
    command = ["embed", str(texts), str(tmp_path / "index"), "--model", "e5v-tiny", "--device", "cpu", "--dtype"]
    assert main([*command, "fastest"]) == 0
    assert "bfloat16: cosine to the same model in float32" in capsys.readouterr().out
    assert json.loads((tmp_path / "index" / "_manifest.json").read_text())["dtype"] == "bfloat16"
    assert main([*command, "float32"]) == 1
    assert main([*command, "bfloat16"]) == 0
