"""A training that goes on from an adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import e5v_st
from e5v_st.training.first_stage import put_first_stage
from e5v_st.training.model import load_for_training

TEXTS = ["A dog.", "Two men play chess."]


def make_adapter(small: Path, folder: Path, vision: str = "none", rank: int = 3) -> Path:
    """Saves an adapter of random weights, as a run leaves it."""
    model = load_for_training(str(small), bits=32, lora_r=rank, lora_alpha=7, text_only=False, train_vision=vision)
    numbers = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = 0.05 * torch.randn(weight.shape, generator=numbers)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def adapter(small, tmp_path_factory) -> Path:
    return make_adapter(small, tmp_path_factory.mktemp("stages") / "first")


def go_on(small: Path, adapter: Path, **more):
    return load_for_training(str(small), bits=32, init_adapter=str(adapter), lora_dropout=0.1, **more)


def test_it_begins_with_the_embeddings_of_the_adapter_in_peft(small, adapter):
    model = go_on(small, adapter).eval()
    expected = e5v_st.load(small, device="cpu")
    PeftModel.from_pretrained(expected[0].model, adapter)  # which puts its layers into the model
    np.testing.assert_allclose(model.encode(TEXTS), expected.encode(TEXTS), atol=2e-5)
    assert abs(model.encode(TEXTS) - e5v_st.load(small, device="cpu").encode(TEXTS)).max() > 1e-3


def test_rank_scale_and_layers_are_those_of_the_adapter_and_the_dropout_is_this_trainings(small, adapter):
    model = go_on(small, adapter, lora_r=64, lora_alpha=16)
    config = model[0].model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.inference_mode) == (3, 7, 0.1, False)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(trained) == len(load_file(adapter / "adapter_model.safetensors"))
    assert all(weight.dtype == torch.float32 for weight in model.parameters() if weight.requires_grad)


def test_what_is_trained_on_is_saved_as_an_adapter_of_the_base(small, adapter, tmp_path):
    model = go_on(small, adapter)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.01
    model.save_pretrained(str(tmp_path / "second"))
    assert not (tmp_path / "second" / "model.safetensors").exists()
    found = e5v_st.load(small, adapter=tmp_path / "second", device="cpu").encode(TEXTS)
    np.testing.assert_allclose(found, model.eval().encode(TEXTS), atol=1e-6)


def test_an_adapter_of_the_published_script_is_gone_on_from(small, adapter, tmp_path):
    """ft_llm.py trains the language model alone, and names its weights so."""
    shutil.copytree(adapter, tmp_path / "legacy")
    file = tmp_path / "legacy" / "adapter_model.safetensors"
    save_file({key.replace("language_model.", "model."): value for key, value in load_file(file).items()}, file)
    np.testing.assert_allclose(
        go_on(small, tmp_path / "legacy").eval().encode(TEXTS), go_on(small, adapter).eval().encode(TEXTS), atol=1e-6
    )


def test_layers_of_vision_must_be_asked_for_and_be_there(small, adapter, tmp_path):
    both = make_adapter(small, tmp_path / "both", vision="projector")
    go_on(small, both, text_only=False, train_vision="projector")
    with pytest.raises(
        ValueError, match=r"4 weights of layers that are not to be trained, such as multi_modal_projector"
    ):
        go_on(small, both, text_only=False)
    with pytest.raises(ValueError, match="has no LoRA in projector or tower"):
        go_on(small, adapter, text_only=False, train_vision="projector")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": "lora_only"}, "has bias, want a LoRA alone"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights='pissa', which changes the base"),
        ({"peft_type": "LOHA"}, "only LoRA can be loaded"),
    ],
)
def test_an_adapter_that_is_more_than_a_lora_is_refused(small, adapter, tmp_path, change, message):
    shutil.copytree(adapter, tmp_path / "odd")
    config = tmp_path / "odd" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        go_on(small, tmp_path / "odd")


def test_another_base_than_the_adapters_is_told(small, adapter, tmp_path, caplog):
    shutil.copytree(adapter, tmp_path / "named")
    config = tmp_path / "named" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "me/other"}))
    put_first_stage(e5v_st.load(small, device="cpu")[0], str(tmp_path / "named"), dropout=0.0, base="me/base")
    assert "was trained on me/other, and is put on me/base" in caplog.text
