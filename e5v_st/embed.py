"""Embeds a folder of images, a table or a data set into Parquet shards; can be stopped and started at any time.

A shard is written to a temporary name, renamed, and then gets its checksum beside it: a shard with a right checksum is
done, any other is made again. The manifest tells what the shards were made from, so that no other job goes on in their
folder. Under ``accelerate launch`` each process takes its own shards.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from sentence_transformers import SentenceTransformer

TABLES = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
IMAGE_COLUMNS = ("image", "img", "image_path", "path", "file", "file_name")
TEXT_COLUMNS = ("text", "caption", "sentence", "query", "title")
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Source:
    """Rows by number: ``ids[i]`` names row i, ``rows[i]`` is a file, or holds an item in its columns.

    Attributes:
        ids: As they stand in the shards.
        rows: Paths of images, or dictionaries.
        columns: Where a row's image and its text are; both ``None`` for a folder of images.
        folder: What paths are relative to.
        content: A hash of what the rows are made from: a folder's names and sizes, a file's bytes, or the data set's
            own fingerprint.
    """

    ids: Sequence[str]
    rows: Sequence[Any]
    columns: tuple[str | None, str | None]
    folder: Path
    content: str

    def item(self, row: int) -> Any:
        """Returns what a row embeds."""
        return _to_item(self.rows[row], *self.columns, self.folder)


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
    parser.add_argument(
        "--max-batch-tokens", type=int, help="most tokens computed together (default: by the GPU's free memory)"
    )
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
    parser.add_argument("--config", help="of a hub data set that has several")
    parser.add_argument("--id-column", help="default: 'id' if there is one, else the row's number")
    parser.add_argument(
        "--image-column", help=f"default: the first of {', '.join(IMAGE_COLUMNS)}; without a text also url"
    )
    parser.add_argument(
        "--text-column", help=f"default: the first of {', '.join(TEXT_COLUMNS)}. Who names one column gets it alone"
    )
    parser.add_argument("--rows-per-shard", type=int, default=5000, help="default: %(default)s")
    parser.add_argument("--on-error", choices=("skip", "raise"), default="skip", help="default: %(default)s")
    parser.add_argument(
        "--retry-errors",
        action="store_true",
        help="try the rows again that have an error so far, from a source that may have been repaired",
    )


def run(args: argparse.Namespace) -> int:
    """Runs ``e5v embed``."""
    if args.rows_per_shard < 1:
        raise ValueError(f"got --rows-per-shard {args.rows_per_shard}, want at least 1")
    if args.max_batch_tokens is not None and args.max_batch_tokens < 1:
        raise ValueError(f"got --max-batch-tokens {args.max_batch_tokens}, want at least 1")
    columns = {"id_column": args.id_column, "image": args.image_column, "text": args.text_column}
    source = open_source(args.source, split=args.split, config=args.config, **columns)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    job = describe_job(args, source)
    check_job(args.out, job, repaired=args.retry_errors)
    shards = [number for number in range(count_shards(source, args.rows_per_shard)) if number % world == rank]
    done = {number for number in shards if is_done(shard_path(args.out, number))}
    wanted = _find_wanted(args, source, shards, done)
    _print_columns(source)
    print(f"{len(source.ids)} rows, {len(shards)} shards for this process, {len(done)} done already")
    model = _load_and_compare(args) if wanted else None
    prompt = find_prompt(model, args.prompt) if wanted else None
    start_job(args.out, job, repaired=args.retry_errors)  # only now: a start that failed leaves nothing behind
    if wanted:
        _embed_shards(model, source, args, prompt, wanted)
    _sweep(args.out, {MANIFEST, *(shard_path(args.out, number).name for number in shards)})
    failed = sum(error is not None for number in shards for error in read_errors(shard_path(args.out, number)))
    if failed:
        print(f"{failed} rows could not be embedded; the column 'error' says why, --retry-errors tries them again")
    # A process of several that ended so would have its launcher end the others
    return int(world == 1 and failed == len(source.ids))


def _find_wanted(
    args: argparse.Namespace, source: Source, shards: Sequence[int], done: set[int]
) -> dict[int, Sequence[int]]:
    """Rows to compute, by shard: all of those that are not done; of others, on request, those that have an error."""
    wanted: dict[int, Sequence[int]] = {}
    for number in shards:
        rows: Sequence[int] = rows_of_shard(source, args.rows_per_shard, number)
        if number in done:
            errors = read_errors(shard_path(args.out, number)) if args.retry_errors else ()
            rows = list(itertools.compress(rows, map(bool, errors)))
        if rows:
            wanted[number] = rows
    return wanted


def _print_columns(source: Source) -> None:
    image, text = source.columns
    if image is not None and text is not None:
        print(
            f"images are in the column {image!r}, texts in {text!r}, and a row with both is one embedding; "
            "--image-column or --text-column takes one of them alone"
        )


def find_prompt(model: SentenceTransformer, prompt: str | None) -> str | None:
    """Returns the template of a prompt's name, and anything else as it is; raises ValueError for a misspelt name."""
    if prompt is None or prompt in model.prompts:
        return model.prompts.get(prompt)
    if near := difflib.get_close_matches(prompt, model.prompts, n=1, cutoff=0.75):
        raise ValueError(f"there is no prompt {prompt!r}; is it {near[0]!r}? There are {', '.join(model.prompts)}")
    return prompt


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


