"""What mteb's own tests ask of the metadata of tasks and models."""

from __future__ import annotations

import json
import re

import mteb
import pytest

from e5v_st.mteb_tasks import emoji
from e5v_st.mteb_tasks.benchmarks import TASKS
from e5v_st.mteb_tasks.models import make_meta, make_metas
from e5v_st.mteb_tasks.other_models import FACTS


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
        assert task.__module__.startswith("e5v_st.mteb_tasks.")


@pytest.mark.parametrize("task", emoji.TASKS, ids=lambda task: task.metadata.name)
def test_statistics_of_the_bundled_data_are_those_of_the_files(task, tmp_path, monkeypatch):
    shipped = task.metadata.descriptive_stats
    monkeypatch.setattr("e5v_st.mteb_tasks.metadata.STATISTICS", tmp_path)
    found = task().calculate_descriptive_statistics()
    assert (tmp_path / f"{task.metadata.name}.json").is_file()
    assert found["test"]["num_samples"] == shipped["test"]["num_samples"]


@pytest.mark.parametrize("meta", make_metas().values(), ids=lambda meta: meta.name)
def test_models_are_described(meta):
    assert meta.name
    assert meta.revision
    assert meta.modalities == ["image", "text"]
    assert meta.to_dict()["loader"] == "load_e5v"
    assert None not in (meta.n_parameters, meta.n_embedding_parameters, meta.embed_dim, meta.max_tokens)
    assert meta.memory_usage_mb
    assert meta.n_active_parameters == meta.n_parameters - meta.n_embedding_parameters
    meta._check_requirements()  # torchvision among them, if mteb had its way
    assert meta.adapted_from != meta.name
    meta.get_training_datasets()


@pytest.mark.parametrize("name", ["e5v", "e5v-paper"])
def test_the_published_models_entry_is_complete(name):
    """Licence of the weights (an address, as mteb has no Llama 3 in its list), contact, citation, training."""
    meta = make_metas()[name]
    assert meta.license == "https://www.llama.com/llama3/license/"
    assert meta.contacts == ["kongds"]
    assert meta.training_datasets == set()
    assert meta.citation.strip().startswith("@article{jiang2024e5v")
    missing = [field for field, value in meta.model_dump().items() if value is None]
    assert set(missing) <= {
        *("adapted_from", "superseded_by", "experiment_kwargs", "output_dtypes", "extra_requirements_groups"),
        "n_active_parameters_override",
    }


@pytest.mark.parametrize("name", FACTS)
def test_entries_of_models_of_others_have_what_is_known_of_them(name):
    from e5v_st.model.published_e5v import recipe_of

    assert recipe_of(name)
    meta = make_meta(name)
    assert meta.name == name
    for field, value in FACTS[name].items():
        assert field == "revision" or getattr(meta, field) == value
    assert make_meta(name, adapter="me/lora").citation != meta.citation  # nothing is claimed of what stands on it
    for citation in (meta.citation, make_meta("royokong/e5-v").citation):
        fields = [line.split(" = ")[0].strip() for line in citation.splitlines() if re.match(r"  \w+ = ", line)]
        assert fields == sorted(fields)


def test_what_mteb_knows_of_unite_is_what_is_said_of_it_here():
    from mteb.models.model_implementations.unite_models import unite_base_qwen2vl_2b as own

    facts = FACTS["friedrichor/Unite-Base-Qwen2-VL-2B"]
    same = set(facts) - {"citation"}
    assert {field: getattr(own, field) for field in same} == {field: facts[field] for field in same}


def test_settings_that_change_embeddings_are_part_of_the_name(small):
    meta = make_meta(str(small), image_layout="paper", dtype="bfloat16", store=False, adapter=None)
    assert meta.name == "local/small (image_layout=paper, dtype=bfloat16)"
    assert meta.memory_usage_mb is None  # the files do not say what it takes in another dtype
    assert mteb.ResultCache().get_task_result_path("E5VSTS12", meta).name == "E5VSTS12.json"


def test_the_sizes_of_a_directory_are_those_of_the_model_that_it_holds(small):
    """Where transformers counts no head: E5-V is loaded without it."""
    from transformers import LlavaNextForConditionalGeneration

    model = LlavaNextForConditionalGeneration.from_pretrained(small)
    meta = make_meta(str(small))
    table = model.get_input_embeddings().weight
    assert meta.n_embedding_parameters == table.numel()
    assert meta.embed_dim == table.shape[1] == model.config.text_config.hidden_size
    assert meta.n_parameters == sum(weight.numel() for weight in model.parameters())


def test_what_is_written_beside_results_names_no_directory_of_this_machine(small, tmp_path):
    for path in (str(small), "e5v-tiny"):
        meta = make_meta(path, store=tmp_path / "store", adapter=str(small) if path == "e5v-tiny" else None)
        written = json.dumps(meta.to_dict(), default=str)
        assert "/small" not in written.replace("local/small", "")
        assert str(tmp_path) not in written
    assert make_meta(str(small)).to_dict()["loader_kwargs"] == {"path": "small"}


def test_settings_are_given_to_any_entry_and_unknown_ones_are_refused():
    entry = mteb.get_model_meta("e5v/e5v-tiny")
    assert entry.with_settings(dtype="bfloat16").name == "e5v/e5v-tiny (dtype=bfloat16)"
    assert entry.with_settings(store=False, dtype=None).name == entry.name
    assert entry.with_settings(embed_dim=entry.embed_dim).name == entry.name
    short = entry.with_settings(embed_dim=64)
    assert (short.name, short.embed_dim) == ("e5v/e5v-tiny (embed_dim=64)", 64)
    with pytest.raises(TypeError, match="got the settings colour, want some of path, commit, batch_tokens"):
        mteb.get_model("e5v/e5v-tiny", colour="red")


def test_an_entry_claims_nothing_about_the_training_of_another_model(small):
    assert make_meta(str(small)).training_datasets is None
    assert make_meta("royokong/e5-v", adapter="me/lora").training_datasets is None
    assert make_meta("royokong/e5-v", dtype="float16").training_datasets == set()


def test_an_adapter_that_was_trained_further_has_another_revision(small, tmp_path):
    adapter = tmp_path / "lora"
    adapter.mkdir()
    revisions = set()
    for rank in (4, 8):
        (adapter / "adapter_config.json").write_text(json.dumps({"r": rank}))
        revisions.update(make_meta(base, adapter=str(adapter)).revision for base in (str(small), "royokong/e5-v"))
    assert len(revisions) == 4


def test_a_name_that_is_neither_a_directory_nor_a_hub_id_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="there is no file or folder runs/e5v/lora"):
        make_meta("royokong/e5-v", adapter="runs/e5v/lora")
    monkeypatch.setenv("E5V_MODEL", "./typo")
    with pytest.raises(ValueError, match=r"E5V_MODEL=\./typo: there is no file or folder"):
        make_metas()
