"""The module in sentence-transformers: what its own tests promise of a Transformer module, and E5-V's contracts."""

from __future__ import annotations

import doctest
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import quantize_embeddings

import e5v_st
from e5v_st import PROMPTS
from e5v_st.loading import compile_layers
from e5v_st.model import modeling_e5v, prompts_e5v

TEXTS = ["A dog sitting in the grass.", "A cat standing in the snow.", ""]


@pytest.fixture(scope="module")
def mixed(pictures):
    with Image.open(pictures[2]) as image:
        loaded = image.copy()
    message = {"role": "user", "content": [{"type": "image", "image": pictures[3]}, {"type": "text", "text": "red"}]}
    return [
        "A dog.",
        pictures[0],
        {"text": pictures[1]},
        {"image": pictures[1]},
        loaded,
        {"image": loaded, "text": "is red"},
        {"image": pictures[:2], "text": "both"},
        [message],
        "a <image> tag",
    ]


def plain_transformers(small, template: str, sentence: str, images: list[str]) -> np.ndarray:
    """The README recipe of the published model on current transformers, one input at a time."""
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    model = LlavaNextForConditionalGeneration.from_pretrained(small, dtype=torch.float32).eval()
    model.resize_token_embeddings(model.config.image_token_id + 1, mean_resizing=False)
    settings = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = AutoProcessor.from_pretrained(small, **settings)
    text = e5v_st.model.prompts_e5v.render(template, "llama3", sentence)
    opened = [Image.open(image).convert("RGB") for image in images] or None
    inputs = processor(text=[text], images=opened, return_tensors="pt")
    with torch.inference_mode():
        state = model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
    return torch.nn.functional.normalize(state, dim=0).numpy()


def test_two_images_equal_plain_transformers(model, small, pictures):
    expected = plain_transformers(small, PROMPTS["image"].replace("<image>", "<image><image>"), "", pictures[:2])
    np.testing.assert_allclose(model.encode({"image": pictures[:2]}), expected, atol=1e-6)


def test_an_own_prompt_equals_plain_transformers(model, small, pictures):
    prompt = "<image>\nWhat would <sent> be, in one word?"
    expected = plain_transformers(small, prompt, "a dog", pictures[:1])
    np.testing.assert_allclose(
        model.encode({"image": pictures[0], "text": "a dog"}, prompt=prompt), expected, atol=1e-6
    )


def test_a_mixed_call_equals_single_calls_in_input_order(model, mixed):
    together = model.encode(mixed, batch_size=4)
    alone = np.stack([model.encode([item])[0] for item in mixed])
    assert together.shape == (len(mixed), 128)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_user_text_is_content(model, pictures):
    tag, image = model.encode(["a <image> tag", pictures[0]])
    assert abs(float(tag @ image)) < 0.999
    assert abs(float(tag @ model.encode("a  tag"))) < 0.999


def test_a_single_item_gives_a_vector(model, pictures):
    for item in ("A dog.", pictures[0], {"image": pictures[0], "text": "red"}, {"role": "user", "content": "A dog."}):
        assert model.encode(item).shape == (128,)
    assert model.encode([]).shape[0] == 0


def test_prompt_names_are_there(model):
    names = {"text", "image", "composed", "cirr-query", "cirr-gallery", "sts"}
    names |= {f"fashioniq-{c}-{k}" for c in ("dress", "shirt", "toptee") for k in ("query", "gallery")}
    assert names <= set(model.prompts)


def test_encode_query_and_document_use_the_default_prompts(model, pictures):
    for encode in (model.encode_query, model.encode_document):
        np.testing.assert_allclose(encode(["A dog.", pictures[0]]), model.encode(["A dog.", pictures[0]]), atol=1e-6)


def test_an_instruction_goes_in_front_of_the_sentence(model):
    np.testing.assert_allclose(model.encode("a dog", prompt="query: "), model.encode("query: a dog"), atol=1e-6)


