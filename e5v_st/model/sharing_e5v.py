"""The forward over a tree of prompts: what they begin with alike goes through the model once.

``tree_e5v`` says which prompts share what, and has a drawing. Here its nodes go through the layers in one row without
padding, and attention goes block by block, so that each node sees its own path alone. In the last layer only the hidden
state of each prompt's last token is wanted, so every other token gives its key and value there, and nothing more. The
result is that of encoding one by one, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .planning_e5v import in_order
from .tree_e5v import Block, Part, Tree
from .upstream_e5v import attention_of

if TYPE_CHECKING:
    from transformers import LlavaNextModel, PreTrainedModel

    from .features_e5v import Features

#: Backbones whose layers are built as :func:`_run_layer` and :func:`keys_and_values` read them.
BACKBONES = ("llama", "mistral", "qwen2")
#: The name under which transformers knows :func:`branch_attention`; that of each copy of this file is its own, since
#: models that were saved with different versions of it may be loaded in one process.
ATTENTION = f"e5v_branches_{crc32(__name__.encode()):08x}"
#: Tokens that go through a feed-forward network together on a CPU.
CPU_TOKENS = 768


KeysAndValues = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Branches:
    """What attention is told of a tree; one object, as ``torch.compile`` would count what stands in a tuple.

    Attributes:
        blocks: Hold every query once.
        keys_and_values: Those of all nodes, ``(1, key heads, nodes, d)`` each, if the queries are others; or what
            returns them, to be computed inside the layer, as checkpointing and sharding want it.
        in_windows: The blocks of layers that see no further than a window, if these are others.
    """

    blocks: tuple[Block, ...]
    keys_and_values: KeysAndValues | Callable[[], KeysAndValues] | None = None
    in_windows: tuple[Block, ...] | None = None


def prepare_sharing(model: PreTrainedModel, kind: str) -> str:
    """Prepares a model for sharing prefixes, and returns how it does.

    Nothing is shared if its attention forgets (sliding windows), another attention than ``"sdpa"`` was asked for, or
    its layers are spread over several devices.

    Args:
        model: A family's model without its head.
        kind: How the family shares, see ``backbone_e5v``.

    Returns:
        The same, or ``"none"``.
    """
    language_model: Any = model.get_decoder()
    config = language_model.config
    devices = set(getattr(model, "hf_device_map", {}).values())
    if kind == "none" or attention_of(config) not in ("sdpa", ATTENTION) or len(devices) > 1:
        return "none"
    if kind == "fork":
        return kind
    if kind == "layers" and config.model_type not in BACKBONES:
        return "none"
    windows = getattr(config, "sliding_window", None) is not None
    if kind != "masks" and windows and set(getattr(config, "layer_types", None) or ()) != {"full_attention"}:
        return "none"
    language_model.set_attn_implementation(ATTENTION)
    return kind


def can_share(model: PreTrainedModel, kind: str) -> bool:
    """Whether a model shares prefixes as :func:`prepare_sharing` said, and nobody has changed its attention since."""
    attention = attention_of(model.get_decoder().config)
    return attention == "sdpa" if kind == "fork" else kind != "none" and attention == ATTENTION


def branch_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    branches: Branches | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of the nodes of a tree; without ``branches``, that of ``"sdpa"``.

    Args:
        module: The attention module.
        query: ``(1, heads, nodes, d)``.
        key: ``(1, key heads, nodes, d)``.
        value: As ``key``.
        attention_mask: For ``"sdpa"``.
        branches: What each query sees.
        **kwargs: For ``"sdpa"``.

    Returns:
        Results ``(1, nodes, heads, d)``, and no weights.
    """
    if branches is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    windowed = branches.in_windows is not None and kwargs.get("sliding_window") is not None
    blocks = branches.in_windows if windowed else branches.blocks
    return _attend(module, query, key, value, branches, blocks, kwargs["scaling"]), None


@torch.compiler.disable  # blocks are different in every batch
def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    branches: Branches,
    blocks: tuple[Block, ...],
    scaling: float,
) -> torch.Tensor:
    given = branches.keys_and_values
    key, value = (given() if callable(given) else given) or (key, value)
    results = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    for block in blocks:
        taken = (_take(query, block.queries), _take(key, block.keys), _take(value, block.keys))
        found, _ = sdpa_attention_forward(module, *taken, block.mask, scaling=scaling)
        if isinstance(block.queries, slice):
            results[:, block.queries] = found
        else:
            wanted = slice(None) if block.wanted is None else block.wanted
            # Under autocast, attention is in half precision where rotary positions left the queries in float32
            results[0, block.queries.flatten()[wanted]] = found.flatten(0, 1)[wanted].to(results.dtype)
    return results


def _take(states: torch.Tensor, index: slice | torch.Tensor) -> torch.Tensor:
    """Takes nodes ``(n, heads, q, d)`` out of ``(1, heads, nodes, d)``."""
    return states[:, :, index] if isinstance(index, slice) else states[0][:, index].transpose(0, 1)


