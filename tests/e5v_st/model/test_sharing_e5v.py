from __future__ import annotations

import copy
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from e5v_st.model import planning_e5v, sharing_e5v
from e5v_st.model.items_e5v import Item, read_items
from e5v_st.model.modeling_e5v import _distinct_images
from e5v_st.model.sharing_e5v import MAX_PADDING, Block, Tree, _Family, plan_tree

I = 9  # noqa: E741 - the image token, short for tables


def test_texts_share_what_they_begin_with():
    tree = plan_tree([[1, 2, 3, 4], [1, 2, 5, 6], [1, 2, 3, 7]], [[], [], []], I, [])
    assert tree.ids.tolist() == [1, 2, 3, 4, 7, 5, 6]
    assert tree.positions.tolist() == [0, 1, 2, 3, 3, 2, 3]
    assert tree.last.tolist() == [3, 6, 4]


def test_equal_prompts_and_one_that_goes_on():
    tree = plan_tree([[1, 2, 3], [1, 2], [1, 2]], [[], [], []], I, [])
    assert tree.ids.tolist() == [1, 2, 3]
    assert tree.last.tolist() == [2, 1, 1]


def test_prompts_about_one_image_share_it_and_what_follows():
    rows = [[1, I, I, 2, 3], [1, I, I, 2, 4], [1, I, I, 2, 5]]
    tree = plan_tree(rows, [[1], [1], [0]], I, [2, 2])
    assert tree.positions.tolist() == [0, 1, 2, 3, 4, 4, 0, 1, 2, 3, 4]
    assert tree.image_nodes.tolist() == [1, 2, 7, 8]
    assert tree.image_rows.tolist() == [2, 3, 0, 1]
    assert tree.last.tolist() == [4, 5, 10]


def test_a_different_second_image_is_not_shared():
    rows = [[1, I, 2, I, I, 4], [1, I, 2, I, I, 4], [1, I, 2, I, I, 5]]
    tree = plan_tree(rows, [[0, 1], [0, 2], [0, 1]], I, [1, 2, 2])
    assert tree.positions.tolist() in ([0, 1, 2, 3, 4, 5, 5, 3, 4, 5], [0, 1, 2, 3, 4, 5, 3, 4, 5, 5])


def test_images_that_follow_each_other_are_told_apart():
    rows = [[1, I, I, I, 4], [1, I, I, I, 4], [1, I, I, I, 4]]
    tree = plan_tree(rows, [[0, 1], [0, 2], [1, 0]], I, [1, 2, 2])
    assert sorted(tree.positions.tolist()) == sorted([0, 1, 2, 3, 4, 2, 3, 4, 0, 1, 2, 3, 4])


token_rows = st.lists(
    st.tuples(st.lists(st.integers(1, 3), max_size=3), st.integers(0, 2), st.lists(st.integers(1, 3), min_size=1)),
    min_size=1,
    max_size=12,
)
SIZES = [2, 3]


@given(token_rows, st.sampled_from([1, 4, 1000]), st.data())
def test_every_node_sees_its_own_branch_alone(parts, together, data):
    shown = [[data.draw(st.integers(0, 1)) for _ in range(images)] for _, images, _ in parts]
    rows = [
        head + [I] * sum(SIZES[image] for image in images) + tail
        for (head, _, tail), images in zip(parts, shown, strict=True)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing_e5v, "TOGETHER", together)
        tree = plan_tree(rows, shown, I, SIZES)
    contents = node_contents(tree)
    seen = seen_by(tree.blocks)
    assert sorted(seen) == list(range(len(tree.ids)))
    branches = {node: tuple(contents[key] for key in keys) for node, keys in seen.items()}
    for node, keys in seen.items():
        assert keys == sorted(set(keys))
        assert keys[-1] == node
        assert all(seen[key] == keys[: place + 1] for place, key in enumerate(keys))
        assert len(keys) == tree.positions[node] + 1
    for row, images, last in zip(rows, shown, tree.last.tolist(), strict=True):
        features = iter([-1 - sum(SIZES[:image]) - n for image in images for n in range(SIZES[image])])
        assert branches[last] == tuple(next(features) if token == I else token for token in row)
    last = seen_by(tree.last_blocks)
    assert [last[place] for place in range(len(rows))] == [seen[node] for node in tree.last.tolist()]
    kinds = {  # texts, and prompts that are the same up to the end of the same first image, have each branch once
        last: (branches[last][: branches[last].index(-sum(SIZES[: images[0] + 1])) + 1] if images else None)
        for last, images in zip(tree.last.tolist(), shown, strict=True)
    }
    kind_of = {node: kinds[last] for last in kinds for node in seen[last]}
    assert len({(kind_of[node], branch) for node, branch in branches.items()}) == len(tree.ids)


