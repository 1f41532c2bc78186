"""Which layers of the vision tower and the projector are trained, by name, in any family.

A LoRA is put on linear layers alone, so that a run stays an adapter, which is loaded, merged and pushed as any other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from e5v_st.loading import lora_targets
from e5v_st.model.skipping_e5v import count_layers_read

#: Parts of a model's names that are its projector: what maps the tower's features to the language model.
_PROJECTOR = re.compile(r"(^|\.)(multi_modal_projector|connector|embed_vision|merger|deepstack_merger_list)\.")
#: A tower's pooling head, which no family's features come from.
_UNREAD = re.compile(r"(^|\.)head\.")
_LAYER = re.compile(r"(^|\.)(layers|layer|blocks)\.(?P<number>\d+)\.")


class Targets(NamedTuple):
    """Patterns of the names of modules that get a LoRA; ``vision`` is empty where only the language model does."""

    language: str
    vision: str = ""

    @property
    def pattern(self) -> str:
        """All of them."""
        return f"({self.language})|({self.vision})" if self.vision else self.language


def train_targets(transformer: Any, vision: str) -> Targets:
    """Returns the modules that get a LoRA: those of the language model, and of vision as asked for.

    Args:
        transformer: An ``E5VTransformer``.
        vision: ``"none"``, ``"projector"``, or ``"lora"`` for projector and tower.

    Raises:
        ValueError: If the family has no linear layer there.
    """
    language = lora_targets(transformer)
    if vision == "none":
        return Targets(language)
    names = vision_layers(transformer.model, projector_only=vision == "projector")
    if not names:
        raise ValueError(
            f"got train_vision={vision}, but the {vision} of a {transformer.backbone.name} has no linear layers, which "
            f"a LoRA needs: use train_vision: {'lora' if vision == 'projector' else 'none'}"
        )
    return Targets(language, "|".join(map(re.escape, names)))


def vision_layers(model: Any, *, projector_only: bool) -> list[str]:
    """Returns the names of the linear layers of projector and tower whose outputs are read."""
    language = {id(module) for module in model.get_decoder().modules()}
    read = count_layers_read(model.config)
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or id(module) in language or _UNREAD.search(name):
            continue
        projector = _PROJECTOR.search(name)
        layer = _LAYER.search(name)
        unread = not projector and layer is not None and int(layer["number"]) >= read
        if projector or not (projector_only or unread):
            found.append(name)
    return found


def check_trained(names: Sequence[str], targets: Targets, init_adapter: str = "") -> None:
    """Refuses to train anything but the LoRA of the wanted layers, or none of a wanted part.

    Args:
        names: Of the trained weights of the model behind ``E5VTransformer``.
        targets: See :func:`train_targets`.
        init_adapter: The adapter that they come from, if any.

    Raises:
        ValueError: If there are others, or an adapter lacks the LoRA of vision.
    """
    others = [name for name in names if not _is_lora_of(targets.pattern, name)]
    if others:
        raise ValueError(
            f"{init_adapter or 'the LoRA'} has {len(others)} weights of layers that are not to be trained, such as "
            f"{others[0]}: say so with train_vision, or merge the adapter first (e5v merge)"
        )
    if targets.vision and not any(_is_lora_of(targets.vision, name) for name in names):
        raise ValueError(
            f"{init_adapter} has no LoRA in projector or tower, which train_vision asks for: merge it first "
            "(e5v merge), and train that"
        )


def _is_lora_of(pattern: str, name: str) -> bool:
    return re.fullmatch(rf"({pattern})\.lora_\w+\..*", name) is not None
