"""Embeds a folder of images, a table or a dataset into Parquet shards. It can be stopped and started at any time.

Under ``accelerate launch`` each process takes its own shards. See ``shards.py`` for what is written.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..devices import check_device
from ..files import check_folder, locate
from ..model.images_e5v import is_on
from ..options import add_model_arguments, add_plan, find_prompt, load_and_compare, print_image_tokens
from ..processes import rank, world_size
from ..provenance import check_name, find_origin
from .manifest import (
    MANIFEST,
    check_job,
    check_repair,
    describe_models,
    find_digest,
    find_dtype,
    find_layout,
    start_job,
)
from .plan import check_local, plan_job
from .shards import (
    check_size,
    count_shards,
    is_done,
    read_errors,
    read_shard,
    rows_of_shard,
    shard_path,
    sweep,
    write_shard,
)
from .source import IMAGE_COLUMNS, TEXT_COLUMNS, Source, open_source

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``e5v embed``."""
    parser.add_argument(
        "source",
        help="a folder of images, a .csv, .tsv, .jsonl, .json or .parquet file, or the id of a dataset on the hub",
    )
    parser.add_argument("out", type=Path, help="the folder to write. Run the command again to go on where it stopped")
    add_model_arguments(parser)
    parser.add_argument("--prompt", help="a prompt's name or a template (default: chosen by what a row holds)")
    parser.add_argument("--split", help="of a dataset on the hub (default: train)")
    parser.add_argument("--config", help="of a dataset on the hub that has several configurations")
    parser.add_argument("--id-column", help="default: 'id' if there is one, else the row's number")
    parser.add_argument(
        "--image-column", help=f"default: the first of {', '.join(IMAGE_COLUMNS)}; without a text also url"
    )
    parser.add_argument(
        "--text-column",
        help=f"default: the first of {', '.join(TEXT_COLUMNS)}. If you name only one of the two columns, the other is "
        "ignored",
    )
    add_plan(parser)
    parser.add_argument("--rows-per-shard", type=int, default=5000, help="default: %(default)s")
    parser.add_argument("--on-error", choices=("skip", "raise"), default="skip", help="default: %(default)s")
    parser.add_argument(
        "--retry-errors",
        action="store_true",
        help="try the rows with an error again. The source may have been repaired",
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
    check_folder(args.out)
    if args.plan:
        check_local(args.source)
    columns = {"id_column": args.id_column, "image": args.image_column, "text": args.text_column}
    source = open_source(args.source, split=args.split, config=args.config, **columns)
    if args.plan:
        print("\n".join([*source.notes, plan_job(args, source)]))
        return 0
    args, models = _find_models(args)
    job = describe_job(args, source, models)
    check_job(args.out, job, repaired=args.retry_errors)
    if args.retry_errors:
        check_repair(args.out, job, source.ids, numbered=source.numbered)
    job["job_sha256"] = find_digest(args.out, job)
    shards = list(range(count_shards(len(source.ids), args.rows_per_shard)))[rank() :: world_size()]
    done = {number for number in shards if is_done(shard_path(args.out, number), job["job_sha256"])}
    wanted = _find_wanted(args, source, shards, done)
    for note in source.notes:
        print(note)
    print(f"{len(source.ids)} rows, {len(shards)} shards for this process, {len(done)} done already")
    if wanted:
        model = load_and_compare(args)
        print_image_tokens(model)
        prompt = find_prompt(model, args.prompt)
        check_size(min(args.rows_per_shard, len(source.ids)), model.get_embedding_dimension())
    start_job(args.out, job, repaired=args.retry_errors)  # only now: a start that failed leaves nothing behind
    if wanted:
        _embed_shards(model, source, args, prompt, wanted, job["job_sha256"])
    sweep(args.out, {MANIFEST, *(shard_path(args.out, number).name for number in shards)})
    failed = sum(error is not None for number in shards for error in read_errors(shard_path(args.out, number)))
    if failed:
        print(f"{failed} rows could not be embedded; the column 'error' says why, --retry-errors tries them again")
    # Of several processes, one that ended with a fault would have its launcher end the others
    return int(world_size() == 1 and failed == len(source.ids))


def _find_models(args: argparse.Namespace) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Finds model and adapter.

    Returns:
        First, the arguments: with the folders that the digests are of, whatever the names stand for later, and with the
        dtype and the image layout that the model is loaded in. Second, what the manifest says of model and adapter.
    """
    model = find_origin(args.model, args.revision)
    adapter = find_origin(args.adapter) if args.adapter else None
    dtype = find_dtype(model, args.dtype, args.device, args.quantize)
    layout = find_layout(model, args.image_layout)
    found = {"model": model.folder, "adapter": adapter and adapter.folder, "dtype": dtype, "image_layout": layout}
    return argparse.Namespace(**{**vars(args), **found}), describe_models(model, adapter, args.out)


def _find_wanted(
    args: argparse.Namespace, source: Source, shards: Sequence[int], done: set[int]
) -> dict[int, Sequence[int]]:
    """Returns the rows to compute, by shard.

    A shard that is not done has all its rows computed. Of a shard that is done, the failed rows are, on request.
    """
    wanted: dict[int, Sequence[int]] = {}
    for number in shards:
        rows: Sequence[int] = rows_of_shard(len(source.ids), args.rows_per_shard, number)
        if number in done:
            errors = read_errors(shard_path(args.out, number)) if args.retry_errors else ()
            rows = list(itertools.compress(rows, map(bool, errors)))
        if rows:
            wanted[number] = rows
    return wanted


def _embed_shards(
    model: SentenceTransformer,
    source: Source,
    args: argparse.Namespace,
    prompt: str | None,
    wanted: dict[int, Sequence[int]],
    job: str,
) -> None:
    """Embeds rows of shards as one job, and writes each shard when it is complete.

    Args:
        model: An E5-V.
        source: Holds the rows.
        args: Of ``e5v embed``.
        prompt: For all rows.
        wanted: Which rows of which shards; other rows of these shards stay as they are.
        job: What the shards are marked with; see ``manifest.find_digest``.
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
            embeddings: list[Any] = [None] * len(ids)
            errors: list[str | None] = [None] * len(ids)
            if len(rows) < len(ids):
                embeddings, errors = read_shard(path)
            for row, result in zip(rows, results):  # noqa: B905 - the results of the next shard are left in the stream
                # A user can look up the dataset's row, not the place in this job
                error = result.error and source.explain(row, result.error.removeprefix(f"item {result.index}: "))
                if error and args.on_error == "raise":
                    raise ValueError(error)
                embeddings[row - number * size], errors[row - number * size] = result.embedding, error
            write_shard(path, ids, embeddings, errors, job)


# ---- the job ----


def describe_job(args: argparse.Namespace, source: Source, models: dict[str, Any]) -> dict[str, Any]:
    """Returns what a job is made from: source, rows, columns, model and settings.

    A local source is named by its path from the output folder, so that both may move together.

    Args:
        args: The arguments, with the dtype and the image layout that are used.
        source: Holds the rows.
        models: See ``manifest.describe_models``.
    """
    names = ("dtype", "quantize", "image_layout", "max_image_tokens", "prompt", "rows_per_shard")
    path = locate(args.source)
    return {
        "source": os.path.relpath(os.path.realpath(path), os.path.realpath(args.out)) if path else args.source,
        **models,
        **{name: getattr(args, name) for name in names},
        **dict(zip(("image_column", "text_column"), source.columns, strict=True)),
        "exif": is_on("E5V_EXIF", usual=False),
        "rows": len(source.ids),
        "ids_sha256": hashlib.sha256("\0".join(source.ids).encode()).hexdigest(),
        "content": source.content,
    }
