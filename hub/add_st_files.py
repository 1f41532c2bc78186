"""Opens the pull request that makes a published repository load as it is."""

from __future__ import annotations

import tempfile
from pathlib import Path

from .export import write_st_files
from .files import copy_small_files, fetch
from .push import describe, find_pull
from .remote import explained, persist, refuse_tokens

TITLE = "Add sentence-transformers files"
DESCRIPTION = """\
With these files, `SentenceTransformer("{repo}", trust_remote_code=True)` gives E5-V's embeddings of texts, images, and
images with a change, on current transformers. Nothing that is in the repository is changed.
"""


def add_st_files(repo_id: str, dry_run: bool = False) -> str:
    """Opens a pull request with the sentence-transformers files and this package's code.

    Args:
        repo_id: A repository in the published format.
        dry_run: Print what would be in it instead.

    Returns:
        The address of the pull request (of the one that is open already, where there is one with the same files); the
        empty string for a dry run.

    Raises:
        ValueError: If the repository is no LLaVA-NeXT, has such files already, or the hub refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with tempfile.TemporaryDirectory(prefix="pull-") as name, explained(repo_id):
        there = persist(lambda: api.list_repo_files(repo_id))
        folder = Path(name)
        small = folder / "there"
        small.mkdir()
        copy_small_files(fetch(repo_id, weights=False), small)
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

        def commit() -> str:
            known = find_pull(api, repo_id, TITLE, added)
            if known is not None:
                return known
            text = DESCRIPTION.format(repo=repo_id)
            return api.upload_folder(
                repo_id=repo_id, folder_path=added, create_pr=True, commit_message=TITLE, commit_description=text
            ).pr_url

        return persist(commit)
