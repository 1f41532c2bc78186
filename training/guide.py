"""False negatives: pairs that a batch would push apart, although a guide finds them as near as a right pair.

The guide is the model as it was before training, or another one that reads the same features: images and texts alike,
where sentence-transformers' own guided losses take texts alone to another model. Of the model itself, few weights are
trained: the guide is a copy of these, which takes the place of the trained ones while it looks at a batch:

    guide's similarity      document 0   1     2          false_negatives: 0.1
    query 0                 [0.70]      0.30  0.85        0.85 > 0.70 + 0.1: document 2 is left out for query 0
    query 1                  0.20      [0.60] 0.65        0.65 < 0.60 + 0.1: it stays for query 1

The limit of 0.1 above the positive is UniME's (arXiv 2504.17432), where the model itself is the guide.
``GISTEmbedLoss`` counts the other way, as a margin below the positive.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.util import cos_sim
from torch.nn.functional import normalize

#: What a row of embeddings carries behind those of model and guide: role, number of its pair, and limit.
_FACTS = 3
_QUERY, _POSITIVE, _NEGATIVE = 0, 1, 2


class Before:
    """A model as it is now, for when its trained weights will have changed.

    It can be given to sentence-transformers' losses as a guide.

    Args:
        model: The model, with the weights that will be trained.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._weights = [(weight, weight.detach().clone()) for weight in model.parameters() if weight.requires_grad]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @contextmanager
    def in_place_of(self, loss: Any) -> Iterator[None]:
        """Has the model of a loss embed as it did before, for as long as the context lasts."""
        with self.restored():
            yield

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Puts the weights of before into the model, without dropout, for as long as the context lasts."""
        trained = [weight.data for weight, _ in self._weights]
        training = self._model.training
        try:
            for weight, before in self._weights:
                weight.data = before.to(weight.device)
            self._model.eval()
            yield
        finally:
            self._model.train(training)
            for (weight, _), data in zip(self._weights, trained, strict=True):
                weight.data = data

    def __call__(self, features: dict[str, Any]) -> Any:
        """Embeds a batch as the model did before."""
        with self.restored(), torch.no_grad():
            return self._model(features)


class Other(torch.nn.Module):
    """Another model as a guide, which reads the features that were made for the one that is trained.

    Args:
        guide: An E5-V of the same family and tokenizer, such as a larger one of it, or one with another adapter.
        model: The one that is trained.

    Raises:
        ValueError: If it would read the features otherwise.
    """

    def __init__(self, guide: Any, model: Any) -> None:
        super().__init__()
        rows = [each[0].backbone.name for each in (guide, model)]
        tokens = [each.tokenizer.get_vocab() for each in (guide, model)]
        if rows[0] != rows[1] or tokens[0] != tokens[1]:
            raise ValueError(
                f"the guide is a {rows[0]}, and what is trained a {rows[1]}, or their tokenizers differ: a guide reads "
                "the same features. Another model can be a teacher, see docs/second-stage.md"
            )
        self.guide = guide.eval().requires_grad_(False)
        self.tokenizer, self.max_seq_length = guide.tokenizer, model.max_seq_length

    def __getitem__(self, place: int) -> Any:
        return self.guide[place]

    @contextmanager
    def in_place_of(self, loss: Any) -> Iterator[None]:
        """Has the guide embed what a loss asks its model to."""
        model = loss.model
        try:
            loss.model = self
            yield
        finally:
            loss.model = model

    @torch.no_grad()
    def forward(self, features: dict[str, Any]) -> Any:
        """Embeds a batch, which stays as it is."""
        return self.guide(dict(features))


class GuidedRankingLoss(CachedMultipleNegativesRankingLoss):
    """``CachedMultipleNegativesRankingLoss`` that leaves out what its guide takes for false negatives.

    A query and a document, or two queries, are left out where the guide finds them nearer than the query and its own
    positive, by more than ``above``; two documents, where it finds them nearer than the pair of the one that is
    compared. A query's own positive always stays. With ``directions=("query_to_doc",)`` it is ``GISTEmbedLoss`` without
    its contrasts, and with its ``margin=-above``.

    Args:
        model: The model.
        guide: What finds false negatives.
        above: The lower, the more is left out; may be negative.
        **kwargs: See the parent.
    """

    def __init__(self, model: Any, guide: Before | Other, above: float, **kwargs: Any) -> None:
        super().__init__(model, similarity_fct=self._similarity, **kwargs)
        self._guide, self._above = (guide,), above  # not as a module, whose weights would be moved and saved
        self._known: list[torch.Tensor] = []

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Any) -> torch.Tensor:
        """Returns the loss of a batch; see the parent."""
        columns = list(sentence_features)
        with self._guide[0].in_place_of(self):
            embedded = (self.embed_minibatch_iter(each, with_grad=False, copy_random_state=False) for each in columns)
            found = [[reps for reps, _ in column] for column in embedded]
        self._known = [normalize(torch.cat(each).float(), dim=1) for each in found]
        return super().forward(columns, labels)

    def calculate_loss(
        self, reps: list[list[torch.Tensor]], labels: torch.Tensor | None = None, *, with_backward: bool = False
    ) -> torch.Tensor:
        """Returns the loss of embeddings; see the parent."""
        from sentence_transformers.util.distributed import get_rank

        rows = len(self._known[0])
        limits = (self._known[0] * self._known[1]).sum(1) + self._above
        numbers = torch.arange(rows, device=limits.device) + (rows * get_rank() if self.gather_across_devices else 0)
        columns = []
        for column, (own, known) in enumerate(zip(reps, self._known, strict=True)):
            roles = torch.full_like(limits, min(column, _NEGATIVE))
            facts = torch.stack([roles, numbers.to(limits), limits], dim=1)
            columns.append([torch.cat([torch.cat(own), known, facts], dim=1)])
        return super().calculate_loss(columns, labels, with_backward=with_backward)

    def _similarity(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Similarities ``(n, m)`` of embeddings with the guide's and facts behind them; of what is left out, -inf."""
        behind = self._known[0].shape[1] + _FACTS
        found = cos_sim(one[:, :-behind], other[:, :-behind])
        known = one[:, -behind:-_FACTS] @ other[:, -behind:-_FACTS].T
        (role, number, limit), (other_role, other_number, other_limit) = (
            each[:, -_FACTS:].unbind(1) for each in (one, other)
        )
        limits = torch.where(role[:, None] == _QUERY, limit[:, None], other_limit[None])
        pair = (number[:, None] == other_number[None]) & (role[:, None] + other_role[None] == _QUERY + _POSITIVE)
        return found.masked_fill((known > limits) & ~pair, -torch.inf)
