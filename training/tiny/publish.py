"""Writes the model in the format of the published checkpoint, as transformers 4.41 wrote it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .model import MEAN, PINPOINTS, STD, TILE
from .tokenizer import ROWS, SPECIALS

if TYPE_CHECKING:
    from transformers import LlavaNextForConditionalGeneration, PreTrainedTokenizerFast

_OLD_NAMES = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.", ""),
    ("lm_head.", "language_model.lm_head."),
)


def old_name(name: str) -> str:
    """Returns a parameter's name as transformers 4.41 wrote it."""
    name = name.replace("vision_tower.vision_model.", "vision_tower.")
    for new, old in _OLD_NAMES:
        if name.startswith(new):
            return old + name.removeprefix(new)
    raise ValueError(f"{name!r} is no parameter of LLaVA-NeXT as transformers 5 names them")


def write_json(path: Path, content: Any) -> None:
    """Writes JSON under a temporary name, then renames it."""
    path.with_suffix(".tmp").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    os.replace(path.with_suffix(".tmp"), path)


def export(model: LlavaNextForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the model in half precision in the format of royokong/e5-v."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {old_name(n): p.detach().to(torch.float16).contiguous() for n, p in model.named_parameters()}
    embedding = tensors["language_model.model.embed_tokens.weight"]
    tensors.setdefault("language_model.lm_head.weight", embedding.clone())
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise ValueError(f"weights that are not finite in half precision: {bad[:3]}; nothing written to {folder}")
    save_file(tensors, folder / "model.tmp", {"format": "pt"})
    os.replace(folder / "model.tmp", folder / "model.safetensors")
    for name, content in published_configs(model).items():
        write_json(folder / name, content)
    shutil.rmtree(folder / "tokenizer.tmp", ignore_errors=True)
    tokenizer.save_pretrained(folder / "tokenizer.tmp")
    os.replace(folder / "tokenizer.tmp" / "tokenizer.json", folder / "tokenizer.json")
    shutil.rmtree(folder / "tokenizer.tmp")


def published_configs(model: LlavaNextForConditionalGeneration) -> dict[str, Any]:
    """Returns the small JSON files of the published format, those of transformers 4.41.2."""
    text, vision = model.config.text_config, model.config.vision_config
    keep_text = ("hidden_size", "intermediate_size", "max_position_embeddings", "model_type", "num_attention_heads")
    keep_text += (
        "num_hidden_layers",
        "num_key_value_heads",
        "rms_norm_eps",
        "bos_token_id",
        "eos_token_id",
        "vocab_size",
    )
    keep_vision = ("hidden_size", "image_size", "intermediate_size", "model_type", "num_attention_heads")
    keep_vision += ("num_hidden_layers", "patch_size", "projection_dim")
    version = {"transformers_version": "4.41.2"}
    named = dict(zip(("bos_token", "eos_token", "pad_token"), (SPECIALS[0], SPECIALS[-1], SPECIALS[-1]), strict=True))
    flags = {"lstrip": False, "rstrip": False, "single_word": False}
    added = {
        str(i): {"content": content, **flags, "normalized": i == ROWS, "special": i < ROWS}
        for i, content in [*enumerate(SPECIALS), (ROWS, "<image>")]
    }
    return {
        "config.json": {
            "architectures": ["LlavaNextForConditionalGeneration"],
            "ignore_index": -100,
            "image_grid_pinpoints": PINPOINTS,
            "image_token_index": ROWS,
            "model_type": "llava_next",
            "projector_hidden_act": "gelu",
            "text_config": {name: getattr(text, name) for name in keep_text} | {"rope_theta": 500000.0},
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "vision_config": {name: getattr(vision, name) for name in keep_vision},
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
            **version,
        },
        "generation_config.json": {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 4, **version},
        "preprocessor_config.json": {
            "crop_size": {"height": TILE, "width": TILE},
            **{f"do_{what}": True for what in ("center_crop", "convert_rgb", "normalize", "pad", "rescale", "resize")},
            "image_grid_pinpoints": PINPOINTS,
            "image_mean": MEAN,
            "image_processor_type": "LlavaNextImageProcessor",
            "image_std": STD,
            "processor_class": "LlavaNextProcessor",
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"shortest_edge": TILE},
        },
        "special_tokens_map.json": named,
        "tokenizer_config.json": {
            "added_tokens_decoder": added,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 8192,
            "padding_side": "left",
            "processor_class": "LlavaNextProcessor",
            "tokenizer_class": "PreTrainedTokenizerFast",
            **named,
        },
    }
