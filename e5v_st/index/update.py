"""Brings a table of LanceDB up to date with a source: what is new or changed is embedded, nothing else.

    source ──► hashes ──► plan ──┬─ same content in the table ──► embedding copied ─┬─► one version per batch
                                 └─ new content ───────────────► embedding computed ┘
    not in the source any more ──► removed, with --prune

A row is written with its id as the key. So a run that was killed leaves whole batches, and the next run goes on with
the rest: it sees by the hashes which rows are there.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..devices import check_device
from ..files import locate, printable
from ..model.images_e5v import is_on
from ..options import add_settings_arguments, find_prompt, load_and_compare, print_image_tokens
from ..processes import world_size
from ..provenance import check_name, find_origin
from ..published import TINY_NAME
from .lance_table import (
    CONDITION_ROWS,
    FORMAT,
    SUFFIX,
    TYPES,
    check_table_name,
    create,
    describe_table,
    keep_indices,
    lock,
    one_of,
    open_lance,
    put,
    read_table_job,
    remove,
)
from .manifest import (
    DIGESTS,
    MANIFEST,
    NAMES,
    check_same_models,
    describe_models,
    find_dtype,
    find_layout,
    find_recorded,
)
from .source import IMAGE_COLUMNS, TEXT_COLUMNS, open_source

if TYPE_CHECKING:
    import numpy as np

    from .feeds import Embedded, Items, Shards

#: Rows of one version of a table, and the seconds after which a smaller batch is written too: what a kill can cost.
BATCH_ROWS, BATCH_SECONDS = 1000, 60
#: Errors that are shown; the rest is counted.
SHOWN_ERRORS = 5
#: Longest side of a thumbnail, in pixels.
THUMBNAIL = 256
#: Settings of a table that its rows share. What is not given is the table's.
SETTINGS = ("dtype", "quantize", "image_layout", "max_image_tokens", "prompt", "columns", "thumbnails")
#: The table's own columns.
OWN_COLUMNS = ("id", "vector", "content", "details", "image", "text", "thumbnail")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``e5v index``."""
    parser.add_argument(
        "source",
        nargs="?",
        help="a folder of images, a .csv, .tsv, .jsonl, .json or .parquet file, the id of a dataset on the hub, or a "
        "folder of embeddings: of `e5v embed`, or Parquet files of E5VActor",
    )
    parser.add_argument("table", type=Path, help=f"the table to make or to bring up to date, as photos{SUFFIX}")
    parser.add_argument("--model", help="a directory or hub id, or e5v-tiny (default: the table's, else royokong/e5-v)")
    add_settings_arguments(parser)
    parser.add_argument("--prompt", help="a prompt's name or a template (default: chosen by what a row holds)")
    parser.add_argument("--split", help="of a dataset on the hub (default: train)")
    parser.add_argument("--config", help="of a dataset on the hub that has several configurations")
    parser.add_argument("--id-column", help="default: 'id' if there is one, else the row's number")
    parser.add_argument("--image-column", help=f"default: the first of {', '.join(IMAGE_COLUMNS)}")
    parser.add_argument("--text-column", help=f"default: the first of {', '.join(TEXT_COLUMNS)}")
    parser.add_argument(
        "--columns",
        nargs="+",
        metavar="NAME[:TYPE]",
        help=f"further columns to keep, for filters; a type is one of {', '.join(TYPES)} (default: text)",
    )
    parser.add_argument(
        "--thumbnails",
        type=int,
        nargs="?",
        const=THUMBNAIL,
        metavar="PIXELS",
        help=f"keep a small copy of each image, for `e5v app` (longest side, default: {THUMBNAIL})",
    )
    parser.add_argument(
        "--full-text",
        nargs="*",
        metavar="COLUMN",
        help="make an index for full-text search of these columns (default: text)",
    )
    parser.add_argument("--prune", action="store_true", help="remove the rows that the source no longer has")
    parser.add_argument("--stats", action="store_true", help="say what the table holds, and change nothing")


def run(args: argparse.Namespace) -> int:
    """Runs ``e5v index``."""
    check_table_name(args.table)
    if args.stats:
        return _show_stats(args.table)
    if args.source is None:
        raise ValueError(f"got no source for {args.table}: say `e5v index SOURCE {args.table}`")
    if args.thumbnails is not None and args.thumbnails < 1:
        raise ValueError(f"got --thumbnails {args.thumbnails}, want at least 1")
    if world_size() > 1:
        raise ValueError(
            "a table has one writer: embed with `accelerate launch … e5v embed SOURCE shards`, and put the shards into "
            "the table with `e5v index shards TABLE`"
        )
    check_device(args.device)
    for name in (args.model, args.adapter):
        check_name(name)
    args.columns = _read_columns(args.columns) if args.columns is not None else None
    with lock(args.table):
        return _update(args)


