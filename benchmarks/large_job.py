"""Memory of a large job: 100,000 short texts and 20,000 pictures, many of them repeated, through ``encode_all``.

Both come from generators, with the embedded model. The peak of the process is noted after a tenth of the items and at
the end: what is in between must not grow with the job, but for the embeddings that are returned.

    python benchmarks/large_job.py                 # writes benchmarks/results/large_job.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from encode_speed import resident

OUT = Path(__file__).parent / "results" / "large_job.json"
TEXTS, PICTURES, DISTINCT_PICTURES = 100_000, 20_000, 2_000


def texts() -> Iterator[dict[str, str]]:
    """Short texts, all different."""
    for number in range(TEXTS):
        yield {"text": f"picture {number} of {number % 977} dogs"}


def pictures() -> Iterator[dict[str, Any]]:
    """Pictures as files in memory; each comes ten times, far apart."""
    import io

    import numpy as np
    from PIL import Image

    for number in range(PICTURES):
        noise = np.random.default_rng(number % DISTINCT_PICTURES)
        file = io.BytesIO()
        Image.fromarray(noise.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((160, 120)).save(file, "JPEG")
        yield {"image": file.getvalue()}


def run(model: Any, items: Iterator[Any], count: int) -> dict[str, Any]:
    """Embeds a job; returns rate and memory in MiB."""
    import numpy as np

    from e5v_st.encoder import stream_all

    forwards = []
    hook = model[0].register_forward_pre_hook(lambda module, args: forwards.append(len(args[0]["input_ids"])))
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    start, early, norms = time.perf_counter(), 0.0, 0.0
    for result in stream_all(model, items, progress=False):
        norms += float(np.linalg.norm(result.embedding))
        if result.index == count // 10:
            early = resident("VmHWM")
    hook.remove()
    seconds = time.perf_counter() - start
    assert abs(norms / count - 1) < 1e-5
    return {
        "items": count,
        "items_that_were_computed": sum(forwards),
        "items_per_second": count / seconds,
        "peak_mib_after_a_tenth": early,
        "peak_mib": resident("VmHWM"),
    }


def main() -> None:
    """Measures, prints and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    import torch

    import e5v_st

    model = e5v_st.load("e5v-tiny", device="cpu")
    result = {
        "command": " ".join(["python", "benchmarks/large_job.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "load_average": os.getloadavg()[0],
        "texts": run(model, texts(), TEXTS),
        "pictures": run(model, pictures(), PICTURES),
    }
    print(json.dumps(result, indent=1))
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
