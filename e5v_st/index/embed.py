"""Embeds a folder of images, a table or a data set into Parquet shards; can be stopped and started at any time.

Under ``accelerate launch`` each process takes its own shards; see ``shards.py`` for what is written.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import itertools
import os
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..devices import check_device
from ..files import locate
from ..provenance import check_name, describe_models, find_dtype, find_origin
from .shards import (
    MANIFEST,
    check_job,
    count_shards,
    is_done,
    read_errors,
    read_shard,
    rows_of_shard,
    shard_path,
    start_job,
    sweep,
    write_shard,
)
from .source import IMAGE_COLUMNS, TEXT_COLUMNS, Source, open_source

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


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
    parser.add_argument("--revision", help="branch, tag or commit of the model's hub id")
    parser.add_argument("--adapter", help="a LoRA to put on it: a directory, a hub id or id@revision")
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
    parser.add_argument(
        "source",
        help="a folder of images, a .csv, .tsv, .jsonl, .json or .parquet file, or a hub data set's id",
    )
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
    for name in (args.source, args.model, args.adapter):
        check_name(name)
    check_device(args.device)
    columns = {"id_column": args.id_column, "image": args.image_column, "text": args.text_column}
    source = open_source(args.source, split=args.split, config=args.config, **columns)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    args, models = _find_models(args)
    job = describe_job(args, source, models)
    check_job(args.out, job, repaired=args.retry_errors)
    shards = [number for number in range(count_shards(len(source.ids), args.rows_per_shard)) if number % world == rank]
    done = {number for number in shards if is_done(shard_path(args.out, number))}
    wanted = _find_wanted(args, source, shards, done)
    _print_columns(source)
    print(f"{len(source.ids)} rows, {len(shards)} shards for this process, {len(done)} done already")
    model = _load_and_compare(args) if wanted else None
    prompt = find_prompt(model, args.prompt) if wanted else None
    start_job(args.out, job, repaired=args.retry_errors)  # only now: a start that failed leaves nothing behind
    if wanted:
        _embed_shards(model, source, args, prompt, wanted)
    sweep(args.out, {MANIFEST, *(shard_path(args.out, number).name for number in shards)})
    failed = sum(error is not None for number in shards for error in read_errors(shard_path(args.out, number)))
    if failed:
        print(f"{failed} rows could not be embedded; the column 'error' says why, --retry-errors tries them again")
    # A process of several that ended so would have its launcher end the others
    return int(world == 1 and failed == len(source.ids))


def _find_models(args: argparse.Namespace) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Finds model and adapter.

    Returns:
        The arguments with the files that the digests are of, whatever the names stand for later, and the dtype that the
        model is loaded in; and what the manifest says of model and adapter.
    """
    model = find_origin(args.model, args.revision)
    adapter = find_origin(args.adapter) if args.adapter else None
    dtype = find_dtype(model, args.dtype, args.device, args.quantize)
    found = {"model": model.folder, "adapter": adapter and adapter.folder, "dtype": dtype}
    return argparse.Namespace(**{**vars(args), **found}), describe_models(model, adapter, args.out)


def _find_wanted(
    args: argparse.Namespace, source: Source, shards: Sequence[int], done: set[int]
) -> dict[int, Sequence[int]]:
    """Rows to compute, by shard: all of those that are not done; of others, on request, those that have an error."""
    wanted: dict[int, Sequence[int]] = {}
    for number in shards:
        rows: Sequence[int] = rows_of_shard(len(source.ids), args.rows_per_shard, number)
        if number in done:
            errors = read_errors(shard_path(args.out, number)) if args.retry_errors else ()
            rows = list(itertools.compress(rows, map(bool, errors)))
        if rows:
            wanted[number] = rows
    return wanted


def _print_columns(source: Source) -> None:
    for note in source.notes:
        print(note)
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
    from ..loading import compile_layers
    from ..quantize import embed_unquantised, print_cosines

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
    from ..loading import load

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
    from ..encoder import stream_all

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
            embeddings, errors = (nothing, nothing[:]) if len(rows) == len(ids) else read_shard(path)
            for row, result in zip(rows, results):  # noqa: B905 - the results of the next shard are left in the stream
                # The data set's row is what a user can look up, not the place in this job
                error = result.error and source.explain(row, result.error.removeprefix(f"item {result.index}: "))
                if error and args.on_error == "raise":
                    raise ValueError(error)
                embeddings[row - number * size], errors[row - number * size] = result.embedding, error
            write_shard(path, ids, embeddings, errors)


# ---- the job ----


def describe_job(args: argparse.Namespace, source: Source, models: dict[str, Any]) -> dict[str, Any]:
    """What a job is made from: source, rows, columns, model and settings.

    A local source is named as it is found from the output folder, so that both may move together.

    Args:
        args: The arguments, with the dtype that is used.
        source: Holds the rows.
        models: See ``provenance.describe_models``.
    """
    names = ("dtype", "quantize", "image_layout", "prompt", "rows_per_shard")
    path = locate(args.source)
    return {
        "source": os.path.relpath(os.path.realpath(path), os.path.realpath(args.out)) if path else args.source,
        **models,
        **{name: getattr(args, name) for name in names},
        **dict(zip(("image_column", "text_column"), source.columns, strict=True)),
        "exif": os.environ.get("E5V_EXIF", "0") == "1",
        "rows": len(source.ids),
        "ids_sha256": hashlib.sha256("\0".join(source.ids).encode()).hexdigest(),
        "content": source.content,
    }
