"""Embeds any number of items: what is equal is computed once, and the model never waits for an image.

``SentenceTransformer.encode`` sees one batch at a time. Here a window of items is read at once, so that repetitions are
dropped, prompts about one image stay together (their image is computed once, see ``sharing_e5v``), and batches are
packed by tokens instead of by items.

    items ──► read ──────────► embed ───────────────────────► in input order
              a window,        each different item, once:
              in threads       plan, prepare ahead, launch,
              (reading.py)     settle (batches.py)

While a window is embedded, the next one is read. Time goes to the right:

    window 1   read   embed ─────── yield
    window 2          read          embed ─────── yield
    window 3                        read          embed …

Embeddings of earlier windows are kept for a while, for items that come again.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .batches import AHEAD, Budget, embed_rows
from .holding import hold_all
from .model.planning_e5v import default_batch_tokens
from .model.pooling_e5v import check_modules
from .model.upstream_e5v import share_weights
from .reading import WINDOW, Row, check_many, finished, iterate, read_window
from .stock import stream_stock

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

#: Memory for the embeddings of earlier windows.
RECENT_BYTES = 64 * 2**20

_NO_PROMPT = object()


@dataclass(frozen=True)
class Encoded:
    """One result: the item's place in the input, and its embedding (float32, L2-normalised) or what was wrong."""

    index: int
    embedding: np.ndarray | None
    error: str | None = None


def encode_all(
    model: SentenceTransformer,
    items: Iterable[Any],
    *,
    prompt: str | Iterable[str | None] | None = None,
    prompt_name: str | None = None,
    batch_tokens: int | None = None,
    max_image_tokens: int | None = None,
    on_error: str = "raise",
    progress: bool = True,
) -> np.ndarray:
    """Embeds any number of items.

    Args:
        model: An E5-V. With any other SentenceTransformer, as a native export, the result is that of its ``encode``.
        items: See ``items_e5v.read_item``. A generator or dataset is never held in memory as a whole. What it gives is
            copied when its turn comes, except for that of a list, so that it may use one image or array again. Its PIL
            images are then decoded one by one; threads decode paths and bytes.
        prompt: One prompt for all, or one for each item; see ``prompts_e5v.resolve_prompt``.
        prompt_name: A key of ``model.prompts``, in place of ``prompt``. Without either, it is the model's default, as
            in ``encode``.
        batch_tokens: Maximum number of tokens computed together, for an E5-V alone. With ``None``, it is found from the
            free memory.
        max_image_tokens: About how many tokens an image takes at most, in this job alone; see ``e5v_st.load``.
        on_error: ``"raise"`` stops at the first bad item, or the first whose embedding is not finite. ``"skip"`` goes
            on, gives the item a row of NaN, and logs the skipped items once.
        progress: Whether to show a progress bar with rate and time left.

    Returns:
        Embeddings, float32 ``(n, d)``, L2-normalised (before ``truncate_dim`` cuts them), in input order.

    Raises:
        ValueError: If an item is bad, or its embedding is not finite; the message names its index.
        TypeError: If ``items`` is a single item, or ``model`` is not a SentenceTransformer.

    Example:
        >>> import e5v_st
        >>> model = e5v_st.load("e5v-tiny")
        >>> texts = ({"text": f"{number} dogs"} for number in range(1000))
        >>> e5v_st.encode_all(model, texts, progress=False).shape
        (1000, 192)
    """
    import numpy as np

    rows, bad = [], []
    results = stream_all(
        model,
        items,
        prompt=prompt,
        prompt_name=prompt_name,
        batch_tokens=batch_tokens,
        max_image_tokens=max_image_tokens,
        on_error=on_error,
        progress=progress,
    )
    for result in results:
        if result.error is not None:
            bad.append(result.index)
        rows.append(result.embedding)
    missing = np.full(model.get_embedding_dimension() or 0, np.nan, np.float32)
    if bad:
        logger.warning("%d of %d items were skipped, their rows are NaN: %s", len(bad), len(rows), bad[:20])
    if not rows:
        return np.zeros((0, len(missing)), np.float32)
    return np.stack([missing if row is None else row for row in rows])


