"""Turns a published checkpoint into a sentence-transformers model, with this package's code or without any.

The weights stay as they are; those of LLaVA-NeXT are repaired where plain transformers is to load them too.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from e5v_st.files import read_json, write_json
from e5v_st.model.published_e5v import recipe_of

from .card import Card, write_card
from .folders import (
    ADAPTER_CONFIG,
    INDEX,
    copy_small_files,
    fetch,
    is_generic,
    link,
    new_folder,
    read_family,
    weight_files,
)
from .options import add_native, add_out
from .st_files import ST_FILES, write_st_files
from .tensors import SHARD_SIZE, Change, Tensors, add_rows, count_rows, read_tensors, write_tensors

if TYPE_CHECKING:
    from e5v_st.model.backbone_e5v import Backbone

PROCESSOR, IMAGE_PROCESSOR = "processor_config.json", "preprocessor_config.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``e5v export``."""
    parser.add_argument("path_or_id", metavar="model", help="folder or hub id of a published checkpoint")
    add_out(parser)
    add_native(parser)
    parser.add_argument("--revision", help="branch, tag or commit of the hub id")


def run(args: argparse.Namespace) -> int:
    """Runs ``e5v export``."""
    print(export(**vars(args)))
    return 0


def export(path_or_id: str | Path, out: str | Path, native: bool = False, revision: str | None = None) -> Path:
    """Writes a model folder that ``SentenceTransformer(out)`` loads as E5-V.

    Args:
        path_or_id: A published checkpoint of any family, or a saved model: a directory or hub id.
        out: The new folder.
        native: If false, the folder holds the weights byte for byte (hard links where possible) and this package's
            code, which is loaded with ``trust_remote_code=True``. If true, it holds the processor and the chat template
            (of LLaVA-NeXT, the embedding row as well) that make it load without any custom code, in
            sentence-transformers and in plain transformers.
        revision: Branch, tag or commit of the hub id.

    Returns:
        ``out``.

    Raises:
        ValueError: If the model is of no known family or not in safetensors, a family has no native form, or ``out``
            exists.
    """
    small = fetch(path_or_id, revision, weights=False)
    check_checkpoint(small, str(path_or_id))
    if native:
        check_native(small, str(path_or_id))
    source = fetch(path_or_id, revision)
    files = weight_files(source)
    with new_folder(out) as folder:
        copy_small_files(source, folder, without=ST_FILES)
        if native and is_llava_next(folder):
            write_repaired(folder, files)
        else:
            for file in files:
                link(file, folder / file.name)
        if native:
            write_native_processor(folder)
        write_st_files(folder, native=native, saved=source, recipe=recipe_of(str(path_or_id)))
        write_card(folder, Card(repo_id=Path(out).name, base=str(path_or_id)), source)
    return Path(out)


def check_checkpoint(folder: Path, name: str, saved: Path | None = None) -> None:
    """Raises ValueError, with ``name``, if a folder's configuration is not that of a known family.

    Args:
        folder: Of the checkpoint.
        name: What the user calls it.
        saved: A model's folder, whose settings may say that it is loaded as ``generic``; by default ``folder`` itself.
    """
    from transformers import AutoConfig

    from e5v_st.model.backbone_e5v import check_model_type

    if (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{name} is an adapter: merge it into its base first (python -m hub merge)")
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if not isinstance(config, dict) or not config.get("model_type"):
        raise ValueError(f"{name} is not a model of transformers: it has no config.json with a model_type")
    if not is_generic(saved or folder):
        check_model_type(AutoConfig.from_pretrained(folder), name)


def check_native(folder: Path, name: str, saved: Path | None = None) -> None:
    """Raises ValueError, with ``name``, if sentence-transformers alone could not load a checkpoint's family.

    For the arguments, see :func:`check_checkpoint`.
    """
    if is_generic(saved or folder):
        raise ValueError(f"{name} is loaded as 'generic', which needs this package's code: leave out --native")
    backbone = read_family(folder).backbone
    if backbone.extras:
        raise ValueError(
            f"{name} is a {backbone.name!r} model, whose processor in transformers needs {backbone.extras}: leave out "
            "--native, as this package's code does without"
        )


def is_llava_next(folder: Path) -> bool:
    """Whether the checkpoint in a folder is a LLaVA-NeXT, whose published weights and processors need repairs."""
    return bool(read_json(folder / "config.json").get("model_type") == "llava_next")


def write_merged(folder: Path, files: list[Path], change: Change, shard_size: int = SHARD_SIZE) -> None:
    """Writes changed weights, under the names that they have.

    Args:
        folder: Holds the model's small files already.
        files: The weights to read.
        change: Changes the tensors on their way.
        shard_size: Maximum number of bytes in a file.
    """
    (folder / INDEX).unlink(missing_ok=True)
    write_tensors(change(read_tensors(files)), folder, shard_size)


def write_repaired(folder: Path, files: list[Path], change: Change | None = None, shard_size: int = SHARD_SIZE) -> None:
    """Writes a LLaVA-NeXT's weights so that they load in plain transformers, and repairs the configuration for them.

    Args:
        folder: Holds the model's small files already.
        files: The weights to read.
        change: Changes the tensors on their way, as a merge does.
        shard_size: Maximum number of bytes in a file.
    """
    config = read_json(folder / "config.json")
    rows = max(count_rows(files), config["image_token_index"] + 1)

    def repair(tensors: Tensors) -> Tensors:
        repaired = add_rows(tensors, rows)
        return change(repaired) if change else repaired

    write_merged(folder, files, repair, shard_size)
    config["text_config"]["vocab_size"] = rows
    write_json(folder / "config.json", config)
    repair_processor_files(folder)


def repair_processor_files(folder: Path) -> None:
    """Writes what a LLaVA-NeXT's processor needs to count image tokens, and E5-V's chat template."""
    from transformers import AutoConfig

    from e5v_st.model.llava_next_e5v import repair_processor

    known = read_json(folder / PROCESSOR) if (folder / PROCESSOR).is_file() else {}
    needed = SimpleNamespace()
    repair_processor(needed, AutoConfig.from_pretrained(folder))
    write_json(folder / PROCESSOR, {"processor_class": "LlavaNextProcessor", **known, **vars(needed)})
    write_template(folder, read_family(folder).backbone)


def write_native_processor(folder: Path) -> None:
    """Writes a processor with the limit of image tokens that this package sets by default, and E5-V's chat template."""
    from e5v_st.model.processor_e5v import limit_image_tokens, load_processor

    backbone, _, tokenizer = read_family(folder)
    if not backbone.is_llava_next:
        processor = load_processor(str(folder), backbone, tokenizer)
        if backbone.image_tokens is not None:
            limit_image_tokens(processor, backbone, backbone.image_tokens)
        processor.to_json_file(folder / PROCESSOR)
        (folder / IMAGE_PROCESSOR).unlink(missing_ok=True)  # all of it stands in the other file now
    write_template(folder, backbone)


def write_template(folder: Path, backbone: Backbone) -> None:
    """Writes E5-V's chat template."""
    from e5v_st.model.prompts_e5v import chat_template

    (folder / "chat_template.json").unlink(missing_ok=True)  # an older form of the same
    (folder / "chat_template.jinja").write_text(chat_template(backbone.wrapper, backbone.image), encoding="utf8")
    # The README's recipe reads the hidden state at [:, -1]; sentence-transformers pools by the mask, on either side
    tokenizer = read_json(folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", {**tokenizer, "padding_side": "left"})
