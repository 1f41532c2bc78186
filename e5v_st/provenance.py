"""Where the files of a model or an adapter lie: in a folder, in the cache of the hub, or on the hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .files import is_hub_id, locate, read_json
from .fingerprint import ADAPTER
from .published import TINY, TINY_NAME
from .saved import later_files, read_modules

#: What is downloaded of a repository's own folder. Of the folders in it, those of its modules are needed alone.
FILES = ["*.json", "*.txt", "*.jinja", "*.model", "model*.safetensors", "adapter_model.safetensors"]
#: One of them is in the folder of every model or adapter.
CONFIG, ADAPTER_CONFIG = "config.json", ADAPTER[0]


@dataclass(frozen=True)
class Origin:
    """A model or an adapter.

    Attributes:
        name: The hub id, ``"e5v-tiny"``, or the absolute path.
        folder: Where its files are.
        commit: The commit on the hub; ``None`` for what is on this machine alone.
    """

    name: str
    folder: Path
    commit: str | None = None

    def seen_from(self, folder: Path) -> str:
        """Returns the name. A path is given from ``folder``, so that both may move together."""
        is_path = self.commit is None and self.name != TINY_NAME
        return os.path.relpath(self.folder, os.path.realpath(folder)) if is_path else self.name

    def base(self) -> Origin | None:
        """Finds the base of an adapter; ``None`` for a model."""
        if not (self.folder / ADAPTER_CONFIG).is_file():
            return None
        name, revision = base_of(self.folder)
        if not name:
            raise ValueError(f"{self.name} is an adapter that does not name its base: give the base as the model")
        return find_origin(name, revision)


def check_name(name: str | None) -> None:
    """Raises ValueError for what cannot be a path or a hub id, without asking the hub; see ``files.locate``."""
    if name is not None and name != TINY_NAME and _split_revision(name) is None:
        locate(name)


def _split_revision(name: str) -> tuple[str, str] | None:
    """Returns id and revision of ``id@revision``, ``None`` for anything else."""
    known, _, revision = name.partition("@")
    return (known, revision) if revision and is_hub_id(known) and not Path(name).exists() else None


def find_origin(name: str | Path, revision: str | None = None) -> Origin:
    """Finds a model or an adapter, and downloads it if need be.

    Args:
        name: A directory, a hub id, ``id@revision``, or ``"e5v-tiny"``.
        revision: Branch, tag or commit of a hub id.

    Raises:
        ValueError: If there is no such model or adapter.
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


def find_folder(name: str, revision: str | None = None) -> Path | None:
    """Returns the folder of a model or adapter; ``None`` for a hub id that is not in the cache."""
    if name == TINY_NAME:
        return TINY
    if Path(name).is_dir():
        return Path(name)
    if not is_hub_id(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(name, file, revision=revision) for file in (CONFIG, ADAPTER_CONFIG))
    return next((Path(file).parent for file in found if isinstance(file, str)), None)


def base_of(folder: Path) -> tuple[str, str | None]:
    """Returns the base of an adapter and its revision; an empty name for a model that is not an adapter."""
    file = folder / ADAPTER_CONFIG
    settings = read_json(file) if file.is_file() else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds a {type(settings).__name__}, want the fields of an adapter")
    return settings.get("base_model_name_or_path") or "", settings.get("revision")


def _fetch(name: str, revision: str | None) -> Origin:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=FILES, ignore_patterns="*/*")
        if later := later_files(read_modules(folder)):
            snapshot_download(name, revision=Path(folder).name, allow_patterns=later)
    except OSError as error:
        at = f" (revision {revision})" if revision else ""
        raise ValueError(f"{name}{at} cannot be fetched from the hub: {' '.join(str(error).split())}") from error
    return Origin(name, Path(folder), Path(folder).name)
