r"""Every prompt of E5-V as data, and how a prompt, a text and images become one string.

Prompts are written in E5-V's own notation: ``<sent>`` stands for the text, ``<image>`` for an image. A chat format
(``wrapper`` in the code) is what a backbone wants around a prompt. All wordings, misspellings ("desribe") and trailing
spaces are the published code's (``retrieval.py``, ``eval.py`` and README of kongds/E5-V): a changed space changes the
embedding.

Example:
    >>> from e5v_st import PROMPTS
    >>> PROMPTS["composed"]
    '<image>Modify this image with "<sent>", desribe modified image in one word:'
    >>> PROMPTS["text"].replace("<sent>", "A dog.")
    'A dog.\nSummary above sentence in one word: '
"""

from __future__ import annotations

from collections.abc import Mapping

SENTENCE = "<sent>"
IMAGE = "<image>"

#: Chat formats around a prompt; ``backbone_e5v`` says which model family has which. The tail of ``llama3`` is two
#: newlines, a space and a newline: the embedding is read at that last newline. The formats of ``llama3`` and
#: ``mistral`` get their BOS token from the tokenizer, and so does ``vicuna``; in the others it is written out.
WRAPPERS: dict[str, str] = {
    "llama3": "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n \n",
    "mistral": "[INST] {} [/INST]",
    "vicuna": "USER: {} ASSISTANT:",
    "qwen2": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n",
    "chatml": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "no-thoughts": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "onevision": "<|im_start|>user {}<|im_end|><|im_start|>assistant\n",
    "smolvlm": "<|im_start|>User:{}<end_of_utterance>\nAssistant:",
    "idefics3": "<|begin_of_text|>User:{}<end_of_utterance>\nAssistant:",
    "gemma3": "<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
    "gemma4": "<bos><|turn>user\n{}<turn|>\n<|turn>model\n<|channel>thought\n<channel|>",
    "mistral3": "<s>[INST]{}[/INST]",
}

_CIRR_QUERY = '<image>Modify this image with "<sent>", desribe modified image in one word:'
_FASHIONIQ_QUERY = (
    "<image> change the style of this {word} to <sent>\n Desribe this modified {word} in one word based on its style:"
)
_FASHIONIQ_GALLERY = "<image>\n Describe this {word} in one word based on its style:"

#: FashionIQ's categories and the word that stands for each in the published prompts (toptee is prompted as shirt).
FASHIONIQ_WORDS: dict[str, str] = {"dress": "dress", "shirt": "shirt", "toptee": "shirt"}

PROMPTS: dict[str, str] = {
    "text": "<sent>\nSummary above sentence in one word: ",
    "image": "<image>\nSummary above image in one word: ",
    "composed": _CIRR_QUERY,
    "cirr-query": _CIRR_QUERY,
    "cirr-gallery": "<image>\n Describe this image in one word:",
    **{f"fashioniq-{name}-query": _FASHIONIQ_QUERY.format(word=word) for name, word in FASHIONIQ_WORDS.items()},
    **{f"fashioniq-{name}-gallery": _FASHIONIQ_GALLERY.format(word=word) for name, word in FASHIONIQ_WORDS.items()},
    "sts": " <sent>\nSummary above sentence in one word:",
    # Not of the published code: its wording for an image beside a text that is no change of it. UNITE and LamRA ask so
    "fused": "<image><sent>\nSummary above image and sentence in one word: ",
}


def default_prompt(has_sentence: bool, num_images: int, own: Mapping[str, str] = PROMPTS) -> str:
    """Returns the prompt for an item by what it holds: ``text``, ``image`` or ``composed``.

    Args:
        has_sentence: Whether the item has a text.
        num_images: Number of images of the item.
        own: The model's prompts, see ``published_e5v``.

    Raises:
        ValueError: If the model has none for such an item.
    """
    name = "text" if num_images == 0 else "composed" if has_sentence else "image"
    if name not in own:
        raise ValueError(f"the model's authors state no prompt of the kind {name!r}: give one with prompt=")
    return own[name]


