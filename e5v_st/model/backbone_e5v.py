"""The model families that E5-V's recipe runs on: what is different from one to the next, as data.

The recipe is the same everywhere: ask for one word, take the last hidden state. A family differs in what its chat
format puts around a prompt, in the string that stands for an image before the family's own processor expands it, and in
how far prompts can share what they begin with. All else, such as pixels, positions and masks, comes from transformers.

A checkpoint's family is the first row of :data:`BACKBONES` of its ``model_type`` whose ``marks`` are all tokens of its
tokenizer. To add a family, add a row, and a tiny model in ``tests/families.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Backbone:
    """A model family, or the part of one that has its own chat format.

    Attributes:
        name: Of this row, as ``e5v backbones`` prints it.
        model_type: Of the checkpoint's configuration.
        wrapper: The chat format, a key of ``prompts_e5v.WRAPPERS``.
        marks: Tokens that tell this row from others of the same model type.
        text_type: The language model's type, where that tells rows apart.
        tail: What the checkpoint's own chat template must hold, where nothing else tells rows apart.
        adds_bos: Whether the tokenizer puts its BOS token in front; if not, the chat format has it written out.
        image: What stands for an image in a prompt.
        processor: Module and name of the processor's class; ``None`` for LLaVA-NeXT, whose images are read here.
        sharing: How prompts share what they begin with: ``"layers"`` (layers run one by one, see ``sharing_e5v``),
            ``"tree"`` (the stock language model over a tree), ``"masks"`` (the same, with masks where images are read
            in both directions or a window ends), ``"fork"`` (layers with a state that runs on: a copy of what they
            know of a prefix for each prompt), ``"none"``.
        packing: How many numbers a position has where texts are packed into one row: 1, 4 (text, time, height, width),
            or 0 if they cannot be.
        extras: What the family's processor in transformers cannot be loaded without, and what for; ``None`` where
            Pillow is enough, so that a model can be exported for use without this code.
        budget: How a maximum number of image tokens becomes settings of the image processor, a key of
            ``processor_e5v.BUDGETS``; ``None`` if there is no such choice.
        image_tokens: That maximum, unless a user gives one; ``None`` leaves the checkpoint's own.
    """

    name: str
    model_type: str
    wrapper: str
    marks: tuple[str, ...] = ()
    text_type: str | None = None
    tail: str | None = None
    adds_bos: bool = False
    image: str = "<image>"
    processor: str | None = None
    sharing: str = "tree"
    packing: int = 1
    extras: str | None = None
    budget: str | None = None
    image_tokens: int | None = None

    @property
    def is_llava_next(self) -> bool:
        """Whether this is E5-V's own family, whose images are read and whose layers are run here."""
        return self.processor is None

    @property
    def has_grids(self) -> bool:
        """Whether the model is told of the grids that its images may be cut into, as its image processor is."""
        return self.budget in ("grids", "pinpoints")

    def summary(self) -> dict[str, str]:
        """Returns what a saved model says of its family."""
        return {"family": self.name, "chat_format": self.wrapper}


_LLAVA_NEXT: dict[str, Any] = {"sharing": "layers", "budget": "grids"}
_QWEN: dict[str, Any] = {
    "marks": ("<|im_start|>", "<|image_pad|>"),
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
}
_QWEN |= {"budget": "pixels", "image_tokens": 1280, "extras": "torchvision for videos"}
#: Vicuna is a Llama 2, whose tokenizer has no control tokens but these.
_LLAMA2 = ("<s>", "</s>")
_THINKING = "<|im_start|>assistant\\n<think>"

