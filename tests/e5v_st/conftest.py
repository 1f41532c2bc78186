"""Models that many tests use, loaded once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


@pytest.fixture(scope="session")
def load_golden(goldens: Path) -> Callable[[str, str], SentenceTransformer]:
    """Loads a golden checkpoint in a layout, once for the session: do not change what it returns."""
    import e5v_st

    @cache
    def load(name: str, image_layout: str = "upstream") -> SentenceTransformer:
        return e5v_st.load(goldens / name, image_layout=image_layout, device="cpu")

    return load


@pytest.fixture(scope="session")
def model(load_golden: Callable) -> SentenceTransformer:
    """The ``small`` checkpoint in the upstream layout."""
    return load_golden("small", "upstream")


@pytest.fixture(scope="session")
def pictures(goldens: Path) -> list[str]:
    """Paths of the small golden images, by name."""
    return sorted(map(str, (goldens / "images" / "small").glob("*.png")))
