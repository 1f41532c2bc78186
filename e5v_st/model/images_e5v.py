"""How an image is opened: every form that an image may have, and every limit that is set to what others send.

An image may come from anywhere: a file, a server, a message. This file alone reads such things, and refuses these:

- files that Pillow would hand to another program (PostScript), and files within files;
- addresses that are not http(s), redirects to such, and all of them with ``E5V_URLS=0``;
- what takes longer than :data:`URL_TIMEOUT_SECONDS`, is larger than :data:`URL_MAX_BYTES`, or has more pixels than
  ``PIL.Image.MAX_IMAGE_PIXELS``;
- base64 with characters that do not belong there;
- pixels whose range is not known.
"""

from __future__ import annotations

import base64
import io
import math
import os
import re
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes, urlsplit

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

#: What an item may be; :func:`open_image` gets all that is nothing else.
WANTED = "a string, an image (PIL, path, URL, file or bytes), {'text'}, {'image'}, {'image', 'text'} or chat messages"
_HEIC = "HEIC: convert it to JPEG or PNG first"
_VECTOR = "a vector drawing: render it to PNG first"
_POSTSCRIPT = "a PostScript drawing: render it to PNG first"
#: Files that are images, but not for Pillow; a plugin that reads one takes precedence.
REFUSED_SUFFIXES = {
    ".svg": _VECTOR,
    ".svgz": _VECTOR,
    ".heic": _HEIC,
    ".heif": _HEIC,
    ".hif": _HEIC,
    ".eps": _POSTSCRIPT,
    ".ps": _POSTSCRIPT,
}
#: Formats that Pillow draws by running another program over the file, or opens as another file, which may be such.
REFUSED_FORMATS = {"EPS": _POSTSCRIPT, "IPTC": "an IPTC record around another file: extract that file first"}
#: Formats that Pillow recognises without a decoder of its own.
UNDECODED_FORMATS = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF")
#: Formats whose deep pixels are measurements: Pillow ignores the header that says what they mean.
MEASUREMENTS = ("FITS", "MCIDAS")
#: Tags of TIFF.
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339
WHITE_IS_ZERO, SIGNED = 0, 2
#: Pillow holds a pixel of an RGB image in 4 bytes.
PIXEL_BYTES = 4
#: What is assumed for an image whose size is not known before it is fetched.
UNKNOWN_PIXELS = 4_000_000
URL_TIMEOUT_SECONDS = 20
#: The limit for what a URL gives, and for an image in a data: address.
URL_MAX_BYTES = 64 * 2**20
#: Characters of a value that an error message repeats.
SHOWN = 300

#: Threads that read one file object would move its position under each other.
_file_lock = threading.Lock()
#: How an address begins, as in RFC 3986.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
#: How a path of an image may end. Few texts do, so that the others need not wait for Pillow's plugins.
_SUFFIX = re.compile(r"\.\w{2,6}\Z")


# ---- switches ----


def is_on(name: str, usual: bool) -> bool:
    """Whether a switch in the environment is on.

    Args:
        name: Of the variable.
        usual: What holds where it is not set.

    Raises:
        ValueError: If it is neither ``1``, ``true``, ``yes``, ``on`` nor ``0``, ``false``, ``no``, ``off``.
    """
    word = os.environ.get(name, "").strip().lower()
    if word not in ("", "1", "true", "yes", "on", "0", "false", "no", "off"):
        raise ValueError(f"got {name}={os.environ[name]!r} in the environment, want 1 or 0")
    return word in ("1", "true", "yes", "on") if word else usual


# ---- which strings are images ----


def looks_like_image(text: str) -> bool:
    """Whether a plain string stands for an image: an address of one, or an existing image file's path.

    An address may be of any kind. Those that are not fetched, as ``s3://``, are then refused, and not read as a text.
    """
    if _is_data(text):
        return True
    if len(text) > 4096 or "\n" in text or "\0" in text:
        return False
    path = text
    if _ADDRESS.match(text):
        try:
            path = urlsplit(text).path
        except ValueError:  # a text that begins like an address
            return False
        if any(map(str.isspace, text)):
            return False
    elif not (_SUFFIX.search(text) and os.path.isfile(text)):
        return False
    suffix = _SUFFIX.search(path)
    return suffix is not None and (suffix[0].lower() in REFUSED_SUFFIXES or suffix[0].lower() in image_suffixes())


def image_suffixes() -> frozenset[str]:
    """Returns the suffixes, in lower case, of all that Pillow decodes, with the plugins that it has at present."""
    from PIL import Image as PILImage

    PILImage.init()
    refused = {*REFUSED_FORMATS, *UNDECODED_FORMATS}
    readable = {*PILImage.OPEN, "MPO"} - refused  # an MPO is opened as the JPEG that it begins with
    return frozenset(suffix for suffix, kind in PILImage.EXTENSION.items() if kind in readable)


def is_address(text: str) -> bool:
    """Whether a string that stands for an image is an address, and not a path."""
    return "://" in text[:SHOWN] or text[:5].lower() == "data:"


def _is_url(text: str) -> bool:
    return text[:8].lower().startswith(("http://", "https://"))


