"""How near encoding and training come to the limit of the machine, and where the rest of the time goes, by family.

The model of a family is random, of about 125 million parameters, and reads images at their real sizes, see
``family_speed.py``. For each work, three things are put together in one run:

- *needed*: the matrix products that cannot be left out. Of the language model, those of the plan's tokens: each node of
  the tree once, and in the last layer keys and values of all, the rest of last tokens alone. Of the vision tower, those
  of each different image's patches. Attention counts by the pairs of query and key that see each other.
- *the limit*: the time that these products take alone, each timed with random numbers of its own shape and dtype in the
  same run. Attention is counted at the same rate of arithmetic.
- *the time* of a whole run, from items to embeddings, and its parts: matrix products and attention by kind of layer,
  what lies between them (norms, activations, rotary positions), reading images, tokenising and planning, all else.

A step of training needs, for each product, the gradient of its input too, and for a LoRA also that of its weights. It
is text-only, of 8 triplets, without activation checkpointing.

    python benchmarks/limit.py                                        # writes benchmarks/results/limit.json
    python benchmarks/limit.py --family qwen3_vl --dtype bfloat16     # prints these alone
    python benchmarks/limit.py --wide                                 # writes …/limit_wide.json

With ``--wide``, one family has layers as wide as those of a model of 3 billion parameters, with heads of 128, and only
a few of them: what a layer does besides its products is less there.

Embeddings are compared with those of one item at a time that share nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from encode_speed import captions, composed, pictures, three_prompts
from family_speed import plan_of, save_mid
from random_model import WORDS
from torch import nn
from train_speed import prepare_ours, triplets
from ways import ours

OUT = Path(__file__).parent / "results" / "limit.json"
WIDE_OUT = OUT.with_name("limit_wide.json")
#: Changes of ``families.MID`` for ``--wide``: widths of Qwen2.5-VL-3B, with fewer layers in the same proportion.
WIDE = {"width": 2048, "inner": 11008, "layers": 5, "heads": 16, "key_heads": 2, "head": 128}
WIDE |= {"vision": 1280, "vision_inner": 3420, "vision_layers": 6, "vision_heads": 16}
WIDE_FAMILY = "qwen2_5_vl"
#: Triplets of a training step.
ROWS = 8
#: One of each kind of language model, tower and way of sharing.
FAMILIES = (
    *("llava_next-mistral", "llava", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "smolvlm-instruct", "internvl"),
    *("gemma3", "gemma4", "mistral3"),
)
DTYPES = ("float32", "bfloat16")
WORKS: dict[str, Callable[[], list]] = {
    "captions": lambda: captions(64),
    "single images": lambda: [({"image": picture}, "image") for picture in pictures(2)],
    "composed queries": lambda: [*composed(1), *three_prompts()[1:]],
}
TRAINING = "a training step"
#: Least agreement with one item at a time: of components in float32, of cosines in bfloat16.
TOLERANCE, LEAST_COSINE = 2e-5, 0.99
#: Linear layers of the last layer whose results all later tokens read.
_READ_BY_ALL = ("k_proj", "v_proj")
#: Seconds for which a shape is timed at least, and how often.
_SHAPE_SECONDS, _SHAPE_RUNS = 0.05, 5

#: Rows, inputs and outputs of a product with a matrix of weights.
Shape = tuple[int, int, int]


@dataclass
class Meter:
    """What happens in one run of a work.

    Attributes:
        seconds: By part; parts may lie in each other.
        called: The linear layers that ran, with the rows of each call.
        pairs: Arithmetic of attention, by ``"vision"`` and ``"language"``.
        nodes: Of each batch, tokens that go through the language model, and prompts whose last token is read.
    """

    seconds: Counter[str] = field(default_factory=Counter)
    called: dict[str, list[int]] = field(default_factory=dict)
    pairs: Counter[str] = field(default_factory=Counter)
    nodes: list[tuple[int, int]] = field(default_factory=list)
    in_vision: bool = False

    @property
    def side(self) -> str:
        """Where the run is now."""
        return "vision" if self.in_vision else "language"

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Adds the time of a block to a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Times each call of a method."""
        own = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.timing(part):
                return own(*args, **kwargs)

        setattr(owner, name, timed)


