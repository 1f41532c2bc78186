"""The paper's whole benchmark, scaled down, through MTEB: this package against the published recipe and stock parts.

Writes small data sets in the published schema (photographs of the usual shapes, made of noise; five captions each) and
runs every task of the benchmark ``E5V`` that can be scaled down (all but SICK-R, whose size is fixed, and CIRR's test
part, which has no scores) with a mid-size random LLaVA-NeXT (``random_model.py``), each way in a process of its own, in
turns:

- *published*: each row by the published README's recipe, every task anew; texts in batches of 32, but images one at a
  time, which on a CPU is faster than its batches with padding, and takes less memory.
- *stock*: the native export in stock sentence-transformers, in MTEB's own wrapper (which knows neither FashionIQ's two
  caption orders nor the prompts of composed retrieval: it does less).
- *ours*: what ``mteb run`` does, with a store that is empty at the start.

The scores of *published* and *ours* must be equal. Time is that of ``mteb.evaluate``, without loading; memory is its
peak above what the process has after loading.

    python benchmarks/mteb_speed.py                 # writes benchmarks/results/mteb_speed.json
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from random_model import WORDS, draw_picture, make_checkpoint
from ways import last_states, load_processor

OUT = Path(__file__).parent / "results" / "mteb_speed.json"
COCO, FLICKR = [(640, 480), (500, 375)], [(500, 333), (333, 500)]
CATEGORIES = ("dress", "shirt", "toptee")
#: Pictures and queries of a category of FashionIQ, and of CIRR, in about the real proportions.
FASHIONIQ, CIRR = (5, 2), (4, 7)
STS = [*(f"mteb/sts{year}-sts" for year in range(12, 17)), "mteb/stsbenchmark-sts"]
PAIRS = 30
WAYS = ("published", "stock", "ours")
#: Largest difference of a score: a change of 1e-7 in a cosine may change the order of two pairs.
TOLERANCE = 1e-3


def write_data(folder: Path) -> None:
    """Writes the data sets in the published schema, from a seed."""
    import random

    import numpy as np
    from datasets import Dataset

    dice = random.Random(0)
    picture = partial(draw_picture, np.random.default_rng(0))

    def words(low: int, high: int) -> str:
        return " ".join(dice.choices(WORDS, k=dice.randint(low, high)))

    def save(repo: str, columns: dict[str, list]) -> None:
        Dataset.from_dict(columns).save_to_disk(folder / repo)

    for repo, shapes in (("royokong/coco_test", COCO), ("royokong/flickr30k_test", FLICKR)):
        captions = [[words(8, 14) for _ in range(5)] for _ in shapes]
        save(repo, {"image": [picture(shape) for shape in shapes], "text": captions})

    count, asked = FASHIONIQ
    gallery = {c: [picture((300, 400)) for _ in range(count)] for c in CATEGORIES}
    queries = [(category, row) for category in CATEGORIES for row in range(asked)]
    save(
        "royokong/fashioniq_val",
        {
            "candidate": [gallery[category][row] for category, row in queries],
            "caption": [[words(3, 7), words(3, 7)] for _ in queries],
            "target_id": [f"{category}{row + 1}" for category, row in queries],
            "category": [category for category, _ in queries],
        },
    )
    save(
        "royokong/fashioniq_val_imgs",
        {
            "id": [f"{category}{row}" for category in CATEGORIES for row in range(count)],
            "img": [image for category in CATEGORIES for image in gallery[category]],
            "category": [category for category in CATEGORIES for _ in range(count)],
        },
    )
    count, asked = CIRR
    images = [picture(shape) for shape in (COCO + FLICKR)[:count]]
    rows = [row % count for row in range(asked)]
    save(
        "royokong/cirr_val",
        {
            "candidate": [images[row] for row in rows],
            "candidate_id": [f"img{row}" for row in rows],
            "caption": [words(8, 14) for _ in rows],
            "target_id": [f"img{(row + 1) % count}" for row in rows],
        },
    )
    save("royokong/cirr_imgs", {"id": [f"img{row}" for row in range(count)], "img": images})
    for repo in STS:
        (folder / repo).mkdir(parents=True)
        sentences = [(words(6, 20), words(6, 20)) for _ in range(PAIRS)]
        pairs = [{"sentence1": one, "sentence2": other, "score": dice.random() * 5} for one, other in sentences]
        with gzip.open(folder / repo / "test.jsonl.gz", "wt", encoding="utf8") as file:
            file.write("\n".join(map(json.dumps, pairs)))


def load_published(folder: Path) -> Any:
    """The published recipe behind the protocol of this package's encoder."""
    import numpy as np
    import torch
    from transformers import LlavaNextForConditionalGeneration

    import e5v_st
    from e5v_st.model.images_e5v import open_image
    from e5v_st.mteb_tasks.encoder import E5VEncoder
    from e5v_st.mteb_tasks.models import make_meta

    whole = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = load_processor(folder)

    def read(content: Any) -> dict[str, Any]:
        image = {} if content.image is None else {"image": open_image(content.image)}
        return {"text": content.text or "", **image}

    class Published(E5VEncoder):
        def _sum_states(self, rows: Any, bar: Any) -> np.ndarray:
            owned = [contents for contents, _ in rows]
            work = [(read(content), content.prompt) for row in owned for content in row]
            flat = iter(last_states(whole, processor, work, image_batch=1).numpy())
            return np.array([np.sum([next(flat) for _ in row], axis=0) for row in owned], np.float32)

    encoder = Published(e5v_st.load(folder, device="cpu"))
    encoder.mteb_model_meta = make_meta(str(folder))
    return encoder


