"""Converts a LLaVA-NeXT in LLaVA's own format (lmms-lab/llama3-llava-next-8b) to the Hugging Face layout.

This is the published conversion (``load_llama3_hf.py`` of kongds/E5-V), but tensor by tensor: memory holds one shard of
the result.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e5v_st.files import read_json, write_json

from .export import repair_processor_files
from .folders import fetch, new_folder, weight_files
from .keys import plain
from .options import add_out
from .tensors import SHARD_SIZE, add_rows, read_tensors, write_tensors

if TYPE_CHECKING:
    import torch
    from transformers import LlavaNextConfig

IMAGE = "<image>"

#: Pattern and replacement of a name's beginning; the first pattern that fits decides.
_NAMES = (
    (r"^model\.vision_tower\.(vision_tower\.)?", "vision_tower."),
    (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^model\.image_newline$", "image_newline"),
    (r"^(?=model\.|lm_head\.)", "language_model."),
)

#: Buffers that older versions saved and newer ones compute.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``e5v convert-llava``."""
    parser.add_argument("path_or_id", metavar="model", help="folder or hub id in LLaVA's own format")
    add_out(parser)


def run(args: argparse.Namespace) -> int:
    """Runs ``e5v convert-llava``."""
    print(convert_llava(**vars(args)))
    return 0


def convert_llava(path_or_id: str | Path, out: str | Path, shard_size: int = SHARD_SIZE) -> Path:
    """Writes a ``LlavaNextForConditionalGeneration`` from LLaVA's own shards.

    The embedding gets a row for the image token, which published conversions lack; the others stay bit for bit.

    Args:
        path_or_id: A directory or hub id in LLaVA's format, in safetensors.
        out: The new folder.
        shard_size: Maximum number of bytes in a file of weights.

    Returns:
        ``out``.

    Raises:
        ValueError: If a weight is missing, left over or of the wrong shape, or ``out`` exists.
    """
    from transformers import AutoTokenizer

    source = fetch(path_or_id)
    files = weight_files(source)
    settings = read_json(source / "config.json")
    with new_folder(out) as folder:
        tokenizer = AutoTokenizer.from_pretrained(source)
        _prepare_tokenizer(tokenizer)
        image_token = tokenizer.convert_tokens_to_ids(IMAGE)
        tokenizer.save_pretrained(folder)
        shapes: dict[str, tuple[int, ...]] = {}
        write_tensors(add_rows(_noted(_renamed(read_tensors(files)), shapes), image_token + 1), folder, shard_size)
        config = make_config(settings, shapes, image_token)
        check_shapes(config, shapes)
        config.save_pretrained(folder)
        _write_image_processor(config, folder)
        repair_processor_files(folder)
    return Path(out)


def new_name(key: str) -> str:
    """Maps a weight's name of LLaVA's code onto the published Hugging Face layout."""
    for pattern, replacement in _NAMES:
        if re.search(pattern, key):
            return re.sub(pattern, replacement, key)
    return key


def _renamed(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    return ((new_name(key), tensor) for key, tensor in tensors if not _COMPUTED.search(key))


def _noted(
    tensors: Iterable[tuple[str, torch.Tensor]], shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, torch.Tensor]]:
    for key, tensor in tensors:
        shapes[plain(key)] = tuple(tensor.shape)
        yield key, tensor


def _prepare_tokenizer(tokenizer: Any) -> None:
    tokenizer.add_tokens([IMAGE])
    tokenizer.padding_side = "left"
    if tokenizer.convert_tokens_to_ids("<|eot_id|>") not in (None, tokenizer.unk_token_id):
        tokenizer.eos_token = "<|eot_id|>"  # noqa: S105
    tokenizer.pad_token = tokenizer.eos_token


def make_config(settings: dict[str, Any], shapes: dict[str, tuple[int, ...]], image_token: int) -> LlavaNextConfig:
    """Makes the configuration from LLaVA's and from the shapes of weights: LLaVA's does not describe the vision tower.

    Args:
        settings: LLaVA's ``config.json``.
        shapes: Plain name of a weight -> its shape.
        image_token: Id of ``<image>``.

    Raises:
        ValueError: If the vision tower is not there, or the language model is neither a Llama nor a Mistral.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, MistralConfig

    texts = {"llava_llama": LlamaConfig, "llava": LlamaConfig, "llava_mistral": MistralConfig}
    if settings.get("model_type") not in texts:
        raise ValueError(
            f"got a {settings.get('model_type')!r} checkpoint, want LLaVA's own format: {', '.join(texts)}"
        )
    tower = "vision_tower.embeddings."
    if f"{tower}class_embedding" not in shapes:
        raise ValueError(
            "the weights hold no vision tower: this conversion wants a checkpoint with its CLIP tower inside"
        )
    text = texts[settings["model_type"]](
        **{name: value for name, value in settings.items() if not name.startswith(("mm_", "model_type", "image_"))}
    )
    text.vocab_size = max(text.vocab_size, image_token + 1)
    (width,), patch = shapes[f"{tower}class_embedding"], shapes[f"{tower}patch_embedding.weight"][-1]
    layers = {key.split(".")[3] for key in shapes if key.startswith("vision_tower.encoder.layers.")}
    side = round((shapes[f"{tower}position_embedding.weight"][0] - 1) ** 0.5) * patch
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=shapes["vision_tower.encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=len(layers),
        num_attention_heads=width // 64,  # as in every CLIP
        image_size=side,
        patch_size=patch,
        projection_dim=768,
    )
    return LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        image_grid_pinpoints=settings.get("image_grid_pinpoints"),
        vision_feature_layer=settings.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        architectures=["LlavaNextForConditionalGeneration"],
    )


def check_shapes(config: LlavaNextConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError if a weight of the model is missing, left over or of the wrong shape."""
    import torch
    from transformers import LlavaNextForConditionalGeneration

    with torch.device("meta"):
        model = LlavaNextForConditionalGeneration(config)
    wanted = {plain(key): tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    missing, left = sorted(wanted.keys() - shapes.keys()), sorted(shapes.keys() - wanted.keys())
    if missing or left:
        raise ValueError(
            f"{len(missing)} weights are missing {missing[:3]} and {len(left)} are left over {left[:3]}: "
            "is every shard there, and is it a LLaVA-NeXT?"
        )
    for key, shape in wanted.items():
        rows = (
            {shape[0], shape[0] - 1} if key in ("language_model.embed_tokens.weight", "lm_head.weight") else {shape[0]}
        )
        if shapes[key][1:] != shape[1:] or shapes[key][0] not in rows:
            raise ValueError(f"the weight {key} has the shape {shapes[key]}, want {shape}")


def _write_image_processor(config: LlavaNextConfig, folder: Path) -> None:
    from transformers import LlavaNextImageProcessorPil

    side = config.vision_config.image_size
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=config.image_grid_pinpoints,
    )
    content = {**processor.to_dict(), "image_processor_type": "LlavaNextImageProcessor"}
    write_json(folder / "preprocessor_config.json", {**content, "processor_class": "LlavaNextProcessor"})
