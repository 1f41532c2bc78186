from __future__ import annotations

import pytest

from e5v_st.training import resume
from e5v_st.training.resume import check_space, last_checkpoint


def test_a_checkpoint_that_was_cut_off_is_not_gone_on_from(tmp_path):
    for step in (5, 10, 15, 20, 25):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"global_step": 10}')
    (tmp_path / "checkpoint-15" / "trainer_state.json").write_text('{"global_step": 1')
    (tmp_path / "checkpoint-20" / "trainer_state.json").write_text("")
    assert last_checkpoint(tmp_path).name == "checkpoint-10"


def test_space_is_asked_for_by_weights_and_checkpoints(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 2**26 + 12 * 1000 * 3})
    monkeypatch.setattr(resume.shutil, "disk_usage", lambda path: usage)
    check_space(tmp_path, 1000, 3)
    with pytest.raises(OSError, match="GiB left"):
        check_space(tmp_path, 1000, 4)
