"""vLLM's way of encoding, in a process and an environment of its own; ``beside_vllm.py`` starts it.

vLLM pins its own torch and transformers, which this package's need not be, so nothing of this package is imported here,
and what goes to and fro is lists of plain numbers and bytes. Written from the source of vLLM 0.33.0.

What vLLM is given is what it does best: a list of all prompts in one call, as token ids, and the images as Pillow has
them; its own batching; prefix caching. No run may find anything that an earlier run has left, so three caches are
emptied before each: that of prefixes, that of preprocessed images, and that of the vision tower's outputs.
"""

from __future__ import annotations

import sys
import time
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from typing import Any

REPORTED = ("vllm", "torch", "transformers")


def open_llm(folder: str, dtype: str, memory: float, threads: int) -> Any:
    """Loads a native export for pooling.

    Args:
        folder: The model's. Its last token is pooled and normalised, as its ``modules.json`` says too.
        dtype: Of the weights, by name.
        memory: Share of the card's memory that vLLM may take for weights, activations and its cache.
        threads: Threads that preprocess images. With several, vLLM wants its cache of preprocessed images to be off.
    """
    from vllm import LLM
    from vllm.config import PoolerConfig

    several = {"renderer_num_workers": threads, "mm_processor_cache_gb": 0} if threads > 1 else {}
    return LLM(
        model=folder,
        runner="pooling",
        dtype=dtype,
        enable_prefix_caching=True,
        gpu_memory_utilization=memory,
        limit_mm_per_prompt={"image": 1},
        pooler_config=PoolerConfig(seq_pooling_type="LAST", use_activation=True),
        **several,
    )


def empty_caches(llm: Any) -> None:
    """Empties what an earlier run has left; see above."""
    if not llm.reset_prefix_cache():
        raise RuntimeError("vLLM has not emptied its cache of prefixes: a run would measure what another has left")
    llm.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()


def make_prompts(rows: list[tuple[list[int], int | None]], images: list[tuple[int, int, bytes]]) -> list[dict]:
    """Returns prompts as vLLM takes them.

    Args:
        rows: The token ids of each prompt, with one id for its image, and the image's place in ``images``.
        images: Width, height and RGB bytes of each.
    """
    from PIL import Image

    opened = [Image.frombytes("RGB", (width, height), data) for width, height, data in images]
    return [
        {"prompt_token_ids": ids} | ({} if place is None else {"multi_modal_data": {"image": opened[place]}})
        for ids, place in rows
    ]


def encode(llm: Any, prompts: list[dict]) -> dict[str, Any]:
    """Embeds prompts with empty caches.

    Returns:
        ``rows`` (float32 bytes), ``seconds``, ``tokens`` of all prompts with those of their images, and how many of
        them were ``cached``: found in the cache of prefixes.
    """
    import numpy as np

    empty_caches(llm)
    start = time.perf_counter()
    outputs = llm.embed(prompts, use_tqdm=False)
    rows = np.array([output.outputs.embedding for output in outputs], dtype="float32")
    seconds = time.perf_counter() - start
    return {
        "rows": rows.tobytes(),
        "seconds": seconds,
        "tokens": sum(len(output.prompt_token_ids) for output in outputs),
        "cached": sum(output.num_cached_tokens for output in outputs),
    }


def serve(calls: Connection) -> None:
    """Answers calls until there is none: ``("open", arguments)``, ``("work", arguments)`` or ``("encode", None)``."""
    try:
        version("vllm")
    except PackageNotFoundError:
        calls.send({"fault": "vllm"})
        return
    calls.send({name: version(name) for name in REPORTED} | {"python": sys.version.split()[0]})
    llm, prompts = None, []
    while True:
        try:
            name, arguments = calls.recv()
        except EOFError:
            return
        if name == "open":
            llm = open_llm(**arguments)
            calls.send(None)
        elif name == "work":
            prompts = make_prompts(**arguments)
            calls.send(None)
        else:
            calls.send(encode(llm, prompts))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