def stream_all(
    model: SentenceTransformer,
    items: Iterable[Any],
    *,
    prompt: str | Iterable[str | None] | None = None,
    prompt_name: str | None = None,
    batch_tokens: int | None = None,
    max_image_tokens: int | None = None,
    on_error: str = "raise",
    progress: bool = True,
    total: int | None = None,
    window: int = WINDOW,
) -> Generator[Encoded, None, None]:
    """Yields embeddings in input order, window by window; see :func:`encode_all`.

    Args:
        model: See :func:`encode_all`.
        items: See :func:`encode_all`.
        prompt: See :func:`encode_all`.
        prompt_name: See :func:`encode_all`.
        batch_tokens: See :func:`encode_all`.
        max_image_tokens: See :func:`encode_all`.
        on_error: See :func:`encode_all`.
        progress: See :func:`encode_all`.
        total: Number of items, for the time left, if ``items`` does not know it.
        window: Maximum number of images that are read and planned together. There may be more texts, by the tokens of a
            batch.

    Raises:
        ValueError: If an item is bad and ``on_error`` is ``"raise"``, after everything before it was yielded.
        torch.OutOfMemoryError: Likewise, if a single item does not fit into memory.
        TypeError: If ``items`` is a single item.
        Exception: What ``items`` itself raises, after everything before it was yielded.
    """
    from tqdm.auto import tqdm

    is_e5v = _check(model, batch_tokens, on_error)
    model = _limited(model, max_image_tokens, is_e5v)
    default = _find_default(model, prompt_name)
    prompt = default if prompt is None else prompt
    check_many(items)
    _check_prompts(items, prompt)
    total = len(items) if total is None and isinstance(items, Sized) else total
    numbered = _number(hold_all(iterate(items) if is_e5v else items, is_e5v), prompt, default)
    with tqdm(total=total, unit="item", disable=not progress, smoothing=0.05) as bar:
        if is_e5v:
            stream = _stream_e5v(model, numbered, window, batch_tokens, bar.update)
        else:
            stream = stream_stock(model, numbered, window, bar.update)
        with closing(stream) as results:
            for index, found in results:
                found = _finite(model, index, found)
                if not isinstance(found, Exception):
                    yield Encoded(index, found)
                elif on_error == "raise":
                    raise found
                else:
                    yield Encoded(index, None, _say(index, found))


def _check(model: SentenceTransformer, batch_tokens: int | None, on_error: str) -> bool:
    """Returns whether a model is an E5-V; raises ValueError or TypeError for arguments that cannot be."""
    from sentence_transformers import SentenceTransformer

    if on_error not in ("raise", "skip"):
        raise ValueError(f"got on_error={on_error!r}, want 'raise' or 'skip'")
    if batch_tokens is not None and batch_tokens < 1:
        raise ValueError(f"got {batch_tokens} tokens for a batch, want at least 1")
    if not isinstance(model, SentenceTransformer):
        raise TypeError(
            f"got a {type(model).__name__} as the model, want a SentenceTransformer, as e5v_st.load returns"
        )
    first: Any = model[0]
    is_e5v = hasattr(first, "collate")
    if is_e5v:
        check_modules(model)
        first.find_max_length()  # refuses settings that E5-V cannot do
    elif batch_tokens is not None:
        raise ValueError(f"got batch_tokens={batch_tokens} for a model that is not loaded as an E5-V: leave it out")
    return is_e5v


def _limited(model: SentenceTransformer, max_image_tokens: int | None, is_e5v: bool) -> SentenceTransformer:
    """Returns a view of a model whose images take at most so many tokens; the model stays as it is."""
    if max_image_tokens is None:
        return model
    if not is_e5v:
        raise ValueError(
            f"got max_image_tokens={max_image_tokens} for a model that is not loaded as an E5-V: leave it out"
        )
    first: Any = model[0]
    view = share_weights(model)
    view[0] = first.limited(max_image_tokens)
    return view


def _find_default(model: SentenceTransformer, name: str | None) -> str | None:
    """Returns the prompt of a name, or the model's default prompt, as sentence-transformers would find it."""
    if name is not None and name not in model.prompts:
        raise ValueError(f"there is no prompt {name!r}, but {', '.join(model.prompts)}")
    return model.prompts.get(name or model.default_prompt_name or "")


def _check_prompts(items: Any, prompts: Any) -> None:
    """Raises ValueError or TypeError for prompts that are not one for all items, and not one for each."""
    if prompts is None or isinstance(prompts, str):
        return
    if not isinstance(prompts, Iterable) or isinstance(prompts, (bytes, Mapping)):
        raise TypeError(f"got a {type(prompts).__name__} as the prompt, want a text, or a list with one for each item")
    if isinstance(items, Sized) and isinstance(prompts, Sized) and len(items) != len(prompts):
        raise ValueError(f"got {len(prompts)} prompts for {len(items)} items, want one for each item")


