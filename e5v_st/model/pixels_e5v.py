"""An item's images to what the model sees of them: pixels, and what stands for each image in the prompt.

A *group* is what is read at once and shared as a whole: all images of an item, as some families cut an image otherwise
when it is not alone. (LLaVA-NeXT does not, so there each image is a group of its own, see ``llava_next_e5v``.) The
family's own processor reads a group. It says what becomes of each image in the prompt: a run of image tokens, or
several runs with marks of rows and columns between them. Each run is shortened to one token until the prompt is
tokenised::

    the processor's     <fake><row_1_col_1><image><image><image><fake><row_1_col_2><image><image><image>
    Placeholder         text  <fake><row_1_col_1><image><fake><row_1_col_2><image>      runs  3, 3
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL.Image import Resampling

from .processor_e5v import count_tokens, widen
from .upstream_e5v import colours_first

if TYPE_CHECKING:
    from PIL.Image import Image

    from .backbone_e5v import Backbone
    from .items_e5v import ImageKey, Item

#: What processors return besides pixels.
_NOT_PIXELS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "text_replacement_offsets")
#: What fills up rows of different sizes, where it is not zero.
_FILLED_WITH = {"image_position_ids": -1}


class Placeholder(NamedTuple):
    """What stands for an image in a prompt.

    Attributes:
        text: A string in which each run of image tokens is shortened to one.
        runs: Tokens of each run.
    """

    text: str
    runs: tuple[int, ...]


class Pixels(NamedTuple):
    """A group of images that was read.

    Attributes:
        tensors: What the model is given, with rows for this group alone.
        shown: What stands for each image.
    """

    tensors: dict[str, torch.Tensor]
    shown: list[Placeholder]


class ImageReader:
    """Reads groups of images by a family's own processor.

    Args:
        processor: The family's, see ``processor_e5v``.
        backbone: The family.
        token: The token that is repeated for an image. A prompt may have another one in its place (Gemma 3 does).
    """

    def __init__(self, processor: Any, backbone: Backbone, token: str) -> None:
        self.processor = processor
        self.image = backbone.image
        self.token = token
        self.run = re.compile(f"(?:{re.escape(token)})+")

    def groups(self, item: Item) -> list[tuple[tuple[ImageKey, ...], tuple[Image, ...]]]:
        """Returns the groups of an item's images, each with what tells it from others."""
        return [(item.image_keys, item.images)] if item.images else []

    def count(self, images: Sequence[Image]) -> list[int]:
        """Returns how many tokens each image of an item will take, without reading any."""
        return count_tokens(self.processor, [(image.height, image.width) for image in images]) if images else []

    def read(self, images: Sequence[Image]) -> Pixels:
        """Reads a group."""
        with colours_first():
            found = self.processor(
                text=[self.image * len(images)],
                images=[[self._widen(image) for image in images]],
                return_tensors="pt",
                add_special_tokens=False,
                return_text_replacement_offsets=True,
            )
        replaced = [each["replacement"] for each in found["text_replacement_offsets"][0]]
        tensors = {name: value for name, value in found.items() if name not in _NOT_PIXELS}
        return Pixels(tensors, [self._shorten(text) for text in replaced])

    def _widen(self, image: Image) -> Image:
        height, width = widen(self.processor, image.height, image.width)
        if (height, width) == (image.height, image.width):
            return image
        return image.resize((width, height), Resampling.NEAREST)

    def _shorten(self, text: str) -> Placeholder:
        runs = tuple(len(run) // len(self.token) for run in self.run.findall(text))
        return Placeholder(self.image.replace(self.processor.image_token, self.run.sub(self.token, text)), runs)

    def join(self, pixels: Sequence[Pixels], shown: Sequence[Sequence[int]], *, share: bool) -> dict[str, Any]:
        """Returns the fields of a batch's images, see ``features_e5v``.

        Args:
            pixels: The groups.
            shown: The group of each item, if it has one.
            share: Whether each distinct group stands there once. If not, every field has a row for each item.
        """
        if not share:
            return by_sample([pixels[own[0]].tensors if own else None for own in shown])
        index = torch.tensor([own[0] if own else -1 for own in shown])
        return {"groups": tuple(each.tensors for each in pixels), "image_index": index}


def join_groups(groups: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Puts the tensors of groups below each other; rows of another size are filled up, which the models ignore."""
    joined = {}
    for name in groups[0]:
        parts = [group[name] for group in groups]
        sizes = [max(part.shape[axis] for part in parts) for axis in range(1, parts[0].ndim)]
        joined[name] = torch.cat([_fill_up(part, sizes, _FILLED_WITH.get(name, 0)) for part in parts])
    return joined


def _fill_up(tensor: torch.Tensor, sizes: Sequence[int], value: int) -> torch.Tensor:
    missing = [size - there for size, there in zip(sizes, tensor.shape[1:], strict=True)]
    if not any(missing):
        return tensor
    return torch.nn.functional.pad(tensor, [width for each in reversed(missing) for width in (0, each)], value=value)


# ---- a row for each item ----

_DATA, _ROWS = "by_sample_{}_data", "by_sample_{}_rows"


def by_sample(groups: Sequence[Mapping[str, torch.Tensor] | None]) -> dict[str, torch.Tensor]:
    """Gives each item one row of its pixels, so that a batch for training can be taken apart and joined by rows.

    Gradient caching slices every tensor by rows, and cuts the second axis where it is as long as the texts. So that
    axis has one place, and the family's own rows stand behind it. The fields' names must not end as pixels do, which
    sentence-transformers counts in its own way.

    Args:
        groups: The pixels of each item, ``None`` for one without images.

    Returns:
        For each field of the family the data ``(n, 1, most, …)``, and how many of the rows count, ``(n,)``.
    """
    joined = join_groups([group for group in groups if group is not None])
    fields: dict[str, torch.Tensor] = {}
    for name, values in joined.items():
        counts = torch.tensor([0 if group is None else len(group[name]) for group in groups])
        data = values.new_zeros(len(groups), 1, int(counts.max()), *values.shape[1:])
        there = torch.arange(data.shape[2]) < counts[:, None]
        data[:, 0][there] = values
        fields[_DATA.format(name)], fields[_ROWS.format(name)] = data, counts
    return fields


def sample_fields(features: Mapping[str, Any], row: int) -> dict[str, torch.Tensor]:
    """Returns the fields of :func:`by_sample` of one item."""
    prefix, _ = _DATA.split("{}")
    return {name: values[row : row + 1] for name, values in features.items() if name.startswith(prefix)}


def from_samples(features: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Returns what :func:`by_sample` was given, of all items below each other."""
    prefix, end = _DATA.split("{}")
    found = {}
    for field in [name for name in features if name.startswith(prefix) and name.endswith(end)]:
        name = field.removeprefix(prefix).removesuffix(end)
        data, counts = features[field], features[_ROWS.format(name)]
        if counts.any():
            found[name] = data[:, 0][torch.arange(data.shape[2], device=data.device) < counts[:, None]]
    return found
