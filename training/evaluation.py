"""What is measured before, during and after training, as scores by which the best checkpoint is kept.

Graded pairs, held-out triplets, text to image, composed queries, and retrieval on a table of one's own
(``retrieval_table.py``). Wherever an image may stand, so may a text, or both.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
    SentenceEvaluator,
    TripletEvaluator,
)

from e5v_st.model.items_e5v import read_item
from e5v_st.tables import read_number

from .collate import read_cell
from .examples import read_split
from .retrieval_table import read_retrieval

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer

logger = logging.getLogger(__name__)

#: Names that the column with an image's caption may have.
CAPTIONS = ("text", "caption", "name", "sentence")
#: How the names of the evaluators' scores begin.
KEPT = ("sts_", "triplets_", "t2i_", "composed_", "retrieval_cosine_ndcg@", "retrieval_cosine_recall@")

#: Ranks up to which a right image counts.
RANKS = (1, 5)


class _OfItems:
    """Makes an evaluator of sentence-transformers take every string as a text, and refuse what is not finite.

    A bare string that names an image would be embedded as that image. And with embeddings that are NaN, the scores are
    those of a poor model, or of a perfect one.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics: dict[str, float] = super().__call__(*args, **kwargs)
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise ValueError(f"{name} is {value}: the model gives all pairs the same similarity")
        return metrics

    def embed_inputs(self, model: SentenceTransformer, sentences: Sequence[Any], **kwargs: Any) -> Any:
        return _check_finite(super().embed_inputs(model, [read_cell(cell) for cell in sentences], **kwargs))


class GradedPairsEvaluator(_OfItems, EmbeddingSimilarityEvaluator):
    """``EmbeddingSimilarityEvaluator`` for texts."""


class ItemTripletsEvaluator(_OfItems, TripletEvaluator):
    """``TripletEvaluator`` for items."""


class RetrievalEvaluator(_OfItems, InformationRetrievalEvaluator):  # type: ignore[misc]
    """``InformationRetrievalEvaluator`` for items."""


