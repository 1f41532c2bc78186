from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from e5v_st.model.planning_e5v import CPU_BATCH_TOKENS, default_batch_tokens, plan_batches, plan_parts


def test_the_budget_on_a_cpu(model):
    assert default_batch_tokens(model[0].model) == CPU_BATCH_TOKENS


rows = st.lists(st.tuples(st.sampled_from([(), ("a",), ("b", "c")]), st.integers(1, 60)), max_size=30)


@given(rows, st.integers(1, 200))
def test_batches_hold_every_row_once_in_order_and_keep_to_the_budget(rows, budget):
    images, texts = [image for image, _ in rows], [length for _, length in rows]
    batches = plan_batches(images, [(len(image) * 40, length) for image, length in rows], budget)
    assert [row for batch in batches for row in batch] == list(range(len(rows)))
    for batch in batches:
        assert len({bool(images[row]) for row in batch}) == 1
        if len(batch) > 1 and not images[batch[0]]:
            assert sum(texts[row] for row in batch) <= budget
        if len(batch) > 1 and images[batch[0]]:
            runs = [image for image, _ in itertools.groupby(images[row] for row in batch)]
            assert sum(texts[row] for row in batch) <= budget
            assert len(runs) == 1 or sum(len(image) * 40 for image in runs) <= budget


def test_prompts_about_one_image_stay_in_one_batch_though_the_image_alone_is_over_the_budget():
    costs = [(3000, 20), (3000, 30), (3000, 30), (2000, 20), (0, 20)]
    assert plan_batches([("a",)] * 3 + [("b",), ()], costs, 2048) == [[0, 1, 2], [3], [4]]


def test_a_batch_is_split_into_parts_with_images_of_like_size_together():
    sizes, image = [4, 2, 4], 9
    rows = [[1, 9, 9, 5], [2], [1, *[9] * 4, 5], [3], [1, *[9] * 4, 6], [1, *[9] * 4, 5], [4]]
    shown = [[1], [], [0], [], [2], [2], []]
    parts = plan_parts([np.array(row) for row in rows], shown, image, sizes, budget=11)
    assert [sorted(part.prompts.tolist()) for part in parts] == [[2], [4, 5], [0], [1, 3, 6]]
    assert [part.images.tolist() for part in parts] == [[0], [2], [1], []]
    assert [len(part.tree.last) for part in parts] == [1, 2, 1, 3]
    (images, texts) = plan_parts([np.array(row) for row in rows], shown, image, sizes)
    assert sorted(images.prompts.tolist()) == [0, 2, 4, 5]
    assert images.images.tolist() == [0, 1, 2]
    assert sorted(texts.prompts.tolist()) == [1, 3, 6]


def test_encode_computes_no_more_tokens_together_than_the_budget(model, pictures, monkeypatch):
    from e5v_st.model import sharing_e5v

    items = [*pictures[:6], *({"text": f"text {number}"} for number in range(20))]
    expected = model.encode(items, batch_size=1)
    monkeypatch.setattr("e5v_st.model.planning_e5v.CPU_BATCH_TOKENS", 150)
    nodes, stock = [], sharing_e5v._tree_states
    monkeypatch.setattr(
        sharing_e5v, "_tree_states", lambda m, p, tree, **k: nodes.append(len(tree.ids)) or stock(m, p, tree, **k)
    )
    found = model.encode(items, batch_size=64)
    single = max(model.preprocess([picture])["input_ids"].shape[1] for picture in pictures[:6])
    assert max(nodes) <= max(150, single)
    assert len(nodes) > 3
    np.testing.assert_allclose(found, expected, atol=1e-5)