def test_truncate_dim_and_precision(model):
    full = model.encode(TEXTS)
    np.testing.assert_allclose(model.encode(TEXTS, truncate_dim=32), full[:, :32], atol=1e-6)
    assert model.encode(TEXTS, precision="int8").dtype == np.int8
    assert model.encode(TEXTS, precision="ubinary").shape == (3, 16)


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
@pytest.mark.parametrize("truncate_dim", [None, 32])
def test_precision_is_that_of_sentence_transformers(model, mixed, precision, truncate_dim):
    full = np.stack([model.encode([item])[0] for item in mixed])[:, :truncate_dim]
    expected = quantize_embeddings(full, precision)
    found = model.encode(mixed, precision=precision, truncate_dim=truncate_dim)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    if precision.endswith("int8"):
        assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
        steps = (full - full.min(0)) / (full.max(0) - full.min(0)) * 255
        on_border = np.abs(steps - steps.round()) < 0.01  # a difference of 1e-7 may cross it; each largest value is one
        np.testing.assert_array_equal(found[~on_border], expected[~on_border])
    else:
        assert np.abs(full).min() > 1e-6, "a sign is open"
        np.testing.assert_array_equal(found, expected)


def test_a_compiled_language_model_gives_the_same_embeddings(small, model, mixed):
    compiled = e5v_st.load(small, device="cpu")
    used = []

    def backend(module, inputs):
        used.append(module)
        return module

    compile_layers(compiled, backend=backend)
    np.testing.assert_allclose(compiled.encode(mixed), model.encode(mixed), atol=1e-5)
    assert used


def test_no_new_batch_is_compiled_anew(small, mixed):
    compiled = e5v_st.load(small, device="cpu")
    graphs = []
    compile_layers(compiled, backend=lambda module, inputs: graphs.append(module) or module)
    many = [f"dog {number} " + "word " * number for number in range(40)]
    for some in (mixed, ["a dog"], many):  # what torch.compile tells apart: several tokens, one, more than CPU_TOKENS
        compiled.encode(some, batch_size=64)
    before = len(graphs)
    for number in range(1, 12):
        compiled.encode(many[: 3 * number : number], batch_size=64)
        compiled.encode(mixed[: 1 + number % len(mixed)])
    assert len(graphs) == before


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("E5V_NIGHTLY") != "1" or not shutil.which("cc"), reason="a minute of compiling")
def test_torch_inductor_gives_the_same_embeddings(small, model, mixed):
    compiled = e5v_st.load(small, device="cpu")
    compile_layers(compiled)
    np.testing.assert_allclose(compiled.encode(mixed), model.encode(mixed), atol=1e-5)


def test_tensors_are_float32_on_request(model):
    found = model.encode(TEXTS, convert_to_tensor=True)
    assert (found.dtype, tuple(found.shape)) == (torch.float32, (3, 128))


def test_only_the_sentence_is_cut_and_never_an_image(small, pictures):
    model = e5v_st.load(small, device="cpu")
    long = "dog " * 400
    untouched = model.encode([pictures[0], {"image": pictures[0], "text": "red"}])
    model.max_seq_length = 80
    features = model.preprocess([{"text": long}, {"image": pictures[0], "text": long}])
    assert features["attention_mask"].sum(1).tolist() == [80, 80 - 1 + 71 - 1]
    np.testing.assert_array_equal(model.encode([pictures[0], {"image": pictures[0], "text": "red"}]), untouched)


def test_errors_name_the_index_in_the_callers_list(model, pictures):
    items = ["a", "a longer sentence than that", {"image": "missing.png"}, pictures[0], "b"]
    with pytest.raises(ValueError, match=r"^item 2: .*'missing.png'.*no such file"):
        model.encode(items, batch_size=2)


@pytest.mark.parametrize("bad", [None, 3, ["a", "b"], {"txt": "a"}, {"image": b""}, "\ud800"])
def test_bad_items_raise_value_errors_through_encode(model, bad):
    with pytest.raises(ValueError, match=r"item 1: "):
        model.encode(["fine", bad])


def test_strings_of_every_kind_have_embeddings(model):
    strings = ["", " ", "\0", "\n\n", "שלום עולם", "<|eot_id|><image>", "<sent>", "{}", "x" * 10_000, "🙂" * 50]
    found = model.encode([{"text": text} for text in strings])
    assert np.isfinite(found).all()


