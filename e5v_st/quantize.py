"""Holds the language model in 8 or 4 bits, and measures what that changes.

The vision tower and the projector stay as they are: they are a few percent of the weights.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer

#: mode -> the library that does it
LIBRARIES = {"int8": "bitsandbytes", "nf4": "bitsandbytes", "fp8": "torchao"}
SKIPPED = ["vision_tower", "multi_modal_projector"]
#: Texts, and as many pictures, that models are compared on.
PROBES = 8


class Unquantised(NamedTuple):
    """What a model gives that is not quantised, and in which dtype."""

    dtype: str
    embeddings: dict[str, np.ndarray]


def quantization(mode: str, device: str | None = None, dtype: Any = None) -> dict[str, Any]:
    """Returns what ``from_pretrained`` needs to quantise a model while it is loaded.

    Args:
        mode: ``"int8"`` (LLM.int8), ``"nf4"`` (QLoRA's, with double quantisation) or ``"fp8"`` (weights alone, computed
            in the model's dtype).
        device: Where the model goes; a GPU if there is one where ``None``.
        dtype: What the model computes in, where it is known.

    Raises:
        ValueError: If there is no such mode, or its library is not installed.
    """
    if mode not in LIBRARIES:
        raise ValueError(f"got quantize={mode!r}, want one of {', '.join(LIBRARIES)}")
    if find_spec(LIBRARIES[mode]) is None:
        raise ValueError(f"quantize={mode!r} needs {LIBRARIES[mode]}: pip install 'e5v-st[quant]'")
    import torch
    from sentence_transformers.util import get_device_name
    from transformers import BitsAndBytesConfig, TorchAoConfig

    device = str(device or get_device_name())
    if mode == "fp8":
        from torchao.quantization import Float8WeightOnlyConfig

        config: Any = TorchAoConfig(Float8WeightOnlyConfig(), modules_to_not_convert=SKIPPED)
    else:
        # One warning for each matrix product would say that activations are rounded to float16, as LLM.int8 does
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        half = torch.bfloat16 if device.startswith("cuda") else torch.float32
        config = BitsAndBytesConfig(
            load_in_8bit=mode == "int8",
            load_in_4bit=mode == "nf4",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype or "", half),
            llm_int8_skip_modules=SKIPPED,
        )
    return {"quantization_config": config, "device_map": {"": device}}


def embed_unquantised(load: Callable[..., SentenceTransformer]) -> Unquantised | None:
    """Embeds :func:`embed_probes` with the model as it is; then lets it go, before the quantised one is loaded.

    Where it does not fit on the GPU, it is computed on the CPU. Of several processes the first does it, the others get
    ``None``.

    Args:
        load: Loads the model, given ``quantize`` and, for another device than its own, ``device``.
    """
    import torch

    if int(os.environ.get("RANK", 0)) > 0:
        return None
    try:
        return _embed_unquantised(load)
    except torch.OutOfMemoryError:
        print("unquantised, the model does not fit on the GPU: its embeddings are computed on the CPU")
    torch.cuda.empty_cache()
    return _embed_unquantised(load, device="cpu")


def _embed_unquantised(load: Callable[..., SentenceTransformer], **where: str) -> Unquantised:
    model = load(quantize=None, **where)
    found = Unquantised(str(model[0].model.dtype).removeprefix("torch."), embed_probes(model))
    del model
    gc.collect()  # modules refer to each other in circles: without it, two models would be in memory for a while
    return found


def print_cosines(model: SentenceTransformer, mode: str, unquantised: Unquantised | None) -> None:
    """Prints how close a quantised model's embeddings are to those of the same model unquantised."""
    if unquantised is not None:
        measured = cosines(embed_probes(model), unquantised.embeddings)
        parts = (f"{len(v)} {kind} mean {v.mean():.4f}, least {v.min():.4f}" for kind, v in measured.items())
        print(f"{mode}: cosine to the same model in {unquantised.dtype}: {'; '.join(parts)}")


def embed_probes(model: SentenceTransformer, count: int = PROBES) -> dict[str, np.ndarray]:
    """Embeds pictures of the small benchmark and their names: float32 ``(count, d)`` each."""
    from .demo import read_gallery
    from .encoder import encode_all

    gallery, _ = read_gallery()
    chosen = gallery[:: max(1, len(gallery) // count)][:count]
    items = {
        "texts": [{"text": picture.name} for picture in chosen],
        "pictures": [{"image": picture.png} for picture in chosen],
    }
    return {kind: encode_all(model, inputs, progress=False) for kind, inputs in items.items()}


def cosines(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Cosines of each embedding to the one that was expected, by kind.

    Raises:
        ValueError: If one is not a number, as from a broken checkpoint, which quantisation can hide from other checks.
    """
    import numpy as np

    both = {kind: (found[kind] * expected[kind]).sum(1) for kind in expected}
    if not all(np.isfinite(values).all() for values in both.values()):
        raise ValueError("the quantised or the unquantised model gives embeddings that are not numbers")
    return both
