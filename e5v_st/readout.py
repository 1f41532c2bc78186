"""The readout of the paper's Figure 1: the words that the model itself would use for an item."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .reading import check_many

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

HEAD_KEYS = ("language_model.lm_head.weight", "lm_head.weight")


def words(model: SentenceTransformer, items: Sequence[Any], k: int = 5, **kwargs: Any) -> list[list[str]]:
    """Returns the top ``k`` words of each item through the language model's head.

    The head is linear, and an embedding is a positive multiple of the hidden state that the head reads. So
    normalisation changes no rank.

    Args:
        model: An E5-V.
        items: See ``E5VTransformer.preprocess``.
        k: How many words. A word is a token of the tokenizer, without the space before it.
        **kwargs: Arguments of ``model.encode``.

    Raises:
        ValueError: If the checkpoint was saved without its head, or ``k`` is less than 1.
        TypeError: If ``items`` is a single item.

    Example:
        >>> import e5v_st
        >>> model = e5v_st.load("e5v-tiny", device="cpu")
        >>> e5v_st.words(model, ["a red heart"], k=3)
        [['heart', 'red', 'broken']]
    """
    if k < 1:
        raise ValueError(f"got k={k}, want at least 1")
    check_many(items)
    items = list(items)
    if not items:
        return []
    _check_modules(model)
    head = load_head(model).float()
    size = {"truncate_dim": head.shape[1], "convert_to_tensor": True}
    return _decode(model, head, model.encode(items, **{**kwargs, **size}), k)


def words_of(
    model: SentenceTransformer, embeddings: Any, k: int = 5, head: torch.Tensor | None = None
) -> list[list[str]]:
    """Returns the top ``k`` words of embeddings ``(n, d)`` of a model, as :func:`words` does of items.

    Args:
        model: An E5-V.
        embeddings: Whole ones, in any number.
        k: How many words.
        head: What :func:`load_head` returns, for who asks more than once: it may be a gigabyte.

    Raises:
        ValueError: If the checkpoint was saved without its head, or the embeddings were cut.
    """
    _check_modules(model)
    head = (load_head(model) if head is None else head).float()
    if embeddings.shape[1] != head.shape[1]:
        raise ValueError(f"got embeddings of {embeddings.shape[1]} numbers, want whole ones, of {head.shape[1]}")
    return _decode(model, head, embeddings, k)


def _decode(model: SentenceTransformer, head: torch.Tensor, embeddings: Any, k: int) -> list[list[str]]:
    import torch

    tokenizer: Any = model[0].tokenizer
    scores = torch.as_tensor(embeddings).to(head) @ head.T
    top = torch.topk(scores, min(k, head.shape[0]), dim=1).indices
    return [
        [tokenizer.decode([index], clean_up_tokenization_spaces=False).strip() for index in row] for row in top.tolist()
    ]


def _check_modules(model: SentenceTransformer) -> None:
    """Refuses modules behind which an embedding is no longer a multiple of the last hidden state."""
    from .model.pooling_e5v import pools_last_tokens

    behind = [type(module).__name__ for module in list(model)[1:]]
    if not pools_last_tokens(model) or set(behind) - {"Pooling", "Normalize"}:
        raise ValueError(
            f"the modules behind the transformer are {', '.join(behind)}, so the head cannot read the embedding: want "
            "last-token pooling, and normalisation or nothing behind it"
        )


def load_head(model: SentenceTransformer) -> torch.Tensor:
    """Returns the head's weight ``(vocabulary, d)``: the input embedding if they are tied, else from the checkpoint.

    Raises:
        ValueError: If the checkpoint was saved without its head.
    """
    transformer: Any = model[0]
    backbone = transformer.model
    config = backbone.config
    if config.tie_word_embeddings or getattr(config.text_config, "tie_word_embeddings", False):
        tied: torch.Tensor = backbone.get_input_embeddings().weight
        return tied.detach().cpu()
    name = config.name_or_path
    weight = _read_tensor(name, HEAD_KEYS, transformer.found_at)
    if weight is None:
        raise ValueError(
            f"{name!r} was saved without its language model head, so there are no words to read: "
            "load the checkpoint that it was made from (an exported or merged model keeps its head)"
        )
    return weight


def _read_tensor(name: str, keys: Sequence[str], places: Mapping[str, Any]) -> torch.Tensor | None:
    """Reads the first of ``keys`` that a checkpoint (directory or hub id) holds, opening no other tensor.

    Args:
        name: The directory or hub id.
        keys: Names of the tensor.
        places: Arguments of ``cached_file`` that find the files that the model was loaded from.
    """
    from safetensors import safe_open
    from transformers.utils import cached_file

    from .model.upstream_e5v import NONE_IF_MISSING

    for file in ("model.safetensors.index.json", "model.safetensors"):
        path = cached_file(name, file, **places, **NONE_IF_MISSING)
        if path is None:
            continue
        if file.endswith(".json"):
            shards = json.loads(Path(path).read_text(encoding="utf8"))["weight_map"]
            key = next((key for key in keys if key in shards), None)
            path = cached_file(name, shards[key], **places) if key else None
        if path is not None:
            with safe_open(path, framework="pt") as tensors:
                key = next((key for key in keys if key in tensors.keys()), None)  # noqa: SIM118 - no mapping
                return tensors.get_tensor(key) if key else None
    return None
