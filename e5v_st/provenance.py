"""Which model an index was made with: where its files lie, what they hold, and whether they still hold it.

A model's name says little: weights change in place, and the hub moves on. An index records digests of all that decides
an embedding. The name and the commit only say where to find it again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import __version__
from .files import is_hub_id, locate
from .fingerprint import ADAPTER, SETTINGS, digest_code, digest_files, digest_weights
from .published import TINY, TINY_NAME

#: What is downloaded; what lies in folders of a repository is not needed.
FILES = ("*.json", "*.txt", "*.jinja", "*.model", "model*.safetensors", "adapter_model.safetensors")
#: What sentence-transformers saves of ``E5VTransformer``.
SAVED_SETTINGS = "sentence_bert_config.json"
#: digest in a manifest -> what it is of
DIGESTS = {
    "weights_sha256": "weights",
    "settings_sha256": "configuration, tokenizer or image processor",
    "adapter_sha256": "adapter",
    "code_sha256": "code",
}
#: What a manifest says of models besides, which may change: names of the same files, and libraries.
NAMES = ("model", "model_revision", "adapter", "adapter_revision", "versions")


# ---- where the files lie ----


@dataclass(frozen=True)
class Origin:
    """A model or an adapter.

    Attributes:
        name: The hub id, ``"e5v-tiny"``, or the absolute path.
        folder: Where its files are.
        commit: That of the hub; ``None`` for what lies on this machine alone.
    """

    name: str
    folder: Path
    commit: str | None = None

    def seen_from(self, folder: Path) -> str:
        """Returns the name; a path as it is found from ``folder``, so that both may move together."""
        is_path = self.commit is None and self.name != TINY_NAME
        return os.path.relpath(self.folder, os.path.realpath(folder)) if is_path else self.name

    def base(self) -> Origin | None:
        """Finds the base where this is an adapter; ``None`` where it is a model."""
        file = self.folder / ADAPTER[0]
        if not file.is_file():
            return None
        settings = json.loads(file.read_text(encoding="utf8"))
        name = settings.get("base_model_name_or_path")
        if not name:
            raise ValueError(f"{self.name} is an adapter that does not name its base: give the base as the model")
        return find_origin(name, settings.get("revision"))


def check_name(name: str | None) -> None:
    """Refuses what cannot be a path or a hub id (see ``files.locate``); looks at nothing but this machine's names."""
    if name is not None and name != TINY_NAME and _split_revision(name) is None:
        locate(name)


def _split_revision(name: str) -> tuple[str, str] | None:
    """Returns id and revision of ``id@revision``, ``None`` for anything else."""
    known, _, revision = name.partition("@")
    return (known, revision) if revision and is_hub_id(known) and not Path(name).exists() else None


def find_origin(name: str | Path, revision: str | None = None) -> Origin:
    """Finds a model or an adapter, and downloads it where need be.

    Args:
        name: A directory, a hub id, ``id@revision``, or ``"e5v-tiny"``.
        revision: Branch, tag or commit of a hub id.

    Raises:
        ValueError: If there is none.
    """
    if name == TINY_NAME or Path(name) == TINY:
        return Origin(TINY_NAME, TINY)
    if with_revision := _split_revision(str(name)):
        return _fetch(*with_revision)
    path = locate(name)
    if path is None:
        return _fetch(str(name), revision)
    if revision is not None:
        raise ValueError(f"got the revision {revision!r} of {name}, which is a path: only hub ids have revisions")
    if not path.is_dir():
        raise ValueError(f"{name} is a file, want the folder of a model or an adapter")
    return Origin(str(path.resolve()), path.resolve())


def find_recorded(job: Mapping[str, Any], kind: str, index: Path) -> Origin | None:
    """Finds the model or the adapter that a manifest names.

    Args:
        job: The manifest's content.
        kind: ``"model"`` or ``"adapter"``.
        index: The folder that holds it.

    Returns:
        ``None`` where the job had none.

    Raises:
        ValueError: If it is no longer there.
    """
    name, revision = job[kind], job.get(f"{kind}_revision")
    if name is None or name == TINY_NAME or revision is not None:
        return None if name is None else find_origin(name, revision)
    folder = Path(os.path.realpath(index), str(name)).resolve()
    if not folder.is_dir():
        raise ValueError(f"the {kind} of {index} is no longer in {folder}: say with --{kind} where it is now")
    return Origin(str(folder), folder)


