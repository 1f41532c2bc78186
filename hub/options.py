"""Command-line options that several commands share."""

from __future__ import annotations

import argparse


def add_out(parser: argparse.ArgumentParser) -> None:
    """Adds ``--out``."""
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the new folder")


def add_base(parser: argparse.ArgumentParser) -> None:
    """Adds ``--base``."""
    parser.add_argument("--base", metavar="ID", help="ID or ID@REVISION of the adapter's base, if it does not name it")


def add_native(parser: argparse.ArgumentParser) -> None:
    """Adds ``--native``."""
    parser.add_argument("--native", action="store_true", help="loads in sentence-transformers without custom code")


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """Adds ``--dry-run``."""
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, upload nothing, print what would be uploaded"
    )
