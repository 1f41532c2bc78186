"""Images in a training step: what is frozen is computed once, and prompts stand in rows without padding.

A loss takes batches apart and joins them by rows, and gradient caching runs each mini-batch twice. So the same image
comes by several times in a step. Its *key*, which each row carries with it, tells::

    mini-batches of a step     first pass        second pass
    rows 0 1 2                 A  A  B           A  A  B         tower and projector: A and B once, in the first pass
    rows 3 4 5                 C  B  D           C  B  D         C and D once; B and the whole second pass from the memo

The memo lives for one step of the trainer, whose backward pass is the second one. There is none where something that
makes the features is trained or drawn anew: they would not be the same, or would lack a gradient.

Prompts with images are a tree, as in inference (``tree_e5v``): equal beginnings of a mini-batch are computed once, and
their gradients are added up. Where dropout is active each prompt is a tree of its own, since each must draw its own.
Both passes are laid out alike, so what gradient caching replays is drawn for the same tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from e5v_st.model.generic_e5v import MASKED_NODES, TOKEN_TYPES, Seen, tree_states
from e5v_st.model.pixels_e5v import from_samples, sample_fields
from e5v_st.model.planning_e5v import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS, in_order, plan_parts
from e5v_st.model.sharing_e5v import Branches, image_features, keys_and_values, plain_states

from .upstream import is_reentrant

if TYPE_CHECKING:
    from e5v_st.model.items_e5v import Item
    from e5v_st.model.modeling_e5v import E5VTransformer
    from e5v_st.model.pixels_e5v import ImageReader
    from e5v_st.model.tree_e5v import Part

#: Bytes of features that a step keeps at most on a CPU, and the part of a GPU's memory. Of an 8 B model in bfloat16, a
#: LLaVA-NeXT image of the largest size has 24 MB, a 32nd of what its activations take with checkpointing.
CPU_BYTES, GPU_PART = 2**30, 1 / 16

#: What tells images, or groups of them, apart: two halves of a hash.
Key = tuple[int, int]


# ---- keys ----


def make_keys(items: Sequence[Item], reader: ImageReader) -> torch.Tensor:
    """Returns what tells the images of a batch apart, ``(n, most, 2)``; a place without an image holds zeros.

    Args:
        items: The batch.
        reader: Says which images form a group; *most* is the largest number of groups of an item.
    """
    rows = [[_hash(key) for key, _ in reader.groups(item)] for item in items]
    most = max(map(len, rows))
    return torch.tensor([own + [(0, 0)] * (most - len(own)) for own in rows])


def _hash(key: Any) -> Key:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little", signed=True), int.from_bytes(digest[8:], "little", signed=True)


def read_keys(keys: torch.Tensor) -> list[list[Key]]:
    """Returns the keys of each row's images."""
    return [[(one, other) for one, other in own if one or other] for own in keys.tolist()]


# ---- the memo ----


class Memo(dict[tuple[torch.device, Key], Seen]):
    """Features of images, by device and key, up to a number of bytes; what comes later is computed again.

    Args:
        room: The number of bytes.
    """

    def __init__(self, room: float) -> None:
        super().__init__()
        self.room = room

    def keep(self, key: tuple[torch.device, Key], seen: Seen) -> None:
        """Keeps the features of an image, if there is room for them."""
        size = sum(each.numel() * each.element_size() for each in seen)
        if key not in self and size <= self.room:
            self[key] = seen
            self.room -= size


def make_memo(model: Any) -> Memo | None:
    """Returns an empty memo for a step, or none if features of images may change in it.

    Args:
        model: A family's model without its head.
    """
    decoder = {id(weight) for weight in model.get_decoder().parameters()}
    trained = any(weight.requires_grad and id(weight) not in decoder for weight in model.parameters())
    if trained or draws(model).vision:
        return None
    gpu = model.device.type == "cuda"
    return Memo(torch.cuda.get_device_properties(model.device).total_memory * GPU_PART if gpu else CPU_BYTES)


class Draws(NamedTuple):
    """Where random numbers are drawn in training.

    Attributes:
        vision: In front of the language model.
        attention: In the attention of the language model, or in another way than by a module for dropout.
        tokens: By modules for dropout in the language model, as that of a LoRA: for each token.
    """

    vision: bool
    attention: bool
    tokens: bool


def draws(model: Any) -> Draws:
    """Looks for active dropout.

    Args:
        model: A family's model without its head, in training.
    """
    decoder = model.get_decoder()
    others = [part for part in model.children() if part is not decoder]
    vision = any(_drops(part) or _draws_otherwise(part) for part in others)
    return Draws(vision, _draws_otherwise(decoder), _drops(decoder))


