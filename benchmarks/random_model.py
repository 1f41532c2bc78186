"""A LLaVA-NeXT with random weights in the published format, for the benchmarks: small, but right in its proportions.

Vocabulary: 7.5 % of the language model's layers, as 128,256 rows are in Llama-3-8B. The tokenizer knows every prompt
and the benchmarks' words, so that a prompt has about as many tokens as with Llama-3's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import random

    import numpy as np
    from PIL import Image

GOLDENS = Path(__file__).parents[1] / "tests" / "data" / "goldens"
LANGUAGE = {
    "num_hidden_layers": 6,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
TOWER = {"num_hidden_layers": 3, "hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3}
VOCABULARY = 2500
#: Those of royokong/e5-v; the embedding has a row for the image token besides.
LANGUAGE_8B = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
TOWER_8B = {"num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
VOCABULARY_8B = 128257
#: The usual sizes of COCO's and FashionIQ's images.
SHAPES = [(640, 480), (640, 427), (500, 375), (500, 333), (333, 500), (320, 240), (480, 640), (300, 400)]
WORDS = "a the man woman dog sits runs on in near red small street table ball".split()  # noqa: SIM905


def draw_picture(noise: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Returns a picture of coarse noise."""
    from PIL import Image

    return Image.fromarray(noise.integers(0, 255, (12, 16, 3), dtype="uint8")).resize(size)


def draw_triplet(dice: random.Random) -> dict[str, str]:
    """Returns a triplet of NLI's lengths: premises of 5 to 30 words (mean 14), hypotheses of 3 to 16 (mean 8)."""

    def words(low: int, high: int, mean: int) -> str:
        return " ".join(dice.choices(WORDS, k=round(dice.triangular(low, high, 3 * mean - low - high))))

    return {"anchor": words(5, 30, 14), "positive": words(3, 16, 8), "negative": words(3, 16, 8)}


def write_folder(folder: Path, language: dict[str, Any], tower: dict[str, Any]) -> None:
    """Writes configuration, tokenizer and processor of the golden with the real tiles; no weights.

    Args:
        folder: New.
        language: Changes of the language model's configuration.
        tower: Changes of the vision tower's.
    """
    shutil.copytree(GOLDENS / "realgrid", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    file = folder / "config.json"
    settings = json.loads(file.read_text())
    settings["text_config"] |= language
    settings["vision_config"] |= tower
    file.write_text(json.dumps(settings))


def make_checkpoint(folder: Path, language: dict[str, Any] | None = None, tower: dict[str, Any] | None = None) -> Path:
    """Writes the checkpoint, from a seed. Its tiles are the real ones (336 pixels, up to 672x672).

    Args:
        folder: New.
        language: Changes of the language model's configuration; :data:`LANGUAGE` by default.
        tower: Changes of the vision tower's; :data:`TOWER` by default.
    """
    import torch
    from transformers import AutoTokenizer, LlavaNextConfig, LlavaNextForConditionalGeneration

    from e5v_st.model.prompts_e5v import PROMPTS, render

    torch.manual_seed(0)
    write_folder(folder, language or LANGUAGE, tower or TOWER)
    lines = [render(prompt, "llama3", " ".join(WORDS)) for prompt in PROMPTS.values()] * 9
    tokenizer = AutoTokenizer.from_pretrained(folder).train_new_from_iterator(lines, VOCABULARY - 1)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["image_token_index"] = tokenizer.convert_tokens_to_ids("<image>")
    model = LlavaNextForConditionalGeneration(LlavaNextConfig(**settings))
    model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    model.save_pretrained(folder)
    return folder
