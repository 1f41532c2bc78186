"""Model entries: E5-V in both image layouts, the small model, and any other E5-V, of any family.

mteb's built-in ``royokong/e5-v`` refuses current transformers, does not normalise, and has a stray ``[INST]`` in its
composed prompt. The entry here takes its place.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import Licenses

from e5v_st.model_files import licence, revision_of, sizes
from e5v_st.provenance import base_of, check_name, find_folder
from e5v_st.published import TINY_NAME

from .metadata import E5V_CITATION
from .other_models import FACTS
from .prompting import read_choices

if TYPE_CHECKING:
    from .encoder import E5VEncoder

PUBLISHED = "royokong/e5-v"
REVISION = "0c1f22679417b3ae925d779442221c40cd1861ab"
#: Settings that change embeddings, and so are part of an entry's name; and those that do not.
TELLING = ("adapter", "dtype", "embed_dim", "image_layout", "max_image_tokens", "normalize", "prompts", "quantize")
#: Settings that are what they would be anyhow.
USUAL = (("prompts", None), ("normalize", True))
SETTINGS = ("path", "commit", "batch_tokens", "store", *TELLING)


class E5VMeta(ModelMeta):
    """A model entry that needs nothing beyond this package: mteb would want torchvision for images."""

    def _resolve_extras_groups(self) -> list[str]:
        return []

    def load_model(self, device: str | None = None, *, embed_dim: int | None = None, **settings: Any) -> E5VEncoder:
        """Loads the encoder; its entry holds the commits that were loaded, and the sizes.

        Args:
            device: Of torch.
            embed_dim: Leading dimensions of the embeddings to keep.
            **settings: See :meth:`with_settings`, which takes ``embed_dim`` as well.
        """
        if embed_dim is not None or settings:
            return self.with_settings(embed_dim=embed_dim, **settings).load_model(device)
        encoder = super().load_model(device)
        meta = encoder.mteb_model_meta
        facts = _known_facts(meta.loader_kwargs, meta.name, meta.revision, loaded=True)
        encoder.mteb_model_meta = meta.model_copy(update=facts)
        return encoder

    def with_settings(self, **settings: Any) -> ModelMeta:
        """Returns the entry of this model with other settings: another name where they change embeddings.

        Args:
            **settings: Arguments of :func:`load_e5v`; those that are ``None`` change nothing.

        Raises:
            TypeError: If there is no such setting.
        """
        unknown = sorted(set(settings) - set(SETTINGS))
        if unknown:
            raise TypeError(f"got the settings {', '.join(unknown)}, want some of {', '.join(SETTINGS)}")
        given = {key: value for key, value in settings.items() if value is not None}
        if given.get("embed_dim") == self.embed_dim:
            given.pop("embed_dim", None)
        merged = {"path": self.name, **self.loader_kwargs, **given}
        if given.keys() <= {"batch_tokens", "store"}:
            return self.model_copy(update={"loader_kwargs": merged})
        return make_meta(**merged)

    def to_dict(self) -> dict[str, Any]:
        """Returns what is written beside results: the name of a directory, and not where it or the store lies."""
        known = super().to_dict()
        for field in ("loader_kwargs", "experiment_kwargs"):
            if known.get(field):
                known[field] = {key: _public(value) for key, value in known[field].items() if key != "store"}
        return known


def _public(value: Any) -> Any:
    is_path = isinstance(value, Path) or (isinstance(value, str) and Path(value).is_dir())
    return Path(value).resolve().name if is_path else value


def load_e5v(
    name: str,
    revision: str | None = None,
    device: str | None = None,
    *,
    path: str | None = None,
    commit: str | None = None,
    **kwargs: Any,
) -> E5VEncoder:
    """Loads an encoder; mteb calls it.

    Args:
        name: The entry's name, which is also where the model is unless ``path`` says otherwise.
        revision: Of the entry: a commit or branch for a model on the hub without an adapter.
        device: Of torch; each process has its own under ``accelerate launch``.
        path: A directory or hub id.
        commit: Of the hub id. It takes precedence over ``revision``, which may stand for an adapter too.
        **kwargs: Arguments of ``encoder.load_encoder``: ``image_layout``, ``max_image_tokens``, ``adapter``,
            ``dtype``, ``embed_dim``, ``quantize``, ``batch_tokens``, ``store``, ``prompts``, ``normalize``.
    """
    from .encoder import load_encoder

    where = path or name
    revision = commit or _revision_of_model(where, revision, kwargs.get("adapter"))
    return load_encoder(where, revision=revision, device=device, **kwargs)


def _revision_of_model(path: str, revision: str | None, adapter: Any) -> str | None:
    """Returns the hub's revision of a model; ``None`` for a directory, and for the newest.

    Args:
        path: A directory or hub id.
        revision: Of the entry, which stands for model and adapter together where there is an adapter.
        adapter: A directory or hub id, if there is one.
    """
    if Path(path).is_dir() or path == TINY_NAME:
        return None
    if adapter or revision in (None, "main"):
        return REVISION if path == PUBLISHED else None
    return revision


_FACTS: dict[str, Any] = {
    "loader": load_e5v,
    "languages": ["eng-Latn"],
    "modalities": ["image", "text"],
    "framework": ["Sentence Transformers", "PyTorch", "Transformers", "safetensors"],
    "similarity_fn_name": ScoringFunction.COSINE,
    "use_instructions": True,
    "citation": E5V_CITATION,
    "open_weights": True,
}
_UNKNOWN: dict[str, Any] = dict.fromkeys(
    (
        "embed_dim",
        "license",
        "max_tokens",
        "memory_usage_mb",
        "n_embedding_parameters",
        "n_parameters",
        "public_training_code",
        "public_training_data",
        "reference",
        "release_date",
        "training_datasets",
    )
)
_PUBLISHED_FACTS: dict[str, Any] = {
    **_FACTS,
    "training_datasets": set(),
    "revision": REVISION,
    "release_date": "2024-07-17",
    "n_parameters": 8_355_276_800,
    "n_embedding_parameters": 525_598_720,
    "memory_usage_mb": 15_936,
    "max_tokens": 8192,
    "embed_dim": 4096,
    # That of the language model, under which the weights are; the published code is under Apache-2.0 since 2025-12
    "license": "https://www.llama.com/llama3/license/",
    "contacts": ["kongds"],
    "public_training_code": "https://github.com/kongds/E5-V",
    "public_training_data": "https://huggingface.co/datasets/princeton-nlp/datasets-for-simcse",
    "reference": "https://huggingface.co/royokong/e5-v",
}


def make_metas() -> dict[str, ModelMeta]:
    """Returns the entries by the short names for ``mteb run -m``.

    ``E5V_MODEL`` (a directory or hub id) puts another model behind ``e5v`` and ``e5v-paper``. Its results go by its own
    name, never by the published model's.

    Raises:
        ValueError: If ``E5V_MODEL`` is neither.
    """
    other = os.environ.get("E5V_MODEL")
    try:
        first, paper = make_meta(other or PUBLISHED), make_meta(other or PUBLISHED, image_layout="paper")
    except ValueError as error:
        raise ValueError(f"E5V_MODEL={other}: {error}") from None
    return {
        "e5v": first,
        "e5v-paper": paper,
        "e5v-tiny": make_meta(TINY_NAME),
        PUBLISHED: make_meta(PUBLISHED) if other else first,
    }


def make_meta(path: str, name: str | None = None, **settings: Any) -> ModelMeta:
    """Returns an entry for any E5-V: a directory, or a hub id.

    Args:
        path: Where the model is.
        name: The name that results go by; for a directory ``local/<folder>`` by default.
        **settings: Arguments of ``load_e5v``. Those that change embeddings become part of the name.

    Raises:
        ValueError: If the model or adapter is neither a directory nor a hub id.
    """
    path, settings = str(path), {key: value for key, value in settings.items() if value is not None}
    for own in filter(None, (path, settings.get("adapter"))):
        check_name(str(own))
    known = {TINY_NAME: f"e5v/{TINY_NAME}"}.get(path) or (f"local/{_public(path)}" if Path(path).is_dir() else path)
    settings |= {"prompts": read_choices(filter(None, settings.get("prompts", "").split(",")))}
    settings = {key: value for key, value in settings.items() if (key, value) not in USUAL}
    told = ", ".join(_tell(key, value) for key, value in settings.items() if key in TELLING and value is not None)
    full = f"{name or known} ({told})" if told else name or known
    where = {"path": path, **settings}
    base = {**_UNKNOWN, **_FACTS}
    if not settings.get("adapter"):
        base = _PUBLISHED_FACTS if path == PUBLISHED else {**base, **FACTS.get(path, {})}
    return E5VMeta(name=full, loader_kwargs=where, **{**base, **_known_facts(where, full, base.get("revision"))})


def _tell(key: str, value: Any) -> str:
    """Returns what a setting adds to the name of an entry."""
    return value.replace(",", ", ") if key == "prompts" else f"{key}={Path(str(value)).name}"


def _known_facts(
    settings: dict[str, Any], name: str, revision: str | None = None, *, loaded: bool = False
) -> dict[str, Any]:
    """Returns the revision of an entry, and sizes where the model's files are at hand.

    Args:
        settings: Of the entry, as :func:`load_e5v` takes them.
        name: Of the entry.
        revision: Of the entry, where it has one.
        loaded: Whether the model was just loaded: the commits of hub ids are known then.
    """
    path, adapter = str(settings.get("path", name)), str(settings.get("adapter") or "")
    commit = settings.get("commit") or _revision_of_model(path, revision, adapter)
    facts: dict[str, Any] = {"revision": revision_of(path, commit, adapter, loaded=loaded)}
    folders = [] if path == PUBLISHED and not adapter else _folders(path, commit, adapter)
    there = [folder for folder in folders if folder is not None]
    if len(there) == len(folders):
        named = _known_licence(there)
        facts |= {**sizes(there), **({"license": named} if named else {})}
    if settings.get("dtype") or settings.get("quantize"):
        facts["memory_usage_mb"] = None  # that of the files is not what the model takes
    return {**facts, "embed_dim": settings["embed_dim"]} if settings.get("embed_dim") else facts


def _known_licence(folders: Sequence[Path]) -> str | None:
    """Returns the licence that a model's card names, if mteb has it in its list, or an address."""
    name = licence(folders)
    return name if name in get_args(Licenses) or (name or "").startswith("http") else None


def _folders(path: str, commit: str | None, adapter: str) -> list[Path | None]:
    """Returns where the files of a model lie, with its base and adapter; ``None`` for what is not at hand."""
    folder = find_folder(path, commit)
    base, revision = base_of(folder) if folder else ("", None)
    places = [folder, find_folder(base, revision) if base else folder, find_folder(adapter) if adapter else folder]
    return list(dict.fromkeys(places))
