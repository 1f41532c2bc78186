"""Uploads an adapter or model: staged in a folder of its own, loaded by a clean process, committed in one go."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e5v_st.files import hash_file, read_json, write_json
from e5v_st.saved import read_modules

from . import reload
from .card import PLOT, Card, write_card
from .folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, base_of, copy_small_files, link, names_repository, weight_files
from .options import add_base, add_dry_run
from .remote import explained, persist, refuse_tokens, without_tokens
from .st_files import CUSTOM_TYPE, NATIVE_TYPE, copy_later, source_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi

#: Files of an earlier push that a later one removes if it has none of that name.
OWN_FILES = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "*_e5v.py", "chat_template.jinja")

TOLERANCE = {"torch.float32": 1e-5}  # largest difference of a coordinate; vectors have length 1
TOLERANCE_HALF = 5e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``e5v push``."""
    parser.add_argument("folder", help="a run's or a saved model's folder")
    parser.add_argument("--repo", required=True, dest="repo_id", metavar="USER/NAME", help="created if need be")
    add_base(parser)
    parser.add_argument("--branch", help="commit there instead of main")
    parser.add_argument("--pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--private", action="store_true", help="a new repository is private")
    parser.add_argument("--update", action="store_true", help="change a repository that has other files")
    parser.add_argument("--results", metavar="FOLDER", help="mteb's result files, for the card")
    parser.add_argument(
        "--results-model", metavar="NAME[@REVISION]", help="whose results to take, if there are those of several models"
    )
    parser.add_argument("--license", help="the hub's identifier of a licence, for the card")
    add_dry_run(parser)


def run(args: argparse.Namespace) -> int:
    """Runs ``e5v push``."""
    if address := push(**vars(args)):
        print(address)
    return 0


def push(
    folder: str | Path,
    repo_id: str,
    base: str | None = None,
    branch: str | None = None,
    pr: bool = False,
    private: bool = False,
    update: bool = False,
    dry_run: bool = False,
    results: str | Path | None = None,
    results_model: str | None = None,
    license: str | None = None,  # noqa: A002 - the hub's word
) -> str:
    """Uploads a model's folder in one commit.

    Args:
        folder: A run's or a saved model's folder, with an adapter or whole weights.
        repo_id: ``user/name``; created if need be.
        base: Hub id of an adapter's base, ``id@revision`` for a certain revision. By default, what the adapter's
            configuration says.
        branch: Commit to this branch instead of ``main``; it is created if need be.
        pr: Open a pull request instead of a commit to ``main``.
        private: Whether a new repository is private.
        update: Whether a repository that has other files may be changed.
        dry_run: Do everything but the upload, and print what would be uploaded.
        results: A folder of mteb's result files, for the card. They must be those of this model as it is now.
        results_model: ``NAME`` or ``NAME@REVISION`` of the results to take. Needed if the folder has the results of
            several models, or if the model's name is neither ``local/<folder>`` nor ``repo_id``.
        license: A licence identifier of the hub; by default the one in the folder's own card, or in the base's.

    Returns:
        The address of the commit or pull request; the empty string for a dry run.

    Raises:
        ValueError: If the folder would not load, or the hub refuses; the message says what to do.
    """
    folder = Path(folder)
    check_target(repo_id, needs_token=not dry_run)
    if pr and branch:
        raise ValueError("a pull request has a branch of its own: give --branch or --pr, not both")
    if results_model and not results:
        raise ValueError("--results-model says which results to take: give their folder with --results")
    measured = {"results": Path(results) if results else None, "results_model": results_model}
    card = Card(repo_id=repo_id, license=license, **measured)
    with tempfile.TemporaryDirectory(prefix="push-") as name:
        staged = Path(name) / "model"
        stage(folder, staged, card, base)
        check_reload(folder, staged)
        if dry_run:
            print(describe(staged, repo_id))
            return ""
        if not license:
            # Only now may the hub be asked for the base's licence: a dry run and a refused push reach no network
            card.ask_base = True
            write_card(staged, card, folder)
        with explained(repo_id):
            return _upload(staged, repo_id, branch=branch, pr=pr, private=private, update=update)


