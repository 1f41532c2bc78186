"""LanceDB's own way to an embedding model: a function that a table calls for its source field, and for queries.

Importing this module registers it as ``"e5v"``. A program that opens such a table has to import it first. Needs the
extra ``index``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lancedb.embeddings import EmbeddingFunction, register
from pydantic import PrivateAttr


@register("e5v")
class E5VEmbeddingFunction(EmbeddingFunction):  # type: ignore[misc]
    """Embeds a source field of texts or of images, and queries of any kind, with an E5-V.

    Args:
        name: A directory, a hub id or ``"e5v-tiny"``; see ``e5v_st.load``.
        source: What strings of the source field are: texts, or paths and addresses of images. Bytes are images.
        device: Of torch; ``None`` takes a GPU if there is one.
        dtype: Of the weights; ``None`` takes that of ``e5v_st.load``.
        adapter: A LoRA on the model.
        batch_tokens: Maximum number of tokens computed together.

    Example:
        >>> import tempfile, lancedb
        >>> from lancedb.pydantic import LanceModel, Vector
        >>> from e5v_st.index.embedding_function import E5VEmbeddingFunction
        >>> e5v = E5VEmbeddingFunction.create(name="e5v-tiny", device="cpu")
        >>> class Row(LanceModel):
        ...     text: str = e5v.SourceField()
        ...     vector: Vector(e5v.ndims()) = e5v.VectorField()
        >>> table = lancedb.connect(tempfile.mkdtemp()).create_table("rows", schema=Row)
        >>> _ = table.add([{"text": "a red heart"}, {"text": "a blue car"}])
        >>> table.search("a heart").limit(1).to_list()[0]["text"]
        'a red heart'
    """

    name: str = "royokong/e5-v"
    source: Literal["text", "image"] = "text"
    device: str | None = None
    dtype: str | None = None
    adapter: str | None = None
    batch_tokens: int | None = None
    #: LanceDB would try a bad item seven times, and wait longer each time.
    max_retries: int = 0
    _model: Any = PrivateAttr(default=None)

    @property
    def model(self) -> Any:
        """The model, loaded when it is needed first."""
        if self._model is None:
            from ..loading import load

            more: dict[str, Any] = {"model_kwargs": {"dtype": self.dtype}} if self.dtype else {}
            self._model = load(self.name, device=self.device, adapter=self.adapter, **more)
        return self._model

    def ndims(self) -> int:
        """Returns the length of an embedding."""
        return int(self.model.get_embedding_dimension())

    def compute_query_embeddings(self, query: Any, *_: Any, **__: Any) -> list[Any]:
        """Embeds one query: a text, an image, or a dictionary with ``image`` and/or ``text``. A string is a text."""
        return self._embed([{"text": query} if isinstance(query, str) else query])

    def compute_source_embeddings(self, rows: Any, *_: Any, **__: Any) -> list[Any]:
        """Embeds cells of the source field; a cell with nothing in it has no embedding."""
        cells = list(self.sanitize_input(rows))
        there = [place for place, cell in enumerate(cells) if cell is not None]
        found: list[Any] = [None] * len(cells)
        for place, embedding in zip(there, self._embed([self._item(cells[p]) for p in there]), strict=True):
            found[place] = embedding
        return found

    def _item(self, cell: Any) -> Any:
        return cell if isinstance(cell, Mapping) else {self.source if isinstance(cell, str) else "image": cell}

    def _embed(self, items: Sequence[Any]) -> list[Any]:
        from ..encoder import encode_all

        return list(encode_all(self.model, items, batch_tokens=self.batch_tokens, progress=False))
