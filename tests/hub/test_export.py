from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

import e5v_st
from e5v_st.hub.export import export

HEAD = "language_model.lm_head.weight"
ROWS = (HEAD, "language_model.model.embed_tokens.weight")


@pytest.fixture(scope="module")
def plain_folder(small, tmp_path_factory):
    return export(small, tmp_path_factory.mktemp("export") / "plain")


@pytest.fixture(scope="module")
def native_folder(small, tmp_path_factory):
    return export(small, tmp_path_factory.mktemp("export") / "native", native=True)


@pytest.fixture(scope="module")
def numbers(goldens):
    return np.load(goldens / "small.upstream.npz")


@pytest.fixture(scope="module")
def pictures(goldens, numbers):
    return [Image.open(goldens / "images" / "small" / str(file)).convert("RGB") for file in numbers["files"]]


def check_against_goldens(model, numbers, pictures):
    texts = [{"text": str(text)} for text in numbers["texts"]]
    changed = [{"image": image, "text": str(change)} for image in pictures for change in numbers["changes"]]
    np.testing.assert_allclose(model.encode(texts), numbers["text"], atol=2e-6)
    np.testing.assert_allclose(model.encode(pictures), numbers["image"], atol=2e-6)
    np.testing.assert_allclose(model.encode(changed), numbers["cirr_query"], atol=2e-6)
    found = model.encode(pictures, prompt_name="cirr-gallery")
    np.testing.assert_allclose(found, numbers["cirr_gallery"], atol=2e-6)


# ---- default ----


def test_the_published_files_stay_byte_for_byte_and_weights_are_linked(small, plain_folder):
    for file in small.iterdir():
        assert (plain_folder / file.name).read_bytes() == file.read_bytes(), file.name
    assert (plain_folder / "model.safetensors").stat().st_ino == (small / "model.safetensors").stat().st_ino


def test_an_exported_model_equals_the_goldens(plain_folder, numbers, pictures):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(plain_folder), trust_remote_code=True, device="cpu")
    assert type(model[0]).__name__ == "E5VTransformer"
    check_against_goldens(model, numbers, pictures)
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(str(plain_folder), device="cpu")


# ---- native ----


def test_a_native_model_equals_the_goldens_in_stock_sentence_transformers(native_folder, numbers, pictures):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer

    model = SentenceTransformer(str(native_folder), device="cpu")
    assert type(model[0]) is Transformer
    assert not list(native_folder.glob("*.py"))
    check_against_goldens(model, numbers, pictures)
    two = [{"role": "user", "content": [{"type": "image", "image": image} for image in pictures[:2]]}]
    ours = e5v_st.load(native_folder, device="cpu")
    np.testing.assert_allclose(model.encode([two]), ours.encode([{"image": pictures[:2]}]), atol=2e-6)


def test_a_native_model_loads_with_the_readmes_recipe(native_folder, small, numbers, pictures):
    model = LlavaNextForConditionalGeneration.from_pretrained(native_folder).eval()
    processor = LlavaNextProcessor.from_pretrained(native_folder)
    template = (
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n \n"
    )
    sentences = [template.format(f"{text}\nSummary above sentence in one word: ") for text in numbers["texts"]]
    texts = processor(text=sentences, return_tensors="pt", padding=True)
    prompts = [template.format("<image>\nSummary above image in one word: ")] * len(pictures)
    images = processor(text=prompts, images=pictures, return_tensors="pt", padding=True)
    with torch.inference_mode():
        for inputs, expected in ((texts, numbers["text"]), (images, numbers["image"])):
            states = model(**inputs, output_hidden_states=True).hidden_states[-1][:, -1]
            np.testing.assert_allclose(torch.nn.functional.normalize(states, dim=-1), expected, atol=2e-6)


