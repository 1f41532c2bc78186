"""Trains E5-V as the paper does: text pairs only, LoRA on the language model, a contrastive loss.

    python training/train_nli.py                                   # the paper's recipe, sized to this machine
    python training/train_nli.py training/recipes/tiny.yaml        # offline, on a CPU, minutes
    python training/train_nli.py my.yaml --data my_triplets.csv --learning_rate 2e-4
    accelerate launch --num_machines 4 --num_processes 32 training/train_nli.py training/recipes/paper.yaml

A recipe is a YAML file of the arguments below and of those of SentenceTransformerTrainingArguments (learning_rate,
num_train_epochs, save_steps, report_to, deepspeed, …). What a recipe leaves out is as in training/recipes/paper.yaml;
flags overrule both.
"""

from __future__ import annotations

if not __package__:  # run as a file: a part of a package is found by its full name alone
    from e5v_st.training.train_nli import main

    raise SystemExit(main())

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    from .data import Report

logger = logging.getLogger("train_nli")

RECIPES = Path(__file__).parent / "recipes"
#: Bytes for each trained weight in a checkpoint: the weight and Adam's two moments, in float32.
CHECKPOINT_BYTES = 12
#: Arguments that name what is measured, and the score that early stopping then goes by.
SCORES = {
    "eval_sts": "sts_spearman_cosine",
    "eval_data": "triplets_cosine_accuracy",
    "eval_rows": "triplets_cosine_accuracy",
    "eval_images": "t2i_recall@1",
}
#: GPU memory in GiB from which the 80 GB recipe is taken.
LARGE_GPU_GIB = 60


