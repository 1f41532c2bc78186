"""Batches of items on a device: planned, prepared ahead, launched and settled.

    rows ──► plan ──────► prepare ───► launch ─────► settle ──► (row, embedding)
             sort and     tokens,      copy to the   wait for
             pack by      tiles of     device,       the copy to
             tokens       images       forward       the host

On a GPU the steps of different batches overlap. Threads prepare up to ``AHEAD`` batches while the GPU computes, and a
batch is settled once the next one is launched, so that the GPU always has something to do. Time goes to the right:

    batch 1    prepare   launch ── settle
    batch 2    prepare          launch ── settle
    batch 3              prepare        launch ── settle

On a CPU the steps follow one another: the model needs all cores itself.

If memory runs out, the batch is halved, and so is the budget of tokens. What is left is then planned anew.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .model.items_e5v import Item
from .model.planning_e5v import plan_batches
from .model.pooling_e5v import pools_last_tokens
from .reading import Row

if TYPE_CHECKING:
    import numpy as np
    import torch
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

#: Batches that are prepared while a GPU computes another.
AHEAD = 2

#: An item's row, and its costs: tokens of its images, and about how many of its text.
Costed = tuple[Row, tuple[int, int]]
#: Waits for the embeddings of a batch, in the order of its items; in place of one there may be what is wrong.
Wait = Callable[[], Sequence["np.ndarray | Exception"]]


@dataclass
class Budget:
    """Tokens of a batch; halved, and kept so, when memory runs out."""

    tokens: int

    def halve(self) -> None:
        """Halves the budget for the rest of the job."""
        self.tokens = max(1, self.tokens // 2)


def embed_rows(
    model: SentenceTransformer, rows: Iterable[Row], budget: Budget, threads: ThreadPoolExecutor
) -> Iterator[tuple[Row, np.ndarray | Exception]]:
    """Yields each row with its embedding, or with the error if it does not fit into memory alone, in any order.

    Args:
        model: An E5-V.
        rows: Items that were read, each different.
        budget: Tokens of a batch.
        threads: Prepare batches for a GPU.
    """
    running: deque[tuple[list[Row], Wait]] = deque()
    for batch, features in _prepare_ahead(model, _sorted(model, rows), budget, threads):
        running.append((batch, _launch(model, features, [row.item for row in batch], budget)))
        if len(running) > 1:  # the one before has been computed while this one was launched
            yield from _settle(*running.popleft())
    for launched in running:
        yield from _settle(*launched)


def _settle(batch: Sequence[Row], wait: Wait) -> Iterator[tuple[Row, np.ndarray | Exception]]:
    return zip(batch, wait(), strict=True)


# ---- plan ----


def _sorted(model: SentenceTransformer, rows: Iterable[Row]) -> list[Costed]:
    """Returns rows with what they cost, in the order in which they share most.

    Prompts about one image stand together, and so do texts that begin alike: they share what they begin with.
    """
    costed = [(row, _count_tokens(model, row.item)) for row in rows]

    def place(pair: Costed) -> tuple[Any, ...]:
        (row, (image_tokens, _)) = pair
        return -image_tokens, row.item.image_keys, row.item.prompt, row.item.sentence or ""

    return sorted(costed, key=place)


def _count_tokens(model: SentenceTransformer, item: Item) -> tuple[int, int]:
    """Tokens of an item's images, and a guess at those of its text that needs no tokenizer."""
    transformer: Any = model[0]
    return transformer.count_image_tokens(item), 12 + (len(item.prompt or "") + len(item.sentence or "")) // 3


def _pack(model: SentenceTransformer, rows: Sequence[Costed], tokens: int) -> deque[list[Row]]:
    """Returns rows as batches, in their order."""
    shares = pools_last_tokens(model) and model[0].shares()

    def shown(row: Row) -> tuple[Any, ...]:
        keys = row.item.image_keys
        return keys if shares or not keys else (*keys, row.index)  # if nothing is shared, each row has its own images

    plan = plan_batches([shown(row) for row, _ in rows], [cost for _, cost in rows], tokens)
    return deque([rows[place][0] for place in batch] for batch in plan)


# ---- prepare ----


