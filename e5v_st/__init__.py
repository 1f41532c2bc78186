"""E5-V for sentence-transformers: one embedding space for texts, images, and images with a modification text."""

# Imported whenever Python starts (see autoload.py): nothing is imported here, not even __future__ or typing
__version__ = "0.1.0"

TYPE_CHECKING = False  # type checkers take it for true by its name
if TYPE_CHECKING:
    from .encoder import encode_all
    from .loading import load
    from .model.modeling_e5v import E5VTransformer
    from .model.prompts_e5v import PROMPTS
    from .ray_actor import E5VActor
    from .readout import words

_HOMES = {
    "E5VActor": "ray_actor",
    "E5VTransformer": "model.modeling_e5v",
    "PROMPTS": "model.prompts_e5v",
    "encode_all": "encoder",
    "load": "loading",
    "words": "readout",
}

__all__ = ["PROMPTS", "E5VActor", "E5VTransformer", "__version__", "encode_all", "load", "words"]


def __getattr__(name: str) -> object:
    """Imports a public name when somebody asks for it, and torch only then (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
