"""Arguments of a training, and where the value of each comes from.

A later source overrules an earlier one:

    the argument's default  <  this machine  <  recipes/paper.yaml  <  the recipe  <  flags

A recipe may have sizes for several machines, under ``machines``; those of this one are part of it:

    machines:
      cpu: {bits: 32, mini_batch_size: 8}        # no GPU
      24gb: {mini_batch_size: 96}                # a GPU of less than 60 GiB
      80gb: {mini_batch_size: 384}               # a larger one

For example, ``e5v train single_gpu_80gb --learning_rate 2e-4`` on one H100:

    argument                       value   source
    temperature                    0.05    paper.yaml
    bits                           16      single_gpu_80gb.yaml; paper.yaml has 4
    learning_rate                  2e-4    the flag; paper.yaml has 4e-4
    bf16                           true    the machine: no recipe has it, and the GPU can do it
    per_device_train_batch_size    768     computed: batch_size / number of processes

Some arguments are ours (:class:`Settings`), all others are those of SentenceTransformerTrainingArguments.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e5v_st.processes import world_size

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformerTrainingArguments

RECIPES = Path(__file__).parent / "recipes"
#: Every recipe starts from this one.
PAPER = RECIPES / "paper.yaml"
#: Arguments that name what is evaluated, and the score that early stopping then goes by.
SCORES = {
    "eval_sts": "sts_spearman_cosine",
    "eval_data": "triplets_cosine_accuracy",
    "eval_rows": "triplets_cosine_accuracy",
    "eval_images": "t2i_recall@1",
    "eval_composed": "composed_recall@1",
    "eval_retrieval": "retrieval_cosine_ndcg@10",
}
#: Arguments of the trainer that would change the number of negatives unnoticed.
BATCHES = {"per_device_train_batch_size", "gradient_accumulation_steps"}
#: Processes that read ahead for one GPU.
READERS = 4
#: GPU memory in GiB from which the 80 GB recipe is taken.
LARGE_GPU_GIB = 60
#: Machines that a recipe may have sizes for, see :func:`find_machine`.
MACHINES = ("cpu", "24gb", "80gb")


def _argument(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class Settings:
    """The arguments of ``e5v train`` that are not the trainer's.

    Those of a recipe alone are ``train`` (see ``sources.py``), ``loss`` (see ``losses.py``) and ``matryoshka``.
    """

    model: str = _argument(
        "llava-hf/llama3-llava-next-8b-hf",
        "base: the directory or hub id of a model of any family that e5v backbones lists, or e5v-tiny",
    )
    model_revision: str = _argument("", "commit, tag or branch of the base on the hub")
    data: str = _argument(
        "princeton-nlp/datasets-for-simcse",
        "pairs or triplets: a .csv, .tsv, .jsonl, .json or .parquet file or a hub id, with the columns "
        "sent0, sent1[, hard_neg] or anchor, positive[, negative]",
    )
    max_tokens: int = _argument(32, "maximum number of tokens of a text; prompts are never cut")
    batch_size: int = _argument(
        768, "rows per step over all processes; the texts of all other rows are a row's negatives"
    )
    mini_batch_size: int = _argument(24, "rows that fit into the memory of one process; more are gradient-cached")
    temperature: float = _argument(0.05, "temperature of the contrastive loss")
    lora_r: int = _argument(64, "rank of the LoRA")
    lora_alpha: int = _argument(16, "the LoRA is scaled by lora_alpha / lora_r")
    lora_dropout: float = _argument(0.05, "dropout before the LoRA")
    bits: int = _argument(16, "precision of the frozen base: 4 (NF4), 8, 16 or 32 bits")
    released_quirks: bool = _argument(False, "feed the prompts and attention mask that the published script really fed")
    eval_sts: str = _argument(
        "", "graded pairs to evaluate on (sentence1, sentence2, score): the validation split of a file or hub id"
    )
    eval_data: str = _argument("", "held-out triplets to evaluate on: a file or hub id, with columns as in --data")
    eval_rows: int = _argument(0, "number of rows of --data to hold out, in place of --eval_data")
    eval_images: str = _argument(
        "",
        "captioned images to evaluate on (image, text): the validation split of a file or hub id; paths are relative "
        "to the file's folder",
    )
    eval_composed: str = _argument(
        "", "composed queries to evaluate on (reference, text, target): the validation split of a file or hub id"
    )
    eval_retrieval: str = _argument(
        "", "retrieval to evaluate on: a folder with the tables queries (id, text, image), corpus and relevant"
    )
    early_stop: int = _argument(0, "number of evaluations without a better score after which to stop (0: never)")
    resume: bool = _argument(False, "continue from the last checkpoint in output_dir, if there is one")
    init_adapter: str = _argument("", "an adapter to go on from, ours or the published script's: a directory or hub id")
    train_vision: str = _argument("none", "what is trained beside the language model: none, projector or lora (both)")
    on_bad_row: str = _argument("stop", "with train: stop at rows that cannot be used, or skip them")
    train: list[Any] = field(init=False, default_factory=list)
    loss: dict[str, Any] = field(init=False, default_factory=dict)
    matryoshka: list[int] = field(init=False, default_factory=list)


# ---- which recipe ----


def recipe_names() -> str:
    """Returns the names of the recipes that come with this package, for a message."""
    return ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))


def find_recipe(name: str) -> Path:
    """Returns the file of a recipe.

    Args:
        name: A path, or the name of a recipe that comes with this package, such as ``"tiny"``.

    Raises:
        ValueError: If there is no such recipe.
    """
    for path in (Path(name), RECIPES / name, RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    raise ValueError(f"there is no recipe {name}: give a YAML file or one of {recipe_names()}")


def find_machine() -> tuple[str, str]:
    """Returns which of :data:`MACHINES` this one is, and why."""
    import torch

    return machine_of(torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None)


def machine_of(gpu: Any) -> tuple[str, str]:
    """Returns which of :data:`MACHINES` has a GPU, and why.

    Args:
        gpu: With its ``name`` and ``total_memory``; ``None`` if there is none.
    """
    if gpu is None:
        return "cpu", "there is no GPU"
    gib = gpu.total_memory / 2**30
    return "80gb" if gib >= LARGE_GPU_GIB else "24gb", f"{gpu.name}, {gib:.0f} GiB"


def choose_recipe() -> Path:
    """Returns the recipe for this machine, and prints which one it is."""
    machine, why = find_machine()
    if world_size() > 1:
        name, why = "paper", f"{world_size()} processes"
    elif machine == "cpu":
        name, why = "tiny", "there is no GPU for the paper's model of 8 B parameters"
    else:
        name = f"single_gpu_{machine}"
    print(f"no recipe given: {name} ({why})", file=sys.stderr)
    return RECIPES / f"{name}.yaml"


def with_sizes(recipe: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a recipe's values with the sizes for this machine, if it has some, and prints which these are.

    Args:
        recipe: Its file, for messages.
        values: See :func:`read_recipe`.

    Raises:
        ValueError: If there are sizes for something else than a machine.
    """
    values = dict(values)
    sizes = values.pop("machines", None)
    if sizes is None:
        return values
    if (
        not isinstance(sizes, dict)
        or set(sizes) - set(MACHINES)
        or not all(isinstance(own, dict) for own in sizes.values())
    ):
        raise ValueError(f"{recipe} has machines={sizes!r}, want arguments for some of {', '.join(MACHINES)}")
    machine, why = find_machine()
    if machine not in sizes:
        return values
    chosen = ", ".join(f"{name}={value}" for name, value in sizes[machine].items())
    print(f"{recipe.stem}: {chosen} ({why})", file=sys.stderr)
    return {**values, **sizes[machine]}


