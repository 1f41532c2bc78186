"""Which inputs share a prefix, and the forward that computes each prefix once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import LlavaNextModel


def distinct_images(images: Sequence[Image]) -> tuple[list[Image], list[int]]:
    """Returns the images without repetitions (by content), and for each given image its index among them."""
    found: dict[tuple[tuple[int, int], bytes], int] = {}
    distinct: list[Image] = []
    index = []
    for image in images:
        key = (image.size, hashlib.blake2b(image.tobytes(), digest_size=16).digest())
        if key not in found:
            found[key] = len(distinct)
            distinct.append(image)
        index.append(found[key])
    return distinct, index


def last_states(
    model: LlavaNextModel, features: dict[str, Any], share: bool, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the language model over a batch.

    Args:
        model: A LLaVA-NeXT without its head.
        features: See ``E5VTransformer.preprocess``.
        share: Whether equal prefixes are computed once.
        **kwargs: Arguments of the language model.

    Returns:
        States after the final norm ``(n, tokens, d)`` and their mask ``(n, tokens)``.
    """
    mask = features["attention_mask"]
    embeddings = _embed(model, features)
    right_padded = bool(mask[:, 0].all())
    # A causal model never looks right, so padding on the right needs no mask, and attention is faster without one
    position_ids = None if right_padded else (mask.cumsum(1) - 1).clamp(min=0)
    states = model.language_model(
        inputs_embeds=embeddings,
        attention_mask=None if right_padded else mask,
        position_ids=position_ids,
        use_cache=False,
        **kwargs,
    ).last_hidden_state
    return states, mask


def _embed(model: LlavaNextModel, features: dict[str, Any]) -> torch.Tensor:
    """Token embeddings ``(n, tokens, d)`` with the image features in their places."""
    input_ids = features["input_ids"]
    embeddings = model.get_input_embeddings()(input_ids)
    if features.get("pixel_values") is None:
        return embeddings
    pixels = features["pixel_values"].to(model.dtype)
    images = model.get_image_features(pixels, features["image_sizes"]).pooler_output
    index = features.get("image_index")
    slots = images if index is None else [images[i] for i in index.tolist()]
    where = (input_ids == model.config.image_token_id).unsqueeze(-1)
    return embeddings.masked_scatter(where, torch.cat(list(slots)).to(embeddings))
