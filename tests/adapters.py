"""Adapters with weights that tests can tell apart from none."""

from __future__ import annotations

import math
from typing import Any

import torch


def draw_adapter(model: Any) -> None:
    """Gives an adapter weights that change every embedding."""
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_A" in name:
            weight.data.normal_(0, 1 / math.sqrt(weight.shape[1]))
        elif "lora_B" in name:
            weight.data.normal_(0, 0.1)
