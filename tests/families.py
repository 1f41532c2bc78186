"""A tiny random model of every family, with the real classes of its configuration, model and processor.

``save(name, folder)`` writes what a published checkpoint of the family holds; with ``sizes=MID`` a larger model that
reads images at their real sizes, for the benchmarks. The weights are drawn so that every part of a prompt matters.
``reference`` is the recipe in plain transformers: each item alone, without any of our code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

#: What the tiny tokenizers are trained on: some words join with what stands behind them.
CORPUS = [
    "a dog in the grass",
    "A cat standing in the snow.",
    "Summary above sentence in one word: ",
    "Summary above image in one word: ",
    'Modify this image with "is red", desribe modified image in one word:',
    "user assistant system model You are a helpful assistant.",
    "two people ride bicycles along the river",
    "USER: ASSISTANT: User Assistant [INST] [/INST]",
]


@dataclass(frozen=True)
class Sizes:
    """How large a model is; by default tiny.

    Attributes:
        width: Of the language model.
        inner: Of its feed-forward networks.
        layers: Of it.
        heads: Of its attention.
        key_heads: Of its keys and values.
        head: The width of each.
        vision: Width of the vision tower.
        vision_inner: Of its feed-forward networks.
        vision_layers: Of it.
        vision_heads: Of its attention.
        real: Whether images, tiles and windows are about as large as in published checkpoints.
        vocabulary: Maximum number of tokens.
        corpus: What the tokenizer knows besides :data:`CORPUS`.
    """

    width: int = 64
    inner: int = 128
    layers: int = 4
    heads: int = 4
    key_heads: int = 2
    head: int = 16
    vision: int = 32
    vision_inner: int = 64
    vision_layers: int = 3
    vision_heads: int = 4
    real: bool = False
    vocabulary: int = 600
    corpus: tuple[str, ...] = ()

    def pick(self, tiny: Any, real: Any) -> Any:
        """Returns what is right for these sizes."""
        return real if self.real else tiny


TINY = Sizes()
#: About 125 million parameters, a tenth of them in the vision tower, which has up to four patches for each token.
MID = Sizes(768, 2048, 18, 12, 4, 64, 384, 1536, 6, 6, real=True, vocabulary=2500)


@dataclass
class Family:
    """A family's tiny model, before it is built.

    Attributes:
        config: Of the whole model.
        tokenizer: With the family's control tokens.
        image_processor: With small images.
        processor: The name of its class, and its settings.
        video: The name of the class for videos, which published checkpoints name.
        wrapper: What the chat format puts around a prompt, as the family's documentation has it.
        image: What stands for an image.
        adds_bos: Whether the tokenizer puts BOS in front.
    """

    config: dict[str, Any]
    tokenizer: PreTrainedTokenizerFast
    image_processor: Any
    processor: tuple[str, dict[str, Any]]
    wrapper: str
    image: str = "<image>"
    adds_bos: bool = False
    video: str | None = None
    template: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def make_tokenizer(
    sizes: Sizes, special: Sequence[str], bos: str | None, eos: str, pad: str, **extra: str
) -> PreTrainedTokenizerFast:
    """Trains a byte-level tokenizer with control tokens; it adds ``bos`` if there is one."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=sizes.vocabulary, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*CORPUS, *sizes.corpus] * 4, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        extra_special_tokens=extra,
        model_max_length=8192,
    )


