"""Fixtures for every test: the published code's numbers, tiny checkpoints, and no network but 127.0.0.1."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

GOLDENS = Path(__file__).parent / "data" / "goldens"


@pytest.fixture(autouse=True)
def _no_network_but_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = socket.socket.connect

    def connect(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else "localhost"
        if host not in ("127.0.0.1", "localhost", "::1"):
            raise OSError(f"tests must not reach {host}")
        return stock(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The published code's numbers; see README.md there."""
    return GOLDENS


@pytest.fixture(scope="session")
def small() -> Path:
    """A published-format checkpoint with random weights and tiles of 56 pixels."""
    return GOLDENS / "small"


@pytest.fixture(scope="session")
def realgrid() -> Path:
    """A published-format checkpoint with random weights and the real tile size and grids."""
    return GOLDENS / "realgrid"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the folder of a family's tiny checkpoint, which is written once; do not change it."""
    root = tmp_path_factory.mktemp("families")

    def find(name: str) -> Path:
        from families import save

        return root / name if (root / name).exists() else save(name, root / name)

    return find


@pytest.fixture(scope="session")
def llama3() -> Any:
    """The real Llama-3 tokenizer, with the image token of E5-V's checkpoint."""
    import real_tokenizers

    return real_tokenizers.llama3()