def _embed_shards(
    model: SentenceTransformer,
    source: Source,
    args: argparse.Namespace,
    prompt: str | None,
    wanted: dict[int, Sequence[int]],
) -> None:
    """Embeds rows of shards as one job, and writes each shard when it is complete.

    Args:
        model: An E5-V.
        source: Holds the rows.
        args: Of ``e5v embed``.
        prompt: For all rows.
        wanted: Which rows of which shards; other rows of these shards stay as they are.
    """
    from .encoder import stream_all

    size = args.rows_per_shard
    results = stream_all(
        model,
        map(source.item, itertools.chain.from_iterable(wanted.values())),
        prompt=prompt,
        batch_tokens=args.max_batch_tokens,
        on_error="skip",
        total=sum(map(len, wanted.values())),
    )
    with closing(results):
        for number, rows in wanted.items():
            path = shard_path(args.out, number)
            ids = source.ids[number * size : (number + 1) * size]
            nothing: list[None] = [None] * len(ids)
            embeddings, errors = (nothing, nothing[:]) if len(rows) == len(ids) else _read_shard(path)
            for row, result in zip(rows, results):  # noqa: B905 - the results of the next shard are left in the stream
                # The data set's row is what a user can look up, not the place in this job
                error = result.error and result.error.replace(f"item {result.index}:", f"row {row}:", 1)
                if error and args.on_error == "raise":
                    raise ValueError(error)
                embeddings[row - number * size], errors[row - number * size] = result.embedding, error
            write_shard(path, ids, embeddings, errors)


# ---- where rows come from ----


