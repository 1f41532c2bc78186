"""Which inputs share a prefix, and the forward that computes each prefix once.

A causal model's states depend on what stands to their left alone. So the chat header is the same for all texts of a
batch, header and image are the same for all prompts about one image, and whatever else prompts begin with alike. The
prompts of a batch are therefore the branches of a :class:`Tree` whose nodes are tokens: every node goes through the
model once, all in one row without padding, and attention sees to it that each sees its own branch alone. Prompts about
different images, and texts, stand beside each other and share nothing: the header before an image is short. In the last
layer only the state of each prompt's last token is wanted, so every other token gives its key and value there, and
nothing more. The result is that of encoding one by one, up to rounding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

if TYPE_CHECKING:
    from transformers import LlavaNextModel

    from .planning_e5v import Part

#: Backbones whose layers are built as :func:`_run_layer` and :func:`_keys_and_values` read them.
BACKBONES = ("llama", "mistral")
#: The name under which transformers knows :func:`branch_attention`; that of each copy of this file is its own, since
#: models that were saved with different versions of it may be loaded in one process.
ATTENTION = f"e5v_branches_{crc32(__name__.encode()):08x}"
#: Tokens that go through a feed-forward network together on a CPU.
CPU_TOKENS = 768
#: Nodes behind those that all prompts share which attend together.
TOGETHER = 1024
#: Most padding in prompts that attend side by side, as a part of their tokens; it costs attention alone.
MAX_PADDING = 0.25


@dataclass(frozen=True)
class Block:
    """Nodes of a tree that attend together.

    Attributes:
        queries: A range, or indexes ``(n, q)``: n prompts side by side.
        keys: What they see: a range, or indexes ``(n, k)``.
        mask: Which of the keys each query sees, ``(1 or n, 1, q, k)``; where ``None``, those up to its own place.
        wanted: Where the queries are indexes: which of the ``n * q`` results are kept. Others are padding, or nodes
            that another prompt computes.
    """

    queries: slice | torch.Tensor
    keys: slice | torch.Tensor
    mask: torch.Tensor | None = None
    wanted: torch.Tensor | None = None


@dataclass(frozen=True)
class Tree:
    """The prompts of a batch, with what they begin with alike standing there once.

    Attributes:
        ids: Token of each node ``(nodes,)``; what it is at the image's places does not matter.
        positions: How many nodes stand to the left of each in its branch ``(nodes,)``.
        image_nodes: The nodes that are image features ``(m,)``.
        image_rows: Which of the features of all distinct images, one below the other, they are ``(m,)``.
        last: The last node of each prompt ``(n,)``.
        blocks: Hold every node once.
        last_blocks: Their queries are places in ``last``, and hold each once.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    image_nodes: torch.Tensor
    image_rows: torch.Tensor
    last: torch.Tensor
    blocks: tuple[Block, ...]
    last_blocks: tuple[Block, ...]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Tree:
        """The same tree with each tensor put through a function, as one that moves it to a device."""
        return _map(self, function)


@dataclass(frozen=True)
class Branches:
    """What attention is told of a tree; one object, as ``torch.compile`` would count what stands in a tuple.

    Attributes:
        blocks: Hold every query once.
        keys_and_values: Where they are others than those of the queries, ``(1, key heads, nodes, d)`` each.
    """

    blocks: tuple[Block, ...]
    keys_and_values: tuple[torch.Tensor, torch.Tensor] | None = None


