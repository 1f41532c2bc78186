"""Which inputs share a prefix, and the forward that computes each prefix once.

A causal model's states depend on what stands to their left alone. So the chat header is the same for all texts of a
batch, and header and image are the same for all prompts about one image: both are computed once, and the rest of each
prompt runs against their key-value cache. In the last layer only the state of each prompt's last token is wanted, so
every other token gives its key and value there, and nothing more. The result is that of encoding one by one, up to
rounding.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .packing_e5v import uses_flash

if TYPE_CHECKING:
    from transformers import LlavaNextModel

#: Backbones whose layers are built as :func:`_append_keys` reads them.
BACKBONES = ("llama", "mistral")
#: Most padding in rows that are computed together, as a part of their tokens.
MAX_PADDING = 0.15
#: Rows of so few tokens together are not split for less padding: reading the weights once more would take longer.
SMALL = 256
#: Most tokens of a prefix's cache, counted once for each row that goes on from it, that are held at once.
CACHED_TOKENS = 16384


@dataclass(frozen=True)
class Group:
    """Rows of a batch that begin with the same ``prefix`` tokens, which are computed once.

    What is left of them is computed in ``parts``, tuples of indexes into the batch. Nothing is shared where ``prefix``
    is 0.
    """

    parts: tuple[tuple[int, ...], ...]
    prefix: int = 0


@dataclass(frozen=True)
class Plan:
    """How a batch is computed; made before anything is on the model's device.

    Attributes:
        groups: Hold every row once.
        lengths: Tokens of each row.
        images: Which of the batch's distinct images each row shows, in their order.
    """

    groups: list[Group]
    lengths: list[int]
    images: list[list[int]]


def plan_groups(
    rows: Sequence[Sequence[int]], images: Sequence[Sequence[int]], image_id: int, sizes: Mapping[int, int]
) -> list[Group]:
    """Decides which rows are computed together, and how much of them is shared.

    Args:
        rows: Token ids of each row, without padding.
        images: Which images each row shows, in their order: the image tokens of different images look the same.
        image_id: The image token's id.
        sizes: Tokens of each image; two images may follow each other without anything in between.

    Returns:
        Groups that hold every row once: texts after their common header, prompts about the same image after that image,
        and what shares nothing in parts of similar length.
    """
    families: dict[Any, list[int]] = defaultdict(list)
    for row, (ids, shown) in enumerate(zip(rows, images, strict=True)):
        end = list(ids).index(image_id) + sizes[shown[0]] if shown else 0
        families[(shown[0], end, tuple(ids[:end])) if shown else (None, 0, ())].append(row)
    groups, alone = [], []
    for (_, end, _), members in families.items():
        shared = _common_length([rows[row] for row in members], image_id, end)
        if len(members) == 1 or shared == 0:
            alone += members
        else:
            rest = [(len(rows[row]) - shared, row) for row in members]
            groups.append(Group(_split(rest, max(1, CACHED_TOKENS // shared)), shared))
    return groups + ([Group(_split([(len(rows[row]), row) for row in alone]))] if alone else [])


def _common_length(rows: Sequence[Sequence[int]], image_id: int, end: int) -> int:
    """Number of tokens that all rows begin with, of which at least the last of each row is left to compute.

    Only the first image, which ends at ``end``, is known to be the same, so the prefix stops before a second one.
    """
    low, high = min(rows), max(rows)  # the rows in between, in sorted order, share whatever these two share
    same = next((i for i, pair in enumerate(zip(low, high, strict=False)) if pair[0] != pair[1]), len(low))
    later = list(low[end : min(same, min(map(len, rows)) - 1)])
    return end + (later.index(image_id) if image_id in later else len(later))


def _split(lengths_and_rows: list[tuple[int, int]], most: int | None = None) -> tuple[tuple[int, ...], ...]:
    """Splits rows by length, longest first.

    Each part has at most ``most`` rows, and pads no more than :data:`MAX_PADDING` unless it is :data:`SMALL`.
    """
    parts: list[list[int]] = []
    longest = tokens = 0
    for length, row in sorted(lengths_and_rows, reverse=True):
        size = longest * (len(parts[-1]) + 1) if parts else 0
        fits = size <= SMALL or 1 - (tokens + length) / size <= MAX_PADDING
        if parts and fits and len(parts[-1]) != most:
            parts[-1].append(row)
            tokens += length
        else:
            parts.append([row])
            longest = tokens = length
    return tuple(tuple(part) for part in parts)


def can_share(config: Any) -> bool:
    """Whether :func:`shared_states` knows a language model: not those whose cache forgets (sliding windows)."""
    known = config._attn_implementation in ("sdpa", "eager") or uses_flash(config)
    return known and config.model_type in BACKBONES and getattr(config, "sliding_window", None) is None


def plain_states(model: LlavaNextModel, features: dict[str, Any], **kwargs: Any) -> torch.Tensor:
    """Runs the language model over a whole batch, as it is.

    Args:
        model: A LLaVA-NeXT without its head.
        features: See ``E5VTransformer.preprocess``; may be padded on the left.
        **kwargs: Arguments of the language model.

    Returns:
        States after the final norm ``(n, tokens, d)``.
    """
    mask = features["attention_mask"]
    images = _image_features(model, features)
    index = features.get("image_index")
    slots = images if index is None else [images[i] for i in index.tolist()]
    # A causal model never looks right, so padding on the right needs no mask, and attention is faster without one
    right_padded = bool(mask[:, 0].all())
    return model.language_model(
        inputs_embeds=_embed(model, features["input_ids"], slots),
        attention_mask=None if right_padded else mask,
        position_ids=None if right_padded else (mask.cumsum(1) - 1).clamp(min=0),
        **{"use_cache": False, **kwargs},
    ).last_hidden_state


def shared_states(model: LlavaNextModel, features: dict[str, Any], plan: Plan, **kwargs: Any) -> torch.Tensor:
    """Runs the language model over a batch, and computes each prefix once.

    Args:
        model: A LLaVA-NeXT without its head, whose language model :func:`can_share` knows.
        features: See ``E5VTransformer.preprocess``; padded on the right.
        plan: For this batch.
        **kwargs: Arguments of the language model's layers.

    Returns:
        Each row's last state after the final norm ``(n, 1, d)``.
    """
    ids, images, language_model = features["input_ids"], _image_features(model, features), model.language_model
    order, found = [], []
    for group in plan.groups:
        cache = None
        shared = plan.images[group.parts[0][0]][:1] if group.prefix else []
        if group.prefix:
            cache = DynamicCache()
            prefix = _embed(model, ids[[group.parts[0][0]], : group.prefix], [images[i] for i in shared])
            _append_keys(language_model, _run(language_model, prefix, cache, **kwargs), cache)
        for part in group.parts:
            rows = list(part)
            last = [plan.lengths[row] - group.prefix - 1 for row in rows]
            slots = [images[i] for row in rows for i in plan.images[row][len(shared) :]]
            rest = _embed(model, ids[rows, group.prefix : group.prefix + max(last) + 1], slots)
            own = None if cache is None else _for_rows(cache, len(rows))
            found.append(_last_states(language_model, _run(language_model, rest, own, **kwargs), last, own, **kwargs))
            order += rows
    states = torch.cat(found)
    return states[sorted(range(len(order)), key=order.__getitem__)]


def _run(language_model: Any, states: torch.Tensor, cache: DynamicCache | None, **kwargs: Any) -> torch.Tensor:
    """Runs all layers but the last over what follows the cached tokens; returns states ``(n, tokens, d)``."""
    start = 0 if cache is None else cache.get_seq_length()
    positions = torch.arange(start, start + states.shape[1], device=states.device).unsqueeze(0)
    mask = _causal_mask(language_model.config, states, start)
    rotary = language_model.rotary_emb(states, position_ids=positions)
    for layer in language_model.layers[:-1]:
        states = layer(
            states,
            attention_mask=mask,
            position_embeddings=rotary,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            **kwargs,
        )
    return states


def _causal_mask(config: Any, states: torch.Tensor, start: int) -> torch.Tensor | None:
    """What is added to the scores of tokens after ``start`` others; ``None`` where attention sees to it itself."""
    if uses_flash(config) or (start == 0 and config._attn_implementation == "sdpa"):
        return None
    tokens = states.shape[1]
    mask = torch.full((tokens, start + tokens), -torch.inf, dtype=states.dtype, device=states.device)
    return mask.triu(start + 1)[None, None]


def _last_layer_start(language_model: Any, cache: DynamicCache | None) -> int:
    index = language_model.layers[-1].self_attn.layer_idx
    return 0 if cache is None else cache.get_seq_length(index)


def _append_keys(language_model: Any, states: torch.Tensor, cache: DynamicCache) -> None:
    """Adds keys and values of the last layer to the cache.

    Args:
        language_model: A Llama or Mistral.
        states: What goes into that layer, ``(n, tokens, d)``.
        cache: Holds what stands to their left.
    """
    layer, start = language_model.layers[-1], _last_layer_start(language_model, cache)
    normed = layer.input_layernorm(states)
    shape = (*states.shape[:2], -1, layer.self_attn.head_dim)
    keys = layer.self_attn.k_proj(normed).view(shape).transpose(1, 2)
    values = layer.self_attn.v_proj(normed).view(shape).transpose(1, 2)
    positions = torch.arange(start, start + states.shape[1], device=states.device).unsqueeze(0)
    _, keys = apply_rotary_pos_emb(keys, keys, *language_model.rotary_emb(states, position_ids=positions))
    cache.update(keys, values, layer.self_attn.layer_idx)


def _last_states(
    language_model: Any, states: torch.Tensor, last: Sequence[int], cache: DynamicCache | None, **kwargs: Any
) -> torch.Tensor:
    """Runs the last layer for the last token of each row; returns states after the final norm ``(n, 1, d)``.

    Args:
        language_model: A Llama or Mistral.
        states: What goes into that layer, ``(n, tokens, d)``, padded on the right.
        last: Each row's last token.
        cache: Holds what stands to their left.
        **kwargs: Arguments of the layer.
    """
    layer, start = language_model.layers[-1], _last_layer_start(language_model, cache)
    cache = DynamicCache() if cache is None else cache
    device, tokens = states.device, states.shape[1]
    ends = torch.tensor(last, device=device).unsqueeze(1)
    rows = torch.arange(len(last), device=device).unsqueeze(1)
    if uses_flash(language_model.config):  # takes no mask of this kind: the whole layer
        positions = torch.arange(start, start + tokens, device=device).unsqueeze(0)
        rotary = language_model.rotary_emb(states, position_ids=positions)
        states = layer(states, position_embeddings=rotary, past_key_values=cache, use_cache=True, **kwargs)
        return language_model.norm(states[rows, ends])
    _append_keys(language_model, states, cache)
    # The layer adds the key of its own token to the cache once more: of the keys before, those on its left are seen
    seen = torch.arange(start + tokens + 1, device=device) < start + ends
    seen[:, -1] = True
    mask = torch.zeros_like(seen, dtype=states.dtype).masked_fill(~seen, -torch.inf)[:, None, None]
    rotary = language_model.rotary_emb(states, position_ids=start + ends)
    states = layer(
        states[rows, ends],
        attention_mask=mask,
        position_embeddings=rotary,
        position_ids=start + ends,
        past_key_values=cache,
        use_cache=True,
        **kwargs,
    )
    return language_model.norm(states)


def _for_rows(cache: DynamicCache, rows: int) -> DynamicCache:
    """A cache for rows that all go on from the one row of ``cache``; it is copied only as it grows."""
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in own.layers:
        layer.keys, layer.values = layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1)
    return own


def _image_features(model: LlavaNextModel, features: dict[str, Any]) -> list[torch.Tensor]:
    """Features ``(tokens, d)`` of each distinct image."""
    if features.get("pixel_values") is None:
        return []
    pixels = features["pixel_values"].to(model.dtype)
    return list(model.get_image_features(pixels, features["image_sizes"]).pooler_output)


def _embed(model: LlavaNextModel, input_ids: torch.Tensor, slots: Sequence[torch.Tensor]) -> torch.Tensor:
    """Token embeddings ``(n, tokens, d)`` with image features in the places of image tokens, in their order."""
    embeddings = model.get_input_embeddings()(input_ids)
    if not slots:
        return embeddings
    where = (input_ids == model.config.image_token_id).unsqueeze(-1)
    return embeddings.masked_scatter(where, torch.cat(list(slots)).to(embeddings))
