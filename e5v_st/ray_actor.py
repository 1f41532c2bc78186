"""E5-V on a cluster, for Ray Data: ``ds.map_batches(E5VActor, fn_constructor_kwargs={"model": ...}, ...)``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .index.shards import make_table
from .index.source import is_blank, to_name
from .options import find_prompt

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


class E5VActor:
    """Embeds batches of rows. Each actor of the pool holds one model.

    Args:
        model: A directory, a hub id or ``"e5v-tiny"``; see ``e5v_st.load``.
        prompt: A prompt's name or a template. With ``None``, it is chosen by what a row holds.
        batch_tokens: Maximum number of tokens computed together. With ``None``, it is found from the free memory.
        **kwargs: Arguments of ``e5v_st.load``.

    Example:
        >>> import numpy as np
        >>> from e5v_st import E5VActor
        >>> actor = E5VActor("e5v-tiny", device="cpu")  # Ray does so in each actor
        >>> rows = {"id": np.array(["1", "2"]), "text": np.array(["a dog", "a cat"])}
        >>> actor(rows).column_names
        ['id', 'embedding', 'error']
    """

    def __init__(
        self, model: str, *, prompt: str | None = None, batch_tokens: int | None = None, **kwargs: Any
    ) -> None:
        from .loading import load

        self.model = load(model, **kwargs)
        self.prompt = find_prompt(self.model, prompt)
        self.batch_tokens = batch_tokens

    def __call__(self, batch: Mapping[str, np.ndarray]) -> pa.Table:
        """Embeds a batch.

        Args:
            batch: Columns ``id``, and ``image`` and/or ``text``. A row may lack one of the two; other columns are
                ignored.

        Returns:
            Columns ``id``, ``embedding`` and ``error``, as in the shards of ``e5v embed``. A row that cannot be read
            does not end the job: its embedding is null, and its error says why.

        Raises:
            ValueError: If a column is missing, or an id is neither a text nor a whole number.
        """
        from .encoder import stream_all

        kinds = [name for name in ("image", "text") if name in batch]
        if "id" not in batch or not kinds:
            raise ValueError(f"got the columns {', '.join(batch)}, want 'id', and 'image' and/or 'text'")
        ids = [_read_id(value, place) for place, value in enumerate(batch["id"])]
        rows = zip(*(batch[kind] for kind in kinds), strict=True)
        items = [{kind: v for kind, v in zip(kinds, row, strict=True) if not is_blank(v)} for row in rows]
        stream = stream_all(
            self.model, items, prompt=self.prompt, batch_tokens=self.batch_tokens, on_error="skip", progress=False
        )
        results = list(stream)
        errors = [r.error and r.error.replace(f"item {r.index}:", f"row {ids[r.index]}:", 1) for r in results]
        return make_table(ids, [r.embedding for r in results], errors)


def _read_id(value: Any, place: int) -> str:
    try:
        return to_name(value.item() if hasattr(value, "item") else value)
    except ValueError as error:
        raise ValueError(f"row {place} of the batch: {error}") from None