def resolve_prompt(prompt: str | None, has_sentence: bool, num_images: int, own: Mapping[str, str] = PROMPTS) -> str:
    """Makes the template for one item from what the caller gave as ``prompt``.

    Args:
        prompt: ``None`` for the default; a template that holds ``<sent>`` and/or ``<image>``; or a plain instruction,
            which is put in front of the text, or of the images if there is no text.
        has_sentence: Whether the item has a text. An empty text is a text.
        num_images: Number of images of the item.
        own: The model's default prompts, see :func:`default_prompt`.

    Returns:
        A template with one ``<image>`` for each image of the item.

    Raises:
        ValueError: If the prompt is not a string, is the name of one of :data:`PROMPTS`, or asks for something that the
            item lacks, or leaves out something that it has.
    """
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"got a prompt of type {type(prompt).__name__}, want a string")
    if prompt in PROMPTS:
        raise ValueError(f"got {prompt!r} as the prompt, which is a prompt's name: use prompt_name={prompt!r}")
    template = prompt if prompt and (SENTENCE in prompt or IMAGE in prompt) else None
    if template is None:
        template = default_prompt(has_sentence, num_images, own)
        if prompt:
            mark = SENTENCE if has_sentence else IMAGE
            template = template.replace(mark, prompt + mark, 1)
    slots = template.count(IMAGE)
    if slots == 1 and num_images > 1:
        template = template.replace(IMAGE, IMAGE * num_images)
    elif slots != num_images:
        raise ValueError(f"the prompt {template!r} has room for {slots} image(s), but the item has {num_images}")
    if (SENTENCE in template) != has_sentence:
        has, wants = ("a text", "none") if has_sentence else ("no text", "one")
        raise ValueError(f"the item has {has}, but the prompt {template!r} wants {wants}")
    return template


def render(template: str, wrapper: str = "llama3", sentence: str = "") -> str:
    """Returns the whole input string: the chat format around the template around the text.

    Args:
        template: A value of :data:`PROMPTS` or any text with ``<sent>`` and/or ``<image>``.
        wrapper: The chat format, see :func:`find_format`.
        sentence: The text, which replaces every ``<sent>``.

    Raises:
        ValueError: If the chat format is unknown.
    """
    return find_format(wrapper).replace("{}", template).replace(SENTENCE, sentence)


def find_format(wrapper: str) -> str:
    """Returns a chat format by its name, or as it is: a text in which ``{}`` stands for the prompt.

    Raises:
        ValueError: If there is none of that name, or ``{}`` is not there once.
    """
    if wrapper in WRAPPERS:
        return WRAPPERS[wrapper]
    if wrapper.count("{}") != 1:
        raise ValueError(
            f"unknown chat format {wrapper!r}: want one of {', '.join(WRAPPERS)}, or a text with {{}} for the prompt"
        )
    return wrapper


def chat_template(wrapper: str = "llama3", placeholder: str = IMAGE, prompts: Mapping[str, str] = PROMPTS) -> str:
    """Returns a Jinja chat template that renders messages as :func:`resolve_prompt` and :func:`render` would.

    It lets sentence-transformers' own ``Transformer`` module, or a server of the model, build E5-V's prompts without
    any of this code. A system message is the prompt, as sentence-transformers sends ``encode(prompt=...)``. The texts
    of all other messages are the text, and their images are the images.

    Args:
        wrapper: The chat format, a key of :data:`WRAPPERS`.
        placeholder: What the family's processor wants to stand for an image.
        prompts: The model's default prompts; one that is missing is E5-V's.
    """
    head, tail = (repr(part)[1:-1].replace('"', '\\"') for part in find_format(wrapper).split("{}"))
    text, image, composed = (
        '"' + repr({**PROMPTS, **prompts}[name])[1:-1].replace('"', '\\"') + '"'
        for name in ("text", "image", "composed")
    )
    return (
        "{%- set ns = namespace(prompt='', sentence='', images=0, texts=0) -%}"
        "{%- for message in messages -%}"
        "{%- set parts = [{'type': 'text', 'text': message['content']}] "
        "if message['content'] is string else message['content'] -%}"
        "{%- for part in parts -%}"
        "{%- if message['role'] == 'system' -%}{%- set ns.prompt = ns.prompt + part['text'] -%}"
        "{%- elif part['type'] == 'text' -%}"
        "{%- set ns.sentence = ns.sentence + part['text'] -%}{%- set ns.texts = ns.texts + 1 -%}"
        "{%- elif part['type'] == 'image' -%}{%- set ns.images = ns.images + 1 -%}"
        "{%- endif -%}{%- endfor -%}{%- endfor -%}"
        "{%- if '<sent>' in ns.prompt or '<image>' in ns.prompt -%}{%- set prompt = ns.prompt -%}"
        "{%- else -%}"
        f"{{%- set prompt = {text} if ns.images == 0 else ({composed} if ns.texts else {image}) -%}}"
        "{%- set mark = '<sent>' if ns.texts else '<image>' -%}"
        "{%- set prompt = prompt.replace(mark, ns.prompt + mark, 1) -%}"
        "{%- endif -%}"
        "{%- if prompt.count('<image>') == 1 -%}"
        "{%- set prompt = prompt.replace('<image>', '<image>' * ns.images) -%}{%- endif -%}"
        f'{{{{- "{head}" + prompt{_replaced(placeholder)}.replace("<sent>", ns.sentence) + "{tail}" -}}}}'
    )


def _replaced(placeholder: str) -> str:
    return "" if placeholder == IMAGE else '.replace("<image>", "' + repr(placeholder)[1:-1] + '")'
