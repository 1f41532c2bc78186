"""Opens the pull request that makes a published repository load as it is."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from e5v_st.saved import MODULES

from .export import check_checkpoint
from .folders import copy_small_files, fetch, link, weight_files
from .options import add_dry_run
from .push import check_reload, check_target, describe, find_pull
from .remote import explained, persist, refuse_tokens
from .st_files import write_st_files

TITLE = "Add sentence-transformers files"
DESCRIPTION = """\
With these files, `SentenceTransformer("{repo}", trust_remote_code=True)` gives E5-V's embeddings of texts, images, and
images with a change described in words, on current transformers. Nothing that is in the repository is changed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``e5v add-st-files``."""
    parser.add_argument("repo_id", metavar="REPO", help="user/name")
    add_dry_run(parser)


def run(args: argparse.Namespace) -> int:
    """Runs ``e5v add-st-files``."""
    if address := add_st_files(**vars(args)):
        print(address)
    return 0


def add_st_files(repo_id: str, dry_run: bool = False) -> str:
    """Opens a pull request with the sentence-transformers files and this package's code.

    Before it does, the repository with these files is loaded in a clean process, as ``hub.push`` does.

    Args:
        repo_id: A repository in the published format.
        dry_run: Print what the pull request would hold instead. Nothing is loaded, and no weights are downloaded.

    Returns:
        The address of the pull request; if one with the same files is open already, the address of that one. The empty
        string for a dry run.

    Raises:
        ValueError: If the repository is of no known family, has such files already or would not load with them, or if
            the hub refuses.
    """
    from huggingface_hub import HfApi

    check_target(repo_id, needs_token=not dry_run)
    api = HfApi()
    with tempfile.TemporaryDirectory(prefix="pull-") as name, explained(repo_id):
        there = persist(lambda: api.list_repo_files(repo_id))
        if MODULES in there:  # before it is read: it may be anything
            raise ValueError(f"{repo_id} has {MODULES} already: nothing to add")
        folder = Path(name)
        small = folder / "there"
        small.mkdir()
        source = fetch(repo_id, weights=False)
        check_checkpoint(source, repo_id)
        copy_small_files(source, small)
        added = folder / "added"
        added.mkdir()
        write_st_files(small, native=False, out=added)
        double = sorted(path for path in there if (added / path).exists())
        if double:
            raise ValueError(f"{repo_id} has {double[0]} already: nothing to add")
        refuse_tokens(added)
        if dry_run:
            print(describe(added, f"a pull request of {repo_id}"))
            return ""
        known = persist(lambda: find_pull(api, repo_id, TITLE, added))
        if known is not None:
            return known
        check_reload(*_with_files(fetch(repo_id), added, folder / "whole"))

        def commit() -> str:
            known = find_pull(api, repo_id, TITLE, added)
            if known is not None:
                return known
            text = DESCRIPTION.format(repo=repo_id)
            return api.upload_folder(
                repo_id=repo_id, folder_path=added, create_pr=True, commit_message=TITLE, commit_description=text
            ).pr_url

        return persist(commit)


def _with_files(source: Path, added: Path, whole: Path) -> tuple[Path, Path]:
    """Puts together what the repository would hold; returns the folder without and the one with the added files."""
    shutil.copytree(added, whole)
    copy_small_files(source, whole)
    for file in weight_files(source):
        link(file, whole / file.name, passing=True)
    return source, whole