def _argument(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class Settings:
    """Arguments of this script."""

    model: str = _argument("llava-hf/llama3-llava-next-8b-hf", "base: a LLaVA-NeXT's directory or hub id, or e5v-tiny")
    model_revision: str = _argument("", "commit, tag or branch of the base on the hub")
    data: str = _argument(
        "princeton-nlp/datasets-for-simcse",
        "pairs or triplets: a .csv, .tsv, .jsonl, .json or .parquet file or a hub id, with the columns "
        "sent0, sent1[, hard_neg] or anchor, positive[, negative]",
    )
    max_tokens: int = _argument(32, "sentences are cut after so many tokens; prompts never are")
    batch_size: int = _argument(768, "rows of a step, all processes together: every one is a negative for the others")
    mini_batch_size: int = _argument(24, "rows that fit into one process's memory; a larger batch is gradient-cached")
    temperature: float = _argument(0.05, "of the contrastive loss")
    lora_r: int = _argument(64, "rank of the LoRA")
    lora_alpha: int = _argument(16, "the LoRA is scaled by lora_alpha / lora_r")
    lora_dropout: float = _argument(0.05, "dropout before the LoRA")
    bits: int = _argument(16, "how the frozen base is held: 4 (NF4), 8, 16 or 32 bits")
    released_quirks: bool = _argument(False, "feed prompts and mask as the published script really did")
    eval_sts: str = _argument("", "graded pairs (sentence1, sentence2, score): a file or hub id, its validation split")
    eval_data: str = _argument("", "held-out triplets: a file or hub id, as data")
    eval_rows: int = _argument(0, "hold so many rows of data out, as eval_data")
    eval_images: str = _argument(
        "", "captioned images (image, text): a file (paths are relative to its folder) or hub id, its validation split"
    )
    early_stop: int = _argument(0, "stop after so many evaluations without a better score (0: never)")
    resume: bool = _argument(False, "go on from the last checkpoint in output_dir, if there is one")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``e5v train`` from a file; returns the exit code."""
    from e5v_st import cli

    return cli.main(["train", *(sys.argv[1:] if argv is None else argv)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``e5v train``, for its help; see :func:`read_arguments`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.usage = f"{parser.prog} [RECIPE] [--ARGUMENT VALUE …]"
    recipes = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    parser.add_argument("recipe", nargs="?", help=f"a YAML file, or one of {recipes} (default: by this machine)")
    for argument in fields(Settings):
        text = f"{argument.metadata['help']} (default: {argument.default!r})"
        if isinstance(argument.default, bool):
            parser.add_argument(f"--{argument.name}", action="store_true", help=argument.metadata["help"])
        else:
            parser.add_argument(f"--{argument.name}", metavar="VALUE", help=text.replace("%", "%%"))
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
    for ours in (logger, logging.getLogger(__package__)):
        ours.setLevel(logging.INFO if int(os.environ.get("RANK", 0)) == 0 else logging.WARNING)
    try:
        settings, trainer_args = read_arguments(args.words)
        check_name(settings.model)
        check_output(Path(trainer_args.output_dir), settings.resume)
        start = prepare(settings, trainer_args)
    except ImportError as error:  # of a library that a recipe needs
        raise ValueError(str(error)) from error
    try:
        return start()
    except OSError as error:  # such as a full disk
        raise OSError(f"{error}; --resume goes on from the last checkpoint") from error


def read_arguments(words: Sequence[str]) -> tuple[Settings, SentenceTransformerTrainingArguments]:
    """Reads recipe and flags, and sizes the batch of a process to the number of processes.

    Raises:
        ValueError: If the recipe cannot be read, names what is no argument, or the batch cannot be split evenly.
    """
    from sentence_transformers import SentenceTransformerTrainingArguments
    from transformers import HfArgumentParser

    flags = list(words)
    recipe = find_recipe(flags.pop(0)) if flags and not flags[0].startswith("-") else choose_recipe()
    values = {**read_recipe(RECIPES / "paper.yaml"), **read_recipe(recipe)}
    ours = HfArgumentParser(Settings, prog="train_nli.py", allow_abbrev=False)
    theirs = HfArgumentParser(SentenceTransformerTrainingArguments, prog="train_nli.py", allow_abbrev=False)
    known = {action.dest for parser in (ours, theirs) for action in parser._actions}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{recipe} names {', '.join(unknown)}, which is no argument (see --help)")
    # A default that is a string is read as a flag would be: 4e-4, which YAML takes for a string, becomes a number
    ours.set_defaults(**{name: value for name, value in values.items() if name in Settings.__dataclass_fields__})
    settings, rest = ours.parse_args_into_dataclasses(flags, return_remaining_strings=True, look_for_args_file=False)
    batched = {"per_device_train_batch_size", "gradient_accumulation_steps"}
    if batched & {*values, *(word.lstrip("-").split("=")[0] for word in rest)}:
        raise ValueError(
            "give --batch_size, the rows of a step over all processes, and --mini_batch_size, what fits into memory: "
            "smaller batches, accumulated, would leave each row fewer negatives"
        )
    world = int(os.environ.get("WORLD_SIZE", 1))
    if settings.batch_size % world:
        raise ValueError(f"--batch_size {settings.batch_size} cannot be split over {world} processes")
    values = {**_derived(settings, values), **values, "per_device_train_batch_size": settings.batch_size // world}
    theirs.set_defaults(**{name: value for name, value in values.items() if name not in asdict(settings)})
    (args,) = theirs.parse_args_into_dataclasses(rest, look_for_args_file=False)
    if args.world_size != world:
        raise ValueError(f"there are {world} processes, but the trainer sees {args.world_size}: is the launcher right?")
    measured = [f"--{name}" for name in SCORES if getattr(settings, name)]
    if args.fsdp and measured:
        raise ValueError(
            f"got {', '.join(measured)} with --fsdp, which spreads the weights over the processes, so that none can "
            "embed on the way: leave it out, and evaluate the adapter afterwards"
        )
    return settings, args


def find_recipe(name: str) -> Path:
    """Returns a recipe's file: a path, or the name of one that comes with this script."""
    for path in (Path(name), RECIPES / name, RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    raise ValueError(f"there is no recipe {name}: give a YAML file or one of {known}")


def choose_recipe() -> Path:
    """Returns the recipe for this machine, and says which it is."""
    import torch

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        name, why = "paper", f"{os.environ['WORLD_SIZE']} processes"
    elif not torch.cuda.is_available():
        name, why = "tiny", "there is no GPU for the paper's model of 8 B parameters"
    else:
        device = torch.cuda.get_device_properties(0)
        gib = device.total_memory / 2**30
        name, why = f"single_gpu_{'80' if gib >= LARGE_GPU_GIB else '24'}gb", f"{device.name}, {gib:.0f} GiB"
    print(f"no recipe given: {name} ({why})", file=sys.stderr)
    return RECIPES / f"{name}.yaml"


def read_recipe(path: Path) -> dict[str, Any]:
    """Reads a YAML file of arguments.

    Raises:
        ValueError: If it is no YAML, or no mapping.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(values or {}, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, want arguments and their values")
    return values or {}


def _derived(settings: Settings, values: dict[str, Any]) -> dict[str, Any]:
    """Returns arguments of the trainer that follow from this script's, unless the recipe has them."""
    import torch

    derived: dict[str, Any] = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    if not torch.accelerator.is_available():
        # Without use_cpu, several processes on CPUs would each train alone
        derived |= {"use_cpu": True, "dataloader_pin_memory": False}
    if settings.bits != 32 and torch.cuda.is_available() and not {"bf16", "fp16"} & set(values):
        derived["bf16" if torch.cuda.is_bf16_supported() else "fp16"] = True
    wanted = [score for name, score in SCORES.items() if getattr(settings, name)]
    if wanted:
        derived |= {"eval_strategy": "steps", "eval_steps": values.get("save_steps", 50)}
    if settings.early_stop:
        if not wanted:
            raise ValueError(f"--early_stop needs something to measure: one of --{', --'.join(SCORES)}")
        derived |= {"load_best_model_at_end": True, "metric_for_best_model": wanted[0], "greater_is_better": True}
    return derived


def check_output(folder: Path, resume: bool) -> None:
    """Makes the output directory and tries it.

    Raises:
        OSError: If nothing can be written there.
        ValueError: If an earlier run's checkpoints are there and this is not to go on from them.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"0")
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write to the output directory {folder}: {error.strerror or error}") from error
    if not resume and last_checkpoint(folder) is not None:
        raise ValueError(f"{folder} has checkpoints of an earlier run: --resume goes on, or give another --output_dir")


def check_space(folder: Path, weights: int, kept: int) -> None:
    """Raises OSError if the checkpoints of a run will not fit on the disk.

    Args:
        folder: Where they go.
        weights: Number of trained weights.
        kept: How many checkpoints are kept at once, one being written included.
    """
    needed, free = weights * CHECKPOINT_BYTES * kept + 2**26, shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"the disk of {folder} has {free / 2**30:.2f} GiB left, but {kept} checkpoints take "
            f"{needed / 2**30:.2f} GiB: free some, or keep fewer (--save_total_limit)"
        )


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the newest checkpoint that was written to its end."""
    done = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if _is_json(path)]
    return max(done, key=lambda path: int(path.name.split("-")[1]), default=None)


def _is_json(path: Path) -> bool:
    """Whether the file, which is the last of a checkpoint, was written to its end."""
    try:
        json.loads(path.read_text(encoding="utf8"))
    except ValueError:
        return False
    return True


def prepare(settings: Settings, args: SentenceTransformerTrainingArguments) -> Callable[[], int]:
    """Does all that can fail before the first step.

    Returns:
        What trains; it returns the exit code.

    Raises:
        ValueError: If data, base or arguments are not right.
        OSError: If something is missing, or the disk is full.
    """
    from .data import load_triplets

    data, report = load_triplets(settings.data)
    for line in report.lines():
        logger.info(line)
    held_out = load_triplets(settings.eval_data)[0] if settings.eval_data else None
    if settings.eval_rows:
        parts = data.train_test_split(test_size=settings.eval_rows, seed=args.seed)
        data, held_out = parts["train"], parts["test"]
    if len(data) < settings.batch_size:
        raise ValueError(f"{settings.data} has {len(data)} rows to train on, less than --batch_size")
    trainer = make_trainer(settings, args, data, held_out)
    trained = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    check_space(Path(args.output_dir), trained, (args.save_total_limit or 1) + 1)
    logger.info(
        "%s: %s trained weights, %d rows a step, %d steps",
        settings.model,
        f"{trained:,}",
        settings.batch_size,
        args.max_steps if args.max_steps > 0 else len(data) // settings.batch_size * args.num_train_epochs,
    )
    return partial(train, trainer, settings, report)


def make_trainer(
    settings: Settings, args: SentenceTransformerTrainingArguments, data: Dataset, held_out: Dataset | None = None
) -> SentenceTransformerTrainer:
    """Returns sentence-transformers' own trainer with model, loss, data and evaluators."""
    from transformers import EarlyStoppingCallback, set_seed

    from .evaluation import make_evaluators
    from .model import load_for_training
    from .stopping import StopOnSignal
    from .trainer import Trainer

    evaluators = make_evaluators(settings.eval_sts, held_out, settings.eval_images)
    set_seed(args.seed)
    model = load_for_training(
        settings.model,
        revision=settings.model_revision or None,
        bits=settings.bits,
        text_only=not settings.eval_images,
        lora_r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
    )
    callbacks: list[Any] = [StopOnSignal()]
    if settings.early_stop:
        callbacks.append(EarlyStoppingCallback(settings.early_stop))
    return Trainer(
        model=model,
        args=args,
        train_dataset=data,
        loss=make_loss(model, settings, args.per_device_train_batch_size, args.world_size),
        evaluator=evaluators or None,
        data_collator=make_collator(model, settings),
        callbacks=callbacks,
    )


def make_loss(model: Any, settings: Settings, batch_size: int, world_size: int) -> Any:
    """Returns the contrastive loss over all processes' rows, gradient-cached where a process's do not fit.

    An anchor is scored against every positive and every hard negative of the step: ft_llm.py's loss, but for its
    gradient, which that script divides by the number of processes.
    """
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )

    shared = {"scale": 1 / settings.temperature, "gather_across_devices": world_size > 1}
    if batch_size > settings.mini_batch_size:
        return CachedMultipleNegativesRankingLoss(model, mini_batch_size=settings.mini_batch_size, **shared)
    return MultipleNegativesRankingLoss(model, **shared)


