"""The oldest versions: what `make test-oldest` installs is what setup.cfg allows, and no newer than what is tested."""

from __future__ import annotations

import configparser

from oldest import CONSTRAINTS, EXCEPT, ROOT, TOOLS, oldest
from packaging.requirements import Requirement


def test_the_oldest_environment_holds_the_lowest_declared_version_of_each_dependency():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf8")
    asked = {line.split("==")[0]: Requirement(line) for line in oldest()}
    for declared in map(Requirement, config["options"]["install_requires"].split()):
        if declared.name not in EXCEPT:
            lowest = next(part.version for part in declared.specifier if part.operator == ">=")
            assert str(asked[declared.name].specifier) == f"=={lowest}"
    assert set(EXCEPT) | set(TOOLS) < set(asked)


def test_the_tested_versions_are_within_what_setup_declares():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf8")
    lists = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    tested = dict(line.split("==") for line in CONSTRAINTS.read_text(encoding="utf8").splitlines() if "==" in line)
    for line in " ".join(lists).split():
        if not line.startswith("%"):
            declared = Requirement(line)
            assert declared.specifier.contains(tested[declared.name]), declared
