"""Trains E5-V as the paper does: text pairs only, LoRA on the language model, a contrastive loss. Or on images too.

    e5v train                                   # the paper's recipe, sized to this machine
    e5v train tiny                              # offline, on a CPU, minutes
    e5v train my.yaml --data my_triplets.csv --learning_rate 2e-4
    e5v train --plan my.yaml                    # rows, tokens, memory and steps, without loading weights
    accelerate launch --num_machines 4 --num_processes 32 -m e5v_st.cli train paper

A recipe is a YAML file of the arguments below and of those of SentenceTransformerTrainingArguments (learning_rate,
num_train_epochs, save_steps, report_to, deepspeed, …). What a recipe leaves out is as in the recipe "paper"; flags
overrule both. A recipe's "train" lists several sources, of texts, images and both; docs/second-stage.md tells of it,
and of other losses and an adapter to go on from. In a checkout, python training/train_nli.py is the same command as
e5v train.
"""

from __future__ import annotations

if not __package__:  # run as a file: a part of a package is found by its full name alone
    from e5v_st.training.train_nli import main

    raise SystemExit(main())

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from e5v_st.processes import rank

from .recipes import Settings, read_arguments, recipe_names
from .resume import check_output, check_space, last_checkpoint
from .sources import Source, name_sources, read_sources

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformerTrainingArguments

    from .examples import Report
    from .trainer import Trainer

logger = logging.getLogger(__name__)

