"""Encoding on a GPU with an 8 B model of random weights, made on the device: rates, and the share of the card they use.

The published README's recipe (texts in batches of 32; images in batches of 8 with padding, and one at a time) and this
package's ``encode_all`` run on the same weights in one process, in turns; their embeddings are compared. The share of
the card is the arithmetic of the tokens that must be computed (matrix products of the layers, attention, vision tower)
per second, over what the card does in a plain product of two 8192 x 8192 matrices.

    python benchmarks/gpu_encode.py                             # writes benchmarks/results/gpu_encode.json
    python benchmarks/gpu_encode.py --device cpu --size mid     # tries the script without a GPU; writes nothing
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_model import (
    LANGUAGE,
    LANGUAGE_8B,
    TOWER,
    TOWER_8B,
    VOCABULARY,
    VOCABULARY_8B,
    WORDS,
    draw_picture,
    write_folder,
)
from ways import ONE_BY_ONE, ours, published

OUT = Path(__file__).parent / "results" / "gpu_encode.json"
#: Changes of the language model's and the tower's configuration.
SIZES = {
    "8b": ({**LANGUAGE_8B, "vocab_size": VOCABULARY_8B}, TOWER_8B),
    "mid": ({**LANGUAGE, "vocab_size": VOCABULARY}, TOWER),
}
COUNTS = {"8b": {"texts": 4096, "images": 64, "composed": 32}, "mid": {"texts": 32, "images": 2, "composed": 1}}
CHANGES = ("is red, has stripes", "has stripes, is red")
#: Least cosine between the two ways' embeddings: bfloat16 rounds each product differently in batches.
LEAST_COSINE = 0.98


def load(folder: Path, device: str) -> tuple[Any, Any]:
    """Returns the published class of model, and ours, with the same random weights in bfloat16 (float32 on a CPU)."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    from e5v_st.model.modeling_e5v import E5VTransformer

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(device):
        config = LlavaNextConfig.from_pretrained(folder)
        whole = LlavaNextForConditionalGeneration._from_config(config, dtype=dtype).eval()

    class Random(E5VTransformer):
        def _load_model(self, *args: Any, **kwargs: Any) -> Any:
            return whole.model

    transformer = Random(str(folder))
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken"), Normalize()]
    return whole, SentenceTransformer(modules=modules, device=device)


def works(counts: dict[str, int]) -> dict[str, list]:
    """Items and their prompts' names."""
    import random

    dice, noise = random.Random(0), np.random.default_rng(0)

    composed = []
    for _ in range(counts["composed"]):
        image = draw_picture(noise, (300, 400))
        composed.append(({"image": image}, "fashioniq-dress-gallery"))
        composed += [({"image": image, "text": change}, "fashioniq-dress-query") for change in CHANGES]
    texts = [" ".join(dice.choices(WORDS, k=dice.randint(8, 16))) for _ in range(counts["texts"])]
    return {
        "texts": [({"text": text}, "text") for text in texts],
        "images": [({"image": draw_picture(noise, (640, 480))}, "image") for _ in range(counts["images"])],
        "composed": composed,
    }


def needed_flops(model: Any, work: list) -> float:
    """Arithmetic that the work needs: every distinct prefix, suffix and image once."""
    from e5v_st import PROMPTS
    from e5v_st.model.items_e5v import read_items
    from e5v_st.model.llava_next_e5v import count_tiles

    transformer = model[0]
    language, tower = transformer.model.language_model, transformer.model.vision_tower
    config = transformer.config
    items = [read_items([item], PROMPTS[name])[0] for item, name in work]
    trees = [part.tree for part in transformer.collate(items, share=True)["parts"]]
    layers, last = sum(p.numel() for p in language.layers[:-1].parameters()), language.layers[-1]
    keys_and_values = sum(
        p.numel() for part in (last.self_attn.k_proj, last.self_attn.v_proj) for p in part.parameters()
    )
    width = (config.text_config.num_hidden_layers - 1) * config.text_config.hidden_size
    images = {key: image for item in items for key, image in zip(item.image_keys, item.images, strict=True)}
    tiles = sum(count_tiles(image.height, image.width, config) for image in images.values())
    patches = tiles * ((config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1)
    flops = 2.0 * sum(p.numel() for p in tower.parameters()) * patches
    flops += 2.0 * (layers + keys_and_values) * sum(len(tree.ids) for tree in trees)
    flops += 4.0 * width * sum(float((tree.positions + 1).sum()) for tree in trees)
    flops += 2.0 * sum(p.numel() for p in last.parameters()) * len(items)
    return flops


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    side = 8192 if device != "cpu" else 1024
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = [seconds(lambda: one @ other, device) for _ in range(20)]
    return 2.0 * side**3 / statistics.median(times[5:])


def seconds(work: Callable[[], Any], device: str) -> float:
    """Seconds that a call takes, the device's work included."""
    wait = torch.cuda.synchronize if device != "cpu" else (lambda: None)
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def main() -> None:
    """Measures, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=SIZES, default="8b")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_folder(folder, *SIZES[args.size])
        whole, model = load(folder, args.device)
        ways = {
            "published": published(whole, folder),
            ONE_BY_ONE: published(whole, folder, image_batch=1),
            "ours": ours(model),
        }
        rate = matrix_rate(args.device, whole.dtype)
        result: dict[str, Any] = {
            "command": " ".join(["python", "benchmarks/gpu_encode.py", *sys.argv[1:]]),
            "device": "CPU" if args.device == "cpu" else torch.cuda.get_device_name(args.device),
            "torch": torch.__version__,
            "dtype": str(whole.dtype),
            "matrix_tflops": rate / 1e12,
            "works": {},
        }
        for name, work in works(COUNTS[args.size]).items():
            chosen = {way: encode for way, encode in ways.items() if "image" in work[0][0] or way != ONE_BY_ONE}
            outputs = {way: encode(work) for way, encode in chosen.items()}
            least = min(float((output * outputs["ours"]).sum(1).min()) for output in outputs.values())
            assert least > LEAST_COSINE, f"{name}: the ways disagree, cosine {least}"
            times = {way: [] for way in chosen}
            for _ in range(args.runs):
                for way, encode in chosen.items():
                    times[way].append(seconds(partial(encode, work), args.device))
            medians = {way: statistics.median(values) for way, values in times.items()}
            result["works"][name] = {
                "items": len(work),
                "items_per_second": {way: len(work) / value for way, value in medians.items()},
                "times_as_fast": {way: medians[way] / medians["ours"] for way in medians if way != "ours"},
                "share_of_matrix_rate": needed_flops(model, work) / medians["ours"] / rate,
                "least_cosine": least,
            }
            print(name, json.dumps(result["works"][name], indent=1), flush=True)
    if args.device != "cpu":
        result["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
