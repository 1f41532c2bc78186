"""``e5v backbones``: the model families that E5-V's recipe runs on, with a checkpoint of each to begin with."""

from __future__ import annotations

import argparse
from typing import NamedTuple

from .model.backbone_e5v import BACKBONES, Backbone


class Example(NamedTuple):
    """A checkpoint of a family.

    Attributes:
        checkpoint: Its hub id.
        size: About how large its weights are, in GB; ``None`` where no public page says so.
        licence: As its card says; ``None`` where that is not one licence.
    """

    checkpoint: str
    size: float | None
    licence: str | None


#: By the names of ``backbone_e5v.BACKBONES``. Sizes and licences are from the checkpoints' public pages.
EXAMPLES = {
    "llava_next-llama3": Example("royokong/e5-v", 16.7, "Llama 3"),
    "llava_next-mistral": Example("llava-hf/llava-v1.6-mistral-7b-hf", 15.1, "Apache-2.0"),
    "llava_next-qwen2": Example("llava-hf/llava-next-72b-hf", None, None),
    "llava_next-vicuna": Example("llava-hf/llava-v1.6-vicuna-7b-hf", 14.1, "Llama 2"),
    "llava": Example("llava-hf/llava-1.5-7b-hf", 14.1, "Llama 2"),
    "llava_onevision": Example("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", 1.8, "Apache-2.0"),
    "qwen2_vl": Example("Qwen/Qwen2-VL-2B-Instruct", 4.4, "Apache-2.0"),
    "qwen2_5_vl": Example("Qwen/Qwen2.5-VL-3B-Instruct", 7.5, "Qwen Research"),
    "qwen3_vl": Example("Qwen/Qwen3-VL-2B-Instruct", 4.3, "Apache-2.0"),
    "qwen3_vl-thinking": Example("Qwen/Qwen3-VL-2B-Thinking", 4.3, "Apache-2.0"),
    "qwen3_5": Example("Qwen/Qwen3.5-0.8B", 1.6, "Apache-2.0"),
    "smolvlm-instruct": Example("HuggingFaceTB/SmolVLM-500M-Instruct", 1.0, "Apache-2.0"),
    "smolvlm": Example("HuggingFaceTB/SmolVLM2-500M-Video-Instruct", None, "Apache-2.0"),
    "idefics3": Example("HuggingFaceM4/Idefics3-8B-Llama3", 16.9, "Apache-2.0"),
    "internvl": Example("OpenGVLab/InternVL3-1B-hf", 1.9, None),
    "gemma3": Example("google/gemma-3-4b-it", 8.6, "Gemma terms"),
    "gemma4": Example("google/gemma-4-E2B-it", None, "Apache-2.0"),
    "mistral3": Example("mistralai/Mistral-Small-3.1-24B-Instruct-2503", 48, "Apache-2.0"),
}

#: How prompts share what they begin with, in words.
SHARING = {"layers": "yes", "tree": "yes", "masks": "yes", "fork": "of images", "none": "no"}
HEAD = ("family", "a checkpoint", "GB", "licence", "shares prefixes", "image tokens")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``e5v backbones``: none."""


def run(args: argparse.Namespace) -> int:
    """Prints the table."""
    print(table())
    print("\nSizes and licences are as the checkpoints' pages say: read the card before you use one.")
    print("Image tokens: about how many an image takes at most; in most families, --max-image-tokens changes it.")
    return 0


def table() -> str:
    """Returns one line for each family.

    Example:
        >>> print(table().splitlines()[1].split()[:2])
        ['llava_next-llama3', 'royokong/e5-v']
    """
    rows = [HEAD, *(_row(backbone, EXAMPLES[backbone.name]) for backbone in BACKBONES)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _row(backbone: Backbone, example: Example) -> tuple[str, ...]:
    tokens = str(backbone.image_tokens or "the checkpoint's")
    size = "?" if example.size is None else f"{example.size:g}"
    licence = example.licence or "see its card"
    return backbone.name, example.checkpoint, size, licence, SHARING[backbone.sharing], tokens