def check_target(repo_id: str, needs_token: bool = True) -> None:
    """Raises ValueError if a name is not that of a repository, or nobody is logged in, before anything takes time."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import validate_repo_id

    if repo_id.count("/") != 1:
        raise ValueError(f"got the repository {repo_id!r}, want USER/NAME")
    validate_repo_id(repo_id)
    if needs_token and not get_token():
        raise ValueError("there is no token for the hub: log in with `hf auth login`, or set HF_TOKEN")


# ---- what goes up ----


def stage(folder: Path, staged: Path, card: Card, base: str | None = None) -> None:
    """Gathers exactly the files of a push in ``staged``; weights are linked.

    Raises:
        ValueError: If the folder does not hold an E5-V, its base has no hub id, or a file holds an access token.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    modules = _read_modules(folder)
    staged.mkdir(parents=True)
    copy_small_files(folder, staged)
    copy_later(folder, staged, modules)
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    for file in [folder / ADAPTER_WEIGHTS] if is_adapter else weight_files(folder):
        if not file.is_file():
            raise ValueError(f"{folder} has no {file.name}: want the weights in safetensors (pickles are not pushed)")
        link(file, staged / file.name, passing=True)
    if any(module["type"] == CUSTOM_TYPE for module in modules):
        for file in source_files():
            shutil.copyfile(file, staged / file.name)
    if is_adapter:
        card.base, card.base_revision = _name_base(staged / ADAPTER_CONFIG, base)
    write_card(staged, card, folder)
    if (folder / PLOT).is_file():
        shutil.copyfile(folder / PLOT, staged / PLOT)
    refuse_tokens(staged)


def _read_modules(folder: Path) -> list[dict[str, Any]]:
    if not (folder / "modules.json").is_file():
        raise ValueError(
            f"{folder} has no modules.json, so it is not a saved model: `export` makes one of a published checkpoint, "
            "`merge` of a bare adapter"
        )
    modules = read_modules(folder)
    if modules[0]["type"] not in (CUSTOM_TYPE, NATIVE_TYPE):
        raise ValueError(f"{folder / 'modules.json'} names {modules[0]['type']!r}, which is not a module of an E5-V")
    return modules


def _name_base(file: Path, base: str | None) -> tuple[str, str | None]:
    """Writes the base's hub id and revision to an adapter's configuration, and returns them."""
    settings = read_json(file)
    name, revision = base_of(settings, base)
    if not names_repository(name):
        says = f"says that its base is {name!r}, which nobody else has" if name else "does not say what its base is"
        raise ValueError(f"the adapter {says}: name the base's hub id with --base")
    write_json(file, {**settings, "base_model_name_or_path": name, "revision": revision})
    return name, revision


def describe(staged: Path, repo_id: str) -> str:
    """Returns a table of the files that would be uploaded."""
    files = [file for file in sorted(staged.rglob("*")) if file.is_file()]
    rows = [f"{file.stat().st_size:>15,}  {file.relative_to(staged).as_posix()}" for file in files]
    total = sum(file.stat().st_size for file in files)
    return "\n".join([f"would be uploaded to {repo_id} (bytes):", *rows, f"{total:>15,}  in {len(files)} files"])


# ---- whether it loads ----


def check_reload(folder: Path, staged: Path) -> None:
    """Loads what is staged in a process without this package, and compares its embeddings with those of ``folder``.

    Raises:
        ValueError: If it does not load there, or gives other embeddings than ``folder`` does here.
    """
    import numpy as np

    print("loading the model here and in a clean process, to compare their embeddings …", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="check-") as name:
        own, dtype = _embed(folder if _has_base(folder) else staged, Path(name), "--own")
        clean, _ = _embed(staged, Path(name))
    difference = float(np.abs(own - clean).max()) if own.shape == clean.shape else np.inf
    if not difference <= TOLERANCE.get(dtype, TOLERANCE_HALF):
        is_adapter = (staged / ADAPTER_CONFIG).is_file()
        guess = "; was the adapter trained on another base than its configuration names?" if is_adapter else ""
        raise ValueError(
            "not pushed: loaded from a clean process, the model gives other embeddings "
            f"(difference {difference:.1g}){guess}"
        )