def _prepare_ahead(
    model: SentenceTransformer, rows: Sequence[Costed], budget: Budget, threads: ThreadPoolExecutor
) -> Iterator[tuple[list[Row], dict[str, Any]]]:
    """Yields batches of rows and their features. What is left is planned anew when the budget has changed."""
    on_gpu = model.device.type == "cuda"
    prepare = partial(_prepare, model, _collate_options(model), threads if on_gpu else None)
    left = list(rows)
    while left:
        tokens = budget.tokens
        batches = _pack(model, left, tokens)
        coming: deque[tuple[list[Row], Callable[[], dict[str, Any]]]] = deque()
        while (batches or coming) and budget.tokens == tokens:
            while batches and len(coming) < (AHEAD if on_gpu else 1):
                batch = batches.popleft()
                coming.append((batch, threads.submit(prepare, batch).result if on_gpu else partial(prepare, batch)))
            batch, features = coming.popleft()
            left = left[len(batch) :]
            yield batch, features()


def _collate_options(model: SentenceTransformer) -> dict[str, Any]:
    return {"max_length": model[0].find_max_length(), "share": pools_last_tokens(model)}


def _prepare(
    model: SentenceTransformer, options: dict[str, Any], threads: ThreadPoolExecutor | None, batch: Sequence[Row]
) -> dict[str, Any]:
    """Returns the features of a batch; for a GPU, threads tile its images, and the features are pinned."""
    each_image = threads.map if threads else map
    try:
        features = model[0].collate([row.item for row in batch], **options, each_image=each_image)
    except Exception as error:
        numbers = sorted(row.index for row in batch)
        raise RuntimeError(f"no batch could be made of the items {numbers}: {error!r}") from error
    return _pinned(features) if threads else features


def _pinned(features: dict[str, Any]) -> dict[str, Any]:
    """Returns features in memory that a GPU copies from while it computes."""
    import torch

    pinned = {name: value.pin_memory() for name, value in features.items() if isinstance(value, torch.Tensor)}
    if "parts" in features:
        pinned["parts"] = tuple(part.map(torch.Tensor.pin_memory) for part in features["parts"])
    return {**features, **pinned}


# ---- launch ----


def _launch(model: SentenceTransformer, features: dict[str, Any], items: Sequence[Item], budget: Budget) -> Wait:
    """Starts a batch; what it returns waits for the embeddings. An item that does not fit alone gets the error."""
    try:
        return _forward(model, features)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        failed = type(error)(*error.args)  # without the stack, which would hold on to the tensors
    if len(items) == 1:
        return lambda: [failed]
    return _launch_halves(model, items, budget)


def _forward(model: SentenceTransformer, features: dict[str, Any]) -> Wait:
    import torch
    from sentence_transformers.util import truncate_embeddings

    tensors = {name: value for name, value in features.items() if isinstance(value, torch.Tensor)}
    moved = {name: value.to(model.device, non_blocking=True) for name, value in tensors.items()}
    output = model({**features, **moved})["sentence_embedding"]
    return _copied(truncate_embeddings(output, model.truncate_dim))


def _launch_halves(model: SentenceTransformer, items: Sequence[Item], budget: Budget) -> Wait:
    """Starts a batch that did not fit as two batches, and halves all that come later."""
    import torch

    budget.halve()
    logger.warning("out of memory with %d items: going on with %d tokens a batch", len(items), budget.tokens)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half, options = len(items) // 2, _collate_options(model)
    halves = (items[:half], items[half:])
    waits = [_launch(model, model[0].collate(part, **options), part, budget) for part in halves]
    return lambda: [row for wait in waits for row in wait()]


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    # On a CPU, torch raises a plain RuntimeError
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def _copied(embeddings: torch.Tensor) -> Callable[[], np.ndarray]:
    """Starts the copy of embeddings to the host's memory; what it returns waits for it."""
    import torch

    if embeddings.device.type != "cuda":
        return embeddings.float().cpu().numpy
    host = torch.empty(embeddings.shape, dtype=torch.float32, pin_memory=True)
    host.copy_(embeddings.float(), non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait() -> np.ndarray:
        done.synchronize()
        return host.numpy()

    return wait
