"""Files: what a path or hub id names; whole files and JSON, written to a temporary name and renamed; checksums."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

#: Endings of files and archives, which models and datasets of the hub do not have.
FILE_SUFFIXES = (
    *(".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".yaml", ".txt", ".md", ".py"),
    *(".tar", ".tgz", ".gz", ".zip", ".7z", ".bz2", ".xz", ".zst"),
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npy", ".npz"),
    *(".png", ".jpg", ".jpeg", ".gif", ".webp", ".tif", ".tiff", ".bmp"),
)


# ---- names ----


def locate(name: str | Path) -> Path | None:
    """Finds what a path or a hub id names, without asking the hub.

    Args:
        name: A file, a folder, or ``owner/name``. A leading ``~`` is the home directory.

    Returns:
        The path if there is one; ``None`` for a hub id.

    Raises:
        ValueError: If nothing is there and it cannot be a hub id, or is more likely a misspelt path.
    """
    path = Path(os.path.expanduser(name))
    if path.exists():
        return path
    near = _nearest(path)
    guess = f"; is it {near}?" if near else ""
    if not is_hub_id(str(name)):
        raise ValueError(f"there is no file or folder {name}, and it is not a hub id (owner/name){guess}")
    if near or path.parent.is_dir():
        where = guess or f", though there is a folder {path.parent}"
        raise ValueError(f"there is no file or folder {name}{where}; if it is a hub id, run this in another directory")
    return None


def expand_home(words: Iterable[str]) -> list[str]:
    """Returns a command line with the home directory in ``--name=~/path`` too, in which shells leave the ``~``."""
    pairs = (word.partition("=") for word in words)
    return [
        f"{name}={os.path.expanduser(value)}" if name.startswith("--") and sep else name + sep + value
        for name, sep, value in pairs
    ]


def is_hub_id(name: str) -> bool:
    """Whether a string has the form of a hub id (``owner/name``), whatever is on this machine."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if name.count("/") != 1 or name.lower().endswith(FILE_SUFFIXES):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _nearest(path: Path) -> Path | None:
    """Returns the existing path that differs from this one by a misspelt name or a misspelt folder."""
    found = _alike(path) if path.parent.is_dir() else [near / path.name for near in _alike(path.parent)]
    return next((near for near in found if near.exists()), None)


def _alike(path: Path) -> list[Path]:
    folder = path.parent
    names = os.listdir(folder) if folder.is_dir() and os.access(folder, os.R_OK) else []
    return [path.with_name(name) for name in difflib.get_close_matches(path.name, names, cutoff=0.75)]


# ---- whole files ----


def check_folder(path: Path) -> None:
    """Raises ValueError if a folder to write cannot be made, because it or what it lies in is a file."""
    nearest = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    if not nearest.is_dir():
        raise ValueError(f"{path} cannot be written: {nearest} is not a folder. Choose another")


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes a file so that nobody ever sees half of it; text as UTF-8.

    Raises:
        OSError: If it cannot be written; the message names it.
    """
    # Readers of a folder of Parquet files skip names that begin with a dot
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, indented, as :func:`write_atomically` does."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    # Only half a character, as of a file name that is not UTF-8, has no bytes: its escape is what JSON has for it
    write_atomically(path, text.encode(errors="backslashreplace"))


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file.

    Raises:
        ValueError: If it is not there, or not JSON; the message names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def hash_file(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def printable(name: str) -> str:
    """Returns a name on one line: what would move the cursor is written as an escape."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in name)
