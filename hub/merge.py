"""Merges an adapter into the weights of its base, tensor by tensor, with PEFT's own arithmetic."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e5v_st.files import read_json
from e5v_st.model.published_e5v import recipe_of
from e5v_st.saved import TRANSFORMER_SETTINGS

from .card import Card, write_card
from .export import (
    check_checkpoint,
    check_native,
    is_llava_next,
    write_merged,
    write_native_processor,
    write_repaired,
)
from .folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, base_of, copy_small_files, fetch, new_folder, weight_files
from .keys import plain, rename
from .options import add_base, add_native, add_out
from .st_files import ST_FILES, write_st_files
from .tensors import SHARD_SIZE, Tensors

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

#: module name -> the end of a weight's name (``lora_A.weight``) -> the weight
Parts = dict[str, dict[str, "torch.Tensor"]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``e5v merge``."""
    parser.add_argument("adapter", help="folder or hub id of the adapter")
    add_out(parser)
    add_base(parser)
    parser.add_argument(
        "--keys", choices=("published", "current"), help="names of the weights (default: those of the base)"
    )
    add_native(parser)
    parser.add_argument("--push", metavar="USER/NAME", help="upload the result there, as push does")


def run(args: argparse.Namespace) -> int:
    """Runs ``e5v merge``."""
    print(merge_and_push(**vars(args)))
    return 0