BACKBONES: tuple[Backbone, ...] = (
    Backbone(
        "llava_next-llama3",
        "llava_next",
        "llama3",
        ("<|start_header_id|>",),
        adds_bos=True,
        **_LLAVA_NEXT,
    ),
    Backbone("llava_next-mistral", "llava_next", "mistral", text_type="mistral", adds_bos=True, **_LLAVA_NEXT),
    Backbone("llava_next-qwen2", "llava_next", "qwen2", ("<|im_start|>",), text_type="qwen2", **_LLAVA_NEXT),
    Backbone("llava_next-vicuna", "llava_next", "vicuna", _LLAMA2, text_type="llama", adds_bos=True, **_LLAVA_NEXT),
    Backbone(
        "llava",
        "llava",
        "vicuna",
        _LLAMA2,
        text_type="llama",
        adds_bos=True,
        processor="llava.processing_llava:LlavaProcessor",
    ),
    Backbone(
        "llava_onevision",
        "llava_onevision",
        "onevision",
        ("<|im_start|>",),
        processor="llava_onevision.processing_llava_onevision:LlavaOnevisionProcessor",
        extras="torchvision for videos",
        budget="pinpoints",
    ),
    Backbone(
        "qwen2_vl",
        "qwen2_vl",
        "qwen2",
        processor="qwen2_vl.processing_qwen2_vl:Qwen2VLProcessor",
        packing=4,
        **_QWEN,
    ),
    Backbone(
        "qwen2_5_vl",
        "qwen2_5_vl",
        "qwen2",
        processor="qwen2_5_vl.processing_qwen2_5_vl:Qwen2_5_VLProcessor",
        packing=4,
        **_QWEN,
    ),
    Backbone(
        "qwen3_vl-thinking",
        "qwen3_vl",
        "no-thoughts",
        tail=_THINKING,
        processor="qwen3_vl.processing_qwen3_vl:Qwen3VLProcessor",
        **_QWEN,
    ),
    Backbone("qwen3_vl", "qwen3_vl", "chatml", processor="qwen3_vl.processing_qwen3_vl:Qwen3VLProcessor", **_QWEN),
    Backbone(
        "qwen3_5",
        "qwen3_5",
        "no-thoughts",
        processor="qwen3_vl.processing_qwen3_vl:Qwen3VLProcessor",
        sharing="fork",
        packing=0,
        **_QWEN,
    ),
    Backbone(
        "smolvlm-instruct",
        "idefics3",
        "smolvlm",
        ("<|im_start|>", "<end_of_utterance>"),
        processor="idefics3.processing_idefics3:Idefics3Processor",
        budget="splitting",
        image_tokens=64,
    ),
    Backbone(
        "idefics3",
        "idefics3",
        "idefics3",
        ("<|begin_of_text|>", "<end_of_utterance>"),
        processor="idefics3.processing_idefics3:Idefics3Processor",
        budget="splitting",
    ),
    Backbone(
        "smolvlm",
        "smolvlm",
        "smolvlm",
        ("<|im_start|>", "<end_of_utterance>"),
        processor="smolvlm.processing_smolvlm:SmolVLMProcessor",
        extras="torchvision and num2words for videos",
        budget="splitting",
        image_tokens=64,
    ),
    Backbone(
        "internvl",
        "internvl",
        "chatml",
        ("<|im_start|>", "<IMG_CONTEXT>"),
        image="<IMG_CONTEXT>",
        processor="internvl.processing_internvl:InternVLProcessor",
        extras="torchvision for videos",
        budget="patches",
    ),
    Backbone(
        "gemma3",
        "gemma3",
        "gemma3",
        ("<start_of_turn>", "<start_of_image>"),
        image="<start_of_image>",
        processor="gemma3.processing_gemma3:Gemma3Processor",
        sharing="masks",
    ),
    Backbone(
        "gemma4",
        "gemma4",
        "gemma4",
        ("<|turn>", "<|image|>"),
        image="\n\n<|image|>\n\n",
        processor="gemma4.processing_gemma4:Gemma4Processor",
        extras="torchvision for videos",
        sharing="masks",
        budget="soft tokens",
    ),
    Backbone(
        "mistral3",
        "mistral3",
        "mistral3",
        ("[INST]", "[IMG]"),
        image="[IMG]",
        processor="pixtral.processing_pixtral:PixtralProcessor",
        extras="torchvision, which its module imports",
        budget="longest edge",
    ),
)

#: Model types that the recipe cannot run on, and why.
REFUSED = {
    "paligemma": "its hidden states depend on what stands behind them, so there is no last state of a prompt",
    "mllama": "it reads images by cross-attention, not as tokens of the prompt",
    "phi4_multimodal": "its vision is a separate adapter, and it has no image processor that does without torchvision",
}


