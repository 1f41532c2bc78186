"""What is pushed loads by its id in a virtual environment where none of this project's packages is there."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest
from hub_client import TOKEN, connect, contents
from hub_server import HubServer
from safetensors.torch import load_file, save_file

import e5v_st
import e5v_st.hub.push
from e5v_st.hub import reload
from e5v_st.hub.__main__ import main
from e5v_st.hub.add_st_files import add_st_files
from e5v_st.hub.merge import merge
from e5v_st.hub.push import push

BASE = "royokong/e5-v"
REPO = "me/e5v-nli-lora"
PACKAGES = ("e5v_st",)

# Loads every (id, name of the revision, revision, needs its code) of argv[2]; saves embeddings of reload.py's inputs
CLEAN = """
import importlib.metadata, importlib.util, json, re, sys
import numpy as np
spec = importlib.util.spec_from_file_location("reload", sys.argv[1])
reload = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reload)
from sentence_transformers import SentenceTransformer
here = [name for name in reload.PACKAGES if importlib.util.find_spec(name)]
here += [each.name for each in importlib.metadata.distributions() if each.name in ("e5v-st", "e5v_st")]
if here or "e5v_st" in str(sys.modules):
    raise SystemExit(f"this environment is not clean: {here}")
found = {}
for repo, name, revision, code in json.loads(sys.argv[2]):
    model = SentenceTransformer(repo, revision=revision, device="cpu", **({"trust_remote_code": True} if code else {}))
    found[f"{repo}@{name}"] = np.concatenate([model.encode([item]) for item in reload.inputs()])
np.savez(sys.argv[3], **found)
if "--more" in sys.argv:
    try:
        SentenceTransformer("me/e5v-nli-lora", device="cpu")
    except ValueError as error:
        print("without:", error)
    from huggingface_hub import ModelCard
    for block in re.findall("```python\\n(.*?)```", ModelCard.load("me/e5v-nli-lora").text, re.DOTALL):
        exec(block)