def _drops(part: torch.nn.Module) -> bool:
    return any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in part.modules())


def _draws_otherwise(part: torch.nn.Module) -> bool:
    """Whether a module has a probability under a name such as ``attention_dropout``, which a function gets."""
    return any(
        "drop" in name and isinstance(value, float) and value > 0
        for module in part.modules()
        for name, value in vars(module).items()
    )


# ---- the forward ----


@dataclass(frozen=True)
class Shown:
    """The rows of a batch that show images.

    Attributes:
        features: Of these rows alone.
        keys: The distinct images of these rows.
        images: Which of them each row shows.
        places: A row, and a place in it, where each image stands.
        lengths: Tokens of each row.
    """

    features: dict[str, torch.Tensor]
    keys: list[Key]
    images: list[list[int]]
    places: list[tuple[int, int]]
    lengths: list[int]

    @classmethod
    def of(cls, features: Mapping[str, Any], keys: Sequence[Sequence[Key]], rows: Sequence[int]) -> Shown:
        """Takes rows out of a batch.

        Args:
            features: See ``features_e5v``; not shared.
            keys: The keys of all rows.
            rows: Those that show images.
        """
        own = {name: value for name, value in features.items() if isinstance(value, torch.Tensor) and value.ndim}
        if len(rows) < len(keys):
            index = torch.tensor(rows, device=own["input_ids"].device)
            own = {name: value[index] for name, value in own.items()}
        places: dict[Key, tuple[int, int]] = {}
        for place, row in enumerate(rows):
            for number, key in enumerate(keys[row]):
                places.setdefault(key, (place, number))
        order = {key: image for image, key in enumerate(places)}
        images = [[order[key] for key in keys[row]] for row in rows]
        return cls(own, list(places), images, list(places.values()), own["attention_mask"].sum(1).tolist())


def image_states(transformer: E5VTransformer, features: Mapping[str, Any], memo: Memo | None) -> torch.Tensor | None:
    """Returns the last hidden state of each item ``(n, 1, d)``, or ``None`` if the batch must run as it is.

    Where prompts share nothing (flash attention, dropout of attention), LLaVA-NeXT's padded batch runs with the
    features that are known.

    Args:
        transformer: In training.
        features: With ``image_keys``; not shared.
        memo: Of this step, if it has one.
    """
    model, drawn = transformer.model, draws(transformer.model)
    if drawn.vision:
        return None
    keys = read_keys(features["image_keys"])
    if drawn.attention or transformer.sharing not in _WAYS or not transformer.shares():
        return _padded_states(model, features, keys, memo) if transformer.backbone.is_llava_next else None
    with_images = [row for row, own in enumerate(keys) if own]
    texts = [row for row, own in enumerate(keys) if not own]
    found = []
    if with_images:
        shown = Shown.of(features, keys, with_images)
        found.append(_WAYS[transformer.sharing](transformer, shown, memo, drawn.tokens))
    if texts:
        index = torch.tensor(texts, device=model.device)
        lengths = features["attention_mask"][index].sum(1).tolist()
        found.append(transformer.packed_states(features["input_ids"][index], lengths))
    return in_order(found, [torch.tensor(rows) for rows in (with_images, texts) if rows])


def _plan(transformer: E5VTransformer, shown: Shown, sizes: Sequence[int], alone: bool) -> list[Part]:
    """Plans trees over prompts with images; each a tree of its own if it is to be alone.

    The budget is a fixed number, so that both passes of gradient caching are laid out alike.
    """
    ids = shown.features["input_ids"].cpu().numpy()
    prompts = [row[:length] for row, length in zip(ids, shown.lengths, strict=True)]
    budget = CPU_BATCH_TOKENS if transformer.model.device.type == "cpu" else GPU_BATCH_TOKENS
    budget = min(budget, MASKED_NODES) if transformer.sharing == "masks" else budget
    token = transformer.config.image_token_id
    if not alone:
        return list(plan_parts(prompts, shown.images, token, sizes, budget))
    parts = [plan_parts([prompt], [own], token, sizes) for prompt, own in zip(prompts, shown.images, strict=True)]
    return [replace(part, prompts=torch.tensor([row])) for row, (part,) in enumerate(parts)]


def _llava_next_states(transformer: E5VTransformer, shown: Shown, memo: Memo | None, alone: bool) -> torch.Tensor:
    images = llava_next_images(transformer.model, shown, memo)
    parts = _plan(transformer, shown, list(map(len, images)), alone)
    return in_order([_tree_states(transformer.model, images, part) for part in parts], [part.prompts for part in parts])


