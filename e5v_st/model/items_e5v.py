"""What an item is: reads strings, images, dictionaries and chat messages into one plain form."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .images_e5v import PIXEL_BYTES, WANTED, count_pixels, looks_like_image, open_image, shorten
from .prompts_e5v import PROMPTS, resolve_prompt
from .upstream_e5v import index_for_caller

if TYPE_CHECKING:
    from PIL.Image import Image

#: How bare strings are taken: as the images that they name, or always as texts.
STRINGS = ("auto", "text")


@dataclass(frozen=True)
class Item:
    """One input: a text, images (RGB), or both, and its prompt, which :func:`read_items` makes a template."""

    sentence: str | None
    images: tuple[Image, ...] = ()
    prompt: str | None = None

    @cached_property
    def image_keys(self) -> tuple[ImageKey, ...]:
        """What stands for each image; see :func:`image_key`."""
        return tuple(map(image_key, self.images))


ImageKey = tuple[tuple[int, int], bytes]


def image_key(image: Image) -> ImageKey:
    """What two RGB images have in common if and only if they are equal: size, and a hash of the pixels."""
    return image.size, hashlib.blake2b(image.tobytes(), digest_size=16).digest()


def check_strings(strings: str) -> str:
    """Returns ``strings`` if it is one of :data:`STRINGS`; raises ValueError otherwise."""
    if strings not in STRINGS:
        raise ValueError(f"got strings={strings!r}, want one of {', '.join(map(repr, STRINGS))}")
    return strings


def read_items(
    values: Sequence[Any],
    prompt: str | None = None,
    check: Callable[[Item], None] | None = None,
    strings: str = "auto",
    prompts: Mapping[str, str] = PROMPTS,
) -> list[Item]:
    """Reads a batch and gives every item its template; see :func:`read_item` and ``prompts_e5v.resolve_prompt``.

    Args:
        values: What the user gave.
        prompt: The prompt of all items; see ``prompts_e5v.resolve_prompt``.
        check: Raises ValueError for an item that this model cannot take.
        strings: See :func:`read_item`.
        prompts: The model's default prompts, see ``prompts_e5v.default_prompt``.

    Raises:
        ValueError: If an item cannot be read or does not fit its prompt; the message names its index.
    """
    check_strings(strings)
    items = []
    for position, value in enumerate(values):
        try:
            item = read_item(value, strings)
            template = resolve_prompt(prompt or item.prompt, item.sentence is not None, len(item.images), prompts)
            items.append(replace(item, prompt=template))
            if check is not None:
                check(items[-1])
        except ValueError as error:
            raise ValueError(f"item {index_for_caller(value, position)}: {error}") from error
    return items


def read_item(value: Any, strings: str = "auto") -> Item:
    """Reads one input of ``SentenceTransformer.encode``.

    Args:
        value: A string, an image (see ``images_e5v.open_image``), ``{"text"}``, ``{"image"}``, ``{"image", "text"}``
            (``"image"`` may be a list), a chat message or a list of them. A string that names an existing image file,
            an image URL or a ``data:image/`` address is that image, as in sentence-transformers; ``{"text": ...}``
            never is.
        strings: One of :data:`STRINGS`; ``"text"`` takes every bare string for a text.

    Raises:
        ValueError: If it is none of these, or an image cannot be read.
    """
    if isinstance(value, str):
        is_image = strings == "auto" and looks_like_image(value)
        return Item(None, (open_image(value),)) if is_image else Item(check_text(value))
    if isinstance(value, Mapping):
        return _read_message_list([value]) if _is_message(value) else _read_mapping(value)
    if isinstance(value, (list, tuple)):
        if is_chat(value):
            return _read_message_list(value)
        raise ValueError(f"got a {type(value).__name__} of {len(value)}, want {WANTED}")
    if value is None:
        raise ValueError(f"got None, want {WANTED}")
    return Item(None, (open_image(value),))


def is_chat(value: Any) -> bool:
    """Whether something is a list of chat messages, which is one item."""
    return isinstance(value, (list, tuple)) and bool(value) and all(_is_message(part) for part in value)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value


def _read_mapping(value: Mapping[str, Any]) -> Item:
    if "bytes" in value and set(value) <= {"bytes", "path"}:  # an image as `datasets` stores it undecoded
        return Item(None, (open_image(value),))
    unknown = set(value) - {"text", "image"}
    if unknown or not value:
        raise ValueError(f"got a dictionary with the keys {sorted(map(str, value))}, want 'text' and/or 'image'")
    text, images = value.get("text"), value.get("image")
    if images is None:
        images = ()
    elif not isinstance(images, (list, tuple)):
        images = (images,)
    if text is None and not images:
        raise ValueError("got a dictionary with neither a text nor an image")
    return Item(None if text is None else check_text(text), tuple(open_image(image) for image in images))


def _read_message_list(messages: Sequence[Mapping[str, Any]]) -> Item:
    """Reads chat messages as the chat template does: system texts are the prompt, the others' parts are the item."""
    prompt: list[str] = []
    sentence: list[str] = []
    images: list[Image] = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user"):
            shown = shorten(repr(role))
            raise ValueError(f"got a chat message of the role {shown}, want 'user' (or 'system' for the prompt)")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or ()
        if not isinstance(parts, (list, tuple)):
            raise ValueError(f"got a chat message whose content is a {type(content).__name__}, want a string or parts")
        for part in parts:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            if kind == "text":
                (prompt if role == "system" else sentence).append(check_text(part.get("text")))
            elif kind == "image" and role == "user":
                images.append(open_image(_image_of_part(part)))
            else:
                raise ValueError(
                    f"got a part of type {shorten(repr(kind))} in a {role} message, want 'text' or 'image'"
                )
    if not sentence and not images:
        raise ValueError("got chat messages with neither a text nor an image")
    return Item("".join(sentence) if sentence else None, tuple(images), "".join(prompt) or None)


def _image_of_part(part: Mapping[str, Any]) -> Any:
    # In a dataset, each part has all the keys
    return next((part[key] for key in ("image", "url", "path", "bytes") if part.get(key) is not None), None)


def check_text(text: Any) -> str:
    """Returns ``text`` if it is a string that can be written as UTF-8; raises ValueError otherwise."""
    if not isinstance(text, str):
        raise ValueError(f"got a text of type {type(text).__name__}, want a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text has a lone surrogate at position {error.start}: it is not valid Unicode") from None
    return text


def decoded_bytes(value: Any) -> int:
    """Returns the memory that an item's images will take, by what their headers say.

    What cannot be read takes none, as it will not be held either; see ``images_e5v.count_pixels``.
    """
    try:
        return PIXEL_BYTES * _count_pixels(value)
    except Exception:  # a user's object may do anything
        return 0


def _count_pixels(value: Any) -> int:
    if isinstance(value, Mapping) and ("image" in value or "role" in value):
        value = value.get("image") if "image" in value else value.get("content")
    if isinstance(value, (list, tuple)):
        return sum(map(_count_pixels, value))
    return count_pixels(_image_of_part(value) if isinstance(value, Mapping) else value)