#: What makes a model of another type be taken as it is, see :func:`make_generic`.
GENERIC = "generic"


def make_generic(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, processor: type, chat_format: str
) -> Backbone:
    """Returns a row for a model type that none is for; what it can do is found out when it is loaded.

    Args:
        config: The checkpoint's.
        tokenizer: The checkpoint's.
        processor: The class of its processor.
        chat_format: What stands around a prompt, which is ``{}`` in it.
    """
    path = f"{processor.__module__.removeprefix('transformers.models.')}:{processor.__name__}"
    has_bos = tokenizer.bos_token is not None and chat_format.startswith(tokenizer.bos_token)
    adds_bos = not has_bos and len(tokenizer("").input_ids) > 0
    return Backbone(
        GENERIC, config.model_type, chat_format, adds_bos=adds_bos, processor=path, sharing="none", packing=0
    )


def read_chat_format(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns what a checkpoint's own chat template puts around a user's text.

    Raises:
        ValueError: If it has none, or the text does not stand once in what it renders.
    """
    for content in (_TEXT, [{"type": "text", "text": _TEXT}]):
        rendered = _render(tokenizer, content)
        if rendered.count(_TEXT) == 1:
            return rendered.replace(_TEXT, "{}")
    raise ValueError(
        "the chat format cannot be read from the checkpoint's template: give chat_format=, with {} for the prompt"
    )


def read_image_string(tokenizer: PreTrainedTokenizerBase, chat_format: str, image_token: str) -> str:
    """Returns what a checkpoint's own chat template puts in the place of an image, or else the token of images."""
    rendered = _render(tokenizer, [{"type": "image"}, {"type": "text", "text": _TEXT}])
    head, _, _ = chat_format.partition("{}")
    found = rendered.removeprefix(head).partition(_TEXT)[0] if rendered.startswith(head) else ""
    return found if image_token in found else image_token


#: A text that is looked for in what a chat template renders.
_TEXT = "one word"


def _render(tokenizer: PreTrainedTokenizerBase, content: str | list[dict[str, str]]) -> str:
    """Renders a user's turn; returns nothing if the template does not know such content."""
    try:
        messages = [{"role": "user", "content": content}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except ImportError:  # of what renders templates
        raise
    except Exception:  # a template raises what it likes
        return ""


def check_model_type(config: PreTrainedConfig, name: str) -> None:
    """Raises ValueError if no row is for a checkpoint's model type; see :func:`find_backbone`."""
    kind = config.model_type
    known = sorted({row.model_type for row in BACKBONES})
    if kind in REFUSED:
        raise ValueError(f"{name} is a {kind!r} checkpoint, which E5-V cannot use: {REFUSED[kind]}")
    if kind not in known:
        near = get_close_matches(kind, known, n=3, cutoff=0.4)
        hint = f" ({', '.join(near)} are nearest)" if near else ""
        raise ValueError(
            f"{name} is a {kind!r} checkpoint, E5-V wants one of the model types {', '.join(known)}{hint}; "
            'backbone="generic" tries any other'
        )


def find_backbone(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, template: str | None = None
) -> Backbone:
    """Returns the row for a checkpoint.

    Args:
        config: The checkpoint's.
        tokenizer: The checkpoint's.
        template: Its own chat template, if it has one.

    Raises:
        ValueError: If there is none; the message says what was looked for.
    """
    rows = [row for row in BACKBONES if row.model_type == config.model_type]
    text = getattr(config, "text_config", config).model_type
    for row in rows:
        fits = row.text_type in (None, text) and (row.tail is None or row.tail in (template or ""))
        if fits and not _missing(row, tokenizer):
            return row
    wanted = "; ".join(
        f"{row.name} wants {row.text_type or 'any'} language models"
        + (f" and the tokens {' '.join(row.marks)}" if row.marks else "")
        for row in rows
    )
    raise ValueError(f"there is no chat format for this {config.model_type!r} with a {text!r} language model: {wanted}")


def _missing(row: Backbone, tokenizer: PreTrainedTokenizerBase) -> Sequence[str]:
    return [mark for mark in row.marks if tokenizer.convert_tokens_to_ids(mark) in (None, tokenizer.unk_token_id)]