def _number(
    items: Iterable[Any], prompt: str | Iterable[str | None] | None, default: str | None
) -> Iterator[tuple[int, Any, str | None]]:
    """Yields index, item and prompt of each item; in a list of prompts, ``None`` stands for the default."""
    if prompt is None or isinstance(prompt, str):
        yield from ((index, item, prompt) for index, item in enumerate(items))
        return
    prompts = iter(prompt)
    count = 0
    for count, item in enumerate(items, 1):
        try:
            own = next(prompts)
        except StopIteration:
            raise ValueError(f"got {count - 1} prompts for more items than that, want one for each item") from None
        yield count - 1, item, default if own is None else own
    if next(prompts, _NO_PROMPT) is not _NO_PROMPT:
        raise ValueError(f"got more than {count} prompts for {count} items, want one for each item")


def _finite(model: SentenceTransformer, index: int, found: np.ndarray | Exception) -> np.ndarray | Exception:
    """Returns what was found, or an error in place of an embedding with NaN or infinity."""
    import numpy as np

    if isinstance(found, Exception) or np.isfinite(found).all():
        return found
    dtype = str(model.dtype).removeprefix("torch.")
    advice = "load the model in bfloat16 or float32" if dtype == "float16" else "check the model's weights"
    return ValueError(f"item {index}: its embedding is not finite in {dtype}: {advice}")


def _say(index: int, error: Exception) -> str:
    """Returns what is wrong with an item, with its index."""
    text = str(error)
    return text if text.startswith(f"item {index}:") else f"item {index}: {text}"


# ---- windows ----


def _stream_e5v(
    model: SentenceTransformer,
    numbered: Iterator[tuple[int, Any, str | None]],
    window: int,
    batch_tokens: int | None,
    advance: Callable[[int], Any],
) -> Generator[tuple[int, np.ndarray | Exception], None, None]:
    """Yields each item's index with its embedding, or with what is wrong with the item."""
    budget = Budget(batch_tokens or default_batch_tokens(model[0].model))
    recent: OrderedDict[bytes, np.ndarray] = OrderedDict()
    model.eval()
    # A model on the CPU needs its cores itself
    more = (os.cpu_count() or 1) if model.device.type == "cuda" else 0
    # Two pools, so that a batch that is prepared does not wait for a window that is read
    readers = ThreadPoolExecutor(more + 1, thread_name_prefix="e5v-read")
    preparers = ThreadPoolExecutor(more + AHEAD, thread_name_prefix="e5v-prepare")
    with readers, preparers:
        try:
            coming = read_window(model, readers, numbered, window, budget.tokens)
            while coming:
                rows, failure = finished(coming)
                coming = [] if failure else read_window(model, readers, numbered, window, budget.tokens)
                found = _embed_window(model, rows, budget, preparers, recent, advance)
                yield from ((row.index, _result(row, found)) for row in rows)
                if failure:
                    raise failure
        finally:  # Ctrl-C, or a caller that has seen enough, need not wait for what is read in vain
            readers.shutdown(wait=False, cancel_futures=True)
            preparers.shutdown(wait=False, cancel_futures=True)


def _result(row: Row, found: dict[bytes, np.ndarray | Exception]) -> np.ndarray | Exception:
    return found[row.key] if row.error is None else ValueError(row.error)


def _embed_window(
    model: SentenceTransformer,
    rows: Sequence[Row],
    budget: Budget,
    threads: ThreadPoolExecutor,
    recent: OrderedDict[bytes, np.ndarray],
    advance: Callable[[int], Any],
) -> dict[bytes, np.ndarray | Exception]:
    """Embeds the items of a window, each different item once.

    Args:
        model: An E5-V.
        rows: The window.
        budget: Tokens of a batch.
        threads: Prepare batches for a GPU.
        recent: Embeddings of earlier windows by key. Those of this window are added, and the oldest go.
        advance: Told of numbers of items that are done.

    Returns:
        An embedding by each item's key, or the error if it does not fit into memory alone.
    """
    import torch

    times = Counter(row.key for row in rows if row.item is not None)
    advance(len(rows) - times.total())
    found: dict[bytes, np.ndarray | Exception] = {}

    def settle(key: bytes, result: np.ndarray | Exception) -> None:
        found[key] = result
        advance(times[key])
        if not isinstance(result, Exception):
            recent[key] = result
            recent.move_to_end(key)

    for key in [key for key in times if key in recent]:
        settle(key, recent[key])
    new: dict[bytes, Row] = {}
    for row in rows:
        if row.item is not None and row.key not in found:
            new.setdefault(row.key, row)
    with torch.inference_mode():
        for row, result in embed_rows(model, new.values(), budget, threads):
            settle(row.key, result)
    while recent and len(recent) * next(iter(recent.values())).nbytes > RECENT_BYTES:
        recent.popitem(last=False)
    return found
