"""Every loss of sentence-transformers gives what it gives with the stock module on the native export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.utils import slice_tensors
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.merged_forward import column_merging_disabled, merge_feature_batches
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

import e5v_st
from e5v_st.hub.export import export
from e5v_st.training.model import TrainableTransformer

ROWS = 4
DIMENSION = 128
LAYERS = 1


def images(seed: int, size: tuple[int, int] = (60, 50)) -> list[Image.Image]:
    noise = torch.randint(0, 256, (ROWS, 6, 5, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return [Image.fromarray(pixels.numpy()).resize(size) for pixels in noise]


def texts(what: str) -> list[dict[str, Any]]:
    return [{"text": f"{what} number {row}" + " and one" * row} for row in range(ROWS)]


def composed(seed: int, what: str) -> list[dict[str, Any]]:
    return [{"image": image, **text} for image, text in zip(images(seed), texts(what), strict=True)]


def in_turn(*columns: Sequence[Any]) -> list[Any]:
    return [columns[row % len(columns)][row] for row in range(ROWS)]


#: Anchor, positive and negative.
COLUMNS = {
    "texts": [texts("A dog"), texts("A dog that is"), texts("No cat")],
    "images": [texts("A red square"), images(0), images(1)],
    "composed items": [composed(2, "is red"), images(3), composed(4, "is larger")],
    "mixed columns": [
        in_turn(texts("A dog"), images(5)),
        in_turn(composed(6, "is blue"), texts("A square"), images(7, (200, 60))),
        [{"image": images(8)[:2], "text": "both"}, *texts("No image")[1:]],
    ],
}
#: Where sentence-transformers embeds positives and negatives in one batch.
MERGED = ("texts", "images", "composed items")

numbers = torch.Generator().manual_seed(0)
SCORES, TEACHER = torch.rand(ROWS, generator=numbers), torch.randn(ROWS, DIMENSION, generator=numbers)
SAME, CLASSES = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 1])


class Case(NamedTuple):
    """A loss: what makes it of a model, how many columns and which labels it takes, and the loss that it must equal."""

    make: Callable[[SentenceTransformer], Any]
    columns: int = 3
    labels: torch.Tensor | None = None
    plain: Callable[[SentenceTransformer], Any] | None = None  # where it is not the same: without gradient caching


def ranking(model: SentenceTransformer) -> Any:
    return losses.MultipleNegativesRankingLoss(model)


def symmetric(model: SentenceTransformer) -> Any:
    return losses.MultipleNegativesSymmetricRankingLoss(model)


def guided(model: SentenceTransformer) -> Any:
    return losses.GISTEmbedLoss(model, model, temperature=0.1)


def margin(model: SentenceTransformer) -> Any:
    return losses.MegaBatchMarginLoss(model, use_mini_batched_version=False)


def matryoshka(model: SentenceTransformer) -> Any:
    return losses.MatryoshkaLoss(model, ranking(model), [DIMENSION, 32])


def cached_matryoshka(model: SentenceTransformer) -> Any:
    inner = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3)
    return losses.MatryoshkaLoss(model, inner, [DIMENSION, 32])


def softmax(model: SentenceTransformer) -> Any:
    torch.manual_seed(0)  # it has weights of its own
    return losses.SoftmaxLoss(model, DIMENSION, 2)


CASES = {
    "AnglELoss": Case(losses.AnglELoss, 2, SCORES),
    "BatchAllTripletLoss": Case(losses.BatchAllTripletLoss, 1, CLASSES),
    "BatchHardSoftMarginTripletLoss": Case(losses.BatchHardSoftMarginTripletLoss, 1, CLASSES),
    "BatchHardTripletLoss": Case(losses.BatchHardTripletLoss, 1, CLASSES),
    "BatchSemiHardTripletLoss": Case(losses.BatchSemiHardTripletLoss, 1, CLASSES),
    "CachedGISTEmbedLoss": Case(
        lambda model: losses.CachedGISTEmbedLoss(model, model, temperature=0.1, mini_batch_size=3), plain=guided
    ),
    "CachedMultipleNegativesRankingLoss": Case(
        lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3), plain=ranking
    ),
    "CachedMultipleNegativesRankingLoss by tokens": Case(
        lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_num_tokens=160), plain=ranking
    ),
    "CachedMultipleNegativesSymmetricRankingLoss": Case(
        lambda model: losses.CachedMultipleNegativesSymmetricRankingLoss(model, mini_batch_size=1), plain=symmetric
    ),
    "CoSENTLoss": Case(losses.CoSENTLoss, 2, SCORES),
    "ContrastiveLoss": Case(losses.ContrastiveLoss, 2, SAME),
    "ContrastiveTensionLoss": Case(losses.ContrastiveTensionLoss, 2, SAME),
    "ContrastiveTensionLossInBatchNegatives": Case(losses.ContrastiveTensionLossInBatchNegatives, 1),
    "CosineSimilarityLoss": Case(losses.CosineSimilarityLoss, 2, SCORES),
    "DistillKLDivLoss": Case(losses.DistillKLDivLoss, 3, TEACHER[:, :2]),
    "EmbedDistillLoss": Case(losses.EmbedDistillLoss, 3, TEACHER),
    "GISTEmbedLoss": Case(guided),
    "GlobalOrthogonalRegularizationLoss": Case(losses.GlobalOrthogonalRegularizationLoss),
    "MSELoss": Case(losses.MSELoss, 1, TEACHER),
    "MarginMSELoss": Case(losses.MarginMSELoss, 3, SCORES),
    "MatryoshkaLoss": Case(matryoshka),
    "MatryoshkaLoss of a cached one": Case(cached_matryoshka, plain=matryoshka),
    "MegaBatchMarginLoss": Case(lambda model: losses.MegaBatchMarginLoss(model, mini_batch_size=3), 2, plain=margin),
    "MegaBatchMarginLoss uncached": Case(margin, 2),
    "MultipleNegativesRankingLoss": Case(ranking),
    "MultipleNegativesSymmetricRankingLoss": Case(symmetric),
    "OnlineContrastiveLoss": Case(losses.OnlineContrastiveLoss, 2, SAME),
    "SoftmaxLoss": Case(softmax, 2, CLASSES),
    "TripletLoss": Case(losses.TripletLoss),
}
#: Losses that need a model's inner layers, or a decoder with cross-attention: the stock module has neither here.
REFUSED = {
    "AdaptiveLayerLoss": (KeyError, lambda model: losses.AdaptiveLayerLoss(model, ranking(model))),
    "DenoisingAutoEncoderLoss": (ValueError, lambda model: losses.DenoisingAutoEncoderLoss(model)),
    "Matryoshka2dLoss": (KeyError, lambda model: losses.Matryoshka2dLoss(model, ranking(model), [DIMENSION, 32])),
}


@pytest.fixture(scope="module")
def models(small, tmp_path_factory) -> dict[str, SentenceTransformer]:
    """The stock module, ours, and the one that training uses, which packs texts; all train the language model."""
    folder = export(small, tmp_path_factory.mktemp("losses") / "native", native=True)
    packing = TrainableTransformer.load(str(small), init_defaults={"text_only": False})
    found = {
        "stock": SentenceTransformer(str(folder), device="cpu"),
        "ours": e5v_st.load(small, device="cpu"),
        "packing": SentenceTransformer(
            modules=[packing, Pooling(DIMENSION, pooling_mode="lasttoken"), Normalize()], device="cpu"
        ),
    }
    for model in found.values():
        language_model = model[0].model.language_model
        language_model.layers = language_model.layers[:LAYERS]  # faster
        language_model.config.num_hidden_layers = LAYERS
        model.train().requires_grad_(False)
        language_model.requires_grad_(True)
    return found


@pytest.fixture(scope="module")
def features(models) -> Callable[[str, str], list[dict[str, Any]]]:
    """Makes a model's features of columns, as the trainer's collator and trainer do."""
    made: dict[tuple[str, str], list[dict[str, Any]]] = {}

    def make(name: str, kind: str) -> list[dict[str, Any]]:
        if (name, kind) not in made:
            made[name, kind] = [models[name].preprocess(column) for column in COLUMNS[kind]]
        return [dict(column) for column in made[name, kind]]  # models write into them

    return make


@pytest.fixture(scope="module")
def run(models, features) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Returns a loss and its gradient."""

    def result(name: str, kind: str, case: Case, make: Callable[[SentenceTransformer], Any], merge: bool = True):
        model = models[name]
        model.zero_grad()
        with nullcontext() if merge else column_merging_disabled():
            value = make(model)(features(name, kind)[: case.columns], case.labels)
            value = sum(value.values()) if isinstance(value, dict) else value
            value.backward()
        layers = model[0].model.language_model.layers
        return value.detach(), torch.cat([weight.grad.flatten() for weight in layers.parameters()])

    return result


