"""What is trained beside the language model, by name, in every family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import e5v_st
from e5v_st.training.model import load_for_training
from e5v_st.training.vision import train_targets

#: One of each kind of tower and projector.
KINDS = ("llava_next-mistral", "qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl", "gemma4", "mistral3")
PROJECTORS = ("multi_modal_projector", "merger", "connector", "embed_vision", "deepstack_merger_list")


def trained(folder, vision: str) -> set[str]:
    model = load_for_training(str(folder), bits=32, lora_r=2, lora_dropout=0.0, text_only=False, train_vision=vision)
    return {name for name, weight in model[0].model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("family", KINDS)
def test_projector_and_tower_are_trained_where_asked_and_nothing_else(checkpoint, family):
    folder = checkpoint(family)
    none, projector, lora = (trained(folder, vision) for vision in ("none", "projector", "lora"))
    assert none < projector < lora
    assert all(".lora_" in name for name in lora)
    assert not any(part in name for name in none for part in ("vision", "visual", *PROJECTORS))
    assert all(any(part in name.split(".") for part in PROJECTORS) for name in projector - none)
    assert all("vision" in name or "visual" in name for name in lora - projector)


@pytest.mark.parametrize("family", KINDS)
def test_every_trained_weight_gets_a_gradient_of_an_image(checkpoint, family):
    model = load_for_training(
        str(checkpoint(family)), bits=32, lora_r=2, lora_dropout=0.0, text_only=False, train_vision="lora"
    ).train()
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.02)  # at zero, what stands before it has no gradient
    noise = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    features = model.preprocess([{"image": Image.fromarray(each)} for each in (noise, noise.transpose(1, 0, 2))])
    (model(features)["sentence_embedding"] @ torch.randn(model.get_embedding_dimension())).sum().backward()
    without = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    zero = [name for name, weight in model.named_parameters() if weight.requires_grad and not weight.grad.any()]
    assert (without, zero) == ([], [])
    frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad and weight.grad is not None]
    assert frozen == []


def test_a_projector_without_linear_layers_is_refused_by_name(checkpoint):
    transformer = e5v_st.load(checkpoint("gemma3"), device="cpu")[0]
    with pytest.raises(ValueError, match=r"the projector of a gemma3 has no linear layers.*use train_vision: lora"):
        train_targets(transformer, "projector")
    assert train_targets(transformer, "lora").vision