def test_native_weights_only_gain_a_row_that_is_zero(native_folder, small):
    before, after = (load_file(folder / "model.safetensors") for folder in (small, native_folder))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        if key in ROWS:
            assert after[key].shape[0] == tensor.shape[0] + 1
            assert not after[key][-1].any()
        assert torch.equal(after[key][: tensor.shape[0]], tensor)
    config = json.loads((native_folder / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == 1501 == config["image_token_index"] + 1


def test_a_model_that_takes_strings_for_texts_does_so_exported(small, tmp_path):
    e5v_st.load(small, device="cpu", strings="text").save_pretrained(str(tmp_path / "saved"))
    export(tmp_path / "saved", tmp_path / "exported")
    assert e5v_st.load(tmp_path / "exported", device="cpu")[0].strings == "text"


def test_native_of_native_is_the_same(native_folder, tmp_path):
    again = export(native_folder, tmp_path / "again", native=True)
    names = {file.name for file in native_folder.iterdir()} - {"README.md", "1_Pooling", "2_Normalize"}
    assert {name for name in names if (again / name).read_bytes() != (native_folder / name).read_bytes()} == set()


def test_a_saved_model_becomes_native_too(small, tmp_path, numbers):
    from sentence_transformers import SentenceTransformer

    e5v_st.load(small, device="cpu").save_pretrained(str(tmp_path / "saved"))
    native = export(tmp_path / "saved", tmp_path / "native", native=True)
    model = SentenceTransformer(str(native), device="cpu")
    texts = [{"text": str(text)} for text in numbers["texts"]]
    np.testing.assert_allclose(model.encode(texts), numbers["text"], atol=2e-6)


# ---- what is refused ----


def test_an_existing_folder_is_never_written_to(small, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ValueError, match="exists already"):
        export(small, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def break_nothing(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def break_config(folder):
    (folder / "config.json").write_text('{"model_type": "bert"}')


def break_json(folder):
    (folder / "config.json").write_text("{")


def climb(folder):
    index = {"weight_map": {"a": "../../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lose_shard(folder):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cut_off(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def lose_embedding(folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop(ROWS[1])
    save_file(weights, folder / "model.safetensors")


def take_strings_for_texts(folder):
    (folder / "sentence_bert_config.json").write_text('{"strings": "text"}')


def use_paper_layout(folder):
    (folder / "sentence_bert_config.json").write_text('{"image_layout": "paper"}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_nothing, r"no model\.safetensors: want the weights in safetensors"),
        (break_config, "'bert' checkpoint, E5-V wants one of the model types"),
        (break_json, r"config\.json"),
        (climb, r"names '\.\./\.\./secret\.safetensors'.*refused"),
        (lose_shard, r"no model-2\.safetensors"),
        (cut_off, r"model\.safetensors cannot be read or written"),
        (lose_embedding, "no input embedding"),
        (use_paper_layout, "'paper' needs this package's code"),
        (take_strings_for_texts, "strings='text' needs this package's code"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_nothing_is_left(copy, tmp_path, damage, message):
    damage(copy)
    with pytest.raises((ValueError, OSError), match=message):
        export(copy, tmp_path / "out", native=True)
    assert [file.name for file in tmp_path.iterdir()] == ["copy"]


def test_a_folder_that_is_not_there_is_no_hub_id():
    with pytest.raises(ValueError, match="no file or folder runs/x/y"):
        export("runs/x/y", "out")


def test_help_is_instant_and_names_every_command():
    code = "import sys, e5v_st.hub.__main__ as m; sys.argv = ['hub', '--help']\n"
    code += "try: m.main()\nexcept SystemExit: pass\n"
    heavy = ("torch", "transformers", "huggingface_hub", "e5v_st.model.modeling_e5v")
    code += f"print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in ("push", "merge", "export", "add-st-files", "convert-llava"):
        assert f"\n  {command} " in done.stdout


def test_the_command_line_reports_a_fault_in_one_line(tmp_path, capsys):
    from e5v_st.hub.__main__ import main

    assert main(["export", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("python -m hub export: ")
