"""The published checkpoints and the small model: names, modules, and the image layout that a model is loaded in."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

import e5v_st
from e5v_st.cli import main
from e5v_st.published import TINY, TINY_NAME, load_modules

ROOT = Path(__file__).parents[2]


def test_the_small_model_is_defined_once():
    defined = re.compile(r"^(TINY|TINY_NAME|PUBLISHED_IDS)\b.*=", re.MULTILINE)
    files = [file for room in ("e5v_st", "hub", "mteb_tasks", "training") for file in (ROOT / room).rglob("*.py")]
    found = [file.name for file in files for _ in defined.findall(file.read_text(encoding="utf8"))]
    assert found == ["published.py"] * 3


def test_the_small_model_is_known_by_its_name_and_its_folder():
    texts = ["a dog", "a cat"]
    by_name, by_folder = (e5v_st.load(where, device="cpu").encode(texts) for where in (TINY_NAME, TINY))
    np.testing.assert_array_equal(by_name, by_folder)


def test_the_modules_are_the_transformer_last_token_pooling_and_normalisation(small):
    transformer, pooling, normalize = load_modules(str(small))
    assert isinstance(transformer, e5v_st.E5VTransformer)
    assert pooling.pooling_mode == "lasttoken"
    assert type(normalize).__name__ == "Normalize"


@pytest.fixture(scope="module")
def paper(small, tmp_path_factory):
    """A model that was saved in the paper's image layout."""
    folder = tmp_path_factory.mktemp("paper")
    e5v_st.load(small, image_layout="paper", device="cpu").save_pretrained(str(folder))
    return folder


def test_a_saved_image_layout_is_kept_unless_another_is_asked_for(paper, load_golden, pictures):
    """The images are not square, so that the layouts differ."""
    found = e5v_st.load(paper, device="cpu")
    assert found[0].image_layout == "paper"
    stock = SentenceTransformer(str(paper), trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(found.encode(pictures), stock.encode(pictures), atol=1e-6)
    np.testing.assert_allclose(found.encode(pictures), load_golden("small", "paper").encode(pictures), atol=1e-5)
    other = e5v_st.load(paper, image_layout="upstream", device="cpu").encode(pictures)
    np.testing.assert_allclose(other, load_golden("small", "upstream").encode(pictures), atol=1e-5)
    assert np.abs(other - found.encode(pictures)).max() > 1e-3


def test_a_model_without_a_saved_image_layout_is_loaded_in_upstreams(small):
    assert e5v_st.load(small, device="cpu")[0].image_layout == "upstream"


def test_an_unknown_image_layout_is_refused(small, paper):
    for model in (small, paper):
        with pytest.raises(ValueError, match="got image_layout='papier', want one of 'upstream', 'paper'"):
            e5v_st.load(model, image_layout="papier", device="cpu")


@pytest.mark.parametrize(("option", "layout"), [([], "paper"), (["--image-layout", "upstream"], "upstream")])
def test_an_index_says_in_which_image_layout_it_was_made(paper, tmp_path, pictures, option, layout):
    (tmp_path / "rows.csv").write_text(f"image\n{pictures[0]}\n")
    words = ["embed", str(tmp_path / "rows.csv"), str(tmp_path / "out"), "--model", str(paper), "--device", "cpu"]
    assert main([*words, *option]) == 0
    assert json.loads((tmp_path / "out" / "_manifest.json").read_text())["image_layout"] == layout
    assert main(["search", str(tmp_path / "out"), "--image", pictures[0], "--device", "cpu"]) == 0
