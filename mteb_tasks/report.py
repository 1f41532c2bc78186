"""Sets results beside the paper's and the public ones: as text, as Markdown, and as one HTML page with images.

Reads the result files of ``mteb run`` and ``e5v eval``. ``comparing.py`` says what may be compared,
``report_tables.py`` makes the tables, ``report_page.py`` the page.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from e5v_st.files import write_atomically

from .public_scores import E5V, USUAL, find_models
from .report_page import as_html, load_contents
from .report_tables import as_markdown, as_text, headlines
from .runs import collect


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``e5v report``."""
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("results")], help="folders with results")
    parser.add_argument("--output", type=Path, help="where report.md and report.html go; default: the first folder")
    parser.add_argument(
        "--beside",
        nargs="*",
        default=list(USUAL),
        metavar="MODEL",
        help="models whose public scores on MIEB stand beside E5-V's; a part of a name will do",
    )
    parser.add_argument("--no-pictures", action="store_true", help="do not load the datasets for the gallery")


def run(args: argparse.Namespace) -> int:
    """Prints the table, and writes ``report.md`` and ``report.html``.

    Raises:
        ValueError: If there are no results.
    """
    runs = collect(args.folders)
    if not runs:
        raise ValueError(f"there are no results in {', '.join(map(str, args.folders))}: run e5v eval or mteb run first")
    models = [E5V, *(name for name in find_models(args.beside) if name != E5V)]
    print("\n".join([*headlines(runs), "", as_text(runs, models)]))
    output = args.output or args.folders[0]
    output.mkdir(parents=True, exist_ok=True)
    images = (lambda *_: {}) if args.no_pictures else load_contents
    pages = {"report.md": as_markdown(runs, models), "report.html": as_html(runs, images, models)}
    for name, content in pages.items():
        write_atomically(output / name, content)
        print(output / name)
    return 0
