"""Records what a score alone does not tell: examples, the modality gap, chance, speed and hardware.

The records stand under ``details`` in the scores of a result file, where ``e5v report`` reads them.
"""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from math import comb
from typing import Any

import numpy as np
from mteb.models import EncoderProtocol, SearchProtocol

#: Numbers of example queries, of their best documents, and of points of each kind in the plot.
EXAMPLES, BEST, POINTS = 12, 5, 200

Results = Mapping[str, Mapping[str, float]]
Relevant = Mapping[str, Mapping[str, int]]


class Recorder:
    """An encoder that remembers what it returned.

    Args:
        model: The encoder that does the work.
    """

    def __init__(self, model: EncoderProtocol) -> None:
        self.model = model
        self.mteb_model_meta = model.mteb_model_meta
        self.similarity = model.similarity
        self.similarity_pairwise = model.similarity_pairwise
        self.embeddings: dict[str, list[np.ndarray]] = {}
        self.runs: list[dict[str, Any]] = []

    def encode(self, inputs: Any, *, prompt_type: Any = None, **kwargs: Any) -> Any:
        """See ``mteb.EncoderProtocol``."""
        start = time.monotonic()
        result = self.model.encode(inputs, prompt_type=prompt_type, **kwargs)
        role = getattr(prompt_type, "value", None) or "input"
        self.embeddings.setdefault(role, []).append(_as_array(result))
        run = {"role": role, "rows": len(result), "seconds": time.monotonic() - start}
        self.runs.append({**run, **{name: getattr(self.model, name, None) for name in ("encoded", "prompt")}})
        return result

    def of(self, role: str) -> np.ndarray:
        """Embeddings ``(n, d)`` of ``"query"``, ``"document"`` or (STS) ``"input"``, in the data's order."""
        return np.concatenate(self.embeddings[role])


def _as_array(result: Any) -> np.ndarray:
    return (result.detach().cpu().float().numpy() if hasattr(result, "detach") else np.asarray(result)).astype(
        np.float32, copy=False
    )


class Recording:
    """Mixin of a task: runs encoders through a :class:`Recorder`, and adds ``details`` to the scores."""

    recorder: Recorder | None = None

    def _evaluate_subset(self, model: Any, data_split: Any, **kwargs: Any) -> dict[str, Any]:
        if isinstance(model, EncoderProtocol) and not isinstance(model, SearchProtocol):
            model = self.recorder = Recorder(model)
        try:
            scores = super()._evaluate_subset(self._search_model(model, data_split), data_split, **kwargs)
            if self.recorder is None:
                return scores
            ran = {**hardware(), **getattr(self.recorder.model, "described", {})}
            details = {**scores.get("details", {}), "encoding": self.recorder.runs, "hardware": ran}
            return {**scores, "details": details}
        finally:
            self.recorder = None

    def _search_model(self, model: Any, data_split: Any) -> Any:
        """What searches instead of the model; the model itself unless a task says otherwise."""
        return model


def hardware() -> dict[str, str]:
    """Returns what ran: device, number of processes and versions."""
    import torch
    import transformers

    from e5v_st.processes import world_size

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "device": device,
        "processes": str(world_size()),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def best(scores: Mapping[str, float], count: int) -> list[str]:
    """Returns the ids with the highest scores, best first, ties in the order that ``pytrec_eval`` puts them."""
    ordered = sorted(((np.float32(score), name) for name, score in scores.items()), reverse=True)
    return [name for _, name in ordered[:count]]


def examples(relevant: Relevant, results: Results) -> list[dict[str, Any]]:
    """Returns some queries, evenly spread over the data, with their best documents and the right ones."""
    names = list(results)
    picked = names[:: max(1, -(-len(names) // EXAMPLES))][:EXAMPLES]
    return [
        {
            "query": name,
            "relevant": sorted(relevant[name]),
            "best": [{"id": i, "score": float(results[name][i])} for i in best(results[name], BEST)],
        }
        for name in picked
    ]


def first_hits(relevant: Relevant, results: Results) -> list[int]:
    """Returns the place of the first right document of each query, from 1; 0 where it is not among the results."""
    places = []
    for query, scores in results.items():
        order = best(scores, len(scores))
        places.append(next((place for place, name in enumerate(order, 1) if relevant[query].get(name)), 0))
    return places


#: mteb's names of scores, and ``pytrec_eval``'s, up to the number of documents.
_OF_QUERY = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "hit_rate": "success", "precision": "P"}


def scores_of_queries(main_score: str, scores: Mapping[str, Mapping[str, float]]) -> dict[str, list[float]]:
    """Returns the main score of each query of a retrieval task of mteb, by the score's name; empty if it has none.

    Args:
        main_score: Such as ``ndcg_at_10``; ``accuracy`` is the recall of the first document.
        scores: Of each query, as ``pytrec_eval`` names them: ``ndcg_cut_10``, ``success_1``.
    """
    name, _, k = ("recall_at_1" if main_score == "accuracy" else main_score).rpartition("_at_")
    known = f"{_OF_QUERY.get(name)}_{k}"
    values = [own[known] for own in scores.values() if known in own]
    return {main_score: [round(value, 5) for value in values]} if values else {}


def chance(relevant: Relevant, documents: int, k_values: Sequence[int]) -> dict[str, float]:
    """Returns the hit rates that a random order of the documents gives on average."""
    counts = Counter(len(own) for own in relevant.values())
    missed = {
        k: sum(times * comb(documents - count, k) for count, times in counts.items()) / comb(documents, k)
        for k in k_values
        if k <= documents
    }
    return {f"chance_hit_rate_at_{k}": 1 - own / counts.total() for k, own in missed.items()}


def projection(queries: np.ndarray, documents: np.ndarray) -> dict[str, Any]:
    """Returns the first two principal components of some queries and documents, and the gap between their centres.

    Args:
        queries: ``(n, d)``.
        documents: ``(m, d)``.

    Returns:
        ``query`` and ``document`` ``(points, 2)``, and ``gap``: the distance of the two means of normalised embeddings
        (the modality gap of Liang et al. 2022 where one are texts and the others images).
    """
    queries, documents = (_unit(part) for part in (queries, documents))
    gap = float(np.linalg.norm(queries.mean(0) - documents.mean(0)))
    queries, documents = (part[:: max(1, -(-len(part) // POINTS))] for part in (queries, documents))
    points = np.concatenate([queries, documents])
    points = points - points.mean(0)
    axes = np.linalg.svd(points, full_matrices=False)[2][:2]
    flat = np.round(points @ axes.T, 4)
    return {"query": flat[: len(queries)].tolist(), "document": flat[len(queries) :].tolist(), "gap": gap}


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
