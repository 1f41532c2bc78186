"""Retrieval between images and captions: COCO and Flickr30K, with captions as texts and as cards.

The protocol is that of the published ``retrieval.py``. The first five captions of each image are used. A query counts
as answered if any of its right documents is among the first k (``hit_rate_at_k``); mteb's ``recall_at_k`` is something
else where there are several right answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData

from .captions_as_images import card_dataset
from .metadata import describe
from .recording import Recording, Relevant, Results, chance, examples, first_hits, projection
from .sources import REVISIONS, load_split

if TYPE_CHECKING:
    from datasets import Dataset

CAPTIONS_PER_IMAGE = 5


class E5VRetrieval(Recording, AbsTaskRetrieval):
    """A retrieval task that makes its subsets itself and keeps details of the results."""

    k_values: Sequence[int] = (1, 5, 10)
    #: Whether queries and documents are of two kinds, and the gap between the kinds is worth a plot.
    cross_modal: ClassVar[bool] = False
    #: Documents that a query cannot find.
    masked: ClassVar[int] = 0

    def load_data(self, **_: Any) -> None:
        """Loads every subset; see :meth:`load_subset`."""
        if self.data_loaded:
            return
        self.dataset = {
            subset: {split: self.load_subset(subset, split) for split in self.eval_splits} for subset in self.hf_subsets
        }
        self.data_loaded = True

    def load_subset(self, subset: str, split: str) -> RetrievalSplitData:
        """Returns corpus, queries and right answers of one subset."""
        raise NotImplementedError

    def task_specific_scores(
        self,
        scores: dict[str, dict[str, float]],
        qrels: Relevant,
        results: Results,
        hf_split: str,
        hf_subset: str,
    ) -> dict[str, Any]:
        """Adds chance level and details; see ``AbsTaskRetrieval``."""
        documents = len(self.dataset[hf_subset][hf_split]["corpus"]) - self.masked
        details: dict[str, Any] = {"examples": examples(qrels, results), "first_hits": first_hits(qrels, results)}
        if self.cross_modal and self.recorder is not None:
            details["projection"] = projection(self.recorder.of("query"), self.recorder.of("document"))
        return {**chance(qrels, documents, self.k_values), "details": details}


class _Captions(E5VRetrieval):
    """One image, up to five captions."""

    def _images(self, split: str) -> Dataset:
        return load_split(self.metadata.dataset["path"], split, ("image", "text"))

    def load_subset(self, subset: str, split: str) -> RetrievalSplitData:
        data = self._images(split)
        captions = [own[:CAPTIONS_PER_IMAGE] for own in data["text"]]
        ids = [f"{image}-{n}" for image, own in enumerate(captions) for n in range(len(own))]
        texts = self._as_documents(ids, [text for own in captions for text in own])
        images = data.select_columns(["image"]).add_column("id", [str(row) for row in range(len(data))])
        by_text = {name: {name.split("-")[0]: 1} for name in ids}
        if self._finds_images(subset):
            return RetrievalSplitData(corpus=images, queries=texts, relevant_docs=by_text, top_ranked=None)
        by_image = {
            str(image): {f"{image}-{n}": 1 for n in range(len(own))} for image, own in enumerate(captions) if own
        }
        return RetrievalSplitData(corpus=texts, queries=images, relevant_docs=by_image, top_ranked=None)

    def _as_documents(self, ids: list[str], texts: list[str]) -> Dataset:
        from datasets import Dataset

        return Dataset.from_dict({"id": ids, "text": texts})

    def _finds_images(self, subset: str) -> bool:
        return self.metadata.category == "t2i"


class _Cards(_Captions):
    """Captions as cards, in both directions."""

    def _as_documents(self, ids: list[str], texts: list[str]) -> Dataset:
        return card_dataset(ids, texts)

    def _finds_images(self, subset: str) -> bool:
        return subset == "t2i"


_COMMON: dict[str, Any] = {
    "type": "Any2AnyRetrieval",
    "eval_splits": ["test"],
    "main_score": "hit_rate_at_1",
}
_SOURCES = {
    "Flickr30k": ("Flickr30k{}Retrieval", "royokong/flickr30k_test"),
    "COCO": ("MSCOCO{}Retrieval", "royokong/coco_test"),
}
_DIRECTIONS = {
    "T2I": ("t2i", ["text", "image"], "find the image of a caption"),
    "I2T": ("i2t", ["image", "text"], "find a caption of an image"),
    "I2I": ("i2i", ["image"], "captions are drawn as cards, and found by (t2i) or find (i2t) images"),
}


def _make_task(data: str, direction: str) -> type[E5VRetrieval]:
    like, repo = _SOURCES[data]
    category, modalities, deed = _DIRECTIONS[direction]
    name = f"E5V{data}{direction}Retrieval"
    cards = direction == "I2I"
    metadata = describe(
        name,
        like.format("T2I" if cards else direction),
        f"{data} as in the E5-V paper: {deed}; five captions an image, a hit counts once.",
        repo,
        REVISIONS[repo],
        category=category,
        modalities=modalities,
        eval_langs={way: ["eng-Latn"] for way in ("t2i", "i2t")} if cards else ["eng-Latn"],
        **({"prompt": None} if cards else {}),
        **_COMMON,
    )
    fields = {"metadata": metadata, "cross_modal": not cards, "__doc__": metadata.description, "__module__": __name__}
    return type(name, (_Cards if cards else _Captions,), fields)


TASKS = [_make_task(data, direction) for direction in _DIRECTIONS for data in _SOURCES]