def open_source(
    source: str,
    *,
    split: str = "train",
    config: str | None = None,
    id_column: str | None = None,
    image: str | None = None,
    text: str | None = None,
) -> Source:
    """Opens a folder of images, a table, or a hub data set.

    Args:
        source: A path, or a data set's id.
        split: Of a data set.
        config: Of a data set that has several.
        id_column: See :func:`add_arguments`.
        image: The column of the images; guessed where neither it nor ``text`` is given.
        text: The column of the texts.

    Raises:
        ValueError: If there is nothing to embed in it, or a named column is not there.
    """
    from .encoder import leave_images_undecoded
    from .items_e5v import IMAGE_SUFFIXES

    path = Path(source)
    if path.is_dir():
        named = (file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        files = sorted(file for file in named if not file.is_dir())
        if not files:
            raise ValueError(f"the folder {source} has no images ({', '.join(IMAGE_SUFFIXES)})")
        # A name need not be UTF-8, which Parquet wants: other bytes are written as \xNN
        names = [os.fsencode(file.relative_to(path).as_posix()).decode("utf8", "backslashreplace") for file in files]
        sizes = [file.stat().st_size if file.exists() else None for file in files]
        return Source(names, files, (None, None), path, hashlib.sha256(repr((names, sizes)).encode()).hexdigest())
    is_table = path.suffix.lower() in TABLES
    rows = _open_table(path) if is_table else _open_data_set(source, config, split)
    names = rows.column_names
    for name in (id_column, image, text):
        if name is not None and name not in names:
            raise ValueError(f"{source} has no column {name!r}, but {', '.join(names)}")
    if image is None and text is None:
        image, text = _guess_columns(names)
    if image is None and text is None:
        raise ValueError(f"{source} has the columns {', '.join(names)}: say which with --image-column or --text-column")
    content = hash_file(path) if is_table else rows._fingerprint
    id_column = id_column or ("id" if "id" in names else None)
    ids = [str(value) for value in rows[id_column]] if id_column else [str(i) for i in range(len(rows))]
    # What is in other columns, as sounds, need not be readable
    rows = leave_images_undecoded(rows.select_columns([name for name in names if name in (image, text)]))
    return Source(ids, rows, (image, text), path.parent, content)


def _guess_columns(names: Sequence[str]) -> tuple[str | None, str | None]:
    text = next((name for name in TEXT_COLUMNS if name in names), None)
    # Beside a text, an address is more likely that of a page
    candidates = IMAGE_COLUMNS if text else (*IMAGE_COLUMNS, "url")
    return next((name for name in candidates if name in names), None), text


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_table(path: Path) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    kind = TABLES[path.suffix.lower()]
    try:
        more = _csv_options(path, "\t" if path.suffix.lower() == ".tsv" else ",") if kind == "csv" else {}
        return load_dataset(kind, data_files=str(path), split="train", **more)
    except (DatasetGenerationError, ValueError, StopIteration) as error:  # the last for an empty JSON file
        reason = str(error.__cause__ or error) or "it holds no rows"
        raise ValueError(f"{path} cannot be read: {reason}") from error


def _csv_options(path: Path, separator: str) -> dict[str, Any]:
    """Cells are the text that stands there ("007" is no number, "NA" no gap); an empty one is a missing value."""
    import pandas as pd
    from datasets import Features, Value

    names = pd.read_csv(path, sep=separator, nrows=0, index_col=False).columns
    features = Features({name: Value("string") for name in names})
    # Without index_col, a row with a comma too many would move into the columns before
    return {"sep": separator, "features": features, "keep_default_na": False, "na_values": [""], "index_col": False}


def _open_data_set(name: str, config: str | None, split: str) -> Any:
    from datasets import load_dataset

    if name.count("/") != 1:
        raise ValueError(f"{name} is no folder, no {', '.join(TABLES)} file, and no hub data set (owner/name)")
    try:
        return load_dataset(name, config, split=split)
    except ValueError as error:  # it names the configurations or splits that there are
        reason = " ".join(str(error).partition("\nExample of usage")[0].split())
        raise ValueError(f"{name} cannot be opened with --config {config} --split {split}: {reason}") from error


def _to_item(row: Any, image: str | None, text: str | None, folder: Path) -> Any:
    if isinstance(row, Path):
        return {"image": row}
    item = {}
    if image is not None and row[image] is not None:
        item["image"] = _beside(row[image], folder)
    if text is not None and row[text] is not None:
        item["text"] = row[text]
    return item


def _beside(image: Any, folder: Path) -> Any:
    """The image of a cell, with relative paths taken from the table's folder."""
    if isinstance(image, list):
        return [_beside(each, folder) for each in image]
    if isinstance(image, dict) and image.get("bytes") is None:
        image = image.get("path")
    return folder / image if isinstance(image, str) and "://" not in image else image


# ---- what is written ----


def describe_job(args: argparse.Namespace, source: Source) -> dict[str, Any]:
    """What a job is made from: source, rows, columns, model and settings.

    A local source is named as it is found from the output folder, so that both may move together.
    """
    names = ("model", "adapter", "dtype", "quantize", "image_layout", "prompt", "rows_per_shard")
    local = os.path.exists(args.source)
    return {
        "source": os.path.relpath(os.path.realpath(args.source), os.path.realpath(args.out)) if local else args.source,
        **{name: getattr(args, name) for name in names},
        **dict(zip(("image_column", "text_column"), source.columns, strict=True)),
        "exif": os.environ.get("E5V_EXIF", "0") == "1",
        "rows": len(source.ids),
        "ids_sha256": hashlib.sha256("\0".join(source.ids).encode()).hexdigest(),
        "content": source.content,
    }


def check_job(out: Path, job: dict[str, Any], *, repaired: bool = False) -> None:
    """Raises ValueError if a folder holds another job; where its source lies does not matter, what it holds does.

    Args:
        out: The folder.
        job: This job.
        repaired: Whether the content may have changed, but for the rows' names.
    """
    if not (out / MANIFEST).is_file():
        return
    there = read_manifest(out / MANIFEST)
    may_change = {"source", "content"} if repaired else {"source"}
    changed = sorted(name for name in job if name not in may_change and there.get(name) != job[name])
    if changed == ["content"]:
        raise ValueError(
            f"{out} was made from another content of {job['source']}: choose another folder, or delete this one; "
            "--retry-errors computes only the rows again that have an error"
        )
    if changed:
        what = ", ".join(f"{name} {there.get(name)!r} (now {job[name]!r})" for name in changed)
        raise ValueError(f"{out} holds another job: {what}. Choose another folder, or delete this one.")


def start_job(out: Path, job: dict[str, Any], *, repaired: bool = False) -> None:
    """Writes the manifest, where it is not there as it should be; see :func:`check_job`.

    Raises:
        ValueError: If another job has begun in the folder meanwhile.
    """
    out.mkdir(parents=True, exist_ok=True)
    check_job(out, job, repaired=repaired)
    path = out / MANIFEST
    if not path.is_file() or read_manifest(path) != job:
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


def rows_of_shard(source: Source, rows_per_shard: int, number: int) -> range:
    """Numbers of a shard's rows."""
    return range(number * rows_per_shard, min((number + 1) * rows_per_shard, len(source.ids)))


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
    import numpy as np
    import pyarrow as pa

    empty = np.zeros(0, np.float32)
    offsets = np.cumsum([0, *(0 if e is None else len(e) for e in embeddings)], dtype=np.int32)
    values = np.concatenate([empty, *(e for e in embeddings if e is not None)])
    missing = pa.array([e is None for e in embeddings], pa.bool_())
    vectors = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), mask=missing)
    return pa.table(
        {"id": pa.array(list(ids), pa.string()), "embedding": vectors, "error": pa.array(list(errors), pa.string())}
    )


def _read_shard(path: Path) -> tuple[list[np.ndarray | None], list[str | None]]:
    """Reads embeddings and errors, as :func:`make_table` takes them."""
    import pyarrow.parquet as pq

    embeddings = pq.read_table(path, columns=["embedding"])["embedding"]
    return [row.values.to_numpy() if row.is_valid else None for row in embeddings], read_errors(path)


def read_errors(path: Path) -> list[str | None]:
    """Reads what is wrong with each row of a shard, ``None`` where it has an embedding."""
    import pyarrow.parquet as pq

    return pq.read_table(path, columns=["error"])["error"].to_pylist()


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
