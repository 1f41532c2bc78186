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
from pathlib import Path
from typing import Any

from e5v_st.files import read_json, write_json

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
_NORMALIZE = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}


def write_st_files(
    folder: Path, native: bool, image_layout: str = "upstream", strings: str = "auto", out: Path | None = None
) -> None:
    """Writes the files that make a checkpoint's folder a sentence-transformers model.

    Args:
        folder: Holds ``config.json`` and the tokenizer.
        native: Whether the model is to load without this package's code; see ``export.export``.
        image_layout: ``"upstream"`` or ``"paper"``; a native model knows only the former.
        strings: ``"auto"`` or ``"text"``, see ``e5v_st.load``; a native model knows only the former.
        out: Where to write the files; by default ``folder`` itself.

    Raises:
        ValueError: If the checkpoint is not a LLaVA-NeXT, or a native model does not know its settings.
    """
    from transformers import AutoConfig, AutoTokenizer

    from e5v_st.model.llava_next_e5v import check_config, find_wrapper

    chosen = (("image_layout", image_layout, "upstream"), ("strings", strings, "auto"))
    unknown = [f"{name}={value!r}" for name, value, known in chosen if value != known]
    if native and unknown:
        raise ValueError(f"{', '.join(unknown)} needs this package's code: export without --native")
    out = out or folder
    config = check_config(AutoConfig.from_pretrained(folder), str(folder))
    find_wrapper(config, AutoTokenizer.from_pretrained(folder))
    own = {} if native else {"image_layout": image_layout, "share_prefixes": True, "strings": strings}
    files = {
        "modules.json": _modules(native),
        "sentence_bert_config.json": {**_TRANSFORMER, **own},
        "config_sentence_transformers.json": _model_settings(),
        "1_Pooling/config.json": {"embedding_dimension": config.text_config.hidden_size, **_POOLING},
        "2_Normalize/config.json": _NORMALIZE,
    }
    for name, content in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        write_json(out / name, content)
    if not native:
        for file in source_files():
            shutil.copyfile(file, out / file.name)


def _modules(native: bool) -> list[dict[str, Any]]:
    types = [NATIVE_TYPE if native else CUSTOM_TYPE, POOLING_TYPE, NORMALIZE_TYPE]
    paths = ["", "1_Pooling", "2_Normalize"]
    return [
        {"idx": number, "name": str(number), "path": path, "type": kind}
        for number, (path, kind) in enumerate(zip(paths, types, strict=True))
    ]


def _model_settings() -> dict[str, Any]:
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
        "prompts": {**modeling_e5v.PROMPTS, "document": "", "query": ""},
        "requirements": modeling_e5v.REQUIREMENTS,
        "similarity_fn_name": "cosine",
    }


def source_files() -> list[Path]:
    """Returns the files of this package that travel with a model."""
    from e5v_st.model import modeling_e5v

    here = Path(modeling_e5v.__file__).parent
    return [here / f"{name}_e5v.py" for name in modeling_e5v.SOURCES]


def saved_settings(source: Path) -> dict[str, str]:
    """Returns a saved model's image layout and its setting of ``strings``; nothing for a published checkpoint.

    Args:
        source: The model's folder.
    """
    file = source / "sentence_bert_config.json"
    settings = read_json(file) if file.is_file() else {}
    return {name: settings[name] for name in ("image_layout", "strings") if name in settings}
