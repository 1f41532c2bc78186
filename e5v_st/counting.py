"""Counts tokens, and a model's weights, without loading any weight: for plans of work that has not begun."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_MAPPING

from .files import locate
from .model.adapter_e5v import find_adapter, find_base
from .model.modeling_e5v import E5VTransformer
from .published import TINY, TINY_NAME

#: Items whose pixels are in memory together.
AT_ONCE = 8


class WeightlessTransformer(E5VTransformer):
    """E5-V's transformer with all but its weights: tokenizer, prompts, image sizes, and the shapes of all layers."""

    def _load_model(  # type: ignore[override]  # as in the parent
        self, name: str, task: Any, config: Any, backend: str, is_peft_model: bool, **kwargs: Any
    ) -> Any:
        with torch.device("meta"):
            return MODEL_MAPPING[type(config)]._from_config(config)


def open_without_weights(name: str | Path, **settings: Any) -> E5VTransformer:
    """Opens a model without its weights.

    Args:
        name: A directory or hub id (of a checkpoint, a saved model, or an adapter, whose base is then opened), or
            ``"e5v-tiny"``.
        **settings: See ``E5VTransformer``, such as ``max_image_tokens``.

    Raises:
        ValueError: If it is of no known family.

    Example:
        >>> transformer = open_without_weights("e5v-tiny")
        >>> count_weights(transformer)
        5071104
    """
    path = str(TINY if name == TINY_NAME else locate(name) or name)
    adapter = find_adapter(path)
    return WeightlessTransformer(find_base(path, adapter).name if adapter else path, **settings)


def count_weights(transformer: E5VTransformer) -> int:
    """Returns the number of a model's weights, without the head that embeddings do not need."""
    return sum(weight.numel() for weight in transformer.model.parameters())


def count_tokens(transformer: E5VTransformer, items: Sequence[Any], prompt: str | None = None) -> list[int]:
    """Returns how many tokens the prompt of each item has, those of its images included.

    Args:
        transformer: As :func:`open_without_weights` returns it.
        items: See ``items_e5v.read_item``.
        prompt: See ``prompts_e5v.resolve_prompt``.

    Raises:
        ValueError: If an item cannot be read.
    """
    found: list[int] = []
    for start in range(0, len(items), AT_ONCE):  # images become pixels on the way
        mask = transformer.preprocess(items[start : start + AT_ONCE], prompt)["attention_mask"]
        found += mask.sum(1).tolist()
    return found
