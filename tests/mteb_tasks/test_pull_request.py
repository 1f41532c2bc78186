"""What is attached to pull requests to mteb: an entry that mteb loads, results without what is ours, a table."""

from __future__ import annotations

import json
import os
import sys

import mteb
import pytest
from mteb.models.model_meta import ModelMeta
from test_report import write_run

from e5v_st.cli import main as e5v
from e5v_st.mteb_tasks.models import make_metas
from e5v_st.mteb_tasks.pull_request import main, write_entry


def test_the_entry_is_python_that_makes_the_same_entry(tmp_path, monkeypatch):
    """Loaded as mteb would: as a module of its own, with mteb's class."""
    (tmp_path / "e5_v_entry.py").write_text(write_entry(make_metas()["e5v"]))
    monkeypatch.syspath_prepend(str(tmp_path))
    import e5_v_entry

    try:
        own, ours = e5_v_entry.e5_v, make_metas()["e5v"]
        assert type(own) is ModelMeta
        differing = {"loader", "extra_requirements_groups"}
        assert own.model_dump(exclude=differing) == ours.model_dump(exclude=differing)
        assert own.extra_requirements_groups == ["e5-v"]
        assert own.loader.__module__ == "e5_v_entry"
    finally:
        del sys.modules["e5_v_entry"]


def test_results_are_copied_to_their_place_without_details(tmp_path, capsys):
    details = {"examples": [], "first_hits": [1, 2]}
    tasks = {"DTDZeroShot": {"default": {"accuracy": 0.5, "details": details}}}
    write_run(tmp_path / "in", "e5v/e5v-tiny", **tasks)
    write_run(tmp_path / "in", "me/other", **tasks)
    assert main(["e5v-tiny", str(tmp_path / "in"), str(tmp_path / "out"), "--no-mock-run"]) == 0
    assert "1 tasks" in capsys.readouterr().out
    (file,) = (tmp_path / "out" / "results").rglob("DTDZeroShot.json")
    assert file.relative_to(tmp_path / "out").parts == ("results", "e5v__e5v-tiny", "abc", "DTDZeroShot.json")
    (row,) = json.loads(file.read_text())["scores"]["test"]
    assert row == {"hf_subset": "default", "main_score": 0.0, "accuracy": 0.5}
    assert (file.parent / "model_meta.json").is_file()


def test_without_results_nothing_is_written(tmp_path):
    with pytest.raises(SystemExit, match="has no results of royokong/e5-v"):
        main(["e5v", str(tmp_path), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("E5V_NIGHTLY") != "1", reason="test_end_to_end runs mteb mock-run already")
def test_the_results_of_a_run_and_the_table_of_mock_tasks(tmp_path):
    words = ["eval", "e5v-tiny", "-t", "E5VEmojiSTS", "--device", "cpu", "--no-store", "--output", str(tmp_path / "in")]
    assert e5v(words) == 0
    assert main(["e5v-tiny", str(tmp_path / "in"), str(tmp_path / "out"), "--device", "cpu"]) == 0
    table = (tmp_path / "out" / "mteb_mock_run_results.md").read_text()
    assert "\u2717" not in table
    cache = mteb.ResultCache(tmp_path / "out")
    (found,) = cache.load_results(models=["e5v-tiny"]).model_results
    assert [result.task_name for result in found.task_results] == ["E5VEmojiSTS"]
