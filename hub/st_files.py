"""The files that make a checkpoint's folder a sentence-transformers model.

::

modules.json                        the steps: transformer, pooling and normalisation, each with its class
sentence_bert_config.json           settings of the transformer
config_sentence_transformers.json   prompts, versions and requirements
1_Pooling/config.json               the hidden state of the last token, and the number of dimensions
2_Normalize/config.json             nothing but names
*_e5v.py                            the code of this package; a native model has none
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from e5v_st.files import write_json
from e5v_st.saved import later_files, read_arguments, read_modules, read_transformer_settings

from .folders import read_family

CUSTOM_TYPE = "modeling_e5v.E5VTransformer"
NATIVE_TYPE = "sentence_transformers.base.modules.transformer.Transformer"
POOLING_TYPE = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
NORMALIZE_TYPE = "sentence_transformers.base.modules.normalize.Normalize"

#: Files that are written anew if a model already has them.
ST_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")

_OUTPUT = {"method": "forward", "method_output_name": "last_hidden_state"}
_TRANSFORMER = {
    "transformer_task": "feature-extraction",
    "modality_config": dict.fromkeys(("text", "image", "image+text", "message"), _OUTPUT),
    "module_output_name": "token_embeddings",
}
_POOLING = {"pooling_mode": "lasttoken", "include_prompt": True}
#: Settings of sentence-transformers' own transformer that a model is saved with.
LENGTHS = ("query_length", "document_length")
#: Settings of E5-V's transformer, and what a checkpoint has that was saved with none.
USUAL: dict[str, Any] = {
    "chat_format": None,
    "generic": False,
    "image_layout": "upstream",
    "image_string": None,
    "max_image_tokens": None,
    "recipe": None,
    "strings": "auto",
}
_NORMALIZE = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}


def write_st_files(
    folder: Path, native: bool, saved: Path | None = None, out: Path | None = None, recipe: str | None = None
) -> None:
    """Writes the files that make a checkpoint's folder a sentence-transformers model.

    Args:
        folder: Holds ``config.json`` and the tokenizer.
        native: Whether the model is to load without this package's code; see ``export.export``.
        saved: A model's folder, whose settings are kept, and its modules and prompts if it has ``modules.json``. A
            native model knows the image layout ``"upstream"``, the setting of strings ``"auto"`` and the family's own
            maximum of image tokens alone.
        out: Where to write the files; by default ``folder`` itself.
        recipe: How a published model of others is asked, see ``published_e5v``.

    Raises:
        ValueError: If the checkpoint is of no known family, or a native model does not know its settings.
    """
    modules = read_modules(saved) if saved else []
    settings = {**USUAL, "recipe": recipe, **(read_transformer_settings(saved, USUAL) if saved else {})}
    lengths = read_transformer_settings(saved, LENGTHS) if saved else {}
    unknown = [f"{name}={value!r}" for name, value in settings.items() if value != USUAL[name]]
    unknown += [f"{name}={value!r}" for name, value in lengths.items() if value is not None]
    if native and unknown:
        raise ValueError(f"{', '.join(unknown)} needs this package's code: export without --native")
    out = out or folder
    backbone, config, _ = read_family(folder, saved)
    sharing = read_transformer_settings(saved, ("share_prefixes",)) if saved else {}
    own = {} if native else {**lengths, **settings, "share_prefixes": True, **sharing}
    files: dict[str, Any] = {
        "modules.json": _modules(native, modules),
        "sentence_bert_config.json": {**_TRANSFORMER, **own},
        "config_sentence_transformers.json": {
            **_model_settings(read_arguments(saved) if saved and modules else {}),
            "e5v": backbone.summary(),
        },
    }
    if saved and modules:
        copy_later(saved, out, modules)
    else:
        files["1_Pooling/config.json"] = {"embedding_dimension": config.get_text_config().hidden_size, **_POOLING}
        files["2_Normalize/config.json"] = _NORMALIZE
    for name, content in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        write_json(out / name, content)
    if not native:
        for file in source_files():
            shutil.copyfile(file, out / file.name)


def copy_later(source: Path, out: Path, modules: Sequence[Mapping[str, Any]]) -> None:
    """Copies the files of the modules behind a saved model's transformer.

    Raises:
        ValueError: If one is missing.
    """
    missing = [name for name in later_files(modules, needed=True) if not (source / name).is_file()]
    if missing:
        raise ValueError(f"{source} has no {missing[0]}, which modules.json asks for (pickles are not copied)")
    for name in filter(lambda name: (source / name).is_file(), later_files(modules)):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, out / name)


def _modules(native: bool, saved: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    types, paths = [POOLING_TYPE, NORMALIZE_TYPE], ["1_Pooling", "2_Normalize"]
    if saved:
        types, paths = ([module[name] for module in saved[1:]] for name in ("type", "path"))
    types, paths = [NATIVE_TYPE if native else CUSTOM_TYPE, *types], ["", *paths]
    return [
        {"idx": number, "name": str(number), "path": path, "type": kind}
        for number, (path, kind) in enumerate(zip(paths, types, strict=True))
    ]


def _model_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    import sentence_transformers
    import torch
    import transformers

    from e5v_st.model import modeling_e5v

    return {
        "__version__": {
            "pytorch": torch.__version__,
            "sentence_transformers": sentence_transformers.__version__,
            "transformers": transformers.__version__,
        },
        "default_prompt_name": None,
        "model_type": "SentenceTransformer",
        "requirements": modeling_e5v.REQUIREMENTS,
        "similarity_fn_name": "cosine",
        **saved,
        "prompts": {**modeling_e5v.PROMPTS, "document": "", "query": "", **saved.get("prompts", {})},
    }


def source_files() -> list[Path]:
    """Returns the files of this package that travel with a model."""
    from e5v_st.model import modeling_e5v

    here = Path(modeling_e5v.__file__).parent
    return [here / f"{name}_e5v.py" for name in modeling_e5v.SOURCES]
