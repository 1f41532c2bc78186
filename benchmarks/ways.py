"""The two ways of encoding that benchmarks compare: the README's recipe of royokong/e5-v, and this package.

The recipe, on current transformers: a list of texts, or of images with their prompts, is one batch, padded on the left;
all logits and the states of all layers. Here texts come in batches of 32 and images in batches of 8; the published
``retrieval.py`` takes 4 images at a time unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

TEXT_BATCH, IMAGE_BATCH = 32, 8
ONE_BY_ONE = "published, images one at a time"
#: Items, each with the template of its prompt.
Work = Sequence[tuple[dict[str, Any], str]]


def load_processor(folder: Path) -> Any:
    """The checkpoint's processor, with what the published code sets on it."""
    from transformers import AutoProcessor

    settings = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = AutoProcessor.from_pretrained(folder, **settings)
    processor.tokenizer.padding_side = "left"
    return processor


def last_states(whole: Any, processor: Any, work: Work, image_batch: int = IMAGE_BATCH) -> torch.Tensor:
    """Returns the last states ``(n, d)``, float32 on the CPU.

    Args:
        whole: A ``LlavaNextForConditionalGeneration``.
        processor: See :func:`load_processor`.
        work: Items with ``text`` and/or ``image``, each with the template of its prompt; all with an image, or none.
        image_batch: Items with an image that are computed together.
    """
    from e5v_st.model.prompts_e5v import render

    rows = [torch.zeros(0, whole.config.text_config.hidden_size)]
    size = image_batch if work and "image" in work[0][0] else TEXT_BATCH
    for start in range(0, len(work), size):
        part = work[start : start + size]
        texts = [render(prompt, "llama3", item.get("text", "")) for item, prompt in part]
        images = [item["image"] for item, _ in part if "image" in item] or None
        inputs = processor(text=texts, images=images, return_tensors="pt", padding=True).to(whole.device, whole.dtype)
        with torch.no_grad():
            states = whole(**inputs, output_hidden_states=True, return_dict=True).hidden_states[-1][:, -1, :]
        rows.append(states.float().cpu())
    return torch.cat(rows)


#: Turns items, each with its prompt's name, into normalised embeddings.
Way = Callable[[list], np.ndarray]


def published(whole: Any, folder: Path, image_batch: int = IMAGE_BATCH) -> Way:
    """The published recipe; see :func:`last_states`."""
    from e5v_st.model.prompts_e5v import PROMPTS

    processor = load_processor(folder)

    def encode(work: list) -> np.ndarray:
        states = last_states(whole, processor, [(item, PROMPTS[name]) for item, name in work], image_batch)
        return torch.nn.functional.normalize(states, dim=-1).numpy()

    return encode


def ours(model: Any) -> Way:
    """This package's ``encode_all``."""
    from e5v_st import PROMPTS, encode_all

    def encode(work: list) -> np.ndarray:
        prompts = [PROMPTS[name] for _, name in work]
        return encode_all(model, [item for item, _ in work], prompt=prompts, progress=False)

    return encode
