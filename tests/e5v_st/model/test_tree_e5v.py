from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from e5v_st.model import tree_e5v
from e5v_st.model.tree_e5v import MAX_PADDING, Block, Tree, _Family, plan_tree

I = 9  # noqa: E741 - the image token, short for tables


def test_the_drawing_at_the_head_of_the_file_is_true():
    cat, dog, runs, sits = 3, 4, 5, 6
    prompts = [[1, 2, cat, sits], [1, 2, dog, runs], [1, 2, dog, sits]]
    tree = plan_tree(prompts, [[]] * 3, I, [])
    assert tree.ids.tolist() == [1, 2, cat, sits, dog, runs, sits]
    assert tree.positions.tolist() == [0, 1, 2, 3, 2, 3, 3]
    assert tree.last.tolist() == [3, 5, 6]
    family = _Family([np.array(prompt) for prompt in prompts], 0)
    family.beside = True
    (block,) = family.blocks()
    assert block.queries.tolist() == block.keys.tolist() == [[0, 1, 2, 3], [0, 1, 4, 5], [0, 1, 4, 6]]
    assert block.wanted.tolist() == [0, 1, 2, 3, 6, 7, 11]
    family.beside = False
    prefix, branches = family.blocks()
    assert (prefix.queries, prefix.keys, prefix.mask) == (slice(0, 2), slice(0, 2), None)
    assert (branches.queries, branches.keys) == (slice(2, 7), slice(0, 7))
    drawn = ["x x x . . . .", "x x x x . . .", "x x . . x . .", "x x . . x x .", "x x . . x . x"]
    assert [" ".join(".x"[seen] for seen in row) for row in branches.mask[0, 0].tolist()] == drawn
    (ends,) = family.last_blocks([0, 1, 2])
    assert ends.queries.tolist() == [[0, 1, 2]]
    assert [" ".join(".x"[seen] for seen in row) for row in ends.mask[0, 0].tolist()] == [drawn[1], drawn[3], drawn[4]]


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
    assert tree.image_features.tolist() == [2, 3, 0, 1]
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
        patch.setattr(tree_e5v, "TOGETHER", together)
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
    for node, row in zip(tree.image_nodes.tolist(), tree.image_features.tolist(), strict=True):
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
    groups = _Family([np.full(length, number) for number, length in enumerate(lengths)], 0)._groups(range(len(lengths)))
    assert sorted(row for part in groups for row in part) == list(range(len(lengths)))
    for part in groups:
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
