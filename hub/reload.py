"""Loads a model in this process and writes its embeddings of a few fixed inputs; run by path, as a program.

python -P reload.py FOLDER OUT.npy         as anybody would: with sentence-transformers, without this package
python -P reload.py FOLDER OUT.npy --own   with e5v_st's loader, whatever code the folder holds
"""

from __future__ import annotations

import sys
from typing import Any

PACKAGES = ("e5v_st",)
TEXTS = ("A dog sits in the grass.", "", "Two men play chess in a park while it rains.", "12 × 3 = 36?")
CHANGE = "make it darker"


class Blocker:
    """Makes an installed copy of this project's packages look absent."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """See ``importlib.abc.MetaPathFinder``."""
        if name.split(".")[0] in PACKAGES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def load(folder: str, own: bool) -> Any:
    """Loads the model in ``folder``."""
    if own:
        import e5v_st

        return e5v_st.load(folder)
    sys.meta_path.insert(0, Blocker())
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(folder, trust_remote_code=True)


def inputs() -> list[Any]:
    """Texts, images of several shapes, and an image with a change described in words."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0)
    shapes = ((60, 80), (200, 60), (64, 64))
    images = [Image.fromarray(noise.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]
    return [*TEXTS, *images, {"image": images[0], "text": CHANGE}]


def main(folder: str, out: str, *flags: str) -> None:
    """Writes float32 ``(n, d)`` to ``out``."""
    import numpy as np

    model = load(folder, own="--own" in flags)
    items = inputs()
    np.save(out, np.concatenate([model.encode([item]) for item in items]), allow_pickle=False)
    print(str(next(model.parameters()).dtype))


if __name__ == "__main__":
    main(*sys.argv[1:])
