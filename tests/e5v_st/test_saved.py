"""What a saved model says of itself. What is right is what sentence-transformers makes of the saved model."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling

import e5v_st
from e5v_st.fingerprint import digest_folders, digest_settings, fingerprint
from e5v_st.hub.export import export
from e5v_st.hub.merge import merge


def pool_means(model):
    model[1] = Pooling(128, pooling_mode="mean")


def add_dense(model):
    torch.manual_seed(0)
    model[2] = Dense(128, 16)
    model.append(Normalize())


def drop_normalize(model):
    del model[2]


def name_prompt(model):
    model.prompts["short"] = "<sent> in short:"
    model.default_prompt_name = "short"


def replace_prompt(model):
    model.prompts["sts"] = "In a word, <sent>:"
    model.default_prompt_name = "sts"


def truncate(model):
    model.truncate_dim = 24


CHANGES = (pool_means, add_dense, drop_normalize, name_prompt, replace_prompt, truncate)


@pytest.fixture(scope="module", params=CHANGES, ids=lambda change: change.__name__)
def saved(request, small, tmp_path_factory):
    """A model that was saved with something of its own."""
    model = e5v_st.load(small, device="cpu")
    request.param(model)
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(str(folder))
    return folder


def plain(folder):
    return SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")


def test_a_saved_model_is_loaded_as_sentence_transformers_loads_it(saved, model):
    expected = plain(saved).encode(["A dog."])
    found = e5v_st.load(saved, device="cpu")
    np.testing.assert_array_equal(found.encode(["A dog."]), expected)
    np.testing.assert_allclose(e5v_st.encode_all(found, ["A dog."], progress=False), expected, atol=2e-6)
    usual = model.encode(["A dog."])
    assert usual.shape != expected.shape or np.abs(usual - expected).max() > 1e-3


def test_an_export_keeps_what_the_model_was_saved_with(saved, tmp_path):
    expected = plain(saved).encode(["A dog."])
    np.testing.assert_allclose(plain(export(saved, tmp_path / "own")).encode(["A dog."]), expected, atol=1e-6)
    native = SentenceTransformer(str(export(saved, tmp_path / "native", native=True)), device="cpu")
    np.testing.assert_allclose(native.encode(["A dog."]), expected, atol=2e-6)


def test_a_merge_keeps_what_the_base_was_saved_with(saved, goldens, tmp_path):
    adapter = goldens / "legacy_adapter"
    expected = e5v_st.load(saved, adapter=adapter, device="cpu").encode(["A dog."])
    merged = merge(adapter, tmp_path / "merged", base=saved)
    found = plain(merged).encode(["A dog."])
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.linalg.norm(expected))


def test_the_similarity_is_kept_and_arguments_take_precedence(small, tmp_path):
    model = e5v_st.load(small, device="cpu", similarity_fn_name="dot", truncate_dim=24)
    name_prompt(model)
    model.save_pretrained(str(tmp_path))
    assert e5v_st.load(tmp_path, device="cpu").similarity_fn_name == plain(tmp_path).similarity_fn_name == "dot"
    given = {"similarity_fn_name": "cosine", "truncate_dim": 7, "prompts": {"short": "<sent> :"}}
    found = e5v_st.load(tmp_path, device="cpu", default_prompt_name="sts", **given)
    assert found.similarity_fn_name == "cosine"
    assert found.prompts["short"] == "<sent> :"
    assert found.default_prompt_name == "sts"
    assert found.encode("A dog.").shape == (7,)


def test_modules_behind_a_model_in_half_precision_are_computed_in_full(small, tmp_path):
    model = e5v_st.load(small, device="cpu")
    add_dense(model)
    model.save_pretrained(str(tmp_path))
    found = e5v_st.load(tmp_path, device="cpu", model_kwargs={"dtype": "bfloat16"})
    state = SentenceTransformer(modules=list(found)[:2], device="cpu").encode("A dog.", convert_to_tensor=True)
    weights = {name: value.bfloat16().float() for name, value in model[2].linear.state_dict().items()}
    expected = torch.tanh(state.float() @ weights["weight"].T + weights["bias"])
    expected = torch.nn.functional.normalize(expected, dim=0)
    np.testing.assert_allclose(found.encode("A dog."), expected, atol=2e-6)


@pytest.fixture
def copy(small, tmp_path):
    """A saved model with a Dense module, to break."""
    model = e5v_st.load(small, device="cpu")
    add_dense(model)
    model.save_pretrained(str(tmp_path / "copy"))
    return tmp_path / "copy"


def change_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("kind", ["evil_e5v.Module", "sentence_transformers.models.WordEmbeddings", "os.Dense"])
def test_a_module_that_an_e5v_does_not_have_is_refused_by_name(copy, tmp_path, kind):
    change_json(copy / "modules.json", lambda modules: modules[2].update(type=kind))
    for use in (lambda: e5v_st.load(copy, device="cpu"), lambda: export(copy, tmp_path / "exported")):
        with pytest.raises(ValueError, match=f"names '{kind}', which is not a module of an E5-V"):
            use()


def test_a_module_whose_weights_are_a_pickle_is_refused(copy, tmp_path):
    torch.save({}, copy / "2_Dense" / "pytorch_model.bin")
    (copy / "2_Dense" / "model.safetensors").unlink()
    for use in (lambda: e5v_st.load(copy, device="cpu"), lambda: export(copy, tmp_path / "exported")):
        with pytest.raises(ValueError, match=r"has no 2_Dense/model\.safetensors"):
            use()


def test_an_activation_that_is_not_of_torch_is_refused(copy):
    change_json(copy / "2_Dense" / "config.json", lambda settings: settings.update(activation_function="os.getcwd"))
    with pytest.raises(ValueError, match=r"activation function 'os\.getcwd', want one of torch"):
        e5v_st.load(copy, device="cpu")


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("modules.json", lambda modules: modules.pop()),
        ("config_sentence_transformers.json", lambda settings: settings.update(default_prompt_name="sts")),
        ("1_Pooling/config.json", lambda settings: settings.update(pooling_mode="mean")),
        (
            "2_Dense/config.json",
            lambda settings: settings.update(activation_function="torch.nn.modules.activation.ReLU"),
        ),
    ],
)
def test_an_index_and_measured_results_know_what_a_model_was_saved_with(copy, tmp_path, file, change):
    before = shutil.copytree(copy, tmp_path / "before")
    assert digest_settings([copy]) == digest_settings([before])
    change_json(copy / file, change)
    assert digest_settings([copy]) != digest_settings([before])
    assert digest_folders([copy]) != digest_folders([before])


def test_the_store_of_embeddings_knows_every_module(copy, small):
    found = {fingerprint(e5v_st.load(where, device="cpu")) for where in (copy, small)}
    model = e5v_st.load(copy, device="cpu")
    model[2].linear.bias.data[3] += 1
    found.add(fingerprint(model))
    model[1].pooling_mode = "mean"
    assert len(found | {fingerprint(model)}) == 4


def test_an_export_keeps_the_lengths_of_queries_or_refuses(small, tmp_path):
    model = e5v_st.load(small, device="cpu")
    model[0].query_length = 48
    model.save(str(tmp_path / "saved"))
    export(tmp_path / "saved", tmp_path / "exported")
    texts = ["a dog and a cat " * 20]
    found = SentenceTransformer(str(tmp_path / "exported"), trust_remote_code=True, device="cpu").encode_query(texts)
    np.testing.assert_allclose(found, model.encode_query(texts), atol=1e-6)
    assert not np.allclose(found, model.encode(texts), atol=1e-3)
    with pytest.raises(ValueError, match="query_length=48 needs this package's code"):
        export(tmp_path / "saved", tmp_path / "native", native=True)


def test_the_head_does_not_read_what_other_modules_made(small):
    model = e5v_st.load(small, device="cpu")
    pool_means(model)
    with pytest.raises(ValueError, match="want last-token pooling"):
        e5v_st.words(model, ["a dog"])


def test_the_name_of_a_models_own_prompt_is_not_a_prompt(small):
    model = e5v_st.load(small, device="cpu", prompts={"mine": "<sent>\nColour in one word: "})
    with pytest.raises(ValueError, match="use prompt_name='mine'"):
        model.encode(["a dog"], prompt="mine")
    assert model.encode(["a dog"], prompt_name="mine").shape == (1, model.get_embedding_dimension())


def test_no_dimensions_at_all_are_refused(small):
    with pytest.raises(ValueError, match="truncate_dim=0, want at least 1"):
        e5v_st.load(small, truncate_dim=0)