def _is_data(text: str) -> bool:
    head = text[:SHOWN].partition(",")[0]
    return head[:11].lower() == "data:image/" and not any(map(str.isspace, head))


def shorten(text: str) -> str:
    """What an error message shows of a string: a data: address holds a whole image, which a log need not."""
    if text[:5].lower() == "data:":
        return f"{text.partition(',')[0][:60]},… ({len(text)} characters)"
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]}… ({len(text)} characters)"


# ---- opening ----


def open_image(source: Any) -> Image:
    """Opens an image and converts it to RGB as the published code does (alpha dropped, EXIF rotation not applied).

    ``E5V_EXIF=1`` in the environment applies the rotation. Grey with more than 8 bits is scaled to 8, and refused where
    its range is not known; see :func:`_to_grey`.

    Args:
        source: A PIL image of any mode, a path, an http(s) URL, a ``data:`` address, bytes, a binary file object,
            ``{"bytes"}``, or a uint8 array ``(H, W)``, ``(H, W, C)`` or ``(C, H, W)`` with 1, 3 or 4 channels. One that
            may be either, as ``(3, 7, 4)``, is refused.

    Raises:
        ValueError: If it cannot be read as an image.
    """
    from PIL import Image as PILImage

    name = f"a {type(source).__name__}"
    if isinstance(source, (str, os.PathLike)):
        name = repr(shorten(source)) if isinstance(source, str) else shorten(repr(source))
    try:
        if isinstance(source, Mapping) and (source.get("bytes") is not None or source.get("path") is not None):
            source = source["bytes"] if source.get("bytes") is not None else source["path"]
        if isinstance(source, (str, os.PathLike)):
            source = _open_location(str(source), PILImage)
        elif isinstance(source, (bytes, bytearray, memoryview)):
            source = PILImage.open(io.BytesIO(source))
        elif is_file_object(source):
            source = PILImage.open(io.BytesIO(_read_file(source)))
        elif not isinstance(source, PILImage.Image):
            source = _image_from_array(source, PILImage)
        return _to_rgb(source)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on bytes that are not an image
        # Pillow names a buffer by its address in memory, which is another one each time
        reason = re.sub(r" <_io\.BytesIO object at \w+>", "", str(error)) or repr(error)
        raise ValueError(f"cannot read {name} as an image: {shorten(reason)}") from error


def is_file_object(value: Any) -> bool:
    """Whether a value is an open file, or behaves like one."""
    return hasattr(value, "read") and not isinstance(value, os.PathLike)


def _read_file(file: Any) -> bytes:
    """Reads a binary file object from its beginning, as Pillow does, and leaves its position as it was."""
    if isinstance(file, io.BytesIO):
        return file.getvalue()
    if hasattr(file, "seekable") and not file.seekable():
        data = file.read()
    else:
        with _file_lock:
            position = file.tell()
            file.seek(0)
            data = file.read()
            file.seek(position)
    if not isinstance(data, (bytes, bytearray)):
        raise ValueError(f"reading it gives a {type(data).__name__}, want bytes: open the file in binary mode")
    return data


def _open_location(location: str, pil: Any) -> Image:
    if location[:5].lower() == "data:":
        return pil.open(io.BytesIO(_decode_data(location)))
    _refuse_suffix(Path(urlsplit(location).path if _is_url(location) else location).suffix.lower())
    if _is_url(location):
        return pil.open(io.BytesIO(_download(location)))
    if "://" in location:
        raise ValueError(
            "only http:// and https:// addresses are fetched: give a path on this machine, bytes, or an open file"
        )
    if not os.path.isfile(location):
        raise ValueError("there is no such file")
    return pil.open(location)


def fetch_address(address: str) -> bytes:
    """Returns what an http(s) URL or a ``data:`` address holds, undecoded, within the limits of :func:`open_image`.

    Raises:
        ValueError: If it cannot be had.
    """
    try:
        if address[:5].lower() == "data:":
            return _decode_data(address)
        if _is_url(address):
            return _download(address)
        raise ValueError("only http:// and https:// addresses are fetched")
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {shorten(address)!r} as an image: {error}") from error


def _refuse_suffix(suffix: str) -> None:
    if suffix in REFUSED_SUFFIXES and suffix not in image_suffixes():
        raise ValueError(REFUSED_SUFFIXES[suffix])


def _decode_data(address: str) -> bytes:
    """Returns what a ``data:`` address holds, which must be in base64.

    Line breaks are dropped, and padding may be missing, as in browsers. Whatever else is not base64 is refused: where
    each ``+`` has become a blank, a JPEG might still be decoded, to another image.
    """
    head, _, payload = address.partition(",")
    kind, *parameters = head[5:].lower().split(";")
    _refuse_suffix("." + kind.removeprefix("image/").partition("+")[0])
    if not parameters or parameters[-1].strip() != "base64":
        raise ValueError("want an image in base64, as data:image/png;base64,…")
    if len(payload) * 3 // 4 > URL_MAX_BYTES:
        raise ValueError(f"it is larger than {URL_MAX_BYTES // 2**20} MiB")
    try:
        data = unquote_to_bytes(payload.encode("ascii")).translate(None, b"\r\n\t")
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except ValueError as error:
        raise ValueError(f"its base64 is broken: {error}") from None


