"""sentence-transformers' own trainer, whose checkpoints are written once, and not by half where the disk is full."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformerTrainer


class Trainer(SentenceTransformerTrainer):
    """Says in one line, as an OSError, that a checkpoint could not be written, and removes what there is of it."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # sentence-transformers leaves it to transformers to call this in one process alone, but transformers 5 calls it
        # in all, which would write the same files at once. Only sharded weights (FSDP) need all to take part.
        if self.args.should_save or self.is_fsdp_enabled:
            super()._save(output_dir, state_dict)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except Exception as error:  # torch and safetensors have errors of their own for a full disk
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise OSError(f"cannot write {folder}: {' '.join(str(error).split())}") from error
