"""Plans a whole embedding job: what is equal is computed once, and the model never waits for an image.

``SentenceTransformer.encode`` sees one batch at a time. Here a window of items is read at once, so that repetitions are
dropped, prompts about one image stay together (their image is computed once, see ``sharing_e5v``), and batches are
packed by tokens instead of by items. While the model runs, threads read and tile what comes next.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .items_e5v import Item, read_items
from .sharing_e5v import image_key

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

#: Items that are read, planned and held in memory together. A window of decoded 640x480 photographs takes 240 MB.
WINDOW = 256
#: Tokens of a batch on a CPU, where larger batches are no faster.
CPU_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Encoded:
    """One result: the item's place in the input, and its embedding (float32, L2-normalised) or what was wrong."""

    index: int
    embedding: np.ndarray | None
    error: str | None = None


@dataclass
class Budget:
    """Tokens of a batch; halved, and kept so, when memory runs out."""

    tokens: int

    def halve(self) -> None:
        """Halves the budget for the rest of the job."""
        self.tokens = max(1, self.tokens // 2)


def encode_all(
    model: SentenceTransformer,
    items: Iterable[Any],
    *,
    prompt: str | Iterable[str | None] | None = None,
    batch_tokens: int | None = None,
    on_error: str = "raise",
    progress: bool = True,
) -> np.ndarray:
    """Embeds any number of items.

    Args:
        model: An E5-V.
        items: See ``items_e5v.read_item``; a generator or data set is never held in memory whole.
        prompt: One prompt for all, or one for each item; see ``prompts_e5v.resolve_prompt``. Names are not resolved.
        batch_tokens: Most tokens computed together; found from the free memory where ``None``.
        on_error: ``"raise"`` stops at the first bad item; ``"skip"`` goes on, gives it a row of NaN and says so once.
        progress: Whether to show a progress bar with rate and time left.

    Returns:
        Embeddings, float32 ``(n, d)``, L2-normalised, in input order.

    Raises:
        ValueError: If an item is bad; the message names its index.
    """
    import numpy as np

    size = model.get_embedding_dimension()
    rows, bad = [], []
    for result in stream_all(
        model, items, prompt=prompt, batch_tokens=batch_tokens, on_error=on_error, progress=progress
    ):
        if result.error is not None:
            bad.append(result.index)
        rows.append(np.full(size, np.nan, np.float32) if result.embedding is None else result.embedding)
    if bad:
        logger.warning("%d of %d items were skipped, their rows are NaN: %s", len(bad), len(rows), bad[:20])
    return np.stack(rows) if rows else np.zeros((0, size), np.float32)


def stream_all(
    model: SentenceTransformer,
    items: Iterable[Any],
    *,
    prompt: str | Iterable[str | None] | None = None,
    batch_tokens: int | None = None,
    on_error: str = "raise",
    progress: bool = True,
    window: int = WINDOW,
) -> Iterator[Encoded]:
    """Yields embeddings in input order, window by window; see :func:`encode_all`.

    Raises:
        ValueError: If an item is bad and ``on_error`` is ``"raise"``, after everything before it was yielded.
    """
    import torch
    from tqdm.auto import tqdm

    if on_error not in ("raise", "skip"):
        raise ValueError(f"got on_error={on_error!r}, want 'raise' or 'skip'")
    budget = Budget(batch_tokens or default_batch_tokens(model))
    prompts = itertools.repeat(prompt) if prompt is None or isinstance(prompt, str) else prompt
    total = len(items) if hasattr(items, "__len__") else None
    pairs = zip(items, prompts, strict=not isinstance(prompts, itertools.repeat))
    numbered = ((index, *pair) for index, pair in enumerate(pairs))
    model.eval()
    bar = tqdm(total=total, unit="item", disable=not progress, smoothing=0.05)
    first = 0
    with ThreadPoolExecutor(thread_name_prefix="e5v-read") as threads, bar:
        coming = _read_window(model, threads, numbered, window)
        while coming:
            now, coming = [future.result() for future in coming], _read_window(model, threads, numbered, window)
            with torch.inference_mode():
                embeddings = _encode_window(model, [item for item, _ in now], budget, threads, bar.update, first)
            for place, (_, error) in enumerate(now):
                if error is not None and on_error == "raise":
                    raise ValueError(error)
                yield Encoded(first + place, embeddings.get(place), error)
            first += len(now)


def default_batch_tokens(model: SentenceTransformer) -> int:
    """Tokens of a batch that fit into half of the free memory of the model's GPU, or :data:`CPU_BATCH_TOKENS`.

    A token takes its keys and values in every layer, and about 24 vectors of the model's width while a layer runs.
    """
    import torch

    if model.device.type != "cuda":
        return CPU_BATCH_TOKENS
    config = model[0].config.text_config
    heads = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    per_token = 2 * (2 * config.num_hidden_layers * heads + 24 * config.hidden_size)
    free, _ = torch.cuda.mem_get_info(model.device)
    return max(2048, int(free * 0.5) // per_token)


def _read_window(
    model: SentenceTransformer,
    threads: ThreadPoolExecutor,
    numbered: Iterator[tuple[int, Any, str | None]],
    window: int,
) -> list[Future]:
    return [threads.submit(_read_one, model, *entry) for entry in itertools.islice(numbered, window)]


def _read_one(model: SentenceTransformer, index: int, value: Any, prompt: str | None) -> tuple[Item | None, str | None]:
    try:
        return read_items([value], prompt, model[0].check)[0], None
    except ValueError as error:
        return None, str(error).replace("item 0:", f"item {index}:", 1)
    except Exception as error:
        raise RuntimeError(f"item {index} could not be read: {error!r}") from error


def _encode_window(
    model: SentenceTransformer,
    items: Sequence[Item | None],
    budget: Budget,
    threads: ThreadPoolExecutor,
    advance: Any,
    first: int,
) -> dict[int, np.ndarray]:
    """Embeds the items of a window that begins with number ``first``; returns the embedding of each place with one."""
    places: dict[Any, list[int]] = {}
    distinct: dict[Any, Item] = {}
    for place, item in enumerate(items):
        if item is None:
            advance(1)
            continue
        key = (item.prompt, item.sentence, tuple(map(image_key, item.images)))
        distinct.setdefault(key, item)
        places.setdefault(key, []).append(place)

    found: dict[int, np.ndarray] = {}
    keys = sorted(distinct, key=lambda key: _rank(model, distinct[key], key[2]), reverse=True)
    wanted = [(distinct[key], key[2], first + places[key][0]) for key in keys]
    for batch, features in _collated_ahead(model, wanted, budget, threads):
        rows = [keys[row] for row in batch]
        for key, embedding in zip(rows, _forward(model, features, [distinct[k] for k in rows], budget), strict=True):
            found.update(dict.fromkeys(places[key], embedding))
            advance(len(places[key]))
    return found


def _collated_ahead(
    model: SentenceTransformer, rows: Sequence[tuple[Item, Any, int]], budget: Budget, threads: ThreadPoolExecutor
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Yields batches and their features, of which a thread makes the next while the model computes this one.

    What is left is planned anew when the budget has changed meanwhile.
    """
    lengths = [_length(model, item) for item, _, _ in rows]
    left = list(range(len(rows)))
    while left:
        tokens = budget.tokens
        batches = plan_batches([rows[row][1] or None for row in left], [lengths[row] for row in left], tokens)
        batches = [[left[place] for place in batch] for batch in batches]
        collate = lambda batch: model[0].collate([rows[row][0] for row in batch])  # noqa: E731
        coming = threads.submit(collate, batches[0])
        for number, batch in enumerate(batches):
            try:
                features = coming.result()
            except Exception as error:
                own = sorted(rows[row][2] for row in batch)
                raise RuntimeError(f"no batch could be made of the items {own}: {error!r}") from error
            if number + 1 < len(batches):
                coming = threads.submit(collate, batches[number + 1])
            left = left[len(batch) :]
            yield batch, features
            if budget.tokens != tokens:
                break


def _length(model: SentenceTransformer, item: Item) -> int:
    """Tokens of an item's images, and a guess at those of its text that needs no tokenizer."""
    from .layout_e5v import count_tokens

    transformer = model[0]
    images = sum(count_tokens(i.height, i.width, transformer.config, transformer.image_layout) for i in item.images)
    return images + 12 + (len(item.prompt or "") + len(item.sentence or "")) // 3


def _rank(model: SentenceTransformer, item: Item, images: Any) -> tuple[int, str, int]:
    """Sorts items by the tokens of their images, keeps those with equal images together, then by length."""
    length = _length(model, item)
    return (_length(model, replace(item, prompt="", sentence="")) if images else 0, repr(images), length)


def plan_batches(images: Sequence[Any], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Packs rows, in their order, into batches of at most ``budget`` tokens; a single row may take more.

    Args:
        images: What stands for each row's images, ``None`` without any. Rows that follow each other with the same pay
            for them once.
        lengths: Tokens of each row.
        budget: Most tokens of a batch, padding included.

    Returns:
        Batches of row numbers.
    """
    batches: list[list[int]] = []
    tokens = longest = 0
    for row, (image, length) in enumerate(zip(images, lengths, strict=True)):
        same = bool(batches) and image is not None and image == images[batches[-1][-1]]
        if image is None or not same:
            cost = max(longest, length) * (len(batches[-1]) + 1) if batches and image is None else tokens + length
        else:
            cost = tokens + 64  # a prompt about an image that is in the batch already
        kind_changes = bool(batches) and (image is None) != (images[batches[-1][-1]] is None)
        if not batches or kind_changes or cost > budget:
            batches.append([row])
            tokens = longest = length
        else:
            batches[-1].append(row)
            tokens, longest = cost, max(longest, length)
    return batches


def _forward(
    model: SentenceTransformer, features: dict[str, Any], items: Sequence[Item], budget: Budget
) -> Sequence[np.ndarray]:
    """Runs the model; where memory runs out, halves the batch, and all that come later."""
    import torch
    from sentence_transformers.util import batch_to_device

    try:
        output = model(batch_to_device(features, model.device))["sentence_embedding"]
        return output.float().cpu().numpy()
    except (torch.OutOfMemoryError, MemoryError):
        if len(items) == 1:
            raise
        budget.halve()
        logger.warning("out of memory with %d items: going on with %d tokens a batch", len(items), budget.tokens)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(items) // 2
    parts = [items[:half], items[half:]]
    return [row for part in parts for row in _forward(model, model[0].collate(part), part, budget)]
