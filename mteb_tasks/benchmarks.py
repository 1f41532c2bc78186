"""The benchmarks ``E5V`` (what the paper reports) and ``E5V(tiny)`` (offline, about a minute)."""

from __future__ import annotations

from mteb.benchmarks.benchmark import Benchmark

from . import cir, emoji, retrieval, sts
from .metadata import E5V_CITATION

TASKS = [*retrieval.TASKS, *cir.TASKS, *sts.TASKS, *emoji.TASKS]


def make_benchmarks() -> dict[str, Benchmark]:
    """Returns the benchmarks by their names."""
    reference = "https://arxiv.org/abs/2407.12580"
    paper = [task() for module in (retrieval, cir, sts) for task in module.TASKS]
    made = [
        Benchmark(
            name="E5V",
            tasks=paper,
            description="The whole evaluation of the E5-V paper, with its protocol: text-image, image-image and "
            "composed image retrieval, and sentence similarity.",
            reference=reference,
            citation=E5V_CITATION,
        ),
        Benchmark(
            name="E5V(tiny)",
            tasks=[task() for task in emoji.TASKS],
            description="The same kinds of tasks on emoji images that come with the package: offline, in about a "
            "minute.",
            reference=reference,
            citation=E5V_CITATION,
        ),
    ]
    return {benchmark.name: benchmark for benchmark in made}
