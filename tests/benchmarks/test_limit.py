"""The arithmetic that benchmarks/limit.py calls needed is that of the plan's tokens, counted here by hand."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from PIL import Image

import e5v_st

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import limit

TEXTS = [({"text": "A dog."}, "text"), ({"text": "A dog runs along the river."}, "text")]
IMAGE = [({"image": Image.new("RGB", (56, 56), "red")}, "image")]


@pytest.fixture
def watched(checkpoint):
    model = e5v_st.load(checkpoint("qwen3_vl"), device="cpu")
    meters = [limit.Meter()]
    limit.watch(model, meters[0])
    with limit.watching_attention(meters):
        yield model, meters


def arithmetic(products, side):
    return sum(count * int(np.prod(shape)) for (own, shape), count in products.items() if own == side)


def by_hand(config, nodes, prompts):
    """Rows times inputs times outputs of a Qwen3's linear layers."""
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    key_value = 2 * config.hidden_size * keys
    others = 2 * config.hidden_size * queries + 3 * config.hidden_size * config.intermediate_size
    whole = (config.num_hidden_layers - 1) * nodes * (key_value + others)
    return whole + nodes * key_value + prompts * others


def test_texts_need_each_node_of_their_tree_once_and_in_the_last_layer_their_ends(watched):
    model, meters = watched
    limit.ours(model)(TEXTS)
    made = families.family("qwen3_vl")
    texts = [families.render(made, e5v_st.PROMPTS["text"], item["text"], 0) for item, _ in TEXTS]
    one, two = (model.tokenizer(text).input_ids for text in texts)
    shared = next(place for place, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
    nodes = len(one) + len(two) - shared
    assert meters[0].nodes == [(nodes, 2)]
    products = limit.needed(model, meters[0])
    assert arithmetic(products, "language") == by_hand(model[0].model.get_decoder().config, nodes, 2)
    assert arithmetic(products, "vision") == 0


def test_texts_of_a_recurrent_model_need_once_what_all_begin_with_if_it_is_worth_a_pass(checkpoint):
    model = e5v_st.load(checkpoint("qwen3_5"), device="cpu")
    meter = limit.Meter()
    limit.watch(model, meter)
    few = [({"text": f"A dog {number}."}, "text") for number in range(3)]
    many = [({"text": f"{number} dogs."}, "text") for number in range(10, 40)]
    lengths = []
    for work in (few, many):
        limit.ours(model)(work)
        lengths.append(model[0].preprocess([item for item, _ in work])["attention_mask"].sum().item())
    head = len(model.tokenizer("<|im_start|>user\n").input_ids)
    assert meter.nodes[0][0] == lengths[0]
    assert sum(nodes for nodes, _ in meter.nodes[1:]) == lengths[1] - head * (len(many) - 1)


def test_an_image_needs_the_products_of_its_patches(watched):
    model, meters = watched
    limit.ours(model)(IMAGE)
    config = model[0].model.config.vision_config
    (pixels,) = (model[0].reader.read([item["image"]]).tensors["pixel_values"] for item, _ in IMAGE)
    patches, width = pixels.shape[0], config.hidden_size
    layers = config.depth * patches * (4 * width * width + 2 * width * config.intermediate_size)
    found = Counter(
        {shape: count for (side, shape), count in limit.needed(model, meters[0]).items() if side == "vision"}
    )
    of_layers = {(patches, width, 3 * width), (patches, width, width), (patches, width, config.intermediate_size)}
    of_layers.add((patches, config.intermediate_size, width))
    assert sum(count * int(np.prod(shape)) for shape, count in found.items() if shape in of_layers) == layers
    assert found[patches, pixels.shape[1], width] == 1  # of patches to their embedding


def test_parts_add_up_to_the_whole_and_embeddings_are_compared(watched, monkeypatch):
    model, meters = watched
    monkeypatch.setattr(limit, "_SHAPE_SECONDS", 0)
    rates = limit.Rates(torch.float32)
    found = limit.measure_encoding(model, [*TEXTS], 1, rates, meters)
    assert sum(found["parts"].values()) == pytest.approx(found["seconds"])
    assert min(found["parts"].values()) >= 0
    assert found["limit"]["seconds"] > 0
    monkeypatch.setattr(limit, "_one_by_one", lambda model, work: np.eye(2, model[0].get_embedding_dimension()))
    with pytest.raises(AssertionError, match="an embedding has a cosine of"):
        limit.measure_encoding(model, [*TEXTS], 1, rates, meters)


def test_attention_counts_pairs_that_see_each_other():
    meters = [limit.Meter()]
    states = torch.ones(1, 2, 5, 8)
    mask = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
    mask[..., 0] = True
    attend = "scaled_dot_product_attention"
    with limit.watching_attention(meters):
        for how, seen in (({}, 25), ({"is_causal": True}, 15), ({"attn_mask": mask}, 5)):
            meters[0].pairs.clear()
            getattr(torch.nn.functional, attend)(states, states, states, **how)
            assert meters[0].pairs["language"] == 4 * 2 * seen * 8
