"""What nobody reads is not computed, in any family; what is read stays as it is (see also test_families.py)."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import families
import numpy as np
import pytest
import torch
from PIL import Image

import e5v_st
from e5v_st.model.items_e5v import read_items
from e5v_st.model.skipping_e5v import count_layers_read, only_rows, unread_layers

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))
TEXTS = ["A dog.", "A dog runs along the river.", "two people"]
SHARED = [PICTURE, {"image": PICTURE, "text": "is red"}, {"image": PICTURE, "text": "has stripes"}]


@pytest.fixture(params=families.FAMILIES)
def model(request, checkpoint):
    return e5v_st.load(checkpoint(request.param), device="cpu")


def spy(model):
    """Returns a list that grows by the number of tokens that go through the last layer's feed-forward network."""
    seen = []
    mlp = model[0].model.get_decoder().layers[-1].mlp
    mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:-1].numel()))
    return seen


def test_the_last_feed_forward_sees_tokens_that_are_read_alone(model):
    rows = spy(model)
    model.encode(TEXTS)
    assert sum(rows) == len(TEXTS)
    rows.clear()
    model.encode(SHARED)
    assert sum(rows) == len(SHARED)


def test_packed_texts_pay_for_their_last_tokens_alone(checkpoint):
    model = e5v_st.load(checkpoint("llava_next-mistral"), device="cpu")
    expected = model.encode(TEXTS)
    model[0].share_prefixes = False
    rows = spy(model)
    np.testing.assert_allclose(model.encode(TEXTS), expected, atol=1e-5)
    assert rows == [len(TEXTS)]


def test_nothing_is_left_out_in_training_where_dropout_draws_for_every_token(checkpoint):
    model = e5v_st.load(checkpoint("qwen3_vl"), device="cpu").train()
    rows = spy(model)
    with torch.no_grad():
        model[0](model[0].collate(read_items(TEXTS), share=True))
    assert sum(rows) > len(TEXTS)


def test_nothing_is_left_out_where_gradients_are_asked_for(checkpoint):
    transformer = e5v_st.load(checkpoint("qwen3_vl"), device="cpu")[0]
    decoder, ids = transformer.model.get_decoder(), torch.arange(8).unsqueeze(0)
    one = torch.tensor([0])
    with torch.no_grad():
        expected = decoder(input_ids=ids).last_hidden_state
        with only_rows(one, one + 7):
            found = decoder(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found[:, 7], expected[:, 7])
    assert (found - expected)[:, :7].abs().max() > 1e-3  # the others were left out indeed
    with only_rows(one, one + 7):
        torch.testing.assert_close(decoder(input_ids=ids).last_hidden_state, expected)


@pytest.mark.parametrize("name", ["llava", "llava_next-mistral"])
def test_layers_of_the_tower_behind_the_features_are_kept_and_not_run(name, checkpoint):
    model = e5v_st.load(checkpoint(name), device="cpu")
    (layer,) = unread_layers(model[0].model)
    expected = model.encode(SHARED)
    for weight in layer.parameters():
        weight.data.fill_(float("nan"))
    np.testing.assert_array_equal(model.encode(SHARED), expected)
    kept = set(families.open_plain(checkpoint(name)).model.state_dict())
    assert set(model[0].model.state_dict()) == kept


def test_layers_are_counted_as_features_are_chosen():
    from transformers import LlavaConfig, Qwen2VLConfig

    config = LlavaConfig()
    assert [config.vision_config.num_hidden_layers, count_layers_read(config)] == [24, 23]
    config.vision_feature_layer = [-3, 5]
    assert count_layers_read(config) == 22
    assert count_layers_read(Qwen2VLConfig()) == float("inf")


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "qwen3_5"])
def test_eight_threads_share_a_model_of_any_family(name, checkpoint):
    model = e5v_st.load(checkpoint(name), device="cpu")
    items = [*SHARED, *TEXTS]
    expected = model.encode(items)
    orders = [random.Random(seed).sample(range(len(items)), len(items)) for seed in range(24)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda order: model.encode([items[i] for i in order]), orders))
    for order, rows in zip(orders, found, strict=True):
        np.testing.assert_allclose(rows, expected[order], atol=1e-5)
