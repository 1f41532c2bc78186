"""Which prompts are computed together: batches of so many tokens, in which equal images and alike texts meet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .sharing_e5v import Tree, plan_tree

if TYPE_CHECKING:
    from transformers import LlavaNextModel

#: Tokens of a batch on a CPU, where larger batches are no faster.
CPU_BATCH_TOKENS = 2048
#: Most tokens of a batch on a GPU: about a second of an 8 B model's work.
GPU_BATCH_TOKENS = 32768


@dataclass(frozen=True)
class Part:
    """Prompts of a batch that are computed together.

    Attributes:
        rows: Which prompts of the batch ``(n,)``.
        images: Which of its distinct images they show ``(m,)``.
        tree: The prompts.
    """

    rows: torch.Tensor
    images: torch.Tensor
    tree: Tree

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Part:
        """The same part with each tensor put through a function, as one that moves it to a device."""
        return Part(function(self.rows), function(self.images), self.tree.map(function))


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

    Args:
        images: What stands for each row's images, empty without any. Rows that follow each other with the same pay for
            them once.
        costs: Tokens of each row's images, and of its text.
        budget: Most tokens of a batch; an image may have as many tokens of text about it besides.

    Returns:
        Batches of row numbers.
    """
    batches: list[list[int]] = []
    before: Any = None
    shown = written = 0  # tokens of the batch's images, and of its texts
    for row, (image, (image_tokens, text_tokens)) in enumerate(zip(images, costs, strict=True)):
        # Computing an image anew in another batch would take longer than the text about it
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


def plan_parts(
    rows: Sequence[np.ndarray],
    images: Sequence[Sequence[int]],
    image_id: int,
    sizes: Sequence[int],
    budget: float = math.inf,
) -> tuple[Part, ...]:
    """Splits a batch into parts of at most ``budget`` tokens, images of like size together, and joins each to a tree.

    Args:
        rows: See ``sharing_e5v.plan_tree``.
        images: See ``sharing_e5v.plan_tree``.
        image_id: See ``sharing_e5v.plan_tree``.
        sizes: See ``sharing_e5v.plan_tree``.
        budget: See :func:`plan_batches`.
    """
    shown = [sum(sizes[image] for image in own) for own in images]
    order = sorted(range(len(rows)), key=lambda row: (-shown[row], tuple(images[row]), rows[row].tobytes()))
    costs = [(shown[row], len(rows[row]) - shown[row]) for row in order]
    batches = plan_batches([tuple(images[row]) for row in order], costs, budget)
    return tuple(_plan_part([order[place] for place in batch], rows, images, image_id, sizes) for batch in batches)


def _plan_part(
    numbers: list[int],
    rows: Sequence[np.ndarray],
    images: Sequence[Sequence[int]],
    image_id: int,
    sizes: Sequence[int],
) -> Part:
    used = sorted({image for row in numbers for image in images[row]})
    own = [[used.index(image) for image in images[row]] for row in numbers]
    tree = plan_tree([rows[row] for row in numbers], own, image_id, [sizes[image] for image in used])
    return Part(torch.tensor(numbers), torch.tensor(used, dtype=torch.long), tree)
