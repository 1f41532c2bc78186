"""E5-V's numbers in the paper (arXiv 2407.12580), by task, subset and score."""

from __future__ import annotations

Key = tuple[str, str, str]


def _recalls(task: str, subset: str, values: tuple[float, ...], ks: tuple[int, ...] = (1, 5, 10)) -> dict[Key, float]:
    return {(task, subset, f"hit_rate_at_{k}"): value for k, value in zip(ks, values, strict=True)}


#: What the averages are of.
AVERAGES: dict[str, list[tuple[str, str]]] = {
    "E5VFashionIQRetrieval": [("E5VFashionIQRetrieval", category) for category in ("dress", "shirt", "toptee")],
    "E5VSTS": [
        (f"E5V{name}", "default") for name in (*(f"STS{year}" for year in range(12, 17)), "STSBenchmark", "SICKR")
    ],
}
#: In percent.
PAPER: dict[Key, float] = {
    **_recalls("E5VFlickr30kT2IRetrieval", "default", (79.5, 95.0, 97.6)),
    **_recalls("E5VCOCOT2IRetrieval", "default", (52.0, 76.5, 84.7)),
    **_recalls("E5VFlickr30kI2TRetrieval", "default", (88.2, 98.7, 99.4)),
    **_recalls("E5VCOCOI2TRetrieval", "default", (62.0, 83.6, 89.7)),
    **_recalls("E5VCIRRTest", "default", (33.90, 64.12, 75.88, 93.54), (1, 5, 10, 50)),
    **_recalls("E5VFashionIQRetrieval", "dress", (23.75, 47.45), (10, 50)),
    **_recalls("E5VFashionIQRetrieval", "shirt", (36.36, 56.43), (10, 50)),
    **_recalls("E5VFashionIQRetrieval", "toptee", (35.29, 57.47), (10, 50)),
    **_recalls("E5VFashionIQRetrieval", "average", (31.80, 53.78), (10, 50)),
    **_recalls("E5VFlickr30kI2IRetrieval", "t2i", (67.8, 89.2, 93.6)),
    **_recalls("E5VFlickr30kI2IRetrieval", "i2t", (79.5, 95.2, 97.8)),
    **_recalls("E5VCOCOI2IRetrieval", "t2i", (41.2, 66.7, 76.2)),
    **_recalls("E5VCOCOI2IRetrieval", "i2t", (51.6, 76.8, 84.9)),
    ("E5VSTS12", "default", "cosine_spearman"): 80.03,
    ("E5VSTS13", "default", "cosine_spearman"): 89.94,
    ("E5VSTS14", "default", "cosine_spearman"): 85.67,
    ("E5VSTS15", "default", "cosine_spearman"): 89.09,
    ("E5VSTS16", "default", "cosine_spearman"): 85.89,
    ("E5VSTSBenchmark", "default", "cosine_spearman"): 87.88,
    ("E5VSICKR", "default", "cosine_spearman"): 83.51,
    ("E5VSTS", "average", "cosine_spearman"): 86.00,
}
