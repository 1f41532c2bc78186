"""Folders of models: finding one, checking that nothing in it climbs out, and writing one whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from e5v_st.files import is_hub_id, locate, read_json
from e5v_st.run_files import RUN_FILES
from e5v_st.saved import later_files, read_modules, read_transformer_settings

from .remote import explained, network_fault, persist

if TYPE_CHECKING:
    from e5v_st.model.backbone_e5v import Backbone

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

#: What belongs to a model besides its weights. Nothing else is copied, above all no pickle (*.bin, *.pt).
SMALL_FILES = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", INDEX),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "chat_template.json", "chat_template.jinja", "LICENSE*", ADAPTER_CONFIG),
    "video_preprocessor_config.json",
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
)


class Family(NamedTuple):
    """What a checkpoint's small files say of its family."""

    backbone: Backbone
    config: Any
    tokenizer: Any


def read_family(folder: Path, saved: Path | None = None) -> Family:
    """Returns the family of the checkpoint in a folder, which needs no weights.

    Args:
        folder: Holds ``config.json`` and the tokenizer.
        saved: A model's folder, whose settings count; by default ``folder`` itself.

    Raises:
        ValueError: If it is of no known family, and was not saved as one that is loaded as ``generic``.
    """
    from transformers import PROCESSOR_MAPPING, AutoConfig, AutoTokenizer

    from e5v_st.model.backbone_e5v import check_model_type, find_backbone, make_generic
    from e5v_st.model.processor_e5v import read_template

    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if is_generic(saved or folder):
        chat_format = read_transformer_settings(saved or folder, ["chat_format"])["chat_format"]
        return Family(make_generic(config, tokenizer, PROCESSOR_MAPPING[type(config)], chat_format), config, tokenizer)
    check_model_type(config, str(folder))
    return Family(find_backbone(config, tokenizer, read_template(str(folder), tokenizer)), config, tokenizer)


def is_generic(folder: Path) -> bool:
    """Whether a model was saved as one that is loaded with ``backbone="generic"``."""
    return bool(read_transformer_settings(folder, ["generic"]).get("generic"))


def fetch(path_or_id: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """Returns the folder of a model; the model of a hub id is downloaded.

    Args:
        path_or_id: A directory or hub id, or the name of the small model that comes with ``e5v_st``.
        revision: Branch, commit or ``refs/pr/N`` of the hub id.
        weights: Whether the weights are wanted; without them, only the small files are downloaded.

    Raises:
        ValueError: If there is no such directory and the hub does not give it, or a file's name climbs out of it.
    """
    from e5v_st.published import TINY, TINY_NAME

    path_or_id = TINY if path_or_id == TINY_NAME else path_or_id
    path = locate(path_or_id)
    if path is not None and not path.is_dir():
        raise ValueError(f"{path_or_id} is a file, want a model's folder or hub id")
    if path is not None:
        return path
    from huggingface_hub import snapshot_download

    climbing = [name for name in _listed(str(path_or_id), revision) if name.startswith("/") or ".." in name.split("/")]
    if climbing:
        raise ValueError(f"{path_or_id} holds {climbing[0]!r}, whose name climbs out of its folder: refused")
    patterns = [*SMALL_FILES, *RUN_FILES, "README.md", *(["*.safetensors"] if weights else [])]
    with explained(f"{path_or_id} (revision {revision})" if revision else str(path_or_id)):
        folder = Path(persist(partial(snapshot_download, str(path_or_id), revision=revision, allow_patterns=patterns)))
        if later := later_files(read_modules(folder)):
            persist(partial(snapshot_download, str(path_or_id), revision=folder.name, allow_patterns=later))
        return folder


def names_repository(name: str) -> bool:
    """Whether a name means a repository of the hub: it has the form of a hub id, and nothing of that name lies here."""
    return is_hub_id(name) and not Path(name).exists()


def _listed(repo_id: str, revision: str | None) -> list[str]:
    """Returns the names of a repository's files; none if the hub cannot be reached."""
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(repo_id, revision=revision)
    except Exception as error:
        if network_fault(error) is None:
            raise
        return []  # the download finds it in the cache, or says what is wrong


def base_of(settings: dict[str, Any], named: str | Path | None = None) -> tuple[str, str | None]:
    """Returns the base of an adapter, and which revision of it.

    Args:
        settings: The adapter's configuration.
        named: A directory, a hub id or ``id@revision`` that takes precedence over the configuration.

    Returns:
        Directory or hub id, empty if it is not known; branch or commit, ``None`` for the newest.
    """
    known = settings.get("base_model_name_or_path") or ""
    name = str(named or known)
    if name and Path(name).is_dir():
        return name, None
    name, _, revision = name.partition("@")
    return name, revision or (settings.get("revision") if name == known else None)


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a checkpoint, in order.

    Raises:
        ValueError: If there are none, one is missing, or the index names a file outside the folder.
    """
    sharded = (folder / INDEX).is_file()
    names = sorted(set(read_json(folder / INDEX)["weight_map"].values())) if sharded else [SINGLE]
    climbing = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if climbing:
        raise ValueError(f"{folder / INDEX} names {climbing[0]!r}, which is not a safetensors file beside it: refused")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} has no {missing[0]}: want the weights in safetensors (pickles are not read)")
    return [folder / name for name in names]


def copy_small_files(source: Path, out: Path, without: tuple[str, ...] = ()) -> None:
    """Copies the configuration and tokenizer of a model, as they are."""
    for pattern in SMALL_FILES:
        for file in source.glob(pattern):
            if file.is_file() and file.name not in without:
                shutil.copyfile(file, out / file.name)


def link(source: Path, target: Path, passing: bool = False) -> None:
    """Makes ``target`` the same file as ``source``, without copying its bytes where the file system can.

    Args:
        source: The file.
        target: Its new name.
        passing: Whether ``target`` is removed before ``source`` is. Then a symbolic link will do, on any file system.
    """
    try:
        (os.symlink if passing else os.link)(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """Gives a folder to write to; it becomes ``out`` if all goes well, and is removed otherwise.

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
