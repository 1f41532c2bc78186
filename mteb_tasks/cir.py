"""Composed image retrieval: FashionIQ and CIRR. A query is a reference image and what should be different about it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.models import SearchProtocol
from mteb.models.search_wrappers import SearchEncoderWrapper

from e5v_st.files import write_atomically
from e5v_st.processes import rank

from .metadata import describe
from .recording import Recorder, Relevant, Results, best
from .retrieval import E5VRetrieval
from .sources import REVISIONS, load_split

if TYPE_CHECKING:
    from datasets import Dataset

#: What the server of CIRR's hidden test part takes.
SUBMISSION_BYTES = 5 * 10**6
SUBMITTED = {"recall": 50, "recall_subset": 3}


def clean_captions(captions: Sequence[str]) -> list[str]:
    """Strips what the published ``retrieval.py`` strips from FashionIQ's captions."""
    return [caption.strip(".?, ") for caption in captions]


class ReferenceMask:
    """A search that never returns the reference image of a query.

    Args:
        inner: The search that does the work.
        references: The id of each query's reference.
    """

    def __init__(self, inner: SearchProtocol, references: Mapping[str, str]) -> None:
        self.inner = inner
        self.index = inner.index
        self.mteb_model_meta = inner.mteb_model_meta
        self.references = references

    def search(self, queries: Dataset, *, top_k: int, **kwargs: Any) -> dict[str, dict[str, float]]:
        """See ``mteb.SearchProtocol``."""
        results = self.inner.search(queries, top_k=top_k + 1, **kwargs)
        for query, scores in results.items():
            scores.pop(self.references[query], None)
            results[query] = {name: scores[name] for name in best(scores, top_k)}
        return results


class MaskedRetrieval(E5VRetrieval):
    """Retrieval in which the column ``reference`` of the queries names a document that does not count."""

    _support_cross_encoder = False
    masked = 1

    def _search_model(self, model: Any, data_split: RetrievalSplitData) -> ReferenceMask:
        queries = data_split["queries"]
        references = dict(zip(queries["id"], queries["reference"], strict=True))
        return ReferenceMask(model if isinstance(model, SearchProtocol) else SearchEncoderWrapper(model), references)

    def rank_candidates(self, data_split: RetrievalSplitData, candidates: Mapping[str, Sequence[str]]) -> Results:
        """Scores few candidates of each query, whatever place they have among all documents.

        Args:
            data_split: The subset that was just evaluated.
            candidates: For each query the ids of documents; its reference is left out.
        """
        if self.recorder is None:
            return {}
        row = {name: i for i, name in enumerate(data_split["corpus"]["id"])}
        queries = data_split["queries"]
        scored = {}
        for i, (name, reference) in enumerate(zip(queries["id"], queries["reference"], strict=True)):
            own = [other for other in candidates[name] if other in row and other != reference]
            documents = self.recorder.of("document")[[row[other] for other in own]]
            similarity = self.recorder.similarity(self.recorder.of("query")[i : i + 1], documents)
            scored[name] = dict(zip(own, np.asarray(similarity)[0].tolist(), strict=True))
        return scored


def hit_rates(relevant: Relevant, results: Results, k_values: Sequence[int], name: str) -> dict[str, float]:
    """Returns, for each k, the part of queries with a right document among the first k, as ``<name>_at_<k>``."""
    tops = {query: best(scores, max(k_values)) for query, scores in results.items()}
    return {
        f"{name}_at_{k}": float(np.mean([bool(set(top[:k]) & set(relevant[query])) for query, top in tops.items()]))
        for k in k_values
        if tops
    }


class E5VFashionIQRetrieval(E5VRetrieval):
    """FashionIQ's validation part: each category against its own gallery.

    The column ``captions`` holds the captions as they were written, one a line, for models that read them in several
    orders; ``text`` joins them in the given order.
    """

    k_values = (1, 10, 50)
    metadata = describe(
        "E5VFashionIQRetrieval",
        "FashionIQIT2IRetrieval",
        "FashionIQ as in the E5-V paper: the validation part, each category against its own gallery.",
        "royokong/fashioniq_val",
        REVISIONS["royokong/fashioniq_val"],
        eval_splits=["val"],
        eval_langs={category: ["eng-Latn"] for category in ("dress", "shirt", "toptee")},
        main_score="hit_rate_at_10",
    )

    def load_subset(self, subset: str, split: str) -> RetrievalSplitData:
        """See the parent."""
        columns = ("candidate", "caption", "target_id", "category")
        asked = _of_category(load_split(self.metadata.dataset["path"], split, columns), subset)
        shown = _of_category(load_split("royokong/fashioniq_val_imgs", split, ("id", "img", "category")), subset)
        captions = asked["caption"]
        queries = _queries(
            asked,
            text=[", ".join(clean_captions(own)) for own in captions],
            captions=["\n".join(own) for own in captions],
        )
        return _split_data(queries, _gallery(shown), asked["target_id"])


