"""The command line: ``python -m hub push | merge | export | add-st-files | convert-llava``.

``e5v push`` and so on are the same commands. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from e5v_st.files import expand_home

Argument = tuple[str, dict[str, Any]]

_OUT: Argument = ("--out", {"required": True, "metavar": "FOLDER", "help": "the new folder"})
_BASE: Argument = (
    "--base",
    {"metavar": "ID", "help": "ID or ID@REVISION of the adapter's base, if it does not say it"},
)
_NATIVE: Argument = ("--native", {"action": "store_true", "help": "loads in sentence-transformers without custom code"})
_DRY: Argument = ("--dry-run", {"action": "store_true", "help": "check everything, upload nothing, show what would be"})
_REPO: Argument = ("repo_id", {"metavar": "REPO", "help": "user/name"})

#: command -> (module, function, help, arguments)
COMMANDS: dict[str, tuple[str, str, str, tuple[Argument, ...]]] = {
    "push": (
        "push",
        "push",
        "upload an adapter or model, after loading it in a clean process",
        (
            ("folder", {"help": "a run's or a saved model's folder"}),
            ("--repo", {"required": True, "dest": "repo_id", "metavar": "USER/NAME", "help": "created if need be"}),
            _BASE,
            ("--branch", {"help": "commit there instead of main"}),
            ("--pr", {"action": "store_true", "help": "open a pull request instead"}),
            ("--private", {"action": "store_true", "help": "a new repository is private"}),
            ("--update", {"action": "store_true", "help": "change a repository that has other files"}),
            ("--results", {"metavar": "FOLDER", "help": "mteb's result files, for the card"}),
            ("--results-model", {"metavar": "NAME[@REVISION]", "help": "whose, if they are of several models"}),
            ("--license", {"help": "the hub's identifier of a licence, for the card"}),
            _DRY,
        ),
    ),
    "merge": (
        "merge",
        "merge_and_push",
        "put an adapter into the weights of its base",
        (
            ("adapter", {"help": "folder or hub id of the adapter"}),
            _OUT,
            _BASE,
            ("--keys", {"choices": ("published", "current"), "help": "names of the weights (default: the base's)"}),
            _NATIVE,
            ("--push", {"metavar": "USER/NAME", "help": "upload the result there, as push does"}),
        ),
    ),
    "export": (
        "export",
        "export",
        "published format -> sentence-transformers files",
        (
            ("path_or_id", {"metavar": "model", "help": "folder or hub id of a published checkpoint"}),
            _OUT,
            _NATIVE,
            ("--revision", {"help": "of the hub id"}),
        ),
    ),
    "add-st-files": (
        "add_st_files",
        "add_st_files",
        "open the pull request that makes a repository load as it is",
        (_REPO, _DRY),
    ),
    "convert-llava": (
        "convert",
        "convert_llava",
        "convert LLaVA-NeXT shards to the Hugging Face layout",
        (("path_or_id", {"metavar": "model", "help": "folder or hub id in LLaVA's own format"}), _OUT),
    ),
}


def add_arguments(subparsers: Any) -> None:
    """Adds the commands to what ``ArgumentParser.add_subparsers`` returned."""
    for command, (_, _, text, arguments) in COMMANDS.items():
        parser = subparsers.add_parser(command, help=text, description=text[0].upper() + text[1:])
        for name, options in arguments:
            parser.add_argument(name, **options)
        parser.set_defaults(command=command)


def run(args: argparse.Namespace) -> int:
    """Runs a command whose arguments are parsed; prints what it returns."""
    values = vars(args).copy()
    command = values.pop("command")
    module, function, _, _ = COMMANDS[command]
    try:
        result = getattr(importlib.import_module(f".{module}", __package__), function)(**values)
    except (ValueError, OSError) as error:
        print(f"{command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{command}: stopped; nothing half done is left", file=sys.stderr)
        return 130
    if result:
        print(result)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parses and runs a command; returns the exit code."""
    program = "e5v" if Path(sys.argv[0]).stem == "e5v" else "python -m hub"
    parser = argparse.ArgumentParser(prog=program, description="Share E5-V models and adapters.")
    add_arguments(parser.add_subparsers(required=True, metavar="COMMAND"))
    return run(parser.parse_args(expand_home(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    raise SystemExit(main())
