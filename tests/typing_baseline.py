"""Compares mypy's errors with the baseline, ``data/mypy_baseline.json``. `make lint` runs it.

A file may have as many errors of a kind as the baseline says, and no more. The public modules (PUBLIC) may have none.
After mending errors, lower the baseline with `python tests/typing_baseline.py --write`. ``--rewrite`` also raises it:
for files that moved, and for a new version of mypy or of a library.

mypy looks for the parts of a package in the folder of the package. Three parts of ``e5v_st`` are elsewhere in this
repository (``package_dir`` in setup.cfg), so mypy gets links, laid out as the package is once it is installed:

    .mypy_cache/tree/e5v_st/encoder.py   ->  e5v_st/encoder.py
                            model        ->  e5v_st/model
                            hub          ->  hub
                            …

The links are always in the same place: mypy keeps what it learnt for the next run by path.
"""

from __future__ import annotations

import argparse
import configparser
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
BASELINE = Path(__file__).parent / "data" / "mypy_baseline.json"
CACHE = ROOT / ".mypy_cache"
TREE = CACHE / "tree"

#: Modules of the public names. They may have no error, and no entry in the baseline.
PUBLIC = (
    "e5v_st/__init__.py",
    "e5v_st/encoder.py",
    "e5v_st/loading.py",
    "e5v_st/model/prompts_e5v.py",
    "e5v_st/ray_actor.py",
    "e5v_st/readout.py",
)

_ERROR = re.compile(r"^(?P<file>[^:]+):\d+: error: .*\[(?P<code>[a-z-]+)\]$")


def moved_folders() -> dict[str, str]:
    """Returns the parts of the package that are in folders of other names: ``{"e5v_st/hub": "hub", …}``."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf8")
    pairs = (line.split("=") for line in config["options"]["package_dir"].strip().splitlines())
    return {name.strip().replace(".", "/"): folder.strip() for name, folder in pairs}


def link_tree() -> None:
    """Makes the links, and removes those to files that are gone."""
    package = TREE / "e5v_st"
    package.mkdir(parents=True, exist_ok=True)
    wanted = {package / path.name: path for path in (ROOT / "e5v_st").iterdir() if path.name != "__pycache__"}
    wanted |= {TREE / name: ROOT / folder for name, folder in moved_folders().items()}
    for link in package.iterdir():
        if link not in wanted or not link.exists():
            link.unlink()
    for link, target in wanted.items():
        if not link.is_symlink():
            link.symlink_to(target)


def check(*arguments: str) -> list[str]:
    """Runs mypy in the tree of links.

    Args:
        *arguments: What to check: ``"-p", "e5v_st"``, or ``"-c"`` and a program.

    Returns:
        The lines that it prints, with each file's place in this repository.

    Raises:
        RuntimeError: If mypy itself fails.
    """
    from mypy import api

    link_tree()
    before = Path.cwd()
    os.chdir(TREE)
    try:
        options = ("--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(CACHE), "--no-error-summary")
        out, problems, status = api.run([*options, *arguments])
    finally:
        os.chdir(before)
    if status not in (0, 1):
        raise RuntimeError(f"mypy failed: {problems or out}")
    moved = moved_folders()
    lines = []
    for line in out.splitlines():
        part = next((name for name in moved if line.startswith(f"{name}/")), None)
        lines.append(line if part is None else moved[part] + line[len(part) :])
    return lines


def count(lines: list[str]) -> dict[str, dict[str, int]]:
    """Returns how many errors of each code each file has: ``{"hub/push.py": {"arg-type": 2}}``."""
    found = Counter((match["file"], match["code"]) for match in map(_ERROR.match, lines) if match)
    table: dict[str, dict[str, int]] = {}
    for (file, code), number in sorted(found.items()):
        table.setdefault(file, {})[code] = number
    return table


def read_baseline() -> dict[str, dict[str, int]]:
    """Returns how many errors of each code each file may have."""
    return json.loads(BASELINE.read_text(encoding="utf8"))


def excess(found: dict[str, dict[str, int]], allowed: dict[str, dict[str, int]]) -> list[tuple[str, str, int, int]]:
    """Returns file, code, number found and number allowed where there are more than allowed."""
    rows = ((file, code, number) for file, codes in found.items() for code, number in codes.items())
    limits = ((file, code, number, allowed.get(file, {}).get(code, 0)) for file, code, number in rows)
    return [row for row in limits if row[2] > row[3]]


def total(table: dict[str, dict[str, int]]) -> int:
    """Returns the number of errors."""
    return sum(sum(codes.values()) for codes in table.values())


def main(argv: list[str] | None = None) -> int:
    """Compares, or writes the baseline; returns the exit status."""
    parser = argparse.ArgumentParser(description="Compares mypy's errors with the baseline.")
    parser.add_argument("--write", action="store_true", help="lower the baseline to what mypy finds now")
    parser.add_argument("--rewrite", action="store_true", help="write what mypy finds now, even where it is more")
    args = parser.parse_args(argv)
    lines = check("-p", "e5v_st")
    found = count(lines)
    more = excess(found, read_baseline())
    if args.rewrite:
        more = [row for row in more if row[0] in PUBLIC]
    for file, code, number, limit in more:
        print(f"{file}: {number} errors of kind [{code}], where {limit} are allowed:")
        print(*(line for line in lines if line.startswith(f"{file}:") and line.endswith(f"[{code}]")), sep="\n")
    if more:
        return 1
    if args.write or args.rewrite:
        BASELINE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf8")
        print(f"{BASELINE.relative_to(ROOT)}: {total(found)} errors in {len(found)} files")
    elif found != read_baseline():
        print(f"types: {total(found)} errors, fewer than the {total(read_baseline())} of the baseline. To lower it:")
        print("    python tests/typing_baseline.py --write")
    else:
        print(f"types: {total(found)} errors, as in the baseline")
    return 0


if __name__ == "__main__":
    sys.exit(main())
