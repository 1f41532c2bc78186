"""sentence-transformers' own trainer, which leaves no half of a checkpoint where the disk is full."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformerTrainer


class Trainer(SentenceTransformerTrainer):
    """Says in one line, as an OSError, that a checkpoint could not be written, and removes what there is of it."""

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except Exception as error:  # torch and safetensors have errors of their own for a full disk
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise OSError(f"cannot write {folder}: {' '.join(str(error).split())}") from error
