"""What an item is: reads strings, images, paths, URLs, dictionaries and chat messages into one plain form."""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from .prompts_e5v import resolve_prompt

if TYPE_CHECKING:
    from PIL.Image import Image

WANTED = "a string, an image (PIL, path or URL), {'text'}, {'image'}, {'image', 'text'} or a list of chat messages"
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
REFUSED_SUFFIXES = {
    ".svg": "a vector drawing: render it to PNG first",
    ".heic": "HEIC: convert it to JPEG or PNG first",
}
#: What Pillow draws by running another program over the file.
REFUSED_FORMATS = {"EPS": "a PostScript drawing: render it to PNG first"}
#: Pillow holds a pixel of an RGB image in 4 bytes.
PIXEL_BYTES = 4
#: What is reckoned for an image whose size is not known before it is fetched.
UNKNOWN_PIXELS = 4_000_000
URL_TIMEOUT_SECONDS = 20
URL_MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Item:
    """One input: a sentence, images (RGB), or both, and its prompt (a template, once :func:`read_items` is done)."""

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


def read_items(
    values: Sequence[Any], prompt: str | None = None, check: Callable[[Item], None] | None = None
) -> list[Item]:
    """Reads a batch and gives every item its template; see :func:`read_item` and ``prompts_e5v.resolve_prompt``.

    Args:
        values: What the user gave.
        prompt: One for all.
        check: Raises ValueError for an item that is sound, but not for this model.

    Raises:
        ValueError: If an item cannot be read or does not fit its prompt; the message names its index.
    """
    items = []
    for position, value in enumerate(values):
        try:
            item = read_item(value)
            template = resolve_prompt(prompt or item.prompt, item.sentence is not None, len(item.images))
            items.append(replace(item, prompt=template))
            if check is not None:
                check(items[-1])
        except ValueError as error:
            raise ValueError(f"item {_index_for_caller(value, position)}: {error}") from error
    return items


def _index_for_caller(value: Any, position: int) -> int:
    """Index of a value in the list that the user passed to ``encode``.

    sentence-transformers sorts the inputs by length before it hands batches to a module, so the position in the batch
    would name the wrong item; the caller's list is found in the frames of ``encode``.
    """
    frame, index = sys._getframe(1), position
    while frame := frame.f_back:
        if frame.f_code.co_name in ("encode", "_inference") and isinstance(frame.f_locals.get("inputs"), (list, tuple)):
            index = next((i for i, other in enumerate(frame.f_locals["inputs"]) if other is value), index)
    return index


def read_item(value: Any) -> Item:
    """Reads one input of ``SentenceTransformer.encode``.

    Args:
        value: A string, an image (PIL, ``HxWx3`` uint8 array, path, URL), ``{"text"}``, ``{"image"}``,
            ``{"image", "text"}`` (``"image"`` may be a list), a chat message or a list of them. A string that names an
            existing image file or an image URL is that image, as in sentence-transformers; ``{"text": ...}`` never is.

    Raises:
        ValueError: If it is nothing of the kind, or an image cannot be read.
    """
    if isinstance(value, str):
        return Item(None, (open_image(value),)) if looks_like_image(value) else Item(check_text(value))
    if isinstance(value, Mapping):
        return _read_message_list([value]) if "role" in value else _read_mapping(value)
    if isinstance(value, (list, tuple)):
        if value and all(isinstance(part, Mapping) and "role" in part for part in value):
            return _read_message_list(value)
        raise ValueError(f"got a {type(value).__name__} of {len(value)}, want {WANTED}")
    if value is None:
        raise ValueError(f"got None, want {WANTED}")
    return Item(None, (open_image(value),))


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
            raise ValueError(f"got a chat message of the role {role!r}, want 'user' (or 'system' for the prompt)")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or ()
        if not isinstance(parts, (list, tuple)):
            raise ValueError(f"got a chat message whose content is a {type(content).__name__}, want a string or parts")
        for part in parts:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            if kind == "text":
                (prompt if role == "system" else sentence).append(check_text(part.get("text")))
            elif kind == "image" and role == "user":
                images.append(open_image(next((part[key] for key in ("image", "url", "path") if key in part), None)))
            else:
                raise ValueError(f"got a part of type {kind!r} in a {role} message, want 'text' or 'image'")
    if not sentence and not images:
        raise ValueError("got chat messages with neither a text nor an image")
    return Item("".join(sentence) if sentence else None, tuple(images), "".join(prompt) or None)


def check_text(text: Any) -> str:
    """Returns ``text`` if it is a string that can be written as UTF-8; raises ValueError otherwise."""
    if not isinstance(text, str):
        raise ValueError(f"got a text of type {type(text).__name__}, want a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text has a lone surrogate at position {error.start}: it is no valid Unicode") from None
    return text


def looks_like_image(text: str) -> bool:
    """Whether a plain string stands for an image: an image URL, or the path of an existing image file."""
    if len(text) > 4096 or "\n" in text or "\0" in text:
        return False
    if _is_url(text):
        try:
            path = urlsplit(text).path
        except ValueError:  # a sentence that begins like an address
            return False
        return path.lower().endswith((*IMAGE_SUFFIXES, *REFUSED_SUFFIXES)) and not any(map(str.isspace, text))
    return text.lower().endswith((*IMAGE_SUFFIXES, *REFUSED_SUFFIXES)) and os.path.isfile(text)


def _is_url(text: str) -> bool:
    return text.lower().startswith(("http://", "https://"))