class E5VCIRRRetrieval(MaskedRetrieval):
    """CIRR's validation part, the reference masked; within the subset where the data tell its members."""

    k_values = (1, 5, 10, 50)
    metadata = describe(
        "E5VCIRRRetrieval",
        "CIRRIT2IRetrieval",
        "CIRR as in the E5-V paper: the validation part, the reference image masked.",
        "royokong/cirr_val",
        REVISIONS["royokong/cirr_val"],
        eval_splits=["val"],
        main_score="hit_rate_at_1",
    )

    def load_subset(self, subset: str, split: str) -> RetrievalSplitData:
        """See the parent."""
        columns = ("candidate", "candidate_id", "caption", "target_id")
        return load_cirr(load_split(self.metadata.dataset["path"], split, columns), split)

    def task_specific_scores(
        self, scores: Any, qrels: Relevant, results: Results, hf_split: str, hf_subset: str
    ) -> dict[str, Any]:
        """Adds ``recall_subset_at_k``; see the parent."""
        common = super().task_specific_scores(scores, qrels, results, hf_split, hf_subset)
        data_split = self.dataset[hf_subset][hf_split]
        ranked = self.rank_candidates(data_split, _members(data_split)) if _members(data_split) else {}
        return {**common, **hit_rates(qrels, ranked, (1, 2, 3), "recall_subset")}