def check_same(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert expected[1].norm() > 0
    assert (found[1] - expected[1]).norm() <= 1e-5 * expected[1].norm()


def test_every_loss_is_tried():
    assert {name.split()[0] for name in CASES} | set(REFUSED) == {
        name for name in losses.__all__ if name.endswith("Loss") or name.endswith("InBatchNegatives")
    }


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", COLUMNS)
def test_every_loss_equals_the_stock_module(run, kind, name):
    case = CASES[name]
    expected = run("stock", kind, case, case.plain or case.make, merge=False)
    check_same(run("ours", kind, case, case.make), expected)
    if kind in ("texts", "mixed columns"):
        check_same(run("packing", kind, case, case.make), expected)
    if case.plain is None and case.columns == 3 and kind in MERGED:
        check_same(run("ours", kind, case, case.make, merge=False), expected)


@pytest.mark.parametrize(
    "name", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss", "MarginMSELoss"]
)
@pytest.mark.parametrize("kind", COLUMNS)
@torch.no_grad()
def test_the_loss_of_an_evaluation_equals_the_stock_module(models, features, kind, name):
    case = CASES[name]
    expected = (case.plain or case.make)(models["stock"])(features("stock", kind), case.labels)
    for model in ("ours", "packing"):
        found = case.make(models[model])(features(model, kind), case.labels)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", COLUMNS)
def test_columns_of_one_kind_are_embedded_together(features, kind):
    assert (merge_feature_batches(features("ours", kind)[1:]) is not None) == (kind in MERGED)


@pytest.mark.parametrize("name", REFUSED)
def test_losses_that_the_stock_module_refuses_are_refused(models, features, name):
    error, make = REFUSED[name]
    for model in ("stock", "ours"):
        with pytest.raises(error):
            make(models[model])(features(model, "texts"), None)


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_batch_that_a_launcher_splits_gives_the_embeddings_of_the_whole(models, kind):
    model = models["ours"]
    rows = [dict(zip("abc", row, strict=True)) for row in zip(*COLUMNS[kind], strict=True)]
    batch = SentenceTransformerDataCollator(model.preprocess)(rows)
    parts = [slice_tensors(batch, slice(start, start + 2)) for start in (0, 2)]
    for column in "abc":
        whole, *split = ([{k[2:]: v for k, v in part.items() if k.startswith(column)}] for part in (batch, *parts))
        with torch.no_grad():
            expected = model(dict(whole[0]))["sentence_embedding"]
            found = torch.cat([model(dict(part[0]))["sentence_embedding"] for part in split])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
