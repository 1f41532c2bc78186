"""Reads a LoRA of any age and puts it on a model: all that its file holds, or nothing.

PEFT's own layers compute it. Which modules they replace, and with which rank and scale, is read from the weights and
the configuration together, since names in the configuration are those of the model that was trained: as of
``LlamaForCausalLM`` or of ``LlavaNextForConditionalGeneration``, while this is the model without its head.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash
from transformers.utils.peft_utils import find_adapter_config_file

from .upstream_e5v import NONE_IF_MISSING, NONE_IF_OFFLINE, note_adapter

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: What PEFT puts before the names of the modules that it trained.
PREFIX = "base_model.model."

#: Fields of an adapter's configuration that are handed to PEFT.
USED = (
    "bias",
    "init_lora_weights",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "r",
    "task_type",
    "use_dora",
    "use_rslora",
)
#: Fields that are translated to the names of this model's modules.
TRANSLATED = ("alpha_pattern", "modules_to_save", "rank_pattern", "trainable_token_indices")
#: Fields that choose modules, which the file's weights do, or that change no embedding.
UNUSED = (
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
)
#: Values of ``init_lora_weights`` that leave the base as it is, and those that change it, the same way at each loading.
#: Others change it by chance, or by data that the adapter does not hold.
INITIAL = (True, False, "eva", "gaussian", "orthogonal")
INITIAL_ON_BASE = ("olora", "pissa")

#: Parts of the names of an adapter's own weights in a model.
_OWN = (".lora_", ".modules_to_save.", ".token_adapter.trainable_tokens_delta")

#: Maps a module's name, see :func:`module_name`.
Rename = Callable[[str], str]

#: The parts of models of all families.
_PARTS = "language_model|text_model|vision_tower|vision_model|visual|multi_modal_projector|connector|embed_vision"
_NAMES = (
    (rf"^model\.(?=({_PARTS})\b)", ""),
    (r"^language_model\.model\b", "language_model"),  # of transformers before 4.52
    (r"^vision_tower\.vision_model\b", "vision_tower"),
    (r"^(model\.)?(?=layers\.|embed_tokens\b|norm\b)", "language_model."),  # of a language model alone
)


def module_name(name: str, language_model: str = "language_model") -> str:
    """Maps a module's name in any model that an adapter may have been trained on onto that in the model without head.

    Args:
        name: In a model with its head, of today's transformers or an older one, or in a language model alone.
        language_model: The name of the language model in the model without head; Idefics 3 calls it ``text_model``.
    """
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"^language_model\b", language_model, name)


def name_of_decoder(model: PreTrainedModel) -> str:
    """Returns the name of a model's language model."""
    decoder: Any = model.get_decoder()
    found: str = next(name for name, part in model.named_modules() if part is decoder)
    return found


class Base(NamedTuple):
    """The model that an adapter was trained on: a directory or hub id, and its revision, not that of the adapter."""

    name: str
    revision: str | None

    def arguments(self, of_adapter: Mapping[str, Any]) -> dict[str, Any]:
        """Returns arguments of ``from_pretrained`` that find the base, made from those that find the adapter."""
        return {**of_adapter, "revision": self.revision, "subfolder": ""}


def find_adapter(name: str, **hub: Any) -> dict[str, Any] | None:
    """Returns the configuration of the adapter in a directory or repository, or None if there is no adapter.

    Args:
        name: A directory or hub id.
        **hub: ``revision``, ``token`` and the like.
    """
    file = find_adapter_config_file(name, **_places(hub))
    return _read_settings(Path(file)) if file else None


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds a {type(settings).__name__}, want the fields of an adapter")
    return settings


def found_at(name: str, **hub: Any) -> dict[str, Any]:
    """Returns arguments of ``cached_file`` that find a checkpoint's files as they are now, in its cache."""
    places = {"cache_dir": hub["cache_dir"]} if hub.get("cache_dir") is not None else {}
    if Path(name).is_dir():
        return places
    commit = extract_commit_hash(cached_file(name, "config.json", **_places(hub)), None)
    return {**places, "revision": commit, "local_files_only": True}


def has_file(name: str, file: str, **hub: Any) -> bool:
    """Whether a directory or repository has a file; see :func:`find_adapter`."""
    return cached_file(name, file, **_places(hub), **NONE_IF_MISSING, **NONE_IF_OFFLINE) is not None


def fetch_adapter(name: str, **hub: Any) -> tuple[Path, Path]:
    """Returns the files of an adapter, configuration and weights; see :func:`find_adapter`.

    Raises:
        ValueError: If one is not there.
    """
    found = []
    for file in (CONFIG, WEIGHTS):
        try:
            found.append(Path(cached_file(name, file, **_places(hub))))
        except OSError as error:
            raise ValueError(f"{name} is not an adapter that can be loaded: {file} is not there ({error})") from error
    return found[0], found[1]


