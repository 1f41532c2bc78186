"""Whether this machine has a device, asked before anything is loaded."""

from __future__ import annotations

from typing import Any


def check_device(device: Any) -> None:
    """Refuses a device that torch does not know, or that is not here.

    Args:
        device: What torch takes as a device. ``None`` leaves the choice to others, and is never refused.

    Raises:
        ValueError: If no model can be loaded on it.
    """
    if device is None:
        return
    import torch

    try:
        wanted = torch.device(device)
        backend = torch.get_device_module(wanted)
    except RuntimeError:
        raise ValueError(f"got the device {device!r}, want cpu, cuda, cuda:1, mps or xpu") from None
    if not backend.is_available():
        built = wanted.type != "cuda" or torch.version.cuda or torch.version.hip
        why = "torch finds none on this machine" if built else f"torch {torch.__version__} is built without CUDA"
        raise ValueError(f"got the device {device!r}, but {why}: want cpu, or leave it out")
    count = backend.device_count()
    if (wanted.index or 0) >= count:
        raise ValueError(f"got the device {device!r}, but there are only {count} here, counted from {wanted.type}:0")