def llava_next_images(model: Any, shown: Shown, memo: Memo | None) -> list[torch.Tensor]:
    """Returns the features ``(tokens, d)`` of each distinct image of LLaVA-NeXT.

    Args:
        model: Without its head.
        shown: What shows them.
        memo: Those that it has are not computed.
    """
    known = {key: memo[model.device, key][0] for key in shown.keys if memo and (model.device, key) in memo}
    missing = [image for image, key in enumerate(shown.keys) if key not in known]
    # One after the other on a CPU, whose caches hold no more
    together = 1 if model.device.type == "cpu" else max(1, len(missing))
    for start in range(0, len(missing), together):
        some = missing[start : start + together]
        rows, numbers = (torch.tensor(each) for each in zip(*(shown.places[image] for image in some), strict=True))
        own: Any = {name: shown.features[name][rows, numbers] for name in ("pixel_values", "image_sizes")}
        for image, found in zip(some, image_features(model, own), strict=True):
            known[shown.keys[image]] = found
            if memo is not None:
                memo.keep((model.device, shown.keys[image]), (found,))
    return [known[key] for key in shown.keys]


def _tree_states(model: Any, images: Sequence[torch.Tensor], part: Part) -> torch.Tensor:
    """Returns the last hidden states ``(n, 1, d)`` of a tree's prompts, with gradients.

    The layers are called as they are, so that checkpointing and sharding see them. In the last one each prompt's last
    token alone is wanted: the others give their keys and values there, which are computed inside of it. Reentrant
    checkpointing knows nothing of them, so there the layer gives all.
    """
    language_model = model.get_decoder()
    tree = part.tree.map(lambda tensor: tensor.to(model.device, non_blocking=True))
    embeddings = model.get_input_embeddings()(tree.ids)
    features = torch.cat([images[image] for image in part.images.tolist()]).to(embeddings)
    # Not in place: for checkpointing, embeddings may be asked for a gradient
    states = embeddings.index_copy(0, tree.image_nodes, features[tree.image_features]).unsqueeze(0)
    rotary = language_model.rotary_emb(states, position_ids=tree.positions.unsqueeze(0))
    *layers, final = language_model.layers
    for layer in layers:
        states = layer(states, position_embeddings=rotary, branches=Branches(tree.blocks))
    if final.gradient_checkpointing and is_reentrant(final):
        last = final(states, position_embeddings=rotary, branches=Branches(tree.blocks))[:, tree.last]
    else:
        branches = Branches(tree.last_blocks, partial(keys_and_values, final, states, rotary))
        last_rotary = tuple(each[:, tree.last] for each in rotary)
        last = final(states[:, tree.last], position_embeddings=last_rotary, branches=branches)
    found: torch.Tensor = language_model.norm(last).transpose(0, 1)
    return found


def _padded_states(model: Any, features: Any, keys: Sequence[Sequence[Key]], memo: Memo | None) -> torch.Tensor:
    """Returns the last hidden states of LLaVA-NeXT, where nothing but images is computed once."""
    shown = Shown.of(features, keys, range(len(keys)))
    images = llava_next_images(model, shown, memo)
    states = plain_states(model, features, [images[image] for own in shown.images for image in own])
    return states[torch.arange(len(states)), torch.tensor(shown.lengths) - 1].unsqueeze(1)


def _stock_states(transformer: E5VTransformer, shown: Shown, memo: Memo | None, alone: bool) -> torch.Tensor:
    """Returns the last hidden states of another family, from its stock language model."""
    device, image_id = transformer.model.device, transformer.config.image_token_id
    tokens = {
        name: shown.features[name] for name in ("input_ids", "attention_mask", *TOKEN_TYPES) if name in shown.features
    }
    groups = tuple(from_samples(sample_fields(shown.features, row)) for row, _ in shown.places)
    index = torch.tensor([own[0] for own in shown.images])
    counts = (tokens["input_ids"] == image_id).sum(1).tolist()
    parts = _plan(transformer, shown, [counts[row] for row, _ in shown.places], alone)
    known = {image: memo[device, key] for image, key in enumerate(shown.keys) if memo and (device, key) in memo}
    states = tree_states(
        transformer.model,
        {**tokens, "groups": groups, "image_index": index},
        parts,
        sharing=transformer.sharing,
        image_id=image_id,
        known=known,
    )
    if memo is not None:
        for image, seen in known.items():
            memo.keep((device, shown.keys[image]), seen)
    return states


#: How prompts with images are computed, by how a family shares prefixes.
_WAYS = {"layers": _llava_next_states, "tree": _stock_states, "masks": _stock_states}
