"""Whatever stands behind the transformer, and whatever output is wanted, reads the states of plain transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, WeightedLayerPooling

import e5v_st
from e5v_st.model import modeling_e5v
from e5v_st.model.prompts_e5v import render, resolve_prompt


@pytest.fixture(scope="module")
def items(pictures):
    """Texts of different lengths, and two prompts about one image: there is much to share."""
    texts = [{"text": "A dog."}, {"text": "A dog sits in the grass, and another one sleeps."}, {"text": ""}]
    return [*texts, {"image": pictures[0]}, {"image": pictures[0], "text": "is red"}]


@pytest.fixture(scope="module")
def states(base, items):
    """Hidden states ``(tokens, d)`` of each item, alone and with plain transformers."""
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    plain = LlavaNextForConditionalGeneration.from_pretrained(base).eval()
    processor = AutoProcessor.from_pretrained(base)
    found = []
    for item in items:
        images = [Image.open(item["image"]).convert("RGB")] if "image" in item else []
        prompt = render(resolve_prompt(None, "text" in item, len(images)), "llama3", item.get("text", ""))
        inputs = processor(text=[prompt], images=images or None, return_tensors="pt")
        with torch.inference_mode():
            found.append(plain(**inputs, output_hidden_states=True).hidden_states[-1][0])
    return found


def with_modules(model, *modules):
    return SentenceTransformer(modules=[model[0], *modules], device="cpu")


POOLED = {
    "mean": lambda x: x.mean(0),
    "max": lambda x: x.max(0).values,
    "cls": lambda x: x[0],
    "lasttoken": lambda x: x[-1],
    "mean_sqrt_len_tokens": lambda x: x.sum(0) / len(x) ** 0.5,
    "weightedmean": lambda x: (x * torch.arange(1, len(x) + 1)[:, None]).sum(0) / (len(x) * (len(x) + 1) / 2),
}


@pytest.mark.parametrize("mode", [*POOLED, ("lasttoken", "mean", "max")])
def test_every_pooling_reads_the_states_of_plain_transformers(model, items, states, mode):
    other = with_modules(model, Pooling(128, pooling_mode=mode))  # and no Normalize
    modes = mode if isinstance(mode, tuple) else (mode,)
    pooled = [torch.cat([POOLED[name](x) for name in modes]) for x in states]
    for found in (other.encode(items, batch_size=8), e5v_st.encode_all(other, items, progress=False)):
        np.testing.assert_allclose(found, torch.stack(pooled), atol=2e-5)


def test_modules_behind_the_pooling_are_applied(model, items, states):
    torch.manual_seed(0)
    dense = Dense(128, 16)
    weight, bias = dense.linear.weight.detach(), dense.linear.bias.detach()
    for mode in ("lasttoken", "mean"):
        other = with_modules(model, Pooling(128, pooling_mode=mode), dense, Normalize())
        expected = torch.stack([torch.tanh(weight @ POOLED[mode](x) + bias) for x in states])
        expected = torch.nn.functional.normalize(expected)
        for found in (other.encode(items, batch_size=8), e5v_st.encode_all(other, items, progress=False)):
            np.testing.assert_allclose(found, expected, atol=2e-5)


def test_all_token_embeddings_are_given_where_they_are_asked_for(model, items, states):
    found = model.encode(items, batch_size=8, output_value="token_embeddings")
    assert [len(each) for each in found] == [len(each) for each in states]
    for each, expected in zip(found, states, strict=True):
        torch.testing.assert_close(each, expected, atol=2e-5, rtol=0)
    alone = model.encode(items[0], output_value="token_embeddings")
    torch.testing.assert_close(alone, states[0], atol=2e-5, rtol=0)


def test_all_outputs_fit_each_other(model, items, states):
    for found, expected in zip(model.encode(items, batch_size=8, output_value=None), states, strict=True):
        mask = found["attention_mask"].bool()
        assert len(found["input_ids"]) == len(found["token_embeddings"]) == len(mask)
        torch.testing.assert_close(found["token_embeddings"][mask], expected, atol=2e-5, rtol=0)
        expected = torch.nn.functional.normalize(expected[-1], dim=0)
        torch.testing.assert_close(found["sentence_embedding"], expected, atol=2e-5, rtol=0)


def test_only_embeddings_of_last_tokens_are_computed_without_the_others(model, items, monkeypatch):
    calls = []
    stock = modeling_e5v.shared_states
    monkeypatch.setattr(
        modeling_e5v, "shared_states", lambda *args, **kwargs: calls.append(1) or stock(*args, **kwargs)
    )
    model.encode(items)
    assert len(calls) == 1
    e5v_st.encode_all(model, items, progress=False)
    shared = len(calls)
    assert shared > 1
    model.encode(items, output_value="token_embeddings")
    with_modules(model, Pooling(128, pooling_mode="mean")).encode(items)
    with torch.inference_mode():  # whoever calls it may read what they like
        model(model.preprocess(items))
    assert len(calls) == shared


def test_a_saved_model_with_another_pooling_pools_as_before(model, items, states, tmp_path):
    with_modules(model, Pooling(128, pooling_mode="mean")).save_pretrained(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True, device="cpu")
    assert type(again[0]).__module__.startswith("transformers_modules")
    expected = torch.stack([x.mean(0) for x in states])
    np.testing.assert_allclose(again.encode(items, batch_size=8), expected, atol=2e-5)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Pooling(128, pooling_mode="mean", include_prompt=False), "'mean' has include_prompt=False"),
        (WeightedLayerPooling(128, num_hidden_layers=4), "WeightedLayerPooling, which wants the hidden states of all"),
    ],
)
def test_a_module_that_would_read_what_is_not_there_is_refused(model, items, module, message):
    other = with_modules(model, module, Pooling(128, pooling_mode="lasttoken"))
    for encode in (other.encode, lambda items: e5v_st.encode_all(other, items, progress=False)):
        with pytest.raises(ValueError, match=message):
            encode(items)
