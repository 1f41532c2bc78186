"""What travels from ``preprocess`` to ``forward``, field by field, and how images become fields.

================== ============================= ================================== ============================
field              shape                         written by                         read by
================== ============================= ================================== ============================
input_ids          (n, tokens)                   ``collate``                        ``forward``
attention_mask     (n, tokens), from ``forward`` ``collate``, ``forward``           ``forward``, Pooling
                   (n, 1) if last tokens are
                   all that is there
pixel_values       shared: (images, tiles, 3,    ``collate``, if there are images   ``sharing_e5v``
                   side, side); else (n, most,
                   tiles, 3, side, side)
image_sizes        shared: (images, 2); else     ``collate``, if there are images   ``sharing_e5v``
                   (n, most, 2)
image_index        (slots,)                      ``collate``, shared, with images   ``plain_states``
parts              parts, see ``tree_e5v``       ``collate``, shared, if the model  ``forward`` takes it out;
                                                 ``shares()``                       ``encode_all`` pins it
lengths            n integers                    ``collate``, shared, of texts, if  ``forward`` takes it out
                                                 the model does not ``shares()``
position_ids       (n, tokens)                   the published recipe's collator    the training's ``forward``
                                                 (``training/quirks.py``)
token_embeddings   (n, tokens, d) or (n, 1, d),  ``forward``                        Pooling
                   float32
================== ============================= ================================== ============================

*Shared* features (``collate(share=True)``) hold each distinct image once, and the batch must then stay as it is: only
``encode`` and ``encode_all`` ask for them. All others have a row for each item in every tensor, so that a batch for
training can be taken apart and joined by rows; *most* is the largest number of images of an item. *Slots* are the
places for images in the prompts of a batch, one behind the other.

sentence-transformers has a field ``num_images_per_sample`` for the same end, which E5-V neither writes nor reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

import torch

if TYPE_CHECKING:
    from PIL.Image import Image

    from .items_e5v import ImageKey, Item
    from .tree_e5v import Part


class Features(TypedDict, total=False):
    """A batch; see the table above."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    pixel_values: torch.Tensor
    image_sizes: torch.Tensor
    image_index: torch.Tensor
    parts: tuple[Part, ...]
    lengths: list[int]
    position_ids: torch.Tensor
    token_embeddings: torch.Tensor


def every_image(items: Sequence[Item]) -> tuple[list[Image], list[list[int]]]:
    """Returns all images in their order, and for each item the indexes of its own."""
    images = [image for item in items for image in item.images]
    index = iter(range(len(images)))
    return images, [[next(index) for _ in item.images] for item in items]


def distinct_images(items: Sequence[Item]) -> tuple[list[Image], list[list[int]]]:
    """Returns the images without repetitions (by content), and for each item which of them it shows."""
    index: dict[ImageKey, int] = {}
    images: list[Image] = []
    for item in items:
        for key, image in zip(item.image_keys, item.images, strict=True):
            if key not in index:
                index[key] = len(images)
                images.append(image)
    return images, [[index[key] for key in item.image_keys] for item in items]


def stack_pixels(outputs: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Joins images of different numbers of tiles; missing tiles are zeros that the model drops by the image's size.

    Args:
        outputs: What the image processor returned for each image.
    """
    tiles = max(output["pixel_values"].shape[1] for output in outputs)
    pixels = [
        torch.nn.functional.pad(output["pixel_values"], (0, 0) * 3 + (0, tiles - output["pixel_values"].shape[1]))
        for output in outputs
    ]
    return {"pixel_values": torch.cat(pixels), "image_sizes": torch.cat([output["image_sizes"] for output in outputs])}


def by_item(pixels: dict[str, torch.Tensor], shown: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Gives each item a row of its images, so that a batch for training can be taken apart and joined by rows.

    Losses slice the rows of a batch (gradient caching) and join those of several columns; launchers give each process
    some. They know no other order: a tensor with a row for each image, or the places of images in a batch, would end up
    with other items without an error.

    Args:
        pixels: ``pixel_values`` ``(images, tiles, 3, side, side)`` and ``image_sizes`` ``(images, 2)``.
        shown: Which images each item shows.

    Returns:
        ``pixel_values`` ``(n, most, tiles, 3, side, side)`` and ``image_sizes`` ``(n, most, 2)``, where ``most`` is the
        largest number of images of an item. Places without an image hold zeros.
    """
    counts = torch.tensor([len(images) for images in shown])
    there = torch.arange(int(counts.max())) < counts.unsqueeze(1)
    rows = {name: values.new_zeros(*there.shape, *values.shape[1:]) for name, values in pixels.items()}
    for name, values in pixels.items():
        rows[name][there] = values
    return rows
