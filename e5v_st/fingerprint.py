"""What decides an embedding, as digests: a model's files, this package's code, a model in memory.

An index must know its weights before any model is loaded, so it holds digests of files. Whole files are hashed: a
sample would miss an edited row, and a wrong number costs more than the seconds that hashing takes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import hash_file
from .model.images_e5v import is_on
from .saved import later_files, read_modules, saved_files

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
#: What a model is loaded from besides its weights.
SETTINGS = (
    *("config.json", "sentence_bert_config.json", "processor_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    # A chat template tells families apart
    *("vocab.json", "merges.txt", "chat_template.jinja"),
)
#: Endings of the files in a model's folder that decide embeddings.
DECISIVE = (".jinja", ".json", ".model", ".safetensors", ".txt")
#: What stands between a row of a source and its embedding.
CODE = (
    *("model/*_e5v.py", "published.py", "loading.py", "saved.py", "quantize.py"),
    *("encoder.py", "reading.py", "holding.py", "batches.py"),
    *("tables.py", "rows.py", "delimited.py", "index/source.py"),
)


# ---- files ----


def digest_weights(folder: Path) -> str:
    """Returns the digest of a checkpoint's weights, of one file or several."""
    index = folder / WEIGHTS[1]
    shards = json.loads(index.read_text(encoding="utf8")).get("weight_map", {}).values() if index.is_file() else ()
    return digest_files(folder / name for name in {*WEIGHTS, *shards})


def digest_settings(folders: Iterable[Path]) -> str:
    """Returns the digest of what models and adapters are loaded from besides their weights."""
    return digest_files(
        file for folder in folders for file in (*(folder / name for name in SETTINGS), *saved_files(folder))
    )


def digest_files(files: Iterable[Path]) -> str:
    """Returns the SHA-256 of what ``sha256sum`` prints for files, sorted by name.

    Files that are not there are left out. The others are read in parallel, with one thread for each.
    """
    found = sorted((file for file in files if file.is_file()), key=lambda file: file.name)
    with ThreadPoolExecutor(max(1, len(found))) as threads:
        lines = [f"{digest}  {file.name}\n" for digest, file in zip(threads.map(_hash, found), found, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def digest_folders(folders: Sequence[Path]) -> str:
    """Returns a revision for local models: it changes when a weight or a configuration changes, in any byte."""
    files = [file for folder in folders for file in folder.glob("*") if file.suffix in DECISIVE]
    files += [folder / name for folder in folders for name in later_files(read_modules(folder))]
    return digest_files(files)[:40]


def _hash(file: Path) -> str:
    """Hashes a file once in this process, unless it changes; nobody can set back the ``st_ctime`` of the system."""
    state = file.stat()
    return _hash_known(file.resolve(), state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@cache
def _hash_known(file: Path, *_: int) -> str:
    return hash_file(file)


@cache
def digest_code() -> str:
    """Returns the digest of this package's code, as far as it decides embeddings."""
    folder = Path(__file__).parent
    return digest_files(file for pattern in CODE for file in folder.glob(pattern))


# ---- a model in memory ----


def fingerprint(model: SentenceTransformer) -> bytes:
    """Returns a digest of all that decides the raw hidden states of a prompt: weights, settings, tokenizer, code.

    Every value of every weight counts. It is the same on any device.
    """
    first: Any = model[0]
    state = hashlib.sha256()
    settings = {
        "code": digest_code(),
        "exif": is_on("E5V_EXIF", usual=False),
        "layout": first.image_layout,
        "backbone": asdict(first.backbone),
        "length": first.max_seq_length,
        "config": _without_names(first.config.to_dict()),
        "processor": first.processor.image_processor.to_dict(),
        "tokenizer": first.tokenizer.backend_tokenizer.to_str(),
        "modules": [(type(module).__name__, _settings(module)) for module in model],
        # How strongly each adapter acts on each layer is not a weight
        "scaling": {name: part.scaling for name, part in first.model.named_modules() if hasattr(part, "scaling")},
    }
    state.update(json.dumps(settings, sort_keys=True, default=str).encode())
    later = [(f"{place}.{name}", value) for place in range(1, len(model)) for name, value in _state(model[place])]
    names, tensors = zip(*_tensors(first), *later, strict=True)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for name, tensor, digest in zip(names, tensors, threads.map(_hash_tensor, tensors), strict=True):
            state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + digest)
    return state.digest()[:20]


def _settings(module: Any) -> dict[str, Any]:
    """Returns the settings of a module behind the transformer, whose own are read one by one."""
    return {} if hasattr(module, "image_layout") else module.get_config_dict()


def _state(module: Any) -> list[tuple[str, torch.Tensor]]:
    return sorted(module.state_dict().items())


def _tensors(transformer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields all that a forward pass reads, by name; a quantised weight as its integers and its scales."""
    model = transformer.model
    embedding = model.get_input_embeddings().weight
    for name, weight in sorted([*model.named_parameters(), *model.named_buffers()]):
        image = transformer.config.image_token_id
        # The image token's row is never read, and random where the published checkpoint lacks it
        shown = [weight[:image], weight[image + 1 :]] if weight is embedding else [weight]
        yield from ((name, getattr(part, "qdata", part)) for part in shown)
        state = getattr(weight, "quant_state", None)  # bitsandbytes in 4 bits, whose scales may be quantised in turn
        scales = [getattr(weight, "SCB", None), getattr(weight, "scale", None)]
        scales += [getattr(each, part, None) for each in (state, getattr(state, "state2", None)) for part in _SCALES]
        yield from ((f"{name}.{number}", each) for number, each in enumerate(scales) if each is not None)


_SCALES = ("absmax", "offset")


def _hash_tensor(tensor: torch.Tensor) -> bytes:
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy()).digest()


def _without_names(config: Any) -> Any:
    """Returns a configuration without what says where it came from."""
    if not isinstance(config, dict):
        return config
    without = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
    return {name: _without_names(value) for name, value in config.items() if name not in without}