def _text(kind: str, sizes: Sizes, tokenizer: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    heads = {"num_attention_heads": sizes.heads, "num_key_value_heads": sizes.key_heads}
    widths = {"hidden_size": sizes.width, "intermediate_size": sizes.inner, "num_hidden_layers": sizes.layers}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    known = {"vocab_size": len(tokenizer), "max_position_embeddings": 8192}
    return {"model_type": kind, **widths, **heads, **known, **ids, **more}


def _vision(kind: str, sizes: Sizes, size: int, patch: int = 14, **more: Any) -> dict[str, Any]:
    heads = {"num_hidden_layers": sizes.vision_layers, "num_attention_heads": sizes.vision_heads}
    widths = {"hidden_size": sizes.vision, "intermediate_size": sizes.vision_inner, **heads}
    return {"model_type": kind, **widths, "image_size": size, "patch_size": patch, **more}


def _ids(tokenizer: PreTrainedTokenizerFast, **names: str) -> dict[str, int]:
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


_QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
_QWEN += ("<|video_pad|>", "<think>", "</think>")
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def _qwen(sizes: Sizes, kind: str, text: dict[str, Any], vision: dict[str, Any], processor: str, **more: Any) -> Family:
    tokenizer = make_tokenizer(sizes, _QWEN, None, "<|im_end|>", "<|endoftext|>")
    ids = _ids(
        tokenizer,
        image_token_id="<|image_pad|>",
        video_token_id="<|video_pad|>",
        vision_start_token_id="<|vision_start|>",
        vision_end_token_id="<|vision_end|>",
    )
    patch = vision["patch_size"]
    unit = (2 * patch) ** 2
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=patch,
        temporal_patch_size=2,
        merge_size=2,
        size={"shortest_edge": 4 * unit, "longest_edge": sizes.pick(64, 16384) * unit},
    )
    config = {
        "model_type": kind,
        "text_config": _text(sizes=sizes, tokenizer=tokenizer, **text),
        "vision_config": vision,
    }
    return Family({**config, **ids}, tokenizer, images, (processor, {}), image=_QWEN_IMAGE, **more)


