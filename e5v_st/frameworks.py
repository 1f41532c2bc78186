"""Adapters for frameworks that want their own class around a model. Their texts are always texts.

sentence-transformers 6 embeds whatever a string names: one that is a path or an address of an image becomes that image.
So a document ``photo.jpg`` or a query ``https://…/cat.png`` would not be embedded as the words that it is. These
adapters wrap each string as ``{"text": …}``. Each class is made when it is asked for, as its base is in a package that
need not be installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def embed_texts(model: SentenceTransformer, texts: Sequence[str]) -> list[list[float]]:
    """Embeds strings as texts, whatever they look like.

    Args:
        model: An E5-V.
        texts: Any number.

    Returns:
        Embeddings as lists of ``d`` numbers.
    """
    from .encoder import encode_all

    rows: list[list[float]] = encode_all(model, [{"text": text} for text in texts], progress=False).tolist()
    return rows


def langchain_embeddings(model: SentenceTransformer) -> Any:
    """Returns a ``langchain_core.embeddings.Embeddings`` around a model; needs ``langchain-core``.

    Args:
        model: An E5-V.
    """
    from langchain_core.embeddings import Embeddings

    class E5VEmbeddings(Embeddings):  # type: ignore[misc]
        """Embeds documents and queries as texts."""

        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            """Embeds documents."""
            return embed_texts(model, texts)

        def embed_query(self, text: str) -> list[float]:
            """Embeds a query."""
            return embed_texts(model, [text])[0]

    return E5VEmbeddings()


def llama_index_embedding(model: SentenceTransformer) -> Any:
    """Returns a ``llama_index`` ``MultiModalEmbedding`` around a model; needs ``llama-index-core``.

    ``HuggingFaceEmbedding`` of LlamaIndex is not for an E5-V: it replaces the model's prompts by empty ones, and its
    texts may be taken for images.

    Args:
        model: An E5-V.
    """
    from llama_index.core.embeddings import MultiModalEmbedding

    class E5VEmbedding(MultiModalEmbedding):  # type: ignore[misc]
        """Embeds texts as texts, and images by their paths, bytes or PIL images."""

        def _get_text_embedding(self, text: str) -> list[float]:
            return embed_texts(model, [text])[0]

        def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
            return embed_texts(model, texts)

        def _get_query_embedding(self, query: str) -> list[float]:
            return embed_texts(model, [query])[0]

        async def _aget_query_embedding(self, query: str) -> list[float]:
            return self._get_query_embedding(query)

        def _get_image_embedding(self, img_file_path: Any) -> list[float]:
            embedding: list[float] = model.encode({"image": img_file_path}).tolist()
            return embedding

        async def _aget_image_embedding(self, img_file_path: Any) -> list[float]:
            return self._get_image_embedding(img_file_path)

    return E5VEmbedding(model_name="e5-v")
