"""The command line: ``e5v demo | embed | search | eval | report | train | push | merge | export | …``.

Each command lives in the package that it is about; this only finds it. Nothing heavy is imported for ``--help``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from .files import expand_home

#: command -> (module with `add_arguments(parser)` and `run(args)`, what it does)
COMMANDS = {
    "demo": ("e5v_st.demo", "embed pictures and sentences with the embedded model, offline"),
    "embed": ("e5v_st.index.embed", "a folder of images, a table or a data set -> Parquet shards; restartable"),
    "search": ("e5v_st.index.search", "find what embed has stored, by words, by a picture, or both"),
    "eval": ("e5v_st.mteb_tasks.evaluate", "run the paper's evaluation on any E5-V"),
    "report": ("e5v_st.mteb_tasks.report", "compare results with the paper: text, Markdown, one HTML page"),
}
#: Commands with a parser of their own, which get the rest of the line as it is.
PROGRAMS = {
    "train": ("e5v_st.training.train_nli", "train a LoRA on text pairs"),
    **{
        name: ("e5v_st.hub.__main__", text)
        for name, text in {
            "push": "upload an adapter or model",
            "merge": "put an adapter into the weights",
            "export": "published format -> sentence-transformers files",
            "add-st-files": "open the pull request that makes a repository load as it is",
            "convert-llava": "convert LLaVA-NeXT shards to the Hugging Face layout",
        }.items()
    },
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: The words after the program's name; those of the process where ``None``.

    Returns:
        The exit code: 0, 1 for a fault that is described in one line, 130 after Ctrl-C.
    """
    words = expand_home(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else "--help"
    try:
        if name in PROGRAMS:
            module = importlib.import_module(PROGRAMS[name][0])
            rest = words if PROGRAMS[name][0].startswith("e5v_st.hub") else words[1:]
            return module.main(rest) or 0
        if name in COMMANDS:
            module = importlib.import_module(COMMANDS[name][0])
            parser = argparse.ArgumentParser(prog=f"e5v {name}", description=module.__doc__.splitlines()[0])
            module.add_arguments(parser)
            return module.run(parser.parse_args(words[1:])) or 0
    except KeyboardInterrupt:
        print("stopped; what was done is kept", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"e5v {name}: {error}", file=sys.stderr)
        return 1
    return _show_help(name)


def _show_help(name: str) -> int:
    if name == "--version":
        from . import __version__

        print(f"e5v {__version__}")
        return 0
    known = name in ("-h", "--help")
    lines = [f"  {command:14} {text}" for command, (_, text) in {**COMMANDS, **PROGRAMS}.items()]
    print(
        "usage: e5v COMMAND …   (e5v COMMAND --help says more)\n\n" + "\n".join(lines),
        file=None if known else sys.stderr,
    )
    if not known:
        print(f"\ne5v: there is no command {name!r}", file=sys.stderr)
    return 0 if known else 2


if __name__ == "__main__":
    raise SystemExit(main())
