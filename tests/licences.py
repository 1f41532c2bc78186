"""Writes docs/licences.md: the licence of everything that setup.cfg asks for. `make licences` runs it."""

from __future__ import annotations

import configparser
import re
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "licences.md"

#: Where the metadata do not say it, but the file of the licence does; and what is not installed with the tests.
NOT_TOLD = {"gradio": "Apache-2.0", "torchao": "BSD-3-Clause"}

HEAD = """# Licences

What this package depends on, and under which licence it comes. Nothing of it is part of this package. Made by
`make licences`, which reads the metadata of what is installed; `make audit` asks for known weaknesses.

| package | licence | needed for |
| --- | --- | --- |
"""


def dependencies() -> dict[str, str]:
    """Returns the names of the direct dependencies, and the extra that asks for each."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf8")
    lists = {"embedding and training": config["options"]["install_requires"]}
    lists |= {f"the extra `{name}`": value for name, value in config["options.extras_require"].items()}
    found: dict[str, str] = {}
    for why, lines in lists.items():
        for line in lines.split():
            if not line.startswith("%"):
                found.setdefault(re.split("[<>=!~;[]", line)[0], why)
    return found


def licence(name: str) -> str:
    """Returns what a package's metadata say of its licence."""
    if name in NOT_TOLD:
        return NOT_TOLD[name]
    about = metadata.metadata(name)
    if about.get("License-Expression"):
        return about["License-Expression"]
    named = [line.split(" :: ")[-1] for line in about.get_all("Classifier") or () if line.startswith("License ::")]
    return (about.get("License") or ", ".join(named)).split("\n")[0]


def page() -> str:
    """Returns the page."""
    rows = sorted((name, licence(name), why) for name, why in dependencies().items())
    return HEAD + "".join(f"| {name} | {what} | {why} |\n" for name, what, why in rows)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf8")