def _map(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(_map(each, function) for each in value)
    if isinstance(value, (Tree, Block)):
        return replace(value, **{name: _map(each, function) for name, each in vars(value).items()})
    return value


# ---- the plan ----


def plan_tree(
    rows: Sequence[Sequence[int]], images: Sequence[Sequence[int]], image_id: int, sizes: Sequence[int]
) -> Tree:
    """Joins prompts to a tree, and decides which of its nodes attend together.

    Args:
        rows: Token ids of each prompt, without padding.
        images: Which images each prompt shows, in their order: the image tokens of different images look the same.
        image_id: The image token's id.
        sizes: Tokens of each image; two images may follow each other without anything in between.
    """
    marked = [_mark_images(row, shown, image_id, sizes) for row, shown in zip(rows, images, strict=True)]
    families: dict[bytes, list[int]] = defaultdict(list)
    for number, (row, shown) in enumerate(zip(marked, images, strict=True)):
        end = int((row < 0).argmax()) + sizes[shown[0]] if shown else 0
        families[row[:end].tobytes()].append(number)
    start = 0
    ids, positions, blocks, last_blocks = [], [], [], []
    last = np.zeros(len(rows), np.int64)
    for members in families.values():
        family = _Family([marked[number] for number in members], start)
        last[members] = [path[-1] for path in family.paths]
        ids.append(family.ids)
        positions.append(family.positions)
        blocks += family.blocks()
        last_blocks += family.last_blocks(members)
        start = family.end
    nodes = torch.from_numpy(np.concatenate(ids))
    image_nodes = (nodes < 0).nonzero().squeeze(1)
    return Tree(
        ids=nodes.clamp(min=0),
        positions=torch.from_numpy(np.concatenate(positions)),
        image_nodes=image_nodes,
        image_rows=-1 - nodes[image_nodes],
        last=torch.from_numpy(last),
        blocks=tuple(blocks),
        last_blocks=tuple(last_blocks),
    )


def _mark_images(row: Sequence[int], shown: Sequence[int], image_id: int, sizes: Sequence[int]) -> np.ndarray:
    """Replaces the n-th feature of all distinct images by ``-1 - n``, so that what is equal is the same."""
    ids = np.array(row, np.int64)
    if shown:
        features = [np.arange(sizes[image]) + sum(sizes[:image]) for image in shown]
        ids[ids == image_id] = -1 - np.concatenate(features)
    return ids


class _Family:
    """Prompts about the same image, or texts, as a tree whose nodes are numbered from ``start``.

    In alphabetical order each prompt shares with the one before all that it shares with any before. So its own nodes
    stand in one piece, behind those that it shares.
    """

    def __init__(self, rows: Sequence[np.ndarray], start: int) -> None:
        self.start = start
        self.order = sorted(range(len(rows)), key=lambda row: rows[row].tobytes())
        self.paths: list[np.ndarray] = [np.zeros(0, np.int64)] * len(rows)
        self.shared = [0] * len(rows)  # how many nodes of each path are there already
        parts = []
        before, path, end = np.zeros(0, np.int64), np.zeros(0, np.int64), start
        for row in self.order:
            same = _common_length(before, rows[row])
            path = np.concatenate([path[:same], np.arange(end, end + len(rows[row]) - same)])
            parts.append((rows[row][same:], np.arange(same, len(rows[row]))))
            end += len(rows[row]) - same
            self.paths[row], self.shared[row], before = path, same, rows[row]
        self.end = end
        self.prefix = min((self.shared[row] for row in self.order[1:]), default=end - start)  # nodes that all share
        self.ids = np.concatenate([ids for ids, _ in parts])
        self.positions = np.concatenate([positions for _, positions in parts])
        self.side_by_side = self._is_less_side_by_side()

    def _is_less_side_by_side(self) -> bool:
        """Whether attention is less work prompt by prompt than with the nodes that all share ahead of all others."""
        rest = self.end - self.start - self.prefix
        longest = max(len(path) - shared for path, shared in zip(self.paths, self.shared, strict=True))
        after_prefix = self.prefix**2 + 2 * rest * (self.prefix + min(rest, max(TOGETHER, longest)))
        return sum(len(path) ** 2 for path in self.paths) < after_prefix

    def blocks(self) -> list[Block]:
        """Returns blocks of all nodes."""
        if not self.side_by_side:
            first = slice(self.start, self.start + self.prefix)
            return [*([Block(first, first)] if self.prefix else []), *self._after_prefix()]
        blocks = []
        for part in self._parts([row for row, path in enumerate(self.paths) if self.shared[row] < len(path)]):
            tokens = self._tokens(part)
            places = np.arange(tokens.shape[1])
            own = [(places >= self.shared[row]) & (places < len(self.paths[row])) for row in part]
            wanted = torch.from_numpy(np.flatnonzero(np.stack(own)))
            blocks.append(Block(tokens, tokens, wanted=wanted))
        return blocks

    def _after_prefix(self) -> list[Block]:
        """Returns blocks of the nodes behind those that all prompts share, of about :data:`TOGETHER` nodes each."""
        blocks: list[Block] = []
        part: list[int] = []
        first = last = self.start + self.prefix
        for row in self.order:
            part.append(row)
            last = max(last, self.paths[row][-1] + 1)
            if last - first >= TOGETHER or row == self.order[-1]:
                if last > first:
                    blocks.append(self._masked(part, int(first), int(last)))
                part, first = [], last
        return blocks

    def _masked(self, rows: Sequence[int], first: int, last: int) -> Block:
        """Returns the block of the nodes from ``first`` to before ``last``, which are on the paths of ``rows``."""
        keys, index = self._keys(rows)
        seen = np.zeros((last - first, len(keys)), bool)
        seen[:, : self.prefix] = True
        for row in rows:
            path = self.paths[row][self.prefix :]
            own = path[path >= first]
            seen[own[:, None] - first, np.searchsorted(keys, path)] = path <= own[:, None]
        return Block(slice(first, last), index, torch.from_numpy(seen)[None, None])

    def _keys(self, rows: Sequence[int]) -> tuple[np.ndarray, slice | torch.Tensor]:
        """Returns the nodes on the paths of ``rows``, in their order, and the index of a block that takes them."""
        keys = np.unique(np.concatenate([self.paths[row] for row in rows]))
        in_one_piece = keys[-1] + 1 - keys[0] == len(keys)
        return keys, slice(int(keys[0]), int(keys[-1]) + 1) if in_one_piece else torch.from_numpy(keys)[None]

    def last_blocks(self, places: Sequence[int]) -> list[Block]:
        """Returns blocks of each prompt's last node.

        Args:
            places: Where each prompt's result stands.
        """
        blocks = []
        if self.side_by_side:
            for part in self._parts(range(len(self.paths))):
                tokens = self._tokens(part)
                ends = torch.tensor([len(self.paths[row]) for row in part])
                seen = torch.arange(tokens.shape[1]) < ends[:, None]
                blocks.append(Block(torch.tensor([[places[row]] for row in part]), tokens, seen[:, None, None]))
            return blocks
        for start in range(0, len(self.order), TOGETHER):
            part = self.order[start : start + TOGETHER]
            keys, index = self._keys(part)
            seen = torch.from_numpy(np.stack([np.isin(keys, self.paths[row], assume_unique=True) for row in part]))
            blocks.append(Block(torch.tensor([[places[row] for row in part]]), index, seen[None, None]))
        return blocks

    def _parts(self, rows: Sequence[int]) -> list[list[int]]:
        """Splits prompts by length, longest first, so that a part pads no more than :data:`MAX_PADDING`."""
        parts: list[list[int]] = []
        longest = tokens = 0
        for row in sorted(rows, key=lambda row: -len(self.paths[row])):
            length = len(self.paths[row])
            if parts and tokens + length >= (1 - MAX_PADDING) * longest * (len(parts[-1]) + 1):
                parts[-1].append(row)
                tokens += length
            else:
                parts.append([row])
                longest = tokens = length
        return parts

    def _tokens(self, rows: Sequence[int]) -> torch.Tensor:
        """Nodes of prompts ``(n, longest)``; what fills up the shorter ones is seen by no token that counts."""
        longest = max(len(self.paths[row]) for row in rows)
        return torch.from_numpy(
            np.stack([np.pad(self.paths[row], (0, longest - len(self.paths[row])), mode="edge") for row in rows])
        )


def _common_length(one: np.ndarray, other: np.ndarray) -> int:
    """Number of tokens with which both begin."""
    size = min(len(one), len(other))
    differ = np.flatnonzero(one[:size] != other[:size])
    return int(differ[0]) if len(differ) else size


# ---- the forward ----


def prepare_sharing(model: LlavaNextModel) -> None:
    """Makes a language model that is known here compute attention by :func:`branch_attention`.

    Not one whose attention forgets (sliding windows), nor one for which another kernel was asked for, nor one whose
    layers are spread over several devices.
    """
    config = model.config.text_config
    known = config.model_type in BACKBONES and getattr(config, "sliding_window", None) is None
    devices = set(getattr(model, "hf_device_map", {}).values())
    if known and config._attn_implementation == "sdpa" and len(devices) <= 1:
        config._attn_implementation = ATTENTION


def can_share(config: Any) -> bool:
    """Whether :func:`shared_states` can run a language model; see :func:`prepare_sharing`."""
    return config._attn_implementation == ATTENTION


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
    return _attend(module, query, key, value, branches, kwargs["scaling"]), None


@torch.compiler.disable  # blocks are different in every batch
def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    branches: Branches,
    scaling: float,
) -> torch.Tensor:
    key, value = branches.keys_and_values or (key, value)
    results = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    for block in branches.blocks:
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


