"""The page that shows what a search has found. It holds the images, and opens from disk."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from ..files import hash_file
from ..model.images_e5v import image_suffixes, open_image
from ..tables import is_table, open_table
from .nearest import Hit

if TYPE_CHECKING:
    from PIL.Image import Image

#: What browsers show as it is; Pillow's names.
BROWSER_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "WEBP")
#: Longest side of a copy of any other image, in pixels.
SHOWN_SIZE = 512


def find_images(index: Path, job: dict[str, Any], found: list[Hit]) -> list[tuple[Path, Any]]:
    """Returns for each hit the source's folder, and the hit's image: its path in there, its bytes, or ``None``."""
    source, column = index / str(job["source"]), job.get("image_column")
    if source.is_dir():
        return [(source, hit.name) for hit in found]
    nothing = [(source.parent, None)] * len(found)
    if column is None or not is_table(source) or not source.is_file():
        return nothing
    if hash_file(source) != job.get("content"):  # a table that has changed would show the image of another row
        return nothing
    try:
        table = open_table(source)
        if column not in table.column_names:
            return nothing
        rows = table.select_columns([column])
        # In the order of the table, which is how Parquet is read fast
        cells = {row: rows[row][column] for row in sorted(hit.row for hit in found) if row < len(rows)}
    except ValueError:  # somebody else's index may name anything
        return nothing
    return [(source.parent, cells.get(hit.row)) for hit in found]


def show_image(folder: Path, cell: Any) -> str:
    """Returns an image as HTML, or an empty string for anything else.

    An index may be somebody else's, and name any file of this machine. Only images below the source's folder are shown.

    Args:
        folder: The source's folder.
        cell: A path in there, bytes, or both as ``datasets`` stores them.
    """
    from PIL import Image as PILImage

    if isinstance(cell, dict):
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    try:
        if isinstance(cell, str):
            place, path = PurePath(cell), folder / cell
            if place.is_absolute() or ".." in place.parts or path.suffix.lower() not in image_suffixes():
                return ""
            cell = path.read_bytes() if path.is_file() else None
        if not isinstance(cell, bytes):
            return ""
        with PILImage.open(io.BytesIO(cell)) as image:
            kind = image.get_format_mimetype()
            if image.format not in BROWSER_FORMATS:
                kind, cell = "image/png", _as_png(image)
    except (OSError, ValueError, PILImage.DecompressionBombError):
        return ""
    return f'<img alt="" src="data:{kind};base64,{base64.b64encode(cell).decode()}">'


def _as_png(image: Image) -> bytes:
    """Returns a small copy in a format that any browser shows, with the pixels that the model gets."""
    png = io.BytesIO()
    copy = open_image(image)
    copy.thumbnail((SHOWN_SIZE, SHOWN_SIZE))
    copy.save(png, "PNG")
    return png.getvalue()


def render_page(query: str, found: list[Hit], images: list[str]) -> str:
    """Returns a page with the results and their images, or the ids alone."""
    figures = "".join(
        f"<figure>{image}<figcaption><b>{rank}. {hit.score:.3f}</b><br>{html.escape(hit.name)}</figcaption></figure>"
        for rank, (hit, image) in enumerate(zip(found, images, strict=True), start=1)
    )
    return (
        '<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        "<title>E5-V search</title><style>body{font:16px system-ui,sans-serif;margin:2rem}"
        "main{display:flex;flex-wrap:wrap;gap:1rem}figure{margin:0;width:12rem;overflow-wrap:anywhere}"
        f"img{{max-width:12rem;max-height:12rem}}</style><h1>{html.escape(query)}</h1><main>{figures}</main></html>\n"
    )
