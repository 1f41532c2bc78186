"""Prompts -> a tree whose nodes are tokens, and the blocks of nodes that attend together. Nothing is computed here.

A causal model's hidden states depend only on what stands to their left. So prompts that begin alike have the same
hidden states up to where they part, and a tree holds each of them once. Three prompts, with a token for each word::

    prompt 0   A small cat sits            0 A ── 1 small ─┬─ 2 cat ─── 3 sits
    prompt 1   A small dog runs                            └─ 4 dog ─┬─ 5 runs
    prompt 2   A small dog sits                                      └─ 6 sits

    ids         A  small  cat  sits  dog  runs  sits          nodes 0 to 6, in this order
    positions   0    1     2    3     2    3     3            how far each stands from the root
    last        3, 5, 6                                       the node that each prompt ends with

All nodes go through the model in one row. A *block* tells attention which nodes (its keys) some nodes (its queries)
see. There are four kinds. Nodes that all prompts share are a ``prefix``: here 0 and 1, each of which sees those up to
itself. The nodes behind them are ``branches``, with a mask::

    keys          0 1 2 3 4 5 6
    query 2       x x x . . . .        if prompts share much: each node attends once, but is compared
          3       x x x x . . .        with keys that it does not see
          4       x x . . x . .
          5       x x . . x x .
          6       x x . . x . x

Where that is more work than attending prompt by prompt, the paths of all prompts stand ``side_by_side``. No mask is
needed, but shared nodes attend more than once, and only the ``wanted`` results (in brackets) are kept::

    prompt 0     [0] [1] [2] [3]       if prompts share little: no mask, but the results without brackets
    prompt 1      0   1  [4] [5]       are computed for nothing
    prompt 2      0   1   4  [6]

In the last layer only ``ends`` attend: the last node of each prompt, to all nodes on its path.

Five things are counted, and each has its own name:

========  ==========================================================================================
prompt    one of the prompts of a plan
member    one of the prompts of a family: those about the same first image, or those without an image
node      a token of the tree; the nodes of one family stand behind those of another
key       one of the nodes that a block's queries may see, by its place among them
feature   a vector of an image; those of all distinct images are counted through
========  ==========================================================================================
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

#: Nodes behind the prefix that attend together.
TOGETHER = 1024
#: The largest share of padding among prompts that attend side by side; it costs attention alone.
MAX_PADDING = 0.25


@dataclass(frozen=True)
class Block:
    """Queries that attend together, and what they see; its four kinds are made by the methods of the same names.

    ================  ===========================  ==================  ===============  ==========
    kind              queries                      keys                mask             wanted
    ================  ===========================  ==================  ===============  ==========
    ``prefix``        range of nodes               the queries         none: causal     all
    ``branches``      range of nodes               range, or (1, k)    (1, 1, q, k)     all
    ``side_by_side``  nodes (n, q), n paths        the queries         none: causal     ``wanted``
    ``ends``          prompts (n, 1)               nodes (n, k)        (n, 1, 1, k)     all
    ``ends``          prompts (1, q)               range, or (1, k)    (1, 1, q, k)     all
    ================  ===========================  ==================  ===============  ==========

    Attributes:
        queries: A range, or indexes ``(n, q)``.
        keys: The nodes that they may see: a range, or indexes ``(n, k)``.
        mask: Which of the keys each query sees, ``(1 or n, 1, q, k)``; if ``None``, those up to its own place.
        wanted: Which of the ``n * q`` results are kept; if ``None``, all. The others are padding, or of nodes whose
            results another prompt gives.
    """

    queries: slice | torch.Tensor
    keys: slice | torch.Tensor
    mask: torch.Tensor | None = None
    wanted: torch.Tensor | None = None

    @classmethod
    def prefix(cls, nodes: slice) -> Block:
        """Nodes that all prompts of a family begin with: each sees those up to itself."""
        return cls(nodes, nodes)

    @classmethod
    def branches(cls, nodes: slice, keys: slice | torch.Tensor, seen: np.ndarray) -> Block:
        """Nodes behind the prefix; ``seen`` ``(q, k)`` says which keys are on the way from the root to each."""
        return cls(nodes, keys, torch.from_numpy(seen)[None, None])

    @classmethod
    def side_by_side(cls, paths: torch.Tensor, own: np.ndarray) -> Block:
        """Whole paths ``(n, q)``; ``own`` ``(n, q)`` says which nodes get their results from which of them."""
        return cls(paths, paths, wanted=torch.from_numpy(np.flatnonzero(own)))

    @classmethod
    def ends(cls, prompts: torch.Tensor, keys: slice | torch.Tensor, seen: torch.Tensor) -> Block:
        """Prompts, each of which stands for its last node; only :attr:`Tree.last_blocks` are such."""
        return cls(prompts, keys, seen)


@dataclass(frozen=True)
class Tree:
    """The prompts of a batch, with what they begin with alike standing there once.

    Attributes:
        ids: The token of each node ``(nodes,)``; at an image's places it does not matter.
        positions: How many nodes stand to the left of each on its path ``(nodes,)``.
        prompts: A prompt on whose path each node is ``(nodes,)``.
        image_nodes: The nodes that are image features ``(m,)``.
        image_features: The feature that each of them is ``(m,)``.
        last: The last node of each prompt ``(n,)``.
        blocks: Their queries are nodes, and hold each once.
        last_blocks: Their queries are prompts, and hold each once.
        paths: The nodes of each prompt, from the root; they stay where they are.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    prompts: torch.Tensor
    image_nodes: torch.Tensor
    image_features: torch.Tensor
    last: torch.Tensor
    blocks: tuple[Block, ...]
    last_blocks: tuple[Block, ...]
    paths: tuple[np.ndarray, ...]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Tree:
        """Returns the same tree with each tensor put through a function, as one that moves it to a device."""
        return _map(self, function)