def watch(model: Any, meter: Meter) -> None:
    """Makes a meter see what a model does."""
    transformer = model[0]
    meter.wrap(transformer.reader, "read", "reading images")
    meter.wrap(transformer, "collate", "collating")
    meter.wrap(transformer, "forward", "forward")
    stock, see = transformer.model.get_image_features, meter.timing

    def image_features(*args: Any, **kwargs: Any) -> Any:
        meter.in_vision = True
        try:
            with see("vision"):
                return stock(*args, **kwargs)
        finally:
            meter.in_vision = False

    transformer.model.get_image_features = image_features
    transformer.register_forward_pre_hook(lambda module, args: meter.nodes.extend(plan_of(transformer, args[0])))
    for name, module in transformer.model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
            _watch_product(name, module, meter)


def _watch_product(name: str, module: Any, meter: Meter) -> None:
    starts: list[float] = []
    module.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()))

    def after(_: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
        meter.seconds[f"{meter.side} matrices"] += time.perf_counter() - starts.pop()
        channels = output.shape[-1] if isinstance(module, nn.Linear) else output.shape[1]
        meter.called.setdefault(name, []).append(output.numel() // channels)

    module.register_forward_hook(after)


@contextmanager
def watching_attention(meters: Sequence[Meter]) -> Iterator[None]:
    """Times attention, for the meter that comes first."""
    stock = torch.nn.functional.scaled_dot_product_attention

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        meter = meters[0]
        mask = args[0] if args else kwargs.get("attn_mask")
        with meter.timing(f"{meter.side} attention"):
            found = stock(query, key, value, *args, **kwargs)
        queries, keys = query.shape[-2], key.shape[-2]
        if mask is not None and mask.dtype == torch.bool:
            seen = int(mask.expand(query.shape[0], -1, -1, -1)[:, 0].sum())
        elif kwargs.get("is_causal"):
            seen = query.shape[0] * (queries * (keys - queries) + queries * (queries + 1) // 2)
        else:
            seen = query.shape[0] * queries * keys
        meter.pairs[meter.side] += 4 * query.shape[1] * seen * query.shape[-1]
        return found

    torch.nn.functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = stock


# ---- what is needed ----


def needed(model: Any, meter: Meter) -> Counter[tuple[str, Shape]]:
    """Returns the products that cannot be left out, with their numbers; those of a side are counted under its name."""
    stock = model[0].model
    decoder = stock.get_decoder()
    language = {id(module) for module in decoder.modules()}
    last = {id(module) for module in decoder.layers[-1].modules()}
    found: Counter[tuple[str, Shape]] = Counter()
    for name, module in stock.named_modules():
        if name not in meter.called:
            continue
        outs, ins = module.weight.shape[0], module.weight[0].numel()
        if id(module) not in language:
            found.update(("vision", (rows, ins, outs)) for rows in meter.called[name])
            continue
        for nodes, prompts in meter.nodes:
            of_last = id(module) in last and not name.endswith(_READ_BY_ALL)
            found["language", (prompts if of_last else nodes, ins, outs)] += 1
    return found


class Rates:
    """Times products of weights by their shapes; each shape once."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.known: dict[Shape, float] = {}

    def seconds(self, shape: Shape) -> float:
        """Returns the median time of a product."""
        if shape not in self.known:
            rows, ins, outs = shape
            states = torch.rand(rows, ins).sub_(0.5).to(self.dtype)
            weights = [torch.rand(outs, ins).sub_(0.5).to(self.dtype) for _ in range(2)]
            times: list[float] = []
            with torch.inference_mode():
                for weight in weights:
                    torch.nn.functional.linear(states, weight)
                while len(times) < _SHAPE_RUNS or sum(times) < _SHAPE_SECONDS:
                    start = time.perf_counter()
                    torch.nn.functional.linear(states, weights[len(times) % 2])
                    times.append(time.perf_counter() - start)
            self.known[shape] = statistics.median(times)
        return self.known[shape]


def limit_of(products: Counter[tuple[str, Shape]], pairs: Counter[str], rates: Rates) -> dict[str, Any]:
    """Returns the least time by kind of layer, and the rate of arithmetic that it stands for.

    Args:
        products: See :func:`needed`.
        pairs: Arithmetic of attention.
        rates: Times of products.
    """
    least: Counter[str] = Counter()
    arithmetic: Counter[str] = Counter()
    for (side, shape), count in products.items():
        least[f"{side} matrices"] += count * rates.seconds(shape)
        arithmetic[side] += count * 2 * int(np.prod(shape))
    rate = sum(arithmetic.values()) / sum(least.values())
    for side, number in pairs.items():
        least[f"{side} attention"] = number / rate
    return {"seconds": sum(least.values()), "parts": dict(least), "gflops": rate / 1e9, "attention": dict(pairs)}


# ---- the works ----


def parts_of(total: float, seconds: Counter[str]) -> dict[str, float]:
    """Returns parts that lie beside each other, whose sum is the total."""
    found = {name: seconds[name] for name in seconds if name.endswith((" matrices", " attention"))}
    vision = sum(value for name, value in found.items() if name.startswith("vision"))
    language = sum(found.values()) - vision
    found["vision, between"] = seconds["vision"] - vision
    found["language, between"] = seconds["forward"] - seconds["vision"] - language
    found["reading images"] = seconds["reading images"]
    found["tokenising and planning"] = seconds["collating"] - seconds["reading images"]
    found["all else"] = total - seconds["forward"] - seconds["collating"]
    return found


def measure_encoding(model: Any, work: list, runs: int, rates: Rates, meters: list[Meter]) -> dict[str, Any]:
    """Measures a work in the median of several runs, after one to warm up.

    Args:
        model: As :func:`watch` was told of it.
        work: Items, each with its prompt's name.
        runs: How many.
        rates: Times of products.
        meters: The first one is filled anew in each run.
    """
    encode, meter = ours(model), meters[0]
    expected = _one_by_one(model, work)
    seen = []
    for number in range(runs + 1):
        meter.seconds.clear(), meter.called.clear(), meter.pairs.clear(), meter.nodes.clear()
        start = time.perf_counter()
        found = encode(work)
        total = time.perf_counter() - start
        if number:
            seen.append((total, parts_of(total, meter.seconds)))
    _check(found, expected, model[0].model.dtype)
    total, parts = sorted(seen, key=lambda pair: pair[0])[len(seen) // 2]
    least = limit_of(needed(model, meter), meter.pairs, rates)
    tokens = sum(nodes for nodes, _ in meter.nodes)
    every = [each for each, _ in seen]
    return {"seconds": total, "all_seconds": every, "tokens": tokens, "parts": parts, "limit": least}


def _one_by_one(model: Any, work: list) -> np.ndarray:
    model[0].share_prefixes = False
    try:
        return np.concatenate([ours(model)([pair]) for pair in work])
    finally:
        model[0].share_prefixes = True


def _check(found: np.ndarray, expected: np.ndarray, dtype: torch.dtype) -> None:
    difference, cosine = float(np.abs(found - expected).max()), float((found * expected).sum(1).min())
    assert cosine >= LEAST_COSINE, f"an embedding has a cosine of {cosine} with that of its item alone"
    assert dtype != torch.float32 or difference <= TOLERANCE, f"the ways disagree by {difference}"


def measure_training(folder: Path, dtype: str, runs: int, rates: Rates, meters: list[Meter]) -> dict[str, Any]:
    """Measures steps of text-only training; see :func:`measure_encoding`."""
    model, columns_of, loss_of, optimizer = prepare_ours(folder, ROWS)
    model[0].model.to(getattr(torch, dtype))
    meters[0] = meter = Meter()
    for name, module in model[0].model.named_modules():
        if isinstance(module, nn.Linear):
            _watch_product(name, module, meter)
    seen, tokens = [], 0
    for whole in triplets(runs):
        batch = whole[:ROWS]
        meter.seconds.clear(), meter.called.clear(), meter.pairs.clear()
        start = time.perf_counter()
        columns = columns_of(batch)
        tokens = sum(int(column["attention_mask"].sum()) for column in columns)
        loss = loss_of(columns, None)
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        assert np.isfinite(loss.item())
        end = time.perf_counter()
        parts = {"forward": forward - start, "backward": backward - forward, "optimizer": end - backward}
        seen.append((end - start, parts))
    products: Counter[tuple[str, Shape]] = Counter()
    for name, module in model[0].model.named_modules():
        if meter.called.get(name):
            outs, ins = module.weight.shape
            products["language", (tokens, ins, outs)] += 1
            products["language", (tokens, outs, ins)] += 1  # the gradient of its input
            if module.weight.requires_grad:
                products["language", (outs, tokens, ins)] += 1  # and of its weights
    least = limit_of(products, Counter({side: 3 * number for side, number in meter.pairs.items()}), rates)
    total, parts = sorted(seen[1:], key=lambda pair: pair[0])[len(seen[1:]) // 2]
    every = [each for each, _ in seen[1:]]
    return {"seconds": total, "all_seconds": every, "tokens": tokens, "parts": parts, "limit": least}


def measure_family(
    name: str, dtypes: Sequence[str], works: Sequence[str], runs: int, sizes: dict[str, int]
) -> dict[str, Any]:
    """Measures all works of a family, and prints them; ``sizes`` are changes of ``families.MID``."""
    import e5v_st
    from e5v_st import PROMPTS

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as parent:
        folder = save_mid(name, Path(parent) / "model", [" ".join(WORDS), *PROMPTS.values()], **sizes)
        for dtype in dtypes:
            rates, meters = Rates(getattr(torch, dtype)), [Meter()]
            found[dtype] = {}
            with watching_attention(meters):
                model = e5v_st.load(folder, device="cpu", model_kwargs={"dtype": dtype})
                watch(model, meters[0])
                for title in works:
                    if title == TRAINING:
                        del model
                        found[dtype][title] = measure_training(folder, dtype, runs, rates, meters)
                    else:
                        found[dtype][title] = measure_encoding(model, WORKS[title](), runs, rates, meters)
                    show(name, dtype, title, found[dtype][title])
    return found


def show(name: str, dtype: str, title: str, row: dict[str, Any]) -> None:
    """Prints a work: the share of the limit that is reached, and where the time goes, in parts of a hundred."""
    row["share"] = row["limit"]["seconds"] / row["seconds"]
    parts = {part: 100 * value / row["seconds"] for part, value in row["parts"].items()}
    shares = ", ".join(f"{part} {share:.0f}" for part, share in parts.items() if share >= 0.5)
    print(
        f"{name:20}{dtype:10}{title:18}{row['seconds']:7.2f} s  limit {row['limit']['seconds']:6.2f} s  "
        f"{row['share']:.2f}  {row['limit']['gflops']:4.0f} GFLOP/s  {shares}",
        flush=True,
    )


def main() -> None:
    """Measures, prints the table and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", metavar="NAME", help="measure these alone; the others stay in the file")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--work", nargs="+", choices=[*WORKS, TRAINING], default=[*WORKS, TRAINING])
    parser.add_argument("--wide", action="store_true", help=f"a {WIDE_FAMILY} of few wide layers")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=5, help="runs of each work; figures are of the median one")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    everything = args.work == [*WORKS, TRAINING] and args.dtype == list(DTYPES)
    names, sizes = ([WIDE_FAMILY], WIDE) if args.wide else (args.family or FAMILIES, {})
    found = {name: measure_family(name, args.dtype, args.work, args.runs, sizes) for name in names}
    if everything:  # machine, load and runs are those of the last run
        out = WIDE_OUT if args.wide else OUT
        known = json.loads(out.read_text(encoding="utf8"))["families"] if args.family and out.is_file() else {}
        result = {
            "machine": f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}",
            "load_average": os.getloadavg()[0],
            "runs": args.runs,
            "families": known | found,
        }
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