def _download(url: str) -> bytes:
    """Fetches an http(s) URL within the limits of time and size; redirects must stay on http(s).

    A thread does it: neither the look-up of a name nor a server that sends a byte now and then keeps to a socket's
    time limit.
    """
    if not is_on("E5V_URLS", usual=True):
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
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[-1] in (1, 3, 4):
        raise ValueError(
            f"got an array of the shape {array.shape}, which may be (H, W, C) or (C, H, W): give it as a PIL image"
        )
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if 0 in array.shape or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        raise ValueError(f"got an array of the shape {array.shape}, want (H, W), (H, W, C) or (C, H, W)")
    return pil.fromarray(array)


# ---- pixels ----


def _to_rgb(image: Image) -> Image:
    if 0 in image.size:
        raise ValueError(f"it has the size {image.size[0]}x{image.size[1]}")
    if image.format in REFUSED_FORMATS:
        raise ValueError(REFUSED_FORMATS[image.format])
    image.load()
    _refuse_signed(image)
    opened = image
    if is_on("E5V_EXIF", usual=False):
        from PIL import ImageOps

        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_grey(image, opened)
    if image.mode == "La":  # Pillow knows no direct way
        image = image.convert("LA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _refuse_signed(image: Image) -> None:
    tags = getattr(image, "tag_v2", {})
    # Pillow itself writes mode I as signed 32-bit integers
    if SIGNED in tags.get(SAMPLE_FORMAT, ()) and 32 not in tags.get(BITS_PER_SAMPLE, ()):
        raise ValueError("its pixels are signed integers, and what is black in them is not known: save them unsigned")


def _to_grey(image: Image, opened: Image) -> Image:
    """Scales 16-bit, 32-bit and float grey to 8 bits, which Pillow would clip.

    Args:
        image: Of the mode I;16 in any byte order, I or F.
        opened: The same before it was turned, with what its file declares.

    Raises:
        ValueError: If it is not clear which values are black and white.
    """
    import numpy as np
    from PIL import Image as PILImage

    if opened.format in MEASUREMENTS:
        raise ValueError(f"its {opened.format} pixels are measurements: scale them to 8 bits first")
    tags = getattr(opened, "tag_v2", {})
    if image.mode == "F":
        grey = _scale_floats(np.asarray(image))
    elif image.mode == "I":
        grey = _scale_integers(np.asarray(image), declared=opened.format == "PPM")  # which Pillow scales to 16 bits
    else:
        bits = tags.get(BITS_PER_SAMPLE, (16,))[0]  # 12 bits have this mode too
        grey = np.asarray(image.convert("I")) >> (bits - 8)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow inverts the values of 8 bits alone
        grey = 255 - grey
    return PILImage.fromarray(grey.astype(np.uint8))


def _scale_integers(values: np.ndarray, declared: bool) -> np.ndarray:
    """Takes the mode I for 16 bits, as Pillow does where it reads and writes PGM.

    Unless the file declares them, values up to 255 might as well be those of 8 bits.
    """
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535 or (0 < high < 256 and not declared):
        raise ValueError(
            f"its mode is I, whose range is not known, and its values go from {low} to {high}: "
            "convert it to mode I;16 (0 to 65535) or L (0 to 255) first"
        )
    return values >> 8


def _scale_floats(values: np.ndarray) -> np.ndarray:
    """Takes floats from 0 to 1 for black to white, and whole numbers up to 255 for 8 bits."""
    import numpy as np

    if not np.isfinite(values).all():
        raise ValueError("its values are floats, and not all of them are finite")
    low, high = float(values.min()), float(values.max())
    if low >= 0 and high <= 1:
        return np.rint(values * 255)
    if low >= 0 and high <= 255 and (values == np.rint(values)).all():
        return values
    raise ValueError(
        f"its values are floats from {low:g} to {high:g}, whose range is not known: "
        "scale them to 0 to 1, or convert it to mode L (0 to 255) first"
    )


# ---- size ----


def count_pixels(value: Any) -> int:
    """Returns the pixels of an image that is not opened yet, by what its header says.

    Those of :data:`UNKNOWN_PIXELS` for a URL or an open file, and 0 for what is not an image.

    Args:
        value: See :func:`open_image`.

    Raises:
        Exception: Whatever Pillow, or the user's object, may raise.
    """
    from PIL import Image as PILImage

    if hasattr(value, "shape"):
        return math.prod(sorted(value.shape)[-2:])
    if isinstance(value, PILImage.Image):
        return value.width * value.height
    if isinstance(value, io.BytesIO):
        value = value.getvalue()
    elif (isinstance(value, str) and _is_url(value)) or is_file_object(value):
        return UNKNOWN_PIXELS
    elif isinstance(value, str) and value[:5].lower() == "data:":
        value = _decode_data(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        value = io.BytesIO(value)
    elif not isinstance(value, (str, os.PathLike)) or not os.path.isfile(value):
        return 0
    with PILImage.open(value) as image:
        return image.width * image.height
