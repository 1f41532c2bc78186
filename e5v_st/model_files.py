"""What the files of a model say without loading it: which version they are, and how large the model is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from .fingerprint import digest_folders
from .provenance import CONFIG, base_of, find_folder
from .published import TINY_NAME


@dataclass(frozen=True)
class Tensor:
    """A weight in a file: its shape, and where its bytes begin and end."""

    shape: list[int]
    begin: int
    end: int


def revision_of(name: str, revision: str | None = None, adapter: str | None = None, *, loaded: bool = False) -> str:
    """Returns one revision for a model and the adapter on it, by which its results are kept; see :func:`version_of`."""
    versions = version_of(name, revision, loaded=loaded)
    versions += version_of(adapter, loaded=loaded)[:1] if adapter else []
    return versions[0] if len(versions) == 1 else hashlib.sha256(json.dumps(versions).encode()).hexdigest()[:40]


def version_of(name: str, revision: str | None = None, *, loaded: bool = False) -> list[str]:
    """Returns what tells versions of a model or adapter apart: a digest or commit, and that of an adapter's base.

    Args:
        name: Directory or hub id.
        revision: A commit of the hub id, where one is meant.
        loaded: Whether the model was just loaded: then the cache knows the commit of a hub id.
    """
    is_local = Path(name).is_dir() or name == TINY_NAME
    folder = find_folder(name, revision) if is_local or loaded else None
    if folder is None:
        return [revision or "main"]
    own = digest_folders([folder]) if is_local else folder.name  # the cache has a folder for each commit
    base, base_revision = base_of(folder)
    # The digest or commit covers a revision that the adapter's configuration names
    moves = base not in ("", name) and not base_revision
    return [own, *(version_of(base, loaded=loaded) if moves else [])]


def _read_header(file: Path) -> dict[str, Tensor]:
    """Returns the weights in a safetensors file; none where it is damaged."""
    try:
        with file.open("rb") as weights:
            size = int.from_bytes(weights.read(8), "little")
            header = json.loads(weights.read(size)) if size < file.stat().st_size else {}
        return {
            name: Tensor(list(entry["shape"]), *(8 + size + int(offset) for offset in entry["data_offsets"]))
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def sizes(folders: Sequence[Path]) -> dict[str, Any]:
    """Returns the sizes in ``ModelMeta`` of a model in some folders (such as an adapter's and its base's).

    As mteb counts them on the hub: every weight that the files hold.
    """
    files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
    tensors = {name: tensor for file in files for name, tensor in _read_header(file).items()}
    tables = [tensor.shape for name, tensor in tensors.items() if name.endswith("embed_tokens.weight")]
    if not tables:
        return {}
    config = next((own for folder in folders if (own := _read(folder / CONFIG))), {})
    text = config.get("text_config") or {}
    stored = sum(tensor.end - tensor.begin for tensor in tensors.values())
    return {
        "n_parameters": sum(prod(tensor.shape) for tensor in tensors.values()),
        "n_embedding_parameters": prod(tables[0]),
        "memory_usage_mb": round(stored / 2**20),
        "embed_dim": tables[0][-1],
        # Qwen 2 VL's configuration is that of a language model, with a part for vision
        "max_tokens": text.get("max_position_embeddings", config.get("max_position_embeddings")),
    }


def licence(folders: Sequence[Path]) -> str | None:
    """Returns the licence that the first card in some folders names: its identifier, or the address of a special one.

    Nothing depends on it, so a card that cannot be read names none.
    """
    import yaml
    from huggingface_hub import ModelCard

    for file in (folder / "README.md" for folder in folders):
        try:
            card = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict() if file.is_file() else {}
        except (OSError, ValueError, yaml.YAMLError):
            continue
        link = str(card.get("license_link"))
        if name := card.get("license"):
            return link if name == "other" and link.startswith("http") else str(name)
    return None


def _read(file: Path) -> dict[str, Any]:
    """Returns a JSON object; an empty one where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
