"""Items as they are when their turn comes: what goes on may change what it gave, before a thread has read it.

An iterator may give one image again and again with other frames, fill one array anew, or close a file behind its
``yield``. Items of a list are all there, and stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .model.images_e5v import is_file_object, open_image


@dataclass(frozen=True)
class Unreadable:
    """Stands for an item that could not be read when its turn came; a later try might find another image in it."""

    error: Exception


def hold_all(items: Iterable[Any], is_e5v: bool) -> Iterator[Any]:
    """Yields items that stay as they are, whatever ``items`` does next.

    Args:
        items: Of any kind. What a list or a tuple holds is yielded as it is.
        is_e5v: Whether an E5-V reads the items. For any other model, images keep their mode, and files stay open.
    """
    if isinstance(items, (list, tuple)):
        return iter(items)
    return (_hold(item, _hold_image if is_e5v else _copy) for item in items)


def _hold(item: Any, image: Callable[[Any], Any]) -> Any:
    try:
        return _held(item, image)
    except MemoryError:
        raise
    except Exception as error:  # a bad item like any other, once it is its turn
        return Unreadable(error)


def _held(value: Any, image: Callable[[Any], Any]) -> Any:
    """Returns a value that nobody else changes, with the same for its parts.

    Args:
        value: An item, or a part of one. What cannot change, such as a string, is returned as it is.
        image: Does it for an image, or an open file.
    """
    if isinstance(value, Mapping):
        return {key: _held(part, image) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [_held(part, image) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    if hasattr(value, "getbands") or is_file_object(value):
        return image(value)
    if hasattr(value, "shape"):  # of numpy or torch
        return value.copy() if hasattr(value, "copy") else value.clone()
    return value


def _hold_image(value: Any) -> Any:
    opened = open_image(value)
    return opened.copy() if opened is value else opened


def _copy(value: Any) -> Any:
    return value.copy() if hasattr(value, "getbands") else value
