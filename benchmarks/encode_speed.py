"""Speed and memory of encoding against the published recipe and stock sentence-transformers, on the same weights.

Makes a mid-size LLaVA-NeXT with random weights (real tile size and grid pinpoints; vocabulary and vision tower in about
the 8 B model's proportion to its language model), encodes the same items in each way, compares the embeddings, and
prints how much longer the others take. Each figure is the median of `--runs` runs; the ways take turns in each run.

    python benchmarks/encode_speed.py                 # writes benchmarks/results/encode_speed.json
    python benchmarks/encode_speed.py --dtype bfloat16 --device cuda --size 8b    # on a GPU, weights made there
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

OUT = Path(__file__).parent / "results" / "encode_speed.json"
GOLDEN = Path(__file__).parents[1] / "tests" / "data" / "goldens" / "realgrid"
SIZES = {
    "mid": {"layers": 6, "hidden": 512, "inner": 1408, "heads": 8, "kv": 2, "tower": (3, 192, 768)},
    "8b": {"layers": 32, "hidden": 4096, "inner": 14336, "heads": 32, "kv": 8, "tower": (24, 1024, 4096)},
}
SHAPES = [(640, 480), (640, 427), (500, 375), (500, 333), (333, 500), (320, 240), (480, 640), (300, 400)]
WORDS = [
    "a",
    "the",
    "man",
    "woman",
    "dog",
    "sits",
    "runs",
    "on",
    "in",
    "near",
    "red",
    "small",
    "street",
    "table",
    "ball",
]


# ---- what is encoded: (item, prompt name) ----


def captions(count: int) -> list:
    """COCO-like captions: 8 to 16 words."""
    dice = random.Random(0)
    return [({"text": " ".join(dice.choices(WORDS, k=dice.randint(8, 16)))}, "text") for _ in range(count)]


def pictures(count: int, shapes: list = SHAPES) -> list[Image.Image]:
    """Random pictures of the usual shapes."""
    numbers = np.random.default_rng(0)
    return [
        Image.fromarray(numbers.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize(shapes[i % len(shapes)])
        for i in range(count)
    ]


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


# ---- the ways ----


def make_checkpoint(folder: Path, size: str) -> Path:
    """Writes a random LLaVA-NeXT in the published format, with the golden checkpoint's tokenizer and processor."""
    import shutil

    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    torch.manual_seed(0)
    shape = SIZES[size]
    shutil.copytree(GOLDEN, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((GOLDEN / "config.json").read_text())
    layers, width, inner = shape["tower"]
    settings["vision_config"] |= {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": inner}
    settings["vision_config"]["num_attention_heads"] = width // 64
    settings["text_config"] |= {"num_hidden_layers": shape["layers"], "hidden_size": shape["hidden"]}
    settings["text_config"] |= {"intermediate_size": shape["inner"], "num_attention_heads": shape["heads"]}
    settings["text_config"] |= {"num_key_value_heads": shape["kv"]}
    config = LlavaNextConfig(**settings)
    model = LlavaNextForConditionalGeneration(config)
    model.resize_token_embeddings(config.image_token_id + 1, mean_resizing=False)
    model.save_pretrained(folder)
    return folder


def load_published(folder: Path, device: str, dtype: torch.dtype) -> Callable[[list], np.ndarray]:
    """README recipe of the published model: texts in batches of 32, images one at a time, all logits and layers."""
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    from e5v_st.prompts_e5v import PROMPTS, render

    model = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device).eval()
    settings = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = AutoProcessor.from_pretrained(folder, **settings)
    processor.tokenizer.padding_side = "left"

    def encode(work: list) -> np.ndarray:
        rows = []
        size = 1 if "image" in work[0][0] else 32
        for start in range(0, len(work), size):
            part = work[start : start + size]
            texts = [render(PROMPTS[name], "llama3", item.get("text", "")) for item, name in part]
            images = [item["image"] for item, _ in part if "image" in item] or None
            inputs = processor(text=texts, images=images, return_tensors="pt", padding=True).to(device, dtype)
            with torch.no_grad():
                states = model(**inputs, output_hidden_states=True, return_dict=True).hidden_states[-1][:, -1, :]
            rows.append(torch.nn.functional.normalize(states.float(), dim=-1).cpu())
        return torch.cat(rows).numpy()

    return encode


def load_stock(folder: Path, device: str, dtype: torch.dtype) -> Callable[[list], np.ndarray]:
    """Stock sentence-transformers on the native export, batches of 8, one call for each prompt, as MTEB's wrapper."""
    from sentence_transformers import SentenceTransformer

    from hub.export import export

    native = folder.with_name(folder.name + "-native")
    if not native.is_dir():
        export(str(folder), str(native), native=True)
    model = SentenceTransformer(str(native), device=device, model_kwargs={"dtype": dtype})

    def encode(work: list) -> np.ndarray:
        rows = np.zeros((len(work), model.get_embedding_dimension()), np.float32)
        for name in {name for _, name in work}:
            index = [row for row, (_, own) in enumerate(work) if own == name]
            items = [work[row][0].get("image") if "text" not in work[row][0] else work[row][0] for row in index]
            rows[index] = model.encode(items, prompt_name=name, batch_size=8)
        return rows

    return encode


def load_ours(folder: Path, device: str, dtype: torch.dtype) -> Callable[[list], np.ndarray]:
    """This package's ``encode_all``."""
    import e5v_st

    model = e5v_st.load(folder, device=device, model_kwargs={"dtype": dtype})

    def encode(work: list) -> np.ndarray:
        prompts = [e5v_st.PROMPTS[name] for _, name in work]
        return e5v_st.encode_all(model, [item for item, _ in work], prompt=prompts, progress=False)

    return encode


WAYS = {"published": load_published, "stock": load_stock, "ours": load_ours}


def count_tokens(encode: Callable, work: list) -> int:
    """Tokens that go through the language model's layers, padding included."""
    from transformers.models.llama.modeling_llama import LlamaModel

    seen = []
    stock = LlamaModel.forward

    def forward(self: LlamaModel, *args: object, **kwargs: object) -> object:
        seen.append(kwargs["inputs_embeds"].shape[:2].numel())
        return stock(self, *args, **kwargs)

    LlamaModel.forward = forward
    try:
        encode(work)
    finally:
        LlamaModel.forward = stock
    return sum(seen)


def peak_memory(folder: Path, way: str, args: argparse.Namespace) -> float:
    """Peak memory in MiB of a fresh process that encodes all works: of the GPU, or the process's own on a CPU."""
    command = [sys.executable, __file__, "--only", way, "--folder", str(folder)]
    command += ["--device", args.device, "--dtype", args.dtype, "--size", args.size]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.strip().splitlines()[-1])


