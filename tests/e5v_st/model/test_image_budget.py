"""A maximum of image tokens: LLaVA-NeXT's grids within it, and one for a single call in every family that has one."""

from __future__ import annotations

import json
import threading

import families
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor

import e5v_st
from e5v_st.cli import main
from e5v_st.costs import find_counter
from e5v_st.counting import count_tokens as count_prompts
from e5v_st.counting import open_without_weights
from e5v_st.hub.export import export
from e5v_st.model.backbone_e5v import BACKBONES
from e5v_st.model.items_e5v import read_items
from e5v_st.model.llava_next_e5v import LAYOUTS
from e5v_st.model.processor_e5v import grids_within
from e5v_st.model.prompts_e5v import PROMPTS
from e5v_st.mteb_tasks.models import make_meta

TEXT, IMAGE, COMPOSED = (PROMPTS[name] for name in ("text", "image", "composed"))
NAME = "llava_next-mistral"
#: Budgets of the tiny models, whose tile of 28 pixels has four tokens, and the grids that are left, by hand. Two tiles
#: take 4 + 4 * 3 tokens where they stand, three take 4 + 6 * 3, and four 4 + 4 * 5.
BUDGETS = {
    10: [[28, 28]],
    15: [[28, 28]],
    16: [[28, 56], [56, 28]],
    22: [[28, 56], [56, 28], [84, 28], [28, 84]],
}
#: One that has an effect in each family, by how it is set.
LIMITS = {"pixels": 16, "splitting": 4, "patches": 8, "pinpoints": 16, "grids": 16, "soft tokens": 140}
LIMITED = [name for name in families.FAMILIES if next(row.budget for row in BACKBONES if row.name == name)]