def _show_stats(path: Path) -> int:
    table = open_lance(path)
    if table is None:
        raise ValueError(f"there is no table {path}: make one with `e5v index SOURCE {path}`")
    print("\n".join(map(printable, describe_table(table, path))))
    return 0


def _read_columns(words: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        name, colon, kind = word.rpartition(":")
        name, kind = (name, kind) if colon and kind in TYPES else (word, "text")
        if name in OWN_COLUMNS:
            raise ValueError(f"--columns {name}: the table has a column of its own with this name; rename yours")
        found[name] = kind
    return found


def _update(args: argparse.Namespace) -> int:
    """Plans and writes, with the lock held."""
    table = open_lance(args.table)
    there = read_table_job(table, args.table) if table is not None else None
    for name in ("columns", "thumbnails"):
        if there is not None and getattr(args, name) is None:
            setattr(args, name, there[name])
    feed = _open(args)
    args, job = _describe(args, there, feed)
    if there is not None:
        _check_settings(there, job, args, feed.ids)
    plan = make_plan(feed, table)
    print(
        f"{len(feed.ids)} rows in the source: {len(plan.new)} to embed, {len(plan.copied)} to copy or correct, "
        f"{plan.same} as they are; {len(plan.vanished)} rows of the table are not in the source"
    )
    writer = Writer(args.table, table, job)
    for row, vector in _copied(args.table, plan.copied) if plan.copied else ():
        writer.add(feed, row, vector, plan.digests[row])
    writer.flush()
    errors = []
    for row, embedding, error in _embed(args, job, feed, plan.new) if plan.new else ():
        if embedding is None:
            errors.append(error)
        else:
            writer.add(feed, row, embedding, plan.digests[row])
    writer.flush()
    if writer.table is None:
        raise ValueError(f"{args.source} has no row that could be embedded, so there is no table: {errors[:1]}")
    if args.prune and plan.vanished:
        remove(writer.table, plan.vanished, args.table)
    columns = args.full_text if args.full_text != [] else ["text"]
    _check_text_columns(writer.table, columns or ())
    keep_indices(writer.table, args.table, columns or ())
    _report(args, plan, writer.table, errors)
    return int(bool(errors) and len(errors) == len(feed.ids))


def _report(args: argparse.Namespace, plan: Plan, table: Any, errors: Sequence[str | None]) -> None:
    for error in errors[:SHOWN_ERRORS]:
        print(printable(str(error)))
    if errors:
        print(
            f"{len(errors)} rows could not be embedded. They are not in the table, or as they were before; "
            "the next run tries them again"
        )
    if plan.vanished:
        done = "removed" if args.prune else "kept; --prune removes them"
        print(f"{len(plan.vanished)} rows are no longer in the source: {done}")
    print(f"{args.table}: {table.count_rows()} rows, {len(plan.new) - len(errors)} embedded now")


def _check_text_columns(table: Any, names: Sequence[str]) -> None:
    texts = [field.name for field in table.schema if str(field.type) == "string"]
    for name in names:
        if name not in texts:
            raise ValueError(f"--full-text {name}: want a column of texts, one of {', '.join(texts)}")


# ---- what the rows are ----


def _open(args: argparse.Namespace) -> Items | Shards:
    """Opens the source."""
    from .feeds import Shards, find_twice, is_shards
    from .search import read_job

    folder = locate(args.source)
    feed: Items | Shards
    if folder is not None and folder.is_dir() and is_shards(folder):
        job = read_job(folder) if (folder / MANIFEST).is_file() else None
        items = _items_of_shards(args, folder, job) if job else None
        given = [name for name in ("columns", "thumbnails") if getattr(args, name)]
        if given and items is None:
            raise ValueError(
                f"{folder} holds embeddings, and their source is not here as it was, so --{given[0]} has nothing to "
                "read: leave it out"
            )
        feed = Shards(folder, job, items)
    else:
        columns = {"id_column": args.id_column, "image": args.image_column, "text": args.text_column}
        feed = _open_items(args, args.source, columns)
        for note in feed.source.notes:
            print(note)
    twice = find_twice(feed.ids)
    if twice is not None:
        raise ValueError(f"{args.source}: the id {printable(twice)!r} stands twice, and a table has each once")
    return feed


def _open_items(args: argparse.Namespace, source: str, columns: Mapping[str, str | None]) -> Items:
    from .feeds import Items

    found = open_source(source, split=args.split, config=args.config, others=list(args.columns or ()), **columns)
    return Items(found, args.columns or {}, args.thumbnails)


def _items_of_shards(args: argparse.Namespace, folder: Path, job: Mapping[str, Any]) -> Items | None:
    """Opens what shards were made from; ``None`` if it is not on this machine, or has changed since then."""
    source = Path(os.path.realpath(folder), str(job["source"]))
    if not source.exists():
        return None
    columns = {"image": job["image_column"], "text": job["text_column"], "id_column": args.id_column}
    try:
        items = _open_items(args, str(source), columns)
    except (ValueError, OSError):
        return None
    ids = hashlib.sha256("\0".join(items.ids).encode()).hexdigest()
    return items if (items.source.content, ids) == (job["content"], job["ids_sha256"]) else None


def _describe(
    args: argparse.Namespace, there: Mapping[str, Any] | None, feed: Items | Shards
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Finds the model and the settings of a run.

    Args:
        args: Of the command line. What is not given is the table's.
        there: What the table says of itself; ``None`` for a new one.
        feed: The rows.

    Returns:
        The arguments that load the model, and what the table is to say of itself; its ``dimension`` is still ``None``.
    """
    path = locate(args.source)
    source = os.path.relpath(os.path.realpath(path), os.path.realpath(args.table)) if path else args.source
    of_source = {"format": FORMAT, "source": source, "dimension": None, "exif": is_on("E5V_EXIF", usual=False)}
    of_source |= {"columns": dict(args.columns or {}), "thumbnails": args.thumbnails}
    of_source |= dict(zip(("image_column", "text_column"), feed.columns, strict=True))
    recorded = getattr(feed, "job", None)
    if recorded is not None:
        if args.model or args.adapter:
            raise ValueError(f"{args.source} says itself which model made it: leave --model and --adapter out")
        return args, {**of_source, **_carry_over(recorded, Path(args.source), args.table)}
    chosen = {name: getattr(args, name) for name in ("dtype", "quantize", "image_layout", "max_image_tokens", "prompt")}
    if there is not None:
        chosen |= {name: there[name] for name, value in chosen.items() if value is None}
    model, adapter = _find_models(args, there, feed)
    chosen["dtype"] = find_dtype(model, chosen["dtype"], args.device, chosen["quantize"])
    chosen["image_layout"] = find_layout(model, chosen["image_layout"])
    found = {"model": model.folder, "adapter": adapter and adapter.folder}
    args = argparse.Namespace(**{**vars(args), **chosen, **found})
    return args, {**of_source, **describe_models(model, adapter, args.table), **chosen}


def _find_models(args: argparse.Namespace, there: Mapping[str, Any] | None, feed: Items | Shards) -> tuple[Any, Any]:
    """Finds the model and the adapter: those that are named, else the table's."""
    if args.model is None and there is None and feed.embedded:
        raise ValueError(f"{args.source} does not say which model made its embeddings: say it with --model")
    if args.model is not None or there is None:
        model = find_origin(args.model or "royokong/e5-v", args.revision)
        return model, find_origin(args.adapter) if args.adapter else None
    named = find_origin(args.adapter) if args.adapter else None
    return find_recorded(there, "model", args.table), named or find_recorded(there, "adapter", args.table)


def _carry_over(job: Mapping[str, Any], folder: Path, table: Path) -> dict[str, Any]:
    """Returns what a manifest says of its models and settings, with paths as seen from a table."""
    found = {name: job.get(name) for name in (*NAMES, *DIGESTS, "dtype", "quantize", "image_layout")}
    found |= {name: job.get(name) for name in ("max_image_tokens", "prompt", "exif")}
    for kind in ("model", "adapter"):
        if found[kind] not in (None, TINY_NAME) and found[f"{kind}_revision"] is None:
            place = os.path.join(os.path.realpath(folder), str(found[kind]))
            found[kind] = os.path.relpath(place, os.path.realpath(table))
    source = str(job["source"])
    path = Path(os.path.realpath(folder), source)
    return {**found, "source": os.path.relpath(path, os.path.realpath(table)) if path.exists() else source}


def _check_settings(
    there: Mapping[str, Any], job: Mapping[str, Any], args: argparse.Namespace, ids: Sequence[str]
) -> None:
    """Raises ValueError if rows cannot go into a table.

    Args:
        there: What the table says of itself.
        job: What this run would say.
        args: The arguments.
        ids: Of the source's rows.
    """
    check_same_models(there, job, args.table)
    changed = [name for name in (*SETTINGS, "exif") if there[name] != job[name]]
    if changed:
        what = ", ".join(f"{name} {there[name]!r} (now {job[name]!r})" for name in changed)
        raise ValueError(f"{args.table} was made with other settings: {what}. Leave them out, or make a new table")
    if there["source"] == job["source"]:
        return
    if args.prune:
        raise ValueError(
            f"{args.table} was made from {there['source']}, so --prune with {job['source']} would remove the rows of "
            "the first: name that, or leave --prune out"
        )
    if all(name == str(row) for row, name in enumerate(ids)):
        raise ValueError(
            f"{args.table} was made from {there['source']}, and the ids of {job['source']} are the numbers of its "
            "rows: they would replace rows of the first. Name a column of ids with --id-column, or make a new table"
        )


# ---- what is to do ----


@dataclass(frozen=True)
class Plan:
    """What brings a table up to date.

    Attributes:
        digests: Of each row of the source: the hash of its content, and that of its details.
        new: Rows whose content is not in the table.
        copied: Rows whose content is in the table, but under another id or with other details; by content.
        same: Number of rows that are in the table as they are in the source.
        vanished: Ids of the table that the source does not have.
    """

    digests: list[tuple[str, str]]
    new: list[int]
    copied: dict[int, str]
    same: int
    vanished: list[str]


def make_plan(feed: Items | Shards, table: Any | None) -> Plan:
    """Compares a source with a table by the hashes of their rows."""
    digests = list(feed.digests())
    known: dict[str, tuple[str, str]] = {}
    if table is not None:
        columns = table.search().select(["id", "content", "details"]).to_arrow().to_pydict()
        known = dict(zip(columns["id"], zip(columns["content"], columns["details"], strict=True), strict=True))
    contents = {content for content, _ in known.values()}
    new: list[int] = []
    copied: dict[int, str] = {}
    for row, (name, digest) in enumerate(zip(feed.ids, digests, strict=True)):
        if known.get(name) == digest:
            continue
        if digest[0] in contents:
            copied[row] = digest[0]
        else:
            new.append(row)
    vanished = sorted(known.keys() - set(feed.ids))
    return Plan(digests, new, copied, len(feed.ids) - len(new) - len(copied), vanished)


def _copied(path: Path, rows: Mapping[int, str]) -> Iterator[tuple[int, np.ndarray]]:
    """Yields rows with the embedding that the table has of their content.

    The table is read as it was before this run: a row that is replaced meanwhile may be the only one with a content.
    """
    import numpy as np

    before: Any = open_lance(path)
    before.checkout(before.version)
    numbers = list(rows)
    for start in range(0, len(numbers), CONDITION_ROWS):
        part = numbers[start : start + CONDITION_ROWS]
        condition = one_of("content", sorted({rows[row] for row in part}))
        found = before.search().where(condition).select(["content", "vector"]).to_arrow()
        by_content = dict(zip(found["content"].to_pylist(), found["vector"].to_pylist(), strict=True))
        yield from ((row, np.array(by_content[rows[row]], np.float32)) for row in part)


def _embed(
    args: argparse.Namespace, job: Mapping[str, Any], feed: Items | Shards, rows: Sequence[int]
) -> Iterator[Embedded]:
    if feed.embedded:
        return feed.embed(rows, None, None, None)  # type: ignore[arg-type]
    model = load_and_compare(args)
    print_image_tokens(model)
    return feed.embed(rows, model, find_prompt(model, job["prompt"]), args.max_batch_tokens)


class Writer:
    """Writes rows in batches, and makes the table with the first.

    Args:
        path: Of the table.
        table: The table if there is one.
        job: What the table is to say of itself.
    """

    def __init__(self, path: Path, table: Any | None, job: Mapping[str, Any]) -> None:
        self.path, self.table, self.job = path, table, job
        self.rows: list[dict[str, Any]] = []
        self.began = time.monotonic()

    def add(self, feed: Items | Shards, row: int, vector: np.ndarray, digests: tuple[str, str]) -> None:
        """Takes one row; see the columns of ``lance_table``."""
        names = ("content", "details")
        cells = {**feed.image_cells(row), **feed.cells(row), **dict(zip(names, digests, strict=True))}
        self.rows.append({"id": feed.ids[row], "vector": vector, **cells})
        if len(self.rows) >= BATCH_ROWS or time.monotonic() - self.began > BATCH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what has come since the last time, as one version of the table."""
        if self.rows:
            if self.table is None:
                dimension = len(self.rows[0]["vector"])
                self.table = create(self.path, {**self.job, "dimension": dimension})
            self._check_dimension()
            put(self.table, self.rows, self.path)
        self.rows, self.began = [], time.monotonic()

    def _check_dimension(self) -> None:
        wanted = read_table_job(self.table, self.path)["dimension"]
        got = len(self.rows[0]["vector"])
        if got != wanted:
            raise ValueError(f"{self.path} has embeddings of {wanted} numbers, these have {got}")
