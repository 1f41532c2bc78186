"""Every type of task of MIEB, of ViDoRe and of text benchmarks, through ``mteb run`` from a hub, beside plain NumPy."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mteb
import numpy as np
import pytest
import torch
from PIL import Image
from published_tasks import cases, write

import e5v_st
from e5v_st.cli import main
from e5v_st.mteb_tasks.comparing import categories
from e5v_st.mteb_tasks.contents import edit_sts_sentence
from e5v_st.mteb_tasks.plan import groups_of
from e5v_st.mteb_tasks.public_scores import CATEGORIES, E5V, public_tasks
from e5v_st.mteb_tasks.runs import collect
from e5v_st.mteb_tasks.store import Store

NIGHTLY = os.environ.get("E5V_NIGHTLY") == "1"
NAMES = [name for name, case in cases().items() if case.ci or NIGHTLY]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session", params=["e5v-tiny", *(["an adapter", "qwen3_vl"] if NIGHTLY else [])])
def measured(request, checkpoint, small, tmp_path_factory):
    """The small model; nightly also a random adapter, and a random model of another family."""
    if request.param == "e5v-tiny":
        return request.param
    if request.param == "an adapter":
        return str(save_adapter(small, tmp_path_factory.mktemp("adapter") / "random"))
    return str(checkpoint(request.param))


def save_adapter(base, folder):
    """Saves a random LoRA on a model in float32, as what is measured is compared to four digits."""
    from e5v_st.training.model import load_for_training

    model = load_for_training(str(base), bits=32, lora_r=4, text_only=False)
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.05, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def results(tmp_path_factory, measured):
    """The results of one ``mteb run`` over all cases, by task and subset."""
    from hub_server import HubServer

    folder = tmp_path_factory.mktemp("mieb")
    with HubServer() as hub:
        for name in NAMES:
            repo, revision = cases()[name].repo
            sha = hub.add_repo(repo, write(folder / "data" / name, cases()[name].tables), repo_type="dataset")
            hub.repos["dataset", repo].branches[revision] = sha
        command = [Path(sys.executable).parent / "mteb", "run", "-m", "e5v", "-t", *NAMES]
        ours = {"E5V_MODEL": measured, "E5V_STORE": str(folder / "store"), "OMP_NUM_THREADS": "1"}
        environment = {**os.environ, **hub.env(folder / "home"), **ours}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        assert hub.strays == []
    found = {}
    for file in (folder / "results").rglob("*.json"):
        content = json.loads(file.read_text())
        for rows in content.get("scores", {}).values():
            found.update({(content["task_name"], row["hf_subset"]): row for row in rows})
    return folder, found


@pytest.fixture(scope="session")
def embed(measured):
    """Embeds items with the model alone, one at a time; an item that comes again is not embedded again."""
    model = e5v_st.load(measured, device="cpu")
    known = {}

    def embed_all(items):
        keys = []
        for item in items:
            image = item.get("image")
            key = (item.get("text"), item.get("sts"), image)
            keys.append(key)
            if key not in known:
                if "sts" in item:
                    known[key] = model.encode([{"text": edit_sts_sentence(item["sts"])}], prompt_name="sts")[0]
                else:
                    opened = {} if image is None else {"image": Image.open(io.BytesIO(image))}
                    known[key] = model.encode([{**item, **opened}])[0]
        return np.stack([known[key] for key in keys])

    return embed_all


@pytest.mark.parametrize("name", NAMES)
def test_a_task_has_the_score_that_plain_numpy_gives_for_its_embeddings(results, embed, name):
    _, found = results
    expected = cases()[name].expect(embed)
    own = {subset: row["main_score"] for (task, subset), row in found.items() if task == name}
    assert own == {subset: pytest.approx(score, abs=1e-4) for subset, score in expected.items()}


def test_the_report_shows_the_categories_of_the_run_beside_public_numbers(results, capsys):
    folder, _ = results
    assert main(["report", str(folder / "results"), "--no-pictures"]) == 0
    printed = capsys.readouterr().out
    (own,) = collect([folder / "results"])
    assert printed.startswith(f"✗ {own.name} does not reproduce E5-V")
    done = {line.label for line in categories(own, [E5V]) if line.done}
    types = {mteb.get_task(name).metadata.type for name in NAMES if name in public_tasks()}
    assert done == {CATEGORIES[kind] for kind in types}
    for label in done:
        assert re.search(rf"^{label} +\d+ of \d+ +-?\d+\.\d\d +\d+\.\d\d +[+-]\d+\.\d\d", printed, re.MULTILINE), label


def test_passes_that_a_run_notes_are_those_that_a_plan_expects(results):
    """So that a plan knows what is done."""
    folder, _ = results
    (meta,) = (json.loads(file.read_text()) for file in (folder / "results").rglob("model_meta.json"))
    noted = set(Store(folder / "store").passes(f"{meta['name']}@{meta['revision']}"))
    expected = {group.label for name in NAMES for group in groups_of(mteb.get_task(name))}
    assert noted == expected


def test_there_is_a_case_for_every_type_of_task_of_mieb():
    types = {mteb.get_task(name).metadata.type for name, case in cases().items() if case.ci}
    assert {task.type for task in public_tasks().values()} - types == {
        "VisualSTS(multi)"
    }  # nightly: a task of 10 languages
    assert {mteb.get_task(name).metadata.type for name in cases()} >= {task.type for task in public_tasks().values()}


def test_a_case_of_every_loader_of_mieb_is_there():
    """A loader is the module of a task with its own way to load or change its data; others read a schema as it is."""

    def own_way(task):
        return bool({"load_data", "dataset_transform", "_evaluate_subset"} & set(type(task).__dict__))

    def loader(task):
        return type(task).__module__ if own_way(task) else ""

    tasks = [part for task in mteb.get_benchmark("MIEB(Multilingual)").tasks for part in getattr(task, "tasks", [task])]
    covered = {loader(mteb.get_task(name)) for name in cases()}
    assert {loader(task) for task in tasks} - covered == set()
