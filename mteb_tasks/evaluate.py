"""Runs the paper's evaluation on any E5-V: a directory, a hub id, or one of e5v, e5v-paper and e5v-tiny.

It does what ``mteb run -m e5v -b E5V`` does, for any model and with every setting.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

from e5v_st.devices import check_device
from e5v_st.fastest import FASTEST, compare_with_float32
from e5v_st.files import locate
from e5v_st.options import LAYOUTS, add_loading_arguments, add_max_image_tokens, add_plan
from e5v_st.provenance import find_origin


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``e5v eval``."""
    parser.add_argument("model", nargs="?", default="e5v", help="directory, hub id, e5v (default), e5v-paper, e5v-tiny")
    parser.add_argument("-b", "--benchmarks", nargs="+", metavar="NAME", help='E5V (default), "E5V(tiny)", …')
    parser.add_argument("-t", "--tasks", nargs="+", metavar="NAME", help="single tasks instead")
    parser.add_argument("--image-layout", choices=LAYOUTS, help="paper: as transformers 4.41.2 did")
    add_max_image_tokens(parser)
    add_loading_arguments(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="KIND=NAME",
        help="another prompt for a kind of tasks, such as question=fused; it becomes part of the result's name. "
        "docs/reference.md lists kinds and prompts",
    )
    parser.add_argument(
        "--no-normalize",
        action="store_true",
        help="leave embeddings as long as they are, as those of the public scores are: mteb's classifiers and "
        "clusterings see it",
    )
    add_plan(parser)
    parser.add_argument("--data", help="folder with copies of the datasets, instead of the hub (E5V_DATA)")
    parser.add_argument("--store", help="folder that keeps embeddings; default ~/.cache/e5v (E5V_STORE)")
    parser.add_argument("--no-store", action="store_true", help="keep no embeddings")
    parser.add_argument("--output", default="results", help="folder for results (default: results)")
    parser.add_argument("--overwrite", action="store_true", help="run again what has results")


def run(args: argparse.Namespace) -> int:
    """Evaluates a model, and prints its scores beside the paper's.

    Raises:
        ValueError: If a benchmark, task or model is unknown.
    """
    if args.data:
        os.environ["E5V_DATA"] = str(Path(args.data).resolve())
    import mteb

    from e5v_st.loading import compile_layers
    from e5v_st.processes import rank

    from .cir import E5VCIRRTest
    from .prompting import read_choices
    from .report_tables import as_text, headlines
    from .runs import collect
    from .upstream import keep_scores_of_queries

    tasks = find_tasks(args.benchmarks, args.tasks)
    check_device(args.device)
    meta = find_meta(
        args.model,
        adapter=args.adapter and str(locate(args.adapter) or args.adapter),
        image_layout=args.image_layout,
        max_image_tokens=args.max_image_tokens,
        dtype=args.dtype,
        quantize=args.quantize,
        batch_tokens=args.max_batch_tokens,
        store=False if args.no_store else args.store,
        prompts=read_choices(args.prompt),
        normalize=False if args.no_normalize else None,
    )
    if args.plan:
        from .plan import run_plan

        print(run_plan(args, tasks, meta if args.revision is None else meta.with_settings(commit=args.revision)))
        return 0
    meta = pin_revision(meta, args.revision)
    E5VCIRRTest.folder = Path(args.output)
    keep_scores_of_queries()
    model = meta.load_model(device=args.device)
    if getattr(args, FASTEST, False) and not args.quantize:
        compare_with_float32(model.model, partial(_load_in_float32, meta, args.device))
    if args.compile:
        compile_layers(model.model)
    strategy = "always" if args.overwrite else "only-missing"
    mteb.evaluate(model, tasks, cache=mteb.ResultCache(args.output), overwrite_strategy=strategy)
    if rank() == 0:
        own = (model.mteb_model_meta.name, model.mteb_model_meta.revision)
        runs = [run for run in collect([Path(args.output)]) if (run.name, run.revision) == own]
        print("\n".join([*headlines(runs), "", as_text(runs)]))
    return 0


def _load_in_float32(meta: Any, device: str | None, *, quantize: None = None) -> Any:
    """Loads an entry's model in float32; ``quantize`` is what ``probes.embed_unquantised`` asks for."""
    return meta.with_settings(dtype="float32").load_model(device=device).model


def pin_revision(meta: Any, revision: str | None) -> Any:
    """Returns the entry with a commit of the hub for its revision: results go by it, and ``main`` moves on.

    Args:
        meta: The model's entry.
        revision: Branch, tag or commit; that of the entry where ``None``.
    """
    if revision is None and meta.revision != "main":
        return meta
    origin = find_origin({"path": meta.name, **meta.loader_kwargs}["path"], revision)
    return meta.with_settings(commit=origin.commit)


def find_tasks(benchmarks: list[str] | None, tasks: list[str] | None) -> list[Any]:
    """Returns tasks by the names of benchmarks or tasks; the benchmark ``E5V`` by default.

    Raises:
        ValueError: If a name is unknown.
    """
    import mteb

    try:
        if tasks:
            return list(mteb.get_tasks(tasks=tasks))
        return [task for name in benchmarks or ["E5V"] for task in mteb.get_benchmark(name).tasks]
    except KeyError as error:
        raise ValueError(str(error.args[0])) from error


def find_meta(name: str, **settings: Any) -> Any:
    """Returns the model entry for a short name, a directory or a hub id.

    Args:
        name: See above.
        **settings: Arguments of ``models.load_e5v``; those that are ``None`` are left out.

    Raises:
        ValueError: If it looks like a directory that is not there.
    """
    from .models import make_meta, make_metas

    known = make_metas().get(name)
    if known is None:
        return make_meta(str(locate(name) or name), **settings)
    return known.with_settings(**settings)
