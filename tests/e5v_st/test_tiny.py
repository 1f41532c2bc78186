"""The embedded model: what it is, and that its card says what it scores."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import e5v_st
from e5v_st.published import TINY

ROOT = Path(__file__).parents[2]
MARGIN = 0.02


@pytest.fixture(scope="module")
def tiny():
    return e5v_st.load("e5v-tiny", device="cpu")


@pytest.fixture(scope="module")
def scoring():
    """The script that the card's figures come from."""
    spec = importlib.util.spec_from_file_location("tiny_scores", ROOT / "benchmarks" / "tiny_scores.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_small_and_in_the_published_format():
    assert sum(path.stat().st_size for path in TINY.iterdir()) < 16 * 2**20
    assert not [path for path in TINY.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    with safe_open(TINY / "model.safetensors", framework="np") as weights:
        names = list(weights.keys())
        rows = weights.get_slice("language_model.model.embed_tokens.weight").get_shape()[0]
        size = sum(int(np.prod(weights.get_slice(name).get_shape())) for name in names)
    assert 3e6 < size < 8e6
    assert json.loads((TINY / "config.json").read_text())["image_token_index"] == rows
    assert "patch_size" not in json.loads((TINY / "preprocessor_config.json").read_text())


def test_texts_and_images_are_in_one_space(tiny):
    from e5v_st.gallery import read_gallery

    gallery, _ = read_gallery()
    images = e5v_st.encode_all(tiny, [{"image": image.png} for image in gallery], progress=False)
    names = e5v_st.encode_all(tiny, [{"text": image.name} for image in gallery], progress=False)
    right = (names @ images.T).argmax(1) == np.arange(len(gallery))
    assert right.mean() > 0.25  # chance is one in 385


@pytest.mark.slow
def test_the_cards_scores_are_those_of_the_shipped_weights(scoring):
    stated = json.loads(scoring.OUT.read_text())["shipped"]
    found = scoring.scores_of(scoring.load(TINY), scoring.TASKS)
    assert found.keys() == stated.keys()
    for task, subsets in stated.items():
        for subset, scores in subsets.items():
            for name, value in scores.items():
                assert found[task][subset][name] == pytest.approx(value, abs=MARGIN), f"{task} {subset} {name}"


def test_the_card_holds_the_measured_table(scoring):
    columns = json.loads(scoring.OUT.read_text())
    columns.pop("seconds")
    assert scoring.as_markdown(columns) in (TINY / "README.md").read_text(encoding="utf8")
