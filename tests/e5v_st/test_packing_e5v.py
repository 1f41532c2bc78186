from __future__ import annotations

import numpy as np

from e5v_st.packing_e5v import pack


def test_no_text_is_split_and_no_row_is_wider_than_it_must_be():
    lengths = [3, 9, 4, 4, 12, 1]
    rows = pack(lengths, 10)
    assert sorted(index for row in rows for index in row) == list(range(6))
    assert [sum(lengths[index] for index in row) for row in rows] == [12, 10, 8, 3]


def test_texts_in_one_row_have_the_embeddings_that_each_has_alone(model, monkeypatch):
    texts = [{"text": text} for text in ("A dog.", "", "A cat standing in the snow. " * 5, "a", "b c")]
    alone = np.stack([model.encode([text])[0] for text in texts])
    # What a model with a flash kernel does; without one, transformers keeps the texts apart by a mask
    monkeypatch.setattr("e5v_st.modeling_e5v.can_share", lambda config: False)
    monkeypatch.setattr("e5v_st.packing_e5v.uses_flash", lambda config: True)
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
