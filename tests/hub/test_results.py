"""Scores on a card are those of one model, as it is now, and numbers."""

from __future__ import annotations

import json
import re

import huggingface_hub as hf
import mteb
import pytest
from mteb.results import TaskResult

import e5v_st.hub.push
from e5v_st.hub.card import Card
from e5v_st.hub.push import stage
from e5v_st.mteb_tasks.models import make_meta

NAME = "me/e5v-nli-lora"


def write(folder, name, revision, scores, **meta):
    """Writes result files as mteb lays them out: task -> subset -> score."""
    place = folder / name.replace("/", "__") / revision
    place.mkdir(parents=True, exist_ok=True)
    (place / "model_meta.json").write_text(json.dumps({"name": name, "revision": revision, **meta}))
    for task, subsets in scores.items():
        rows = [{"main_score": score, "hf_subset": subset} for subset, score in subsets.items()]
        (place / f"{task}.json").write_text(json.dumps({"task_name": task, "scores": {"test": rows}}))


def scores_on_card(run, results, tmp_path, **known):
    staged = tmp_path / "staged"
    stage(run, staged, Card(repo_id=NAME, results=results, **known), "royokong/e5-v")
    index = hf.ModelCard.load(staged / "README.md").data.eval_results
    return {(own.dataset_type, own.dataset_config): own.metric_value for own in index}


@pytest.fixture
def several(tmp_path):
    results = tmp_path / "results"
    write(results, NAME, "abc123", {"STS12": {"default": 0.25}})
    write(results, NAME, "abd456", {"STS12": {"default": 0.5}})
    write(results, "royokong/e5-v", "0c1f", {"STS12": {"default": 0.75}})
    return results


def test_results_of_several_models_or_revisions_are_refused_with_their_names(several, run, tmp_path):
    known = f"{NAME}@abc123, {NAME}@abd456, royokong/e5-v@0c1f"
    with pytest.raises(ValueError, match=re.escape(f"results of {known}: say which with --results-model NAME or")):
        scores_on_card(run, several, tmp_path)