PLAN = "--plan"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``e5v train`` from a file; returns the exit code."""
    from e5v_st import cli

    return cli.main(["train", *(sys.argv[1:] if argv is None else argv)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``e5v train``, for its help; ``recipes.read_arguments`` is what reads them."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.usage = f"{parser.prog} [RECIPE] [--ARGUMENT VALUE …]"
    parser.add_argument(PLAN, action="store_true", help="print rows, tokens, memory and steps, and load no weights")
    parser.add_argument("recipe", nargs="?", help=f"a YAML file, or one of {recipe_names()} (default: by this machine)")
    for argument in fields(Settings):
        if not argument.init:  # of recipes alone
            continue
        text = argument.metadata["help"].replace("%", "%%")
        if isinstance(argument.default, bool):
            parser.add_argument(f"--{argument.name}", action="store_true", help=text)
        else:
            text += f" (default: {argument.default!r})" if argument.default != "" else " (default: none)"
            parser.add_argument(f"--{argument.name}", metavar="VALUE", help=text)
    parser.set_defaults(words=[])


def run(args: argparse.Namespace) -> int:
    """Trains.

    Args:
        args: With ``words``, what stands behind the command's name.

    Returns:
        0; 130 or 143 where a signal stopped the training, which a checkpoint keeps.

    Raises:
        ValueError: If something is wrong before the first step.
        OSError: The same; or the disk is full later.
    """
    from e5v_st.provenance import check_name

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger(__package__).setLevel(logging.INFO if rank() == 0 else logging.WARNING)
    try:
        words = [word for word in args.words if word != PLAN]
        settings, trainer_args = read_arguments(words)
        if len(words) < len(args.words):
            return show_plan(settings, trainer_args)
        check_output(Path(trainer_args.output_dir), settings.resume)
        check_name(settings.model)
        start = prepare(settings, trainer_args)
    except ImportError as error:  # of a library that a recipe needs
        raise ValueError(str(error)) from error
    try:
        return start()
    except OSError as error:  # such as a full disk
        raise OSError(f"{error}; --resume continues from the last checkpoint") from error


def show_plan(settings: Settings, args: SentenceTransformerTrainingArguments) -> int:
    """Prints what a training would do, see ``plan.py``; returns the exit code."""
    from .plan import make_plan

    sources = read_sources(settings.train) if settings.train else [Source(settings.data)]
    print("\n".join(make_plan(settings, args, name_sources(sources))))
    return 0


def prepare(settings: Settings, args: SentenceTransformerTrainingArguments) -> Callable[[], int]:
    """Does all that can fail before the first step.

    Returns:
        What trains; it returns the exit code.

    Raises:
        ValueError: If data, base or arguments are not right.
        OSError: If something is missing, or the disk is full.
    """
    from .examples import load_triplets
    from .losses import kind_of
    from .trainer import make_trainer

    if settings.train:
        return prepare_sources(settings, args)
    kind = kind_of(settings.loss, "loss")
    if kind.labelled or kind.taught:
        raise ValueError(f"the loss {settings.loss['name']} wants more than texts: give its data as a source of train")
    data, report = load_triplets(settings.data)
    held_out, held_out_report = load_triplets(settings.eval_data) if settings.eval_data else (None, None)
    for found in filter(None, (report, held_out_report)):
        for line in found.lines():
            logger.info(line)
    if settings.eval_rows:
        parts = data.train_test_split(test_size=settings.eval_rows, seed=args.seed)
        data, held_out = parts["train"], parts["test"]
    if len(data) < settings.batch_size:
        raise ValueError(f"{settings.data} has {len(data)} rows to train on, less than --batch_size")
    trainer = make_trainer(settings, args, data, held_out)
    announce(trainer, settings, f"{len(data):,} rows", len(data) // settings.batch_size)
    return partial(train, trainer, settings, [report])


def prepare_sources(settings: Settings, args: SentenceTransformerTrainingArguments) -> Callable[[], int]:
    """Does the same for the sources of a recipe's ``train``; see :func:`prepare`."""
    from .item_rows import load_items, load_sources
    from .sampling import steps_of
    from .trainer import make_trainer

    sources = name_sources(read_sources(settings.train))
    data, found_in, kinds = load_sources(sources, settings)
    for name, source in sources.items():
        check_source(name, source, len(data[name]), settings.batch_size, taught=kinds[name].taught)
    reports = list(found_in.values())
    held_out, held_out_report = load_items(Source(settings.eval_data)) if settings.eval_data else (None, None)
    for found in filter(None, (*reports, held_out_report)):
        for line in found.lines():
            logger.info(line)
    trainer = make_trainer(settings, args, data, held_out, sources)
    steps = sum(
        steps_of(source.weight, len(data[name]) // args.per_device_train_batch_size, args.world_size)
        for name, source in sources.items()
    )
    announce(trainer, settings, f"{sum(map(len, data.values())):,} rows of {len(data)} sources", steps)
    return partial(train, trainer, settings, reports)


def check_source(name: str, source: Source, rows: int, batch_size: int, *, taught: bool) -> None:
    """Raises ValueError if a source cannot fill a batch, or has a teacher and no loss for it, or the other way."""
    if rows < batch_size:
        raise ValueError(f"{name} has {rows} rows to train on, less than --batch_size: a batch is from one source")
    if taught != bool(source.teacher):
        wanted = "a loss that learns from it (distill)" if source.teacher else "teacher:, which its loss learns from"
        raise ValueError(f"{name} lacks {wanted}")


def announce(trainer: Trainer, settings: Settings, rows: str, steps: int) -> None:
    """Checks that there is room for checkpoints, and says what is trained."""
    args = trainer.args
    trained = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    check_space(Path(args.output_dir), trained, (args.save_total_limit or 1) + 1)
    logger.info(
        "%s: %s trained weights, %s, %d a step, %d steps",
        settings.model,
        f"{trained:,}",
        rows,
        settings.batch_size,
        args.max_steps if args.max_steps > 0 else steps * args.num_train_epochs,
    )


def train(trainer: Trainer, settings: Settings, reports: Sequence[Report]) -> int:
    """Trains, evaluates before and after, and writes the adapter, its card and a plot; returns the exit code."""
    from e5v_st.files import write_atomically
    from e5v_st.run_files import EVALUATION

    from .evaluation import measure
    from .output import write_run

    folder = Path(trainer.args.output_dir)
    checkpoint = last_checkpoint(folder) if settings.resume else None
    scores_file = folder / EVALUATION
    scores = json.loads(scores_file.read_text(encoding="utf8")) if checkpoint and scores_file.is_file() else {}
    if trainer.evaluator is not None and checkpoint is None and not trainer.is_deepspeed_enabled:
        scores["before"] = measure(trainer)
        logger.info("before training: %s", scores["before"])
    if trainer.is_world_process_zero():
        write_atomically(scores_file, json.dumps(scores, indent=2))
    if settings.resume:
        logger.info("continuing from %s", checkpoint or "the beginning: there is no checkpoint yet")

    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.stopped_by:
        logger.info("stopped after step %d, which is saved: --resume continues", trainer.state.global_step)
        return 128 + trainer.stopped_by
    if trainer.evaluator is not None:
        scores["after"] = measure(trainer)
        logger.info("after training: %s", scores["after"])
    if trainer.is_world_process_zero():
        write_run(trainer, settings, reports, scores)
        logger.info("saved %s", folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
