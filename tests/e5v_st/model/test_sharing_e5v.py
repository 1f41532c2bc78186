from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import LlavaNextModel

from e5v_st.model import planning_e5v, sharing_e5v, tree_e5v
from e5v_st.model.features_e5v import distinct_groups
from e5v_st.model.items_e5v import Item, read_items


def test_an_image_is_computed_once_for_prompts_of_any_length_and_nothing_is_padded(model, pictures):
    layer, seen = model[0].model.language_model.layers[0], []
    hook = layer.self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"].shape[:2]), with_kwargs=True
    )
    texts = ["red", "blue", "word " * 300, "word " * 310]
    items = [{"image": pictures[0], "text": text} for text in texts]
    try:
        model.encode(items, batch_size=4)
    finally:
        hook.remove()
    ids = [model[0].preprocess([item])["input_ids"][0].tolist() for item in items]
    assert seen == [(1, len({tuple(row[:end]) for row in ids for end in range(1, len(row) + 1)}))]


def test_layers_on_several_devices_are_not_taken_apart(model):
    with torch.device("meta"):
        spread = LlavaNextModel(copy.deepcopy(model[0].config))
    spread.set_attn_implementation("sdpa")
    spread.hf_device_map = {"vision_tower": 0, "language_model": 1}
    assert sharing_e5v.prepare_sharing(spread, "layers") == "none"
    spread.hf_device_map = {"": 0}
    assert sharing_e5v.prepare_sharing(spread, "layers") == "layers"


def test_under_autocast_shared_and_plain_embeddings_stay_close(model, pictures):
    items = [pictures[0], {"text": "A dog."}, {"image": pictures[0], "text": "red"}, {"text": "A cat, in the snow."}]
    for some in (items, items[1::2]):
        with torch.autocast("cpu", torch.bfloat16):
            half = model.encode(some)
        assert (half * model.encode(some)).sum(1).min() > 0.98


def test_a_sliding_window_shares_nothing_and_gives_what_one_by_one_gives(small, model):
    import e5v_st

    texts = [{"text": "A dog. " * 5}, {"text": "A much longer one, about two dogs and a cat in the snow. " * 3}]
    sliding = e5v_st.load(small, device="cpu")
    config = sliding[0].config.text_config
    sliding[0].model.set_attn_implementation("sdpa")
    config.model_type, config.sliding_window = "mistral", 16
    assert sharing_e5v.prepare_sharing(sliding[0].model, "layers") == "none"
    assert not sliding[0].shares()
    alone = np.stack([sliding.encode([text])[0] for text in texts])
    np.testing.assert_allclose(sliding.encode(texts), alone, atol=1e-5)


def test_where_nothing_is_shared_each_prompt_pays_for_its_image(small, pictures, monkeypatch):
    import e5v_st

    plain = e5v_st.load(small, device="cpu")
    plain[0].share_prefixes = False
    items = [{"image": pictures[0], "text": str(number)} for number in range(12)]
    tokens = plain[0].preprocess(items[:1])["input_ids"].shape[1]
    sizes, collate = [], plain[0].collate
    monkeypatch.setattr(plain[0], "collate", lambda batch, **how: sizes.append(len(batch)) or collate(batch, **how))
    e5v_st.encode_all(plain, items, batch_tokens=4 * tokens, progress=False)
    assert sum(sizes) == 12
    assert max(sizes) <= 4


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_other_attention_gives_the_same_without_sharing(small, model, pictures, attention):
    import e5v_st

    plain = e5v_st.load(small, device="cpu")
    plain[0].model.set_attn_implementation(attention)
    items = [pictures[0], {"text": "A dog."}, {"text": "A much longer one, about two dogs."}, {"text": ""}]
    assert model[0].shares()
    assert not plain[0].shares()
    for some in (items, items[1:]):  # without an image, texts go into rows without padding
        np.testing.assert_allclose(plain.encode(some), model.encode(some), atol=1e-5)


def test_equal_images_are_found_by_content(model):
    red, blue = Image.new("RGB", (3, 2), "red"), Image.new("RGB", (3, 2), "blue")
    rows = [Item(None, (red,)), Item("", (blue, red.copy())), Item("no image"), Item(None, (Image.new("RGB", (2, 3)),))]
    groups, shown = distinct_groups(rows, model[0].reader)
    assert [image.size for (image,) in groups] == [(3, 2), (3, 2), (2, 3)]
    assert shown == [[0], [1, 0], [], [2]]


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_sharing_gives_what_one_by_one_gives(model, pictures, data):
    texts = st.sampled_from(["", "a", "A dog.", "a <image> tag", "a longer one, that needs some padding, surely"])
    images = st.sampled_from(pictures[:3])
    item = st.one_of(
        st.fixed_dictionaries({"text": texts}),
        st.fixed_dictionaries({"image": images}),
        st.fixed_dictionaries({"image": images, "text": texts}),
        st.fixed_dictionaries({"image": st.lists(images, min_size=2, max_size=2), "text": texts}),
    )
    items = data.draw(st.lists(item, min_size=1, max_size=8))
    with pytest.MonkeyPatch.context() as patch:  # so that a few short prompts are planned in every way
        patch.setattr(planning_e5v, "CPU_BATCH_TOKENS", data.draw(st.sampled_from([30, 100, 2048])))
        patch.setattr(tree_e5v, "TOGETHER", data.draw(st.sampled_from([4, 1024])))
        together = model.encode(items, batch_size=8)
    model[0].share_prefixes = False
    try:
        alone = np.stack([model.encode([item])[0] for item in items])
    finally:
        model[0].share_prefixes = True
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_left_padded_features_give_the_same_states(model):
    features = model.preprocess([{"text": "A dog."}, {"text": "A much longer sentence about a dog."}])
    ids, mask = features["input_ids"], features["attention_mask"]
    left = {"input_ids": torch.stack([row.roll(int(len(row) - m.sum())) for row, m in zip(ids, mask, strict=True)])}
    left["attention_mask"] = mask.flip(1)
    with torch.inference_mode():
        expected = model(dict(features))["sentence_embedding"]
        found = model(left)["sentence_embedding"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_and_finite(small, pictures, dtype, model):
    import e5v_st

    half = e5v_st.load(small, device="cpu", model_kwargs={"dtype": dtype})
    items = [pictures[0], {"text": "A dog."}, {"image": pictures[0], "text": "red"}, {"text": ""}]
    found = half.encode(items)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert (found * model.encode(items)).sum(1).min() > 0.98


def test_a_batch_for_training_can_be_taken_apart(model, pictures):
    items = [pictures[0], {"image": pictures[0], "text": "red"}, {"text": "A dog."}, {"text": "A cat."}]
    features = model.preprocess(items)
    assert "parts" not in features
    tensors = {name: value for name, value in features.items() if isinstance(value, torch.Tensor)}
    assert set(tensors) == {"input_ids", "attention_mask", "pixel_values", "image_sizes"}
    assert {len(value) for value in tensors.values()} == {len(items)}
    assert model[0].collate(read_items(items, None), share=True)["image_index"].tolist() == [0, 0]
