"""Names of weights: as published (transformers 4.41), as today's model calls them, and one in between to compare by."""

from __future__ import annotations

import re

EMBEDDING = "language_model.embed_tokens.weight"
HEAD = "lm_head.weight"

_PARTS = "language_model|vision_tower|multi_modal_projector|image_newline"
_PLAIN = (
    (rf"^model\.(?={_PARTS})", ""),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "language_model."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
)
_NAMES = {
    "published": (
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^language_model\.(?!lm_head\.)", "language_model.model."),
        (r"^vision_tower\.", "vision_tower.vision_model."),
    ),
    "current": ((rf"^(?={_PARTS})", "model."),),
}


def plain(key: str) -> str:
    """Maps a weight's name of any transformers version onto that of today's ``LlavaNextModel`` (or ``lm_head``)."""
    return _apply(_PLAIN, key)


def rename(key: str, style: str) -> str:
    """Maps a weight's name onto the published or the current ``LlavaNextForConditionalGeneration``.

    Args:
        key: Any form of the name.
        style: ``"published"`` (``language_model.model.*``) or ``"current"`` (``model.language_model.*``).
    """
    return _apply(_NAMES[style], plain(key))


def _apply(rules: tuple[tuple[str, str], ...], key: str) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key
