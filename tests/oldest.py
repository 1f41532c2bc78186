"""Prints the oldest versions that setup.cfg allows, as requirements for pip. `make test-oldest` installs them.

    setup.cfg                   printed
    transformers>=5.23,<6       transformers==5.23      what the package needs, and three extras
    pytest>=8                   pytest==9.2.0           what only the tests need: the version of constraints.txt

pip chooses the versions of whatever these need in turn.
"""

from __future__ import annotations

import configparser
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"

#: The extras that are tried too. Tests of the others are skipped, since their libraries are not there.
EXTRAS = ("mteb", "quant", "report")

#: What only the tests need.
TOOLS = ("hypothesis", "pytest", "pytest-xdist", "setuptools", "tiktoken")

#: Packages that stay at the tested version, and why.
EXCEPT = {
    "pillow": "the golden numbers were made with version 13, which scales some images down otherwise than earlier ones",
}


def oldest() -> list[str]:
    """Returns the requirements."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf8")
    extras = config["options.extras_require"]
    lines = "\n".join([config["options"]["install_requires"], *(extras[name] for name in EXTRAS)]).split()
    lowest = dict(line.split(",")[0].split(">=") for line in lines)
    tested = dict(line.split("==") for line in CONSTRAINTS.read_text(encoding="utf8").splitlines() if "==" in line)
    versions = lowest | {name: tested[name] for name in (*EXCEPT, *TOOLS)}
    return [f"{name}=={version}" for name, version in versions.items()]


if __name__ == "__main__":
    print(*oldest(), sep="\n")
