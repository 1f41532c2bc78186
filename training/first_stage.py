"""The adapter of an earlier training, as the beginning of the next: ``init_adapter``.

Its LoRA is trained on, not merged: rank, scale and layers stay what they are, and the result is an adapter of the same
base.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from e5v_st.files import locate
from e5v_st.fingerprint import ADAPTER, digest_files
from e5v_st.model.adapter_e5v import INITIAL_ON_BASE, fetch_adapter, name_of_decoder, put_adapter, read_adapter

logger = logging.getLogger(__name__)


def put_first_stage(transformer: Any, name: str, *, dropout: float, base: str) -> Any:
    """Puts the LoRA of an adapter on a model, to be trained on.

    Args:
        transformer: An ``E5VTransformer``, without adapter.
        name: A directory or hub id: an adapter of this package, of PEFT, or of the published script.
        dropout: Before the LoRA, in this training.
        base: What the model is called, for a warning if the adapter names another.

    Returns:
        The adapter's configuration.

    Raises:
        ValueError: If it is not a plain LoRA, or does not fit.
    """
    name = str(locate(name) or name)
    files = fetch_adapter(name)
    config, weights = read_adapter(name, *files, name_of_decoder(transformer.model))
    for field, plain in (("modules_to_save", None), ("trainable_token_indices", None), ("bias", "none")):
        if getattr(config, field) != plain:
            raise ValueError(
                f"{name} has {field}, want a LoRA alone to go on from: merge it (e5v merge), and train that"
            )
    if config.init_lora_weights in INITIAL_ON_BASE:
        raise ValueError(
            f"{name} has init_lora_weights={config.init_lora_weights!r}, which changes the base: merge it first "
            "(e5v merge), and train that"
        )
    named = _base_named(files[0])
    if named and not Path(named).exists() and not Path(base).exists() and named != base:
        logger.warning("%s was trained on %s, and is put on %s", name, named, base)
    config.lora_dropout = dropout
    put_adapter(transformer.model, config, weights, name)
    config.inference_mode = False
    for key, weight in transformer.model.named_parameters():
        weight.requires_grad_(".lora_" in key)
    return config


def _base_named(config: Path) -> str | None:
    import json

    found: str | None = json.loads(config.read_text(encoding="utf8")).get("base_model_name_or_path")
    return found


def describe_first_stage(name: str) -> str:
    """Returns what a card says of an adapter: its name, and a digest of its files."""
    folder = fetch_adapter(str(locate(name) or name))[0].parent
    return f"{name}, SHA-256 `{digest_files(folder / each for each in ADAPTER)}`"
