"""The losses that a recipe names: which class, which options, and what is refused."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers.sentence_transformer import losses

import e5v_st
from e5v_st.training.guide import Before, GuidedRankingLoss
from e5v_st.training.losses import LOSSES, kind_of, make_loss, make_losses
from e5v_st.training.model import load_for_training
from e5v_st.training.recipes import Settings
from e5v_st.training.sources import Source


@pytest.fixture(scope="module")
def model(small):
    return load_for_training(str(small), bits=32, lora_r=2, lora_dropout=0.0)


def make(model, *, matryoshka: list[int] | None = None, rows: int = 8, world: int = 1, **loss):
    settings = Settings(temperature=0.02, mini_batch_size=4)
    settings.loss, settings.matryoshka = loss, matryoshka or []
    return make_loss(model, settings, rows, world)


@pytest.mark.parametrize("name", LOSSES)
def test_each_name_makes_its_class(model, name):
    assert type(make(model, name=name)) is LOSSES[name].stock


def test_without_a_name_it_is_the_published_one_cached_where_a_batch_does_not_fit(model):
    assert type(make(model)) is losses.CachedMultipleNegativesRankingLoss
    assert type(make(model, rows=4)) is losses.MultipleNegativesRankingLoss


def test_options_reach_the_loss(model):
    found = make(model, name="cached_mnrl", directions=["query_to_doc", "doc_to_query"], hardness_strength=5.0)
    assert (found.directions, found.hardness_strength) == (("query_to_doc", "doc_to_query"), 5.0)
    assert (found.mini_batch_size, found.scale, found.gather_across_devices) == (4, pytest.approx(50), False)
    assert make(model, name="mnrl", temperature=0.1, world=2).scale == pytest.approx(10)
    assert make(model, name="mnrl", world=2).gather_across_devices
    assert make(model, name="gist", margin=0.3).temperature == pytest.approx(0.02)
    assert make(model, name="cosent").scale == pytest.approx(50)
    assert make(model, name="distill").student_temperature == losses.DistillKLDivLoss(model).student_temperature


def test_false_negatives_make_the_guided_loss(model):
    found = make(model, name="mnrl", directions=["query_to_doc", "doc_to_query"], false_negatives=0.1)
    assert type(found) is GuidedRankingLoss
    assert found.directions == ("query_to_doc", "doc_to_query")


def test_matryoshka_stands_around_any_loss(model):
    found = make(model, matryoshka=[32, 128, 32], name="cosent")
    assert type(found) is losses.MatryoshkaLoss
    assert type(found.loss) is losses.CoSENTLoss
    assert list(found.matryoshka_dims) == [128, 32]
    for wrong in ([0], [129], ["128"], [True]):
        with pytest.raises(ValueError, match="want numbers from 1 to 128, the model's dimension"):
            make(model, matryoshka=wrong)


def test_wrong_names_and_options_are_refused():
    with pytest.raises(ValueError, match="loss: got the name 'mnlr', want one of mnrl, cached_mnrl"):
        kind_of({"name": "mnlr"}, "loss")
    with pytest.raises(ValueError, match=r"loss mnrl: there is no 'direction' \(did you mean directions\?\)"):
        kind_of({"name": "mnrl", "direction": ["query_to_doc"]}, "loss")
    with pytest.raises(ValueError, match="there is no 'false_negatives'"):
        kind_of({"name": "cosent", "false_negatives": 0.1}, "loss")
    for ours in ("model", "gather_across_devices", "similarity_fct", "scale"):
        with pytest.raises(ValueError, match=f"there is no '{ours}'"):
            kind_of({"name": "mnrl", ours: 1}, "loss")


def test_an_option_with_a_wrong_value_is_refused_by_name(model):
    with pytest.raises(ValueError, match="loss mnrl: "):
        make(model, name="mnrl", directions=["up"])


@pytest.fixture(scope="module")
def other(small, tmp_path_factory):
    """A model of the same family with other weights, and one of another family."""
    folder = tmp_path_factory.mktemp("guides") / "other"
    guide = e5v_st.load(small, device="cpu")
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in guide[0].model.language_model.layers.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    guide.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize(
    "loss", [{"name": "gist"}, {"name": "cached_gist"}, {"name": "cached_mnrl", "false_negatives": 0.0}]
)
def test_another_model_of_the_family_can_be_the_guide(model, other, loss):
    """A negative that the guide alone finds near is left out: the loss is that of the stock class with that guide."""
    texts = [f"number {n} of {n * n}" for n in range(6)]
    near = [f"{n} again" for n in range(6)]

    def value(made) -> float:
        batch = [model.preprocess([{"text": text} for text in column]) for column in (texts, near)]
        with torch.no_grad():
            return made(batch, None).item()

    model.eval()
    guide = e5v_st.load(other, device="cpu")
    how = {"temperature": 0.02, "contrast_anchors": False, "contrast_positives": False}
    expected = value(losses.GISTEmbedLoss(model, guide, **how))
    contrasts = {} if "false_negatives" in loss else {"contrast_anchors": False, "contrast_positives": False}
    assert value(make(model, guide=str(other), **loss, **contrasts)) == pytest.approx(expected, rel=1e-5)
    assert value(make(model, **loss, **contrasts)) != pytest.approx(expected, rel=1e-3)


def test_a_guide_that_reads_other_features_is_refused(model, checkpoint):
    with pytest.raises(ValueError, match="the guide is a smolvlm, and what is trained a llava_next-llama3"):
        make(model, name="gist", guide=str(checkpoint("smolvlm")))
    with pytest.raises(ValueError, match="which false_negatives needs"):
        make(model, name="mnrl", guide=str(checkpoint("smolvlm")))


def test_the_trained_weights_are_copied_once_and_for_a_guide_alone(model, monkeypatch):
    """A copy of an 8 B model's LoRA takes 0.7 GB."""
    made = []
    monkeypatch.setattr(e5v_st.training.losses, "Before", lambda own: made.append(own) or Before(own))
    settings = Settings()
    sources = {"a": Source("a.csv"), "b": Source("b.csv", loss={"name": "cosent"})}
    make_losses(model, settings, sources, 8, 1)
    assert made == []
    sources |= {name: Source("c.csv", loss={"name": "gist"}) for name in "cd"}
    make_losses(model, settings, sources, 8, 1)
    assert made == [model]
