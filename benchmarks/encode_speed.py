"""Speed and memory of encoding against the published recipe and stock sentence-transformers, on the same weights.

Makes a mid-size LLaVA-NeXT with random weights (``random_model.py``; real tile size and grid pinpoints), encodes the
same items in each way, compares the embeddings, and prints how much longer the others take. Each figure is the median
of ``--runs`` runs; the ways take turns in each run. Tokens are those that go through the language model's layers,
padding included; of the last layer, only those that are wanted there. Memory is the peak of a fresh process above what
it has after loading.

    python benchmarks/encode_speed.py                 # writes benchmarks/results/encode_speed.json

With ``--family`` it measures other families of backbones against plain transformers instead, see ``family_speed.py``::

    python benchmarks/encode_speed.py --family qwen3_vl gemma3 --threads 1 --runs 3
    python benchmarks/encode_speed.py --family qwen3_vl --image-size 1024x768 --images 2 --threads 1 --runs 3

``--image-size`` shows images of one size in place of those of COCO's shapes, and leaves out what shows none.
``--max-image-tokens`` lets images have more tokens than the family's default in this package::

    python benchmarks/encode_speed.py --family smolvlm-instruct --image-size 1024x768 --max-image-tokens 1200
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from family_speed import families, measure_family
from PIL import Image
from random_model import SHAPES, WORDS, draw_picture, make_checkpoint
from ways import IMAGE_BATCH, ONE_BY_ONE, TEXT_BATCH, Way, ours, published

OUT = Path(__file__).parent / "results" / "encode_speed.json"
FAMILIES_OUT = OUT.with_name("encode_speed_families.json")
LARGE_OUT = FAMILIES_OUT.with_name("encode_speed_large_images.json")
#: Largest difference of an embedding's component.
TOLERANCE = 1e-5


# ---- what is encoded: (item, prompt name) ----


def captions(count: int) -> list:
    """COCO-like captions: 10.5 words in the mean, 7 to 25, most of them near 10."""
    dice = random.Random(0)
    lengths = [min(25, 7 + int(dice.gammavariate(2.2, 1.8))) for _ in range(count)]
    return [({"text": " ".join(dice.choices(WORDS, k=length))}, "text") for length in lengths]


def pictures(count: int, shapes: list = SHAPES) -> list[Image.Image]:
    """Random pictures of the usual shapes."""
    numbers = np.random.default_rng(0)
    return [draw_picture(numbers, shapes[i % len(shapes)]) for i in range(count)]


def fashioniq() -> list:
    """A gallery, and a query with two caption orders for each of its pictures."""
    items = []
    for picture in pictures(4, [(300, 400), (320, 240)]):
        items.append(({"image": picture}, "fashioniq-dress-gallery"))
        for text in ("is red, has stripes", "has stripes, is red"):
            items.append(({"image": picture, "text": text}, "fashioniq-dress-query"))
    return items


def cirr() -> list:
    """A gallery, and 1.8 queries for each of its pictures."""
    items = []
    for number, picture in enumerate(pictures(5)):
        items.append(({"image": picture}, "cirr-gallery"))
        for query in range(2 if number else 1):
            items.append(({"image": picture, "text": " ".join(WORDS[query : query + 9])}, "cirr-query"))
    return items


WORKS: dict[str, Callable[[], list]] = {
    "COCO-like captions": lambda: captions(256),
    "images of mixed shapes": lambda: [({"image": picture}, "image") for picture in pictures(8)],
    "FashionIQ-like": fashioniq,
    "CIRR-like": cirr,
}


def composed(count: int) -> list:
    """Images of mixed shapes, each with a text."""
    texts = [item["text"] for item, _ in captions(count)]
    images = pictures(count)
    return [({"image": image, "text": text}, "composed") for image, text in zip(images, texts, strict=True)]


def three_prompts() -> list:
    """One image in a gallery, and two queries about it."""
    return cirr()[2:5]


def family_works(images: int, size: tuple[int, int] | None = None) -> dict[str, Callable[[], list]]:
    """Returns what is encoded with each family, with so many single images.

    Args:
        images: How many single images.
        size: Width and height of all images, in place of the usual shapes; then captions are left out.
    """
    if size is not None:
        return _works_of_size(images, size)
    return {
        "COCO-like captions": lambda: captions(48),
        "images of mixed shapes": lambda: [({"image": picture}, "image") for picture in pictures(images)],
        "images with a text": lambda: composed(min(4, images)),
        "three prompts over one image": three_prompts,
    }


def _works_of_size(images: int, size: tuple[int, int]) -> dict[str, Callable[[], list]]:
    """Returns the works that show images, with images of one size."""
    shown, name = pictures(images, [size]), f"{size[0]}x{size[1]}"
    return {
        f"three prompts over one {name}": lambda: [({**item, "image": shown[0]}, how) for item, how in three_prompts()],
        f"images of {name}": lambda: [({"image": picture}, "image") for picture in shown],
    }


def image_size(text: str) -> tuple[int, int]:
    """Reads ``WIDTHxHEIGHT``."""
    width, height = map(int, text.split("x"))
    return width, height


# ---- the ways ----


def load_published(folder: Path, image_batch: int = IMAGE_BATCH) -> Way:
    """The published recipe, in batches with padding."""
    from transformers import LlavaNextForConditionalGeneration

    whole = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return published(whole, folder, image_batch)


def load_published_one_by_one(folder: Path) -> Way:
    """The same, but images one at a time, which pads nothing."""
    return load_published(folder, image_batch=1)


def load_stock(folder: Path) -> Way:
    """Stock sentence-transformers on the native export, same batches, one call for each prompt, as MTEB's wrapper."""
    from sentence_transformers import SentenceTransformer

    from e5v_st.hub.export import export

    native = folder.with_name(folder.name + "-native")
    if not native.is_dir():
        export(str(folder), str(native), native=True)
    model = SentenceTransformer(str(native), device="cpu")

    def encode(work: list) -> np.ndarray:
        rows = np.zeros((len(work), model.get_embedding_dimension()), np.float32)
        for name in {name for _, name in work}:
            index = [row for row, (_, own) in enumerate(work) if own == name]
            items = [work[row][0].get("image") if "text" not in work[row][0] else work[row][0] for row in index]
            size = TEXT_BATCH if name == "text" else IMAGE_BATCH
            rows[index] = model.encode(items, prompt_name=name, batch_size=size)
        return rows

    return encode


