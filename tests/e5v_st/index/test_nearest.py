from __future__ import annotations

import numpy as np

from e5v_st.index.nearest import nearest


def test_ranks_are_by_cosine_whatever_length_the_embeddings_have():
    dice = np.random.default_rng(0)
    rows = (dice.normal(size=(50, 8)) * dice.uniform(0.1, 9, (50, 1))).astype(np.float32)
    query = (7 * dice.normal(size=8)).astype(np.float32)
    cosines = rows @ query / np.linalg.norm(rows, axis=1) / np.linalg.norm(query)
    found = nearest(query, [(np.arange(50), [str(row) for row in range(50)], rows)], 5)
    assert [hit.row for hit in found] == np.argsort(-cosines)[:5].tolist()
    np.testing.assert_allclose([hit.score for hit in found], np.sort(cosines)[::-1][:5], atol=1e-6)