def _has_base(folder: Path) -> bool:
    """Whether the base that an adapter names can be had; a run may come from another machine, or name no base."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return True
    name, _ = base_of(read_json(folder / ADAPTER_CONFIG))
    found = bool(name) and (Path(name).is_dir() or names_repository(name))
    if not found:
        print(f"the adapter's base {name!r} is not here: whether --base names the same is not checked", file=sys.stderr)
    return found


def _embed(folder: Path, out: Path, *flags: str) -> tuple[Any, str]:
    import numpy as np

    file = out / f"embeddings{''.join(flags)}.npy"
    # Remote code is cached by its folder's name: a cache of its own never serves an older copy
    env = {**os.environ, "E5V_AUTOLOAD": "0", "HF_MODULES_CACHE": str(out / "modules")}
    command = [sys.executable, "-P", reload.__file__, str(folder.resolve()), str(file), *flags]
    done = subprocess.run(command, env=env, cwd=out, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        where = "here" if flags else "in a process without this project's packages"
        reason = without_tokens(_last_error(done.stderr, done.returncode))
        raise ValueError(f"not pushed: the model does not load {where}: {reason}")
    return np.load(file, allow_pickle=False), done.stdout.split()[-1]


def _last_error(said: str, code: int) -> str:
    """Returns the error that ended a process, on one line: its message may have several."""
    if code < 0:
        return f"the process was killed by signal {-code}; is there enough memory?"
    error = re.split(r"^(?=[\w.]+(?:Error|Exception)\b)", said, flags=re.MULTILINE)[-1]
    return " ".join(error.split())[-1000:] or "no message"


# ---- the upload ----


def _upload(staged: Path, repo_id: str, branch: str | None, pr: bool, private: bool, update: bool) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    if not pr:
        persist(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    if private and not persist(lambda: api.model_info(repo_id)).private:
        raise ValueError(f"{repo_id} exists already and is public: make it private on the hub, or choose another name")
    if branch:
        persist(lambda: api.create_branch(repo_id, branch=branch, exist_ok=True))
    if not (update or pr or branch):
        _refuse_other_files(api, repo_id, staged)
    title = f"Upload {staged_kind(staged)}"

    def commit() -> str:
        # An answer that was lost must not lead to a second pull request
        known = find_pull(api, repo_id, title, staged) if pr else None
        if known is not None:
            return known
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=staged,
            revision=branch,
            create_pr=pr,
            commit_message=title,
            delete_patterns=list(OWN_FILES),
        )
        return done.pr_url or done.commit_url

    return persist(commit)


def staged_kind(staged: Path) -> str:
    """Returns what a folder holds, in words."""
    return "E5-V adapter" if (staged / ADAPTER_CONFIG).is_file() else "E5-V model"


def _refuse_other_files(api: HfApi, repo_id: str, staged: Path) -> None:
    theirs = persist(lambda: remote_hashes(api, repo_id))
    if theirs and not _contains(theirs, staged):
        raise ValueError(
            f"{repo_id} exists already, with other files: add --update to commit on top of them, --branch or --pr to "
            "keep them, or choose another name"
        )


def find_pull(api: HfApi, repo_id: str, title: str, folder: Path) -> str | None:
    """Returns the address of an open pull request of this title that holds the files of ``folder``."""
    for pull in api.get_repo_discussions(repo_id, discussion_type="pull_request", discussion_status="open"):
        if pull.title == title and _contains(remote_hashes(api, repo_id, pull.git_reference), folder):
            return pull.url
    return None


def remote_hashes(api: HfApi, repo_id: str, revision: str | None = None) -> dict[str, str]:
    """Returns path -> hash (SHA-256 of large files, git's of others) of a repository's files but .gitattributes."""
    rows = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    files = [row for row in rows if hasattr(row, "blob_id") and row.path != ".gitattributes"]
    return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}


def _contains(theirs: dict[str, str], folder: Path) -> bool:
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    return all(
        path in theirs and theirs[path] == (git_hash if len(theirs[path]) == 40 else hash_file)(file)
        for path, file in files.items()
    )


def git_hash(file: Path) -> str:
    """Returns what git calls a file's content."""
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324
