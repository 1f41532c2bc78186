"""What stands behind the transformer in a model, and which hidden states that wants."""

from __future__ import annotations

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, WeightedLayerPooling


def pools_last_tokens(model: SentenceTransformer) -> bool:
    """Whether a model reads nothing but each input's last hidden state, which can be computed without the others."""
    return len(model) > 1 and isinstance(model[1], Pooling) and model[1].pooling_mode == "lasttoken"


def check_modules(model: SentenceTransformer) -> None:
    """Refuses modules that would read what an E5-V does not compute, and say nothing.

    Raises:
        ValueError: If there is a pooling over all layers, or over what is not the prompt.
    """
    for module in model:
        if isinstance(module, WeightedLayerPooling):
            raise ValueError(
                "the model has a WeightedLayerPooling, which wants the hidden states of all layers, but E5-V computes "
                "those of the last layer alone: remove the module"
            )
        if isinstance(module, Pooling) and not module.include_prompt and module.pooling_mode != "lasttoken":
            raise ValueError(
                f"the pooling {module.pooling_mode!r} has include_prompt=False, but E5-V's prompts stand around the "
                "text, not ahead of it: set include_prompt=True"
            )
