"""Captions as cards: a caption drawn as black text on white, for retrieval between images.

As ``create_text_image`` of the published ``retrieval.py`` draws them, with Liberation Sans, which has Arial's metrics.
A word that is wider than the line is broken; there the published code loops for ever.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

FONT = Path(__file__).parent / "fonts" / "LiberationSans-Regular.ttf"
SIZE = (800, 400)
FONT_SIZE = 40
MARGIN = 20


def draw_card(text: str, size: tuple[int, int] = SIZE, font_size: int = FONT_SIZE, margin: int = MARGIN) -> Image:
    """Draws a text: word-wrapped, left-aligned, vertically centred, black on white.

    Args:
        text: Any text. What does not fit from top to bottom is cut off.
        size: Width and height in pixels.
        font_size: In pixels.
        margin: On the left and the right, in pixels.

    Returns:
        An RGB image.
    """
    from PIL import Image, ImageDraw

    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    font = _font(font_size)
    lines = wrap(text, size[0] - 2 * margin, lambda part: draw.textlength(part, font=font))
    heights = [bottom - top for _, top, _, bottom in (draw.textbbox((0, 0), line, font=font) for line in lines)]
    y = (size[1] - sum(heights)) // 2
    for line, height in zip(lines, heights, strict=True):
        draw.text((margin, y), line, font=font, fill="black")
        y += height
    return image


def wrap(text: str, width: float, length: Callable[[str], float]) -> list[str]:
    """Splits a text into lines that are no wider than ``width``; each word is followed by a space.

    Args:
        text: Any text.
        width: Of a line, in whatever ``length`` measures.
        length: Returns the width of a string.
    """
    lines: list[str] = []
    line = ""
    words = text.split()[::-1]
    while words:
        word = words.pop()
        if length(line + word) <= width:
            line += word + " "
        elif line:
            lines.append(line)
            line = ""
            words.append(word)
        else:
            fits = max(1, max((end for end in range(len(word)) if length(word[:end]) <= width), default=1))
            if fits < len(word):
                words.append(word[fits:])
            lines.append(word[:fits])
    return [*lines, line] if line else lines


@lru_cache
def _font(size: int) -> FreeTypeFont:
    from PIL import ImageFont

    # Raqm, where Pillow has it, shapes ligatures and kerning in another way: cards must not depend on it
    return ImageFont.truetype(str(FONT), size, layout_engine=ImageFont.Layout.BASIC)


def card_dataset(ids: Sequence[str], texts: Sequence[str], **style: Any) -> Dataset:
    """Returns a dataset with the columns ``id`` and ``image``, drawn once and kept in the cache of ``datasets``.

    Args:
        ids: One for each text.
        texts: What stands on the cards.
        **style: Arguments of :func:`draw_card`.
    """
    from datasets import Dataset, Features, Image, Value

    features = Features({"id": Value("string"), "image": Image()})
    arguments = {"ids": list(ids), "texts": list(texts), "style": style}
    return Dataset.from_generator(_draw_all, features=features, gen_kwargs=arguments)


def _draw_all(ids: Sequence[str], texts: Sequence[str], style: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name, text in zip(ids, texts, strict=True):
        buffer = io.BytesIO()
        draw_card(text, **style).save(buffer, "PNG", compress_level=1)
        yield {"id": name, "image": {"bytes": buffer.getvalue(), "path": None}}