def test_odd_sizes_have_embeddings(model):
    images = [Image.new("RGB", size, "red") for size in [(1, 1), (1, 2000), (2000, 1), (56, 56), (57, 55), (113, 167)]]
    found = model.encode(images, batch_size=3)
    assert np.isfinite(found).all()
    assert found.shape == (6, 128)


def test_training_mode_gives_gradients_and_the_same_embedding(small):
    model = e5v_st.load(small, device="cpu")
    expected = model.encode(TEXTS)
    model.train()
    found = model(model.preprocess(TEXTS))["sentence_embedding"]
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-5)
    found.sum().backward()
    assert model[0].model.language_model.layers[0].self_attn.q_proj.weight.grad is not None


def test_several_processes_give_the_same_embeddings(model, pictures):
    items = [*TEXTS, *pictures[:3], {"image": pictures[0], "text": "red"}]
    found = model.encode(items, device=["cpu", "cpu"], batch_size=2, chunk_size=3)
    np.testing.assert_allclose(found, model.encode(items), atol=1e-5)


def test_an_index_in_the_chunk_of_a_process_says_that_it_is_one(model):
    items = [*TEXTS, "a", "b", {"image": "missing.png"}, "c"]  # which the process that reads it has a part of
    with pytest.raises(
        ValueError, match=r"^item 2 of chunk 1 \(both are counted from 0; this chunk has 3 items\): cannot"
    ):
        model.encode(items, device=["cpu"], batch_size=1, chunk_size=3)


# ---- saving ----


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(str(folder))
    return folder


def test_a_saved_model_says_what_it_is(saved):
    modules = json.loads((saved / "modules.json").read_text())
    assert [module["type"].split(".")[-1] for module in modules] == ["E5VTransformer", "Pooling", "Normalize"]
    assert modules[0]["type"] == "modeling_e5v.E5VTransformer"
    assert json.loads((saved / "1_Pooling" / "config.json").read_text())["pooling_mode"] == "lasttoken"
    requirements = json.loads((saved / "config_sentence_transformers.json").read_text())["requirements"]
    assert requirements["sentence-transformers"]["specifier"] == ">=6.2,<7"
    assert requirements["transformers"]["specifier"] == ">=5.23,<6"
    assert all(requirement["reason"] for requirement in requirements.values())
    assert not list(saved.rglob("*.bin"))


def test_libraries_of_another_version_are_refused_with_the_reason(saved, monkeypatch):
    from sentence_transformers.util import environment

    stock = environment.get_installed_version
    monkeypatch.setattr(environment, "get_installed_version", lambda name: "7.0" if "-" in name else stock(name))
    message = r"sentence-transformers>=6\.2,<7, but sentence-transformers==7\.0 is installed\. The code beside"
    with pytest.raises(ImportError, match=message):
        SentenceTransformer(str(saved), trust_remote_code=True, device="cpu")


def test_reload_with_this_package_present(saved, model, mixed):
    reloaded = SentenceTransformer(str(saved), trust_remote_code=True, device="cpu")
    np.testing.assert_array_equal(reloaded.encode(mixed), model.encode(mixed))
    np.testing.assert_array_equal(e5v_st.load(saved, device="cpu").encode(mixed), model.encode(mixed))


def test_reload_without_trust_is_refused_by_sentence_transformers(saved):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        SentenceTransformer(str(saved), device="cpu")