def load_ours(folder: Path) -> Way:
    """This package."""
    import e5v_st

    return ours(e5v_st.load(folder, device="cpu"))


WAYS = {
    "published": load_published,
    ONE_BY_ONE: load_published_one_by_one,
    "stock": load_stock,
    "ours": load_ours,
}


def count(encode: Way, work: list) -> dict[str, float]:
    """Counts passes through the language model, and the tokens of all its layers divided by their number."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    seen: list[tuple[int, int]] = []
    stock = LlamaAttention.forward

    def forward(self: LlamaAttention, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> object:
        seen.append((self.layer_idx, hidden_states.shape[:2].numel()))
        return stock(self, hidden_states, *args, **kwargs)

    LlamaAttention.forward = forward
    try:
        encode(work)
    finally:
        LlamaAttention.forward = stock
    layers = max(layer for layer, _ in seen) + 1
    return {
        "passes": sum(layer == 0 for layer, _ in seen),
        "tokens": sum(tokens for layer, tokens in seen if layer == 0),
        "tokens_of_a_layer": round(sum(tokens for _, tokens in seen) / layers),
    }


def peak_memory(folder: Path, way: str) -> float:
    """Peak memory in MiB, above what it has after loading, of a fresh process that encodes all works."""
    command = [sys.executable, __file__, "--only", way, "--folder", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.strip().splitlines()[-1])


def run_only(way: str, folder: Path) -> None:
    """Encodes all works in one way and prints the peak memory in MiB above what loading took (Linux)."""
    encode = WAYS[way](folder)
    encode(WORKS["COCO-like captions"]()[:8])  # what is made once, as threads and caches, is no part of the work
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    for make in WORKS.values():
        encode(make())
    print(resident("VmHWM") - before)


def resident(name: str) -> float:
    """Memory of this process in MiB: ``VmRSS`` now, or ``VmHWM``, its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def measure(folder: Path, runs: int) -> dict:
    """Times every work in every way, in turns."""
    loaded = {name: load(folder) for name, load in WAYS.items()}
    result = {}
    for name, make in WORKS.items():
        work = make()
        ways = {way: encode for way, encode in loaded.items() if "image" in work[0][0] or way != ONE_BY_ONE}
        outputs = {way: encode(work) for way, encode in ways.items()}
        difference = {way: float(np.abs(outputs[way] - outputs["published"]).max()) for way in ways}
        assert max(difference.values()) < TOLERANCE, f"{name}: the ways disagree, {difference}"
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(runs):
            for way, encode in ways.items():
                start = time.perf_counter()
                encode(work)
                times[way].append(time.perf_counter() - start)
        seconds = {way: statistics.median(values) for way, values in times.items()}
        result[name] = {
            "items": len(work),
            "seconds": seconds,
            "all_seconds": times,
            "times_as_fast": {way: seconds[way] / seconds["ours"] for way in ways if way != "ours"},
            "cost": {way: count(encode, work) for way, encode in ways.items()},
            "largest_difference": difference,
        }
        row = result[name]
        print(f"{name} ({len(work)} items)")
        for way in ways:
            cost = row["cost"][way]
            print(
                f"  {way:32}{seconds[way]:8.2f} s{seconds[way] / seconds['ours']:7.2f} x  {cost['passes']:5} passes"
                f"{cost['tokens_of_a_layer']:8} tokens a layer",
                flush=True,
            )
    return result


