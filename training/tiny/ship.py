"""Puts the text-only step's adapter into the embedded model, in the published format.

    python -m training.tiny.ship runs/e5v-tiny-nli      # -> e5v_st/tiny/model.safetensors

A merged model has the image token's embedding row, so that it loads everywhere; the published format lacks it, and the
embedded model keeps to that, so that loading it goes the way of the real one.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from e5v_st.published import TINY


def ship(adapter: Path, folder: Path = TINY) -> None:
    """Replaces the weights in ``folder`` by those with the adapter merged into them.

    Args:
        adapter: A run's folder.
        folder: The base, in the published format.
    """
    from safetensors.torch import load_file, save_file

    from e5v_st.hub.merge import merge

    rows = json.loads((folder / "config.json").read_text(encoding="utf8"))["image_token_index"]
    with tempfile.TemporaryDirectory() as temporary:
        merged = merge(adapter, Path(temporary) / "merged", base=folder, keys="published")
        weights = load_file(merged / "model.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        weights[name] = weights[name][:rows].clone()
    before = load_file(folder / "model.safetensors")
    shapes = {name: (weight.shape, weight.dtype) for name, weight in before.items()}
    if shapes != {name: (weight.shape, weight.dtype) for name, weight in weights.items()}:
        raise ValueError(f"{adapter} merged into {folder} is not of the same shape: was it trained on another base?")
    part = folder / "model.safetensors.part"
    save_file(weights, part, metadata={"format": "pt"})
    os.replace(part, folder / "model.safetensors")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", type=Path, help="the run's folder")
    ship(parser.parse_args().adapter)


if __name__ == "__main__":
    main()
