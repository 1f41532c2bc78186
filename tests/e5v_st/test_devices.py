"""A device that is not here is one line, before anything is loaded."""

from __future__ import annotations

import pytest
import torch

import e5v_st
from e5v_st import loading
from e5v_st.cli import main
from e5v_st.devices import check_device


@pytest.fixture
def no_gpu(monkeypatch):
    """A machine without any."""
    for backend in (torch.cuda, torch.mps, torch.xpu):
        monkeypatch.setattr(backend, "is_available", lambda: False)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps", "xpu", "gpu", "cuda:x", "meta", "", "cpu:7"])
def test_what_is_not_here_is_refused(no_gpu, device):
    with pytest.raises(ValueError, match=f"got the device '{device}'"):
        check_device(device)


def test_what_is_here_is_taken(monkeypatch):
    for device in (None, "cpu", torch.device("cpu")):
        check_device(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_device("cuda:1")
    with pytest.raises(ValueError, match="there are only 2 here, counted from cuda:0"):
        check_device("cuda:2")


@pytest.mark.parametrize("device", ["cuda", "gpu", "mps"])
@pytest.mark.parametrize("command", ["embed", "search", "eval", "load", "quantize"])
def test_every_command_says_so_before_anything_is_loaded(no_gpu, command, device, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "load_modules", lambda *_, **__: pytest.fail("a model is loaded"))
    monkeypatch.setattr("e5v_st.index.embed.open_source", lambda *_, **__: pytest.fail("a table is read"))
    if command in ("load", "quantize"):
        with pytest.raises(ValueError, match=f"got the device '{device}'"):
            e5v_st.load("e5v-tiny", device=device, quantize="int8" if command == "quantize" else None)
        return
    words = {
        "embed": ["embed", str(tmp_path), str(tmp_path / "out"), "--model", "e5v-tiny"],
        "search": ["search", str(tmp_path), "q"],
        "eval": ["eval", "e5v-tiny"],
    }
    if command == "eval":
        pytest.importorskip("mteb")
    assert main([*words[command], "--device", device]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"e5v {command}: got the device '{device}', ")
