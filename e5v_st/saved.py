"""What a saved model says of itself: the modules behind its transformer, and its prompts.

::

modules.json                        the modules, each with its class and its folder; the transformer is the first
sentence_bert_config.json           settings of the transformer
config_sentence_transformers.json   prompts, default prompt, number of dimensions, similarity
1_Pooling/, 2_Dense/ …              settings and weights of the modules behind it

A published checkpoint has none of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

MODULES = "modules.json"
MODEL_SETTINGS = "config_sentence_transformers.json"
TRANSFORMER_SETTINGS = "sentence_bert_config.json"
#: Modules of sentence-transformers that may stand behind the transformer -> the files that they are loaded from.
KINDS = {
    "Pooling": ("config.json",),
    "Normalize": (),
    "Dense": ("config.json", "model.safetensors"),
    "LayerNorm": ("config.json", "model.safetensors"),
    "Dropout": ("config.json",),
}
#: What a model's settings say that are arguments of ``SentenceTransformer``, besides its prompts.
ARGUMENTS = ("default_prompt_name", "truncate_dim", "similarity_fn_name")


def read_modules(model: str | Path, **hub: Any) -> list[dict[str, Any]]:
    """Returns what a model's ``modules.json`` lists; nothing where there is none.

    Args:
        model: A directory or hub id.
        **hub: ``revision``, ``token``, ``cache_folder`` and ``local_files_only``.

    Raises:
        ValueError: If it is not a list of modules of an E5-V, or one's folder is outside the model's.
    """
    modules = _read(model, MODULES, hub)
    file = Path(model) / MODULES
    if modules is None:
        return []
    if not (isinstance(modules, list) and modules and all(map(_is_module, modules))):
        raise ValueError(f"{file} does not list modules, each with its path and type")
    for module in modules:
        path = PurePosixPath(module["path"])
        if path.is_absolute() or ".." in path.parts or "\\" in module["path"]:
            raise ValueError(f"{file} names {module['path']!r}, which is outside the folder: refused")
    for place, module in enumerate(modules):
        if not (_is_later(module["type"]) if place else _is_transformer(module["type"])):
            raise ValueError(
                f"{file} names {module['type']!r}, which is not a module of an E5-V: want a transformer and behind it "
                f"{', '.join(KINDS)} of sentence-transformers"
            )
    return modules


def _is_module(module: Any) -> bool:
    return isinstance(module, Mapping) and all(isinstance(module.get(name), str) for name in ("path", "type"))


def _is_transformer(kind: str) -> bool:
    own = kind.rpartition(".")[2]
    return own == "E5VTransformer" or (own == "Transformer" and kind.startswith("sentence_transformers."))


def _is_later(kind: str) -> bool:
    return kind.startswith("sentence_transformers.") and kind.rpartition(".")[2] in KINDS


def later_files(modules: Sequence[Mapping[str, Any]], *, needed: bool = False) -> list[str]:
    """Returns the files of the modules behind the transformer, as seen from the model's folder.

    Args:
        modules: What :func:`read_modules` returned.
        needed: Only those that no version of sentence-transformers leaves out.
    """
    found = [(module["path"], KINDS[module["type"].rpartition(".")[2]]) for module in modules[1:]]
    return [
        str(PurePosixPath(path, name))
        for path, names in found
        for name in names or (() if needed else ("config.json",))
    ]


def saved_files(folder: Path) -> list[Path]:
    """Returns the files in a model's folder that say what its modules and prompts are."""
    later = later_files(read_modules(folder))
    return [folder / name for name in (MODULES, MODEL_SETTINGS, *later)]


def load_later(model: str, modules: Sequence[Mapping[str, Any]], **hub: Any) -> list[nn.Module]:
    """Loads the modules behind the transformer, with sentence-transformers' own code.

    Args:
        model: A directory or hub id.
        modules: What :func:`read_modules` returned.
        **hub: See there.

    Raises:
        ValueError: If a file is missing, or an activation function is not one of torch's.
    """
    from sentence_transformers.sentence_transformer import modules as library
    from sentence_transformers.util import load_file_path

    found = []
    for module in modules[1:]:
        path, kind = module["path"], module["type"].rpartition(".")[2]
        for name in KINDS[kind]:
            if load_file_path(model, name, subfolder=path, **hub) is None:
                raise ValueError(f"{model} has no {path}/{name}, which {MODULES} asks for (pickles are not read)")
        activation = (_read(model, f"{path}/config.json", hub) or {}).get("activation_function")
        if kind == "Dense" and not str(activation or "torch.").startswith("torch."):
            raise ValueError(f"{model}/{path} names the activation function {activation!r}, want one of torch")
        found.append(getattr(library, kind).load(model, subfolder=path, **hub))
    return found


def read_arguments(model: str | Path, **hub: Any) -> dict[str, Any]:
    """Returns a saved model's prompts and other arguments of ``SentenceTransformer``; see :func:`read_modules`.

    Raises:
        ValueError: If its prompts are not strings by name.
    """
    settings = _read(model, MODEL_SETTINGS, hub)
    if settings is None:
        return {}
    prompts = settings.get("prompts") or {} if isinstance(settings, Mapping) else None
    if not (isinstance(prompts, Mapping) and all(isinstance(prompt, str) for prompt in prompts.values())):
        raise ValueError(f"{Path(model) / MODEL_SETTINGS} holds no prompts by name")
    known = {name: settings[name] for name in ARGUMENTS if settings.get(name) is not None}
    return {"prompts": dict(prompts), **known}


def with_saved(given: Mapping[str, Any], saved: Mapping[str, Any], prompts: Mapping[str, str]) -> dict[str, Any]:
    """Returns arguments of ``SentenceTransformer``: what the user gave, over what the model was saved with.

    Args:
        given: By the user.
        saved: See :func:`read_arguments`.
        prompts: Those that every E5-V has.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    named = {**prompts, **saved.get("prompts", {}), **(chosen.get("prompts") or {})}
    return {**given, **saved, **chosen, "prompts": named}


def read_transformer_settings(model: str | Path, names: Iterable[str], **hub: Any) -> dict[str, Any]:
    """Returns what a saved model's transformer was set to, as far as it is among ``names``."""
    settings = _read(model, TRANSFORMER_SETTINGS, hub) or {}
    return {name: settings[name] for name in names if name in settings}


def _find(model: str | Path, name: str, hub: Mapping[str, Any]) -> Path | None:
    if Path(model).is_dir():  # without the seconds that sentence-transformers takes to be imported
        return Path(model, name) if Path(model, name).is_file() else None
    from sentence_transformers.util import load_file_path

    file = load_file_path(str(model), name, **hub)
    return None if file is None else Path(file)


def _read(model: str | Path, name: str, hub: Mapping[str, Any]) -> Any:
    file = _find(model, name, hub)
    if file is None:
        return None
    try:
        return json.loads(file.read_text(encoding="utf8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