@dataclass(frozen=True)
class Part:
    """Prompts of a batch that are computed together.

    Attributes:
        prompts: Their numbers in the batch ``(n,)``.
        images: The numbers of the distinct images of the batch that they show ``(m,)``.
        tree: The prompts; its features are those of these images.
    """

    prompts: torch.Tensor
    images: torch.Tensor
    tree: Tree

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Part:
        """Returns the same part with each tensor put through a function, as one that moves it to a device."""
        return _map(self, function)


def _map(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(_map(each, function) for each in value)
    if isinstance(value, (Part, Tree, Block)):
        return replace(value, **{name: _map(each, function) for name, each in vars(value).items()})
    return value


def plan_tree(
    prompts: Sequence[Sequence[int]], images: Sequence[Sequence[int]], image_id: int, sizes: Sequence[int]
) -> Tree:
    """Joins prompts to a tree, and decides which of its nodes attend together.

    Prompts about different images, and texts, become families that stand beside each other and share nothing: the chat
    header before an image is short.

    Args:
        prompts: Token ids of each prompt, without padding.
        images: Which images each prompt shows, in their order: the image tokens of different images look the same.
        image_id: The image token's id.
        sizes: Tokens of each image; two images may follow each other without anything in between.
    """
    marked = [_mark_images(ids, shown, image_id, sizes) for ids, shown in zip(prompts, images, strict=True)]
    families: dict[bytes, list[int]] = defaultdict(list)
    for prompt, (ids, shown) in enumerate(zip(marked, images, strict=True)):
        end = int((ids < 0).argmax()) + 1 if shown else 0  # the first feature of an image stands for all of it
        families[ids[:end].tobytes()].append(prompt)
    start = 0
    node_ids, positions, owners, blocks, last_blocks = [], [], [], [], []
    paths: list[np.ndarray] = [np.zeros(0, np.int64)] * len(prompts)
    for members in families.values():
        family = _Family([marked[prompt] for prompt in members], start)
        owner = np.zeros(family.end - start, np.int64)
        for prompt, path in zip(members, family.paths, strict=True):
            paths[prompt] = path
            owner[path - start] = prompt
        owners.append(owner)
        node_ids.append(family.ids)
        positions.append(family.positions)
        blocks += family.blocks()
        last_blocks += family.last_blocks(members)
        start = family.end
    nodes = torch.from_numpy(np.concatenate(node_ids))
    image_nodes = (nodes < 0).nonzero().squeeze(1)
    return Tree(
        ids=nodes.clamp(min=0),
        positions=torch.from_numpy(np.concatenate(positions)),
        prompts=torch.from_numpy(np.concatenate(owners)),
        image_nodes=image_nodes,
        image_features=-1 - nodes[image_nodes],
        last=torch.tensor([int(path[-1]) for path in paths]),
        blocks=tuple(blocks),
        last_blocks=tuple(last_blocks),
        paths=tuple(paths),
    )


def _mark_images(prompt: Sequence[int], shown: Sequence[int], image_id: int, sizes: Sequence[int]) -> np.ndarray:
    """Replaces an image token that stands for feature n by ``-1 - n``, so that tokens are equal if nodes may be.

    With images of 2 and 3 tokens, ``<s> I I I red`` about image 1 becomes ``<s> -3 -4 -5 red``.
    """
    ids = np.array(prompt, np.int64)
    if shown:
        features = [np.arange(sizes[image]) + sum(sizes[:image]) for image in shown]
        ids[ids == image_id] = -1 - np.concatenate(features)
    return ids


class _Family:
    """Prompts about the same first image, or texts, as a tree whose nodes are numbered from ``start``.

    In alphabetical order each member shares with the one before all that it shares with any before. So the nodes that
    it adds stand in one piece, behind those that it shares::

        in order           shares   adds      path
        A small cat sits        0   0 1 2 3   0 1 2 3
        A small dog runs        2   4 5       0 1 4 5
        A small dog sits        3   6         0 1 4 6

    Attributes:
        start: Its first node.
        end: The node behind its last one.
        order: The members in alphabetical order.
        paths: The nodes of each member.
        shared: How many nodes of each path an earlier member in that order has added.
        prefix: How many nodes all members share.
        ids: The marked token of each node.
        positions: How far each node stands from the root.
        beside: Whether the members attend side by side.
    """

    def __init__(self, prompts: Sequence[np.ndarray], start: int) -> None:
        self.start = start
        self.order = sorted(range(len(prompts)), key=lambda member: prompts[member].tobytes())
        self.paths: list[np.ndarray] = [np.zeros(0, np.int64)] * len(prompts)
        self.shared = [0] * len(prompts)
        added = []
        before, path, end = np.zeros(0, np.int64), np.zeros(0, np.int64), start
        for member in self.order:
            ids = prompts[member]
            same = _common_length(before, ids)
            path = np.concatenate([path[:same], np.arange(end, end + len(ids) - same)])
            added.append((ids[same:], np.arange(same, len(ids))))
            end += len(ids) - same
            self.paths[member], self.shared[member], before = path, same, ids
        self.end = end
        self.prefix = min((self.shared[member] for member in self.order[1:]), default=end - start)
        self.ids = np.concatenate([ids for ids, _ in added])
        self.positions = np.concatenate([positions for _, positions in added])
        self.beside = self._is_less_side_by_side()

    def _is_less_side_by_side(self) -> bool:
        """Whether side by side fewer pairs of query and key are compared than with the prefix ahead of branches."""
        rest = self.end - self.start - self.prefix
        longest = max(len(path) - shared for path, shared in zip(self.paths, self.shared, strict=True))
        with_prefix = self.prefix**2 + 2 * rest * (self.prefix + min(rest, max(TOGETHER, longest)))
        return sum(len(path) ** 2 for path in self.paths) < with_prefix

    def blocks(self) -> list[Block]:
        """Returns blocks of all nodes."""
        if self.beside:
            return self._side_by_side()
        prefix = slice(self.start, self.start + self.prefix)
        return [*([Block.prefix(prefix)] if self.prefix else []), *self._branches()]

    def _side_by_side(self) -> list[Block]:
        """Returns blocks of the paths of all members that add a node."""
        blocks = []
        for group in self._groups([m for m, path in enumerate(self.paths) if self.shared[m] < len(path)]):
            paths = self._pad(group)
            places = np.arange(paths.shape[1])
            own = [(places >= self.shared[member]) & (places < len(self.paths[member])) for member in group]
            blocks.append(Block.side_by_side(paths, np.stack(own)))
        return blocks

    def _branches(self) -> list[Block]:
        """Returns blocks of the nodes behind the prefix, of about :data:`TOGETHER` nodes each."""
        blocks: list[Block] = []
        group: list[int] = []
        first = end = self.start + self.prefix
        for member in self.order:
            group.append(member)
            end = max(end, self.paths[member][-1] + 1)
            if end - first >= TOGETHER or member == self.order[-1]:
                if end > first:
                    blocks.append(self._branches_of(group, int(first), int(end)))
                group, first = [], end
        return blocks

    def _branches_of(self, members: Sequence[int], first: int, end: int) -> Block:
        """Returns the block of the nodes from ``first`` to before ``end``, which are on the paths of ``members``."""
        nodes, keys = self._keys(members)
        seen = np.zeros((end - first, len(nodes)), bool)
        seen[:, : self.prefix] = True
        for member in members:
            path = self.paths[member][self.prefix :]
            own = path[path >= first]
            seen[own[:, None] - first, np.searchsorted(nodes, path)] = path <= own[:, None]
        return Block.branches(slice(first, end), keys, seen)

    def _keys(self, members: Sequence[int]) -> tuple[np.ndarray, slice | torch.Tensor]:
        """Returns the nodes on the paths of ``members``, in their order, and how a block says so."""
        nodes = np.unique(np.concatenate([self.paths[member] for member in members]))
        in_one_piece = nodes[-1] + 1 - nodes[0] == len(nodes)
        return nodes, slice(int(nodes[0]), int(nodes[-1]) + 1) if in_one_piece else torch.from_numpy(nodes)[None]

    def last_blocks(self, prompts: Sequence[int]) -> list[Block]:
        """Returns blocks of each member's last node.

        Args:
            prompts: Which prompt each member is.
        """
        blocks = []
        if self.beside:
            for group in self._groups(range(len(self.paths))):
                paths = self._pad(group)
                lengths = torch.tensor([len(self.paths[member]) for member in group])
                seen = torch.arange(paths.shape[1]) < lengths[:, None]
                blocks.append(
                    Block.ends(torch.tensor([[prompts[member]] for member in group]), paths, seen[:, None, None])
                )
            return blocks
        for start in range(0, len(self.order), TOGETHER):
            group = self.order[start : start + TOGETHER]
            nodes, keys = self._keys(group)
            on_path = np.stack([np.isin(nodes, self.paths[member], assume_unique=True) for member in group])
            queries = torch.tensor([[prompts[member] for member in group]])
            blocks.append(Block.ends(queries, keys, torch.from_numpy(on_path)[None, None]))
        return blocks

    def _groups(self, members: Sequence[int]) -> list[list[int]]:
        """Splits members by length, longest first, so that a group pads no more than :data:`MAX_PADDING`."""
        groups: list[list[int]] = []
        longest = tokens = 0
        for member in sorted(members, key=lambda member: -len(self.paths[member])):
            length = len(self.paths[member])
            if groups and tokens + length >= (1 - MAX_PADDING) * longest * (len(groups[-1]) + 1):
                groups[-1].append(member)
                tokens += length
            else:
                groups.append([member])
                longest = tokens = length
        return groups

    def _pad(self, members: Sequence[int]) -> torch.Tensor:
        """Returns paths ``(n, longest)``; no node that counts sees what fills up the shorter ones."""
        longest = max(len(self.paths[member]) for member in members)
        return torch.from_numpy(
            np.stack(
                [np.pad(self.paths[member], (0, longest - len(self.paths[member])), mode="edge") for member in members]
            )
        )


def _common_length(one: np.ndarray, other: np.ndarray) -> int:
    """Number of tokens with which both begin."""
    size = min(len(one), len(other))
    differ = np.flatnonzero(one[:size] != other[:size])
    return int(differ[0]) if len(differ) else size