def load_stock(folder: Path) -> Any:
    """Stock sentence-transformers in mteb's own wrapper."""
    import mteb
    from sentence_transformers import SentenceTransformer

    model = mteb.SentenceTransformerEncoderWrapper(SentenceTransformer(str(folder.with_name("native")), device="cpu"))
    # mteb finds the modalities of models that are registered, or have a configuration on the hub
    model.mteb_model_meta = model.mteb_model_meta.model_copy(update={"modalities": ["image", "text"]})
    return model


def load_ours(folder: Path) -> Any:
    """What ``mteb run`` loads."""
    from e5v_st.mteb_tasks.models import make_meta

    return make_meta(str(folder), store=tempfile.mkdtemp(dir=folder.parent)).load_model(device="cpu")


LOADERS = {"published": load_published, "stock": load_stock, "ours": load_ours}


def run_way(way: str, folder: Path) -> dict[str, Any]:
    """Runs the benchmark in this process: seconds, peak memory in MiB above loading, scores."""
    import mteb
    import numpy as np
    from encode_speed import resident

    left_out = {"E5VSICKR", "E5VCIRRTest"}
    tasks = [task for task in mteb.get_benchmark("E5V").tasks if task.metadata.name not in left_out]
    for task in tasks:
        task.load_data()
    model = LOADERS[way](folder)
    loaded = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    start = time.perf_counter()
    found = mteb.evaluate(model, tasks, cache=None, raise_error=True)
    seconds = time.perf_counter() - start
    scores = {
        f"{result.task_name} {row['hf_subset']}": row["main_score"]
        for result in found.task_results
        for rows in result.scores.values()
        for row in rows
    }
    assert np.isfinite(list(scores.values())).all()
    return {"seconds": seconds, "peak_mib": resident("VmHWM") - loaded, "scores": scores}


def measure(runs: int) -> dict[str, Any]:
    """Runs all ways in turns, each time in a process of its own."""
    from e5v_st.hub.export import export

    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as parent:
        folder = make_checkpoint(Path(parent) / "model")
        export(str(folder), str(folder.with_name("native")), native=True)
        write_data(folder.with_name("data"))
        for run in range(runs):
            for way in WAYS:
                command = [sys.executable, __file__, "--way", way, "--folder", str(folder)]
                env = {**os.environ, "E5V_DATA": str(folder.with_name("data")), "HF_HUB_OFFLINE": "1"}
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
                found[way].append(json.loads(done.stdout.splitlines()[-1]))
                print(run, way, f"{found[way][-1]['seconds']:.1f} s, {found[way][-1]['peak_mib']:.0f} MiB", flush=True)
    published, ours = found["published"][0]["scores"], found["ours"][0]["scores"]
    difference = max(abs(published[name] - ours[name]) for name in published)
    assert difference < TOLERANCE, f"the scores differ: {published} {ours}"
    table = {
        way: {key: statistics.median(run[key] for run in own) for key in ("seconds", "peak_mib")}
        for way, own in found.items()
    }
    return {
        "command": " ".join(["python", "benchmarks/mteb_speed.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, float32",
        "load_average": os.getloadavg()[0],
        "ways": table,
        "all_seconds": {way: [run["seconds"] for run in own] for way, own in found.items()},
        "times_as_fast_as_published": table["published"]["seconds"] / table["ours"]["seconds"],
        "times_as_fast_as_stock": table["stock"]["seconds"] / table["ours"]["seconds"],
        "memory_of_published": table["ours"]["peak_mib"] / table["published"]["peak_mib"],
        "largest_difference_of_a_score": difference,
        "scores": found["ours"][0]["scores"],
    }


def main() -> None:
    """Prints the table and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(run_way(args.way, args.folder)))
        return
    result = measure(args.runs)
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")
    print(
        f"{result['times_as_fast_as_published']:.2f} times as fast as the published recipe, "
        f"{result['times_as_fast_as_stock']:.2f} as MTEB's wrapper; {result['memory_of_published']:.2f} of the memory"
    )


if __name__ == "__main__":
    main()