def open_image(source: Any) -> Image:
    """Opens an image and converts it to RGB as the published code does (alpha dropped, EXIF rotation not applied).

    ``E5V_EXIF=1`` in the environment applies the rotation.

    Args:
        source: A PIL image of any mode, a path, an http(s) URL, bytes, ``{"bytes"}``, or a uint8 array ``(H, W)``,
            ``(H, W, C)`` or ``(C, H, W)`` with 1, 3 or 4 channels.

    Raises:
        ValueError: If it cannot be read as an image.
    """
    from PIL import Image as PILImage

    name = f"{source!r}" if isinstance(source, (str, os.PathLike)) else f"a {type(source).__name__}"
    try:
        if isinstance(source, Mapping) and (source.get("bytes") is not None or source.get("path") is not None):
            source = source["bytes"] if source.get("bytes") is not None else source["path"]
        if isinstance(source, (str, os.PathLike)):
            source = _open_location(str(source), PILImage)
        elif isinstance(source, (bytes, bytearray)):
            source = PILImage.open(io.BytesIO(source))
        elif not isinstance(source, PILImage.Image):
            source = _image_from_array(source, PILImage)
        return _to_rgb(source)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on bytes that are no image
        # Pillow names a buffer by its address in memory, which is another one each time
        reason = re.sub(r" <_io\.BytesIO object at \w+>", "", str(error)) or repr(error)
        raise ValueError(f"cannot read {name} as an image: {reason}") from error


def decoded_bytes(value: Any) -> int:
    """Memory that an item's images will take, by what their headers say.

    That of :data:`UNKNOWN_PIXELS` for an address, and nothing for what cannot be read, as it will not be held either.
    """
    try:
        return PIXEL_BYTES * _count_pixels(value)
    except Exception:  # a user's object may do anything
        return 0


def _count_pixels(value: Any) -> int:
    from PIL import Image as PILImage

    if isinstance(value, Mapping) and ("image" in value or "role" in value):
        value = value.get("image") if "image" in value else value.get("content")
    if isinstance(value, (list, tuple)):
        return sum(map(_count_pixels, value))
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path", value.get("url"))
    if isinstance(value, str) and _is_url(value):
        return UNKNOWN_PIXELS
    if hasattr(value, "shape"):
        return math.prod(sorted(value.shape)[-2:])
    if isinstance(value, PILImage.Image):
        return value.width * value.height
    if isinstance(value, (bytes, bytearray)):
        value = io.BytesIO(value)
    elif not isinstance(value, (str, os.PathLike)) or not os.path.isfile(value):
        return 0
    with PILImage.open(value) as image:
        return image.width * image.height


def _open_location(location: str, pil: Any) -> Image:
    suffix = Path(urlsplit(location).path if _is_url(location) else location).suffix.lower()
    if suffix in REFUSED_SUFFIXES:
        raise ValueError(REFUSED_SUFFIXES[suffix])
    if _is_url(location):
        return pil.open(io.BytesIO(_download(location)))
    if "://" in location:
        raise ValueError("only http:// and https:// addresses are fetched")
    if not os.path.isfile(location):
        raise ValueError("there is no such file")
    return pil.open(location)


def _download(url: str) -> bytes:
    """Fetches an http(s) URL within the limits of time and size; redirects must stay on http(s).

    A thread does it: neither the look-up of a name nor a server that sends a byte now and then keeps to a socket's
    time limit.
    """
    if os.environ.get("E5V_URLS", "1") == "0":
        raise ValueError("fetching URLs is switched off (E5V_URLS=0)")
    found: Future[bytes] = Future()

    def work() -> None:
        try:
            found.set_result(_fetch(url, time.monotonic() + URL_TIMEOUT_SECONDS))
        except Exception as error:
            found.set_exception(error)

    threading.Thread(target=work, name="e5v-url", daemon=True).start()
    try:
        return found.result(URL_TIMEOUT_SECONDS)
    except TimeoutError:
        raise ValueError(f"timed out after {URL_TIMEOUT_SECONDS} seconds") from None


def _fetch(url: str, deadline: float) -> bytes:
    from urllib import request

    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler,
        request.HTTPHandler,
        request.HTTPSHandler,
        request.HTTPRedirectHandler,
        request.HTTPDefaultErrorHandler,
        request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    wanted = request.Request(url, headers={"User-Agent": "e5v-st"})  # noqa: S310 - the scheme is checked by the caller
    data = bytearray()
    with opener.open(wanted, timeout=URL_TIMEOUT_SECONDS) as answer:
        while chunk := answer.read1(2**16):
            data += chunk
            if len(data) > URL_MAX_BYTES:
                raise ValueError(f"it is larger than {URL_MAX_BYTES // 2**20} MiB")
            if time.monotonic() > deadline:
                raise TimeoutError
    return bytes(data)


def _image_from_array(array: Any, pil: Any) -> Image:
    import numpy as np

    try:
        array = np.asarray(array)
    except Exception as error:
        raise ValueError(f"want {WANTED}") from error
    if array.dtype == object or array.ndim not in (2, 3):
        raise ValueError(f"want {WANTED}")
    if array.dtype != np.uint8:
        raise ValueError(f"got an array of {array.dtype}, want uint8 values from 0 to 255")
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if 0 in array.shape or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        raise ValueError(f"got an array of the shape {array.shape}, want (H, W), (H, W, C) or (C, H, W)")
    return pil.fromarray(array)


def _to_rgb(image: Image) -> Image:
    if 0 in image.size:
        raise ValueError(f"it has the size {image.size[0]}x{image.size[1]}")
    if image.format in REFUSED_FORMATS:
        raise ValueError(REFUSED_FORMATS[image.format])
    image.load()
    if os.environ.get("E5V_EXIF", "0") == "1":
        from PIL import ImageOps

        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey at 255 instead of scaling it
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if image.mode == "La":  # Pillow knows no direct way
        image = image.convert("LA")
    return image if image.mode == "RGB" else image.convert("RGB")