def _fetch(name: str, revision: str | None) -> Origin:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=FILES, ignore_patterns="*/*")
    except OSError as error:
        at = f" (revision {revision})" if revision else ""
        raise ValueError(f"{name}{at} cannot be fetched from the hub: {' '.join(str(error).split())}") from error
    return Origin(name, Path(folder), Path(folder).name)


# ---- what they hold ----


def describe_models(model: Origin, adapter: Origin | None, index: Path) -> dict[str, Any]:
    """Returns what a manifest says of a model and of the adapter on it.

    Args:
        model: A model, or an adapter that names its base.
        adapter: One more adapter.
        index: The folder of the manifest.
    """
    base = model.base()
    adapters = [each.folder for each in (base and model, adapter) if each]
    folders = [each.folder for each in (base, model) if each]
    return {
        "model": model.seen_from(index),
        "model_revision": model.commit,
        "adapter": adapter and adapter.seen_from(index),
        "adapter_revision": adapter and adapter.commit,
        "weights_sha256": digest_weights(folders[0]),
        "settings_sha256": digest_files(folder / name for folder in folders for name in SETTINGS),
        "adapter_sha256": digest_files(folder / name for folder in adapters for name in ADAPTER) if adapters else None,
        "code_sha256": digest_code(),
        "versions": {"e5v-st": __version__, **{name: version(name) for name in ("torch", "transformers", "pillow")}},
    }


def find_dtype(model: Origin, named: str | None, device: str | None, quantize: str | None) -> str:
    """Returns the dtype that a model is loaded in, which depends on the machine where none is named.

    Args:
        model: The model.
        named: The dtype that the user wants.
        device: The device that the user wants.
        quantize: How the language model is held.
    """
    if named is not None:
        return named
    if model.folder == TINY:
        return "float32"
    import torch

    if torch.cuda.is_available() and not str(device or "cuda").startswith("cpu"):
        return "bfloat16"
    config = json.loads(((model.base() or model).folder / "config.json").read_text(encoding="utf8"))
    return "float32" if quantize else config.get("dtype") or config.get("torch_dtype") or "float32"


def find_layout(model: Origin, named: str | None) -> str:
    """Returns the image layout that a model is loaded in.

    Args:
        model: The model.
        named: The layout that the user wants.
    """
    if named is not None:
        return named
    file = model.folder / SAVED_SETTINGS
    saved = json.loads(file.read_text(encoding="utf8")) if file.is_file() else {}
    return saved.get("image_layout", "upstream")


def check_same_models(there: Mapping[str, Any], here: Mapping[str, Any], index: Path) -> None:
    """Refuses to put together embeddings of different models.

    Args:
        there: What the index's manifest says.
        here: What :func:`describe_models` says now.
        index: Named in the message.

    Raises:
        ValueError: If a digest differs; the message says of what, and what to do.
    """
    changed = [name for name in DIGESTS if there.get(name) != here[name]]
    if not changed:
        return
    if changed == ["code_sha256"]:
        made_by = (there.get("versions") or {}).get("e5v-st")
        raise ValueError(
            f"{index} was made by other code (e5v-st {made_by}, this is {__version__}), which may give other "
            "embeddings: install the version that made it, or embed into a new folder"
        )
    what = " and the ".join(DIGESTS[name] for name in changed)
    made_with, given = _named(there, index), _named(here, index)
    if made_with == given:
        do = "has changed since then: put the old files back"
    else:
        do = f"was made with {made_with}: name that"
    raise ValueError(f"{given} does not have the {what} of {index}, which {do}, or embed into a new folder")


def _named(job: Mapping[str, Any], index: Path) -> str:
    """The arguments that name a job's model and adapter."""
    words = []
    for kind in ("model", "adapter"):
        name, revision = job.get(kind), job.get(f"{kind}_revision")
        if name is not None and name != TINY_NAME:
            path = os.path.normpath(os.path.join(os.path.realpath(index), str(name)))
            name = f"{name}@{revision}" if revision else path
        words += [f"--{kind} {name}"] if name is not None else []
    return " ".join(words)
