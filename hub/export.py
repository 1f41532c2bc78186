"""Published format -> sentence-transformers files: the weights as they are, or repaired and without custom code."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from types import SimpleNamespace

from .card import Card, write_card
from .files import ADAPTER_CONFIG, INDEX, copy_small_files, fetch, link, new_folder, read_json, weight_files, write_json
from .options import add_native, add_out
from .shards import SHARD_SIZE, Change, add_rows, count_rows, read_tensors, write_tensors

CUSTOM_TYPE = "modeling_e5v.E5VTransformer"
NATIVE_TYPE = "sentence_transformers.base.modules.transformer.Transformer"
POOLING_TYPE = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
NORMALIZE_TYPE = "sentence_transformers.base.modules.normalize.Normalize"

PROCESSOR = "processor_config.json"

#: Files that are written anew where a model already has them.
ST_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")

_OUTPUT = {"method": "forward", "method_output_name": "last_hidden_state"}
_TRANSFORMER = {
    "transformer_task": "feature-extraction",
    "modality_config": dict.fromkeys(("text", "image", "image+text", "message"), _OUTPUT),
    "module_output_name": "token_embeddings",
}
_NORMALIZE = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}


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
        path_or_id: A published checkpoint, or a saved model: a directory or hub id.
        out: The new folder.
        native: Without: the weights byte for byte (hard links where possible) and this package's code beside them,
            loaded with ``trust_remote_code=True``. With: the embedding row, the processor and the chat template that
            make it load without any custom code, in sentence-transformers and in plain transformers.
        revision: Of the hub id.

    Returns:
        ``out``.

    Raises:
        ValueError: If it is no LLaVA-NeXT in safetensors, or ``out`` exists.
    """
    check_checkpoint(fetch(path_or_id, revision, weights=False), str(path_or_id))
    source = fetch(path_or_id, revision)
    files = weight_files(source)
    settings = saved_settings(source)
    with new_folder(out) as folder:
        copy_small_files(source, folder, without=ST_FILES)
        if native:
            write_repaired(folder, files)
        else:
            for file in files:
                link(file, folder / file.name)
        write_st_files(folder, native=native, **settings)
        write_card(folder, Card(repo_id=Path(out).name, base=str(path_or_id)), source)
    return Path(out)


