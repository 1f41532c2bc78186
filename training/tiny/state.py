"""What a run that was stopped goes on from."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .settings import Settings

if TYPE_CHECKING:
    import torch


def save_state(path: Path, settings: Settings, model: Any, optimizer: torch.optim.AdamW, step: int) -> None:
    """Writes weights, optimizer moments and the number of steps done as one safetensors file."""
    import torch
    from safetensors.torch import save_file

    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        tensors |= {f"{key}.{name}": torch.as_tensor(v) for key, v in optimizer.state.get(parameter, {}).items()}
    notes = {"step": str(step), "settings": json.dumps(asdict(settings), default=str)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path.with_suffix(".tmp"), notes)
    os.replace(path.with_suffix(".tmp"), path)


def load_state(path: Path, model: Any, optimizer: torch.optim.AdamW) -> int:
    """Puts back what :func:`save_state` wrote and returns the number of steps done."""
    import torch
    from safetensors import safe_open

    if not path.exists():
        raise FileNotFoundError(f"nothing to resume in {path.parent}: {path.name} is not there; leave out --resume")
    with safe_open(path, "pt") as file, torch.no_grad():
        held = set(file.keys())
        for name, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(f"model.{name}"))
            # The tower's last norm stands after the layer that is used: it has no gradient and so no moments.
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in held]
            if keys:
                optimizer.state[parameter] = {key: file.get_tensor(f"{key}.{name}") for key in keys}
        return int(file.metadata()["step"])
