from __future__ import annotations

import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Pooling

import e5v_st
from e5v_st.training.model import AdapterCheckpoint, base_id, load_for_training


@pytest.fixture(scope="module")
def trainable(small):
    return load_for_training(str(small), bits=32, lora_r=4, lora_dropout=0.0)


def test_the_vision_tower_is_neither_there_nor_trained(trainable):
    assert not [name for name, _ in trainable.named_parameters() if "vision" in name or "projector" in name]
    trained = {name for name, weight in trainable.named_parameters() if weight.requires_grad}
    assert trained
    assert all("language_model.layers" in name and "lora_" in name for name in trained)
    assert all(weight.dtype == torch.float32 for weight in trainable.parameters() if weight.requires_grad)


def test_with_the_vision_tower_the_adapter_is_on_the_language_model_alone(small):
    model = load_for_training(str(small), bits=32, text_only=False)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert any("vision_tower" in name for name, _ in model.named_parameters())
    assert all("language_model" in name for name in trained)


def test_packed_texts_have_the_states_that_each_has_alone(trainable, small):
    texts = [
        "A dog.",
        "Two men play chess in a park while it rains.",
        "",
        "A cat standing in the snow." * 9,
        "a",
        "b c",
    ]
    whole = e5v_st.load(small, device="cpu").encode(texts, batch_size=1, convert_to_tensor=True)
    trainable.train()
    packed = trainable(trainable.preprocess(texts))["sentence_embedding"]
    assert (packed - whole).abs().max() < 1e-5


def test_an_untrained_adapter_changes_nothing(trainable, small):
    texts = ["A dog.", "Two men play chess."]
    plain = e5v_st.load(small, device="cpu").encode(texts)
    assert abs(trainable.eval().encode(texts) - plain).max() < 1e-6


def test_a_base_in_16_bits_has_its_adapter_in_32(small):
    model = load_for_training(str(small), bits=16)
    assert {str(weight.dtype) for weight in model.parameters() if weight.requires_grad} == {"torch.float32"}
    assert model[0].model.language_model.embed_tokens.weight.dtype == torch.bfloat16


def test_a_checkpoint_of_another_rank_is_refused(trainable, small, tmp_path):
    other = load_for_training(str(small), bits=32, lora_r=4)
    other[0].model.save_pretrained(tmp_path)
    weights = AdapterCheckpoint(tmp_path).state_dict()
    trainable.load_state_dict(weights)
    weights.popitem()
    with pytest.raises(RuntimeError, match="not the one that is trained"):
        trainable.load_state_dict(weights)


def test_an_adapter_is_no_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="merge it"):
        load_for_training(str(tmp_path))


def test_five_bits_are_refused(small):
    with pytest.raises(ValueError, match="want 4, 8, 16 or 32"):
        load_for_training(str(small), bits=5)


def test_a_path_into_the_hubs_cache_is_recorded_as_id_and_commit(tmp_path):
    commit = "0c1f22679417b3ae925d779442221c40cd1861ab"
    snapshot = tmp_path / "hub" / "models--royokong--e5-v" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    assert base_id(str(snapshot), None) == ("royokong/e5-v", commit)
    assert base_id("royokong/e5-v", "main") == ("royokong/e5-v", "main")
    assert base_id(str(tmp_path), None) == (str(tmp_path), None)


def test_a_checkpoint_of_another_scale_is_refused(trainable, small, tmp_path):
    other = load_for_training(str(small), bits=32, lora_r=4, lora_alpha=64)
    other[0].model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="has lora_alpha=64, the one that is trained 16: give --lora_alpha"):
        trainable.load_state_dict(AdapterCheckpoint(tmp_path).state_dict())


def test_a_base_whose_own_modules_a_run_would_not_keep_is_refused(small, tmp_path):
    model = e5v_st.load(small, device="cpu")
    model.save(str(tmp_path / "usual"))
    model[1] = Pooling(model.get_embedding_dimension(), pooling_mode="mean")
    model.save(str(tmp_path / "means"))
    load_for_training(str(tmp_path / "usual"), bits=32, lora_r=2)
    with pytest.raises(ValueError, match="which training would not keep"):
        load_for_training(str(tmp_path / "means"), bits=32, lora_r=2)
