"""The literal command lines, offline: a published-format checkpoint and data sets from a local hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mteb
import numpy as np
import pytest

from e5v_st.mteb_tasks.models import REVISION
from e5v_st.mteb_tasks.sources import REVISIONS
from e5v_st.mteb_tasks.sts import SICKR_REVISION

pytestmark = pytest.mark.slow
SCRIPTS = Path(sys.executable).parent


def call(*words, cwd, **environment):
    """Runs a command; returns what it printed, and shows all of it where it fails."""
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "E5V_STORE": str(cwd / "store"), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def scores_of(folder):
    """Main scores by task and subset, as mteb reads them."""
    found = {}
    for model in mteb.ResultCache(folder).load_results(validate_and_filter=False).model_results:
        for task in model.task_results:
            for split in task.scores.values():
                found.update({(task.task_name, scores["hf_subset"]): scores["main_score"] for scores in split})
    return found


@pytest.fixture(scope="module")
def run_from_hub(published, small, tmp_path_factory):
    """``mteb run -m e5v -b E5V`` with everything from the hub; returns its folder and what the hub was asked."""
    from tests.hub_server import HubServer

    folder = tmp_path_factory.mktemp("run")
    with HubServer() as hub:
        hub.add_repo("royokong/e5-v", small)
        commit = hub.commits("royokong/e5-v")[0].sha
        hub.repos["model", "royokong/e5-v"].branches[REVISION] = commit
        (folder / "commit").write_text(commit)
        for place in published.glob("*/*"):
            repo = place.relative_to(published).as_posix()
            sha = hub.add_repo(repo, place, repo_type="dataset")
            branches = hub.repos["dataset", repo].branches
            branches.update(dict.fromkeys({REVISIONS.get(repo, "main"), SICKR_REVISION}, sha))
            branches.update({task.metadata.revision: sha for task in mteb.get_benchmark("E5V").tasks})
        log = call(SCRIPTS / "mteb", "run", "-m", "e5v", "-b", "E5V", cwd=folder, **hub.env(folder / "home"))
        assert hub.strays == []
    return folder, log


def test_the_benchmark_runs_from_published_ids(run_from_hub):
    folder, _ = run_from_hub
    found = scores_of(folder / "results")
    assert {task for task, _ in found} == {task.metadata.name for task in mteb.get_benchmark("E5V").tasks}
    assert all(np.isfinite(score) for (task, _), score in found.items() if task != "E5VCIRRTest")
    assert {subset for task, subset in found if task == "E5VFashionIQRetrieval"} == {"dress", "shirt", "toptee"}
    submission = json.loads(next((folder / "results").rglob("cirr_recall.json")).read_text())
    assert submission["version"] == "rc2"


def test_mteb_loads_the_results_by_the_models_name(run_from_hub, monkeypatch):
    folder, _ = run_from_hub
    monkeypatch.setenv("MTEB_CACHE", str(folder / "results"))
    with pytest.warns(DeprecationWarning, match="load_results"):
        loaded = mteb.load_results(download_latest=False, models=["royokong/e5-v"], tasks=["E5VCIRRRetrieval"])
    assert loaded.model_results[0].task_results[0].task_name == "E5VCIRRRetrieval"
    # The commit that was loaded; on the real hub, it is REVISION itself
    assert loaded.model_results[0].model_revision == (folder / "commit").read_text()


def test_tasks_share_what_was_encoded(run_from_hub):
    """T2I, I2T and I2I read the same images, and Flickr has COCO's data here: 8 images, 40 captions, 40 cards."""
    folder, _ = run_from_hub
    encoded = {}
    for file in (folder / "results").rglob("E5V*.json"):
        content = json.loads(file.read_text())
        passes = [p for split in content["scores"].values() for s in split for p in s["details"]["encoding"]]
        encoded[content["task_name"]] = sum(own["encoded"] for own in passes)
    photographs = [task for task in encoded if "COCO" in task or "Flickr" in task]
    assert sum(encoded[task] for task in photographs) == 8 + 40 + 40
    assert encoded["E5VCIRRRetrieval"] == 8 + 24


def test_the_report_sets_the_results_beside_the_paper(run_from_hub, published):
    folder, _ = run_from_hub
    printed = call(SCRIPTS / "e5v", "report", "results", cwd=folder, E5V_DATA=str(published))
    assert "79.50" in printed
    page = (folder / "results" / "report.html").read_text()
    assert "data:image/jpeg;base64," in page
    assert "<svg" in page


def test_two_processes_give_the_scores_of_one(run_from_hub, published, small, tmp_path):
    folder, _ = run_from_hub
    tasks = ["E5VFashionIQRetrieval", "E5VCIRRRetrieval", "E5VFlickr30kI2TRetrieval", "E5VSTS13"]
    call(
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m"),
        *("mteb", "run", "-m", "e5v", "-t", *tasks),
        cwd=tmp_path,
        E5V_DATA=str(published),
        E5V_MODEL=str(small),
        E5V_STORE="0",
    )
    found, expected = scores_of(tmp_path / "results"), scores_of(folder / "results")
    assert {task for task, _ in found} == set(tasks)
    for key, score in found.items():
        assert score == pytest.approx(expected[key], abs=1e-5), key


def test_a_model_of_ones_own_with_every_knob(small, goldens, published, tmp_path):
    words = ["eval", small, "--adapter", goldens / "legacy_adapter", "--image-layout", "paper", "--dtype", "bfloat16"]
    words += ["--max-batch-tokens", 2048, "--device", "cpu", "--no-store", "--data", published, "--output", "out"]
    printed = call(SCRIPTS / "e5v", *words, "-t", "E5VFlickr30kT2IRetrieval", cwd=tmp_path)
    name = "local/small (adapter=legacy_adapter, image_layout=paper, dtype=bfloat16)"
    assert name in printed
    assert "79.50" in printed
    assert not (tmp_path / "store").exists()


def test_mock_run_passes_for_texts_and_images(small, tmp_path):
    printed = call(SCRIPTS / "mteb", "mock-run", "-m", "e5v", cwd=tmp_path, E5V_MODEL=str(small))
    assert "passed all expected checks" in printed
    report = (tmp_path / "mteb_mock_run_results.md").read_text()
    assert "✗" not in report
    lines = [line for line in report.splitlines() if " image" in line or " text" in line]
    assert len(lines) > 40
    assert not [line for line in lines if "skipped" in line]


def test_wrong_names_are_told_apart(tmp_path):
    done = subprocess.run(
        [SCRIPTS / "e5v", "eval", "no/such/model"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "no/such/model" in done.stderr
