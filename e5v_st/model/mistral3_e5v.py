"""Mistral 3: an image of a single token, which the stock model cannot take alone.

Its model drops the first axis of what its projector returns, if that axis is 1 long. It means the axis of batches; but
the projector has dropped that already, and the axis is that of tokens. An image of 28 x 28 pixels or less, alone in its
batch, is one token, and then no axis of tokens is left. A hook gives the axis back that will be dropped::

    projector of two tokens    (2, d)                       squeeze(0) -> (2, d)
    projector of one token     (1, d)  hook -> (1, 1, d)    squeeze(0) -> (1, d), without the hook (d,)
"""

from __future__ import annotations

from typing import Any

import torch


def keep_single_tokens(model: Any) -> None:
    """Puts the hook on a Mistral 3 without its head; other models, and one without a projector, stay as they are."""
    if model.config.model_type == "mistral3" and getattr(model, "multi_modal_projector", None) is not None:
        model.multi_modal_projector.register_forward_hook(_keep_row)


def _keep_row(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    return output.unsqueeze(0) if output.shape[0] == 1 else output
