"""Sentence similarity as SentEval's "all": one Spearman correlation over all pairs of a year.

mteb has the same pairs (but for SICK-R, of which the paper uses the test part). E5-V's edits of the sentences are its
model entry's business, see ``encoder.py``.
"""

from __future__ import annotations

from typing import Any

import mteb
from mteb.abstasks.sts import AbsTaskSTS

from .metadata import describe
from .recording import Recording
from .sources import load_split

#: Rows of SemEval-2014's test part. The dataset's first revision has it apart; later ones have all 9,927 pairs.
SICKR_REVISION, SICKR_ROWS = "b589c9fc99a24743f4f6cc6c7c9633cd0fe40b9d", 4927

_LIKE = {
    **{f"E5VSTS{year}": f"STS{year}" for year in range(12, 17)},
    **{"E5VSTSBenchmark": "STSBenchmark", "E5VSICKR": "SICK-R"},
}


class E5VSTS(Recording, AbsTaskSTS):
    """Sentence pairs with a score from 0 to 5."""

    min_score = 0
    max_score = 5
    rows: int | None = None

    def load_data(self, **_: Any) -> None:
        """Loads the pairs.

        Raises:
            ValueError: If there are not as many as the protocol wants.
        """
        if self.data_loaded:
            return
        source = self.metadata.dataset
        columns = ("sentence1", "sentence2", "score")
        self.dataset = {
            split: load_split(source["path"], split, columns, source["revision"]) for split in self.eval_splits
        }
        for split, data in self.dataset.items():
            if data.features["score"].dtype in ("string", "large_string"):
                raise ValueError(f"{source['path']} ({split}): the column 'score' holds text, want numbers")
        counts = {split: len(data) for split, data in self.dataset.items()}
        if self.rows is not None and set(counts.values()) != {self.rows}:
            raise ValueError(
                f"{self.metadata.name}: got {counts} pairs from {source['path']} ({source['revision']}), "
                f"want {self.rows}: put the right part into the folder that E5V_DATA names, as parquet or "
                f"JSON lines with the columns {', '.join(columns)}"
            )
        self.data_loaded = True


def _make_task(name: str, like: str) -> type[E5VSTS]:
    known = mteb.get_task(like).metadata
    sick = like == "SICK-R"
    metadata = describe(
        name,
        like,
        f"{like} as in the E5-V paper: one Spearman correlation over all pairs of the test part.",
        known.dataset["path"],
        SICKR_REVISION if sick else known.dataset["revision"],
        eval_splits=["test"],
        main_score="cosine_spearman",
    )
    fields = {"metadata": metadata, "rows": SICKR_ROWS if sick else None, "__module__": __name__}
    return type(name, (E5VSTS,), {**fields, "__doc__": metadata.description})


TASKS = [_make_task(name, like) for name, like in _LIKE.items()]