def merge(
    adapter: str | Path,
    out: str | Path,
    base: str | Path | None = None,
    keys: str | None = None,
    native: bool = False,
    shard_size: int = SHARD_SIZE,
) -> Path:
    """Writes a model whose embeddings are those of the adapter on its base.

    Reads one tensor at a time, so that memory holds one shard of the result. The sum is taken in float32 and rounded
    once to the base's dtype. The result loads in plain transformers too: of LLaVA-NeXT, embedding row and processor are
    repaired.

    Args:
        adapter: A directory or hub id, in PEFT's current form or as the published training script leaves it.
        out: The new folder.
        base: What the adapter was trained on, ``id@revision`` for a certain revision. By default, what the adapter's
            configuration says.
        keys: ``"published"`` or ``"current"`` names of LLaVA-NeXT's weights (see ``hub.keys``); by default the base's.
        native: Without custom code; see ``hub.export``.
        shard_size: Maximum number of bytes in a file of weights.

    Returns:
        ``out``.

    Raises:
        ValueError: If the base is not known, or has no place for a weight of the adapter, or its family has no native
            form or no other names of weights.
    """
    from e5v_st.model import adapter_e5v

    if not (fetch(adapter, weights=False) / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{adapter} is not an adapter: it has no {ADAPTER_CONFIG}")
    source = fetch(adapter)
    settings = read_json(source / ADAPTER_CONFIG)
    base, revision = base_of(settings, base)
    if not base:
        raise ValueError(f"{adapter} does not say what it was trained on: name it with --base")
    adapter_e5v.check_settings(str(adapter), settings)
    small = fetch(base, revision, weights=False)
    own = source if (source / TRANSFORMER_SETTINGS).is_file() else None
    check_checkpoint(small, base, own)
    if native:
        check_native(small, base, own)
    repaired = is_llava_next(small)
    if keys and not repaired:
        raise ValueError(f"got keys={keys!r}, but only weights of LLaVA-NeXT have other names: leave it out")
    language_model = "language_model" if repaired else find_decoder(small)
    parts, config = read_adapter(source, language_model)
    folder_of_base = fetch(base, revision)
    with new_folder(out) as folder:
        copy_small_files(folder_of_base, folder, without=ST_FILES)

        def change(tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
            for key, tensor in add_adapter(tensors, parts, config, language_model):
                yield rename(key, keys) if keys else key, tensor

        (write_repaired if repaired else write_merged)(folder, weight_files(folder_of_base), change, shard_size)
        if native:
            write_native_processor(folder)
        write_st_files(folder, native=native, saved=own or folder_of_base, recipe=recipe_of(base))
        card = Card(repo_id=Path(out).name, base=base, base_revision=revision, adapter=str(adapter), ask_base=True)
        write_card(folder, card, source)
    return Path(out)


def merge_and_push(adapter: str, out: str, push: str | None = None, **options: Any) -> str:
    """Merges, and uploads the result where ``push`` names a repository; see :func:`merge` and ``hub.push``."""
    from .push import check_target
    from .push import push as upload

    if push:
        check_target(push)
    folder = merge(adapter, out, **options)
    try:
        return upload(folder, push) if push else str(folder)
    except ValueError as error:
        raise ValueError(f"{error}; the merged model is in {folder}, `push` uploads it") from None


def find_decoder(folder: Path) -> str:
    """Returns the name of the language model in the model of a checkpoint; no weight is read."""
    import torch
    from transformers import AutoConfig, AutoModel

    from e5v_st.model.adapter_e5v import name_of_decoder

    with torch.device("meta"):
        return name_of_decoder(AutoModel.from_config(AutoConfig.from_pretrained(folder)))


def read_adapter(folder: Path, language_model: str = "language_model") -> tuple[Parts, LoraConfig]:
    """Reads a LoRA of any age.

    Args:
        folder: The adapter's.
        language_model: The name of the language model in the model without head.

    Returns:
        Its weights by the module that they belong to (named as in the model without head), and its configuration.

    Raises:
        ValueError: If it is not a LoRA in safetensors, or has weights that are not LoRA's.
    """
    from e5v_st.model import adapter_e5v

    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {ADAPTER_WEIGHTS}: want the adapter in safetensors (pickles are not read)")
    files = (folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS)
    config, weights = adapter_e5v.read_adapter(str(folder), *files, language_model)
    if config.lora_bias:
        raise ValueError(f"{folder} has lora_bias=True, whose biases have no place in the merged model")
    parts: Parts = {}
    for key, tensor in weights.items():
        name, mark, part = key.partition(".lora_")
        if not mark or part.startswith("embedding"):
            raise ValueError(f"{folder} has a weight that is not LoRA's of a linear layer and cannot be merged: {key}")
        parts.setdefault(name, {})["lora_" + part] = tensor
    return parts, config


def add_adapter(
    tensors: Tensors, parts: Parts, config: LoraConfig, language_model: str = "language_model"
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the base's tensors, with the adapter added to those that it changes.

    Args:
        tensors: The base's, under the names in its files.
        parts: See :func:`read_adapter`.
        config: Likewise.
        language_model: Likewise.

    Raises:
        ValueError: After the last tensor, if a weight of the adapter had no place.
    """
    from e5v_st.model.adapter_e5v import module_name

    left = dict(parts)
    for key, tensor in tensors:
        name = module_name(plain(key).removesuffix(".weight"), language_model)
        lora = left.pop(name, None) if key.endswith(".weight") else None
        yield key, tensor if lora is None else _merged(name, tensor, lora, config)
    if left:
        raise ValueError(f"the adapter does not fit its base: there is no {sorted(left)[0]} ({len(left)} like this)")


def _merged(name: str, weight: torch.Tensor, lora: dict[str, torch.Tensor], config: LoraConfig) -> torch.Tensor:
    """Lets PEFT merge one linear layer, because PEFT knows every variant of LoRA.

    The layer stands in a model of its own, at the same place as in the real one: rank patterns go by its name.
    """
    import torch
    from peft import inject_adapter_in_model, set_peft_model_state_dict

    if weight.dim() != 2:
        raise ValueError(f"the adapter changes {name}, which is not a linear layer: it cannot be merged")
    root, (*parents, last) = torch.nn.Module(), name.split(".")
    with torch.device("meta"):
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
    holder = root
    for parent in parents:
        holder.add_module(parent, torch.nn.Module())
        holder = holder.get_submodule(parent)
    holder.add_module(last, linear)

    config = copy(config)
    config.target_modules = {name}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of rank patterns that are for other layers
        inject_adapter_in_model(config, root)
    found: Any = set_peft_model_state_dict(
        root, {f"base_model.model.{name}.{part}": tensor.float() for part, tensor in lora.items()}
    )
    if found.unexpected_keys or any("lora_" in key for key in found.missing_keys):
        raise ValueError(f"the adapter's weights of {name} do not fit its configuration: {sorted(lora)}")
    layer = holder.get_submodule(last)
    layer.merge(safe_merge=True)
    return layer.get_base_layer().weight.detach().to(weight.dtype)