AttentionInterface.register(ATTENTION, branch_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def plain_states(
    model: LlavaNextModel, features: Features, slots: list[torch.Tensor] | None = None, **kwargs: Any
) -> torch.Tensor:
    """Runs the language model over a whole batch, as it is.

    Args:
        model: A LLaVA-NeXT without its head.
        features: See ``E5VTransformer.preprocess``; may be padded on the left.
        slots: The features of the image at each place for one, if they are known already.
        **kwargs: Arguments of the language model.

    Returns:
        Hidden states after the final norm ``(n, tokens, d)``.
    """
    mask, ids = features["attention_mask"], features["input_ids"]
    embeddings = model.get_input_embeddings()(ids)
    if slots is None:
        images, index = image_features(model, features), features.get("image_index")
        slots = images if index is None else [images[i] for i in index.tolist()]
    if slots:
        where = (ids == model.config.image_token_id).unsqueeze(-1)
        embeddings = embeddings.masked_scatter(where, torch.cat(slots).to(embeddings))
    # A causal model never looks right, so padding on the right needs no mask, and attention is faster without one
    right_padded = bool(mask[:, 0].all())
    return model.language_model(
        inputs_embeds=embeddings,
        attention_mask=None if right_padded else mask,
        position_ids=None if right_padded else (mask.cumsum(1) - 1).clamp(min=0),
        **{"use_cache": False, **kwargs},
    ).last_hidden_state


def shared_states(model: LlavaNextModel, features: Features, parts: Sequence[Part], **kwargs: Any) -> torch.Tensor:
    """Runs the language model over a batch, part by part, and computes what prompts begin with alike once.

    Args:
        model: A LLaVA-NeXT without its head, whose language model :func:`can_share` knows.
        features: See ``E5VTransformer.preprocess``.
        parts: Hold each prompt of this batch once.
        **kwargs: Arguments of the language model's layers.

    Returns:
        Each prompt's last hidden state after the final norm ``(n, 1, d)``.
    """
    device = features["input_ids"].device
    parts = [part.map(lambda tensor: tensor.to(device, non_blocking=True)) for part in parts]
    found = []
    for part in parts:
        own = {name: features[name][part.images] for name in ("pixel_values", "image_sizes") if len(part.images)}
        found.append(_tree_states(model, own, part.tree, **kwargs))
    return in_order(found, [part.prompts for part in parts])


def _tree_states(model: LlavaNextModel, pixels: Features, tree: Tree, **kwargs: Any) -> torch.Tensor:
    """Returns the last hidden states ``(n, 1, d)`` of a tree's prompts, given the pixels and sizes of its images."""
    language_model = model.language_model
    states = model.get_input_embeddings()(tree.ids)
    images = image_features(model, pixels)
    if images:
        states[tree.image_nodes] = torch.cat(images).to(states)[tree.image_features]
    states, positions = states.unsqueeze(0), tree.positions.unsqueeze(0)
    del images
    rotary = language_model.rotary_emb(states, position_ids=positions)
    *layers, final = language_model.layers
    for layer in layers:
        _run_layer(layer, states, rotary, branches=Branches(tree.blocks), **kwargs)
    branches = Branches(tree.last_blocks, keys_and_values(final, states, rotary))
    states, rotary = states[:, tree.last], tuple(each[:, tree.last] for each in rotary)
    _run_layer(final, states, rotary, branches=branches, **kwargs)
    return language_model.norm(states).transpose(0, 1)


def _run_layer(
    layer: torch.nn.Module, states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], **kwargs: Any
) -> None:
    """Runs a Llama's, Mistral's or Qwen2's layer; changes ``states`` ``(1, nodes, d)`` in place."""
    normed = layer.input_layernorm(states)
    states += layer.self_attn(hidden_states=normed, attention_mask=None, position_embeddings=rotary, **kwargs)[0]
    del normed
    # A CPU's caches hold so much; on a GPU more at once is faster
    for part in states.split(CPU_TOKENS if states.device.type == "cpu" else states.shape[1], dim=1):
        part += layer.mlp(layer.post_attention_layernorm(part))


def keys_and_values(
    layer: torch.nn.Module, states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
) -> KeysAndValues:
    """Keys and values of a Llama's, Mistral's or Qwen2's layer, ``(1, key heads, nodes, d)``.

    Args:
        layer: The layer.
        states: What goes into it, ``(1, nodes, d)``.
        rotary: Cosines and sines of the positions.
    """
    normed = layer.input_layernorm(states)
    shape = (*states.shape[:2], -1, layer.self_attn.head_dim)
    keys = layer.self_attn.k_proj(normed).view(shape).transpose(1, 2)
    values = layer.self_attn.v_proj(normed).view(shape).transpose(1, 2)
    _, keys = apply_rotary_pos_emb(keys, keys, *rotary)
    return keys, values


def image_features(model: LlavaNextModel, features: Features) -> list[torch.Tensor]:
    """Features ``(tokens, d)`` of each image, in the batch's order, or of each distinct one."""
    pixels, sizes = features.get("pixel_values"), features.get("image_sizes")
    if pixels is None:
        return []
    if sizes.ndim == 3:  # a row for each item, where a place without an image has no size
        there = sizes[..., 0] > 0
        pixels, sizes = pixels[there], sizes[there]
    if not len(pixels):
        return []
    return list(model.get_image_features(pixels.to(model.dtype), sizes).pooler_output)
