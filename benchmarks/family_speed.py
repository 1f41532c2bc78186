"""Speed of encoding with each family of backbones, against plain transformers on the same weights.

The model of a family is random, of about 125 million parameters, and reads images at their real sizes
(``tests/families.py``). InternVL's and LLaVA-OneVision's images are cut into 4 and 9 tiles at most, Idefics 3's in 16.
*Plain* is what a family's model card does: its own processor and chat format, its model without a head and without a
cache; one item at a time, or in batches padded on the left. All three ways read images with the same settings.

On one thread, figures are processor time, which is the time of a quiet machine whatever else is running; the reading of
images in a thread of its own counts in full. On several threads they are time by the clock.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ways import IMAGE_BATCH, TEXT_BATCH, Way, ours

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

#: Largest difference of an embedding's component.
TOLERANCE = 2e-5
ONE, BATCHES, OURS = "one at a time", "in padded batches", "ours"


def save_mid(name: str, folder: Path, lines: Sequence[str], **changes: int) -> Path:
    """Writes the mid-size model of a family.

    Args:
        name: A key of ``families.FAMILIES``.
        folder: New.
        lines: What its tokenizer knows, so that a prompt has about as many tokens as with a real one.
        **changes: Of its sizes, see ``families.Sizes``.
    """
    return families().save(name, folder, _sizes(lines, **changes))


def families() -> Any:
    """Returns the module of the tests that builds them."""
    import families

    return families


def _sizes(lines: Sequence[str], **changes: int) -> Any:
    from dataclasses import replace

    return replace(families().MID, corpus=tuple(lines), **changes)


def plain(model: Any, processor: Any, made: Any, text_batch: int, image_batch: int) -> Way:
    """Plain transformers.

    Args:
        model: A family's, without its head.
        processor: The family's own.
        made: How the family writes a prompt, see ``families.family``.
        text_batch: Texts that are computed together.
        image_batch: Items with an image that are computed together.
    """
    from e5v_st.model.prompts_e5v import PROMPTS

    processor = copy.deepcopy(processor)
    processor.tokenizer.padding_side = "left"

    def states(part: list) -> torch.Tensor:
        images = [[item["image"]] for item, _ in part if "image" in item] or None
        texts = [families().render(made, PROMPTS[name], item.get("text"), int("image" in item)) for item, name in part]
        how = {"padding": len(part) > 1, "add_special_tokens": made.adds_bos}
        inputs = processor(text=texts, images=images, return_tensors="pt", **how)
        return model(**inputs, use_cache=False).last_hidden_state[:, -1]

    @torch.inference_mode()
    def encode(work: list) -> np.ndarray:
        size = image_batch if "image" in work[0][0] else text_batch
        rows = [states(work[start : start + size]) for start in range(0, len(work), size)]
        return torch.nn.functional.normalize(torch.cat(rows), dim=-1).numpy()

    return encode


def load_ways(
    name: str, folder: Path, lines: Sequence[str], max_image_tokens: int | None = None
) -> tuple[dict[str, Way], Any]:
    """Returns the three ways on the weights of a folder, and our model."""
    from transformers import AutoModel

    import e5v_st

    here = e5v_st.load(folder, device="cpu", max_image_tokens=max_image_tokens)
    stock = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    made, processor = families().family(name, _sizes(lines)), here[0].processor
    ways = {
        ONE: plain(stock, processor, made, 1, 1),
        BATCHES: plain(stock, processor, made, TEXT_BATCH, IMAGE_BATCH),
        OURS: ours(here),
    }
    return ways, here


def plan_of(transformer: Any, features: Any) -> list[tuple[int, int]]:
    """Returns tokens and prompts of each part of a batch that our language model computes together."""
    from e5v_st.model.generic_e5v import count_forked

    if features.get("lengths") is not None:
        return [(sum(features["lengths"]), len(features["lengths"]))]
    found = []
    for part in features.get("parts") or ():
        tokens = len(part.tree.ids)
        if transformer.sharing == "fork" and not len(part.images):
            lengths = [len(path) for path in part.tree.paths]
            same = count_forked(transformer.model, features, part.prompts, lengths, has_images=False)
            tokens = sum(lengths) - same * (len(lengths) - 1)
        found.append((tokens, len(part.prompts)))
    return found


def count_tokens(model: Any, work: list) -> dict[str, int]:
    """Counts tokens of prompts one by one, those that our language model computes, and those of the first's image."""
    from e5v_st.model.items_e5v import read_items
    from e5v_st.model.prompts_e5v import PROMPTS

    transformer = model[0]
    items = [read for item, name in work for read in read_items([item], PROMPTS[name])]
    features = transformer.collate(items, share=True)
    return {
        "tokens_one_by_one": int(features["attention_mask"].sum()),
        "tokens_of_ours": sum(tokens for tokens, _ in plan_of(transformer, features)),
        "tokens_of_an_image": int((features["input_ids"][0] == transformer.config.image_token_id).sum()),
    }


def measure_family(
    name: str,
    folder: Path,
    works: dict[str, Callable[[], list]],
    lines: Sequence[str],
    runs: int,
    max_image_tokens: int | None = None,
) -> dict:
    """Times every work in the three ways, in turns, and prints what it finds.

    Args:
        name: A key of ``families.FAMILIES``.
        folder: New.
        works: What is encoded.
        lines: See :func:`save_mid`.
        runs: Of each; the figures are their medians.
        max_image_tokens: See ``e5v_st.load``; all three ways read images so.

    Raises:
        AssertionError: If the ways disagree.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    ways, model = load_ways(name, save_mid(name, folder, lines), lines, max_image_tokens)
    found = {}
    for encode in ways.values():  # what is made once, as threads and caches, is no part of the work
        encode(next(iter(works.values()))()[:8])
    for title, make in works.items():
        work = make()
        times: dict[str, list[float]] = {way: [] for way in ways}
        outputs = {}
        for _ in range(runs):
            for way, encode in ways.items():
                start = clock()
                outputs[way] = encode(work)
                times[way].append(clock() - start)
        difference = max(float(np.abs(rows - outputs[ONE]).max()) for rows in outputs.values())
        assert difference <= TOLERANCE, f"{name}, {title}: the ways disagree by {difference}"
        seconds = {way: statistics.median(values) for way, values in times.items()}
        ratios = {way: seconds[way] / seconds[OURS] for way in (ONE, BATCHES)}
        row = "".join(f"{ratios[way]:14.2f} x" for way in (ONE, BATCHES))
        print(f"{name:18}{title:32}{seconds[OURS]:7.2f} s{row}   {difference:.0e}", flush=True)
        found[title] = {
            "items": len(work),
            **count_tokens(model, work),
            "clock": clock.__name__,
            "seconds": seconds,
            "all_seconds": times,
            "times_as_fast": ratios,
            "largest_difference": difference,
        }
    return {"parameters": sum(weight.numel() for weight in model.parameters()), "works": found}