class ImageRecallEvaluator(SentenceEvaluator):
    """Finds each query's image among all distinct images: recall at 1 and 5.

    Images with the same pixels are one image, which several queries may look for. Each query has one right image. Other
    images that score as high as that one rank before it.

    Args:
        queries: Items.
        images: The right one of each query: PIL images, paths, or ``{"bytes"}``.
        hidden: Of each query, an image that stands among the others and is not counted, as the one that a composed
            query changes.
        name: What the names of the scores begin with.
        batch_size: Number of items that ``encode`` embeds at a time.

    Raises:
        ValueError: If an image cannot be read; the message names its index.
    """

    def __init__(
        self,
        queries: Sequence[Any],
        images: Sequence[Any],
        hidden: Sequence[Any] = (),
        name: str = "t2i",
        batch_size: int = 32,
    ) -> None:
        super().__init__()
        self.queries, self.batch_size, self.kind = list(queries), batch_size, name
        self.images: list[Any] = []
        places: list[int] = []
        found: dict[Any, int] = {}
        for index, image in enumerate([*images, *hidden]):
            try:
                key = read_item({"image": image}).image_keys
            except ValueError as error:
                raise ValueError(f"image {index}: {error}") from error
            if key not in found:
                found[key] = len(self.images)
                self.images.append(image)
            places.append(found[key])
        self.right, self.hidden = places[: len(queries)], places[len(queries) :]
        self.primary_metric = f"{name}_recall@1"

    def __call__(
        self, model: SentenceTransformer, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """Returns ``t2i_recall@1`` and the like, from 0 to 1."""
        encode = {"batch_size": self.batch_size, "convert_to_tensor": True, "show_progress_bar": False}
        texts = _check_finite(model.encode(self.queries, **encode))
        images = _check_finite(model.encode([{"image": image} for image in self.images], **encode))
        scores = torch.nn.functional.normalize(texts, dim=1) @ torch.nn.functional.normalize(images, dim=1).T
        if self.hidden:
            scores[torch.arange(len(scores)), self.hidden] = -torch.inf
        right = torch.tensor(self.right, device=scores.device).unsqueeze(1)
        rank = (scores >= scores.gather(1, right)).sum(1)
        return {f"{self.kind}_recall@{k}": (rank <= k).float().mean().item() for k in RANKS}


class TextToImageEvaluator(ImageRecallEvaluator):
    """Finds each caption's image among all distinct images; see the parent.

    Args:
        captions: Texts.
        images: One for each caption.
        batch_size: Number of items that ``encode`` embeds at a time.
    """

    def __init__(self, captions: Sequence[str], images: Sequence[Any], batch_size: int = 32) -> None:
        super().__init__([{"text": caption} for caption in captions], images, batch_size=batch_size)


def _check_finite(embeddings: Any) -> Any:
    finite = torch.as_tensor(embeddings).isfinite().all(1)
    if not finite.all():
        raise ValueError(
            f"{(~finite).sum()} of {len(finite)} embeddings are not finite. Either the training has diverged: lower "
            "the learning rate. Or the model overflows in this precision: use bf16 or 32 bits"
        )
    return embeddings


def make_evaluators(
    sts: str | None = None,
    triplets: Dataset | None = None,
    images: str | None = None,
    split: str = "validation",
    *,
    composed: str | None = None,
    retrieval: str | None = None,
) -> list[SentenceEvaluator]:
    """Returns the evaluators that there is data for.

    Args:
        sts: A file or hub id with the columns ``sentence1``, ``sentence2``, ``score`` (``sentence-transformers/stsb``).
        triplets: Held-out triplets.
        images: A file or hub id with the columns ``image`` (paths are relative to the file's folder) and one of
            :data:`CAPTIONS`.
        split: Which rows of ``sts``, ``images`` and ``composed`` are read.
        composed: A file or hub id with the columns ``reference`` (an image), ``text`` (a change) and ``target`` (an
            image).
        retrieval: A folder with three tables, see ``retrieval_table.py``.

    Raises:
        ValueError: If columns or rows are missing, held-out rows are pairs, scores do not differ, or a cell does not
            hold what it should; the message names its line.
    """
    evaluators: list[SentenceEvaluator] = []
    if sts:
        rows = _rows(sts, split, ("sentence1", "sentence2", "score"))
        columns = [[_text(row, name, where) for where, row in rows] for name in ("sentence1", "sentence2")]
        scores = [read_number(row["score"], f"{where}, column 'score'") for where, row in rows]
        if len(set(scores)) < 2:
            raise ValueError(
                f"{sts}: the score of all {len(rows)} rows of the split {split!r} is {scores[0]:g}, want at least two "
                "different scores: without a difference there is no correlation"
            )
        evaluators.append(GradedPairsEvaluator(*columns, scores, name="sts", similarity_fn_names=["cosine"]))
    if triplets is not None:
        if "negative" not in triplets.column_names:
            raise ValueError(
                "the held-out rows are pairs, want triplets, with a column 'negative' that scores are compared with: "
                "leave out --eval_data and --eval_rows, or use --eval_sts"
            )
        columns = [triplets[name][:] for name in ("anchor", "positive", "negative")]
        evaluators.append(ItemTripletsEvaluator(*columns, name="triplets", similarity_fn_names=["cosine"]))
    if images:
        rows = _rows(images, split, ("image",))
        names = list(rows[0][1])
        caption = next((name for name in CAPTIONS if name in names), None)
        if caption is None:
            raise ValueError(f"{images} has the columns {', '.join(names)}, want one of {', '.join(CAPTIONS)}")
        texts = [_text(row, caption, where) for where, row in rows]
        evaluators.append(TextToImageEvaluator(texts, [_image(row, where) for where, row in rows]))
    if composed:
        rows = _rows(composed, split, ("reference", "text", "target"))
        references, targets = ([_image(row, where, name) for where, row in rows] for name in ("reference", "target"))
        changes = [_text(row, "text", where) for where, row in rows]
        queries = [{"image": image, "text": text} for image, text in zip(references, changes, strict=True)]
        evaluators.append(ImageRecallEvaluator(queries, targets, references, name="composed"))
    if retrieval:
        evaluators.append(RetrievalEvaluator(*read_retrieval(Path(retrieval)), name="retrieval"))
    return evaluators


def measure(trainer: SentenceTransformerTrainer) -> dict[str, float]:
    """Returns the evaluators' scores, which every process computes for itself.

    It does not use ``trainer.evaluate``, for two reasons. Before training, that has accelerate prepare the model for
    evaluation alone; the model then counts as prepared, and several processes would train without averaging their
    gradients. And ``EarlyStoppingCallback`` takes every such evaluation for one of those during training.
    """
    folder = Path(trainer.args.output_dir) / "eval"
    if trainer.is_world_process_zero():
        folder.mkdir(exist_ok=True)
    with trainer.accelerator.autocast():  # as during training
        metrics = trainer.evaluator(
            trainer.model,
            output_path=str(folder) if trainer.is_world_process_zero() else None,
            epoch=trainer.state.epoch or 0,
            steps=trainer.state.global_step,
        )
    return {name: value for name, value in metrics.items() if name.startswith(KEPT)}


def _text(row: dict[str, Any], name: str, where: str) -> str:
    """The text of a cell; the first where there are several."""
    value = row[name][0] if isinstance(row[name], list) and row[name] else row[name]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}, column {name!r}: got {value!r}, want a text")
    return value


def _image(row: dict[str, Any], where: str, name: str = "image") -> Any:
    if row[name] is None:
        raise ValueError(f"{where}, column {name!r}: got None, want an image")
    return row[name]


def _rows(source: str, split: str, wanted: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    rows = read_split(source, split)
    if not rows:
        raise ValueError(f"{source} has no rows of the split {split!r}")
    names = list(rows[0][1])
    missing = [name for name in wanted if name not in names]
    if missing:
        raise ValueError(f"{source} lacks the column {', '.join(missing)}; it has {', '.join(names)}")
    logger.info("evaluation on %s: %d rows", source, len(rows))
    return rows
