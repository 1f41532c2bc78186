"""The output directory before a run: may it be written, is there room, and where does ``--resume`` continue?"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

#: Bytes for each trained weight in a checkpoint: the weight and Adam's two moments, in float32.
CHECKPOINT_BYTES = 12
#: The last file of a checkpoint.
TRAINER_STATE = "trainer_state.json"


def check_output(folder: Path, resume: bool) -> None:
    """Makes the output directory and tries it.

    Raises:
        OSError: If nothing can be written there.
        ValueError: If the checkpoints of an earlier run are there and this run is not to continue from them.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"0")
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write to the output directory {folder}: {error.strerror or error}") from error
    if not resume and last_checkpoint(folder) is not None:
        raise ValueError(
            f"{folder} has checkpoints of an earlier run: --resume continues it, or give another --output_dir"
        )


def check_space(folder: Path, weights: int, kept: int) -> None:
    """Raises OSError if the checkpoints of a run will not fit on the disk.

    Args:
        folder: Where they go.
        weights: Number of trained weights.
        kept: Maximum number of checkpoints on the disk at once, the one being written included.
    """
    needed, free = weights * CHECKPOINT_BYTES * kept + 2**26, shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"the disk of {folder} has {free / 2**30:.2f} GiB left, but {kept} checkpoints take "
            f"{needed / 2**30:.2f} GiB: free some, or keep fewer (--save_total_limit)"
        )


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the newest checkpoint that was written to its end.

    The trainer writes ``trainer_state.json`` last, so a checkpoint is whole where that file is:

        checkpoint-50/   adapter, optimizer, …, trainer_state.json whole    -> this one
        checkpoint-100/  adapter, optimizer, …, half a trainer_state.json   killed while writing
        checkpoint-150/  adapter                                            killed while writing
    """
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{TRAINER_STATE}") if _is_json(path)]
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf8"))
    except ValueError:
        return False
    return True
