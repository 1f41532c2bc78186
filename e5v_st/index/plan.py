"""What a job of ``e5v embed`` will take: rows, tokens and time, before a model is downloaded or loaded.

Rows are read, as far as they are on this machine: texts whole, of images only the header, which says how large they
are. Of a long source, rows spread evenly over it stand for all.
"""

from __future__ import annotations

import io
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..costs import Amount, Shape, TokenCounter, find_counter, measure, sizes_of, tell_number, tell_time
from ..files import is_hub_id
from ..model.images_e5v import is_address
from ..model.prompts_e5v import IMAGE, PROMPTS, SENTENCE, default_prompt
from .manifest import MANIFEST, read_manifest
from .shards import count_shards, is_done, rows_of_shard, shard_path
from .source import Source

#: Rows that are looked at.
LOOKED_AT = 2000


@dataclass
class Seen:
    """Rows of one kind that were looked at."""

    rows: int = 0
    characters: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)


def check_local(source: str) -> None:
    """Raises ValueError for a dataset on the hub, whose rows would have to be downloaded."""
    if is_hub_id(source) and not Path(source).expanduser().exists():
        raise ValueError(
            f"{source} is a dataset on the hub, and --plan downloads nothing: download it, and give the folder or file"
        )


def plan_job(args: Namespace, source: Source) -> str:
    """Returns what ``e5v embed --plan`` prints.

    Args:
        args: Of ``e5v embed``.
        source: Holds the rows.
    """
    known = {"image_layout": args.image_layout, "max_image_tokens": args.max_image_tokens}
    counter = find_counter(str(args.model), revision=args.revision, **known)
    left = _rows_left(args, len(source.ids))
    seen, unread = _look(source, left)
    looked_at = sum(own.rows for own in seen.values())
    amount = Amount()
    for (has_text, images), own in seen.items():
        amount += _count(counter, args.prompt, has_text, images, own, len(left) * own.rows / max(looked_at, 1))
    speed = None if args.rate else measure(counter.language, args.device, args.dtype)
    seconds = amount.tokens / args.rate if args.rate else counter.seconds(amount, speed or 1.0)
    return "\n".join(_tell(args, counter, len(source.ids), len(left), amount, seconds, speed, unread, looked_at))


def _rows_left(args: Namespace, rows: int) -> list[int]:
    """Returns the rows of shards that are not done; whether these are of the same job is found out by the run."""
    manifest = args.out / MANIFEST
    digest = read_manifest(manifest).get("job_sha256") if manifest.is_file() else None
    size = args.rows_per_shard
    shards = [
        number
        for number in range(count_shards(rows, size))
        if digest is None or not is_done(shard_path(args.out, number), digest)
    ]
    return [row for number in shards for row in rows_of_shard(rows, size, number)]


def _look(source: Source, rows: list[int]) -> tuple[dict[tuple[bool, int], Seen], int]:
    """Returns what rows hold, by whether they have a text and how many images; and how many rows do not open."""
    seen: dict[tuple[bool, int], Seen] = {}
    unread = 0
    for row in rows[:: max(1, -(-len(rows) // LOOKED_AT))]:
        item = source.item(row)
        images = item.get("image")
        images = images if isinstance(images, list) else [] if images is None else [images]
        try:
            sizes = [_size(image) for image in images]
        except (OSError, ValueError, TypeError):  # it is not there, or an address; a run tells
            unread += 1
            continue
        if item:
            own = seen.setdefault(("text" in item, len(images)), Seen())
            own.rows += 1
            own.characters += len(item.get("text", ""))
            own.sizes += sizes
    return seen, unread


def _size(image: Any) -> tuple[int, int]:
    """Returns height and width of an image from its header."""
    from PIL import Image

    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str) and is_address(image):
        raise ValueError("an address is not opened")
    if isinstance(image, Image.Image):
        return image.height, image.width
    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
        return opened.height, opened.width


def _count(counter: TokenCounter, prompt: str | None, has_text: bool, images: int, seen: Seen, number: float) -> Amount:
    template = PROMPTS.get(prompt, prompt) if prompt else None
    if template is None or (SENTENCE not in template and IMAGE not in template):
        template = (template or "") + default_prompt(has_text, images)
    shapes: list[Shape] = (
        [(height, width, part * images) for height, width, part in sizes_of(seen.sizes)] if images else []
    )
    characters = seen.characters / seen.rows if has_text else None
    return counter.count(template, number, characters=characters, shapes=shapes)


def _tell(
    args: Namespace,
    counter: TokenCounter,
    rows: int,
    left: int,
    amount: Amount,
    seconds: float,
    speed: float | None,
    unread: int,
    looked_at: int,
) -> Iterator[str]:
    layout = f", image layout {counter.layout}" if counter.layout else ""
    yield f"{rows:,} rows, {rows - left:,} done, {left:,} to embed"
    parts = {"texts": amount.texts, "images": amount.images, "of both": amount.both}
    yield ", ".join(f"{tell_number(value)} {what}" for what, value in parts.items() if value) or "nothing to embed"
    yield f"{tell_number(amount.tokens)} tokens of whole prompts, as in {counter.about} ({counter.family}{layout})"
    if args.rate:
        yield f"{tell_time(seconds)} at {args.rate:,.0f} tokens a second, as --rate says"
    elif speed:
        yield (
            f"{tell_time(seconds)} at {speed / 1e9:,.0f} G operations a second, measured on this machine in one layer "
            "with random numbers; a run takes longer by reading data, and more so for a small model"
        )
    if looked_at + unread < left:
        yield f"{looked_at + unread:,} rows were looked at, spread evenly; rows that repeat others count again"
    if unread:
        yield f"{unread:,} of these have images that are addresses or do not open: they count as the others do"
