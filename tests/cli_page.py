"""Writes docs/cli.md: what every command says of itself. `make cli-page` runs it."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import patch

from e5v_st.cli import COMMANDS, make_parser

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
WIDTH = 100

HEAD = """# Command line

Every command and its arguments, as `e5v COMMAND --help` prints them. `e5v --version` prints the versions of this
package and of the libraries that it uses. A fault is one line, and the exit code is 1; wrong arguments are 2, Ctrl-C is
130. Made by `make cli-page`.
"""


def page() -> str:
    """Returns the page."""
    parts = [HEAD]
    with patch.dict(os.environ, {"COLUMNS": str(WIDTH)}):
        for name, (_, text) in COMMANDS.items():
            _, parser = make_parser(name)
            parts.append(f"## e5v {name}\n\n{text[0].upper()}{text[1:]}.\n\n```text\n{parser.format_help()}```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf8")
