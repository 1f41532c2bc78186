"""Metadata of the tasks: what mteb says about the same data, with what differs here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mteb
from mteb.abstasks.task_metadata import TaskMetadata

#: Where ``calculate_descriptive_statistics`` of a task reads and writes. The files of the STS tasks are mteb's own (the
#: pairs are the same); those of data that only the hub has say what its pages and papers say, and ``null`` otherwise.
STATISTICS = Path(__file__).parent / "stats"

E5V_CITATION = r"""
@article{jiang2024e5v,
  author = {Jiang, Ting and Song, Minghui and Zhang, Zihan and Huang, Haizhen and Deng, Weiwei and Sun, Feng and Zhang, Qi and Wang, Deqing and Zhuang, Fuzhen},
  journal = {arXiv preprint arXiv:2407.12580},
  title = {E5-V: Universal Embeddings with Multimodal Large Language Models},
  url = {https://arxiv.org/abs/2407.12580},
  year = {2024},
}
"""  # noqa: E501 - as mteb's tests of citations want it


class E5VTaskMetadata(TaskMetadata):
    """Task metadata whose statistics lie in this package instead of beside mteb's sources."""

    @property
    def descriptive_stat_path(self) -> Path:
        """Path of the statistics file."""
        return STATISTICS / f"{self.name}.json"


def describe(name: str, like: str, description: str, repo: str, revision: str, **changes: Any) -> E5VTaskMetadata:
    """Returns metadata for a task on data that mteb has too.

    Args:
        name: The task's.
        like: Name of mteb's task on that data; its licence, dates, domains and citation are taken over.
        description: What differs from it.
        repo: The dataset's id.
        revision: Of the dataset.
        **changes: Fields of ``TaskMetadata``.
    """
    known = mteb.get_task(like).metadata.model_dump()
    taken = {"name": name, "description": description, "dataset": {"path": repo, "revision": revision}}
    return E5VTaskMetadata(**{**known, "adapted_from": [like], "superseded_by": None, **taken, **changes})
