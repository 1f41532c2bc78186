"""The command line: ``e5v COMMAND …``.

Each command is a module with ``add_arguments(parser)`` and ``run(args)``, in the package that it is about; this file
finds it, parses its arguments, and turns its errors into one line. Nothing heavy is imported for ``--help``.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from types import ModuleType

from .files import expand_home
from .options import settle_dtype

#: command -> (its module, what it does)
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("e5v_st.demo", "embed images and texts with the small model, offline"),
    "embed": ("e5v_st.index.embed", "embed a folder of images, a table or a dataset into Parquet shards; restartable"),
    "index": ("e5v_st.index.update", "bring a table of LanceDB up to date with a folder, a table or a dataset"),
    "search": ("e5v_st.index.search", "search what embed or index has stored, by a text, an image, or both"),
    "app": ("e5v_st.index.app", "serve a page on this machine that searches a table of index"),
    "backbones": ("e5v_st.backbones", "list the model families that E5-V's recipe runs on"),
    "eval": ("e5v_st.mteb_tasks.evaluate", "run the paper's evaluation on any E5-V"),
    "report": ("e5v_st.mteb_tasks.report", "compare results with the paper: text, Markdown, one HTML page"),
    "train": ("e5v_st.training.train_nli", "train a LoRA on text pairs, or on images too"),
    "mine": ("e5v_st.training.mine", "find hard negatives for a training table in an index"),
    "push": ("e5v_st.hub.push", "upload an adapter or model, after loading it in a clean process"),
    "merge": ("e5v_st.hub.merge", "merge an adapter into the weights of its base"),
    "export": ("e5v_st.hub.export", "turn a published checkpoint into a sentence-transformers model"),
    "add-st-files": ("e5v_st.hub.add_st_files", "open the pull request that makes a repository load as it is"),
    "convert-llava": ("e5v_st.hub.convert_llava", "convert LLaVA-NeXT shards to the Hugging Face layout"),
}
#: What ``--version`` names, for bug reports.
REPORTED = ("torch", "transformers", "sentence-transformers", "mteb", "peft")
#: Packages that an extra brings.
EXTRAS = {
    **{"mteb": "mteb", "matplotlib": "report", "bitsandbytes": "quant", "torchao": "quant", "ray": "ray"},
    **{"lancedb": "index", "gradio": "app"},
}
#: Options that quantise, and loggers of what transformers and peft import for it, whether it is used or not. There it
#: reports which of its own libraries it cannot load.
QUANTISING = ("--quantize", "--bits")
QUANTISING_LOGGERS = ("torchao", "bitsandbytes", "torch.utils._pytree")


def main(argv: Sequence[str] | None = None, program: str = "e5v", names: Iterable[str] = COMMANDS) -> int:
    """Runs a command.

    Args:
        argv: The words after the program's name. With ``None``, those of the process.
        program: The program's name, for help and errors.
        names: The commands that it has.

    Returns:
        The exit code: 0; 1 for a fault, which is told in one line; 2 for wrong arguments; 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that the terminal cannot show is no reason to show nothing
            stream.reconfigure(errors="backslashreplace")
    words = expand_home(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else "--help"
    if name == "--version":
        print(versions())
        return 0
    if name not in names:
        return _show_help(name, program, names)
    try:
        module, parser = make_parser(name, program)
        args = read_arguments(parser, words[1:])
        if not any(word.startswith(QUANTISING) for word in words):
            for logger in QUANTISING_LOGGERS:
                logging.getLogger(logger).setLevel(logging.CRITICAL)
        settle_dtype(args)
        return int(module.run(args))
    except KeyboardInterrupt:
        print(f"{program} {name}: stopped. What is complete is kept, and nothing half done is left.", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        return _fail(f"{program} {name}", error)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        return _fail(f"{program} {name}", f"{error.name} is not installed: pip install 'e5v-st[{extra}]'")


def make_parser(name: str, program: str = "e5v") -> tuple[ModuleType, argparse.ArgumentParser]:
    """Returns a command's module, and the parser of its arguments."""
    module = importlib.import_module(COMMANDS[name][0])
    text = COMMANDS[name][1]
    parser = argparse.ArgumentParser(prog=f"{program} {name}", description=text[0].upper() + text[1:] + ".")
    module.add_arguments(parser)
    return module, parser


def read_arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parses a command's words.

    A command with the default ``words`` takes the arguments of another library too, and reads them itself.
    """
    if parser.get_default("words") is None or {"-h", "--help"} & set(words):
        return parser.parse_args(words)
    return argparse.Namespace(words=list(words))


def versions() -> str:
    """Returns this package's version, and those of the libraries that it stands on, without importing them."""
    from . import __version__

    found = [f"e5v-st {__version__}", f"python {sys.version.split()[0]}"]
    for name in REPORTED:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} is not installed")
    return "\n".join(found)


def _fail(command: str, error: object) -> int:
    print(f"{command}: {' '.join(str(error).split())}", file=sys.stderr)
    return 1


def _show_help(name: str, program: str, names: Iterable[str]) -> int:
    known = name in ("-h", "--help")
    lines = [f"  {command:14} {COMMANDS[command][1]}" for command in names]
    usage = f"usage: {program} COMMAND …   ({program} COMMAND --help says more; {program} --version, the versions)"
    print("\n".join([usage, "", *lines]), file=None if known else sys.stderr)
    if not known:
        print(f"\n{program}: there is no command {name!r}", file=sys.stderr)
    return 0 if known else 2


if __name__ == "__main__":
    raise SystemExit(main())
