"""What travels from ``preprocess`` to ``forward``, field by field, and how images become fields.

================== ============================= ================================== ============================
field              shape                         written by                         read by
================== ============================= ================================== ============================
input_ids          (n, tokens)                   ``collate``                        ``forward``
attention_mask     (n, tokens), from ``forward`` ``collate``, ``forward``           ``forward``, Pooling
                   (n, 1) if last tokens are
                   all that is there
mm_token_type_ids, (n, tokens)                   ``collate``, where the family      the family's ``forward``
token_type_ids                                   wants one of them
pixel_values       shared: (images, tiles, 3,    ``collate`` of LLaVA-NeXT, if      ``sharing_e5v``
                   side, side); else (n, most,   there are images
                   tiles, 3, side, side)
image_sizes        shared: (images, 2); else     ``collate`` of LLaVA-NeXT, if      ``sharing_e5v``
                   (n, most, 2)                  there are images
groups             a family's own tensors, for   ``collate`` of other families,     ``generic_e5v``
                   each distinct group           shared, with images
by_sample_*_data   (n, 1, most, …)               ``collate`` of other families,     ``generic_e5v``
by_sample_*_rows   (n,)                          not shared, with images            ``generic_e5v``
image_index        LLaVA-NeXT: (slots,); other   ``collate``, shared, with images   ``plain_states``
                   families: (n,), -1 for none
parts              parts, see ``tree_e5v``       ``collate``, shared, if the model  ``forward`` takes it out;
                                                 ``shares()``                       ``encode_all`` pins it
lengths            n integers                    ``collate``, shared, if the model  ``forward`` takes it out
                                                 does not ``shares()``; of
                                                 LLaVA-NeXT, of texts alone
image_keys         (n, most, 2), zeros where     ``collate`` of training, with      the training's ``forward``
                   there is no image             images (``training/images.py``)
position_ids       (n, tokens)                   the published recipe's collator    the training's ``forward``
                                                 (``training/quirks.py``)
max_image_tokens   an integer, if a call has one ``preprocess``                     ``forward`` takes it out
token_embeddings   (n, tokens, d) or (n, 1, d),  ``forward``                        Pooling
                   float32
================== ============================= ================================== ============================

*Shared* features (``collate(share=True)``) hold each distinct image once, and the batch must then stay as it is: only
``encode`` and ``encode_all`` ask for them. All others have a row for each item in every tensor, so that a batch for
training can be taken apart and joined by rows; *most* is the largest number of images of an item (in other families
than LLaVA-NeXT, of the rows of a field). *Slots* are the places for images in the prompts of a batch, one behind the
other. A *group* is what ``pixels_e5v`` reads at once.

sentence-transformers has a field ``num_images_per_sample`` for the same end, which E5-V neither writes nor reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch

if TYPE_CHECKING:
    from PIL.Image import Image

    from .items_e5v import ImageKey, Item
    from .pixels_e5v import ImageReader
    from .tree_e5v import Part


class Features(TypedDict, total=False):
    """A batch; see the table above."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    mm_token_type_ids: torch.Tensor
    token_type_ids: torch.Tensor
    pixel_values: torch.Tensor
    image_sizes: torch.Tensor
    groups: tuple[dict[str, torch.Tensor], ...]
    image_index: torch.Tensor
    parts: tuple[Part, ...]
    lengths: list[int]
    image_keys: torch.Tensor
    position_ids: torch.Tensor
    max_image_tokens: int
    token_embeddings: torch.Tensor


def distinct_groups(items: Sequence[Item], reader: ImageReader) -> tuple[list[tuple[Image, ...]], list[list[int]]]:
    """Returns the groups without repetitions (by content), and for each item which of them it shows."""
    index: dict[tuple[ImageKey, ...], int] = {}
    groups: list[tuple[Image, ...]] = []
    shown: list[list[int]] = []
    for item in items:
        own = reader.groups(item)
        for key, images in own:
            if key not in index:
                index[key] = len(groups)
                groups.append(images)
        shown.append([index[key] for key, _ in own])
    return groups, shown


def has_images(features: Mapping[str, Any]) -> bool:
    """Whether there are images in a batch, of any family."""
    return any(name in ("pixel_values", "groups") or name.startswith("by_sample_") for name in features)


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
        rows[name][there] = values[[image for images in shown for image in images]]
    return rows