def _sections(sizes: Sizes, **more: Any) -> dict[str, Any]:
    sections = [share * sizes.head // 16 for share in (2, 3, 3)]
    return {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e6, **more}


def qwen2_vl(sizes: Sizes) -> Family:
    vision = {"depth": sizes.vision_layers, "embed_dim": sizes.vision, "hidden_size": sizes.width, "patch_size": 14}
    vision |= {"num_heads": sizes.vision_heads, "mlp_ratio": sizes.vision_inner // sizes.vision}
    text = {"kind": "qwen2_vl_text", "rope_scaling": _sections(sizes, type="mrope"), "rope_theta": 1e6}
    how = {"wrapper": _SYSTEM + _CHATML, "video": "Qwen2VLVideoProcessor"}
    return _qwen(sizes, "qwen2_vl", text, vision, "Qwen2VLProcessor", **how)


def _qwen_vision(sizes: Sizes, patch: int, **more: Any) -> dict[str, Any]:
    widths = {"hidden_size": sizes.vision, "intermediate_size": sizes.vision_inner, "out_hidden_size": sizes.width}
    return {"depth": sizes.vision_layers, "num_heads": sizes.vision_heads, **widths, "patch_size": patch, **more}


def qwen2_5_vl(sizes: Sizes) -> Family:
    vision = _qwen_vision(sizes, 14, window_size=sizes.pick(56, 112), fullatt_block_indexes=sizes.pick([1], [2, 5]))
    text = {"kind": "qwen2_5_vl_text", "rope_scaling": _sections(sizes, type="mrope"), "rope_theta": 1e6}
    how = {"wrapper": _SYSTEM + _CHATML, "video": "Qwen2VLVideoProcessor"}
    return _qwen(sizes, "qwen2_5_vl", text, vision, "Qwen2_5_VLProcessor", **how)


def qwen3_vl(sizes: Sizes) -> Family:
    vision = _qwen_vision(
        sizes, 16, num_position_embeddings=2304, deepstack_visual_indexes=sizes.pick([0, 1, 2], [1, 3, 5])
    )
    rope = _sections(sizes, type="mrope", mrope_interleaved=True)
    text = {"kind": "qwen3_vl_text", "head_dim": sizes.head, "rope_scaling": rope, "rope_theta": 5e6}
    how = {"wrapper": _CHATML, "video": "Qwen3VLVideoProcessor"}
    return _qwen(sizes, "qwen3_vl", text, vision, "Qwen3VLProcessor", **how)


def qwen3_vl_thinking(sizes: Sizes) -> Family:
    family = qwen3_vl(sizes)
    family.template = (
        "{{ '<|im_start|>user\\n' + messages[0]['content'] + '<|im_end|>\\n<|im_start|>assistant\\n<think>\\n' }}"
    )
    family.wrapper = _CHATML + "<think>\n\n</think>\n\n"
    return family


def qwen3_5(sizes: Sizes) -> Family:
    linear = {"linear_key_head_dim": sizes.head, "linear_value_head_dim": sizes.head}
    linear |= {"linear_num_key_heads": sizes.heads // 2, "linear_num_value_heads": sizes.heads}
    sections = [share * sizes.head // 16 for share in (2, 1, 1)]
    rope = {"rope_type": "default", "mrope_section": sections, "mrope_interleaved": True, "rope_theta": 1e7}
    text = {"kind": "qwen3_5_text", "head_dim": 2 * sizes.head, **linear}
    text |= {"rope_parameters": {**rope, "partial_rotary_factor": 0.25}}
    how = {"wrapper": _CHATML + "<think>\n\n</think>\n\n", "video": "Qwen3VLVideoProcessor"}
    vision = _qwen_vision(sizes, 16, num_position_embeddings=2304)
    return _qwen(sizes, "qwen3_5", text, vision, "Qwen3VLProcessor", **how)


def _idefics(sizes: Sizes, kind: str, bos: str, processor: str, images: type, adds_bos: bool, **more: Any) -> Family:
    rows = [f"<row_{row + 1}_col_{column + 1}>" for row in range(4) for column in range(4)]
    special = ("<|endoftext|>", bos, "<|im_end|>", "<image>", "<fake_token_around_image>", "<global-img>")
    names = {"fake_image_token": "<fake_token_around_image>", "image_token": "<image>"}
    names |= {"end_of_utterance_token": "<end_of_utterance>", "global_image_token": "<global-img>"}
    tokenizer = make_tokenizer(
        sizes,
        (*special, "<end_of_utterance>", *rows),
        bos if adds_bos else None,
        "<end_of_utterance>",
        "<|im_end|>",
        **names,
    )
    tile, patch, scale = sizes.pick((64, 16, 2), (364, 14, 2) if adds_bos else (512, 16, 4))
    config = {
        "model_type": kind,
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "scale_factor": scale,
        "text_config": _text("llama", sizes, tokenizer),
        "vision_config": _vision(kind, sizes, tile, patch),
    }
    config["vision_config"].pop("model_type")
    size = {"size": {"longest_edge": sizes.pick(2, 4) * tile}, "max_image_size": {"longest_edge": tile}}
    settings = {"image_seq_len": (tile // patch) ** 2 // scale**2}
    wrapper = bos + "User:{}<end_of_utterance>\nAssistant:"
    made = images(**size, do_image_splitting=True)
    return Family(config, tokenizer, made, (processor, settings), wrapper, **more)


def smolvlm_instruct(sizes: Sizes) -> Family:
    return _idefics(
        sizes, "idefics3", "<|im_start|>", "Idefics3Processor", transformers.Idefics3ImageProcessorPil, False
    )


def idefics3(sizes: Sizes) -> Family:
    return _idefics(
        sizes, "idefics3", "<|begin_of_text|>", "Idefics3Processor", transformers.Idefics3ImageProcessorPil, True
    )


def smolvlm(sizes: Sizes) -> Family:
    images = transformers.SmolVLMImageProcessorPil
    return _idefics(sizes, "smolvlm", "<|im_start|>", "SmolVLMProcessor", images, False, video="SmolVLMVideoProcessor")


def gemma3(sizes: Sizes) -> Family:
    special = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>")
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = make_tokenizer(sizes, (*special, "<image_soft_token>"), "<bos>", "<eos>", "<pad>", **names)
    ids = _ids(
        tokenizer,
        boi_token_index="<start_of_image>",
        eoi_token_index="<end_of_image>",
        image_token_index="<image_soft_token>",
    )
    side, tokens = sizes.pick((56, 4), (896, 256))
    layers = ["sliding_attention", "full_attention"] * (sizes.layers // 2)
    text = _text(
        "gemma3_text",
        sizes,
        tokenizer,
        head_dim=sizes.head,
        sliding_window=sizes.pick(16, 512),
        query_pre_attn_scalar=sizes.head,
        pad_token_id=0,
        layer_types=layers,
    )
    vision = _vision("siglip_vision_model", sizes, side)
    config = {
        "model_type": "gemma3",
        "mm_tokens_per_image": tokens,
        "text_config": text,
        "vision_config": vision,
        **ids,
    }
    images = transformers.Gemma3ImageProcessorPil(size={"height": side, "width": side})
    wrapper = "<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"
    return Family(
        config, tokenizer, images, ("Gemma3Processor", {"image_seq_length": tokens}), wrapper, image="<start_of_image>"
    )


def gemma4(sizes: Sizes) -> Family:
    special = ("<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|image|>", "<|image>", "<image|>", "<|audio|>")
    special += ("<|audio>", "<audio|>", "<|video|>", "<|channel>", "<channel|>", "<|think|>")
    names = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>", "audio_token": "<|audio|>"}
    names |= {"boa_token": "<|audio>", "eoa_token": "<audio|>", "video_token": "<|video|>"}
    tokenizer = make_tokenizer(sizes, special, "<bos>", "<eos>", "<pad>", **names)
    ids = _ids(
        tokenizer,
        boi_token_id="<|image>",
        eoi_token_id="<image|>",
        image_token_id="<|image|>",
        video_token_id="<|video|>",
        audio_token_id="<|audio|>",
        boa_token_id="<|audio>",
        eoa_token_index="<audio|>",
    )
    text = _text(
        "gemma4_text",
        sizes,
        tokenizer,
        head_dim=sizes.head,
        global_head_dim=2 * sizes.head,
        sliding_window=sizes.pick(16, 512),
        pad_token_id=0,
        vocab_size_per_layer_input=len(tokenizer),
        hidden_size_per_layer_input=sizes.width // 4,
        layer_types=["sliding_attention", "full_attention"] * (sizes.layers // 2),
        use_bidirectional_attention="vision",
        num_kv_shared_layers=sizes.layers // 2,
    )
    tokens = sizes.pick(70, 280)
    vision = _vision(
        "gemma4_vision",
        sizes,
        0,
        16,
        num_key_value_heads=sizes.vision_heads,
        head_dim=sizes.vision // sizes.vision_heads,
        pooling_kernel_size=3,
    )
    vision |= {"position_embedding_size": sizes.pick(256, 10240)}
    config = {"model_type": "gemma4", "audio_config": None, "text_config": text, "vision_config": vision, **ids}
    images = transformers.Gemma4ImageProcessorPil(patch_size=16, pooling_kernel_size=3, max_soft_tokens=tokens)
    wrapper = "<bos><|turn>user\n{}<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
    settings = ("Gemma4Processor", {"image_seq_length": tokens})
    return Family(config, tokenizer, images, settings, wrapper, image="\n\n<|image|>\n\n")


def internvl(sizes: Sizes) -> Family:
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = make_tokenizer(
        sizes,
        (*_QWEN, "<img>", "</img>", "<IMG_CONTEXT>"),
        None,
        "<|im_end|>",
        "<|endoftext|>",
        **names,
        video_token="<|video_pad|>",
    )
    side, tokens = sizes.pick((56, 4), (448, 256))
    config = {
        "model_type": "internvl",
        "image_token_id": tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        "image_seq_length": tokens,
        "text_config": _text("qwen2", sizes, tokenizer),
        "vision_config": {
            **_vision("internvl_vision", sizes, side),
            "image_size": [side, side],
            "patch_size": [14, 14],
        },
    }
    images = transformers.GotOcr2ImageProcessorPil(
        size={"height": side, "width": side}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    how = {"image": "<IMG_CONTEXT>", "video": "InternVLVideoProcessor"}
    return Family(config, tokenizer, images, ("InternVLProcessor", {"image_seq_length": tokens}), _CHATML, **how)


def llava_onevision(sizes: Sizes) -> Family:
    tokenizer = make_tokenizer(sizes, (*_QWEN, "<image>", "<video>"), None, "<|im_end|>", "<|endoftext|>")
    side = sizes.pick(28, 384)
    grids = [[rows * side, columns * side] for rows in (1, 2, 3) for columns in (1, 2, 3)]
    config = {
        "model_type": "llava_onevision",
        **_ids(tokenizer, image_token_index="<image>", video_token_index="<video>"),
        "image_grid_pinpoints": grids,
        "text_config": _text("qwen2", sizes, tokenizer),
        "vision_config": _vision("siglip_vision_model", sizes, side, vision_use_head=False),
    }
    images = transformers.LlavaOnevisionImageProcessorPil(
        size={"height": side, "width": side}, image_grid_pinpoints=grids
    )
    settings = {"num_image_tokens": (side // 14) ** 2, "vision_feature_select_strategy": "full"}
    wrapper = "<|im_start|>user {}<|im_end|><|im_start|>assistant\n"
    how = {"video": "LlavaOnevisionVideoProcessor"}
    return Family(config, tokenizer, images, ("LlavaOnevisionProcessor", settings), wrapper, **how)


def llava(sizes: Sizes) -> Family:
    tokenizer = make_tokenizer(sizes, ("<unk>", "<s>", "</s>", "<pad>", "<image>"), "<s>", "</s>", "<pad>")
    side = sizes.pick(28, 336)
    config = {
        "model_type": "llava",
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "image_seq_length": (side // 14) ** 2,
        "text_config": _text("llama", sizes, tokenizer),
        "vision_config": _vision("clip_vision_model", sizes, side),
    }
    images = transformers.LlavaImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    settings = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return Family(config, tokenizer, images, ("LlavaProcessor", settings), "USER: {} ASSISTANT:", adds_bos=True)


def _llava_next(
    sizes: Sizes, special: Sequence[str], bos: str | None, eos: str, text: str, wrapper: str, **more: Any
) -> Family:
    tokenizer = make_tokenizer(sizes, (*special, "<pad>", "<image>"), bos, eos, "<pad>")
    side = sizes.pick(28, 336)
    grids = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side], [3 * side, side], [side, 3 * side]]
    config = {
        "model_type": "llava_next",
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "image_seq_length": (side // 14) ** 2,
        "image_grid_pinpoints": grids,
        "text_config": _text(text, sizes, tokenizer, **more),
        "vision_config": _vision("clip_vision_model", sizes, side),
    }
    images = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_grid_pinpoints=grids
    )
    settings = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return Family(config, tokenizer, images, ("LlavaNextProcessor", settings), wrapper, adds_bos=bos is not None)


def llava_next_mistral(sizes: Sizes) -> Family:
    return _llava_next(
        sizes, ("<unk>", "<s>", "</s>"), "<s>", "</s>", "mistral", "[INST] {} [/INST]", sliding_window=None
    )


def llava_next_vicuna(sizes: Sizes) -> Family:
    return _llava_next(sizes, ("<unk>", "<s>", "</s>"), "<s>", "</s>", "llama", "USER: {} ASSISTANT:")


def llava_next_qwen2(sizes: Sizes) -> Family:
    return _llava_next(sizes, _QWEN, None, "<|im_end|>", "qwen2", _SYSTEM + _CHATML)


def mistral3(sizes: Sizes) -> Family:
    special = ("<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
    tokenizer = make_tokenizer(sizes, (*special, "[IMG]", "[IMG_BREAK]", "[IMG_END]"), "<s>", "</s>", "<pad>")
    side = sizes.pick(112, 1540)
    config = {
        "model_type": "mistral3",
        "image_token_index": tokenizer.convert_tokens_to_ids("[IMG]"),
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
        "text_config": _text("mistral", sizes, tokenizer, head_dim=sizes.head, sliding_window=None),
        "vision_config": _vision("pixtral", sizes, side, head_dim=sizes.vision // sizes.vision_heads),
    }
    images = transformers.PixtralImageProcessorPil(size={"longest_edge": side}, patch_size={"height": 28, "width": 28})
    settings = {"patch_size": 14, "spatial_merge_size": 2}
    return Family(config, tokenizer, images, ("PixtralProcessor", settings), "<s>[INST]{}[/INST]", image="[IMG]")


#: Row of ``backbone_e5v.BACKBONES`` -> its tiny model. The published checkpoint of the goldens is the Llama 3.
FAMILIES = {
    "llava_next-mistral": llava_next_mistral,
    "llava_next-qwen2": llava_next_qwen2,
    "llava_next-vicuna": llava_next_vicuna,
    "llava": llava,
    "llava_onevision": llava_onevision,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl-thinking": qwen3_vl_thinking,
    "qwen3_vl": qwen3_vl,
    "qwen3_5": qwen3_5,
    "smolvlm-instruct": smolvlm_instruct,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "internvl": internvl,
    "gemma3": gemma3,
    "gemma4": gemma4,
    "mistral3": mistral3,
}


def family(name: str, sizes: Sizes = TINY) -> Family:
    """Returns a family before it is built."""
    return _family(name, sizes)


@cache
def _family(name: str, sizes: Sizes) -> Family:
    return FAMILIES[name](sizes)


def save(name: str, folder: Path, sizes: Sizes = TINY, text: dict[str, Any] | None = None, **config: Any) -> Path:
    """Writes the model of a family as a published checkpoint stands on the hub; returns the folder.

    Args:
        name: A key of :data:`FAMILIES`.
        folder: Where.
        sizes: Of the model.
        text: What is different in the language model's configuration.
        **config: What is different in the whole model's.
    """
    made = family(name, sizes)
    settings = {**made.config, **config, "text_config": {**made.config["text_config"], **(text or {})}}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    _draw_weights(model)
    model.save_pretrained(folder)
    if made.template:
        made.tokenizer.chat_template = made.template
    made.tokenizer.save_pretrained(folder)
    made.image_processor.save_pretrained(folder)
    kind, more = made.processor
    images = json.loads((folder / "preprocessor_config.json").read_text())
    images["image_processor_type"] = images["image_processor_type"].removesuffix("Pil")
    _write(folder / "preprocessor_config.json", {**images, "processor_class": kind})
    _write(folder / "processor_config.json", {"processor_class": kind, **more})
    if made.video:
        _write(folder / "video_preprocessor_config.json", {"video_processor_type": made.video})
    return folder


def save_unknown(folder: Path) -> Path:
    """Writes a VipLLaVA, which no row is for: the files of ``llava`` with another model; returns the folder."""
    save("llava", folder)
    settings = {name: family("llava").config[name] for name in ("text_config", "vision_config", "image_token_index")}
    config = AutoConfig.for_model(
        "vipllava",
        image_seq_length=family("llava").config["image_seq_length"],
        vision_feature_layers=[-1, -2],
        **settings,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    _draw_weights(model)
    model.save_pretrained(folder)
    return folder


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content), encoding="utf8")


@torch.no_grad()
def _draw_weights(model: torch.nn.Module) -> None:
    """Gives every matrix unit gain, so that a token or an image changes the last state as much as it can."""
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.normal_(0, 1 / math.sqrt(1 if "embed" in name else weight.shape[-1]))
        elif "norm" in name and name.endswith("weight"):
            weight.add_(0.1 * torch.randn_like(weight))
    model.tie_weights()


# ---- the recipe in plain transformers ----


def open_plain(folder: Path) -> Any:
    """Returns the stock model with its head."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def render(made: Family, template: str, text: str | None, images: int) -> str:
    """Returns a whole prompt, in which a string stands for each image.

    Args:
        made: The family.
        template: With ``<image>`` and ``<sent>``.
        text: Of the item.
        images: How many the item has.
    """
    if template.count("<image>") == 1:
        template = template.replace("<image>", "<image>" * images)
    return made.wrapper.replace("{}", template).replace("<image>", made.image).replace("<sent>", text or "")


@torch.inference_mode()
def reference(
    name: str, model: Any, processor: Any, items: Sequence[tuple[str, str | None, Sequence[Image.Image]]]
) -> torch.Tensor:
    """Returns ``hidden_states[-1]`` at the last token of each item alone, normalised, ``(n, d)``.

    Args:
        name: Of the family.
        model: See :func:`open_plain`.
        processor: The family's stock processor.
        items: Template with ``<image>`` and ``<sent>``, text and images of each.
    """
    made = family(name)
    found = []
    for template, text, images in items:
        string = render(made, template, text, len(images))
        inputs = processor(
            text=[string],
            images=[list(images)] if images else None,
            return_tensors="pt",
            add_special_tokens=made.adds_bos,
        )
        found.append(model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1])
    return torch.nn.functional.normalize(torch.stack(found).float(), dim=-1)