def plain_states(model: LlavaNextModel, features: dict[str, Any], **kwargs: Any) -> torch.Tensor:
    """Runs the language model over a whole batch, as it is.

    Args:
        model: A LLaVA-NeXT without its head.
        features: See ``E5VTransformer.preprocess``; may be padded on the left.
        **kwargs: Arguments of the language model.

    Returns:
        States after the final norm ``(n, tokens, d)``.
    """
    mask, ids = features["attention_mask"], features["input_ids"]
    embeddings = model.get_input_embeddings()(ids)
    images = _image_features(model, features)
    if images:
        index = features.get("image_index")
        slots = images if index is None else [images[i] for i in index.tolist()]
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


def shared_states(
    model: LlavaNextModel, features: dict[str, Any], parts: Sequence[Part], **kwargs: Any
) -> torch.Tensor:
    """Runs the language model over a batch, part by part, and computes what prompts begin with alike once.

    Args:
        model: A LLaVA-NeXT without its head, whose language model :func:`can_share` knows.
        features: See ``E5VTransformer.preprocess``.
        parts: Hold each prompt of this batch once.
        **kwargs: Arguments of the language model's layers.

    Returns:
        Each prompt's last state after the final norm ``(n, 1, d)``.
    """
    device = features["input_ids"].device
    parts = [part.map(lambda tensor: tensor.to(device, non_blocking=True)) for part in parts]
    found = []
    for part in parts:
        own = {name: features[name][part.images] for name in ("pixel_values", "image_sizes") if len(part.images)}
        found.append(_tree_states(model, own, part.tree, **kwargs))
    states = torch.cat(found)
    return torch.empty_like(states).index_copy_(0, torch.cat([part.rows for part in parts]), states)


