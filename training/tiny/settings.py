"""What one run of step one depends on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """What one run depends on."""

    output_dir: Path = Path("runs/tiny-step-one")
    steps: int = 2600
    seed: int = 0
    resume: bool = False
    lr: float = 1.5e-3
    warmup: int = 100
    weight_decay: float = 0.05
    triplets: int = 20
    singles: int = 40
    glosses: int = 40
    save_every: int = 200
    threads: int = 2