def read_recipe(path: Path) -> dict[str, Any]:
    """Reads a YAML file of arguments.

    Raises:
        ValueError: If it is not YAML, or not a mapping.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values or {}, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, want arguments and their values")
    return values or {}


# ---- from the words of the command line to values ----


def read_arguments(words: Sequence[str]) -> tuple[Settings, SentenceTransformerTrainingArguments]:
    """Collects the value of every argument, from the sources that this module's docstring lists.

    Args:
        words: The command line: a recipe or none, then flags.

    Returns:
        Our arguments and the trainer's.

    Raises:
        ValueError: If the recipe cannot be read, names what is not an argument, or the arguments do not fit together.

    Example:
        >>> settings, args = read_arguments(["tiny", "--batch_size", "64"])
        >>> settings.model, settings.batch_size, args.num_train_epochs
        ('e5v-tiny', 64, 3)
    """
    from sentence_transformers import SentenceTransformerTrainingArguments

    flags = list(words)
    recipe = find_recipe(flags.pop(0)) if flags and not flags[0].startswith("-") else choose_recipe()
    own = with_sizes(recipe, read_recipe(recipe))
    values = {**read_recipe(PAPER), **own}
    _check_sources(own, flags)
    ours, theirs = _names(Settings), _names(SentenceTransformerTrainingArguments)
    structured = _take_structured(recipe, values)
    unknown = sorted(set(values) - ours - theirs)
    if unknown:
        raise ValueError(f"{recipe} names {', '.join(unknown)}, which is not an argument (see --help)")
    settings, flags = _parse(Settings, _only(ours, values), flags)
    for name, value in structured.items():
        setattr(settings, name, value)
    _check_choices(settings)
    _check_batch(settings, values, flags)
    defaults = {
        **_machine_values(settings, values),
        **_evaluation_values(settings, values),
        **_only(theirs - ours, values),
        "per_device_train_batch_size": settings.batch_size // world_size(),
    }
    args, flags = _parse(SentenceTransformerTrainingArguments, defaults, flags)
    if flags:
        raise ValueError(
            f"got {' '.join(flags)}, which is neither an argument of e5v train (see --help) nor of "
            "SentenceTransformerTrainingArguments"
        )
    _check_together(settings, args)
    return settings, args


#: What is one of a few words.
CHOICES = {"train_vision": ("none", "projector", "lora"), "on_bad_row": ("stop", "skip")}


def _take_structured(recipe: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Takes out of a recipe's values those that are lists or mappings; raises ValueError for another type."""
    found = {}
    for one in fields(Settings):
        if one.init or one.name not in values:
            continue
        found[one.name] = value = values.pop(one.name)
        kind: Any = one.default_factory
        if not isinstance(value, kind):
            raise ValueError(f"{recipe} has {one.name}={value!r}, want a {'list' if kind is list else 'mapping'}")
    return found


