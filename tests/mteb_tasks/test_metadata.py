"""What mteb's own tests ask of the metadata of tasks and models."""

from __future__ import annotations

import re

import mteb
import pytest

from mteb_tasks import emoji
from mteb_tasks.benchmarks import TASKS
from mteb_tasks.models import digest, make_meta, make_metas


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.metadata.name)
class TestTask:
    def test_every_field_is_filled_and_valid(self, task):
        task.metadata._validate_metadata()
        assert task.metadata.is_filled()
        assert not task.metadata.dataset.get("trust_remote_code", False)

    def test_there_are_descriptive_statistics_of_every_split(self, task):
        assert set(task.metadata.descriptive_stats) == set(task.metadata.eval_splits)
        assert task.metadata.n_samples is not None

    def test_the_citation_is_formatted_as_mteb_wants_it(self, task):
        for citation in re.findall(r"@\w+\{.*?\n\}", task.metadata.bibtex_citation or "", re.DOTALL):
            lines = citation.splitlines()
            fields = [line.split(" = ")[0].strip() for line in lines[1:-1] if re.match(r"  \w+ = ", line)]
            assert fields == sorted(fields)

    def test_its_modalities_are_those_of_its_category(self, task):
        letters = {"text": "t", "image": "i"}
        assert {letters[m] for m in task.metadata.modalities} == set(task.metadata.category.replace("2", ""))

    def test_the_class_can_be_named(self, task):
        assert task.__doc__
        assert task.__module__.startswith("mteb_tasks.")


@pytest.mark.parametrize("task", emoji.TASKS, ids=lambda task: task.metadata.name)
def test_statistics_of_the_bundled_data_are_those_of_the_files(task, tmp_path, monkeypatch):
    shipped = task.metadata.descriptive_stats
    monkeypatch.setattr("mteb_tasks.metadata.STATISTICS", tmp_path)
    found = task().calculate_descriptive_statistics()
    assert (tmp_path / f"{task.metadata.name}.json").is_file()
    assert found["test"]["num_samples"] == shipped["test"]["num_samples"]


@pytest.mark.parametrize("meta", make_metas().values(), ids=lambda meta: meta.name)
def test_models_are_described(meta):
    assert meta.name
    assert meta.revision
    assert meta.modalities == ["image", "text"]
    assert meta.to_dict()["loader"] == "load_e5v"
    meta._check_requirements()  # torchvision among them, if mteb had its way


def test_a_change_of_weights_changes_the_revision(small, tmp_path):
    import shutil

    shutil.copytree(small, tmp_path / "small")
    before = digest([tmp_path / "small"])
    assert before == digest([small])
    weights = bytearray((small / "model.safetensors").read_bytes())
    for place in (-1, len(weights) // 2):
        changed = weights[:]
        changed[place] ^= 1
        (tmp_path / "small" / "model.safetensors").write_bytes(changed)
        assert digest([tmp_path / "small"]) != before
    (tmp_path / "small" / "model.safetensors").write_bytes(weights)
    assert digest([tmp_path / "small"]) == before


def test_settings_that_change_embeddings_are_part_of_the_name(small):
    meta = make_meta(str(small), image_layout="paper", dtype="bfloat16", store=False, adapter=None)
    assert meta.name == "local/small (image_layout=paper, dtype=bfloat16)"
    assert mteb.ResultCache().get_task_result_path("E5VSTS12", meta).name == "E5VSTS12.json"
