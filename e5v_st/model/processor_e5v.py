"""A family's own processor without its video part, and how many tokens an image may take.

Processors of several families cannot be loaded without torchvision, for the sake of videos alone. And an embedding
would depend on whether torchvision is there, which scales images a little differently. So images are always read by the
processors that use Pillow, and no other part is loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .upstream_e5v import import_processor, planned_image_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .backbone_e5v import Backbone

#: What Gemma 4 was trained with.
_SOFT_TOKENS = (70, 140, 280, 560, 1120)


def load_processor(path: str, backbone: Backbone, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> Any:
    """Returns the processor of a checkpoint, with an image processor and a tokenizer and nothing else.

    Args:
        path: A directory or hub id.
        backbone: Its family.
        tokenizer: Its tokenizer.
        **kwargs: Where in the hub.
    """
    from transformers import AutoImageProcessor

    kind = without_videos(backbone.processor or "")
    where = {name: value for name, value in kwargs.items() if name in _PLACES}
    settings, _ = kind.get_processor_dict(path, **where)
    parts: dict[str, Any] = dict.fromkeys(kind.__base__.get_attributes())
    parts["image_processor"] = AutoImageProcessor.from_pretrained(path, backend="pil", **where)
    parts["tokenizer"] = tokenizer
    kept = {name: value for name, value in settings.items() if name not in {*parts, "processor_class", "chat_template"}}
    template = settings.get("chat_template") or tokenizer.chat_template
    processor = kind(**parts, **kept, chat_template=template)
    if "video_processor" in parts:
        processor.video_settings = _read_video_settings(path, **where)
    return processor


def _read_video_settings(path: str, **where: Any) -> dict[str, Any] | None:
    """Returns what a checkpoint says of videos, wherever transformers looks for it; it is saved as it was."""
    from transformers.video_processing_utils import BaseVideoProcessor

    try:
        settings, _ = BaseVideoProcessor.get_video_processor_dict(path, **where)
    except OSError:  # it says nothing
        return None
    return dict(settings)


def read_template(path: str, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> str | None:
    """Returns a checkpoint's chat template, which may stand beside its tokenizer or its processor.

    Args:
        path: A directory or hub id.
        tokenizer: The checkpoint's.
        **kwargs: Where in the hub.
    """
    from transformers import ProcessorMixin

    found: Any = tokenizer.chat_template
    if found is None:
        where = {name: value for name, value in kwargs.items() if name in _PLACES}
        try:
            settings, _ = ProcessorMixin.get_processor_dict(path, **where)
        except OSError:  # it has no file of a processor
            return None
        found = settings.get("chat_template")
    return found.get("default") if isinstance(found, dict) else found


_PLACES = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
#: The parts that are saved.
_PARTS = ("image_processor", "tokenizer")


@cache
def without_videos(path: str) -> Any:
    """Returns the class of a processor that does without its parts for videos and sounds.

    It has the name of the stock class, which is saved with it and loads what it saved.

    Args:
        path: See ``upstream_e5v.import_processor``.
    """
    stock: Any = import_processor(path)

    class WithoutVideos(stock):  # type: ignore[misc]
        video_settings: dict[str, Any] | None = None

        def check_argument_for_proper_class(self, name: str, value: Any) -> Any:
            return None if value is None else super().check_argument_for_proper_class(name, value)

        def to_dict(self) -> dict[str, Any]:
            left_out = {name for name in stock.get_attributes() if getattr(self, name) is None}
            left_out.add("video_settings")
            return {name: value for name, value in super().to_dict().items() if name not in left_out}

        def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
            self.get_attributes: Any = partial(list, _PARTS)  # for this processor alone, and while it is saved
            try:
                saved = super().save_pretrained(save_directory, *args, **kwargs)
            finally:
                del self.get_attributes
            if self.video_settings is not None:  # so that the stock processor loads from what is saved
                content = json.dumps(self.video_settings, indent=2, sort_keys=True)
                (Path(save_directory) / "video_preprocessor_config.json").write_text(content + "\n", encoding="utf8")
            return saved

        def __reduce__(self) -> Any:
            return _empty_processor, (path,), self.__dict__

    WithoutVideos.__name__, WithoutVideos.__module__ = stock.__name__, stock.__module__
    return WithoutVideos


def _empty_processor(path: str) -> Any:
    kind = without_videos(path)
    return kind.__new__(kind)


# ---- thin images ----

#: How many times its width an image's height may be at most, or the other way round, by the class of image processor.
#: Qwen's refuses thinner ones; Pixtral's scales the longer side down to a maximum, and the other must not vanish.
_THINNEST: dict[str, Callable[[Any], int]] = {
    "Qwen2VLImageProcessorPil": lambda images: 200,
    "PixtralImageProcessorPil": lambda images: int(images.size["longest_edge"]),
}


def widen(processor: Any, height: int, width: int) -> tuple[int, int]:
    """Returns the size to which an image is stretched that is too thin for a family; any other stays as it is.

    The family's processor would stretch it as well, as it shows each image in whole patches: nothing is lost.

    Args:
        processor: A family's.
        height: Of the image, in pixels.
        width: Of the image, in pixels.

    Example:
        An image for Qwen, whose processor takes 900 x 5, but not 900 x 2:

        >>> from transformers import Qwen2VLImageProcessorPil
        >>> from types import SimpleNamespace
        >>> widen(SimpleNamespace(image_processor=Qwen2VLImageProcessorPil()), 2, 900)
        (5, 900)
    """
    thinnest = _THINNEST.get(type(processor.image_processor).__name__)
    if thinnest is None:
        return height, width
    least = math.ceil(max(height, width) / thinnest(processor.image_processor))
    return max(height, least), max(width, least)


# ---- tokens of an image ----


def count_tokens(processor: Any, sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Returns how many tokens each image of an item will take.

    Args:
        processor: A family's.
        sizes: Height and width of each image, in pixels.
    """
    sizes = [widen(processor, *size) for size in sizes]
    several = len(sizes) > 1 and type(processor).__name__ == "LlavaOnevisionProcessor"
    if several:  # then none of them is cut into tiles, and a newline stands behind each
        return [processor.num_image_tokens + (processor.vision_feature_select_strategy != "default")] * len(sizes)
    return planned_image_tokens(processor, sizes)


