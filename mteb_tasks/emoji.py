"""The small benchmark, E5V(tiny): emoji and their names, offline; ``data/README.md`` says what is held out.

In the subset ``combination``, a concept was seen in training, but never with this skin tone or gender. In ``concept``,
it was never seen at all. The style of cards is scaled to the small model's tile.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.sts import AbsTaskSTS

from .captions_as_images import card_dataset
from .cir import MaskedRetrieval, hit_rates
from .metadata import E5VTaskMetadata
from .recording import Recording, Relevant, Results
from .retrieval import E5VRetrieval

if TYPE_CHECKING:
    from datasets import Dataset

DATA = Path(__file__).parent / "data"
CARD_STYLE = {"size": (120, 60), "font_size": 14, "margin": 3}
SUBSETS = ("combination", "concept")


def _describe(name: str, kind: str, category: str, modalities: list[str], description: str, **more: Any) -> Any:
    retrieval = kind != "STS"
    fields = {
        "name": name,
        "description": description,
        "dataset": {"path": "e5v/emoji", "revision": "1"},
        "type": kind,
        "category": category,
        "modalities": modalities,
        "reference": "https://github.com/googlefonts/noto-emoji",
        "eval_splits": ["test"],
        "eval_langs": {subset: ["eng-Latn"] for subset in SUBSETS} if retrieval else ["eng-Latn"],
        "main_score": "hit_rate_at_1" if retrieval else "cosine_spearman",
        "date": ("2023-09-01", "2023-12-31"),
        "domains": ["Web", "Written"],
        "task_subtypes": ["Image Text Retrieval"] if retrieval else [],
        "license": "https://openfontlicense.org",
        "annotations_creators": "derived",
        "dialect": [],
        "sample_creation": "found",
        "bibtex_citation": "",
    }
    return E5VTaskMetadata(**{**fields, **more})


@lru_cache
def _read(name: str) -> Dataset:
    """Reads one of the data files; images are decoded when they are asked for."""
    import pyarrow.parquet as pq
    from datasets import Dataset, Image

    data = Dataset(pq.read_table(DATA / f"{name}.parquet").replace_schema_metadata(None))
    return data.cast_column("image", Image()) if "image" in data.column_names else data


def _gallery(split: str) -> Dataset:
    data = _read("emoji")
    rows = zip(data["split"], data["gallery"], strict=True)
    return data.select([row for row, (own, shown) in enumerate(rows) if own == split and shown])


def _one_to_one(queries: Dataset, corpus: Dataset) -> RetrievalSplitData:
    relevant = {name: {name: 1} for name in queries["id"]}
    return RetrievalSplitData(corpus=corpus, queries=queries, relevant_docs=relevant, top_ranked=None)


class E5VEmojiT2IRetrieval(E5VRetrieval):
    """Finds the image of a name."""

    cross_modal = True
    metadata = _describe(
        "E5VEmojiT2IRetrieval",
        "Any2AnyRetrieval",
        "t2i",
        ["text", "image"],
        "Find the emoji image of a name; held-out combinations and held-out concepts.",
    )

    def load_subset(self, subset: str, split: str) -> RetrievalSplitData:
        """See the parent."""
        data = _gallery(subset)
        names = data.select_columns(["id", "name"]).rename_column("name", "text")
        return _one_to_one(names, data.select_columns(["id", "image"]))


class E5VEmojiI2TRetrieval(E5VRetrieval):
    """Finds the name of an image."""

    cross_modal = True
    metadata = _describe(
        "E5VEmojiI2TRetrieval",
        "Any2AnyRetrieval",
        "i2t",
        ["image", "text"],
        "Find the name of an emoji image; held-out combinations and held-out concepts.",
    )

    def load_subset(self, subset: str, split: str) -> RetrievalSplitData:
        """See the parent."""
        data = _gallery(subset)
        names = data.select_columns(["id", "name"]).rename_column("name", "text")
        return _one_to_one(data.select_columns(["id", "image"]), names)


class E5VEmojiI2IRetrieval(E5VRetrieval):
    """Finds the image of a name that is drawn on a card, and the card of an image."""

    metadata = _describe(
        "E5VEmojiI2IRetrieval",
        "Any2AnyRetrieval",
        "i2i",
        ["image"],
        "Names are drawn as cards, and find (t2i) or are found by (i2t) emoji images.",
        eval_langs={f"{subset}-{way}": ["eng-Latn"] for subset in SUBSETS for way in ("t2i", "i2t")},
    )

    def load_subset(self, subset: str, split: str) -> RetrievalSplitData:
        """See the parent."""
        part, way = subset.split("-")
        data = _gallery(part)
        cards = card_dataset(list(data["id"]), list(data["name"]), **CARD_STYLE)
        images = data.select_columns(["id", "image"])
        return _one_to_one(cards, images) if way == "t2i" else _one_to_one(images, cards)


class E5VEmojiComposedRetrieval(MaskedRetrieval):
    """Finds an image from another image and a modification text.

    The gallery holds the families of all targets. Further scores are those among the target's family
    (``family_hit_rate``), and what the reference image finds without any words (``reference_only``).
    """

    metadata = _describe(
        "E5VEmojiComposedRetrieval",
        "Any2AnyRetrieval",
        "it2i",
        ["image", "text"],
        "Find an emoji image from a relative of it and a change of skin tone or gender in words; reference masked.",
    )

    def load_subset(self, subset: str, split: str) -> RetrievalSplitData:
        """See the parent."""
        images, triplets = _read("emoji"), _read("composed")
        triplets = triplets.select([row for row, own in enumerate(triplets["split"]) if own == subset])
        row = {name: i for i, name in enumerate(images["id"])}
        families = dict(zip(images["id"], images["family"], strict=True))
        targets, references = list(triplets["target"]), list(triplets["reference"])
        shown = sorted({name for target in targets for name in families[target]} | set(references), key=row.get)

        queries = images.select([row[name] for name in references]).select_columns(["image"])
        names = [str(i) for i in range(len(targets))]
        columns = {"id": names, "text": list(triplets["text"]), "reference": references}
        columns["family"] = ["\n".join(families[target]) for target in targets]
        for column, values in columns.items():
            queries = queries.add_column(column, values)
        corpus = images.select([row[name] for name in shown]).select_columns(["id", "image"])
        relevant = {name: {target: 1} for name, target in zip(names, targets, strict=True)}
        return RetrievalSplitData(corpus=corpus, queries=queries, relevant_docs=relevant, top_ranked=None)

    def task_specific_scores(
        self, scores: Any, qrels: Relevant, results: Results, hf_split: str, hf_subset: str
    ) -> dict[str, Any]:
        """Adds the scores within the family and those of the reference alone; see the parent."""
        common = super().task_specific_scores(scores, qrels, results, hf_split, hf_subset)
        if self.recorder is None:
            return common
        data_split = self.dataset[hf_subset][hf_split]
        queries = data_split["queries"]
        families = {name: own.split("\n") for name, own in zip(queries["id"], queries["family"], strict=True)}
        common |= hit_rates(qrels, self.rank_candidates(data_split, families), (1,), "family_hit_rate")

        everything = list(data_split["corpus"]["id"])
        alone = self._rank_by_reference(data_split, dict.fromkeys(families, everything))
        common |= hit_rates(qrels, alone, self.k_values, "reference_only_hit_rate")
        alone = self._rank_by_reference(data_split, families)
        return {**common, **hit_rates(qrels, alone, (1,), "reference_only_family_hit_rate")}

    def _rank_by_reference(self, data_split: RetrievalSplitData, candidates: dict[str, list[str]]) -> Results:
        """Scores candidates by their likeness to the reference's own image in the gallery."""
        row = {name: i for i, name in enumerate(data_split["corpus"]["id"])}
        documents = self.recorder.of("document")
        similarity = self.recorder.similarity(documents, documents).tolist()
        references = dict(zip(data_split["queries"]["id"], data_split["queries"]["reference"], strict=True))
        return {
            name: {other: similarity[row[references[name]]][row[other]] for other in own if other != references[name]}
            for name, own in candidates.items()
        }


class E5VEmojiSTS(Recording, AbsTaskSTS):
    """Scores pairs of names, keywords and glosses: the same thing, related, not."""

    min_score = 0
    max_score = 2
    metadata = _describe(
        "E5VEmojiSTS",
        "STS",
        "t2t",
        ["text"],
        "Graded pairs of emoji names, keyword lists, words and glosses (CLDR, WordNet); none was trained on.",
    )

    def load_data(self, **_: Any) -> None:
        """Reads the pairs."""
        data = _read("graded_pairs")
        self.dataset = {"test": data.select([row for row, own in enumerate(data["split"]) if own == "test"])}
        self.data_loaded = True


TASKS = [
    E5VEmojiT2IRetrieval,
    E5VEmojiI2TRetrieval,
    E5VEmojiI2IRetrieval,
    E5VEmojiComposedRetrieval,
    E5VEmojiSTS,
]
