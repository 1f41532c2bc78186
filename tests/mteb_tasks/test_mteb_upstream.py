"""What is written into mteb: short names, results that are found by them, and records of what was used."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import mteb
import pytest


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of ``e5v-tiny`` as mteb writes them, with the first 64 dimensions and with all."""
    folder = tmp_path_factory.mktemp("results")
    for size in (64, None):
        model = mteb.get_model("e5v-tiny", device="cpu", embed_dim=size, store=False)
        task = mteb.get_task("E5VEmojiSTS")
        mteb.evaluate(model, task, cache=mteb.ResultCache(folder), encode_kwargs={"batch_size": 8})
    return folder


def names(loaded):
    return [(own.model_name, [task.task_name for task in own.task_results]) for own in loaded.model_results]


EXPECTED = [("e5v/e5v-tiny", ["E5VEmojiSTS"])]


def test_results_are_found_by_the_short_name(results, monkeypatch):
    cache = mteb.ResultCache(results)
    assert names(cache.load_results(models=["e5v-tiny"])) == EXPECTED
    assert names(cache.load_results(["e5v-tiny"], ["E5VEmojiSTS"])) == EXPECTED
    assert names(cache.load_results(models=["e5v/e5v-tiny"])) == EXPECTED
    assert names(cache.load_results(models=[mteb.get_model_meta("e5v/e5v-tiny")])) == EXPECTED
    assert names(cache.load_results(models=["e5v"])) == []
    assert len(names(cache.load_results())) == 2
    assert cache.get_task_names(models=["e5v-tiny"]) == ["E5VEmojiSTS"]
    monkeypatch.setenv("MTEB_CACHE", str(results))
    with pytest.warns(DeprecationWarning, match="load_results"):
        assert names(mteb.load_results(download_latest=False, models=["e5v-tiny"])) == EXPECTED


def test_results_say_what_was_used_and_where_nothing_lies(results):
    (settings,) = results.rglob("e5v__e5v-tiny/*/run_settings.jsonl")
    assert [json.loads(line)["encode_kwargs"] for line in settings.read_text().splitlines()] == [{}]
    (scores,) = results.rglob("e5v__e5v-tiny/*/E5VEmojiSTS.json")
    (row,) = json.loads(scores.read_text())["scores"]["test"]
    assert {own["prompt"] for own in row["details"]["encoding"]} == {"sts"}
    (meta,) = results.rglob("e5v__e5v-tiny/*/model_meta.json")
    written = json.loads(meta.read_text())
    assert written["loader_kwargs"] == {"path": "e5v-tiny", "device": "cpu"}
    assert written["n_embedding_parameters"] == 4000 * 192


def test_fewer_dimensions_are_another_model_with_other_scores(results):
    found = {}
    for own in mteb.ResultCache(results).load_results().model_results:
        (task,) = own.task_results
        found[own.model_name] = task.scores["test"][0]["main_score"]
    assert set(found) == {"e5v/e5v-tiny", "e5v/e5v-tiny (embed_dim=64)"}
    assert len(set(found.values())) == 2


def test_other_models_keep_their_record(tmp_path):
    model = mteb.get_model("mteb/baseline-random-encoder")
    task = mteb.get_task("E5VEmojiSTS")
    mteb.evaluate(model, task, cache=mteb.ResultCache(tmp_path), encode_kwargs={"batch_size": 8})
    (settings,) = tmp_path.rglob("run_settings.jsonl")
    assert json.loads(settings.read_text())["encode_kwargs"] == {"batch_size": 8}


def python(code):
    """What a process says that turns deprecations into errors."""
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", code]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip().splitlines()[-1]


def test_a_short_name_is_not_said_to_be_renamed_and_names_that_mteb_renamed_are():
    code = "import mteb; print(mteb.get_model_meta({!r}).name)"
    assert python(code.format("e5v")) == "royokong/e5-v"
    assert "The model 'bm25s' has been renamed to 'mteb/baseline-bm25s'" in python(code.format("bm25s"))
