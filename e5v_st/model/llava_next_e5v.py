"""LLaVA-NeXT, the model family of E5-V: its two image layouts, and what its published checkpoints lack today.

**Layouts.** A layout says how an image becomes tiles, how many tokens it takes, and in which order its features stand.
``upstream`` is what current transformers and other servers of the model do. ``paper`` is what transformers 4.41.2 did,
with which E5-V's published numbers were made. They differ in three places:

1. ``paper`` reads the tile grid the wrong way round when it puts the features back together. So grids that are not
   square (1x2, 2x1, 1x3, 3x1) are scrambled and cropped by the unpadding.
2. ``paper`` pads both sides of a resized image by the same whole number of pixels, one short where the rest is odd. The
   short edge tiles are then resized to full size.
3. ``paper`` truncates the unpadded side, where ``upstream`` rounds away the float error first.

The first of them, with an image twice as wide as high and its tiles a and b of 2 x 2 features each::

    tiles as cut      upstream packs         paper packs, before it crops
                      (rows of the image)    (the same numbers, as if the tiles stood below each other)
    a0 a1 | b0 b1     a0 a1 b0 b1 newline    a0 a1 newline
    a2 a3 | b2 b3     a2 a3 b2 b3 newline    a2 a3 newline
                                             b0 b1 newline
                                             b2 b3 newline

**Repairs.** Published E5-V checkpoints (royokong/e5-v and its like) were saved by transformers 4.41: the image token's
id lies one past the embedding, and the processor does not know its patch size. Both are errors in every transformers
since 4.45.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from .features_e5v import by_item, stack_pixels
from .pixels_e5v import ImageReader, Pixels, Placeholder
from .prompts_e5v import IMAGE
from .upstream_e5v import check_override

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image
    from transformers import LlavaNextConfig, LlavaNextModel

    from .items_e5v import ImageKey, Item

LAYOUTS = ("upstream", "paper")


# ---- layouts ----


class PaperImageProcessor(LlavaNextImageProcessorPil):
    """The image processor of transformers 4.41.2: pads both sides alike, leaving the tiles one pixel short if odd."""

    def _get_padding_size(self, original_resolution: tuple, target_resolution: tuple) -> tuple:
        rest_y, rest_x = (
            (target - side) // 2 for side, target in zip(original_resolution, target_resolution, strict=True)
        )
        return (rest_y, rest_y), (rest_x, rest_x)


def make_image_processor(settings: dict[str, Any], image_layout: str) -> LlavaNextImageProcessorPil:
    """Returns the image processor of a layout.

    Args:
        settings: A LLaVA-NeXT image processor's ``to_dict()``.
        image_layout: ``"upstream"`` or ``"paper"``.
    """
    kind = LlavaNextImageProcessorPil
    if check_layout(image_layout) == "paper":
        check_override(kind, "_get_padding_size")
        kind = PaperImageProcessor
    return kind(**{key: value for key, value in settings.items() if key in _SETTINGS and value is not None})


_SETTINGS = (
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_convert_rgb",
    "do_pad",
    "image_grid_pinpoints",
)


def check_layout(image_layout: str) -> str:
    """Returns ``image_layout``; raises ValueError if there is no such layout."""
    if image_layout not in LAYOUTS:
        raise ValueError(f"got image_layout={image_layout!r}, want one of {', '.join(map(repr, LAYOUTS))}")
    return image_layout


def bind_layout(model: LlavaNextModel, image_layout: str) -> None:
    """Makes ``model.get_image_features`` (and so ``model.forward``) pack features in this layout."""
    model.__dict__.pop("pack_image_features", None)
    if check_layout(image_layout) == "paper":
        model.__dict__["pack_image_features"] = partial(_pack_paper, model.config)


def count_tokens(height: int, width: int, config: LlavaNextConfig, image_layout: str) -> int:
    """Number of tokens of an image of ``height x width`` pixels: base tile, unpadded grid, one newline a row."""
    pinpoints = tuple(map(tuple, config.image_grid_pinpoints))
    side = config.vision_config.image_size // config.vision_config.patch_size
    rows, columns = _grid(height, width, pinpoints, config.vision_config.image_size, image_layout)
    top, left = _margins(height, width, rows * side, columns * side, image_layout)
    return side * side + (rows * side - 2 * top) * (columns * side - 2 * left + 1)


def count_tiles(height: int, width: int, config: LlavaNextConfig) -> int:
    """Number of tiles that go through the vision tower, the base tile included."""
    pinpoints = tuple(map(tuple, config.image_grid_pinpoints))
    rows, columns = _grid(height, width, pinpoints, config.vision_config.image_size, "upstream")
    return 1 + rows * columns


@lru_cache(maxsize=4096)
def _grid(height: int, width: int, pinpoints: tuple[tuple[int, int], ...], tile: int, layout: str) -> tuple[int, int]:
    """Rows and columns of tiles as the features are put back together; ``paper`` swaps the two."""
    best_height, best_width = select_best_resolution((height, width), list(pinpoints))
    rows, columns = best_height // tile, best_width // tile
    return (columns, rows) if layout == "paper" else (rows, columns)


def _margins(height: int, width: int, rows: int, columns: int, layout: str) -> tuple[int, int]:
    """Feature rows and columns to drop on each side of a ``rows x columns`` map, because only padding lies there."""
    digits = None if layout == "paper" else 7
    if width / height > columns / rows:
        side = height * (columns / width)
        return (rows - int(side if digits is None else round(side, digits))) // 2, 0
    side = width * (rows / height)
    return 0, (columns - int(side if digits is None else round(side, digits))) // 2


def _pack_paper(
    config: LlavaNextConfig,
    image_features: list[torch.Tensor],
    image_sizes: torch.Tensor,
    vision_feature_select_strategy: str,
    image_newline: torch.Tensor,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Packs features as transformers 4.41.2 did; stands in for ``LlavaNextModel.pack_image_features``.

    Args:
        config: The model's.
        image_features: Per image ``(tiles, tokens of a tile, d)``, the base tile first.
        image_sizes: ``(images, 2)``, height and width in pixels.
        vision_feature_select_strategy: Unused, part of the signature that it stands in for.
        image_newline: ``(d,)``, put at the end of each feature row.

    Returns:
        Per image ``(tokens, d)``, and the numbers of tokens.
    """
    side = config.vision_config.image_size // config.vision_config.patch_size
    pinpoints = tuple(map(tuple, config.image_grid_pinpoints))
    packed = []
    for features, size in zip(image_features, image_sizes.tolist(), strict=True):
        height, width = size
        rows, columns = _grid(height, width, pinpoints, config.vision_config.image_size, "paper")
        tiles = features[1:].view(rows, columns, side, side, -1)
        grid = tiles.transpose(1, 2).reshape(rows * side, columns * side, -1)
        top, left = _margins(height, width, rows * side, columns * side, "paper")
        grid = grid[top : rows * side - top, left : columns * side - left]
        newline = image_newline.to(grid).expand(grid.shape[0], 1, -1)
        packed.append(torch.cat((features[0], torch.cat((grid, newline), dim=1).flatten(0, 1))))
    return packed, torch.tensor([len(features) for features in packed], device=packed[0].device)


