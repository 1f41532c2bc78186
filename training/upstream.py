"""Private names of other libraries that the training relies on, for lack of a public way.

``tests/test_upstream.py`` looks for each of them, so that a new version without one fails by its name.
"""

from __future__ import annotations

from typing import Any

#: (module:attribute.path, reason and what happens without it)
PRIVATE_NAMES = (
    (
        "transformers:Trainer._save_checkpoint",
        "trainer.py overrides it to remove half a checkpoint from a full disk; without it the half stays, which "
        "--resume passes over, and the error has several lines",
    ),
    (
        "transformers:Trainer._save",
        "trainer.py overrides it so that one process of several writes a checkpoint; without it all write the same "
        "files at once, and read each other's halves",
    ),
    (
        "transformers:PreTrainedModel._keys_to_ignore_on_load_unexpected",
        "model.py names the weights of the vision tower there; without it they are logged as unexpected, one by one",
    ),
    (
        "transformers:PreTrainedModel._init_weights",
        "model.py overrides it, since the weights of the vision tower are not there to be drawn; without it a model "
        "for texts alone cannot be loaded",
    ),
    (
        "sentence_transformers.base.modules:Transformer._load_encoder_only_model",
        "model.py returns the model without vision tower from it; without it the tower is loaded too",
    ),
    (
        "sentence_transformers:SentenceTransformer._load_with_module_classes",
        "model.py overrides what the trainer reads a checkpoint with; without it --resume and early stopping load a "
        "second copy of the base, and fail on the names of its weights",
    ),
    (
        "transformers:PreTrainedModel._set_gradient_checkpointing(_gradient_checkpointing_func)",
        "images.py asks how a layer is checkpointed; without it, training on images with use_reentrant=True ends with "
        "an error",
    ),
)


def is_reentrant(layer: Any) -> bool:
    """Whether a layer is checkpointed in the old way, which wants all that has a gradient as its arguments."""
    function = getattr(layer, "_gradient_checkpointing_func", None)
    return bool(getattr(function, "keywords", {}).get("use_reentrant"))
