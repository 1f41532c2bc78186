"""Beside vLLM: the same items through its pooling of the exported model, and through ours, in turns on one GPU.

Makes an 8 B model of random weights on the device and exports it natively (33 GB of disk for a while), or takes a
checkpoint. Both ways load the same weights in the same dtype, hold the same images in memory, and take turns. The
embeddings are compared before anything is timed.

vLLM pins versions of torch and transformers that this package's may not be, so it has an environment of its own, and
runs in a process of its own that waits while we run. Both are on the card at once: vLLM may take 0.45 of its memory
(``--vllm-memory``), and ours takes what is left. vLLM's time is taken in its own process around one call with all
prompts, and nothing that goes between the processes is in it. It gets token ids, so it tokenises nothing, while our
time has our tokenising in it. ``vllm_way.py`` has its settings, and says what is emptied between runs.

    python -m venv vllm_env && vllm_env/bin/pip install vllm==0.33.0
    python benchmarks/beside_vllm.py --vllm-python vllm_env/bin/python     # writes benchmarks/results/beside_vllm.json
    python benchmarks/beside_vllm.py --vllm-python … --model royokong/e5-v # the published weights

``--device cpu`` tries the script with a vLLM for CPUs, and writes nothing unless ``--out`` says where to.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_encode import CHANGES, COUNTS, SIZES, seconds, works
from random_model import write_folder
from ways import ours

OUT = Path(__file__).parent / "results" / "beside_vllm.json"
#: The version whose source vLLM's way was written from.
VLLM = "0.33.0"
#: Least cosine between the two embeddings of an item. bfloat16 rounds differently in each batch, and vLLM's resizing of
#: images is that of its transformers.
LEAST_COSINE = {"bfloat16": 0.98, "float32": 0.999}
STDERR = 2
REPORTED = ("torch", "transformers", "sentence-transformers")


# ---- the model and the items ----


def make_checkpoint(folder: Path, size: str, device: str, dtype: torch.dtype) -> Path:
    """Writes a LLaVA-NeXT with random weights, drawn on the device."""
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    write_folder(folder, *SIZES[size])
    torch.manual_seed(0)
    with torch.device(device):
        config = LlavaNextConfig.from_pretrained(folder)
        model = LlavaNextForConditionalGeneration._from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    del model
    if device != "cpu":
        torch.cuda.empty_cache()  # vLLM looks at what is free when it starts
    return folder


def make_works(counts: dict[str, int]) -> dict[str, list]:
    """Items and their prompts' names: those of ``gpu_encode.py``, and changes of an image each."""
    found = works(counts)
    changed = [
        ({**item, "text": CHANGES[place % len(CHANGES)]}, "composed") for place, (item, _) in enumerate(found["images"])
    ]
    return {
        "texts": found["texts"],
        "images": found["images"],
        "composed, an image each": changed,
        "three prompts about an image": found["composed"],
    }


def prompt_ids(model: Any, work: list) -> list[list[int]]:
    """Returns the token ids of each prompt as our model reads it, with one id for an image."""
    from e5v_st.model.prompts_e5v import IMAGE, PROMPTS, render

    transformer = model[0]
    backbone, tokenizer = transformer.backbone, transformer.tokenizer
    texts = [
        render(PROMPTS[name].replace(IMAGE, backbone.image), backbone.wrapper, item.get("text", ""))
        for item, name in work
    ]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=backbone.adds_bos).input_ids
    return ids


# ---- vLLM's process ----


