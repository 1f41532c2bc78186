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
def base(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``small`` checkpoint with its missing row, in today's names: what plain transformers and PEFT can run."""
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    folder = tmp_path_factory.mktemp("base")
    model = LlavaNextForConditionalGeneration.from_pretrained(small)
    model.resize_token_embeddings(model.config.image_token_id + 1, mean_resizing=False)
    model.get_input_embeddings().weight.data[-1] = 0
    model.save_pretrained(folder)
    settings = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    AutoProcessor.from_pretrained(small, **settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pictures(goldens: Path) -> list[str]:
    """Paths of the small golden images, by name."""
    return sorted(map(str, (goldens / "images" / "small").glob("*.png")))


@pytest.fixture(scope="session")
def items(pictures: list[str]) -> list:
    """Texts, images, and images with a modification text, some of them twice."""
    return [
        *("A dog.", "A cat standing in the snow.", "A dog."),
        *pictures[:3],
        *({"image": picture, "text": change} for picture in pictures[:3] for change in ("red", "make it snow")),
        pictures[0],
        {"text": ""},
    ]
