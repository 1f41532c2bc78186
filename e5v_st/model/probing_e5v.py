"""Whether the recipe can run on a model of which nothing is known: three questions that are asked when it is loaded.

E5-V reads the state of a prompt's last token. That is an embedding of the prompt alone only if nothing behind a token
changes its state. So a causal model is wanted, and padding on the right must not matter::

    causal      A B C D E     the states of A B C are the same
                A B C X Y
    padding     A B C         the state of C is the same
                A B C - -
    packing     A B C D E     if positions start again at D, its state is that of D at the start
                0 1 2 0 1

The first two must hold. The third decides whether texts are packed into one row.
"""

from __future__ import annotations

from typing import Any

import torch

#: By how much states may differ, relative to their size: rounding in 16 bits, and nothing more.
TOLERANCE = 0.02


@torch.inference_mode()
def check_causal(model: Any, vocabulary: int, name: str) -> None:
    """Raises ValueError if a model's states depend on what stands behind them, or on padding.

    Args:
        model: A multimodal model without its head.
        vocabulary: Number of tokens that are read; some of them are tried.
        name: Of the checkpoint, for messages.
    """
    ids, others = _draw(vocabulary, 12, 1), _draw(vocabulary, 12, 2)
    changed = torch.cat([ids[:, :8], others[:, 8:]], dim=1)
    if _differ(_states(model, ids)[:, :8], _states(model, changed)[:, :8]):
        raise ValueError(
            f"{name} is not causal: what stands behind a token changes its state, so there is no last state of a "
            "prompt, and E5-V cannot use it"
        )
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    padded = _states(model, ids, attention_mask=mask)[:, 7]
    if _differ(padded, _states(model, ids[:, :8])[:, -1]):
        raise ValueError(f"{name} gives other states with padding on the right, which E5-V needs for batches")


@torch.inference_mode()
def can_pack(language_model: Any, vocabulary: int) -> bool:
    """Whether texts in one row keep apart if their positions start again."""
    ids = _draw(vocabulary, 10, 3)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]])
    try:
        together = _states(language_model, ids, position_ids=positions)[:, 6:]
        alone = _states(language_model, ids[:, 6:])
    except (TypeError, ValueError, RuntimeError):
        return False
    return not _differ(together, alone)


def _draw(vocabulary: int, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary // 4, vocabulary // 2, (1, count), generator=generator)


def _states(model: Any, ids: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
    moved = {name: value.to(model.device) for name, value in {"input_ids": ids, **given}.items()}
    found: torch.Tensor = model(**moved, use_cache=False).last_hidden_state
    return found.float()


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() > TOLERANCE * one.abs().max())
