"""The manifest of an index: what the index was made from, and whether it is still so.

A model's name says little: weights change in place, and the hub moves on. A manifest records digests of all that
decides an embedding. The name and the commit only say where to find the model again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import __version__
from ..files import read_json, write_json
from ..fingerprint import ADAPTER, digest_code, digest_files, digest_settings, digest_weights
from ..provenance import CONFIG, Origin, find_origin
from ..published import TINY, TINY_NAME
from ..saved import read_transformer_settings
from .shards import job_of

MANIFEST = "_manifest.json"
#: Before the first release. Such a manifest does not know its weights: its index can be neither continued nor searched.
OLD_MANIFEST = "manifest.json"
#: digest in a manifest -> what it is of
DIGESTS = {
    "weights_sha256": "weights",
    "settings_sha256": "configuration, tokenizer or image processor",
    "adapter_sha256": "adapter",
    "code_sha256": "code",
}
#: What a manifest says of models besides, which may change: names of the same files, and libraries.
NAMES = ("model", "model_revision", "adapter", "adapter_revision", "versions")


# ---- the job ----


def check_job(out: Path, job: dict[str, Any], *, repaired: bool = False) -> None:
    """Raises ValueError if a folder holds another job. What source and model hold matters, where they are does not.

    Args:
        out: The folder.
        job: This job.
        repaired: Whether the content may have changed, but for the rows' names.
    """
    refuse_old(out)
    if not (out / MANIFEST).is_file():
        _check_shards(out, digest_job(job))
        return
    there = read_manifest(out / MANIFEST)
    may_change = {"source", "job_sha256", *NAMES, *DIGESTS, *(["content"] if repaired else [])}
    changed = sorted(name for name in job if name not in may_change and there.get(name) != job[name])
    if changed == ["content"]:
        raise ValueError(
            f"{out} was made from another content of {job['source']}: choose another folder, or delete this one; "
            "--retry-errors computes only the rows again that have an error"
        )
    if changed:
        what = ", ".join(f"{name} {there.get(name)!r} (now {job[name]!r})" for name in changed)
        raise ValueError(f"{out} holds another job: {what}. Choose another folder, or delete this one.")
    check_same_models(there, job, out)


def check_repair(out: Path, job: dict[str, Any], ids: Sequence[str], *, numbered: bool) -> None:
    """Raises ValueError if a source has changed and its ids do not say whose embedding each row has.

    Args:
        out: The folder.
        job: This job.
        ids: Of the rows.
        numbered: Whether the ids are the rows' numbers.
    """
    path = out / MANIFEST
    if not path.is_file() or read_manifest(path).get("content") == job["content"]:
        return
    why = "has no column of ids" if numbered else "has ids that stand in several rows"
    if numbered or len(set(ids)) < len(ids):
        raise ValueError(
            f"{job['source']} has changed since {out} was made and {why}, so a row that moved would keep another "
            "row's embedding: embed into a new folder. --retry-errors wants an id for each row then"
        )


def _check_shards(out: Path, digest: str) -> None:
    """Raises ValueError for shards without a manifest, unless this job made them all."""
    others = [path.name for path in sorted(out.glob("shard-*.parquet")) if job_of(path) != digest]
    if others:
        raise ValueError(
            f"{out} holds shards of another job and no {MANIFEST} ({others[0]}, {len(others)} in all): "
            "choose another folder, or delete this one"
        )


def digest_job(job: dict[str, Any]) -> str:
    """Returns a digest of all that decides the rows of a job, whatever the names of its files."""
    lasting = {name: value for name, value in job.items() if name not in ("source", "job_sha256", *NAMES)}
    return hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()


def find_digest(out: Path, job: dict[str, Any]) -> str:
    """Returns what the shards of a job are marked with: its digest, as it was when the job began.

    A repaired source changes a job's digest, and ``--retry-errors`` leaves most shards as they are.

    Args:
        out: The folder, checked by :func:`check_job`.
        job: The job.
    """
    path = out / MANIFEST
    return (read_manifest(path).get("job_sha256") if path.is_file() else None) or digest_job(job)


def refuse_old(out: Path) -> None:
    """Raises ValueError if a folder holds an index that does not know its weights."""
    if (out / OLD_MANIFEST).is_file() and not (out / MANIFEST).is_file():
        raise ValueError(
            f"{out} holds an index of an older version ({OLD_MANIFEST}), which does not know the weights that made it: "
            "embed into a new folder, or delete this one"
        )


def start_job(out: Path, job: dict[str, Any], *, repaired: bool = False) -> None:
    """Writes the manifest, unless it is there as it should be; see :func:`check_job`.

    Raises:
        ValueError: If another job has begun in the folder meanwhile.
    """
    out.mkdir(parents=True, exist_ok=True)
    check_job(out, job, repaired=repaired)
    path = out / MANIFEST
    if not path.is_file() or read_manifest(path) != job:
        write_json(path, job)


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads the description of a job; raises ValueError, naming the file, if it is not one."""
    try:
        job = json.loads(path.read_text(encoding="utf8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete the folder, or choose another") from error
    if not isinstance(job, dict):
        raise ValueError(f"{path} holds a {type(job).__name__}, want the description of a job")
    return job


# ---- the models ----


def find_recorded(job: Mapping[str, Any], kind: str, index: Path) -> Origin | None:
    """Finds the model or the adapter that a manifest names.

    Args:
        job: The manifest's content.
        kind: ``"model"`` or ``"adapter"``.
        index: The folder that holds it.

    Returns:
        The origin; ``None`` if the job had none.

    Raises:
        ValueError: If it is no longer there.
    """
    name, revision = job[kind], job.get(f"{kind}_revision")
    if name is None:
        return None
    if name == TINY_NAME or revision is not None:
        return find_origin(name, revision)
    folder = Path(os.path.realpath(index), str(name)).resolve()
    if not folder.is_dir():
        raise ValueError(f"the {kind} of {index} is no longer in {folder}: say with --{kind} where it is now")
    return Origin(str(folder), folder)


def describe_models(model: Origin, adapter: Origin | None, index: Path) -> dict[str, Any]:
    """Returns what a manifest says of a model and of the adapter on it.

    Args:
        model: A model, or an adapter that names its base.
        adapter: One more adapter.
        index: The folder of the manifest.
    """
    base = model.base()
    adapters = [each.folder for each in (base and model, adapter) if each]
    folders = [each.folder for each in (base, model) if each]
    return {
        "model": model.seen_from(index),
        "model_revision": model.commit,
        "adapter": adapter and adapter.seen_from(index),
        "adapter_revision": adapter and adapter.commit,
        "weights_sha256": digest_weights(folders[0]),
        "settings_sha256": digest_settings(folders),
        "adapter_sha256": digest_files(folder / name for folder in adapters for name in ADAPTER) if adapters else None,
        "code_sha256": digest_code(),
        "versions": {"e5v-st": __version__, **{name: version(name) for name in ("torch", "transformers", "pillow")}},
    }


def find_dtype(model: Origin, named: str | None, device: str | None, quantize: str | None) -> str:
    """Returns the dtype that a model is loaded in. It depends on the machine, unless the user names one.

    Args:
        model: The model.
        named: The dtype that the user wants.
        device: The device that the user wants.
        quantize: How the language model is quantised.
    """
    if named is not None:
        return named
    if model.folder == TINY:
        return "float32"
    import torch

    if torch.cuda.is_available() and not str(device or "cuda").startswith("cpu"):
        return "bfloat16"
    config = read_json((model.base() or model).folder / CONFIG)
    return "float32" if quantize else config.get("dtype") or config.get("torch_dtype") or "float32"


def find_layout(model: Origin, named: str | None) -> str:
    """Returns the image layout that a model is loaded in.

    Args:
        model: The model.
        named: The layout that the user wants.
    """
    if named is not None:
        return named
    return str(read_transformer_settings(model.folder, ["image_layout"]).get("image_layout", "upstream"))


def check_same_models(there: Mapping[str, Any], here: Mapping[str, Any], index: Path) -> None:
    """Refuses to put together embeddings of different models.

    Args:
        there: What the index's manifest says.
        here: What :func:`describe_models` says now.
        index: Named in the message.

    Raises:
        ValueError: If a digest differs; the message says of what, and what to do.
    """
    changed = [name for name in DIGESTS if there.get(name) != here[name]]
    if not changed:
        return
    if changed == ["code_sha256"]:
        made_by = (there.get("versions") or {}).get("e5v-st")
        raise ValueError(
            f"{index} was made by other code (e5v-st {made_by}, this is {__version__}), which may give other "
            "embeddings: install the version that made it, or embed into a new folder"
        )
    what = " and the ".join(DIGESTS[name] for name in changed)
    made_with, given = _named(there, index), _named(here, index)
    if made_with == given:
        do = "has changed since then: put the old files back"
    else:
        do = f"was made with {made_with}: name that"
    raise ValueError(f"{given} does not have the {what} of {index}, which {do}, or embed into a new folder")


def _named(job: Mapping[str, Any], index: Path) -> str:
    """Returns the arguments that name a job's model and adapter."""
    words = []
    for kind in ("model", "adapter"):
        name, revision = job.get(kind), job.get(f"{kind}_revision")
        if name is not None and name != TINY_NAME:
            path = os.path.normpath(os.path.join(os.path.realpath(index), str(name)))
            name = f"{name}@{revision}" if revision else path
        words += [f"--{kind} {name}"] if name is not None else []
    return " ".join(words)