class E5VCIRRTest(MaskedRetrieval):
    """CIRR's hidden test part: writes the files that the test server scores; there is no score without it.

    They go to ``cirr_submissions/<model>/`` in the folder for predictions, or in :attr:`folder`.
    """

    folder: ClassVar[Path] = Path("results")
    k_values = (1, 5, 10, 50)
    metadata = describe(
        "E5VCIRRTest",
        "CIRRIT2IRetrieval",
        "CIRR as in the E5-V paper: the hidden test part. Writes two files for the test server; scores are NaN.",
        "royokong/cirr_test",
        REVISIONS["royokong/cirr_test"],
        eval_splits=["test"],
        main_score="hit_rate_at_1",
    )

    def load_subset(self, subset: str, split: str) -> RetrievalSplitData:
        """See the parent."""
        columns = ("candidate", "candidate_id", "caption", "pairid")
        return load_cirr(load_split(self.metadata.dataset["path"], split, columns), split)

    def _evaluate_subset(
        self,
        model: Any,
        data_split: RetrievalSplitData,
        *,
        prediction_folder: Path | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        self.recorder = Recorder(model)
        shared = {name: kwargs[name] for name in ("hf_split", "hf_subset", "encode_kwargs", "num_proc")}
        shared["task_metadata"] = self.metadata
        search = self._search_model(self.recorder, data_split)
        search.index(data_split["corpus"], **shared)
        results = search.search(data_split["queries"], top_k=max(SUBMITTED.values()), **shared)
        ranked = {"recall": results}
        if _members(data_split):
            ranked["recall_subset"] = self.rank_candidates(data_split, _members(data_split))
        else:
            warnings.warn(
                "the data do not say which images are in a query's subset, so no file for recall_subset is written: "
                "put CIRR's cap.rc2.test1.json into the folder that E5V_DATA names, in cirr/",
                stacklevel=2,
            )
        folder = Path(prediction_folder or self.folder, "cirr_submissions", model.mteb_model_meta.model_name_as_path())
        files = [str(write_submission(folder, metric, ranked[metric])) for metric in ranked]
        unknown = {f"hit_rate_at_{k}": float("nan") for k in self.k_values}
        details = {"submissions": files, "encoding": self.recorder.runs}
        self.recorder = None
        return {**unknown, "details": details}


def write_submission(folder: Path, metric: str, results: Results) -> Path:
    """Writes what CIRR's test server takes; rank 0 does, where there are several processes.

    Args:
        folder: Made where it does not exist.
        metric: ``"recall"`` (50 ids a query) or ``"recall_subset"`` (3 ids a query).
        results: Scores by query and document, the reference left out.

    Returns:
        The file.

    Raises:
        ValueError: If a query has too few documents, or the file is larger than the server takes.
    """
    count = SUBMITTED[metric]
    ranked = {query: best(scores, count) for query, scores in results.items()}
    short = [query for query, names in ranked.items() if len(names) < count]
    if short:
        raise ValueError(f"{metric}: {len(short)} queries have fewer than {count} documents, such as {short[0]}")
    content = json.dumps({"version": "rc2", "metric": metric, **ranked})
    if len(content.encode()) > SUBMISSION_BYTES:
        raise ValueError(f"{metric}: {len(content.encode())} bytes, but the server takes {SUBMISSION_BYTES}")
    path = folder / f"cirr_{metric}.json"
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    return path


def load_cirr(asked: Dataset, split: str) -> RetrievalSplitData:
    """Joins the queries of a part of CIRR with its gallery, and with the members of subsets where they are known."""
    shown = load_split("royokong/cirr_imgs", split, ("id", "img"))
    extra = {"text": asked["caption"], "reference": asked["candidate_id"]}
    members = subset_members(asked, split)
    if members:
        extra["members"] = ["\n".join(own) for own in members]
    ids = [str(pair) for pair in asked["pairid"]] if "pairid" in asked.column_names else None
    targets = asked["target_id"] if "target_id" in asked.column_names else None
    return _split_data(_queries(asked, ids, **extra), _gallery(shown), targets)


def subset_members(asked: Dataset, split: str) -> list[list[str]] | None:
    """Returns the members of each query's subset, if the data or a copy of CIRR's annotations tell them.

    The published datasets leave them out. A column ``members`` or ``img_set`` is used where there is one, and CIRR's
    own ``cap.rc2.val.json`` or ``cap.rc2.test1.json`` in ``E5V_DATA/cirr``.
    """
    if "members" in asked.column_names:
        return [list(own) for own in asked["members"]]
    if "img_set" in asked.column_names:
        return [list(own["members"]) for own in asked["img_set"]]
    file = Path(os.environ.get("E5V_DATA") or ".", "cirr", f"cap.rc2.{'test1' if split == 'test' else split}.json")
    if not (os.environ.get("E5V_DATA") and file.is_file()):
        return None
    entries = json.loads(file.read_text(encoding="utf8"))
    known = {(entry["reference"], entry["caption"]): entry["img_set"]["members"] for entry in entries}
    return [known[key] for key in zip(asked["candidate_id"], asked["caption"], strict=True)]


def _members(data_split: RetrievalSplitData) -> dict[str, list[str]]:
    queries = data_split["queries"]
    if "members" not in queries.column_names:
        return {}
    return {name: own.split("\n") for name, own in zip(queries["id"], queries["members"], strict=True)}


def _of_category(data: Dataset, category: str) -> Dataset:
    return data.select([row for row, name in enumerate(data["category"]) if name == category])


def _queries(asked: Dataset, ids: Sequence[str] | None = None, **columns: list[str]) -> Dataset:
    """Returns the reference images of the queries with ids and text columns."""
    images = asked.select_columns(["candidate"]).rename_column("candidate", "image")
    columns = {"id": list(ids or map(str, range(len(asked)))), **columns}
    for name, values in columns.items():
        images = images.add_column(name, list(values))
    return images


def _gallery(shown: Dataset) -> Dataset:
    return shown.select_columns(["id", "img"]).rename_column("img", "image")


def _split_data(queries: Dataset, corpus: Dataset, targets: Sequence[str] | None) -> RetrievalSplitData:
    names = queries["id"]
    relevant = {} if targets is None else {name: {target: 1} for name, target in zip(names, targets, strict=True)}
    lost = {target for own in relevant.values() for target in own} - set(corpus["id"])
    if lost:
        raise ValueError(f"{len(lost)} targets are not in the gallery, such as {min(lost)}")
    return RetrievalSplitData(corpus=corpus, queries=queries, relevant_docs=relevant, top_ranked=None)


TASKS = [E5VFashionIQRetrieval, E5VCIRRRetrieval, E5VCIRRTest]
