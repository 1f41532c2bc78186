"""Repairs what the published checkpoints lack on current libraries, and recognises a checkpoint's backbone.

Published E5-V checkpoints (royokong/e5-v and its like) were saved by transformers 4.41: the image token's id lies one
past the embedding, and the processor does not know its patch size. Both are errors in every transformers since 4.45.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlavaNextConfig, LlavaNextModel, PreTrainedConfig, PreTrainedTokenizerBase


def check_config(config: PreTrainedConfig, name: str) -> LlavaNextConfig:
    """Returns ``config`` if it is a LLaVA-NeXT's; raises ValueError otherwise."""
    if config.model_type != "llava_next":
        raise ValueError(
            f"{name} is a {config.model_type!r} checkpoint, E5-V wants 'llava_next' "
            "(royokong/e5-v, llava-hf/llava-v1.6-mistral-7b-hf and models made from them)"
        )
    return config


def check_weights(model: LlavaNextModel, found: dict[str, Any]) -> None:
    """Refuses a model that would embed with weights that were never there.

    Args:
        model: The loaded model.
        found: What ``from_pretrained(..., output_loading_info=True)`` said of it.

    Raises:
        ValueError: If weights are missing, of the wrong shape or not a number.
    """
    for problem in ("missing_keys", "mismatched_keys"):
        if found.get(problem):
            names = sorted(map(str, found[problem]))
            raise ValueError(f"the checkpoint has {len(names)} {problem.replace('_', ' ')}: {', '.join(names[:5])}")
    for name, weight in model.named_parameters():
        values = find_scales(weight)
        if not values.is_floating_point() or values.device.type == "meta":
            continue
        # The smallest of a tensor is NaN if any is: no second tensor of that size
        if not all(bound.isfinite() for bound in values.aminmax()):
            raise ValueError(f"the weights of {name} are not all numbers: the checkpoint is broken")


def find_scales(weight: Any) -> Any:
    """The scales of a quantised weight, which are NaN where a weight was; any other weight as it is."""
    state = getattr(weight, "quant_state", None)  # bitsandbytes in 4 bits, whose scales may be quantised in turn
    found = (getattr(weight, "SCB", None), getattr(weight, "scale", None), getattr(state, "offset", None))
    return next((values for values in (*found, getattr(state, "absmax", None)) if values is not None), weight)


def check_offloading(model: LlavaNextModel) -> None:
    """Raises ValueError if a device map has offloaded what a forward pass reads without asking accelerate for it."""
    newline = getattr(model, "image_newline", None)  # a model for texts alone has none
    if newline is not None and newline.device.type == "meta" and hasattr(model, "hf_device_map"):
        raise ValueError(
            'the device_map offloads image_newline, which must stay in memory: want device_map="auto", or a map with '
            "image_newline on a device"
        )


def repair_embedding(model: LlavaNextModel) -> None:
    """Makes the image token's id an index of the embedding where it lies past the last row.

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


def find_wrapper(config: LlavaNextConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the chat format (a key of ``prompts_e5v.WRAPPERS``) of a checkpoint's backbone.

    Raises:
        ValueError: If the backbone is neither a Llama 3 nor a Mistral.
    """
    if tokenizer.convert_tokens_to_ids("<|start_header_id|>") not in (None, tokenizer.unk_token_id):
        return "llama3"
    if config.text_config.model_type == "mistral":
        return "mistral"
    raise ValueError(
        f"the language model is a {config.text_config.model_type!r} whose tokenizer lacks <|start_header_id|>: "
        "E5-V has prompts for Llama 3 and Mistral"
    )
