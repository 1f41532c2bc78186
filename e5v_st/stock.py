"""Many items through any SentenceTransformer without E5-V's own code, as a native export: what its ``encode`` gives."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

from .holding import Unreadable

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer


def stream_stock(
    model: SentenceTransformer,
    numbered: Iterator[tuple[int, Any, str | None]],
    window: int,
    advance: Callable[[int], Any],
) -> Generator[tuple[int, np.ndarray | Exception], None, None]:
    """Yields each item's index with its embedding, or with what is wrong with the item.

    Args:
        model: Any SentenceTransformer.
        numbered: Index, item and prompt of each item.
        window: Number of items that are encoded together.
        advance: Told of numbers of items that are done.

    Raises:
        Exception: What ``numbered`` itself raises, after everything before it was yielded.
    """
    failure = None
    while failure is None:
        rows, failure = _take(numbered, window)
        if not rows:
            break
        found: dict[int, np.ndarray | Exception] = {}
        for prompt in {row[2]: None for row in rows}:
            indexes, items, _ = zip(*(row for row in rows if row[2] == prompt), strict=True)
            found |= zip(indexes, _encode(model, list(items), prompt), strict=True)
            advance(len(items))
        for index, *_ in rows:
            result = found[index]
            yield index, _name(index, result) if isinstance(result, Exception) else result
    if failure:
        raise failure


def _take(rows: Iterator[Any], count: int) -> tuple[list[Any], Exception | None]:
    """Takes up to ``count`` rows; returns them, and what was raised in place of the next one."""
    found: list[Any] = []
    try:
        found.extend(itertools.islice(rows, count))
    except Exception as error:
        return found, error
    return found, None


def _encode(model: SentenceTransformer, items: list[Any], prompt: str | None) -> list[np.ndarray | Exception]:
    """Encodes items. If that fails, they are halved until those that it fails for are found."""
    if len(items) == 1 and isinstance(items[0], Unreadable):
        return [items[0].error]
    try:
        if any(isinstance(item, Unreadable) for item in items):
            raise ValueError("an item could not be read")
        # An empty prompt, since None stands for the model's default
        return list(model.encode(items, prompt=prompt or "", show_progress_bar=False).astype("float32"))
    except (ValueError, TypeError, OSError) as error:
        if len(items) == 1:
            return [error]
    half = len(items) // 2
    return [*_encode(model, items[:half], prompt), *_encode(model, items[half:], prompt)]


def _name(index: int, error: Exception) -> ValueError:
    named = ValueError(f"item {index}: {error}")
    named.__cause__ = error
    return named