def draw(height: int, width: int, seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


SHAPES = [draw(48, 64, 0), draw(90, 48, 1), draw(60, 120, 2), draw(56, 56, 3), draw(20, 150, 4)]
ITEMS = ["A dog.", *SHAPES, {"image": SHAPES[0], "text": "is red"}, {"image": SHAPES[0], "text": "has stripes"}]
RECIPES = [
    (TEXT, "A dog.", ()),
    *((IMAGE, None, (image,)) for image in SHAPES),
    (COMPOSED, "is red", (SHAPES[0],)),
    (COMPOSED, "has stripes", (SHAPES[0],)),
]


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint(NAME)


@pytest.fixture(scope="module")
def model(folder):
    return e5v_st.load(folder, device="cpu")


@pytest.fixture(scope="module")
def whole(model):
    """The embeddings without any limit."""
    return model.encode(ITEMS)


def with_grids(folder, out, grids):
    """Copies a checkpoint, with other grids in both of its files."""
    out.mkdir()
    for file in folder.iterdir():
        content = file.read_bytes()
        if file.name in ("config.json", "preprocessor_config.json"):
            content = json.dumps({**json.loads(content), "image_grid_pinpoints": grids}).encode()
        (out / file.name).write_bytes(content)
    return out


# ---- LLaVA-NeXT: the numbers ----


@pytest.mark.parametrize("budget", [10, 16, 22])
def test_llava_next_within_a_budget_is_plain_transformers_with_fewer_grids(folder, model, whole, budget):
    plain = families.open_plain(folder)
    plain.config.image_grid_pinpoints = BUDGETS[budget]
    how = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(**how, image_grid_pinpoints=BUDGETS[budget]),
        model.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    with torch.no_grad():
        expected = families.reference(NAME, plain, processor, RECIPES).numpy()
    found = e5v_st.load(folder, device="cpu", max_image_tokens=budget).encode(ITEMS, batch_size=5)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found[1:] - whole[1:]).max() > 1e-3  # and it is not without effect
    np.testing.assert_allclose(found[0], whole[0], atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_budget_is_a_checkpoint_with_fewer_grids_in_either_layout(folder, tmp_path, layout):
    fewer = with_grids(folder, tmp_path / "fewer", BUDGETS[16])
    expected = e5v_st.load(fewer, device="cpu", image_layout=layout).encode(ITEMS)
    limited = e5v_st.load(folder, device="cpu", image_layout=layout, max_image_tokens=16)
    np.testing.assert_allclose(limited.encode(ITEMS), expected, atol=1e-6)
    np.testing.assert_allclose(e5v_st.encode_all(limited, ITEMS, progress=False), expected, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_no_image_of_any_shape_takes_more_than_its_budget(folder, model, layout, budget):
    assert grids_within(model[0].config.image_grid_pinpoints, 28, 14, budget) == BUDGETS[budget]
    transformer = open_without_weights(folder, max_image_tokens=budget, image_layout=layout)
    images = [Image.new("RGB", (width, height)) for width in range(1, 200, 7) for height in range(1, 200, 7)]
    counts = transformer.reader.count(images)
    assert 0 < max(counts) <= budget
    found = count_prompts(transformer, SHAPES, IMAGE)
    text = count_prompts(transformer, ["A dog."])  # reading cuts images into as many tokens as were counted
    assert np.ptp(np.array(found) - transformer.reader.count(SHAPES)) == 0 < text[0]


def test_the_real_grids_within_budgets(realgrid):
    """Of tiles with 24 x 24 patches: 576 and 48 * 25, 72 * 25 or 48 * 49 of the grid, newlines included."""
    grids = json.loads((realgrid / "config.json").read_text())["image_grid_pinpoints"]
    assert grids_within(grids, 336, 14, 2928) == grids
    assert grids_within(grids, 336, 14, 2927) == [grid for grid in grids if grid != [672, 672]]
    assert grids_within(grids, 336, 14, 2375) == grids_within(grids, 336, 14, 1776) == [[336, 672], [672, 336]]
    assert grids_within(grids, 336, 14, 1775) == grids_within(grids, 336, 14, 1176) == [[336, 336]]


def test_less_than_one_tile_is_refused_and_changes_nothing(folder, model, whole):
    with pytest.raises(ValueError, match="got max_image_tokens=9, want at least 10, which an image takes in one tile"):
        e5v_st.load(folder, device="cpu", max_image_tokens=9)
    with pytest.raises(ValueError, match="want at least 10"):
        model[0].max_image_tokens = 9
    assert model[0].max_image_tokens is None
    np.testing.assert_array_equal(model.encode(ITEMS), whole)


def test_a_budget_is_set_and_taken_back_after_loading(folder, whole):
    model = e5v_st.load(folder, device="cpu", image_layout="paper")
    own = model[0].config.image_grid_pinpoints
    model[0].max_image_tokens = 16
    assert (model[0].config.image_grid_pinpoints, model[0].image_layout) == (BUDGETS[16], "paper")
    model[0].image_layout = "upstream"
    limited = model.encode(ITEMS)
    expected = e5v_st.load(folder, device="cpu", max_image_tokens=16).encode(ITEMS)
    np.testing.assert_allclose(limited, expected, atol=1e-6)
    model[0].max_image_tokens = None
    assert model[0].config.image_grid_pinpoints == own
    np.testing.assert_allclose(model.encode(ITEMS), whole, atol=1e-6)


# ---- LLaVA-NeXT: where it goes ----


def test_a_budget_is_saved_beside_the_checkpoints_own_grids(folder, tmp_path):
    model = e5v_st.load(folder, device="cpu", max_image_tokens=16)
    model.save_pretrained(str(tmp_path / "saved"))
    read = lambda name: json.loads((tmp_path / "saved" / name).read_text())  # noqa: E731
    own = json.loads((folder / "config.json").read_text())["image_grid_pinpoints"]
    assert read("config.json")["image_grid_pinpoints"] == own
    assert read("processor_config.json")["image_processor"]["image_grid_pinpoints"] == own
    assert read("sentence_bert_config.json")["max_image_tokens"] == 16
    again = e5v_st.load(tmp_path / "saved", device="cpu")
    np.testing.assert_allclose(again.encode(ITEMS), model.encode(ITEMS), atol=1e-6)


def test_an_exported_budget_needs_this_packages_code_and_stands_on_the_card(folder, tmp_path):
    e5v_st.load(folder, device="cpu", max_image_tokens=16).save_pretrained(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="max_image_tokens=16 needs this package's code: export without --native"):
        export(tmp_path / "saved", tmp_path / "native", native=True)
    export(tmp_path / "saved", tmp_path / "out")
    assert e5v_st.load(tmp_path / "out", device="cpu")[0].max_image_tokens == 16
    card = " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert "An image takes about 16 tokens at most; `model[0].max_image_tokens` chooses another" in card


def test_a_plan_counts_within_the_budget(folder, tmp_path):
    for budget in (None, 16):
        counter = find_counter(str(folder), max_image_tokens=budget)
        transformer = open_without_weights(folder, max_image_tokens=budget)
        counts = [counter.image(image.height, image.width)[0] for image in SHAPES]
        assert counts == transformer.reader.count(SHAPES)
    e5v_st.load(folder, device="cpu", max_image_tokens=16).save_pretrained(str(tmp_path / "saved"))
    assert [find_counter(str(tmp_path / "saved")).image(*image.size[::-1])[0] for image in SHAPES] == counts


def test_a_plan_of_a_model_that_is_not_at_hand_counts_within_the_budget():
    """640 x 480 in two tiles of 24 x 24 patches: the base tile, and 24 rows of 32 patches with a newline each."""
    assert find_counter("royokong/e5-v").image(480, 640)[0] == 576 + 36 * 49
    assert find_counter("royokong/e5-v", max_image_tokens=1776).image(480, 640) == (576 + 24 * 33, 3 * 577)
    assert find_counter("nobody/knows-it", max_image_tokens=100).image(480, 640)[0] == pytest.approx(100)


def test_an_index_and_a_result_of_llava_next_know_the_budget(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    SHAPES[0].save(tmp_path / "photos" / "a.png")
    embed = ["embed", "photos", "index", "--model", "e5v-tiny", "--max-image-tokens"]
    assert main([*embed, "33"]) == 0
    assert main([*embed, "21"]) == 1
    assert "index holds another job: max_image_tokens 33 (now 21)" in capsys.readouterr().err
    meta = make_meta("e5v-tiny", max_image_tokens=21, store=False)
    assert meta.name.endswith("(max_image_tokens=21)")
    assert meta.load_model("cpu").described == {"family": "llava_next-llama3", "image tokens": "at most 21"}


# ---- one call ----


@pytest.mark.parametrize("name", LIMITED)
def test_a_call_with_a_budget_gives_what_a_model_loaded_with_it_gives(checkpoint, name):
    model = e5v_st.load(checkpoint(name), device="cpu")
    limit = LIMITS.get(model[0].backbone.budget, 16)
    usual = model.encode(ITEMS)
    expected = e5v_st.load(checkpoint(name), device="cpu", max_image_tokens=limit).encode(ITEMS)
    for found in (
        model.encode(ITEMS, max_image_tokens=limit),
        model.encode_document(ITEMS, max_image_tokens=limit, batch_size=3),
        e5v_st.encode_all(model, ITEMS, max_image_tokens=limit, progress=False),
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert model[0].max_image_tokens is None
    np.testing.assert_array_equal(model.encode(ITEMS), usual)


def test_a_call_with_a_budget_shares_nothing_with_calls_in_other_threads(model, whole):
    expected = model.encode(ITEMS, max_image_tokens=16)
    found = {None: [], 10: [], 16: []}
    start = threading.Barrier(len(found))

    def run(limit):
        start.wait()
        for _ in range(4):
            found[limit].append(model.encode(ITEMS, max_image_tokens=limit))

    threads = [threading.Thread(target=run, args=(limit,)) for limit in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for limit, right in ((None, whole), (16, expected), (10, model.encode(ITEMS, max_image_tokens=10))):
        assert len(found[limit]) == 4
        for each in found[limit]:
            np.testing.assert_allclose(each, right, atol=1e-6)


def test_a_batch_that_was_made_with_a_budget_is_run_with_it(folder, model):
    """Whoever calls the two steps by hand need not say it twice; without sharing, as in training, too."""
    limited = e5v_st.load(folder, device="cpu", max_image_tokens=10)[0]
    with torch.no_grad():
        found = model[0](model[0].preprocess(SHAPES, max_image_tokens=10))["token_embeddings"]
        expected = limited(limited.preprocess(SHAPES))["token_embeddings"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_layout_of_the_paper_holds_within_a_call(folder):
    paper = e5v_st.load(folder, device="cpu", image_layout="paper")
    expected = e5v_st.load(folder, device="cpu", image_layout="paper", max_image_tokens=16).encode(ITEMS)
    np.testing.assert_allclose(paper.encode(ITEMS, max_image_tokens=16), expected, atol=1e-6)


@pytest.mark.parametrize("way", ["encode", "encode_all"])
def test_a_call_with_a_budget_is_refused_where_there_is_none(checkpoint, way):
    model = e5v_st.load(checkpoint("gemma3"), device="cpu")
    encode = model.encode if way == "encode" else lambda items, **how: e5v_st.encode_all(model, items, **how)
    with pytest.raises(ValueError, match="got max_image_tokens=16, but the family 'gemma3' has no such limit"):
        encode(ITEMS, max_image_tokens=16)


def test_a_view_has_the_weights_of_its_model(model):
    view = model[0].limited(16)
    assert all(ours is theirs for ours, theirs in zip(view.parameters(), model[0].parameters(), strict=True))
    items = read_items(SHAPES, None)
    assert view.count_image_tokens(items[0]) < model[0].count_image_tokens(items[0])
