"""Loss, gradient and prompts against the published training code's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

from e5v_st.training.collate import make_collator
from e5v_st.training.losses import make_loss
from e5v_st.training.model import AdapterModel, TrainableTransformer
from e5v_st.training.quirks import released_prompt
from e5v_st.training.recipes import Settings


@pytest.fixture
def model(small):
    """The small checkpoint, text only, all of it trainable, as the goldens have it."""
    transformer = TrainableTransformer.load(str(small))
    model = AdapterModel(modules=[transformer, Pooling(128, pooling_mode="lasttoken"), Normalize()], device="cpu")
    return model.requires_grad_(True).train()


def loss_and_gradient(model, triplets, **settings):
    """Returns the loss, and the norm of its gradient over the language model's layers."""
    settings = Settings(**settings)
    batch = make_collator(model, settings)(triplets)
    features = [
        {name.removeprefix(f"{column}_"): value for name, value in batch.items() if name.startswith(f"{column}_")}
        for column in triplets[0]
    ]
    loss = make_loss(model, settings, len(triplets), 1)(features, None)
    loss.backward()
    layers = model[0].model.language_model.layers
    norm = torch.sqrt(sum(weight.grad.square().sum() for weight in layers.parameters()))
    return loss.item(), norm.item()


def test_the_default_is_the_clean_loss_with_its_gradient(model, triplets, golden_training):
    wanted = golden_training["loss_clean"].item(), golden_training["gradnorm_clean"].item()
    assert loss_and_gradient(model, triplets) == pytest.approx(wanted, rel=2e-4)


def test_released_quirks_give_the_published_loss_with_its_gradient(model, triplets, golden_training):
    wanted = golden_training["loss_released1_fixmask0"].item(), golden_training["gradnorm_released1_fixmask0"].item()
    assert loss_and_gradient(model, triplets, released_quirks=True) == pytest.approx(wanted, rel=2e-4)


@pytest.mark.parametrize("mini_batch_size", [1, 3])
def test_a_gradient_cached_batch_is_the_whole_batch(model, triplets, golden_training, mini_batch_size):
    wanted = golden_training["loss_clean"].item(), golden_training["gradnorm_clean"].item()
    found = loss_and_gradient(model, triplets, mini_batch_size=mini_batch_size)
    assert found == pytest.approx(wanted, rel=2e-4)


def test_released_prompts_are_the_published_ones_to_the_letter(goldens):
    with np.load(goldens / "training.npz", allow_pickle=False) as found:
        prompts, sentences = found["released_prompts"], found["triplets"]
    assert [released_prompt(str(sentence)) for sentence in sentences.flat] == [str(prompt) for prompt in prompts.flat]