ABSENT = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("e5v_st", "mteb_tasks", "training", "hub"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import numpy as np
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], trust_remote_code=True, device="cpu")
np.save(sys.argv[2], model.encode(["A dog.", sys.argv[3], {"image": sys.argv[3], "text": "red"}]))
model.save_pretrained(sys.argv[2] + ".again")
assert not any(name.split(".")[0] == "e5v_st" for name in sys.modules)
"""


def test_reload_and_save_with_this_package_absent(saved, model, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("E5V_AUTOLOAD", "0")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    out = tmp_path / "found.npy"
    subprocess.run([sys.executable, "-c", ABSENT, str(saved), str(out), pictures[0]], check=True, cwd=tmp_path)
    items = ["A dog.", pictures[0], {"image": pictures[0], "text": "red"}]
    np.testing.assert_allclose(np.load(out), model.encode(items), atol=1e-6)
    again = SentenceTransformer(f"{out}.again", trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(again.encode(items), model.encode(items), atol=1e-6)


def test_the_image_layout_is_saved(load_golden, tmp_path, pictures):
    paper = load_golden("small", "paper")
    paper.save_pretrained(str(tmp_path))
    reloaded = SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    assert reloaded[0].image_layout == "paper"
    np.testing.assert_array_equal(reloaded.encode(pictures), paper.encode(pictures))


def test_the_image_layout_can_be_changed_on_a_loaded_model(small, load_golden, pictures):
    model = e5v_st.load(small, device="cpu")
    model[0].image_layout = "paper"
    np.testing.assert_allclose(model.encode(pictures), load_golden("small", "paper").encode(pictures), atol=1e-6)
    model[0].image_layout = "upstream"
    np.testing.assert_allclose(model.encode(pictures), load_golden("small", "upstream").encode(pictures), atol=1e-6)
    with pytest.raises(ValueError, match="'upstream', 'paper'"):
        model[0].image_layout = "square"


def test_an_adapter_is_saved_and_reloaded_with_its_base(small, tmp_path, pictures):
    from peft import LoraConfig

    from e5v_st.loading import LORA_TARGETS

    torch.manual_seed(0)
    model = e5v_st.load(small, device="cpu")
    model.add_adapter(LoraConfig(r=4, target_modules=LORA_TARGETS, init_lora_weights=False))
    tuned = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert tuned
    assert all("language_model" in name for name in tuned)
    model.save_pretrained(str(tmp_path))
    assert not (tmp_path / "model.safetensors").exists()
    items = ["A dog.", pictures[0]]
    expected = model.encode(items)
    assert np.abs(expected - e5v_st.load(small, device="cpu").encode(items)).max() > 0.01
    reloaded = SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(reloaded.encode(items), expected, atol=1e-6)
    again = e5v_st.load(small, adapter=tmp_path, device="cpu")
    np.testing.assert_allclose(again.encode(items), expected, atol=1e-6)


# ---- settings of a call ----


LONG = {"text": "A dog sits in the grass. " * 20}


@pytest.mark.parametrize(
    "kwargs",
    [
        {"text": {"max_length": 45}},
        {"text": {"max_length": 45, "truncation": True, "padding": True}},
        {"common": {"max_length": 45, "return_tensors": "pt"}},
        {"common": {"max_length": 50}, "text": {"max_length": 45}},
    ],
)
def test_a_maximum_length_of_a_call_is_kept(model, kwargs):
    found = model.encode([LONG], processing_kwargs=kwargs, output_value="token_embeddings")[0]
    assert len(found) == 45
    np.testing.assert_allclose(
        model.encode([LONG], processing_kwargs=kwargs)[0], found[-1] / found[-1].norm(), atol=1e-5
    )


@pytest.mark.parametrize(
    "kwargs",
    [
        {"text": {"truncation": False}},
        {"text": {"padding": "max_length"}},
        {"text": {"add_special_tokens": False}},
        {"image": {"do_resize": False}},
        {"image": {"max_length": 3}},
        {"chat_template": {"add_generation_prompt": True}},
        {"a group of no kind": {"max_length": 45}},
        {"max_length": 45},
    ],
)
def test_a_setting_of_a_call_that_would_do_nothing_is_refused_by_its_name(model, kwargs):
    with pytest.raises(ValueError, match=re.escape(f"processing_kwargs={kwargs}, which E5-V cannot do")):
        model.encode([LONG], processing_kwargs=kwargs)


def test_settings_that_the_model_was_made_with_count_too(small):
    from e5v_st.published import load_modules

    modules = load_modules(str(small))
    modules[0].processing_kwargs = {"text": {"max_length": 45}}
    model = SentenceTransformer(modules=modules, device="cpu")
    assert len(model.encode(LONG, output_value="token_embeddings")) == 45
    shorter = {"text": {"max_length": 40}}
    assert len(model.encode(LONG, output_value="token_embeddings", processing_kwargs=shorter)) == 40
    modules[0].processing_kwargs = {}
    modules[0].query_length, modules[0].document_length = 42, 50
    assert len(model.encode_query(LONG, output_value="token_embeddings")) == 42
    assert len(model.encode_document(LONG, output_value="token_embeddings")) == 50
    modules[0].processing_kwargs = {"image": {"do_resize": False}}
    with pytest.raises(ValueError, match="do_resize"):
        model.encode("A dog.")


@pytest.mark.parametrize("length", [0, -1])
def test_a_maximum_length_below_one_is_refused(model, length):
    with pytest.raises(ValueError, match=f"max_length={length}, want at least 1"):
        model.encode([LONG], processing_kwargs={"text": {"max_length": length}})


# ---- merging with sentence-transformers ----


@pytest.fixture
def mergekit(monkeypatch):
    """A stand-in for the few names of mergekit that sentence-transformers takes; its linear merge is the mean."""
    from types import ModuleType, SimpleNamespace

    from sentence_transformers.base import merging

    method = SimpleNamespace(
        spec=SimpleNamespace(contract=SimpleNamespace(base="optional"), parameters=[]),
        validate_inputs=lambda inputs, base: None,
    )
    methods = ModuleType("mergekit.merge_methods")
    methods.BasePolicy = SimpleNamespace(IGNORED="ignored")
    methods.get = lambda name: method
    methods.merge_state_dicts = lambda states, *args, **kwargs: {
        key: sum(state[key].double() for state in states.values()).div(len(states)).to(tensor.dtype)
        for key, tensor in states[0].items()
    }
    monkeypatch.setitem(sys.modules, "mergekit", ModuleType("mergekit"))
    monkeypatch.setitem(sys.modules, "mergekit.merge_methods", methods)
    monkeypatch.setattr(merging, "version", lambda name: "0.1.5")


def test_saved_models_are_merged_by_sentence_transformers(small, tmp_path, mergekit, pictures):
    models = [e5v_st.load(small, device="cpu") for _ in range(3)]
    key = "language_model.layers.1.mlp.up_proj.weight"
    weights = [model[0].model.get_parameter(key).data for model in models]
    torch.manual_seed(0)
    weights[0] += torch.randn_like(weights[0]) * 0.1
    weights[2].copy_((weights[0] + weights[1]) / 2)
    for name, model in zip("ab", models[:2], strict=True):
        model.save_pretrained(str(tmp_path / name))
    folders = [str(tmp_path / name) for name in "ab"]
    merged = SentenceTransformer.merge(folders, trust_remote_code=True)
    items = ["A dog.", pictures[0]]
    np.testing.assert_allclose(merged.encode(items), models[2].encode(items), atol=1e-6)
    assert np.abs(merged.encode(items) - models[0].encode(items)).max() > 1e-3
    merged.save_pretrained(str(tmp_path / "merged"))
    again = SentenceTransformer(str(tmp_path / "merged"), trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(again.encode(items), models[2].encode(items), atol=1e-6)


def test_folders_with_other_code_keep_classes_of_their_own(model, tmp_path):
    for name in "ab":
        model.save_pretrained(str(tmp_path / name))
    with (tmp_path / "b" / "items_e5v.py").open("a") as file:
        file.write("\nCHANGED = True\n")
    one, other = (SentenceTransformer(str(tmp_path / n), trust_remote_code=True, device="cpu")[0] for n in "ab")
    assert type(one) is not type(other)
    assert sys.modules[type(other).__module__].__file__ != sys.modules[type(one).__module__].__file__


# ---- what travels ----


def test_transformers_finds_every_file_that_travels():
    from transformers.dynamic_module_utils import get_relative_import_files

    folder = Path(modeling_e5v.__file__).parent
    found = {Path(file).name for file in get_relative_import_files(modeling_e5v.__file__)}
    assert found | {"modeling_e5v.py"} == {f"{name}_e5v.py" for name in modeling_e5v.SOURCES}
    assert found | {"modeling_e5v.py", "__init__.py"} == {file.name for file in folder.glob("*.py")}


@pytest.mark.parametrize("documented", [e5v_st.E5VTransformer, prompts_e5v], ids=lambda each: each.__name__)
def test_the_examples_of_what_is_public_are_true(documented):
    runner, globs = doctest.DocTestRunner(), {"torch": torch}
    for test in doctest.DocTestFinder().find(documented, module=False, globs=globs):
        runner.run(test)
    assert runner.tries
    assert not runner.failures
