"""Weights in shards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlavaNextForConditionalGeneration

from e5v_st.hub.export import export
from e5v_st.hub.tensors import read_tensors, write_tensors


def test_shards_are_cut_by_size_and_load(small, tmp_path):
    shutil.copyfile(small / "config.json", tmp_path / "config.json")
    write_tensors(read_tensors([small / "model.safetensors"]), tmp_path, shard_size=10**6)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert max(file.stat().st_size for file in files) < 1.1e6
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    before = load_file(small / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in before.values())
    loaded = LlavaNextForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert torch.equal(loaded["lm_head.weight"], before["language_model.lm_head.weight"])
    resharded = export(tmp_path_with_rest(small, tmp_path), tmp_path / "out")
    assert {file.name for file in resharded.glob("model[-.]*")} == {file.name for file in tmp_path.glob("model[-.]*")}


def tmp_path_with_rest(small: Path, folder: Path) -> Path:
    for file in small.glob("*.json"):
        shutil.copyfile(file, folder / file.name)
    return folder
