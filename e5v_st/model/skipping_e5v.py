"""What would be computed for nothing, and is left out by hooks that are put on a model once, when it is loaded.

1. *Layers of the vision tower behind those that are read.* LLaVA-1.5 and LLaVA-NeXT take the features of the last layer
   but one. The last layer stays in the model, as saved models and adapters have it, but is not run.
2. *Feed-forward networks of the last layer.* Of the language model's last layer, only each prompt's last token is read.
   The others give their keys and values there; their feed-forward and the projection behind attention are left out::

       tokens of two prompts     a b c | a d        read: c and d
       attention                 a b c | a d        all keys and values; its results are those of all
       o_proj, mlp               - - c | - d        of two tokens; zeros stand at the places of the others

3. *The language model, where the features of images alone are wanted.* See :func:`stop_at_the_door`.

What a hook does is said for a thread (a context variable), so several threads may use one model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

#: Parts of a layer whose results are those of each token alone, and go to that token's hidden state only.
_BY_TOKEN = ("self_attn.o_proj", "mlp")


@dataclass
class _Rows:
    """The tokens that are read: indexes of batch and token, and the shape of what a hook has cut."""

    where: tuple[torch.Tensor, torch.Tensor]
    shape: tuple[int, ...] = ()


class _StopError(Exception):
    """Ends the stock forward at the door."""


_read: ContextVar[_Rows | None] = ContextVar("read", default=None)
_caught: ContextVar[dict[str, Any] | None] = ContextVar("caught", default=None)


def prepare_skipping(model: Any, *, known: bool) -> None:
    """Puts the hooks on a model.

    Args:
        model: A family's model without its head.
        known: Whether its layers are those of a known family; others may have networks that look at several tokens.
    """
    decoder = model.get_decoder()
    decoder.register_forward_pre_hook(_stop, with_kwargs=True)
    if not known:
        return
    for layer in unread_layers(model):
        layer.forward = _hand_on
    for name in _BY_TOKEN:
        part = _find(decoder.layers[-1], name)
        if part is not None:
            part.register_forward_pre_hook(_cut)
            part.register_forward_hook(_fill)


def _find(module: Any, name: str) -> Any:
    """Returns a module by its dotted name, or ``None``."""
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


# ---- layers of the tower ----


def count_layers_read(config: Any) -> float:
    """Returns how many of the tower's layers a LLaVA reads features from; in other families all, infinitely many.

    Features are those of layer -2 in LLaVA-1.5 and LLaVA-NeXT: what stands behind it has no effect, nor a gradient.

    Args:
        config: The model's.

    Example:
        >>> from transformers import LlavaNextConfig
        >>> count_layers_read(LlavaNextConfig())  # of CLIP-L's 24
        23
    """
    chosen = getattr(config, "vision_feature_layer", None)
    layers = getattr(config.vision_config, "num_hidden_layers", None) if chosen is not None else None
    if chosen is None or layers is None:
        return float("inf")
    every = [chosen] if isinstance(chosen, int) else chosen
    return max(layer if layer >= 0 else layers + 1 + layer for layer in every)


def unread_layers(model: Any) -> list[Any]:
    """Returns the layers of a model's tower that stand behind those whose features are read."""
    read = count_layers_read(model.config)
    tower = getattr(model, "vision_tower", None)
    if tower is None or read == float("inf"):
        return []
    count = model.config.vision_config.num_hidden_layers
    stacks = (each for each in tower.modules() if isinstance(each, torch.nn.ModuleList) and len(each) == count)
    return list(next(stacks, ()))[int(read) :]


def _hand_on(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The forward of a layer that is not run."""
    return hidden_states


# ---- tokens of the last layer ----


@contextmanager
def only_rows(rows: torch.Tensor, tokens: torch.Tensor) -> Iterator[None]:
    """While it is open, this thread reads some tokens' last hidden states alone; those of the others are undefined.

    Nothing is left out where gradients are asked for, as layers may then be run again later, nor in training.

    Args:
        rows: Of the batch ``(n,)``.
        tokens: The token of each ``(n,)``.
    """
    if len(rows) == 1:
        # Twice: the last bits of a product of one row depend on where its weights lie, and so on how they were loaded
        rows, tokens = rows.repeat(2), tokens.repeat(2)
    token = _read.set(None if torch.is_grad_enabled() else _Rows((rows, tokens)))
    try:
        yield
    finally:
        _read.reset(token)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # other tokens in every batch
def _cut(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    rows = _rows_of(module)
    if rows is None:
        return None
    rows.shape = args[0].shape
    return (args[0][_on(rows, args[0])].unsqueeze(0), *args[1:])


@torch.compiler.disable  # type: ignore[untyped-decorator]  # other tokens in every batch
def _fill(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
    rows = _rows_of(module)
    if rows is None:
        return None
    filled = output.new_zeros(*rows.shape[:-1], output.shape[-1])
    filled[_on(rows, output)] = output[0]
    return filled


def _rows_of(module: Any) -> _Rows | None:
    """Returns what is read; ``None`` in training, where dropout must draw alike with and without gradients."""
    return None if module.training else _read.get()


def _on(rows: _Rows, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(index.to(states.device) for index in rows.where)


# ---- the door of the language model ----


def stop_at_the_door(model: Any, **inputs: Any) -> dict[str, Any]:
    """Returns what a stock model passes to its language model, which is not run.

    Args:
        model: A family's model without its head.
        **inputs: Its arguments.
    """
    caught: dict[str, Any] = {}
    token = _caught.set(caught)
    try:
        model(**inputs)
    except _StopError:
        pass
    finally:
        _caught.reset(token)
    return caught


@torch.compiler.disable  # type: ignore[untyped-decorator]  # other tokens in every batch
def _stop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    caught = _caught.get()
    if caught is not None:
        caught.update(kwargs)
        raise _StopError