def run_only(args: argparse.Namespace) -> None:
    """Encodes all works in one way and prints the peak memory in MiB above what loading took."""
    encode = WAYS[args.only](Path(args.folder), args.device, getattr(torch, args.dtype))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for make in WORKS.values():
        encode(make())
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(torch.cuda.max_memory_allocated() / 2**20 if args.device == "cuda" else (after - before) / 1024)


def measure(folder: Path, args: argparse.Namespace) -> dict:
    """Times every work in every way, in turns."""
    ways = {name: load(folder, args.device, getattr(torch, args.dtype)) for name, load in WAYS.items()}
    result = {}
    for name, make in WORKS.items():
        work = make()
        outputs = {way: encode(work) for way, encode in ways.items()}
        difference = {way: float(np.abs(outputs[way] - outputs["published"]).max()) for way in ways}
        assert max(difference.values()) < args.tolerance, f"{name}: the ways disagree, {difference}"
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(args.runs):
            for way, encode in ways.items():
                start = time.perf_counter()
                encode(work)
                times[way].append(time.perf_counter() - start)
        seconds = {way: statistics.median(values) for way, values in times.items()}
        result[name] = {
            "items": len(work),
            "seconds": seconds,
            "times_as_fast_as_published": seconds["published"] / seconds["ours"],
            "times_as_fast_as_stock": seconds["stock"] / seconds["ours"],
            "tokens": {way: count_tokens(encode, work) for way, encode in ways.items()},
            "largest_difference": difference,
        }
        print(json.dumps({name: result[name]}, indent=2), flush=True)
    return result


def main() -> None:
    """Measures, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest difference of an embedding's component")
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        run_only(args)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_checkpoint(Path(temporary) / "model", args.size)
        works = measure(folder, args)
        memory = {way: peak_memory(folder, way, args) for way in WAYS}
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    result = {
        "device": device,
        "machine": platform.machine(),
        "dtype": args.dtype,
        "size": args.size,
        "runs": args.runs,
    }
    result |= {"torch": torch.__version__, "works": works, "peak_memory_mib_above_loading": memory}
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf8")
    print(f"\n{'work':26}{'published':>12}{'stock':>10}{'ours':>10}{'x published':>13}{'x stock':>9}")
    for name, row in works.items():
        seconds = "".join(
            f"{row['seconds'][way]:{w}.2f}" for way, w in (("published", 12), ("stock", 10), ("ours", 10))
        )
        print(f"{name:26}{seconds}{row['times_as_fast_as_published']:13.2f}{row['times_as_fast_as_stock']:9.2f}")
    print(f"peak memory above loading, MiB: { {way: round(value) for way, value in memory.items()} }")


if __name__ == "__main__":
    main()
