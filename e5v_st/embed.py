"""Embeds a folder of images, a table or a data set into Parquet shards; can be stopped and started at any time.

A shard is written to a temporary name, renamed, and then gets its checksum beside it: a shard with a right checksum is
done, any other is made again. Under ``accelerate launch`` each process takes its own shards.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from sentence_transformers import SentenceTransformer

TABLES = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
IMAGE_COLUMNS = ("image", "img", "image_path", "path", "file", "file_name", "url")
TEXT_COLUMNS = ("text", "caption", "sentence", "query", "title")
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Source:
    """Rows by number: ``ids[i]`` names row i, ``rows[i]`` is something that ``columns`` turns into an item."""

    ids: Sequence[str]
    rows: Sequence[Any]
    columns: tuple[str | None, str | None]
    folder: Path

    def items(self, start: int, stop: int) -> list[Any]:
        """The items of some rows."""
        image, text = self.columns
        return [_to_item(self.rows[i], image, text, self.folder) for i in range(start, min(stop, len(self.ids)))]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that choose and load a model."""
    parser.add_argument(
        "--model", default="royokong/e5-v", help="a directory or hub id, or e5v-tiny (default: %(default)s)"
    )
    parser.add_argument(
        "--image-layout", choices=("upstream", "paper"), default="upstream", help="default: %(default)s"
    )
    add_loading_arguments(parser)


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds those arguments of them that ``e5v eval`` has as well."""
    parser.add_argument("--adapter", help="a LoRA to put on it: a directory or hub id")
    parser.add_argument(
        "--dtype", help="bfloat16, float16 or float32 (default: bfloat16 on a GPU, else the checkpoint's)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    parser.add_argument("--max-batch-tokens", type=int, help="most tokens computed together (default: by free memory)")
    parser.add_argument(
        "--quantize",
        choices=("int8", "nf4", "fp8"),
        help="hold the language model so; loads it unquantised first, to print the cosine between the two",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the language model: a slow start")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``e5v embed``."""
    parser.add_argument("source", help="a folder of images, a .csv, .jsonl or .parquet file, or a hub data set's id")
    parser.add_argument("out", type=Path, help="the folder to write; run again to go on where it stopped")
    add_model_arguments(parser)
    parser.add_argument("--prompt", help="a prompt's name or a template (default: by what a row holds)")
    parser.add_argument("--split", default="train", help="of a hub data set (default: %(default)s)")
    parser.add_argument("--id-column", help="default: 'id' if there is one, else the row's number")
    parser.add_argument("--image-column", help=f"default: the first of {', '.join(IMAGE_COLUMNS)}")
    parser.add_argument("--text-column", help=f"default: the first of {', '.join(TEXT_COLUMNS)}")
    parser.add_argument("--rows-per-shard", type=int, default=5000, help="default: %(default)s")
    parser.add_argument("--on-error", choices=("skip", "raise"), default="skip", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Runs ``e5v embed``."""
    if args.rows_per_shard < 1:
        raise ValueError(f"got --rows-per-shard {args.rows_per_shard}, want at least 1")
    source = open_source(args.source, args.split, args.id_column, args.image_column, args.text_column)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    start_job(args.out, describe_job(args, source))
    shards = [number for number in range(count_shards(source, args.rows_per_shard)) if number % world == rank]
    left = [number for number in shards if not is_done(shard_path(args.out, number))]
    print(f"{len(source.ids)} rows, {len(shards)} shards for this process, {len(shards) - len(left)} done already")
    failed = 0
    model = _load_and_compare(args) if left else None
    for number in left:
        first = number * args.rows_per_shard
        failed += _embed_shard(model, source, args, number, first, first + args.rows_per_shard)
    _sweep(args.out, {MANIFEST, *(shard_path(args.out, number).name for number in shards)})
    if failed:
        print(f"{failed} rows could not be embedded; the column 'error' says why")
    return 0


def _load_and_compare(args: argparse.Namespace) -> SentenceTransformer:
    """Loads the model that will embed; where it is quantised, prints what that changes."""
    from .checkpoint import compile_layers
    from .quantize import embed_unquantised, print_cosines

    unquantised = embed_unquantised(partial(load_for, args)) if args.quantize else None
    model = load_for(args)
    print_cosines(model, args.quantize, unquantised)
    if args.compile:
        compile_layers(model)
    return model


def load_for(args: argparse.Namespace, **changes: Any) -> SentenceTransformer:
    """Loads the model that :func:`add_model_arguments` chose, on this process's GPU under ``accelerate launch``.

    Args:
        args: The arguments.
        **changes: What is to be other than in ``args``.
    """
    from .checkpoint import load

    args = argparse.Namespace(**{**vars(args), **changes})
    device = args.device or (f"cuda:{os.environ['LOCAL_RANK']}" if _has_own_gpu() else None)
    more = {"model_kwargs": {"dtype": args.dtype}} if args.dtype else {}
    more |= {"adapter": args.adapter, "quantize": args.quantize}
    return load(args.model, image_layout=args.image_layout, device=device, **more)


def _has_own_gpu() -> bool:
    import torch

    return "LOCAL_RANK" in os.environ and torch.cuda.is_available()


def _embed_shard(
    model: SentenceTransformer, source: Source, args: argparse.Namespace, number: int, start: int, stop: int
) -> int:
    from .encoder import stream_all

    items = source.items(start, stop)
    prompt = model.prompts.get(args.prompt, args.prompt)
    results = stream_all(model, items, prompt=prompt, batch_tokens=args.max_batch_tokens, on_error=args.on_error)
    results = list(results)
    # The data set's row is what a user can look up, not the place in this shard
    errors = [r.error and r.error.replace(f"item {r.index}:", f"row {start + r.index}:", 1) for r in results]
    path = shard_path(args.out, number)
    write_shard(path, source.ids[start : start + len(items)], [r.embedding for r in results], errors)
    return sum(error is not None for error in errors)


# ---- where rows come from ----


def open_source(source: str, split: str, id_column: str | None, image: str | None, text: str | None) -> Source:
    """Opens a folder of images, a table, or a hub data set.

    Raises:
        ValueError: If there is nothing to embed in it, or a named column is not there.
    """
    from .items_e5v import IMAGE_SUFFIXES

    path = Path(source)
    if path.is_dir():
        named = (file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        files = sorted(file for file in named if not file.is_dir())
        if not files:
            raise ValueError(f"the folder {source} has no images ({', '.join(IMAGE_SUFFIXES)})")
        # A name need not be UTF-8, which Parquet wants: other bytes are written as \xNN
        names = [os.fsencode(file.relative_to(path).as_posix()).decode("utf8", "backslashreplace") for file in files]
        return Source(names, files, ("", None), path)
    rows = _open_table(path) if path.suffix.lower() in TABLES else _open_data_set(source, split)
    names = rows.column_names
    for name in (id_column, image, text):
        if name is not None and name not in names:
            raise ValueError(f"{source} has no column {name!r}, but {', '.join(names)}")
    image = image or next((name for name in IMAGE_COLUMNS if name in names), None)
    text = text or next((name for name in TEXT_COLUMNS if name in names), None)
    if image is None and text is None:
        raise ValueError(f"{source} has the columns {', '.join(names)}: say which with --image-column or --text-column")
    rows = _leave_images_undecoded(rows)
    id_column = id_column or ("id" if "id" in names else None)
    ids = [str(value) for value in rows[id_column]] if id_column else [str(i) for i in range(len(rows))]
    return Source(ids, rows, (image, text), path.parent)


def _open_table(path: Path) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    kind = TABLES[path.suffix.lower()]
    try:
        more = _csv_options(path, "\t" if path.suffix.lower() == ".tsv" else ",") if kind == "csv" else {}
        return load_dataset(kind, data_files=str(path), split="train", **more)
    except (DatasetGenerationError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error.__cause__ or error}") from error


def _csv_options(path: Path, separator: str) -> dict[str, Any]:
    """Cells are the text that stands there ("007" is no number, "NA" no gap); an empty one is a missing value."""
    import pandas as pd
    from datasets import Features, Value

    names = pd.read_csv(path, sep=separator, nrows=0, index_col=False).columns
    features = Features({name: Value("string") for name in names})
    # Without index_col, a row with a comma too many would move into the columns before
    return {"sep": separator, "features": features, "keep_default_na": False, "na_values": [""], "index_col": False}


def _open_data_set(name: str, split: str) -> Any:
    from datasets import load_dataset

    if name.count("/") != 1:
        raise ValueError(f"{name} is no folder, no {', '.join(TABLES)} file, and no hub data set (owner/name)")
    return load_dataset(name, split=split)


def _leave_images_undecoded(rows: Any) -> Any:
    from datasets import Image

    for name, feature in rows.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
    return rows


def _to_item(row: Any, image: str | None, text: str | None, folder: Path) -> Any:
    if isinstance(row, Path):
        return {"image": row}
    item = {}
    if image is not None and row[image] is not None:
        local = folder / row[image] if isinstance(row[image], str) and "://" not in row[image] else row[image]
        item["image"] = local
    if text is not None and row[text] is not None:
        item["text"] = row[text]
    return item


# ---- what is written ----


def describe_job(args: argparse.Namespace, source: Source) -> dict[str, Any]:
    """What must be the same for a job to go on: source, rows, model and settings."""
    names = ("source", "model", "adapter", "dtype", "quantize", "image_layout", "prompt", "rows_per_shard")
    ids = hashlib.sha256("\0".join(source.ids).encode()).hexdigest()
    turned = os.environ.get("E5V_EXIF", "0") == "1"
    return {**{name: getattr(args, name) for name in names}, "exif": turned, "rows": len(source.ids), "ids_sha256": ids}


def start_job(out: Path, job: dict[str, Any]) -> None:
    """Writes the manifest, or compares with the one that is there.

    Raises:
        ValueError: If the folder holds another job.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / MANIFEST
    if path.is_file():
        there = read_manifest(path)
        changed = sorted(name for name in job if there.get(name) != job[name])
        if changed:
            what = ", ".join(f"{name} {there.get(name)!r} (now {job[name]!r})" for name in changed)
            raise ValueError(f"{out} holds another job: {what}. Choose another folder, or delete this one.")
        return
    _write_atomically(path, json.dumps(job, indent=2).encode())


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads the description of a job; raises ValueError, naming the file, if it is none."""
    try:
        job = json.loads(path.read_text(encoding="utf8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete the folder, or choose another") from error
    if not isinstance(job, dict):
        raise ValueError(f"{path} holds a {type(job).__name__}, want the description of a job")
    return job


def count_shards(source: Source, rows_per_shard: int) -> int:
    """Number of shards of a job."""
    return -(-len(source.ids) // rows_per_shard)


def shard_path(out: Path, number: int) -> Path:
    """Where a shard stands."""
    return out / f"shard-{number:05d}.parquet"


def is_done(path: Path) -> bool:
    """Whether a shard is there, whole and unchanged."""
    checksum = path.with_suffix(".sha256")
    if not path.is_file() or not checksum.is_file():
        return False
    return checksum.read_text().strip() == hashlib.sha256(path.read_bytes()).hexdigest()


def write_shard(
    path: Path, ids: Sequence[str], embeddings: Sequence[np.ndarray | None], errors: Sequence[str | None]
) -> None:
    """Writes a shard's table, and the checksum."""
    import io

    import pyarrow.parquet as pq

    data = io.BytesIO()
    pq.write_table(make_table(ids, embeddings, errors), data)
    _write_atomically(path, data.getvalue())
    _write_atomically(path.with_suffix(".sha256"), hashlib.sha256(data.getvalue()).hexdigest().encode())


def make_table(ids: Sequence[str], embeddings: Sequence[np.ndarray | None], errors: Sequence[str | None]) -> pa.Table:
    """Columns ``id``, ``embedding`` (float32, null where there is an error) and ``error``."""
    import pyarrow as pa

    vectors = pa.array([None if e is None else e.tolist() for e in embeddings], pa.list_(pa.float32()))
    return pa.table(
        {"id": pa.array(list(ids), pa.string()), "embedding": vectors, "error": pa.array(list(errors), pa.string())}
    )


def _sweep(out: Path, names: set[str]) -> None:
    """Removes what processes left that were killed while they wrote these files."""
    for part in out.glob("*.part"):
        written_for = part.name.rsplit(".", 2)[0].replace(".sha256", ".parquet")
        if written_for in names:
            part.unlink(missing_ok=True)


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