def make_collator(model: Any, settings: Settings) -> Any:
    """Returns what makes a batch of rows: cuts the sentences, then makes prompts of them."""
    from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

    from .data import cut_sentences

    transformer = model[0]
    if settings.released_quirks:
        from .quirks import ReleasedCollator

        return ReleasedCollator(
            model.preprocess,
            tokenizer=transformer.tokenizer,
            wrapper=transformer.wrapper,
            max_tokens=settings.max_tokens,
        )

    def preprocess(sentences: Sequence[str], **kwargs: Any) -> dict[str, Any]:
        cut = cut_sentences(transformer.prompt_tokenizer.plain, sentences, settings.max_tokens)
        # As {"text"}, what looks like the path of an image is a sentence too
        return model.preprocess([{"text": sentence} for sentence in cut])

    return SentenceTransformerDataCollator(preprocess)


def train(trainer: SentenceTransformerTrainer, settings: Settings, report: Report) -> int:
    """Trains, evaluates before and after, and writes the adapter, its card and a plot; returns the exit code."""
    from e5v_st.files import write_atomically

    from .card import write_run
    from .stopping import StopOnSignal

    folder = Path(trainer.args.output_dir)
    checkpoint = last_checkpoint(folder) if settings.resume else None
    scores_file = folder / "evaluation.json"
    scores = json.loads(scores_file.read_text(encoding="utf8")) if checkpoint and scores_file.is_file() else {}
    if trainer.evaluator is not None and checkpoint is None and not trainer.is_deepspeed_enabled:
        scores["before"] = measure(trainer)
        logger.info("before training: %s", scores["before"])
    if trainer.is_world_process_zero():
        write_atomically(scores_file, json.dumps(scores, indent=2))
    if settings.resume:
        logger.info("going on from %s", checkpoint or "the beginning: there is no checkpoint yet")

    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    stop = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, StopOnSignal))
    if stop.received:
        logger.info("stopped after step %d, which is saved: --resume goes on", trainer.state.global_step)
        return 128 + stop.received
    if trainer.evaluator is not None:
        scores["after"] = measure(trainer)
        logger.info("after training: %s", scores["after"])
    if trainer.is_world_process_zero():
        write_run(trainer, asdict(settings), report, scores)
        logger.info("saved %s", folder)
    return 0


def measure(trainer: SentenceTransformerTrainer) -> dict[str, float]:
    """Returns the evaluators' scores, which every process computes for itself.

    Not with ``trainer.evaluate``. Before training that has accelerate prepare the model for evaluation alone; the model
    then counts as prepared, and several processes would train without averaging their gradients. Besides,
    ``EarlyStoppingCallback`` takes every such evaluation for one of those on the way.
    """
    folder = Path(trainer.args.output_dir) / "eval"
    if trainer.is_world_process_zero():
        folder.mkdir(exist_ok=True)
    with trainer.accelerator.autocast():  # as on the way
        metrics = trainer.evaluator(
            trainer.model,
            output_path=str(folder) if trainer.is_world_process_zero() else None,
            epoch=trainer.state.epoch or 0,
            steps=trainer.state.global_step,
        )
    return {name: value for name, value in metrics.items() if name.startswith(("sts_", "triplets_", "t2i_"))}


if __name__ == "__main__":
    raise SystemExit(main())
