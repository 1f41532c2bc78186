"""``e5v eval``: which model and which tasks the words on the command line mean."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import mteb
import pytest
import torch

from e5v_st.cli import main
from e5v_st.model_files import sizes
from e5v_st.mteb_tasks import evaluate
from e5v_st.mteb_tasks.evaluate import find_meta, find_tasks, pin_revision
from e5v_st.provenance import Origin


def test_short_names_are_the_registered_models():
    assert find_meta("e5v").name == "royokong/e5-v"
    assert find_meta("e5v-paper").loader_kwargs["image_layout"] == "paper"


def test_settings_that_change_no_embedding_keep_the_name():
    meta = find_meta("e5v", store=False, batch_tokens=100, dtype=None)
    assert meta.name == "royokong/e5-v"
    assert meta.loader_kwargs == {"path": "royokong/e5-v", "store": False, "batch_tokens": 100}


def test_settings_that_change_embeddings_change_the_name_and_keep_the_rest():
    meta = find_meta("e5v-paper", dtype="bfloat16")
    assert meta.name == "royokong/e5-v (image_layout=paper, dtype=bfloat16)"
    assert meta.revision.startswith("0c1f2267")
    assert find_meta("e5v", quantize="nf4").name == "royokong/e5-v (quantize=nf4)"


def test_directories_and_hub_ids_are_models(small):
    assert find_meta(str(small)).name == "local/small"
    assert find_meta("me/my-model").name == "me/my-model"


@pytest.mark.parametrize("name", ["./nothing/there", "nothing-there", "/no/such/folder"])
def test_a_directory_that_is_not_there_is_said(name):
    with pytest.raises(ValueError, match="there is no file or folder"):
        find_meta(name)


def test_results_of_a_model_of_the_hub_go_by_its_commit(small, tmp_path, monkeypatch):
    asked = []

    def find_origin(name, revision):
        asked.append((name, revision))
        return Origin(name, tmp_path, "c0ffee")

    monkeypatch.setattr(evaluate, "find_origin", find_origin)
    meta = find_meta("me/my-model", dtype="bfloat16")
    assert pin_revision(meta, None).revision == pin_revision(meta, "next").revision == "c0ffee"
    assert asked == [("me/my-model", None), ("me/my-model", "next")]
    for known in (find_meta("e5v"), find_meta(str(small))):
        assert pin_revision(known, None) is known
    monkeypatch.undo()
    with pytest.raises(ValueError, match="only hub ids have revisions"):
        pin_revision(find_meta(str(small)), "next")


def test_tasks_and_benchmarks():
    assert len(find_tasks(None, None)) == 16
    assert [task.metadata.name for task in find_tasks(None, ["E5VSTS12"])] == ["E5VSTS12"]
    assert len(find_tasks(["E5V(tiny)"], None)) == 5
    with pytest.raises(ValueError, match="not found"):
        find_tasks(["E5W"], None)


def test_quantize_and_compile_reach_the_model(small, monkeypatch, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    evaluated, compiled = [], []
    monkeypatch.setattr(mteb, "evaluate", lambda model, *_, **__: evaluated.append(model))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: compiled.append((module, how)))
    words = ["eval", str(small), "-t", "E5VSTS12", "--device", "cpu", "--no-store", "--output", str(tmp_path)]
    assert main([*words, "--quantize", "nf4", "--compile"]) == 0
    (encoder,) = evaluated
    language_model = encoder.model[0].model.language_model
    assert type(language_model.layers[0].mlp.up_proj.weight).__name__ == "Params4bit"
    assert compiled == [(part, {"dynamic": True}) for layer in language_model.layers for part in layer.children()]
    assert "nf4: cosine to the same model in float32" in capsys.readouterr().out


def test_the_scores_that_are_printed_are_those_of_the_model_that_was_measured(tmp_path, capsys):
    words = ["eval", "e5v-tiny", "-t", "E5VEmojiSTS", "--device", "cpu", "--no-store", "--output", str(tmp_path)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    older = next(tmp_path.rglob("model_meta.json")).parent
    shutil.copytree(older, older.with_name("older"))
    meta = json.loads((older / "model_meta.json").read_text())
    (older.with_name("older") / "model_meta.json").write_text(json.dumps({**meta, "revision": "older"}))
    assert main(words) == 0
    assert capsys.readouterr().out == printed
    assert f"e5v/e5v-tiny: revision {meta['revision']}" in printed


def test_the_small_model_keeps_its_name_with_other_settings():
    assert find_meta("e5v-tiny", dtype="bfloat16").name == "e5v/e5v-tiny (dtype=bfloat16)"


def test_a_model_of_the_hub_is_recorded_by_its_commit(small, tmp_path):
    """The branch moves on: what was measured is a commit of it."""
    from hub_server import HubServer

    with HubServer() as hub:
        commit = hub.add_repo("me/model", small)
        code = (
            "from e5v_st.mteb_tasks.models import make_meta; entry = make_meta('me/model', store=False);"
            "meta = entry.load_model(device='cpu').mteb_model_meta;"
            "print(entry.revision, meta.revision, meta.n_embedding_parameters, meta.embed_dim, meta.name)"
        )
        environment = {**os.environ, **hub.env(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-W", "ignore", "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["main", commit, str(sizes([small])["n_embedding_parameters"]), "128", "me/model"], (
        done.stderr[-2000:]
    )
