from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path

import huggingface_hub as hf
import pytest
import yaml

import e5v_st.hub.push
from e5v_st.hub.card import Card, write_card
from e5v_st.hub.push import stage
from e5v_st.model import modeling_e5v

GOLDEN = Path(__file__).parent / "data" / "adapter_card.md"
RECIPE = {
    "data": "/home/me/nli.csv",
    "note": "a | b",
    "batch size": 768,
    "learning rate": 0.0004,
    "notes": "two\nlines",
}
STS = {
    "task_name": "STS12",
    "dataset_revision": "a0d554a64d88156834ff5ae9920b964011b16384",
    "mteb_version": "2.26.24",
    "scores": {
        "test": [{"main_score": 0.7512, "cosine_spearman": 0.7512, "hf_subset": "default", "languages": ["eng"]}]
    },
}
FASHION = {
    "task_name": "E5VFashionIQ",
    "dataset_revision": "abc",
    "scores": {"val": [{"main_score": score, "hf_subset": name} for name, score in (("dress", 0.25), ("shirt", 0.5))]},
}


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results" / "me__e5v-nli-lora" / "1"
    folder.mkdir(parents=True)
    (folder / "STS12.json").write_text(json.dumps(STS))
    (folder / "E5VFashionIQ.json").write_text(json.dumps(FASHION))
    write_meta(folder, "me/e5v-nli-lora", "1")
    return tmp_path / "results"


def write_meta(folder, name, revision, **more):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_meta.json").write_text(json.dumps({"name": name, "revision": revision, **more}))


def write(run, tmp_path, **known):
    staged = tmp_path / "staged"
    stage(run, staged, Card(repo_id="me/e5v-nli-lora", **known), "royokong/e5-v")
    return staged