# ---- a maximum number of tokens ----


def limit_image_tokens(processor: Any, backbone: Backbone, tokens: int) -> None:
    """Sets an image processor so that an image takes about this many tokens at most.

    Raises:
        ValueError: If the family has no such limit, or knows other numbers.
    """
    if tokens < 1:
        raise ValueError(f"got max_image_tokens={tokens}, want at least 1")
    if backbone.budget is None:
        raise ValueError(f"got max_image_tokens={tokens}, but the family {backbone.name!r} has no such limit")
    BUDGETS[backbone.budget](processor, processor.image_processor, tokens)


def _limit_pixels(processor: Any, images: Any, tokens: int) -> None:
    """Qwen scales an image down until it has so many pixels, a token for each square of ``patch * merge``."""
    most = tokens * (images.patch_size * images.merge_size) ** 2
    images.size = {"shortest_edge": min(images.size["shortest_edge"], most), "longest_edge": most}


def _limit_splitting(processor: Any, images: Any, tokens: int) -> None:
    """Idefics 3 and SmolVLM show an image whole, and, if they split it, in tiles of the same number of tokens."""
    tile = images.max_image_size["longest_edge"]
    side = images.size["longest_edge"] // tile
    while side > 1 and (side * side + 1) * processor.image_seq_len > tokens:
        side -= 1
    images.do_image_splitting = images.do_image_splitting and side > 1
    images.size = {"longest_edge": side * tile}


def _limit_patches(processor: Any, images: Any, tokens: int) -> None:
    """InternVL cuts an image into tiles, and adds a view of the whole image to them."""
    most = tokens // processor.image_seq_length
    images.max_patches = max(1, min(images.max_patches, most - 1))
    images.min_patches = min(images.min_patches, images.max_patches)