def check_checkpoint(folder: Path, name: str) -> None:
    """Raises ValueError, with ``name``, if a folder's configuration is not that of a LLaVA-NeXT."""
    from transformers import AutoConfig

    from e5v_st.model.llava_next_e5v import check_config

    if (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{name} is an adapter: merge it into its base first (python -m hub merge)")
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if not isinstance(config, dict) or not config.get("model_type"):
        raise ValueError(f"{name} is no model of transformers: it has no config.json with a model_type")
    check_config(AutoConfig.from_pretrained(folder), name)


def write_repaired(folder: Path, files: list[Path], change: Change | None = None, shard_size: int = SHARD_SIZE) -> None:
    """Writes weights, changed where wanted, that load in plain transformers, and repairs the configuration for them.

    Args:
        folder: Holds the model's small files already.
        files: The weights to read.
        change: What to do with the tensors on their way.
        shard_size: Bytes of a file.
    """
    config = read_json(folder / "config.json")
    rows = max(count_rows(files), config["image_token_index"] + 1)
    (folder / INDEX).unlink(missing_ok=True)
    tensors = add_rows(read_tensors(files), rows)
    write_tensors(change(tensors) if change else tensors, folder, shard_size)
    config["text_config"]["vocab_size"] = rows
    write_json(folder / "config.json", config)
    repair_processor_files(folder)


def repair_processor_files(folder: Path) -> None:
    """Writes what a processor needs to count image tokens, and E5-V's chat template."""
    from transformers import AutoConfig, AutoTokenizer

    from e5v_st.model.llava_next_e5v import find_wrapper, repair_processor
    from e5v_st.model.prompts_e5v import chat_template

    config = AutoConfig.from_pretrained(folder)
    wrapper = find_wrapper(config, AutoTokenizer.from_pretrained(folder))
    known = read_json(folder / PROCESSOR) if (folder / PROCESSOR).is_file() else {}
    needed = SimpleNamespace()
    repair_processor(needed, config)
    write_json(folder / PROCESSOR, {"processor_class": "LlavaNextProcessor", **known, **vars(needed)})
    (folder / "chat_template.jinja").write_text(chat_template(wrapper), encoding="utf8")
    # The README's recipe reads the state at [:, -1]; sentence-transformers pools by the mask, on either side
    tokenizer = read_json(folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", {**tokenizer, "padding_side": "left"})


def write_st_files(
    folder: Path, native: bool, image_layout: str = "upstream", strings: str = "auto", out: Path | None = None
) -> None:
    """Writes the files that make a checkpoint's folder a sentence-transformers model.

    Args:
        folder: Holds ``config.json`` and the tokenizer.
        native: See :func:`export`.
        image_layout: ``"upstream"`` or ``"paper"``; a native model knows only the former.
        strings: ``"auto"`` or ``"text"``, see ``e5v_st.load``; a native model knows only the former.
        out: Where to write them; ``folder`` itself where ``None``.

    Raises:
        ValueError: If the checkpoint is no LLaVA-NeXT, or its settings are not known to a native model.
    """
    import torch
    import transformers
    from sentence_transformers import __version__ as st_version
    from transformers import AutoConfig, AutoTokenizer

    from e5v_st.model import modeling_e5v
    from e5v_st.model.llava_next_e5v import check_config, find_wrapper

    chosen = (("image_layout", image_layout, "upstream"), ("strings", strings, "auto"))
    unknown = [f"{name}={value!r}" for name, value, known in chosen if value != known]
    if native and unknown:
        raise ValueError(f"{', '.join(unknown)} needs this package's code: export without --native")
    out = out or folder
    config = check_config(AutoConfig.from_pretrained(folder), str(folder))
    find_wrapper(config, AutoTokenizer.from_pretrained(folder))
    types = [NATIVE_TYPE if native else CUSTOM_TYPE, POOLING_TYPE, NORMALIZE_TYPE]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": kind}
        for number, (path, kind) in enumerate(zip(paths, types, strict=True))
    ]
    pooling = {
        "embedding_dimension": config.text_config.hidden_size,
        "pooling_mode": "lasttoken",
        "include_prompt": True,
    }
    versions = {"pytorch": torch.__version__, "sentence_transformers": st_version}
    settings = {
        "__version__": {**versions, "transformers": transformers.__version__},
        "default_prompt_name": None,
        "model_type": "SentenceTransformer",
        "prompts": {**modeling_e5v.PROMPTS, "document": "", "query": ""},
        "requirements": modeling_e5v.REQUIREMENTS,
        "similarity_fn_name": "cosine",
    }
    write_json(out / "modules.json", modules)
    write_json(out / "1_Pooling" / "config.json", pooling)
    write_json(out / "2_Normalize" / "config.json", _NORMALIZE)
    write_json(out / "config_sentence_transformers.json", settings)
    custom = {} if native else {"image_layout": image_layout, "share_prefixes": True, "strings": strings}
    write_json(out / "sentence_bert_config.json", {**_TRANSFORMER, **custom})
    if not native:
        for file in source_files():
            shutil.copyfile(file, out / file.name)


def source_files() -> list[Path]:
    """Returns the files of this package that travel with a model."""
    from e5v_st.model import modeling_e5v

    here = Path(modeling_e5v.__file__).parent
    return [here / f"{name}_e5v.py" for name in modeling_e5v.SOURCES]


def saved_settings(source: Path) -> dict[str, str]:
    """Returns the image layout of a saved model and how it takes strings; nothing for a published checkpoint."""
    file = source / "sentence_bert_config.json"
    settings = read_json(file) if file.is_file() else {}
    return {name: settings[name] for name in ("image_layout", "strings") if name in settings}