def test_the_whole_card_is_as_its_golden_file(run, results, tmp_path):
    (run / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    (run / "evaluation.json").write_text(json.dumps({"before": {"STS": 0.25}, "after": {"STS": 0.5, "T2I": 0.125}}))
    (run / "loss.png").write_bytes(b"PNG")
    staged = write(run, tmp_path, results=results, license="apache-2.0")
    # The files that travel are those of the package, whatever they are called
    names = sorted(f"{name}_e5v.py" for name in modeling_e5v.SOURCES)
    rows = [f"| {name} | `{hashlib.sha256((staged / name).read_bytes()).hexdigest()}` |" for name in names]
    expected = GOLDEN.read_text(encoding="utf8").replace("HASHES OF THE CODE", "\n".join(rows))
    assert (staged / "README.md").read_text(encoding="utf8") == expected


def test_results_are_in_the_hubs_own_format(run, results, tmp_path):
    data = hf.ModelCard.load(write(run, tmp_path, results=results) / "README.md").data
    assert "mteb" in data.tags
    assert data.model_name == "e5v-nli-lora"
    found = {(r.dataset_type, r.dataset_config, r.dataset_split): r.metric_value for r in data.eval_results}
    assert found == {
        ("STS12", "default", "test"): 0.7512,
        ("E5VFashionIQ", "dress", "val"): 0.25,
        ("E5VFashionIQ", "shirt", "val"): 0.5,
    }
    assert {r.dataset_revision for r in data.eval_results} == {"abc", STS["dataset_revision"]}


def test_a_card_without_results_or_recipe_has_no_empty_parts(run, tmp_path):
    card = (write(run, tmp_path) / "README.md").read_text()
    data = hf.ModelCard(card).data
    assert "mteb" not in data.tags
    assert "model-index" not in card
    assert "## Results" not in card
    assert "## Training" not in card
    assert "None" not in card


def test_the_licence_of_the_runs_own_card_is_kept(run, tmp_path):
    (run / "README.md").write_text("---\nlicense: llama3\ntags:\n- generated_from_trainer\n---\n# Run\n")
    assert hf.ModelCard.load(write(run, tmp_path) / "README.md").data.license == "llama3"


@pytest.mark.parametrize(
    ("said", "known"),
    [
        ("license: llama3", ("llama3", None, None)),
        (
            "license: other\nlicense_name: e5v\nlicense_link: https://example.org/LICENSE",
            ("other", "e5v", "https://example.org/LICENSE"),
        ),
        ("license: other\nlicense_name: e5v\nlicense_link: LICENSE", ("other", "e5v", None)),
        ("license: unknown", ("unknown", None, None)),
        ("license: [", ("unknown", None, None)),
        ("", ("unknown", None, None)),
    ],
)
def test_the_bases_licence_is_inherited_where_its_card_says_one(server, monkeypatch, run, small, said, known):
    monkeypatch.setattr(e5v_st.hub.push, "check_reload", lambda folder, staged: None)
    base = {"config.json": (small / "config.json").read_bytes(), "README.md": f"---\n{said}\n---\n# Base\n"}
    server.add_repo("you/base", base if said else {"config.json": b"{}"})
    e5v_st.hub.push.push(run, "me/x", base="you/base")
    data = hf.ModelCard(server.files("me/x")["README.md"].decode()).data.to_dict()
    assert (data["license"], data.get("license_name"), data.get("license_link")) == known


def test_a_licence_that_is_given_or_in_the_runs_card_goes_before_the_bases(server, monkeypatch, run):
    monkeypatch.setattr(e5v_st.hub.push, "check_reload", lambda folder, staged: None)
    server.add_repo("you/base", {"README.md": "---\nlicense: llama3\n---\n"})
    (run / "README.md").write_text("---\nlicense: mit\n---\n")
    e5v_st.hub.push.push(run, "me/card", base="you/base")
    e5v_st.hub.push.push(run, "me/given", base="you/base", license="apache-2.0")
    found = [hf.ModelCard(server.files(repo)["README.md"].decode()).data.license for repo in ("me/card", "me/given")]
    assert found == ["mit", "apache-2.0"]


def test_merged_and_exported_models_keep_the_bases_licence(adapter, copy, tmp_path):
    from e5v_st.hub.export import export
    from e5v_st.hub.merge import merge

    (copy / "README.md").write_text("---\nlicense: llama3\n---\n# Base\n")
    for folder in (merge(adapter, tmp_path / "merged", base=copy), export(copy, tmp_path / "exported")):
        assert hf.ModelCard.load(folder / "README.md").data.license == "llama3"


@pytest.mark.parametrize("fault", ["500", "drop", "401"])
def test_a_licence_that_cannot_be_looked_up_does_not_stop_a_push(server, monkeypatch, run, fault):
    monkeypatch.setattr(e5v_st.hub.push, "check_reload", lambda folder, staged: None)
    server.add_repo("you/base", {"README.md": "---\nlicense: llama3\n---\n"})
    server.fail("/you/base/", fault, times=math.inf)
    e5v_st.hub.push.push(run, "me/x", base="you/base")
    assert "license: unknown" in server.files("me/x")["README.md"].decode()


def test_a_copy_of_a_copy_still_names_base_and_adapter(server, adapter, small, tmp_path):
    from e5v_st.hub.export import export
    from e5v_st.hub.merge import merge

    server.add_repo("royokong/e5-v", small)
    once = export("royokong/e5-v", tmp_path / "once")
    merged = merge(adapter, tmp_path / "merged", base="royokong/e5-v")
    twice = [export(folder, tmp_path / f"{folder.name}-twice") for folder in (once, merged)]
    server.add_repo("me/e5v-nli", merged)
    twice.append(export("me/e5v-nli", tmp_path / "from-the-hub", native=True))
    data = [hf.ModelCard.load(folder / "README.md").data.to_dict() for folder in twice]
    assert [each["base_model"] for each in data] == ["royokong/e5-v"] * 3
    assert [each.get("base_model_relation") for each in data] == [None, "finetune", "finetune"]
    assert [each.get("merged_adapter") for each in data] == [None, "e5v-nli", "e5v-nli"]


def test_the_image_layout_is_named(make_adapter, small, tmp_path):
    run = make_adapter(tmp_path / "run", image_layout="paper")
    assert (
        "`paper`: images are cut into tiles as transformers 4.41.2 did"
        in write(run, tmp_path).joinpath("README.md").read_text()
    )


def test_a_native_model_is_loaded_without_remote_code_in_its_card(small, tmp_path):
    from e5v_st.hub.export import export

    card = (export(small, tmp_path / "native", native=True) / "README.md").read_text()
    assert 'SentenceTransformer("native")' in card
    assert "trust_remote_code" not in card
    assert "There is no code in this repository." in card


def test_a_folder_without_results_is_named(run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no result files of mteb"):
        write(run, tmp_path, results=tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("README.md", "---\nlicense: [\n---\n"),
        ("recipe.yaml", "rate: ["),
        ("recipe.yaml", "- a list"),
        ("evaluation.json", "[1, 2]"),
        ("evaluation.json", '{"after": 3}'),
        ("evaluation.json", "{"),
    ],
)
def test_a_file_for_the_card_that_cannot_be_read_is_named(run, tmp_path, name, content):
    (run / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(f"{run / name}, which the card is made from, cannot be read")):
        write(run, tmp_path)


@pytest.mark.parametrize("rows", [[{}], [{"a": 1}], [{"main_score": None}], [{"main_score": "?"}], 3, [3]])
def test_scores_of_another_form_are_refused_with_their_file(run, tmp_path, rows):
    write_meta(tmp_path / "results", "me/e5v-nli-lora", "1")
    (tmp_path / "results" / "X.json").write_text(json.dumps({"task_name": "X", "scores": {"test": rows}}))
    with pytest.raises(ValueError, match=r"X\.json is not a result file of mteb"):
        write(run, tmp_path, results=tmp_path / "results")


def test_a_card_says_what_is_not_known(adapter, tmp_path):
    import shutil

    folder = shutil.copytree(adapter, tmp_path / "model")
    (folder / "README.md").unlink()
    write_card(folder, Card())
    card = hf.ModelCard.load(folder / "README.md")
    assert card.data.license == "unknown"
    assert card.data.base_model is None


def test_the_card_of_a_training_on_images_names_its_sources_and_no_folder_of_the_machine(run, tmp_path):
    sources = [
        {"data": "/home/me/secret/products.parquet", "images": "~/secret/photos", "weight": 2},
        {"data": "/home/me/secret/rows.csv", "teacher": {"anchor": "../secret/anchors"}},
    ]
    recipe = {"train": sources, "init_adapter": "/home/me/secret/first", "loss": {"name": "mnrl"}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    staged = write(run, tmp_path)
    card = (staged / "README.md").read_text(encoding="utf8")
    for kept in ("products.parquet", "photos", "rows.csv", "anchors", "first", "'weight': 2", "'name': 'mnrl'"):
        assert kept in card
    assert "secret" not in card
    assert "It was trained on the sources above." in card
    assert "trains on text pairs alone" not in card
    assert not any("secret" in path.read_text(errors="ignore") for path in staged.iterdir() if path.is_file())
