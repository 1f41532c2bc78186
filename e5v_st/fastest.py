"""The dtype ``"fastest"``: bfloat16 where this CPU computes it at least 1.5 times as fast as float32, else float32.

How fast it is, is measured once, in about a second, and remembered for the machine, the version of torch and the number
of threads. On a GPU it is bfloat16, as by default. What bfloat16 changes is measured with the model itself: the cosine
between embeddings of the same items in both.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import write_json
from .processes import rank

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

FASTEST = "fastest"
#: How many times as fast bfloat16 must be: it rounds to three digits, which should be worth something.
WORTH = 1.5
#: Tokens, and the sizes of a matrix: those of one layer of a model of 0.5 to 2 billion parameters.
_TOKENS, _WIDE, _NARROW = 512, 4096, 1024
#: Seconds that measuring takes.
_SECONDS = 1.0


def choose_dtype(device: str | None = None) -> str:
    """Returns the dtype that is fastest on a device, and prints why.

    Args:
        device: Of torch; a GPU if there is one.

    Returns:
        ``"bfloat16"`` or ``"float32"``.

    Example:
        >>> choose_dtype("cpu") in ("bfloat16", "float32")  # doctest: +ELLIPSIS
        on this CPU, bfloat16 is ... times as fast as float32: the dtype is ...
        True
    """
    import torch

    if torch.cuda.is_available() and not str(device or "cuda").startswith("cpu"):
        return "bfloat16"
    gain = _remembered_gain()
    chosen = "bfloat16" if gain >= WORTH else "float32"
    if rank() == 0:
        print(f"on this CPU, bfloat16 is {gain:.1f} times as fast as float32: the dtype is {chosen}", flush=True)
    return chosen


def _remembered_gain() -> float:
    """Returns how many times as fast bfloat16 is, measured now if it was not before."""
    import torch

    file = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "e5v" / "bfloat16.json"
    machine = f"{platform.node()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    try:
        known = json.loads(file.read_text(encoding="utf8"))
        return float(known[machine])
    except (OSError, ValueError, KeyError, TypeError):  # not measured yet, or damaged
        gain = measure_gain()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(file.read_text(encoding="utf8")) if file.is_file() else {}
        write_json(file, {**known, machine: round(gain, 2)})
    except (OSError, ValueError, TypeError):  # it is measured again next time
        pass
    return gain


def measure_gain() -> float:
    """Measures how many times as fast this CPU multiplies matrices in bfloat16 as in float32, in turns."""
    import torch

    dtypes = (torch.float32, torch.bfloat16)
    pairs = [(torch.ones(_TOKENS, _NARROW, dtype=dtype), torch.ones(_WIDE, _NARROW, dtype=dtype)) for dtype in dtypes]
    best = [float("inf")] * len(pairs)
    start = time.perf_counter()
    with torch.inference_mode():
        while time.perf_counter() - start < _SECONDS or max(best) == float("inf"):
            for place, (states, weight) in enumerate(pairs):
                before = time.perf_counter()
                torch.nn.functional.linear(states, weight)
                best[place] = min(best[place], time.perf_counter() - before)
    return best[0] / best[1]


def load_fastest(
    load: Callable[..., SentenceTransformer], model_kwargs: dict[str, Any], **kwargs: Any
) -> SentenceTransformer:
    """Loads a model in the fastest dtype, and prints what that changes.

    Args:
        load: Takes the arguments of ``e5v_st.load``.
        model_kwargs: With ``"fastest"`` for the dtype.
        **kwargs: Further arguments.
    """

    def load_in(dtype: str, **changes: Any) -> SentenceTransformer:
        others = {name: value for name, value in model_kwargs.items() if name != "torch_dtype"}
        return load(model_kwargs={**others, "dtype": dtype}, **{**kwargs, **changes})

    model = load_in(choose_dtype(kwargs.get("device")))
    if kwargs.get("quantize") is None:
        compare_with_float32(model, partial(load_in, "float32"))
    return model


def asks_fastest(model_kwargs: Any) -> bool:
    """Whether the arguments of ``from_pretrained`` ask for the fastest dtype."""
    return bool(model_kwargs) and FASTEST in (model_kwargs.get("dtype"), model_kwargs.get("torch_dtype"))


def compare_with_float32(model: SentenceTransformer, load: Callable[..., SentenceTransformer]) -> None:
    """Prints the cosine of a model's embeddings to those in float32, if that fits into memory beside it.

    Args:
        model: In another dtype.
        load: Loads it in float32. It takes ``quantize``, and ``device`` for another device than its own.
    """
    import psutil

    from .probes import embed_unquantised, print_cosines

    transformer: Any = model[0]
    if transformer.model.dtype.itemsize >= 4:
        return
    needed = 4 * sum(weight.numel() for weight in transformer.model.parameters())
    if needed > 0.9 * psutil.virtual_memory().available:
        free = psutil.virtual_memory().available
        print(f"not compared with float32: it takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} are free")
        return
    print_cosines(model, str(transformer.model.dtype).removeprefix("torch."), embed_unquantised(load))
