"""Command-line options that choose a model, and the model that they choose: the same for all commands."""

from __future__ import annotations

import argparse
import difflib
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from .fastest import FASTEST, choose_dtype, compare_with_float32
from .processes import own_device

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

#: Those of ``llava_next_e5v``, which would import torch for ``--help``.
LAYOUTS = ("upstream", "paper")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that choose and load a model."""
    add_model_name(parser, default="royokong/e5-v")
    add_settings_arguments(parser)


def add_settings_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds those of :func:`add_model_arguments` that say how the model is loaded."""
    parser.add_argument(
        "--image-layout",
        choices=LAYOUTS,
        help="how an image's tiles are put together (default: what the model was saved with, else upstream)",
    )
    add_max_image_tokens(parser)
    add_loading_arguments(parser)


def add_model_name(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds ``--model``."""
    parser.add_argument("--model", default=default, help="a directory or hub id, or e5v-tiny (default: %(default)s)")


def add_max_image_tokens(parser: argparse.ArgumentParser) -> None:
    """Adds ``--max-image-tokens``."""
    parser.add_argument(
        "--max-image-tokens",
        type=int,
        help="about how many tokens an image takes at most, where the model's family can choose: more show finer "
        "detail and take longer (default: what the model was saved with, else the family's)",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds ``--device``."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds those of these arguments that ``e5v eval`` has as well."""
    parser.add_argument("--revision", help="branch, tag or commit of the model's hub id")
    parser.add_argument("--adapter", help="a LoRA to put on the model: a directory, a hub id or id@revision")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32", FASTEST),
        help="default: bfloat16 on a GPU, else the checkpoint's. fastest: bfloat16 where this CPU computes it 1.5 "
        "times as fast as float32, which is measured once; prints the cosine to float32",
    )
    add_device(parser)
    parser.add_argument(
        "--max-batch-tokens",
        type=int,
        help="maximum number of tokens computed together (default: by the GPU's free memory)",
    )
    parser.add_argument(
        "--quantize",
        choices=("int8", "nf4", "fp8"),
        help="quantise the language model. The unquantised model is loaded first, to report the cosine similarity "
        "between the two",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the language model: a slow start")


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Adds ``--plan`` and ``--rate``."""
    parser.add_argument(
        "--plan",
        action="store_true",
        help="only print what it will take: texts, images, tokens, what is done already, time. No data and no weights "
        "are downloaded or loaded",
    )
    parser.add_argument(
        "--rate",
        type=float,
        metavar="TOKENS",
        help="tokens a second for the plan's time (default: measured on this machine, in a minute at most)",
    )


def load_for(args: argparse.Namespace, **changes: Any) -> SentenceTransformer:
    """Loads the model that :func:`add_model_arguments` chose, on this process's own GPU if there are several processes.

    Args:
        args: The arguments. The model's name is needed; an option that is not there is left to ``e5v_st.load``.
        **changes: Options that are to be other than in ``args``.
    """
    from .loading import load

    chosen = {**vars(args), **changes}
    settings = {name: chosen.get(name) for name in ("image_layout", "max_image_tokens", "adapter", "quantize")}
    if chosen.get("dtype"):
        settings["model_kwargs"] = {"dtype": chosen["dtype"]}
    return load(chosen["model"], device=own_device(chosen.get("device")), **settings)


def settle_dtype(args: argparse.Namespace) -> None:
    """Puts the dtype that ``--dtype fastest`` means here into the arguments: what is stored names that."""
    if getattr(args, "dtype", None) == FASTEST:
        args.dtype, args.fastest = choose_dtype(args.device), True


def load_and_compare(args: argparse.Namespace) -> SentenceTransformer:
    """Loads the chosen model, compiles it on request, and prints what quantisation, or the fastest dtype, changes."""
    from .loading import compile_layers
    from .probes import embed_unquantised, print_cosines

    unquantised = embed_unquantised(partial(load_for, args)) if args.quantize else None
    model = load_for(args)
    print_cosines(model, args.quantize, unquantised)
    if getattr(args, FASTEST, False) and not args.quantize:
        compare_with_float32(model, partial(load_for, args, dtype="float32"))
    if args.compile:
        compile_layers(model)
    return model


def print_image_tokens(model: SentenceTransformer) -> None:
    """Says how many tokens an image takes at most, where that is a default of the model's family."""
    transformer: Any = model[0]
    default = transformer.backbone.image_tokens
    if transformer.max_image_tokens is None and default is not None:
        family = transformer.backbone.name
        print(f"an image takes about {default} tokens at most, the default of {family}: --max-image-tokens changes it")


def check_unicode(text: str, what: str) -> str:
    """Returns a text of the command line; raises ValueError if it was typed in another encoding than Python expects."""
    try:
        text.encode()
    except UnicodeEncodeError:
        expected = sys.getfilesystemencoding()
        raise ValueError(f"{what} is not {expected}, as this locale says: set LC_ALL to the terminal's own") from None
    return text


def find_prompt(model: SentenceTransformer, prompt: str | None) -> str | None:
    """Returns the template of a prompt's name. What is not a name is returned as it is.

    Raises:
        ValueError: If it seems to be a misspelt name, or is not Unicode.
    """
    if prompt is None:
        return None
    if prompt in model.prompts:
        return model.prompts[prompt]
    check_unicode(prompt, "--prompt")
    if near := difflib.get_close_matches(prompt, model.prompts, n=1, cutoff=0.75):
        raise ValueError(f"there is no prompt {prompt!r}; is it {near[0]!r}? There are {', '.join(model.prompts)}")
    return prompt
