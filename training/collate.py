"""From rows of texts to a batch: cut the texts, then make prompts of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from .recipes import Settings


def make_collator(model: Any, settings: Settings) -> Any:
    """Returns the data collator.

    Args:
        model: As ``load_for_training`` returns it.
        settings: ``max_tokens`` and ``released_quirks`` are used.

    Raises:
        ValueError: If the quirks of the published run are wanted of another family.
    """
    from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

    transformer = model[0]
    if settings.released_quirks:
        from .quirks import ReleasedCollator

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

    def preprocess(texts: Sequence[str], **kwargs: Any) -> dict[str, Any]:
        cut = cut_sentences(transformer.prompt_tokenizer.plain, texts, settings.max_tokens)
        # As {"text"}, what looks like the path of an image is a text too
        return model.preprocess([{"text": text} for text in cut])

    return SentenceTransformerDataCollator(preprocess)


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
