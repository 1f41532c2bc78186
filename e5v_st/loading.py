"""Loads a model: a published checkpoint, a saved model or an adapter, with this package's own code."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .devices import check_device
from .fastest import asks_fastest, load_fastest
from .files import locate
from .published import TINY, TINY_NAME, hub_places, load_modules
from .saved import read_arguments, read_modules, with_saved

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

#: The language model's linear layers: a bare list of names would hit the vision tower too.
LORA_TARGETS = r".*language_model\..*\.(q|k|v|o|gate|up|down)_proj"
#: The same in families whose language model has another name, or layers with a recurrent state.
_OTHER_LORA_TARGETS = r".*(language_model|text_model)\.layers\..*\.((q|k|v|o|gate|up|down)_proj|in_proj_\w+|out_proj)"


def lora_targets(transformer: Any) -> str:
    """Returns a pattern of the layers that a LoRA of a model is put on.

    Args:
        transformer: An ``E5VTransformer``.
    """
    return LORA_TARGETS if transformer.backbone.is_llava_next else _OTHER_LORA_TARGETS


def load(
    path_or_id: str | Path,
    *,
    backbone: str | None = None,
    chat_format: str | None = None,
    image_layout: str | None = None,
    max_image_tokens: int | None = None,
    adapter: str | Path | None = None,
    quantize: str | None = None,
    strings: str | None = None,
    **kwargs: Any,
) -> SentenceTransformer:
    """Loads an E5-V with this package's own code, whatever code its repository holds.

    Args:
        path_or_id: A directory or hub id: a published checkpoint (of E5-V, or a plain one of any family that
            ``e5v backbones`` lists), a saved model, or an adapter's repository. ``"e5v-tiny"`` is the small model that
            comes with this package, in float32 unless you say otherwise.
        backbone: ``"generic"`` takes a model of any other family, if it is causal; see ``model/probing_e5v.py``. By
            default the family is found by the checkpoint's files.
        chat_format: For such a model, what stands around a prompt, which is ``{}`` in it. By default, what its own chat
            template puts around a user's text.
        image_layout: ``"upstream"`` (current transformers) or ``"paper"`` (transformers 4.41.2, the paper's numbers).
            ``None`` takes the layout that the model was saved with, and ``"upstream"`` where it was saved with none.
            LLaVA-NeXT alone has layouts.
        max_image_tokens: About how many tokens an image takes at most, where the family can choose: more show finer
            detail, and take longer. ``None`` takes what the model was saved with, or else the family's default.
        adapter: A LoRA to put on the model: a directory or hub id, in PEFT's current form or as the published training
            script leaves it.
        quantize: ``"int8"``, ``"nf4"`` or ``"fp8"`` quantises the language model; see ``quantize.py``. What that
            changes is measured by ``probes.py``.
        strings: ``"auto"`` takes a bare string for an image if it is the path of an image file, an image URL or a
            ``data:image/`` address. ``"text"`` takes every bare string for a text, as a pipeline of texts should.
            ``None`` takes what the model was saved with, else ``"auto"``. The choice is saved with the model.
        **kwargs: Arguments of ``SentenceTransformer``. They take precedence over what a model was saved with: its
            prompts, default prompt, ``truncate_dim`` and similarity. With ``model_kwargs={"dtype": "fastest"}``,
            weights are in bfloat16 where this CPU computes it 1.5 times as fast as float32; see ``fastest.py``.

    Returns:
        A ``SentenceTransformer`` whose embeddings are L2-normalised. A model that was saved with other modules behind
        its transformer has those, as in ``SentenceTransformer(path, trust_remote_code=True)``.

    Raises:
        ValueError: If the model is of no known family; weights are missing, not finite, or not in safetensors; the
            library that quantises is not installed; there is no such path or device; or an argument would do nothing,
            as ``revision`` for a path.

    Example:
        >>> import e5v_st
        >>> model = e5v_st.load("e5v-tiny")
        >>> model.encode(["a dog", {"image": "dog.png"}, {"image": "dog.png", "text": "make it black"}]).shape
        (3, 192)
    """
    from sentence_transformers import SentenceTransformer

    from .model.items_e5v import check_strings
    from .model.prompts_e5v import PROMPTS
    from .model.published_e5v import recipe_of

    check_strings(strings or "auto")
    device = kwargs.get("device")
    check_device(device)
    if asks_fastest(kwargs.get("model_kwargs")):
        own: dict[str, Any] = {"backbone": backbone, "chat_format": chat_format, "image_layout": image_layout}
        own |= {"max_image_tokens": max_image_tokens, "adapter": adapter, "quantize": quantize, "strings": strings}
        return load_fastest(partial(load, path_or_id), **own, **kwargs)
    if kwargs.get("truncate_dim") is not None and kwargs["truncate_dim"] < 1:
        raise ValueError(f"got truncate_dim={kwargs['truncate_dim']}, want at least 1")
    kwargs = _renamed(kwargs)
    hub = {name: kwargs.pop(name) for name in list(kwargs) if name in _HUB_ARGUMENTS}
    where = TINY if path_or_id == TINY_NAME else locate(path_or_id) or path_or_id
    lora = adapter and (locate(adapter) or adapter)
    if hub.get("revision") is not None and Path(where).exists():
        raise ValueError(
            f"got the revision {hub['revision']!r} of {where}, which is a path: only hub ids have revisions"
        )
    hub["model_kwargs"] = _model_kwargs(hub.get("model_kwargs"), Path(where) == TINY, device, quantize)
    if backbone not in (None, "generic"):
        raise ValueError(
            f"got backbone={backbone!r}, want 'generic', or leave it out: families are found by themselves"
        )
    settings = {"image_layout": image_layout, "max_image_tokens": max_image_tokens}
    family = {"generic": True if backbone else None, "chat_format": chat_format, "recipe": recipe_of(str(path_or_id))}
    modules = load_modules(str(where), settings=settings, family=family, **hub)
    transformer: Any = modules[0]
    if strings is not None:
        transformer.strings = strings
    if lora is not None:
        _put_adapter(transformer.model, str(lora), str(where), hub)
    if hub["model_kwargs"].get("device_map") is not None:
        kwargs.setdefault("device", str(next(transformer.parameters()).device))
    places = hub_places(hub)
    saved = read_arguments(str(where), **places) if read_modules(str(where), **places) else {}
    return SentenceTransformer(modules=modules, **with_saved(kwargs, saved, PROMPTS))


def _renamed(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of ``load`` under today's names; raises ValueError for those that would do nothing."""
    if kwargs.get("backend") not in (None, "torch"):
        raise ValueError(f"got backend={kwargs['backend']!r}, but E5-V runs in torch alone: leave it out")
    kwargs = dict(kwargs)
    for old, new in _OLD_ARGUMENTS.items():
        _rename(kwargs, old, new)
    for name in ("model_kwargs", "config_kwargs"):
        if kwargs.get(name):
            kwargs[name] = dict(kwargs[name])
            _rename(kwargs[name], "torch_dtype", "dtype")
    return kwargs


def _rename(arguments: dict[str, Any], old: str, new: str) -> None:
    if old in arguments and arguments.get(new) is not None:
        raise ValueError(f"got {old} and {new}, which are one argument: give {new} alone")
    if old in arguments:
        arguments[new] = arguments.pop(old)


#: Names that sentence-transformers still takes for arguments -> those of today.
_OLD_ARGUMENTS = {"tokenizer_kwargs": "processor_kwargs", "use_auth_token": "token"}


def _model_kwargs(given: dict[str, Any] | None, is_tiny: bool, device: Any, quantize: str | None) -> dict[str, Any]:
    """Returns the arguments of ``from_pretrained``: what the user gave, over what fits the model and the device."""
    found: dict[str, Any] = {}
    if str(device).startswith("cpu"):  # there may be a GPU that the user does not want
        found["dtype"] = "auto"
    if is_tiny:
        found["dtype"] = "float32"
    found |= given or {}
    if quantize is not None:
        from .quantize import quantization

        found |= quantization(quantize, device, found.get("dtype"))
    return found


_HUB_ARGUMENTS = (
    "cache_folder",
    "config_kwargs",
    "local_files_only",
    "model_kwargs",
    "processor_kwargs",
    "revision",
    "token",
    "trust_remote_code",
)


def compile_layers(model: SentenceTransformer, **options: Any) -> None:
    """Puts every layer of the language model through ``torch.compile``.

    The parts of a layer are compiled one by one, since ``sharing_e5v`` runs them one by one. Equal parts compile once.

    Args:
        model: An E5-V.
        **options: Arguments of ``torch.compile``, such as ``backend``.
    """
    transformer: Any = model[0]
    for layer in transformer.model.get_decoder().layers:
        for part in layer.children():
            part.compile(dynamic=True, **options)


def _put_adapter(model: Any, adapter: str, base: str, hub: dict[str, Any]) -> None:
    from transformers.utils.hub import cached_file, extract_commit_hash

    from .model.adapter_e5v import load_adapter

    offloaded = [name for name, weight in model.named_parameters() if weight.device.type == "meta"]
    if offloaded:
        raise ValueError(
            f"no adapter can be put on a model whose device_map offloads weights ({len(offloaded)}, such as "
            f"{offloaded[0]}): merge it first (e5v merge), and load the merged model"
        )
    names = {"cache_dir": "cache_folder", "local_files_only": "local_files_only", "token": "token"}
    places = {name: hub[own] for name, own in names.items() if hub.get(own) is not None}
    if Path(base).is_dir():
        used = (str(Path(base).resolve()), None)
    else:
        file = cached_file(base, "config.json", revision=hub.get("revision"), **places)
        used = (base, extract_commit_hash(file, None))
    load_adapter(model, adapter, used, **places)
