"""Texts of different lengths in one row, without padding: for training, and where nothing is shared.

Positions that start again at 0 tell transformers where the next text of a row begins::

    texts        a b c d e    f g h    i j                 lengths 5, 3, 2, rows of 8 tokens
    row 0        a b c d e f g h       positions  0 1 2 3 4 0 1 2
    row 1        i j - - - - - -       positions  0 1 0 1 2 3 4 5
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from .skipping_e5v import only_rows
from .upstream_e5v import attention_of

#: The number of tokens of a row of short texts.
PACKED_TOKENS = 256


def uses_flash(config: Any) -> bool:
    """Whether a language model's attention is a flash kernel, which takes texts of any lengths in one row."""
    return "flash" in (attention_of(config) or "")


def pack(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Distributes texts over rows of at most ``width`` tokens (first fit, longest first); returns their indexes."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((i for i, left in enumerate(room) if left >= lengths[index]), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(max(width, lengths[index]))
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


def check_positions(language_model: Any) -> None:
    """Refuses a language model in which texts in one row cannot be told apart by positions that start again.

    Raises:
        ValueError: If its positions are not one number for each token, or it has layers that do not go by them.
    """
    config = language_model.config
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    layers = {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    fault = None
    if any("mrope" in str(word) or "section" in str(word) for word in _words(rope)):
        fault = f"positions of several dimensions (its rope parameters are {rope})"
    elif layers:
        fault = f"layers of the type {', '.join(sorted(layers))}"
    elif "position_ids" not in inspect.signature(language_model.forward).parameters:
        fault = "no position_ids"
    if fault:
        raise ValueError(
            f"the language model {config.model_type!r} has {fault}, so texts cannot be packed into one row: want a "
            "model with one position for each token"
        )


def _words(value: Any) -> Iterator[Any]:
    """Yields the keys and values of nested settings."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _words(inner)
    else:
        yield value


def packed_last_states(
    language_model: Any, input_ids: torch.Tensor, lengths: Sequence[int], *, packing: int | None = None, **kwargs: Any
) -> torch.Tensor:
    """Returns the last hidden state of each text ``(n, 1, d)``, after the final norm.

    Texts share rows. Positions that start again at each text keep them apart: transformers reads that from
    ``position_ids`` if there is no attention mask.

    Args:
        language_model: A causal model without its head.
        input_ids: ``(n, tokens)``, padded on the right.
        lengths: Tokens of each text.
        packing: How many numbers a position of the family has, see ``backbone_e5v``; with ``None``, one.
        **kwargs: Arguments of the model.

    Raises:
        ValueError: If nothing is known of the family, and the model's positions are not one number for each token; or
            if texts of the family cannot be packed.
    """
    if packing is None:
        check_positions(language_model)
    elif not packing:
        raise ValueError(f"texts cannot be packed into one row for a {language_model.config.model_type!r}")
    # Flash attention finds the starts only where everything is one row
    rows = pack(lengths, sum(lengths) if uses_flash(language_model.config) else PACKED_TOKENS)
    width = max(sum(lengths[index] for index in row) for row in rows)
    ids = input_ids.new_zeros(len(rows), width)
    positions = torch.arange(width, device=ids.device).repeat(len(rows), 1)
    where: dict[int, tuple[int, int]] = {}
    for row, members in enumerate(rows):
        start = 0
        for index in members:
            end = start + lengths[index]
            ids[row, start:end] = input_ids[index, : lengths[index]]
            positions[row, start:] = torch.arange(width - start, device=ids.device)
            where[index] = (row, end - 1)
            start = end
        if start < width:
            positions[row, start:] = torch.arange(width - start, device=ids.device)
    if packing == 4:  # of the text, and of its time, height and width: the first keeps texts apart
        positions = positions.expand(4, *positions.shape)
    row_of, end_of = map(torch.tensor, zip(*(where[index] for index in range(len(lengths))), strict=True))
    with only_rows(row_of, end_of):
        how = {"use_cache": False, **kwargs}
        states = language_model(input_ids=ids, position_ids=positions, **how).last_hidden_state
    # The layers, and so the hidden states, may be on another device than the ids
    return states[row_of.to(states.device), end_of.to(states.device)].unsqueeze(1)
