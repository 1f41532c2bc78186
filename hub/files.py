"""Folders of models: finding one, checking that nothing in it climbs out, and writing one whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from .remote import explained, persist

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

#: What belongs to a model besides its weights. Pickles (*.bin, *.pt) are never read, linked or uploaded.
SMALL_FILES = ("*.json", "*.jinja", "tokenizer.model", "LICENSE*")


def fetch(path_or_id: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """Returns the folder of a model, downloaded where it is a hub id.

    Args:
        path_or_id: A directory or hub id, or the name of the small model that comes with ``e5v_st``.
        revision: Branch, commit or ``refs/pr/N`` of the hub id.
        weights: Whether the weights are wanted; without them, only the small files are downloaded.

    Raises:
        ValueError: If there is no such directory and the hub does not give it, or a file's name climbs out of it.
    """
    from e5v_st.checkpoint import TINY, TINY_NAME

    path_or_id = TINY if path_or_id == TINY_NAME else path_or_id
    if Path(path_or_id).is_dir():
        return Path(path_or_id)
    if len(str(path_or_id).split("/")) != 2 or str(path_or_id).startswith((".", "/", "~")):
        raise ValueError(f"there is no folder {str(path_or_id)!r}, and a hub id looks like 'royokong/e5-v'")
    from huggingface_hub import snapshot_download

    patterns = [*SMALL_FILES, "*.py", "README.md", *(["*.safetensors"] if weights else [])]
    try:
        with explained(str(path_or_id)):
            download = partial(snapshot_download, str(path_or_id), revision=revision, allow_patterns=patterns)
            return Path(persist(download))
    except ValueError as error:
        if not any(mark in str(error) for mark in ("pointer path", "Invalid filename")):
            raise
        raise ValueError(f"{path_or_id} holds a file whose name climbs out of its folder: refused") from error


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a checkpoint, in order.

    Raises:
        ValueError: If there are none, one is missing, or the index names a file outside the folder.
    """
    sharded = (folder / INDEX).is_file()
    names = sorted(set(read_json(folder / INDEX)["weight_map"].values())) if sharded else [SINGLE]
    climbing = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if climbing:
        raise ValueError(f"{folder / INDEX} names {climbing[0]!r}, which is no safetensors file beside it: refused")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} has no {missing[0]}: want the weights in safetensors (pickles are not read)")
    return [folder / name for name in names]


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file; raises ValueError, naming the file, if it is none."""
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, indented."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf8")


def copy_small_files(source: Path, out: Path, without: tuple[str, ...] = ()) -> None:
    """Copies the configuration and tokenizer of a model, as they are."""
    for pattern in SMALL_FILES:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and file.name not in without:
                shutil.copyfile(file, out / file.name)


def link(source: Path, target: Path) -> None:
    """Makes ``target`` the same file as ``source``, without copying its bytes where the file system can."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """Gives a folder to write to, which becomes ``out`` if all goes well and is removed if not.

    Raises:
        ValueError: If ``out`` exists and is not an empty folder.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already: name a new folder, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
