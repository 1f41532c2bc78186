"""Which inputs share a prefix, and the forward that computes each prefix once.

A causal model's states depend on what stands to their left alone. So the chat header is the same for all texts of a
batch, and header and image are the same for all prompts about one image: both are computed once, and the rest of each
prompt runs against their key-value cache. The result is that of encoding one by one, up to rounding.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import LlavaNextModel

#: Most padding in a group of rows that are computed together, as a part of its tokens.
MAX_PADDING = 0.15


@dataclass(frozen=True)
class Group:
    """Rows of a batch that are computed together: first their common ``prefix`` tokens once, then what is left of each.

    ``rows`` are indexes into the batch. With ``prefix`` 0 nothing is shared.
    """

    rows: tuple[int, ...]
    prefix: int = 0


def image_key(image: Image) -> tuple[tuple[int, int], bytes]:
    """What two RGB images have in common if and only if they are equal: size, and a hash of the pixels."""
    return image.size, hashlib.blake2b(image.tobytes(), digest_size=16).digest()


def distinct_images(images: Sequence[Image]) -> tuple[list[Image], list[int]]:
    """Returns the images without repetitions (by content), and for each given image its index among them."""
    found: dict[tuple[tuple[int, int], bytes], int] = {}
    distinct: list[Image] = []
    index = []
    for image in images:
        key = image_key(image)
        if key not in found:
            found[key] = len(distinct)
            distinct.append(image)
        index.append(found[key])
    return distinct, index


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
        and what shares nothing in groups of similar length.
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
            groups += [Group(part, shared) for part in _split([(len(rows[row]) - shared, row) for row in members])]
    return groups + [Group(part) for part in _split([(len(rows[row]), row) for row in alone])]


def _common_length(rows: Sequence[Sequence[int]], image_id: int, end: int) -> int:
    """Number of tokens that all rows begin with, of which at least the last of each row is left to compute.

    Only the first image, which ends at ``end``, is known to be the same, so the prefix stops before a second one.
    """
    low, high = min(rows), max(rows)  # the rows in between, in sorted order, share whatever these two share
    same = next((i for i, pair in enumerate(zip(low, high, strict=False)) if pair[0] != pair[1]), len(low))
    later = list(low[end : min(same, min(map(len, rows)) - 1)])
    return end + (later.index(image_id) if image_id in later else len(later))


def _split(lengths_and_rows: list[tuple[int, int]]) -> list[tuple[int, ...]]:
    """Splits rows by length so that each part pads no more than :data:`MAX_PADDING`, longest first."""
    parts: list[list[int]] = []
    longest = tokens = 0
    for length, row in sorted(lengths_and_rows, reverse=True):
        if parts and 1 - (tokens + length) / (longest * (len(parts[-1]) + 1)) <= MAX_PADDING:
            parts[-1].append(row)
            tokens += length
        else:
            parts.append([row])
            longest = tokens = length
    return [tuple(part) for part in parts]


def last_states(
    model: LlavaNextModel, features: dict[str, Any], share: bool, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the language model over a batch.

    Args:
        model: A LLaVA-NeXT without its head.
        features: See ``E5VTransformer.preprocess``.
        share: Whether equal prefixes are computed once. Not done for batches padded on the left, nor for backbones
            whose cache forgets (sliding windows).
        **kwargs: Arguments of the language model.

    Returns:
        States after the final norm ``(n, tokens, d)`` and their mask ``(n, tokens)``. With ``share`` there is one token
        a row, its last.
    """
    mask = features["attention_mask"]
    right_padded = bool(mask[:, 0].all())
    if share and right_padded and getattr(model.config.text_config, "sliding_window", None) is None:
        return _shared_states(model, features, **kwargs)
    embeddings = _embed(model, features["input_ids"], _image_slots(model, features))
    # A causal model never looks right, so padding on the right needs no mask, and attention is faster without one
    states = model.language_model(
        inputs_embeds=embeddings,
        attention_mask=None if right_padded else mask,
        position_ids=None if right_padded else (mask.cumsum(1) - 1).clamp(min=0),
        **{"use_cache": False, **kwargs},
    ).last_hidden_state
    return states, mask


def _shared_states(model: LlavaNextModel, features: dict[str, Any], **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    ids, lengths = features["input_ids"], features["attention_mask"].sum(1).tolist()
    slots = _image_slots(model, features)
    counts = _image_counts(features, len(lengths))
    starts = [sum(counts[:row]) for row in range(len(counts))]
    slots_of = [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
    index = features.get("image_index")
    index = list(range(len(slots))) if index is None else index.tolist()
    rows = [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)]
    shown = [[index[slot] for slot in own] for own in slots_of]
    sizes = {image: len(slot) for image, slot in zip(index, slots, strict=True)}

    states = None
    for group in plan_groups(rows, shown, model.config.image_token_id, sizes):
        own = list(group.rows)
        longest = max(lengths[row] for row in own)
        cache = None
        if group.prefix:
            first = [slots[slot] for slot in slots_of[own[0]][:1]]
            prefix = _embed(model, ids[own[:1], : group.prefix], first)
            cache = model.language_model(inputs_embeds=prefix, **{**kwargs, "use_cache": True}).past_key_values
            cache.batch_repeat_interleave(len(own))
        skip = 1 if group.prefix and slots_of[own[0]] else 0
        rest = [slots[slot] for row in own for slot in slots_of[row][skip:]]
        embeddings = _embed(model, ids[own, group.prefix : longest], rest)
        output = model.language_model(
            inputs_embeds=embeddings, past_key_values=cache, **{**kwargs, "use_cache": cache is not None}
        ).last_hidden_state
        last = torch.tensor([lengths[row] - group.prefix - 1 for row in own], device=output.device)
        found = output[torch.arange(len(own), device=output.device), last]
        if states is None:
            states = found.new_empty((len(rows), 1, found.shape[-1]))
        states[own, 0] = found
    return states, torch.ones(len(rows), 1, dtype=torch.long, device=states.device)


def _image_counts(features: dict[str, Any], rows: int) -> list[int]:
    counts = features.get("num_images_per_sample")
    return [0] * rows if counts is None else counts.tolist()


def _image_slots(model: LlavaNextModel, features: dict[str, Any]) -> list[torch.Tensor]:
    """Features ``(tokens, d)`` for each place of an image in the batch; each distinct image is computed once."""
    if features.get("pixel_values") is None:
        return []
    pixels = features["pixel_values"].to(model.dtype)
    images = model.get_image_features(pixels, features["image_sizes"]).pooler_output
    index = features.get("image_index")
    return list(images) if index is None else [images[i] for i in index.tolist()]


def _embed(model: LlavaNextModel, input_ids: torch.Tensor, slots: Sequence[torch.Tensor]) -> torch.Tensor:
    """Token embeddings ``(n, tokens, d)`` with image features in the places of image tokens, in their order."""
    embeddings = model.get_input_embeddings()(input_ids)
    if not slots:
        return embeddings
    where = (input_ids == model.config.image_token_id).unsqueeze(-1)
    return embeddings.masked_scatter(where, torch.cat(list(slots)).to(embeddings))
