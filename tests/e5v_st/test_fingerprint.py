"""The digest of a model in memory knows all that decides its states."""

from __future__ import annotations

import json
import shutil

import families
import pytest

import e5v_st
from e5v_st.fingerprint import fingerprint


@pytest.fixture
def copy(small, tmp_path):
    return shutil.copytree(small, tmp_path / "copy")


def change_one_number(model):
    weight = model[0].model.language_model.embed_tokens.weight
    weight.data[777, 7] += 1e-3


def change_another_number(model):
    weight = model[0].model.vision_tower.encoder.layers[0].self_attn.q_proj.weight
    weight.data[-1, -1] += 1e-3


def change_the_rotation(model):
    model[0].model.language_model.rotary_emb.inv_freq[3] *= 1.001


@pytest.mark.parametrize("change", [change_one_number, change_another_number, change_the_rotation])
def test_every_number_counts(small, model, change):
    other = e5v_st.load(small, device="cpu")
    assert fingerprint(other) == fingerprint(model)
    change(other)
    assert fingerprint(other) != fingerprint(model)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"vision_feature_layer": -1}),
        ("config.json", {"image_grid_pinpoints": [[56, 112], [112, 56]]}),
        ("preprocessor_config.json", {"image_mean": [0, 0, 0]}),
    ],
)
def test_every_setting_counts(copy, model, file, change):
    settings = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps({**settings, **change}))
    assert fingerprint(e5v_st.load(copy, device="cpu")) != fingerprint(model)


def test_the_tokenizer_counts(copy, model):
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert fingerprint(e5v_st.load(copy, device="cpu")) != fingerprint(model)


def test_the_same_model_elsewhere_has_the_same_digest(copy, model):
    assert fingerprint(e5v_st.load(copy, device="cpu")) == fingerprint(model)


def test_exif_rotation_counts(model, monkeypatch):
    before = fingerprint(model)
    monkeypatch.setenv("E5V_EXIF", "1")
    assert fingerprint(model) != before


def test_the_strength_of_an_adapter_counts(small, goldens, tmp_path):
    adapter = shutil.copytree(goldens / "legacy_adapter", tmp_path / "adapter")
    before = fingerprint(e5v_st.load(small, adapter=adapter, device="cpu"))
    assert fingerprint(e5v_st.load(small, adapter=adapter, device="cpu")) == before
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 32}))
    assert fingerprint(e5v_st.load(small, adapter=adapter, device="cpu")) != before


def test_every_row_of_an_embedding_counts_but_the_image_tokens(tmp_path):
    """In most families, the image token stands in the midst of the vocabulary."""
    base = families.save("smolvlm-instruct", tmp_path)
    model = e5v_st.load(base, device="cpu")
    before, image = fingerprint(model), model[0].config.image_token_id
    weight = model[0].model.get_input_embeddings().weight
    assert image + 1 < len(weight)
    weight.data[image] += 1
    assert fingerprint(model) == before
    weight.data[image + 1] += 1
    assert fingerprint(model) != before
