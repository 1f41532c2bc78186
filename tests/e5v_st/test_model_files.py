"""What a model's files say without loading it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from e5v_st.fingerprint import digest_folders
from e5v_st.model_files import revision_of, sizes
from e5v_st.provenance import find_folder


@pytest.fixture
def copy(small, tmp_path):
    return shutil.copytree(small, tmp_path / "small")


def test_a_change_of_any_weight_changes_the_digest(small, copy):
    before = digest_folders([copy])
    assert before == digest_folders([small])
    weights = load_file(copy / "model.safetensors")
    for name in weights:
        changed = {**weights, name: weights[name] * np.array(1.01, weights[name].dtype)}
        save_file(changed, copy / "model.safetensors", metadata={"format": "pt"})
        differs = not np.array_equal(changed[name], weights[name])
        assert (digest_folders([copy]) != digest_folders([small])) == differs, name


def test_a_change_of_the_last_byte_or_of_a_configuration_changes_the_digest(small, copy):
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert digest_folders([copy]) != digest_folders([small])
    shutil.copy(small / "model.safetensors", copy)
    assert digest_folders([copy]) == digest_folders([small])
    settings = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps({**settings, "image_mean": [0, 0, 0]}))
    assert digest_folders([copy]) != digest_folders([small])


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0{}", b"\x02\0\0\0\0\0\0\0[]rest"])
def test_a_damaged_file_of_weights_has_a_digest_and_no_sizes(copy, content):
    (copy / "model.safetensors").write_bytes(content)
    assert len(digest_folders([copy])) == 40
    assert sizes([copy]) == {}


def test_sizes_are_those_of_the_weights_in_the_files(small):
    weights = load_file(small / "model.safetensors")
    (table,) = [weight for name, weight in weights.items() if name.endswith("embed_tokens.weight")]
    assert sizes([small]) == {
        "n_parameters": sum(weight.size for weight in weights.values()),
        "n_embedding_parameters": table.size,
        "memory_usage_mb": round(sum(weight.nbytes for weight in weights.values()) / 2**20),
        "embed_dim": table.shape[1],
        "max_tokens": json.loads((small / "config.json").read_text())["text_config"]["max_position_embeddings"],
    }


def make_adapter(folder, base, **settings):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base), **settings}))
    save_file({"layer.lora_A.weight": np.ones((2, 3), np.float32)}, folder / "adapter_model.safetensors")
    return folder


def test_the_revision_of_an_adapter_is_that_of_its_local_base_too(copy, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", copy)
    before = revision_of(str(adapter))
    settings = (copy / "config.json").read_text()
    (copy / "config.json").write_text(settings + " ")
    assert revision_of(str(adapter)) != before
    (copy / "config.json").write_text(settings)
    assert revision_of(str(adapter)) == before


def test_the_revision_of_a_hub_id_is_the_commit_that_was_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit, repo = "a" * 40, tmp_path / "models--me--model"
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "snapshots" / commit / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    assert find_folder("me/model") == repo / "snapshots" / commit
    assert revision_of("me/model", loaded=True) == commit
    assert revision_of("me/model") == "main"  # the hub may have a newer one
    assert revision_of("me/other", loaded=True) == "main"


def test_an_adapter_on_a_model_makes_another_revision(small, tmp_path):
    one, other = (make_adapter(tmp_path / name, "me/base", r=rank) for name, rank in (("one", 4), ("other", 8)))
    found = {revision_of(str(small), adapter=str(own)) for own in (one, other)} | {revision_of(str(small))}
    found.add(revision_of("royokong/e5-v", "0" * 40, adapter=str(one)))
    assert len(found) == 4


@pytest.mark.parametrize("name", ["./nothing", "nothing", "/no/such", "~/x", "a/b/c"])
def test_what_is_neither_a_directory_nor_a_hub_id_has_no_folder(name):
    assert find_folder(name) is None
