"""Builds this package from a copy of its source: building writes into the source folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = "from setuptools import build_meta; import sys; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def copy_source(folder: Path, *left_out: str) -> Path:
    """Copies what a build needs, without files that match a pattern; returns the folder."""
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    ignore = shutil.ignore_patterns("__pycache__", *left_out)
    for package in ("e5v_st", "hub", "mteb_tasks", "training"):
        shutil.copytree(ROOT / package, folder / package, ignore=ignore)
    return folder


def build(kind: str, source: Path, out: Path) -> Path:
    """Builds with ``"build_wheel"`` or ``"build_editable"``; returns the wheel."""
    command = [sys.executable, "-c", BUILD, kind, str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel
