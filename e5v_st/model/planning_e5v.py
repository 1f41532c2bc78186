"""Which prompts are computed together: batches of N tokens, in which equal images and similar texts meet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .tree_e5v import Part, plan_tree

if TYPE_CHECKING:
    from transformers import LlavaNextModel

#: Tokens of a batch on a CPU, where larger batches are no faster.
CPU_BATCH_TOKENS = 2048
#: Maximum number of tokens of a batch on a GPU: about a second of an 8 B model's work.
GPU_BATCH_TOKENS = 32768


def default_batch_tokens(model: LlavaNextModel) -> int:
    """Tokens of a batch that fit into half of the free memory of the model's GPU, or :data:`CPU_BATCH_TOKENS`.

    A token takes about 24 vectors of the model's width while a layer runs.
    """
    if model.device.type != "cuda":
        return CPU_BATCH_TOKENS
    per_token = 2 * 24 * model.config.text_config.hidden_size
    free, _ = torch.cuda.mem_get_info(model.device)
    free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)  # torch's own, unused
    return min(GPU_BATCH_TOKENS, max(2048, int(free * 0.5) // per_token))


def plan_batches(images: Sequence[Any], costs: Sequence[tuple[int, int]], budget: float) -> list[list[int]]:
    """Packs rows, in their order, into batches of at most ``budget`` tokens; a single row may take more.

    Rows about one image stay together. With a budget of 100 tokens, an image of 80 and texts of 15::

        row             0    1    2    3       4    5
        image           a    a    b    b       none none
        tokens       80+15   15   80+15 15     60   60
        batches      [0       1] [2     3]     [4] [5]       0 and 1 pay for the image a once

    Args:
        images: What stands for each row's images, empty without any. Rows that follow each other with the same images
            pay for them once.
        costs: Tokens of each row's images, and of its text.
        budget: Maximum number of tokens of a batch. For a row that shows what the row before shows, only the batch's
            texts count, as computing an image again would take longer.

    Returns:
        Batches of row numbers.
    """
    batches: list[list[int]] = []
    before: Any = None
    shown = written = 0  # tokens of the batch's images, and of its texts
    for row, (image, (image_tokens, text_tokens)) in enumerate(zip(images, costs, strict=True)):
        cost = written + text_tokens + (0 if image == before else shown + image_tokens)
        if before is None or bool(image) != bool(before) or cost > budget:
            batches.append([])
            shown = written = 0
            before = None
        batches[-1].append(row)
        shown += 0 if image == before else image_tokens
        written += text_tokens
        before = image
    return batches


def in_order(states: Sequence[torch.Tensor], prompts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Puts the states of a batch's prompts, which were computed some at a time, into the order of the batch.

    Args:
        states: Of some prompts each ``(some, …)``.
        prompts: Their numbers in the batch ``(some,)``. Each prompt is among them once.

    Returns:
        ``(n, …)``.
    """
    found = torch.cat(list(states))
    order = torch.cat(list(prompts)).to(found.device)
    return torch.empty_like(found).index_copy_(0, order, found)


def plan_parts(
    prompts: Sequence[np.ndarray],
    images: Sequence[Sequence[int]],
    image_id: int,
    sizes: Sequence[int],
    budget: float = math.inf,
) -> tuple[Part, ...]:
    """Splits a batch into parts of at most ``budget`` tokens, images of like size together, and joins each to a tree.

    Args:
        prompts: See ``tree_e5v.plan_tree``.
        images: See ``tree_e5v.plan_tree``.
        image_id: See ``tree_e5v.plan_tree``.
        sizes: See ``tree_e5v.plan_tree``.
        budget: See :func:`plan_batches`.
    """
    shown = [sum(sizes[image] for image in own) for own in images]
    order = sorted(range(len(prompts)), key=lambda n: (-shown[n], tuple(images[n]), prompts[n].tobytes()))
    costs = [(shown[prompt], len(prompts[prompt]) - shown[prompt]) for prompt in order]
    batches = plan_batches([tuple(images[prompt]) for prompt in order], costs, budget)
    return tuple(_plan_part([order[place] for place in batch], prompts, images, image_id, sizes) for batch in batches)


def _plan_part(
    members: list[int],
    prompts: Sequence[np.ndarray],
    images: Sequence[Sequence[int]],
    image_id: int,
    sizes: Sequence[int],
) -> Part:
    """Joins some prompts of a batch to a tree that counts only the images which these show."""
    used = sorted({image for prompt in members for image in images[prompt]})
    own = [[used.index(image) for image in images[prompt]] for prompt in members]
    tree = plan_tree([prompts[prompt] for prompt in members], own, image_id, [sizes[image] for image in used])
    return Part(torch.tensor(members), torch.tensor(used, dtype=torch.long), tree)
