"""How far two models are apart: the cosine between their embeddings of the same texts and images.

Used for what quantisation changes. The two models need not be in memory together: the first one embeds, is let go, and
its embeddings are compared with those of the second one.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from .encoder import encode_all
from .gallery import read_gallery
from .processes import rank

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer

#: Number of texts, and of images, that models are compared on.
PROBES = 8


class Unquantised(NamedTuple):
    """The embeddings of a model that is not quantised, and its dtype."""

    dtype: str
    embeddings: dict[str, np.ndarray]


def embed_unquantised(load: Callable[..., SentenceTransformer]) -> Unquantised | None:
    """Runs :func:`embed_probes` with the model as it is, and lets it go before the quantised model is loaded.

    A model that does not fit on the GPU embeds on the CPU.

    Args:
        load: Loads the model. It takes ``quantize``, and ``device`` for another device than its own.

    Returns:
        The embeddings. ``None`` in all processes but the first.
    """
    import torch

    if rank() > 0:
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
    """Embeds images of the small benchmark and their names, float32 ``(count, d)`` each."""
    gallery, _ = read_gallery()
    chosen = gallery[:: max(1, len(gallery) // count)][:count]
    items: dict[str, list[dict[str, Any]]] = {
        "texts": [{"text": image.name} for image in chosen],
        "images": [{"image": image.png} for image in chosen],
    }
    return {kind: encode_all(model, inputs, progress=False) for kind, inputs in items.items()}


def cosines(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the cosine of each embedding to the expected one, by kind.

    Raises:
        ValueError: If a cosine is not a number, as from a broken checkpoint. Quantisation can hide that from other
            checks.
    """
    import numpy as np

    both = {kind: (found[kind] * expected[kind]).sum(1) for kind in expected}
    if not all(np.isfinite(values).all() for values in both.values()):
        raise ValueError("the quantised or the unquantised model gives embeddings that are not numbers")
    return both