def _limit_pinpoints(processor: Any, images: Any, tokens: int) -> None:
    """LLaVA-OneVision has a list of grids, and picks the one that suits an image; one view of the whole is added."""
    size = images.size
    side: int = size["shortest_edge"] if "shortest_edge" in size else min(size["height"], size["width"])
    patches: int = math.isqrt(processor.num_image_tokens)  # on each side of a tile

    def count(height: int, width: int) -> int:  # with a newline behind each row of patches
        return patches * patches + (height // side) * patches * ((width // side) * patches + 1)

    fitting = [(height, width) for height, width in images.image_grid_pinpoints if count(height, width) <= tokens]
    smallest = min(images.image_grid_pinpoints, key=math.prod)
    images.image_grid_pinpoints = [list(pair) for pair in fitting or [smallest]]


def _limit_grids(processor: Any, images: Any, tokens: int) -> None:
    """LLaVA-NeXT has a list of grids as well; see :func:`grids_within`."""
    tile: int = images.crop_size["height"]
    images.image_grid_pinpoints = grids_within(images.image_grid_pinpoints, tile, processor.patch_size, tokens)


def grids_within(pinpoints: Sequence[Sequence[int]], tile: int, patch: int, tokens: int) -> list[list[int]]:
    """Returns the grids of a LLaVA-NeXT in which no image takes more than so many tokens, whatever its shape.

    A grid is counted full, and standing on its shorter side, where it has the most newlines: this is the most that it
    takes in either layout, and a wide grid and its tall twin stay or go together. If none of the list fits, the grid of
    one tile is taken, which LLaVA-OneVision has in its own list. It shows the image once more, in its own shape. The
    base tile alone would be less, but transformers' processor and model know no image without a grid.

    Args:
        pinpoints: Height and width of each grid, in pixels.
        tile: Side of a tile, in pixels.
        patch: Side of a patch, in pixels.
        tokens: The maximum.

    Raises:
        ValueError: If one tile is too many.

    Example:
        >>> grids_within([[336, 672], [672, 336], [672, 672]], tile=336, patch=14, tokens=2000)
        [[336, 672], [672, 336]]
        >>> grids_within([[336, 672], [672, 336], [672, 672]], tile=336, patch=14, tokens=1200)
        [[336, 336]]
    """
    side = tile // patch

    def count(height: int, width: int) -> int:
        return side * side + side * max(height, width) // tile * (side * min(height, width) // tile + 1)

    fitting = [[height, width] for height, width in pinpoints if count(height, width) <= tokens]
    if not fitting and count(tile, tile) > tokens:
        raise ValueError(
            f"got max_image_tokens={tokens}, want at least {count(tile, tile)}, which an image takes in one tile"
        )
    return fitting or [[tile, tile]]


def _limit_soft_tokens(processor: Any, images: Any, tokens: int) -> None:
    """Gemma 4 knows five numbers."""
    fitting = [number for number in _SOFT_TOKENS if number <= tokens]
    if not fitting:
        raise ValueError(f"got max_image_tokens={tokens}, want one of {', '.join(map(str, _SOFT_TOKENS))}")
    images.max_soft_tokens = fitting[-1]
    processor.image_seq_length = fitting[-1]


def _limit_longest_edge(processor: Any, images: Any, tokens: int) -> None:
    """Pixtral scales an image down until its longer side fits; a square one then takes the most tokens."""
    patch = processor.patch_size * processor.spatial_merge_size
    side = max(1, (math.isqrt(1 + 4 * tokens) - 1) // 2)  # side * (side + 1) tokens, with a break behind each row
    images.size = {"longest_edge": min(images.size["longest_edge"], side * patch)}


BUDGETS: dict[str, Callable[[Any, Any, int], None]] = {
    "pixels": _limit_pixels,
    "splitting": _limit_splitting,
    "patches": _limit_patches,
    "pinpoints": _limit_pinpoints,
    "grids": _limit_grids,
    "soft tokens": _limit_soft_tokens,
    "longest edge": _limit_longest_edge,
}
