"""A family's own processor without its part for videos."""

from __future__ import annotations

import pickle

import families
import pytest

import e5v_st


@pytest.mark.parametrize("name", ["qwen3_vl", "smolvlm", "gemma4"])
def test_a_model_whose_processor_reads_videos_elsewhere_is_saved_and_pickled(tmp_path, name):
    model = e5v_st.load(families.save(name, tmp_path / "plain"), device="cpu")
    expected = model.encode(["a dog"])
    model.save(str(tmp_path / "saved"))
    assert "video_processor" not in (tmp_path / "saved/processor_config.json").read_text()
    for found in (e5v_st.load(tmp_path / "saved", device="cpu"), pickle.loads(pickle.dumps(model))):
        assert abs(found.encode(["a dog"]) - expected).max() <= 1e-6
