"""A hub to push to, and folders to push."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_client import connect
from hub_server import HubServer


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that this process talks to, logged in as the user "me"; nobody waits before trying again."""
    with HubServer() as hub:
        connect(hub, tmp_path / "home", monkeypatch)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield hub
        assert hub.unhandled == []
        assert hub.strays == []
        assert not [path for _, path in hub.requests if "hf_" in path]


@pytest.fixture(scope="session")
def make_adapter(small: Path) -> Callable[..., Path]:
    """Saves a run's folder: a LoRA of the ``small`` checkpoint with random weights."""
    import torch
    from peft import LoraConfig

    import e5v_st
    from e5v_st.loading import LORA_TARGETS

    def make(folder: Path, image_layout: str = "upstream", **options: object) -> Path:
        model = e5v_st.load(small, device="cpu", image_layout=image_layout)
        model.add_adapter(LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LORA_TARGETS, **options}))
        torch.manual_seed(1)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
        model.save_pretrained(str(folder))
        return folder

    return make


@pytest.fixture(scope="session")
def adapter(make_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder; do not change it."""
    return make_adapter(tmp_path_factory.mktemp("runs") / "e5v-nli")


@pytest.fixture
def run(adapter: Path, tmp_path: Path) -> Path:
    """A copy of a run's folder, to be changed."""
    return shutil.copytree(adapter, tmp_path / "run")


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    """A copy of the small checkpoint to break."""
    return shutil.copytree(small, tmp_path / "copy")