class LlavaNextReader(ImageReader):
    """Reads images in a layout, each as a group of its own.

    Args:
        config: The model's.
        settings: The checkpoint's image processor's ``to_dict()``.
        image_layout: ``"upstream"`` or ``"paper"``.
    """

    def __init__(self, config: LlavaNextConfig, settings: dict[str, Any], image_layout: str) -> None:
        self.config = config
        self.image_layout = image_layout
        self.image_processor = make_image_processor(settings, image_layout)

    def groups(self, item: Item) -> list[tuple[tuple[ImageKey, ...], tuple[Image, ...]]]:
        """Returns each image of an item."""
        return [((key,), (image,)) for key, image in zip(item.image_keys, item.images, strict=True)]

    def count(self, images: Sequence[Image]) -> list[int]:
        """Returns the number of tokens of each image."""
        return [count_tokens(image.height, image.width, self.config, self.image_layout) for image in images]

    def read(self, images: Sequence[Image]) -> Pixels:
        """Cuts an image into tiles."""
        (image,) = images
        tensors = dict(self.image_processor(image, return_tensors="pt"))
        return Pixels(tensors, [Placeholder(IMAGE, (self.count(images)[0],))])

    def join(self, pixels: Sequence[Pixels], shown: Sequence[Sequence[int]], *, share: bool) -> dict[str, Any]:
        """Returns ``pixel_values`` and ``image_sizes``, see ``features_e5v``."""
        stacked = stack_pixels([each.tensors for each in pixels])
        if not share:
            return by_item(stacked, shown)
        return {**stacked, "image_index": torch.tensor([index for own in shown for index in own])}


# ---- repairs ----


def repair_embedding(model: LlavaNextModel) -> None:
    """Makes the image token's id an index of the embedding if it lies past the last row.

    Rows are added; the others stay bit for bit. An embedding that is offloaded to the CPU or the disk
    (``device_map="auto"``) keeps its rows, since accelerate sets them anew for each call: there the id is replaced.
    """
    embedding = model.get_input_embeddings()
    rows = embedding.num_embeddings
    if rows > model.config.image_token_id:
        return
    if embedding.weight.device.type == "meta" and hasattr(model, "hf_device_map"):
        embedding.register_forward_pre_hook(_stay_below_last_row)
        return
    model.resize_token_embeddings(model.config.image_token_id + 1, mean_resizing=False)
    # Never read, as image features stand there; zero, so that a model is the same whenever it is loaded
    model.get_input_embeddings().weight.data[rows:] = 0


def _stay_below_last_row(embedding: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Looks up the last row for the image token: image features take the place of what is found."""
    return (inputs[0].clamp(max=embedding.num_embeddings - 1), *inputs[1:])


def repair_processor(processor: Any, config: LlavaNextConfig) -> None:
    """Tells a processor what it needs to count image tokens; the CLS token is the additional one."""
    processor.patch_size = config.vision_config.patch_size
    processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    processor.num_additional_image_tokens = 1