class Vllm:
    """vLLM in its own process; see ``vllm_way.py``.

    Args:
        calls: To the process.

    Attributes:
        versions: Of vLLM and what it stands on.
    """

    def __init__(self, calls: Connection) -> None:
        self.calls = calls
        self.versions: dict[str, str] = self._receive()
        if "fault" in self.versions:
            raise SystemExit(
                f"vllm is not installed there: python -m venv vllm_env && vllm_env/bin/pip install vllm=={VLLM}, "
                "then --vllm-python vllm_env/bin/python"
            )

    def call(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        """Has something done, and waits for it."""
        self.calls.send((name, arguments))
        return self._receive()

    def take(self, work: list, ids: list[list[int]]) -> None:
        """Gives it a work's prompts. An image goes there once, however many prompts are about it."""
        places: dict[int, int] = {}
        images, rows = [], []
        for (item, _), row in zip(work, ids, strict=True):
            image = item.get("image")
            if image is not None and id(image) not in places:
                places[id(image)] = len(images)
                images.append((*image.size, image.convert("RGB").tobytes()))
            rows.append((row, None if image is None else places[id(image)]))
        self.call("work", {"rows": rows, "images": images})

    def _receive(self) -> Any:
        try:
            return self.calls.recv()
        except EOFError:
            raise SystemExit("vLLM's process has ended: what it printed above says why") from None


@contextmanager
def vllm_process(python: str) -> Iterator[Vllm]:
    """Starts vLLM's process, and ends it."""
    here, there = Pipe()
    command = [python, str(Path(__file__).with_name("vllm_way.py")), str(there.fileno())]
    # What it prints goes to stderr, so that the table alone goes to stdout
    process = subprocess.Popen(command, pass_fds=[there.fileno()], stdout=STDERR)
    there.close()
    try:
        yield Vllm(here)
    finally:
        here.close()
        process.wait()


# ---- measuring ----


def compare(name: str, here: np.ndarray, there: np.ndarray, least: float) -> dict[str, float]:
    """Returns the least and the mean cosine of the two embeddings of each item.

    Raises:
        SystemExit: If they are not embeddings of the same items by the same model.
    """
    if here.shape != there.shape:
        raise SystemExit(f"{name}: ours are {here.shape}, vLLM's {there.shape}: it has loaded another model")
    cosines = (here * there).sum(1) / (np.linalg.norm(here, axis=1) * np.linalg.norm(there, axis=1))
    if not cosines.min() >= least:  # so that NaN is refused too
        raise SystemExit(f"{name}: the ways disagree, cosine {cosines.min():.4f} at the least, want {least}")
    return {"least_cosine": float(cosines.min()), "mean_cosine": float(cosines.mean())}


def measure(name: str, work: list, model: Any, vllm: Vllm, device: str, runs: int, least: float) -> dict[str, Any]:
    """Compares the ways on a work, then times them in turns. The comparison is what warms both up."""
    vllm.take(work, prompt_ids(model, work))
    encode = ours(model)
    here, answer = encode(work), vllm.call("encode")
    cosines = compare(name, here, np.frombuffer(answer["rows"], "float32").reshape(len(work), -1), least)
    times: dict[str, list[float]] = {"ours": [], "vllm": []}
    for _ in range(runs):
        times["ours"].append(seconds(partial(encode, work), device))
        times["vllm"].append(vllm.call("encode")["seconds"])
    medians = {way: statistics.median(values) for way, values in times.items()}
    return {
        "items": len(work),
        "items_per_second": {way: len(work) / value for way, value in medians.items()},
        "all_seconds": times,
        "times_as_fast_as_vllm": medians["vllm"] / medians["ours"],
        "tokens": answer["tokens"],
        "tokens_from_vllms_cache": answer["cached"],
        **cosines,
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """Returns the result in Markdown."""
    head = ("work", "items", "ours, items/s", "vLLM, items/s", "times as fast", "least cosine", "mean cosine")
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---', *['---:'] * 6])} |"]
    for name, row in found.items():
        rates = [f"{row['items_per_second'][way]:.1f}" for way in ("ours", "vllm")]
        cosines = [f"{row[key]:.5f}" for key in ("least_cosine", "mean_cosine")]
        cells = [name, str(row["items"]), *rates, f"{row['times_as_fast_as_vllm']:.2f}", *cosines]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def read_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm-python", default=sys.executable, help="of the environment where vLLM is")
    parser.add_argument("--model", help="a published checkpoint, folder or hub id (default: random weights)")
    parser.add_argument("--size", choices=SIZES, default="8b", help="of the random model, and how much is encoded")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--vllm-memory", type=float, default=0.45, help="share of the card's (default: %(default)s)")
    parser.add_argument(
        "--vllm-threads", type=int, default=1, help="that preprocess images; several need its cache of them to be off"
    )
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/beside_vllm.json, on a GPU alone")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Measures, prints a table and writes JSON."""
    import e5v_st
    from e5v_st.hub.export import export

    args = read_arguments(words)
    cpu = args.device == "cpu"
    if not cpu and not torch.cuda.is_available():
        raise SystemExit("no GPU is found: --device cpu tries the script without one")
    dtype = torch.float32 if cpu else torch.bfloat16
    name = str(dtype).removeprefix("torch.")
    with vllm_process(args.vllm_python) as vllm, tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        checkpoint = args.model or make_checkpoint(root / "checkpoint", args.size, args.device, dtype)
        folder = export(checkpoint, root / "native", native=True)
        settings = {"dtype": name, "memory": args.vllm_memory, "threads": args.vllm_threads}
        vllm.call("open", {"folder": str(folder), **settings})
        model = e5v_st.load(checkpoint, device=args.device, model_kwargs={"dtype": dtype})
        result: dict[str, Any] = {
            "command": " ".join(["python", "benchmarks/beside_vllm.py", *(sys.argv[1:] if words is None else words)]),
            "device": platform.machine() if cpu else torch.cuda.get_device_name(args.device),
            "model": args.model or f"random, {args.size}",
            "dtype": name,
            "versions": {
                "ours": {"e5v-st": e5v_st.__version__, **{package: version(package) for package in REPORTED}},
                "vllm": vllm.versions,
            },
            "vllm_settings": settings,
            "works": {},
        }
        for title, work in make_works(COUNTS[args.size]).items():
            row = measure(title, work, model, vllm, args.device, args.runs, LEAST_COSINE[name])
            result["works"][title] = row
            print(title, json.dumps(row), file=sys.stderr, flush=True)
    print(table(result["works"]))
    out = args.out or (None if cpu else OUT)
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