def measure_families(
    names: list[str], works: dict[str, Callable[[], list]], runs: int, out: Path, max_image_tokens: int | None = None
) -> None:
    """Measures families, and writes each to the file as soon as it is measured; others that stand there stay.

    Args:
        names: Keys of ``families.FAMILIES``.
        works: See :func:`family_works`.
        runs: Of each way.
        out: The JSON file.
        max_image_tokens: Of an image, in place of the family's default.
    """
    from e5v_st.model.prompts_e5v import PROMPTS

    lines = [prompt.replace("<sent>", " ".join(WORDS)) for prompt in PROMPTS.values()]
    print(f"{'':50}{'ours':>9}{'one at a time':>16}{'padded batches':>16}")
    for name in names:
        with tempfile.TemporaryDirectory() as temporary:
            found = measure_family(name, Path(temporary) / "model", works, lines, runs, max_image_tokens)
        known = json.loads(out.read_text(encoding="utf8")) if out.is_file() else {}
        title = name if max_image_tokens is None else f"{name}, at most {max_image_tokens} tokens"
        known[title] = {**how_measured(runs), **found}
        out.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n", encoding="utf8")


def how_measured(runs: int) -> dict:
    """Returns the command, the machine and how busy it is."""
    return {
        "command": " ".join(["python", "benchmarks/encode_speed.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32",
        "load_average": os.getloadavg()[0],
        "runs": runs,
    }


def main() -> None:
    """Measures, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="+", metavar="NAME", choices=families().FAMILIES, default=[])
    parser.add_argument("--images", type=int, default=6, help="single images; with --family alone")
    parser.add_argument("--image-size", type=image_size, metavar="WxH", help="of all images; with --family alone")
    parser.add_argument("--max-image-tokens", type=int, metavar="N", help="of an image; with --family alone")
    parser.add_argument("--threads", type=int, help="of torch; by default its own number")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.family:
        out = args.out or (LARGE_OUT if args.image_size else FAMILIES_OUT)
        works_of_families = family_works(args.images, args.image_size)
        measure_families(args.family, works_of_families, args.runs, out, args.max_image_tokens)
        return
    if args.only:
        run_only(args.only, args.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_checkpoint(Path(temporary) / "model")
        works = measure(folder, args.runs)
        memory = {way: peak_memory(folder, way) for way in WAYS}
    result = {
        **how_measured(args.runs),
        "works": works,
        "peak_memory_mib_above_loading": memory,
        "memory_of": {way: memory["ours"] / mib for way, mib in memory.items() if way != "ours"},
    }
    out = args.out or OUT
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")
    print(f"peak memory above loading, MiB: { {way: round(value) for way, value in memory.items()} }")


if __name__ == "__main__":
    main()
