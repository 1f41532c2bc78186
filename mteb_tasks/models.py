"""Model entries: E5-V in both image layouts, the small model, and any model of one's own.

mteb's built-in ``royokong/e5-v`` refuses current transformers, does not normalise and has a stray ``[INST]`` in its
composed prompt; the entry here takes its place.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mteb.models.model_meta import ModelMeta, ScoringFunction

from e5v_st.fingerprint import digest_files

from .metadata import E5V_CITATION

if TYPE_CHECKING:
    from .encoder import E5VEncoder

PUBLISHED = "royokong/e5-v"
REVISION = "0c1f22679417b3ae925d779442221c40cd1861ab"
TINY = Path(__file__).parent.parent / "e5v_st" / "tiny"


class E5VMeta(ModelMeta):
    """A model entry that asks for nothing beyond this package: mteb would want torchvision for images."""

    def _resolve_extras_groups(self) -> list[str]:
        return []


def load_e5v(
    name: str,
    revision: str | None = None,
    device: str | None = None,
    *,
    path: str | None = None,
    **kwargs: Any,
) -> E5VEncoder:
    """Loads an encoder; mteb calls it.

    Args:
        name: The entry's name, which is also where the model is unless ``path`` says otherwise.
        revision: Of the hub's repository.
        device: Of torch; each process has its own under ``accelerate launch``.
        path: A directory or hub id.
        **kwargs: Arguments of ``encoder.load_encoder``: ``image_layout``, ``adapter``, ``dtype``, ``quantize``,
            ``batch_tokens``, ``store``.
    """
    from .encoder import load_encoder

    where = path or name
    return load_encoder(where, revision=None if Path(where).is_dir() else revision, device=device, **kwargs)


_FACTS: dict[str, Any] = {
    "loader": load_e5v,
    "languages": ["eng-Latn"],
    "modalities": ["image", "text"],
    "framework": ["Sentence Transformers", "PyTorch", "Transformers", "safetensors"],
    "similarity_fn_name": ScoringFunction.COSINE,
    "use_instructions": True,
    "training_datasets": set(),
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
    )
)
_PUBLISHED_FACTS: dict[str, Any] = {
    **_FACTS,
    "revision": REVISION,
    "release_date": "2024-07-17",
    "n_parameters": 8_355_276_800,
    "n_embedding_parameters": 525_598_720,
    "memory_usage_mb": 15_936,
    "max_tokens": 8192,
    "embed_dim": 4096,
    "license": None,
    "public_training_code": "https://github.com/kongds/E5-V",
    "public_training_data": "https://huggingface.co/datasets/princeton-nlp/datasets-for-simcse",
    "reference": "https://huggingface.co/royokong/e5-v",
}


def make_metas() -> dict[str, ModelMeta]:
    """Returns the entries by the short names for ``mteb run -m``.

    ``E5V_MODEL`` (a directory or hub id) puts another model behind ``e5v`` and ``e5v-paper``. Its results go by its own
    name, never by the published model's.
    """
    other = os.environ.get("E5V_MODEL")
    published = E5VMeta(name=PUBLISHED, **_PUBLISHED_FACTS)
    layout = {"path": PUBLISHED, "image_layout": "paper"}
    paper = E5VMeta(name=f"{PUBLISHED} (image_layout=paper)", loader_kwargs=layout, **_PUBLISHED_FACTS)
    return {
        "e5v": make_meta(other) if other else published,
        "e5v-paper": make_meta(other, image_layout="paper") if other else paper,
        "e5v-tiny": make_meta(str(TINY), name="e5v/e5v-tiny"),
        PUBLISHED: published,
    }


def make_meta(path: str, name: str | None = None, **settings: Any) -> ModelMeta:
    """Returns an entry for any E5-V: a directory, or a hub id.

    Args:
        path: Where the model is.
        name: The name that results go by; for a directory ``local/<folder>`` by default.
        **settings: Arguments of ``load_e5v``. Those that change embeddings become part of the name.
    """
    local = Path(path).is_dir()
    name = name or (f"local/{Path(path).resolve().name}" if local else path)
    told = ", ".join(f"{key}={Path(str(value)).name}" for key, value in settings.items() if key in _TELLING and value)
    sources = [Path(own) for own in (path, settings.get("adapter")) if own and Path(own).is_dir()]
    return E5VMeta(
        name=f"{name} ({told})" if told else name,
        revision=digest(sources) if local else REVISION if path == PUBLISHED else "main",
        loader_kwargs={"path": path, **settings},
        **{**_UNKNOWN, **_FACTS},
    )


_TELLING = ("adapter", "dtype", "image_layout", "quantize")


def digest(folders: list[Path]) -> str:
    """Returns a revision for local models: it changes when a weights file or a configuration changes, in any byte."""
    files = (file for folder in folders for kind in ("*.safetensors", "*.json") for file in folder.glob(kind))
    return digest_files(files)[:40]