"""


@pytest.fixture(scope="module")
def clean_python(tmp_path_factory):
    """The interpreter of a fresh virtual environment that lacks this project: its startup hook, finder and packages.

    The other packages are links to those that are installed here, so that nothing is downloaded.
    """
    home = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(home, symlinks=True)
    target = Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)}))
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(folder).iterdir():
            if not entry.name.startswith(("__editable__", "__pycache__", "e5v_st")) and entry.name not in PACKAGES:
                (target / entry.name).symlink_to(entry)
    assert not list(target.glob("*e5v*"))
    return home / "bin" / "python"


def moved_on(small, folder):
    """A checkpoint of the same shape with other weights."""
    weights = load_file(small / "model.safetensors")
    weights = {key: weight.flip(0) if "q_proj" in key else weight for key, weight in weights.items()}
    files = {**contents(small)}
    save_file(weights, folder / "moved.safetensors", metadata={"format": "pt"})
    return {**files, "model.safetensors": (folder / "moved.safetensors").read_bytes()}


@pytest.fixture(scope="module")
def world(adapter, make_adapter, small, clean_python, tmp_path_factory):
    """A hub with everything that this package makes, pushed from here and loaded in a clean environment."""
    home = tmp_path_factory.mktemp("world")
    (home / "results").mkdir()
    scores = {"test": [{"main_score": 0.5, "hf_subset": "default"}]}
    (home / "results" / "model_meta.json").write_text(json.dumps({"name": REPO, "revision": "1"}))
    (home / "results" / "STS12.json").write_text(json.dumps({"task_name": "STS12", "scores": scores}))
    (home / "results" / "model_meta.json").write_text(json.dumps({"name": REPO, "revision": "1"}))
    with HubServer() as server, pytest.MonkeyPatch.context() as patch:
        connect(server, home / "cache", patch)
        server.add_repo(BASE, small)
        words = ["push", str(adapter), "--repo", REPO, "--base", BASE, "--results", str(home / "results")]
        assert main(words) == 0
        patch.setattr(e5v_st.hub.push, "check_reload", lambda folder, staged: None)
        server.add_repo("you/theirs", {"f": b"x"})
        push(adapter, "you/theirs", base=BASE, pr=True)
        push(make_adapter(home / "other", lora_alpha=2), REPO, base=BASE, branch="next")
        push(merge(adapter, home / "merged", base=BASE), "me/e5v-nli", private=True)
        push(merge(adapter, home / "native", base=BASE, native=True), "me/e5v-nli-native")
        add_st_files(BASE)
        commit = server.add_repo("you/base", small)
        push(adapter, "me/pinned", base=f"you/base@{commit}")
        push(adapter, "me/floating", base="you/base")
        server.add_repo("you/base", moved_on(small, home))
        models = [
            (REPO, "main", None, True),
            (REPO, "commit", server.commits(REPO)[0].sha, True),
            (REPO, "next", "next", True),
            ("you/theirs", "pull", "refs/pr/1", True),
            ("me/e5v-nli", "main", None, True),
            ("me/e5v-nli-native", "main", None, False),
            (BASE, "pull", "refs/pr/1", True),
            ("me/pinned", "main", None, True),
            ("me/floating", "main", None, True),
        ]

        def load(out, models, *flags, **env):
            command = [clean_python, "-I", "-c", CLEAN, reload.__file__, json.dumps(models), str(out), *flags]
            env = {**os.environ, **server.env(home / "clean", token=TOKEN), **env}
            done = subprocess.run(command, env=env, cwd=home, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            return np.load(out), done.stdout

        online, said = load(home / "online.npz", models, "--more")
        assert server.unhandled == server.strays == []
        server.stop()
        offline, _ = load(home / "offline.npz", [models[0], *models[6:8]], HF_HUB_OFFLINE="1")
        yield {"online": online, "offline": offline, "said": said, "other": home / "other"}


@pytest.fixture(scope="module")
def expected(adapter, small):
    """Embeddings of the adapter and of the base, with this package's own loader."""
    found = []
    for folder in (adapter, small):
        model = e5v_st.load(folder, device="cpu")
        found.append(np.concatenate([model.encode([item]) for item in reload.inputs()]))
    return found


def test_an_adapter_gives_the_same_embeddings_by_id_commit_and_pull_request(world, expected):
    for name in (f"{REPO}@main", f"{REPO}@commit", "you/theirs@pull"):
        np.testing.assert_array_equal(world["online"][name], expected[0], err_msg=name)


def test_a_branch_gives_its_own_adapter_and_not_mains(world, expected):
    model = e5v_st.load(world["other"], device="cpu")
    own = np.concatenate([model.encode([item]) for item in reload.inputs()])
    np.testing.assert_array_equal(world["online"][f"{REPO}@next"], own)
    assert np.abs(own - expected[0]).max() > 1e-2


def test_merged_models_give_the_adapters_embeddings(world, expected):
    for name in ("me/e5v-nli@main", "me/e5v-nli-native@main"):
        np.testing.assert_allclose(world["online"][name], expected[0], atol=1e-5, err_msg=name)


def test_the_pull_request_makes_the_published_repository_load(world, expected):
    found = world["online"][f"{BASE}@pull"]
    np.testing.assert_array_equal(found, expected[1])
    assert np.abs(found - expected[0]).max() > 1e-2


def test_an_adapter_stays_on_the_revision_of_its_base_that_it_names(world, expected):
    np.testing.assert_array_equal(world["online"]["me/pinned@main"], expected[0])
    assert np.abs(world["online"]["me/floating@main"] - expected[0]).max() > 1e-2


def test_what_was_loaded_once_loads_offline(world):
    assert len(world["offline"]) == 3
    for name in world["offline"]:
        np.testing.assert_array_equal(world["offline"][name], world["online"][name], err_msg=name)


def test_without_trust_it_is_sentence_transformers_own_error(world):
    assert "without:" in world["said"]
    assert "trust_remote_code=True" in world["said"]


def test_the_cards_snippets_run(world):
    assert "tensor([[" in world["said"]
