"""The contents of a task's rows: each text, image or pair of both that the model embeds, with its prompt.

Here stands what is E5-V's own in an evaluation: the prompts of the paper's composed tasks, the edits of STS sentences,
and the two orders of FashionIQ's captions. ``prompting.py`` has the prompts of every kind of task.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from e5v_st.model.prompts_e5v import PROMPTS, default_prompt

from .cir import clean_captions
from .prompting import NAMED, kind_of, shape_of

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from PIL.Image import Image

#: Prompt names of queries and documents of the paper's composed tasks; others have the prompts of their kind.
TASK_PROMPTS = {
    "E5VFashionIQRetrieval": ("fashioniq-{subset}-query", "fashioniq-{subset}-gallery"),
    "E5VCIRRRetrieval": ("cirr-query", "cirr-gallery"),
    "E5VCIRRTest": ("cirr-query", "cirr-gallery"),
}


def prompt_name(task: TaskMetadata, subset: str, role: str | None) -> str | None:
    """Returns the name of the prompt for a task's texts or images; ``None`` stands for the default prompt.

    Args:
        task: The task's metadata.
        subset: Such as a category of FashionIQ.
        role: ``"query"``, ``"document"`` or ``None``.

    Example:
        >>> import mteb
        >>> prompt_name(mteb.get_task("E5VFashionIQRetrieval").metadata, "dress", "query")
        'fashioniq-dress-query'
    """
    if kind_of(task).name == "sts":
        return "sts"
    names = TASK_PROMPTS.get(task.name)
    return names[role == "document"].format(subset=subset) if names else None


def edit_sts_sentence(sentence: str) -> str:
    """Edits a sentence as the published ``eval_sts.py`` does, in its order; an empty one stays empty.

    Example:
        >>> edit_sts_sentence('He asked "why"?')
        "He asked 'why'."
    """
    sentence = " ".join(sentence.split())
    if sentence and not sentence.endswith((".", "?", '"', "'")):
        sentence += "."
    sentence = sentence.replace('"', "'")
    return sentence[:-1] + "." if sentence.endswith("?") else sentence


def caption_orders(captions: str) -> list[str]:
    r"""Returns the texts of a FashionIQ query: its captions in the given order and in reverse.

    Args:
        captions: One per line, as the task has them.

    Example:
        >>> caption_orders("is red.\nhas stripes")
        ['is red, has stripes', 'has stripes, is red']
    """
    cleaned = clean_captions(captions.split("\n"))
    return [", ".join(cleaned), ", ".join(cleaned[::-1])]


@dataclass(frozen=True)
class Content:
    """One input of the model with its prompt: a text, an image, or both.

    Attributes:
        text: As the model reads it: edits and caption orders are applied already.
        image: What ``datasets`` stores (``bytes`` and ``path``), or a PIL image.
        prompt: The template.
    """

    text: str | None
    image: Any
    prompt: str

    def item(self) -> dict[str, Any]:
        """Returns the content as ``e5v_st.encode_all`` takes it; the image is decoded later, by a thread."""
        image = _open_lazily(self.image) if isinstance(self.image, dict) else self.image
        return {key: value for key, value in (("text", self.text), ("image", image)) if value is not None}

    def key(self, fingerprint: bytes) -> bytes:
        """Returns a digest of the content and of the model that embeds it.

        Args:
            fingerprint: The model's.
        """
        digest = hashlib.blake2b(fingerprint, digest_size=20)
        digest.update(json.dumps([self.prompt, self.text]).encode())
        if isinstance(self.image, dict):
            digest.update(_file_bytes(self.image))
        elif self.image is not None:
            image = self.image
            # Pixels of a palette are numbers of colours: the colours, and which of them is transparent, stand apart
            colours = (image.getpalette(), image.info.get("transparency"))
            digest.update(repr((image.mode, image.size, colours)).encode() + image.tobytes())
        return digest.digest()


class Row(NamedTuple):
    """What a row of a task asks the model for.

    Attributes:
        contents: Their states are summed: one content as a rule, two for a FashionIQ query.
        beside: Contents that a later call will ask for. Embedded now, they share their image with ``contents``.
    """

    contents: list[Content]
    beside: list[Content]


def _file_bytes(image: dict[str, Any]) -> bytes:
    return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


def _open_lazily(image: dict[str, Any]) -> Image | bytes:
    """Opens an image file as ``datasets`` does, but leaves it undecoded where it need not be turned."""
    from PIL import ExifTags, ImageOps
    from PIL import Image as PILImage

    data = _file_bytes(image)
    opened = PILImage.open(io.BytesIO(data))
    turned = opened.getexif().get(ExifTags.Base.Orientation) not in (None, 1)
    return ImageOps.exif_transpose(opened) if turned else data


def contents_of(
    rows: Iterable[dict[str, Any]],
    name: str | None,
    gallery: str | None = None,
    default: Mapping[str, str] = PROMPTS,
    chosen: Mapping[str, str] | None = None,
) -> Iterator[Row]:
    """Yields the contents of each row.

    Args:
        rows: With the columns of the task.
        name: The prompt's name; ``None`` stands for the default prompt.
        gallery: The name of the gallery's prompt, where the row's image is to be embedded with that one too.
        default: The model's default prompts.
        chosen: Names of prompts to use instead, by what a row holds; see ``prompting.chosen_for``.
    """
    templates = {**NAMED, **default}
    instead = {shape: templates[own] for shape, own in (chosen or {}).items()}
    beside_prompt = instead.get("image", templates[gallery]) if gallery else None
    for row in rows:
        image = row.get("image")
        # mteb strips the texts of documents, and puts the title in front of them; `body` is the text as it was
        text = row["body"] if "body" in row and "title" not in row else row.get("text")
        texts = [text]
        if name == "sts" and text is not None:
            texts = [edit_sts_sentence(text)]
        elif name and re.match("fashioniq-.*-query", name) and "captions" in row:
            texts = caption_orders(row["captions"])
        prompt = NAMED[name] if name else default_prompt(text is not None, int(image is not None), default)
        prompt = instead.get(shape_of(prompt), prompt)
        beside = [Content(None, image, beside_prompt)] if beside_prompt and image is not None else []
        yield Row([Content(text, image, prompt) for text in texts], beside)