def _tree_states(model: LlavaNextModel, pixels: dict[str, torch.Tensor], tree: Tree, **kwargs: Any) -> torch.Tensor:
    """Last states ``(n, 1, d)`` of a tree's prompts, given the pixels and sizes of its images."""
    language_model = model.language_model
    states = model.get_input_embeddings()(tree.ids)
    images = _image_features(model, pixels)
    if images:
        states[tree.image_nodes] = torch.cat(images).to(states)[tree.image_rows]
    states, positions = states.unsqueeze(0), tree.positions.unsqueeze(0)
    del images
    rotary = language_model.rotary_emb(states, position_ids=positions)
    *layers, final = language_model.layers
    for layer in layers:
        _run_layer(layer, states, rotary, branches=Branches(tree.blocks), **kwargs)
    branches = Branches(tree.last_blocks, _keys_and_values(final, states, rotary))
    states, rotary = states[:, tree.last], tuple(each[:, tree.last] for each in rotary)
    _run_layer(final, states, rotary, branches=branches, **kwargs)
    return language_model.norm(states).transpose(0, 1)


def _run_layer(
    layer: torch.nn.Module, states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], **kwargs: Any
) -> None:
    """Runs a Llama's or Mistral's layer; changes ``states`` ``(1, nodes, d)`` in place."""
    normed = layer.input_layernorm(states)
    states += layer.self_attn(hidden_states=normed, attention_mask=None, position_embeddings=rotary, **kwargs)[0]
    del normed
    # A CPU's caches hold so much; on a GPU more at once is faster
    for part in states.split(CPU_TOKENS if states.device.type == "cpu" else states.shape[1], dim=1):
        part += layer.mlp(layer.post_attention_layernorm(part))


def _keys_and_values(
    layer: torch.nn.Module, states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a Llama's or Mistral's layer, ``(1, key heads, nodes, d)``.

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


def _image_features(model: LlavaNextModel, features: dict[str, Any]) -> list[torch.Tensor]:
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