def node_contents(tree: Tree) -> list[int]:
    """The token of each node, ``-1 - n`` for the n-th feature of the images."""
    contents = tree.ids.tolist()
    for node, row in zip(tree.image_nodes.tolist(), tree.image_rows.tolist(), strict=True):
        contents[node] = -1 - row
    return contents


def seen_by(blocks: tuple[Block, ...]) -> dict[int, list[int]]:
    """Which nodes each wanted query sees, as ``scaled_dot_product_attention`` reads a block."""
    seen = {}
    for block in blocks:
        queries, keys = table(block.queries), table(block.keys)
        size = (len(queries), 1, queries.shape[1], keys.shape[1])
        mask = torch.ones(size, dtype=torch.bool).tril() if block.mask is None else block.mask.expand(size)
        wanted = range(queries.size) if block.wanted is None else block.wanted.tolist()
        for place in wanted:
            row, column = divmod(place, queries.shape[1])
            query = int(queries[row, column])
            assert query not in seen
            seen[query] = [int(keys[row, key]) for key in mask[row, 0, column].nonzero().squeeze(1)]
    return seen


def table(index: slice | torch.Tensor) -> np.ndarray:
    return np.arange(index.start, index.stop)[None] if isinstance(index, slice) else index.numpy()


@given(st.lists(st.integers(1, 300), min_size=2, max_size=30))
def test_prompts_side_by_side_pad_little(lengths):
    parts = _Family([np.full(length, number) for number, length in enumerate(lengths)], 0)._parts(range(len(lengths)))
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    for part in parts:
        longest = max(lengths[row] for row in part)
        assert sum(lengths[row] for row in part) >= (1 - MAX_PADDING) * longest * len(part)


def test_long_texts_need_no_masks():
    tree = plan_tree([[1] * 10 + [2 + number] * 3000 for number in range(4)], [[]] * 4, I, [])
    assert all(block.mask is None for block in tree.blocks)


def test_masks_of_many_prompts_about_one_image_grow_with_their_number_alone():
    rows = [[1, *[I] * 2000, *range(10 + 20 * number, 30 + 20 * number)] for number in range(600)]
    tree = plan_tree(rows, [[0]] * 600, I, [2000])
    nodes = len(tree.ids)
    assert nodes == 2001 + 600 * 20
    assert sum(block.mask.numel() for block in tree.blocks if block.mask is not None) < nodes * (2001 + 1100)
    assert sum(block.mask.numel() for block in tree.last_blocks) <= 600 * nodes


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
    class Spread:
        hf_device_map: ClassVar = {"vision_tower": 0, "language_model": 1}
        config = copy.deepcopy(model[0].config)

    Spread.config.text_config._attn_implementation = "sdpa"
    sharing_e5v.prepare_sharing(Spread)
    assert not sharing_e5v.can_share(Spread.config.text_config)
    Spread.hf_device_map = {"": 0}
    sharing_e5v.prepare_sharing(Spread)
    assert sharing_e5v.can_share(Spread.config.text_config)


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
    config._attn_implementation = "sdpa"
    config.model_type, config.sliding_window = "mistral", 16
    sharing_e5v.prepare_sharing(sliding[0].model)
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
    with pytest.MonkeyPatch.context() as patch:  # so that a few short prompts are planned in every way
        patch.setattr(planning_e5v, "CPU_BATCH_TOKENS", data.draw(st.sampled_from([30, 100, 2048])))
        patch.setattr(sharing_e5v, "TOGETHER", data.draw(st.sampled_from([4, 1024])))
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
