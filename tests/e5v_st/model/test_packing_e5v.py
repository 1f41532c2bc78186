from __future__ import annotations

import numpy as np
import pytest
import torch

from e5v_st.model.packing_e5v import check_positions, pack, packed_last_states


def test_no_text_is_split_and_no_row_is_wider_than_it_must_be():
    lengths = [3, 9, 4, 4, 12, 1]
    rows = pack(lengths, 10)
    assert sorted(index for row in rows for index in row) == list(range(6))
    assert [sum(lengths[index] for index in row) for row in rows] == [12, 10, 8, 3]


def test_texts_in_one_row_have_the_embeddings_that_each_has_alone(model, monkeypatch):
    texts = [{"text": text} for text in ("A dog.", "", "A cat standing in the snow. " * 5, "a", "b c")]
    alone = np.stack([model.encode([text])[0] for text in texts])
    # What a model with a flash kernel does; without one, transformers keeps the texts apart by a mask
    monkeypatch.setattr("e5v_st.model.modeling_e5v.E5VTransformer.shares", lambda self: False)
    monkeypatch.setattr("e5v_st.model.packing_e5v.uses_flash", lambda config: True)
    rows = []
    hook = model[0].model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        together = model.encode(texts, batch_size=8)
    finally:
        hook.remove()
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert rows == [1]


SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 16, "num_attention_heads": 2}


def test_texts_are_not_packed_for_a_model_with_positions_of_several_dimensions():
    from transformers import Qwen2_5_VLTextConfig, Qwen3VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
    config = Qwen2_5_VLTextConfig(**SIZES, num_key_value_heads=1, rope_parameters=rope)
    model = Qwen2_5_VLTextModel(config)
    with pytest.raises(ValueError, match=r"'qwen2_5_vl_text' has positions of several dimensions .*mrope_section"):
        packed_last_states(model, torch.zeros(2, 3, dtype=torch.long), [3, 2])
    model.config = Qwen3VLTextConfig(**SIZES, rope_parameters=rope)
    with pytest.raises(ValueError, match="positions of several dimensions"):
        check_positions(model)


def test_texts_are_not_packed_for_a_model_whose_layers_do_not_go_by_positions(model):
    from transformers import BloomConfig, BloomModel, Qwen3NextConfig

    with pytest.raises(ValueError, match="'bloom' has no position_ids"):
        check_positions(BloomModel(BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=16)))
    other = type("Other", (), {"forward": model[0].model.language_model.forward, "config": Qwen3NextConfig()})()
    with pytest.raises(ValueError, match="layers of the type linear_attention"):
        check_positions(other)
    check_positions(model[0].model.language_model)
