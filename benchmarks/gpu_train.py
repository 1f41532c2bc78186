"""A training recipe on a GPU with an 8 B model of random weights: peak memory, tokens per second, share of the card.

Makes the language model's weights on the device and writes them in the published format (17 GB of disk), writes random
triplets of NLI's lengths, and runs ``training/train_nli.py`` itself for some steps. The share of the card is the
arithmetic of the step (forward and backward through frozen layers, twice forward where activations are recomputed, once
more where gradients are cached) over what the card does in a plain matrix product.

    python benchmarks/gpu_train.py                              # writes benchmarks/results/gpu_train.json
    python benchmarks/gpu_train.py --recipe single_gpu_80gb
    python benchmarks/gpu_train.py --device cpu --size mid      # tries the script without a GPU; writes nothing
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from gpu_encode import SIZES, matrix_rate
from random_model import draw_triplet, write_folder

OUT = Path(__file__).parent / "results" / "gpu_train.json"
SHARD = 2 * 2**30


def write_weights(folder: Path, device: str, dtype: torch.dtype) -> int:
    """Writes the language model's weights, drawn on the device; returns the number of those of its layers."""
    from safetensors.torch import save_file
    from transformers import AutoModel, LlavaNextConfig

    config = LlavaNextConfig.from_pretrained(folder)
    with torch.device("meta"):
        shapes = {
            f"language_model.model.{name}": weight.shape
            for name, weight in AutoModel.from_config(config.text_config).named_parameters()
        }
    torch.manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, shape in shapes.items():
        if sum(weight.nbytes for weight in shards[-1].values()) > SHARD:
            shards.append({})
        drawn = torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape, device=device, dtype=dtype)
        shards[-1][name] = drawn.to("cpu", dtype)
    places = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    size = sum(weight.nbytes for shard in shards for weight in shard.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(shape.numel() for name, shape in shapes.items() if ".layers." in name)


def write_triplets(file: Path, rows: int) -> None:
    """Writes NLI-like triplets."""
    dice = random.Random(0)
    file.write_text("".join(json.dumps(draw_triplet(dice)) + "\n" for _ in range(rows)))


def train(folder: Path, data: Path, args: argparse.Namespace) -> tuple[list[float], list[int]]:
    """Runs the script; returns the seconds of each step, and the tokens of each."""
    from e5v_st.training import train_nli
    from e5v_st.training.model import TrainableTransformer
    from e5v_st.training.stopping import StopOnSignal

    starts: list[float] = []
    tokens: list[int] = []
    stock = TrainableTransformer.forward

    def forward(self: Any, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        if torch.is_grad_enabled():  # gradient caching runs every text once without, once with
            tokens[-1] += int(features["attention_mask"].sum())
        return stock(self, features, **kwargs)

    def begin(self: Any, *_: Any, **__: Any) -> None:
        if args.device != "cpu":
            torch.cuda.synchronize()
        starts.append(time.perf_counter())
        tokens.append(0)

    TrainableTransformer.forward, StopOnSignal.on_step_begin = forward, begin
    words = [args.recipe, "--model", str(folder), "--data", str(data), "--output_dir", str(folder.with_name("run"))]
    words += ["--max_steps", str(args.steps), "--save_strategy", "no", "--disable_tqdm", "true"]
    if args.device == "cpu":
        words += ["--batch_size", "8", "--mini_batch_size", "4", "--bits", "32"]
    code = train_nli.main(words)
    assert code == 0, f"the training ended with {code}"
    return [after - before for before, after in pairwise(starts)], tokens


def main() -> None:
    """Measures, prints and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="single_gpu_24gb")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--size", choices=SIZES, default="8b")
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_folder(folder, *SIZES[args.size])
        layers = write_weights(folder, args.device, dtype)
        data = folder.with_name("triplets.jsonl")
        write_triplets(data, 768 * (args.steps + 1))
        rate = matrix_rate(args.device, dtype)
        if args.device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds, tokens = train(folder, data, args)
        shutil.rmtree(folder)
    step, count = statistics.median(seconds[1:]), statistics.median(tokens[1:-1])
    # Forward 2, backward through frozen weights 2, activations recomputed 2, the pass of gradient caching 2
    result = {
        "command": " ".join(["python", "benchmarks/gpu_train.py", *sys.argv[1:]]),
        "device": "CPU" if args.device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "recipe": args.recipe,
        "seconds_of_a_step": step,
        "tokens_of_a_step": count,
        "tokens_per_second": count / step,
        "matrix_tflops": rate / 1e12,
        "share_of_matrix_rate": 8.0 * layers * count / step / rate,
        "peak_memory_gib": 0.0 if args.device == "cpu" else torch.cuda.max_memory_allocated() / 2**30,
    }
    print(json.dumps(result, indent=1))
    if args.device != "cpu":
        OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
