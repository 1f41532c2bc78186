"""From rows of texts to a batch: cut the texts, then make prompts of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from .recipes import Settings


def make_collator(model: Any, settings: Settings, prompts: Mapping[str, Mapping[str, str]] | None = None) -> Any:
    """Returns the data collator.

    Args:
        model: As ``load_for_training`` returns it.
        settings: ``max_tokens`` and ``released_quirks`` are used.
        prompts: Source -> column -> a prompt's name or template; by default, what an item holds decides.

    Raises:
        ValueError: If the quirks of the published run are wanted of another family, or of sources.
    """
    from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

    transformer = model[0]
    if settings.released_quirks:
        from .quirks import ReleasedCollator

        if prompts is not None:
            raise ValueError("released_quirks repeats the published run, on texts alone: leave it out with train")
        if not transformer.backbone.is_llava_next:
            raise ValueError(
                "released_quirks repeats the published run, which was on LLaVA-NeXT: leave it out for a "
                f"{transformer.backbone.name}"
            )
        return ReleasedCollator(
            model.preprocess,
            tokenizer=transformer.tokenizer,
            wrapper=transformer.wrapper,
            max_tokens=settings.max_tokens,
        )

    def preprocess(cells: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        items = [read_cell(cell) for cell in cells]
        texts = iter(cut_sentences(plain, [item["text"] for item in items if "text" in item], settings.max_tokens))
        return model.preprocess([{**item, "text": next(texts)} if "text" in item else item for item in items], prompt)

    plain = transformer.prompt_tokenizer.plain
    templates = {
        source: {column: model.prompts.get(prompt, prompt) for column, prompt in columns.items()}
        for source, columns in (prompts or {}).items()
    }
    return SentenceTransformerDataCollator(preprocess, prompts=templates)


def read_cell(cell: Any) -> dict[str, Any]:
    """Returns the item of a cell of the training data; what is an item already stays so.

    As ``{"text"}``, what looks like the path of an image is a text too.

    Example:
        >>> read_cell({"text": None, "images": [{"bytes": None, "path": "dog.jpg"}]})
        {'image': [{'bytes': None, 'path': 'dog.jpg'}]}
    """
    if isinstance(cell, str):
        return {"text": cell}
    if "images" not in cell:
        return dict(cell)
    item = {"text": cell["text"], "image": cell["images"]}
    return {name: value for name, value in item.items() if value}


def cut_sentences(tokenizer: Tokenizer, sentences: Sequence[str], max_tokens: int) -> list[str]:
    """Cuts texts to a maximum number of tokens (32 in ft_llm.py); shorter texts stay as they are, to the letter.

    A text is cut in characters, at the end of its last token, and is not decoded from its tokens. With three tokens,
    where the two spaces stay two:

        "A  dog, sitting."  ->  "A" | " " | " dog" | "," | " s" | "itting" | "."  ->  "A  dog"

    Args:
        tokenizer: One that takes every text as content, such as ``PromptTokenizer.plain``.
        sentences: Texts without any prompt.
        max_tokens: At least 1.
    """
    encoded = tokenizer.encode_batch(list(sentences), add_special_tokens=False)
    return [
        text if len(encoding) <= max_tokens else text[: encoding.offsets[max_tokens - 1][1]]
        for text, encoding in zip(sentences, encoded, strict=True)
    ]