@pytest.mark.parametrize(("wanted", "score"), [(f"{NAME}@abd456", 0.5), (f"{NAME}@abc", 0.25), ("royokong/e5-v", 0.75)])
def test_one_model_and_revision_may_be_named(several, run, tmp_path, wanted, score):
    assert scores_on_card(run, several, tmp_path, results_model=wanted) == {("STS12", "default"): score}
    label = "`royokong/e5-v`, revision `0c1f`" if "royokong" in wanted else f"`{NAME}`, revision `ab"
    assert f"result files for {label}" in (tmp_path / "staged" / "README.md").read_text()


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (NAME, f"results of {NAME}@abc123, {NAME}@abd456: say which"),
        (f"{NAME}@ab", f"results of {NAME}@abc123, {NAME}@abd456: say which"),
        ("me/e5v", f"no results of me/e5v, but of {NAME}@abc123"),
        (f"{NAME}@fff", f"no results of {NAME}@fff, but of {NAME}@abc123"),
    ],
)
def test_a_name_that_fits_several_or_none_is_refused(several, run, tmp_path, wanted, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        scores_on_card(run, several, tmp_path, results_model=wanted)


def test_the_results_of_another_model_alone_are_refused(run, tmp_path):
    write(tmp_path / "results", "royokong/e5-v", "0c1f", {"STS12": {"default": 0.75}})
    said = "those of royokong/e5-v@0c1f, not of local/run: if they are this model's, say which with --results-model"
    with pytest.raises(ValueError, match=re.escape(said)):
        scores_on_card(run, tmp_path / "results", tmp_path)


def test_results_of_a_folder_are_taken_while_its_weights_are_the_same(run, tmp_path):
    results = tmp_path / "results"
    scores = {"main_score": 0.5, "hf_subset": "default", "languages": ["eng-Latn"]}
    result = TaskResult.from_task_results(mteb.get_task("E5VSTS12"), {"test": {"default": scores}}, 1.0)
    mteb.ResultCache(results).save_to_cache(result, make_meta(str(run)))
    assert scores_on_card(run, results, tmp_path) == {("E5VSTS12", "default"): 0.5}

    weights = bytearray((run / "adapter_model.safetensors").read_bytes())
    weights[-100:] = bytes(100)
    (run / "adapter_model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"has changed since and is .*: measure it again"):
        scores_on_card(run, results, tmp_path / "again")


def test_scores_that_are_no_numbers_are_left_out(run, tmp_path):
    odd = {"one": float("nan"), "two": float("inf"), "three": -float("inf"), "four": 0.5}
    write(tmp_path / "results", NAME, "1", {"E5VCIRRTest": {"default": float("nan")}, "STS12": odd})
    assert scores_on_card(run, tmp_path / "results", tmp_path) == {("STS12", "four"): 0.5}
    card = hf.ModelCard.load(tmp_path / "staged" / "README.md")
    json.dumps(card.data.to_dict(), allow_nan=False)  # what the hub makes of a model index
    assert not re.search(r"\b(nan|inf)\b", str(card), re.IGNORECASE)


def test_results_without_any_number_are_said(run, tmp_path):
    write(tmp_path / "results", NAME, "1", {"E5VCIRRTest": {"default": float("nan")}})
    with pytest.raises(ValueError, match=f"no score of {NAME}@1 that is a number"):
        scores_on_card(run, tmp_path / "results", tmp_path)


def test_an_experiment_is_another_model(run, tmp_path):
    write(tmp_path / "results", NAME, "1", {"STS12": {"default": 0.5}})
    experiment = tmp_path / "results" / "experiments"
    write(experiment, NAME, "1", {"STS12": {"default": 0.25}}, experiment_kwargs={"output_dtypes": "int8"})
    with pytest.raises(ValueError, match=re.escape(f"{NAME} (output_dtypes=int8)@1, {NAME}@1: say which")):
        scores_on_card(run, tmp_path / "results", tmp_path)


def test_two_scores_of_one_task_are_refused_unless_they_are_the_same(run, tmp_path):
    for copy in ("a", "b"):
        write(tmp_path / "results" / copy, NAME, "1", {"STS12": {"default": 0.5}})
    assert scores_on_card(run, tmp_path / "results", tmp_path) == {("STS12", "default"): 0.5}
    write(tmp_path / "results" / "b", NAME, "1", {"STS12": {"default": 0.25}})
    with pytest.raises(ValueError, match=r"STS12\.json has another score of STS12"):
        scores_on_card(run, tmp_path / "results", tmp_path / "again")


NO_METAS = ["", "[]", "{}", '{"name": "a/b"}', '{"name": "a/b", "revision": "1", "experiment_kwargs": 3}']


@pytest.mark.parametrize("meta", [None, *NO_METAS])
def test_results_that_do_not_say_whose_they_are_are_refused(run, tmp_path, meta):
    write(tmp_path / "results", NAME, "1", {"STS12": {"default": 0.5}})
    file = next((tmp_path / "results").rglob("model_meta.json"))
    file.unlink()
    if meta is not None:
        file.write_text(meta)
    with pytest.raises(ValueError, match=r"model_meta\.json"):
        scores_on_card(run, tmp_path / "results", tmp_path)


def test_the_command_line_takes_the_name(several, run, monkeypatch, capsys):
    from e5v_st.hub.__main__ import main

    monkeypatch.setattr(e5v_st.hub.push, "check_reload", lambda folder, staged: None)
    words = ["push", str(run), "--repo", NAME, "--base", "royokong/e5-v", "--dry-run"]
    assert main([*words, "--results", str(several)]) == 1
    assert "--results-model NAME or NAME@REVISION" in capsys.readouterr().err
    assert main([*words, "--results", str(several), "--results-model", f"{NAME}@abd456"]) == 0
    assert main([*words, "--results-model", NAME]) == 1
    assert "give their folder with --results" in capsys.readouterr().err
