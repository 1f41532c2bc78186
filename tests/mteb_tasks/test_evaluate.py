"""``e5v eval``: which model and which tasks the words on the command line mean."""

from __future__ import annotations

import mteb
import pytest
import torch

from e5v_st.cli import main
from e5v_st.provenance import Origin
from mteb_tasks import evaluate
from mteb_tasks.evaluate import find_meta, find_tasks, pin_revision


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
