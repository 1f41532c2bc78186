from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from e5v_st.items_e5v import Item
from e5v_st.modeling_e5v import _distinct_images
from e5v_st.sharing_e5v import CACHED_TOKENS, MAX_PADDING, SMALL, Group, plan_groups

I = 9  # noqa: E741 - the image token, short for tables


def test_texts_share_their_header():
    assert plan_groups([[1, 2, 3, 4], [1, 2, 5, 6]], [[], []], I, {}) == [Group(((1, 0),), 2)]


def test_the_last_token_is_never_shared():
    assert plan_groups([[1, 2], [1, 2]], [[], []], I, {}) == [Group(((1, 0),), 1)]


def test_prompts_about_one_image_share_it_and_what_follows():
    rows = [[1, I, I, 2, 3], [1, I, I, 2, 4], [1, I, I, 2, 5]]
    assert plan_groups(rows, [[0], [0], [1]], I, {0: 2, 1: 2}) == [Group(((1, 0),), 4), Group(((2,),))]


def test_a_second_image_is_not_shared():
    rows = [[1, I, 2, I, I, 4], [1, I, 2, I, I, 5]]
    assert plan_groups(rows, [[0, 1], [0, 2]], I, {0: 1, 1: 2, 2: 2}) == [Group(((1, 0),), 3)]


def test_images_that_follow_each_other_are_told_apart():
    rows = [[1, I, I, I, 4], [1, I, I, I, 4], [1, I, I, I, 4]]
    assert plan_groups(rows, [[0, 1], [0, 2], [1, 0]], I, {0: 1, 1: 2, 2: 2}) == [Group(((1, 0),), 2), Group(((2,),))]


token_rows = st.lists(
    st.tuples(st.lists(st.integers(1, 3), max_size=3), st.integers(0, 2), st.lists(st.integers(1, 3), min_size=1)),
    min_size=1,
    max_size=12,
)


@given(token_rows, st.data())
def test_every_row_is_in_one_group_and_shares_only_what_is_equal(parts, data):
    rows = [head + [I] * (2 * images) + tail for head, images, tail in parts]
    shown = [[data.draw(st.integers(0, 1)) for _ in range(images)] for _, images, _ in parts]
    groups = plan_groups(rows, shown, I, {0: 2, 1: 2})
    assert sorted(row for group in groups for part in group.parts for row in part) == list(range(len(rows)))
    for group in groups:
        members = [row for part in group.parts for row in part]
        if group.prefix:
            assert len({tuple(rows[row][: group.prefix]) for row in members}) == 1
        assert all(len(rows[row]) > group.prefix for row in members)
        if group.prefix and any(I in rows[row][: group.prefix] for row in members):
            assert len({shown[row][0] for row in members}) == 1


@given(st.lists(st.integers(1, 2000), min_size=2, max_size=30), st.integers(1, 20_000))
def test_rows_after_a_prefix_pad_little_and_their_caches_are_few(lengths, prefix):
    rows = [[1] * prefix + [2 + number] * length for number, length in enumerate(lengths)]
    (group,) = plan_groups(rows, [[] for _ in rows], I, {})
    assert group.prefix == prefix
    for part in group.parts:
        rest = [lengths[row] for row in part]
        size = max(rest) * len(rest)
        assert size <= SMALL or 1 - sum(rest) / size <= MAX_PADDING + 1e-9
        assert len(part) == 1 or len(part) * prefix <= CACHED_TOKENS


def test_a_prefix_is_computed_once_however_its_rows_are_split(model, pictures):
    layer, seen = model[0].model.language_model.layers[0], []
    hook = layer.register_forward_pre_hook(lambda module, states: seen.append(states[0].shape[:2]))
    items = [{"image": pictures[0], "text": text} for text in ("red", "blue", "word " * 300, "word " * 310)]
    try:
        model.encode(items, batch_size=4)
    finally:
        hook.remove()
    assert [rows for rows, _ in seen] == [1, 2, 2]  # the image, the long prompts, the short ones


def test_equal_images_are_found_by_content():
    red, blue = Image.new("RGB", (3, 2), "red"), Image.new("RGB", (3, 2), "blue")
    rows = [Item(None, (red,)), Item("", (blue, red.copy())), Item("no image"), Item(None, (Image.new("RGB", (2, 3)),))]
    images, shown = _distinct_images(rows)
    assert [image.size for image in images] == [(3, 2), (3, 2), (2, 3)]
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
    assert "plan" not in features
    assert features["image_index"].tolist() == [0, 1]
    with torch.inference_mode():
        assert model.preprocess(items)["image_index"].tolist() == [0, 0]
