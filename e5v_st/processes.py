"""Several processes of one job: which one this is, and which GPU is its own.

``accelerate launch`` and ``torchrun`` set ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``; without them there is one
process.
"""

from __future__ import annotations

import os


def rank() -> int:
    """Returns this process's number among all processes of the job."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Returns the number of processes of the job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Returns this process's number among those on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def own_device(device: str | None) -> str | None:
    """Returns the device of this process: a GPU of its own where there are several processes.

    Processes are dealt out to the GPUs in turn, so that more processes than GPUs share them. Of five processes and two
    GPUs, the processes 0, 2 and 4 take ``cuda:0``, and 1 and 3 take ``cuda:1``.

    Args:
        device: What the user wants. Only ``None`` and ``"cuda"`` leave the choice of the GPU to this function.

    Returns:
        ``device`` itself where the user chose, there is one process, or there is no GPU.
    """
    if world_size() == 1 or device not in (None, "cuda"):
        return device
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"cuda:{local_rank() % count}" if count else device
