"""Many items, from anything that holds them: taken one by one, and read in threads, a window at a time.

A window is what is read, planned and held in memory together. While it is computed, the next one is read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from .holding import Unreadable
from .model.images_e5v import is_file_object, looks_like_image
from .model.items_e5v import Item, decoded_bytes, is_chat, read_items

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

#: Images of a window: 256 decoded images of 640x480 pixels take 300 MB.
WINDOW = 256
#: Memory for the decoded images of a window. The image that goes over it is the last one.
WINDOW_BYTES = 2**29
#: Texts are sorted by length, so a window of texts is larger: this many batches, of texts of this many tokens.
TEXT_BATCHES, TEXT_TOKENS = 8, 32


# ---- what holds many items ----


def check_many(items: Any) -> None:
    """Raises TypeError for a single item, whose parts would be taken for items, and for what holds no items."""
    if _is_of_datasets(items):
        return
    if is_chat(items):
        raise TypeError("got the messages of one chat, want an iterable of items: put them into a list")
    if _is_single(items):
        raise TypeError(f"got a single item, a {type(items).__name__}, want an iterable of items: put it into a list")
    if not hasattr(items, "__iter__") and not hasattr(items, "__getitem__"):
        raise TypeError(f"got a {type(items).__name__}, want an iterable of items, such as a list")


def iterate(items: Any) -> Iterable[Any]:
    """Returns what gives one item after the other, with the images of a dataset left undecoded."""
    if _is_of_datasets(items):
        return _leave_column_undecoded(items)
    # Without the protocol of iterators, Python would ask for one index after the other until the first error
    return items if hasattr(items, "__iter__") else (items[index] for index in range(len(items)))


def leave_images_undecoded(rows: Any) -> Any:
    """Returns a dataset of ``datasets`` whose images are left undecoded.

    ``datasets`` decodes a row before anybody can look at it, so a bad image would end the whole job. Read later, the
    image is a bad item like any other. A dataset with a transform stays as it is: the transform expects the images.
    """
    if getattr(rows, "format", {}).get("type") == "custom":
        return rows
    for name, feature in (rows.features or {}).items():
        undecoded = _undecoded(feature)
        if undecoded != feature:
            rows = rows.cast_column(name, undecoded)
    return rows


def _undecoded(feature: Any) -> Any:
    """Returns a feature of ``datasets`` with each image in it left undecoded."""
    from datasets import Image

    if isinstance(feature, Image):
        # Decoding applies the mode; to RGB, reading does it too
        return replace(feature, decode=False) if feature.mode in (None, "RGB", "RGBA") else feature
    if isinstance(feature, dict):
        return {name: _undecoded(part) for name, part in feature.items()}
    if isinstance(feature, list):
        return [_undecoded(part) for part in feature]
    return replace(feature, feature=_undecoded(feature.feature)) if hasattr(feature, "feature") else feature


def _leave_column_undecoded(rows: Any) -> Any:
    """Does the same for a dataset or a column of one, which may be that of another column."""
    if hasattr(rows, "column_name"):
        return _leave_column_undecoded(rows.source)[rows.column_name]
    return leave_images_undecoded(rows)


def _is_of_datasets(items: Any) -> bool:
    return type(items).__module__.startswith("datasets.") and not isinstance(items, Mapping)


def _is_single(items: Any) -> bool:
    if isinstance(items, (str, bytes, bytearray, memoryview, os.PathLike, Mapping)) or is_file_object(items):
        return True
    # An image as an array or from PIL, a table of pandas
    return len(getattr(items, "shape", ())) in (2, 3) or hasattr(items, "getbands")


# ---- windows ----


@dataclass(frozen=True)
class Row:
    """An item that was read, or what is wrong with it.

    Attributes:
        index: The item's place in the job.
        item: What was read; ``None`` for a bad item.
        key: Equal for items that have the same embedding.
        error: What is wrong with the item.
    """

    index: int
    item: Item | None
    key: bytes = b""
    error: str | None = None


def read_window(
    model: SentenceTransformer,
    threads: ThreadPoolExecutor,
    numbered: Iterator[tuple[int, Any, str | None]],
    window: int,
    batch_tokens: int,
) -> list[Future[Row]]:
    """Takes the items of a window, and has threads read them.

    A window has room for some texts. A text takes one place, and an image as many as there are texts to an image. With
    ``window=2`` and batches of 80 tokens there is room for 8 * 80 / 32 = 20 texts, or for 2 images of 10 places each.

    Args:
        model: An E5-V.
        threads: Read the items.
        numbered: Index, item and prompt of each item.
        window: Maximum number of images.
        batch_tokens: Tokens of a batch.

    Returns:
        The rows, in order. What ``numbered`` raises is raised by the last one.
    """
    rows: list[Future[Row]] = []
    room = texts = max(window, TEXT_BATCHES * batch_tokens // TEXT_TOKENS)
    memory = WINDOW_BYTES
    while room > 0 and memory > 0:
        try:
            entry = next(numbered, None)
        except Exception as error:  # of the caller's iterable; its turn comes after what it gave before
            rows.append(_failed(error))
            break
        if entry is None:
            break
        if _is_text(entry[1], model[0].strings):
            room -= 1
        else:
            room -= texts // window
            memory -= decoded_bytes(entry[1])
        rows.append(threads.submit(_read_one, model, *entry))
    return rows


def finished(rows: Sequence[Future[Row]]) -> tuple[list[Row], Exception | None]:
    """Waits for rows. Returns those up to the first that could not be made, and why it could not."""
    found: list[Row] = []
    for row in rows:
        try:
            found.append(row.result())
        except Exception as error:
            return found, error
    return found, None


def _failed(error: Exception) -> Future[Row]:
    row: Future[Row] = Future()
    row.set_exception(error)
    return row


def _is_text(value: Any, strings: str) -> bool:
    if isinstance(value, Mapping):
        return "image" not in value and isinstance(value.get("text"), str)
    return isinstance(value, str) and (strings == "text" or not looks_like_image(value))


def _read_one(model: SentenceTransformer, index: int, value: Any, prompt: str | None) -> Row:
    try:
        if isinstance(value, Unreadable):
            raise value.error
        first: Any = model[0]
        check = partial(first.check, max_length=first.find_max_length())
        item = read_items([value], prompt, check, first.strings, first.default_prompts)[0]
        content = repr((item.prompt, item.sentence, item.image_keys))
        return Row(index, item, hashlib.blake2b(content.encode(), digest_size=20).digest())
    except ValueError as error:
        return Row(index, None, error=f"item {index}: {str(error).removeprefix('item 0: ')}")
    except Exception as error:
        raise RuntimeError(f"item {index} could not be read: {error!r}") from error