def _check_sources(own: Mapping[str, Any], flags: Sequence[str]) -> None:
    """Raises ValueError if ``train`` is empty, or stands beside arguments that it leaves nothing to say."""
    if "train" not in own:
        return
    if not own["train"]:
        raise ValueError(f"got train={own['train']!r}, want a list with an entry for each source")
    given = [name for name in ("data", "eval_rows") if own.get(name) or _is_given(name, flags)]
    if given:
        raise ValueError(
            f"got train and {' and '.join(given)}: the sources of train are the data, and eval_data is held-out rows"
        )


def _is_given(name: str, flags: Sequence[str]) -> bool:
    return any(word.partition("=")[0] == f"--{name}" for word in flags)


def _check_choices(settings: Settings) -> None:
    for name, words in CHOICES.items():
        if getattr(settings, name) not in words:
            raise ValueError(f"got {name}={getattr(settings, name)!r}, want one of {', '.join(words)}")


def _names(kind: type) -> set[str]:
    """Returns the names that a dataclass can be made with."""
    return {one.name for one in fields(kind) if one.init}


def _only(names: Iterable[str], values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def _parse(kind: type, defaults: Mapping[str, Any], flags: Sequence[str]) -> tuple[Any, list[str]]:
    """Makes a dataclass of flags, with other defaults than its own; returns it, and the flags that it does not know."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(kind, prog="e5v train", allow_abbrev=False)
    # argparse reads a default that is a string as a flag: 4e-4, which YAML takes for a string, becomes a number
    parser.set_defaults(**defaults)
    made, rest = parser.parse_args_into_dataclasses(flags, return_remaining_strings=True, look_for_args_file=False)
    return made, list(rest)


def _machine_values(settings: Settings, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arguments of the trainer that this machine decides, unless a recipe or flag does."""
    import torch

    found: dict[str, Any] = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    if not torch.accelerator.is_available():
        # Without use_cpu, several processes on CPUs would each train alone
        found |= {"use_cpu": True, "dataloader_pin_memory": False}
    elif settings.train:  # on a CPU, whoever reads images takes the time of the model
        found["dataloader_num_workers"] = READERS
    if settings.bits != 32 and torch.cuda.is_available() and not {"bf16", "fp16"} & set(values):
        found["bf16" if torch.cuda.is_bf16_supported() else "fp16"] = True
    return found


def _evaluation_values(settings: Settings, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arguments of the trainer that follow from what is evaluated: when, and by which score to stop early."""
    scores = [score for name, score in SCORES.items() if getattr(settings, name)]
    if settings.early_stop and not scores:
        raise ValueError(f"--early_stop needs something to measure: one of --{', --'.join(SCORES)}")
    found: dict[str, Any] = {}
    if scores:
        found |= {"eval_strategy": "steps", "eval_steps": values.get("save_steps", 50)}
    if settings.early_stop or (scores and values.get("load_best_model_at_end")):
        found |= {"load_best_model_at_end": True, "metric_for_best_model": scores[0], "greater_is_better": True}
    return found


def _check_batch(settings: Settings, values: Mapping[str, Any], flags: Sequence[str]) -> None:
    if BATCHES & {*values, *(word.lstrip("-").split("=")[0] for word in flags)}:
        raise ValueError(
            "give --batch_size, the rows of a step over all processes, and --mini_batch_size, what fits into memory: "
            "smaller batches, accumulated, would leave each row fewer negatives"
        )
    if settings.batch_size % world_size():
        raise ValueError(f"--batch_size {settings.batch_size} cannot be split over {world_size()} processes")


def _check_together(settings: Settings, args: SentenceTransformerTrainingArguments) -> None:
    if args.world_size != world_size():
        raise ValueError(
            f"there are {world_size()} processes, but the trainer sees {args.world_size}: is the launcher right?"
        )
    measured = [f"--{name}" for name in SCORES if getattr(settings, name)]
    if args.fsdp and measured:
        raise ValueError(
            f"got {', '.join(measured)} with --fsdp. It spreads the weights over the processes, so that no process can "
            "embed during training: leave it out, and evaluate the adapter afterwards"
        )


# ---- and back ----

#: Arguments of the trainer that say more of the machine than of the training.
OF_THE_MACHINE = (
    *("per_device_train_batch_size", "logging_dir", "run_name", "use_cpu"),
    "activation_checkpointing_kwargs",
)


def recipe_text(settings: Settings, args: SentenceTransformerTrainingArguments) -> str:
    """Returns a run's arguments as a recipe: all of ours, and those of the trainer that are not at their default."""
    import yaml
    from sentence_transformers import SentenceTransformerTrainingArguments

    default = SentenceTransformerTrainingArguments(output_dir="runs").to_dict()
    changed = {
        name: value
        for name, value in args.to_dict().items()
        if value != default.get(name)
        and name not in OF_THE_MACHINE
        and isinstance(value, (bool, int, float, str, dict))
    }
    own = {name: value for name, value in asdict(settings).items() if name != "resume" and value not in ([], {})}
    if settings.train:  # which stands for it
        del own["data"]
    return yaml.safe_dump({**own, **changed}, sort_keys=False, allow_unicode=True)