def _places(hub: Mapping[str, Any]) -> dict[str, Any]:
    names = ("cache_dir", "token", "revision", "subfolder", "local_files_only")
    return {name: hub[name] for name in names if hub.get(name) is not None}


def read_adapter(
    name: str, config: Path, weights: Path, language_model: str = "language_model"
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Reads an adapter.

    Args:
        name: What the user calls it, for messages.
        config: Its configuration.
        weights: Its weights.
        language_model: See :func:`module_name`.

    Returns:
        A configuration that targets the modules which the weights are for, by their full names in the model without
        head, and the weights under the names of that model.

    Raises:
        ValueError: If it is not a LoRA, its configuration has a field that is not known here, or a weight is not a
            number.
    """
    from peft import LoraConfig

    settings = _read_settings(config)
    check_settings(name, settings)
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights} cannot be read: {error}") from None
    broken = [key for key, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken or not tensors:
        raise ValueError(
            f"{name} cannot be loaded: {f'there are NaN in {broken[0]}' if broken else 'it has no weights'}"
        )
    keys = [key.removeprefix(PREFIX) for key in tensors]
    ranks = _find_ranks(tensors)
    rename = partial(module_name, language_model=language_model)
    translated = {
        **_find_scales(name, settings, ranks, rename),
        "modules_to_save": _find_saved(settings, keys, rename) or None,
        "trainable_token_indices": _find_token_indices(settings, keys, rename),
    }
    named = {rename(key): value for key, value in zip(keys, tensors.values(), strict=True)}
    if len(named) < len(tensors):
        raise ValueError(f"{name} has several weights for one place: {len(tensors)} are for {len(named)} places")
    used = {field: settings[field] for field in USED if settings.get(field) is not None}
    targets = sorted(map(rename, ranks))
    return LoraConfig(**used, **translated, target_modules=targets, inference_mode=True), named


def check_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Refuses an adapter that is not a LoRA, or whose configuration has a field whose meaning is not known here.

    Raises:
        ValueError: It names the field.
    """
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{name} is an adapter of the type {settings.get('peft_type')!r}, only LoRA can be loaded")
    initial = settings.get("init_lora_weights", True)
    if initial not in (*INITIAL, *INITIAL_ON_BASE):
        known = ", ".join(map(repr, (*INITIAL, *INITIAL_ON_BASE)))
        raise ValueError(
            f"{name} has init_lora_weights={initial!r}, whose change of the base cannot be repeated from the files; "
            f"known are {known}. Save it with PEFT's path_initial_model_for_weight_conversion"
        )
    for field, value in settings.items():
        if value and field not in (*USED, *TRANSLATED, *UNUSED):
            raise ValueError(f"{name} has {field}={value!r}, which is not supported: merge it with PEFT, and load that")


def _find_ranks(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Returns the module of each LoRA, named as in the model that was trained, and its rank."""
    found = {}
    for key, value in tensors.items():
        module, mark, _ = key.removeprefix(PREFIX).partition(".lora_A.")
        if not mark:
            module, mark, _ = key.removeprefix(PREFIX).partition(".lora_embedding_A")
        if mark:
            found[module] = value.shape[0]
    return found


def _find_scales(
    name: str, settings: Mapping[str, Any], ranks: Mapping[str, int], rename: Rename
) -> dict[str, dict[str, Any]]:
    """Returns the patterns of ranks and alphas, which PEFT matches with the names of the model that was trained.

    Raises:
        ValueError: If a rank is not that of the weights.
    """
    from peft.utils.other import get_pattern_key

    found: dict[str, dict[str, Any]] = {"rank_pattern": {}, "alpha_pattern": {}}
    for field, patterns in found.items():
        given = settings.get(field) or {}
        for module in ranks:
            key = get_pattern_key(given, module)
            if key in given:
                patterns["^" + re.escape(rename(module))] = given[key]
    for module, rank in ranks.items():
        said = found["rank_pattern"].get("^" + re.escape(rename(module)), settings.get("r", rank))
        if said != rank:
            raise ValueError(f"{name} has r={said} for {module}, but its weights have the rank {rank}")
    return found


def _find_saved(settings: Mapping[str, Any], keys: Iterable[str], rename: Rename) -> list[str]:
    """Returns the modules that the file holds whole; PEFT's names of them are ends of their full names."""
    ends = tuple(settings.get("modules_to_save") or ())
    found = set()
    for key in keys:
        parts = key.split(".")
        above = (".".join(parts[:size]) for size in range(1, len(parts)))
        module = next((name for name in above if ends and name.endswith(ends)), None)
        if module is not None:
            found.add(rename(module))
    return sorted(found)


def _find_token_indices(
    settings: Mapping[str, Any], keys: Iterable[str], rename: Rename
) -> dict[str, list[int]] | None:
    """Returns which rows of which embedding were trained; one without a name is that of the input."""
    indices = settings.get("trainable_token_indices")
    if not indices:
        return None
    modules = {key.partition(".token_adapter.")[0] for key in keys if ".token_adapter." in key}
    if isinstance(indices, list):
        return {rename(module): indices for module in modules}
    return {rename(module): indices[end] for module in modules for end in indices if module.endswith(end)}


def put_adapter(model: PreTrainedModel, config: LoraConfig, weights: dict[str, torch.Tensor], name: str) -> None:
    """Puts an adapter on a model, ready for inference and for saving.

    Args:
        model: The base.
        config: See :func:`read_adapter`.
        weights: See :func:`read_adapter`.
        name: What the user calls the adapter, for messages.

    Raises:
        ValueError: If the model has an adapter already, or a weight has no place or no counterpart in the file.
    """
    from peft import get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict

    if getattr(model, "peft_config", None):
        raise ValueError(f"{name} is for a model without adapter, but this one has one: merge that into its base first")
    if config.init_lora_weights in INITIAL_ON_BASE and getattr(model, "is_quantized", False):
        raise ValueError(
            f"{name} has init_lora_weights={config.init_lora_weights!r}, which changes the base's weights, but these "
            "are quantised: load it without quantize"
        )
    _check_places(model, weights, name)
    weights = _without_base(model, weights)
    try:
        inject_adapter_in_model(config, model)
        found: Any = set_peft_model_state_dict(model, weights)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name} does not fit: {error}") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of embeddings, which are in the file or not
        saved = get_peft_model_state_dict(model)
    # What would not be saved again belongs to no part that the configuration names
    lost = weights.keys() - saved.keys() | set(found.unexpected_keys)
    missing = [key for key in found.missing_keys if any(mark in key for mark in _OWN)]
    for problem, keys in (("belong to nothing that its configuration names", lost), ("are not in the file", missing)):
        if keys:
            raise ValueError(f"{name} does not fit: {len(keys)} weights {problem}, {', '.join(sorted(keys)[:3])}")
    note_adapter(model)
    model.eval()
    model.requires_grad_(False)


def _check_places(model: PreTrainedModel, weights: Mapping[str, torch.Tensor], name: str) -> None:
    """Raises ValueError for weights that belong to a module which the model does not have."""
    known = dict(model.named_modules())
    marks = (".lora_", ".token_adapter.", ".base_layer.")
    lost = []
    for key in weights:
        ends = [key.index(mark) for mark in marks if mark in key] or [key.rfind(".")]
        if key[: min(ends)] not in known:
            lost.append(key)
    if lost:
        raise ValueError(
            f"{name} does not fit: {len(lost)} of its {len(weights)} weights have no place in the model, "
            f"{', '.join(sorted(lost)[:3])}"
        )


def _without_base(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Leaves out the embeddings that PEFT saves beside a LoRA of them, where they are the base's own."""
    base = model.state_dict()
    found = dict(weights)
    for key in [key for key in weights if key.endswith(".base_layer.weight")]:
        own = base.get(key.replace(".base_layer.", "."))
        if own is not None and torch.equal(own.cpu(), weights[key].to(own.dtype)):
            del found[key]
    return found


def find_base(name: str, settings: Mapping[str, Any], **hub: Any) -> Base:
    """Returns the base that the adapter of a saved model names.

    Args:
        name: The saved model: a directory or hub id.
        settings: Its adapter's configuration.
        **hub: See :func:`find_adapter`.

    Raises:
        ValueError: If it names none, the base is itself an adapter, or the folder is not that of a saved model: PEFT's
            own holds no processor, and some hold the base too.
    """
    check_settings(name, settings)
    base = Base(settings.get("base_model_name_or_path") or "", settings.get("revision"))
    if not base.name or not has_file(name, "processor_config.json", **hub):
        what = "without the processor of a model" if base.name else "that does not name its base"
        raise ValueError(
            f"{name} is an adapter {what}: use adapter=, as e5v_st.load({base.name or 'base'!r}, adapter={name!r})"
        )
    if (Path(name) / "config.json").is_file():
        raise ValueError(
            f"{name} holds both an adapter and a model: load one with adapter=, the other from its own folder"
        )
    if find_adapter(base.name, **base.arguments(hub)) is not None:
        raise ValueError(f"the base {base.name} is itself an adapter: merge it into its own base first")
    return base


def load_adapter(model: PreTrainedModel, name: str, base: tuple[str, str | None], **hub: Any) -> None:
    """Reads an adapter, puts it on a model, and notes which: what is saved is loaded with that base again.

    Args:
        model: The base.
        name: A directory or hub id.
        base: Directory or hub id, and revision, that the model was loaded from.
        **hub: Where the adapter is; see :func:`find_adapter`.

    Raises:
        ValueError: If the adapter cannot be read, or not all of it has its place in the model.
    """
    config, weights = read_adapter(name, *fetch_adapter(name, **hub), name_of_decoder(model))
    put_adapter(model, config, weights, name)
    config.base_model_name_or_path, config.revision = base
