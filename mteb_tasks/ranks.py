"""Several processes: each encodes a share of the rows, all get everything, and rank 0 writes.

Which process this one is says ``e5v_st/processes.py``.
"""

from __future__ import annotations

from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from e5v_st.processes import rank, world_size

if TYPE_CHECKING:
    import numpy as np

#: How long a rank waits for the others: shares of images of different sizes take different times.
PATIENCE = timedelta(days=1)


def share(rows: int) -> range:
    """Returns the rows of this process: one block, so that rows about the same image stay together."""
    size = -(-rows // world_size())
    return range(min(rank() * size, rows), min((rank() + 1) * size, rows))


def gather(part: np.ndarray, rows: int) -> np.ndarray:
    """Joins what the processes computed.

    Args:
        part: This process's share, float32 ``(len(share(rows)), d)``.
        rows: Number of rows of all processes together.

    Returns:
        ``(rows, d)``, the same in every process.
    """
    if world_size() == 1:
        return part
    import torch
    import torch.distributed as dist

    own = torch.zeros(-(-rows // world_size()), part.shape[1])
    own[: len(part)] = torch.from_numpy(part)
    parts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(parts, own, group=_group())
    return torch.cat(parts)[:rows].numpy()


@lru_cache
def _group() -> Any:
    """Joins the processes through gloo: what is gathered lies in main memory, whatever the device."""
    import torch.distributed as dist

    if dist.is_initialized():
        return dist.new_group(backend="gloo", timeout=PATIENCE)
    dist.init_process_group("gloo", timeout=PATIENCE)
    return dist.group.WORLD
