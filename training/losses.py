"""The losses that a recipe may name, made from sentence-transformers' classes. Another one gets a row in LOSSES.

    loss: {name: cached_mnrl, directions: [query_to_doc, doc_to_query], false_negatives: 0.1}
    matryoshka: [4096, 1024, 256]          # the same loss on the first 1024 and 256 numbers too

Without ``loss``, it is the contrastive loss of the published script, gradient-cached where a batch does not fit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from sentence_transformers.sentence_transformer import losses

from .guide import Before, GuidedRankingLoss, Other
from .recipes import Settings
from .sources import Source, check_names

#: Options that are not the user's to give.
_OURS = {"self", "model", "guide", "gather_across_devices", "similarity_fct", "show_progress_bar", "scale"}


@dataclass(frozen=True)
class Kind:
    """A loss by name.

    Attributes:
        stock: sentence-transformers' class.
        labelled: Whether each row needs a score.
        taught: Whether the scores are a teacher's.
        guided: Whether a guide tells false negatives.
        temperature: The option that the temperature becomes, and how; ``None`` if there is none.
    """

    stock: Callable[..., Any]
    labelled: bool = False
    taught: bool = False
    guided: bool = False
    temperature: str | None = "scale"

    @property
    def options(self) -> list[str]:
        """The names of what may stand beside the name."""
        own = [name for name in inspect.signature(self.stock).parameters if name not in _OURS]
        own += ["guide"] * (self.guided or self.stock in _RANKING)
        more = ["temperature"] * (self.temperature is not None and "temperature" not in own)
        return own + more + ["false_negatives"] * (self.stock in _RANKING)


_RANKING = (losses.MultipleNegativesRankingLoss, losses.CachedMultipleNegativesRankingLoss)
LOSSES = {
    "mnrl": Kind(losses.MultipleNegativesRankingLoss),
    "cached_mnrl": Kind(losses.CachedMultipleNegativesRankingLoss),
    "gist": Kind(losses.GISTEmbedLoss, guided=True, temperature="temperature"),
    "cached_gist": Kind(losses.CachedGISTEmbedLoss, guided=True, temperature="temperature"),
    "cosent": Kind(losses.CoSENTLoss, labelled=True),
    "mse": Kind(losses.CosineSimilarityLoss, labelled=True, temperature=None),
    "distill": Kind(losses.DistillKLDivLoss, taught=True, temperature="temperature"),
    "distill_mse": Kind(losses.CosineSimilarityLoss, taught=True, temperature=None),
}


def kind_of(loss: Mapping[str, Any], where: str) -> Kind:
    """Returns the row of a recipe's ``loss``.

    Raises:
        ValueError: If there is no such loss, or it has no such option.

    Example:
        >>> kind_of({"name": "cosent"}, "loss").labelled
        True
    """
    if not loss:
        return LOSSES["mnrl"]
    name = loss.get("name")
    if name not in LOSSES:
        raise ValueError(f"{where}: got the name {name!r}, want one of {', '.join(LOSSES)}")
    check_names({key: None for key in loss if key != "name"}, LOSSES[name].options, f"{where} {name}")
    return LOSSES[name]


def make_losses(
    model: Any, settings: Settings, sources: Mapping[str, Source], batch_size: int, world_size: int
) -> dict[str, Any]:
    """Returns the loss of each source.

    Args:
        model: As ``load_for_training`` returns it.
        settings: ``loss``, ``matryoshka``, ``temperature`` and ``mini_batch_size`` are used.
        sources: By their names.
        batch_size: Rows of one process.
        world_size: Number of processes.

    Raises:
        ValueError: If a loss, an option or a number of dimensions is not right.
    """
    before = cache(partial(Before, model))
    return {
        name: make_loss(model, settings, batch_size, world_size, loss=source.loss, before=before)
        for name, source in sources.items()
    }


def make_loss(
    model: Any,
    settings: Settings,
    batch_size: int,
    world_size: int,
    *,
    loss: Mapping[str, Any] | None = None,
    before: Callable[[], Before] | None = None,
) -> Any:
    """Returns a loss over the rows of all processes.

    Unless another is named, each anchor is scored against every positive and every hard negative of the step. With four
    rows, for anchor 1:

        positives       0  [1]  2  3       1 is right, at scale 1 / temperature
        hard negatives  0   1   2  3       all wrong, its own too

    It is the loss of ft_llm.py, apart from the gradient, which that script divides by the number of processes.

    Args:
        model: As ``load_for_training`` returns it.
        settings: ``loss``, ``matryoshka``, ``temperature`` and ``mini_batch_size`` are used.
        batch_size: Rows of one process. More than ``mini_batch_size`` are gradient-cached, with the same gradient.
        world_size: Number of processes.
        loss: In place of that of ``settings``.
        before: Makes a copy of the trained weights for the losses whose guide is the model before training, which
            share it. Others need none.

    Raises:
        ValueError: If its name, an option or a number of dimensions is not right.
    """
    wanted = dict(loss or settings.loss)
    kind = kind_of(wanted, "loss")
    name = wanted.pop("name", "mnrl" if batch_size <= settings.mini_batch_size else "cached_mnrl")
    stock = LOSSES[name].stock
    known = inspect.signature(stock).parameters
    options: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in wanted.items()}
    above, named = options.pop("false_negatives", None), options.pop("guide", None)
    temperature = options.pop("temperature", None if kind.taught else settings.temperature)
    if kind.temperature is not None and temperature is not None:
        options[kind.temperature] = 1 / temperature if kind.temperature == "scale" else temperature
    if "mini_batch_size" in known:
        options.setdefault("mini_batch_size", settings.mini_batch_size)
    if "gather_across_devices" in known:
        options["gather_across_devices"] = world_size > 1
    if named is not None and above is None and not kind.guided:
        raise ValueError(f"loss {name}: got guide={named!r}, which false_negatives needs: give that too")
    if kind.guided or above is not None:
        options["guide"] = (before or partial(Before, model))() if named is None else open_guide(named, model)
    try:
        if above is not None:
            options.setdefault("mini_batch_size", settings.mini_batch_size)
            made: Any = GuidedRankingLoss(model, above=above, **options)
        else:
            made = stock(model, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"loss {name}: {error}") from error
    if settings.matryoshka:
        made = losses.MatryoshkaLoss(model, made, check_dimensions(model, settings.matryoshka))
    return made


def open_guide(name: str, model: Any) -> Other:
    """Loads another model as a guide; see ``guide.py``.

    Args:
        name: A directory or hub id, of a model or an adapter with its base's processor.
        model: What is trained.

    Raises:
        ValueError: If it cannot be loaded, or reads features otherwise.
    """
    import e5v_st

    dtype = next(model[0].parameters()).dtype
    return Other(e5v_st.load(name, device=str(model.device), model_kwargs={"dtype": dtype}), model)


def check_dimensions(model: Any, dimensions: Any) -> list[int]:
    """Returns ``matryoshka``, largest first; raises ValueError for what is no number of dimensions of the model."""
    own = model.get_embedding_dimension()
    if not all(isinstance(size, int) and not isinstance(size, bool) and 0 < size <= own for size in dimensions):
        raise ValueError(f"got matryoshka={list(dimensions)!r}, want numbers from 1 to {own}, the model's dimension")
    return sorted(set(dimensions), reverse=True)
