"""What tasks of MIEB(lite) share, in time: this package against MTEB's own wrapper, on mock data of the same shape.

The data are made from the plan of MIEB(lite) (``e5v eval --plan``): for every group of contents of a task as many texts
and images as the statistics say, of those lengths and sizes, scaled down; groups that the plan takes for the same data
are the same data here. Each way encodes all groups, task after task, as an evaluation does; scores are not computed.

    python benchmarks/mieb_sharing.py                   # prints a table, writes results/mieb_sharing.json
    python benchmarks/mieb_sharing.py --scale 5000      # more data: a fifth of a thousandth of MIEB(lite)

Both ways run the same weights (random, right in their proportions) in float32. Ours runs in one process, and again in
two processes that share one store; there the processes share two CPU cores, so that time says little, and the number of
contents that were encoded says all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from random_model import WORDS, draw_picture, make_checkpoint

OUT = Path(__file__).parent / "results" / "mieb_sharing.json"
BENCHMARK = "MIEB(lite)"
#: Contents of a group at least, however small the scale.
LEAST = 1
#: A small model: there are thousands of tokens for each of hundreds of images.
LANGUAGE = {
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOWER = {"num_hidden_layers": 2, "hidden_size": 96, "intermediate_size": 384, "num_attention_heads": 3}
WAYS = ("wrapper", "ours", "two processes")


def groups(scale: int) -> Iterator[tuple[Any, Any, int]]:
    """Yields the groups of the benchmark: the task, the group, and how many contents it has here."""
    import mteb

    from e5v_st.mteb_tasks.plan import groups_of, parts_of

    for task in parts_of(mteb.get_benchmark(BENCHMARK).tasks):
        for group in groups_of(task):
            yield task, group, max(LEAST, round(group.number / scale))


def make_rows(group: Any, number: int) -> dict[str, list[Any]]:
    """Returns the columns of a group: the same for groups that hold the same contents."""
    import io

    import numpy as np

    seed = hash((group.data, group.number)) % 2**32
    dice, noise = random.Random(seed), np.random.default_rng(seed)
    columns: dict[str, list[Any]] = {}
    if group.characters is not None:
        words = max(1, round(group.characters / 5))
        columns["text"] = [" ".join([*dice.choices(WORDS, k=words), str(row)]) for row in range(number)]
    if group.shapes:
        sizes = dice.choices([(w, h) for h, w, _ in group.shapes], [part for *_, part in group.shapes], k=number)
        columns["image"] = []
        for width, height in sizes:
            buffer = io.BytesIO()
            draw_picture(noise, (min(width, 1024), min(height, 1024))).save(buffer, "PNG", compress_level=1)
            columns["image"].append({"bytes": buffer.getvalue(), "path": None})
    return columns


def encode_all(model: Any, scale: int) -> tuple[float, int, int]:
    """Encodes every group; returns seconds, rows, and contents that were computed in this process."""
    import datasets
    from mteb._create_dataloaders import create_dataloader
    from mteb.types import PromptType

    roles = {"query": PromptType.query, "document": PromptType.document}
    seconds, rows, encoded = 0.0, 0, 0
    for task, group, number in groups(scale):
        data = datasets.Dataset.from_dict(make_rows(group, number))
        if "image" in data.column_names:
            data = data.cast_column("image", datasets.Image())
        split, subset, role = group.label[1:4]
        loader = create_dataloader(data, task_metadata=task.metadata, batch_size=32)
        start = time.perf_counter()
        how = {"task_metadata": task.metadata, "hf_split": split, "hf_subset": subset, "show_progress_bar": False}
        model.encode(loader, prompt_type=roles.get(role), **how)
        seconds += time.perf_counter() - start
        rows += number
        encoded += getattr(model, "encoded", number)
    return seconds, rows, encoded


def run_way(way: str, folder: Path, scale: int) -> None:
    """Runs one way in this process, and prints what it took."""
    if way == "wrapper":
        from mteb_speed import load_stock

        model = load_stock(folder)
    else:
        from e5v_st.mteb_tasks.models import make_meta

        model = make_meta(str(folder), store=folder.parent / way.replace(" ", "-")).load_model(device="cpu")
    print(json.dumps(encode_all(model, scale)), flush=True)


def start(way: str, folder: Path, scale: int) -> list[Any]:
    """Runs one way in a process of its own, or in two; returns the slowest's seconds, the rows, and the contents."""
    words: Sequence[str] = (__file__, "--way", way, "--folder", str(folder), "--scale", str(scale))
    command = [sys.executable, *words]
    if way == "two processes":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words]
    # The same seeds in every process
    env = {**os.environ, "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return [max(own[0] for own in found), found[0][1], sum(own[2] for own in found)]


def measure(scale: int) -> dict[str, Any]:
    """Runs all ways."""
    from e5v_st.costs import find_counter
    from e5v_st.hub.export import export
    from e5v_st.mteb_tasks.plan import plan

    with tempfile.TemporaryDirectory() as parent:
        folder = make_checkpoint(Path(parent) / "model", LANGUAGE, TOWER)
        export(str(folder), str(folder.with_name("native")), native=True)
        found = {}
        for way in WAYS:
            found[way] = dict(zip(("seconds", "rows", "encoded"), start(way, folder, scale), strict=True))
            print(way, found[way], flush=True)
    import mteb

    lines = plan(mteb.get_benchmark(BENCHMARK).tasks, find_counter("royokong/e5-v"))
    left, whole = (
        sum(own.tokens for own in part) for part in zip(*((line.left, line.whole) for line in lines), strict=True)
    )
    return {
        "command": " ".join(["python", "benchmarks/mieb_sharing.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, one thread, float32",
        "load_average": os.getloadavg()[0],
        "scale": scale,
        "ways": found,
        "times_as_fast_as_the_wrapper": found["wrapper"]["seconds"] / found["ours"]["seconds"],
        "part_encoded": found["ours"]["encoded"] / found["ours"]["rows"],
        "part_encoded_in_two_processes": found["two processes"]["encoded"] / found["two processes"]["rows"],
        "part_of_tokens_in_the_plan": left / whole,
    }


def main() -> None:
    """Prints the table and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=int, default=20_000, help="one of so many contents (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        run_way(args.way, args.folder, args.scale)
        return
    result = measure(args.scale)
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")
    print(
        f"{result['times_as_fast_as_the_wrapper']:.2f} times as fast as MTEB's wrapper; "
        f"{100 * result['part_encoded']:.0f} % of the contents were encoded"
    )


if __name__ == "__main__":
    main()
