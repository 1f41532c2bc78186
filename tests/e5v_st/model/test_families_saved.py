"""A saved model of every family loads where this package is not installed, and an adapter of PEFT's loads on it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer
from transformers.video_processing_utils import BaseVideoProcessor

import e5v_st
from e5v_st.hub import reload
from e5v_st.loading import lora_targets
from e5v_st.model.backbone_e5v import BACKBONES
from e5v_st.model.processor_e5v import limit_image_tokens, load_processor
from e5v_st.model.prompts_e5v import PROMPTS

NAMES = tuple(families.FAMILIES)
ROWS = {row.name: row for row in BACKBONES}


def open_processor(base, name):
    return load_processor(str(base), ROWS[name], AutoTokenizer.from_pretrained(base))


KINDS = ("saved", "adapter", "settings")
#: A maximum that changes what the tiny model of a family sees of an image.
MAXIMA = {
    "pixels": 4,
    "splitting": 4,
    "patches": 12,
    "pinpoints": 12,
    "grids": 16,
    "soft tokens": 140,
    "longest edge": 4,
}

# Loads every folder as anybody would; prints its settings, and saves its embeddings of reload.py's inputs
CLEAN = """
import importlib.util, json, sys
import numpy as np
spec = importlib.util.spec_from_file_location("reload", sys.argv[1])
reload = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reload)
found, settings = {}, {}
for folder in json.loads(sys.argv[2]):
    model = reload.load(folder, own=False)
    found[folder] = model.encode(reload.inputs())
    settings[folder] = model[0].get_config_dict()
if any(name.startswith("e5v_st.model") for name in sys.modules):
    raise SystemExit("this process is not clean")
np.savez(sys.argv[3], **found)
print(json.dumps(settings))
"""


def add_adapter(model: Any) -> None:
    """Puts a LoRA with random weights on a model."""
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=lora_targets(model[0])))
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A folder with every family, plain, with an adapter and with settings, and their embeddings in this process."""
    root, found = tmp_path_factory.mktemp("families"), {}
    for name in NAMES:
        base = families.save(name, root / name / "base")
        settings = {"max_image_tokens": MAXIMA[ROWS[name].budget]} if ROWS[name].budget else {}
        for kind in KINDS:
            model = e5v_st.load(base, device="cpu", **(settings if kind == "settings" else {}))
            if kind == "adapter":
                add_adapter(model)
            if kind == "settings":
                model[0].strings, model[0].share_prefixes = "text", False
            model.save_pretrained(str(root / name / kind))
            found[f"{name}/{kind}"] = model.encode(reload.inputs())
    return root, found


@pytest.fixture(scope="module")
def clean(saved: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    """The embeddings and settings of these folders in a process without this package."""
    out = tmp_path_factory.mktemp("clean")
    folders = [f"{name}/{kind}" for name in NAMES for kind in KINDS]
    command = [sys.executable, "-P", "-c", CLEAN, reload.__file__, json.dumps(folders), str(out / "found.npz")]
    env = {**os.environ, "E5V_AUTOLOAD": "0", "HF_MODULES_CACHE": str(out / "modules")}
    done = subprocess.run(command, env=env, cwd=saved[0], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return np.load(out / "found.npz"), json.loads(done.stdout.splitlines()[-1])


def plain_items() -> list[tuple[str, str | None, list[Any]]]:
    """The inputs of ``reload.py`` as templates, texts and images."""
    items: list[tuple[str, str | None, list[Any]]] = []
    for item in reload.inputs():
        if isinstance(item, str):
            items.append((PROMPTS["text"], item, []))
        elif isinstance(item, dict):
            items.append((PROMPTS["composed"], item["text"], [item["image"]]))
        else:
            items.append((PROMPTS["image"], None, [item]))
    return items


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_of_every_family_equals_plain_transformers_elsewhere(saved, clean, name):
    base = saved[0] / name / "base"
    processor = open_processor(base, name) if ROWS[name].processor else None
    if processor is None:
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(base)
    if ROWS[name].image_tokens:
        limit_image_tokens(processor, ROWS[name], ROWS[name].image_tokens)
    expected = families.reference(name, families.open_plain(base), processor, plain_items())
    np.testing.assert_allclose(clean[0][f"{name}/saved"], expected, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_adapter_of_every_family_gives_the_same_embeddings_elsewhere(saved, clean, name):
    expected = saved[1][f"{name}/adapter"]
    np.testing.assert_allclose(clean[0][f"{name}/adapter"], expected, atol=2e-5)
    assert np.abs(expected - saved[1][f"{name}/saved"]).max() > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_settings_of_every_family_are_saved(saved, clean, name):
    found, settings = clean[0][f"{name}/settings"], clean[1][f"{name}/settings"]
    np.testing.assert_allclose(found, saved[1][f"{name}/settings"], atol=2e-5)
    assert (settings["strings"], settings["share_prefixes"]) == ("text", False)
    assert settings["max_image_tokens"] == (MAXIMA[ROWS[name].budget] if ROWS[name].budget else None)
    images = slice(len(reload.TEXTS), None)
    if ROWS[name].budget:  # and it is not without effect
        assert np.abs(found[images] - clean[0][f"{name}/saved"][images]).max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_this_packages_loader_gives_the_same_embeddings_and_saves_them_again(saved, tmp_path, name):
    for kind in KINDS:
        model = e5v_st.load(saved[0] / name / kind, device="cpu")
        np.testing.assert_allclose(model.encode(reload.inputs()), saved[1][f"{name}/{kind}"], atol=2e-5)
    model.save_pretrained(str(tmp_path / "again"))
    files = ("processor_config.json", "sentence_bert_config.json", "chat_template.jinja")
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (saved[0] / name / "settings" / file).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_every_family_can_be_pickled(saved, name):
    """As it is for a pool of processes."""
    model = pickle.loads(pickle.dumps(e5v_st.load(saved[0] / name / "saved", device="cpu")))
    np.testing.assert_allclose(model.encode(reload.inputs()), saved[1][f"{name}/saved"], atol=2e-5)


def test_a_saved_model_says_which_family_it_is_of(saved):
    for name in NAMES:
        for kind in KINDS:
            file = saved[0] / name / kind / "config_sentence_transformers.json"
            assert json.loads(file.read_text())["e5v"] == {"family": name, "chat_format": ROWS[name].wrapper}


# ---- what is there for videos alone ----


def videos_of(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of videos, as the stock processor reads it."""
    return BaseVideoProcessor.get_video_processor_dict(str(folder))[0]


@pytest.mark.parametrize("name", [name for name in NAMES if families.family(name).video])
def test_a_saved_model_keeps_what_the_stock_processor_needs_for_videos(saved, name):
    file = "video_preprocessor_config.json"
    for kind in KINDS:
        content = json.loads((saved[0] / name / kind / file).read_text())
        assert content == json.loads((saved[0] / name / "base" / file).read_text()) == videos_of(saved[0] / name / kind)


@pytest.mark.parametrize("place", ["processor_config.json", "preprocessor_config.json", None])
def test_settings_for_videos_are_kept_wherever_a_checkpoint_has_them(saved, tmp_path, place):
    base = shutil.copytree(saved[0] / "qwen2_vl" / "base", tmp_path / "base")
    (base / "video_preprocessor_config.json").unlink()
    if place == "processor_config.json":
        part = {"video_processor": {"video_processor_type": "Qwen2VLVideoProcessor", "fps": 3}}
        (base / place).write_text(json.dumps({**json.loads((base / place).read_text()), **part}))
    elif place is None:  # for images it stands in the other file
        images = {"image_processor": json.loads((base / "preprocessor_config.json").read_text())}
        (base / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2VLProcessor", **images}))
        (base / "preprocessor_config.json").unlink()
    e5v_st.load(base, device="cpu").save_pretrained(str(tmp_path / "saved"))
    if place is None:
        assert not (tmp_path / "saved" / "video_preprocessor_config.json").exists()
    else:
        assert videos_of(tmp_path / "saved") == videos_of(base)


@pytest.mark.parametrize("name", ["llava", "gemma3", "mistral3"])
def test_a_family_without_videos_has_no_settings_for_them(saved, name):
    assert not (saved[0] / name / "saved" / "video_preprocessor_config.json").exists()


# ---- adapters that PEFT trained on the plain model ----

#: Families of different kinds -> what PEFT is told to train.
TARGETS: dict[str, dict[str, Any]] = {
    "qwen3_vl": {"target_modules": "all-linear"},
    "smolvlm-instruct": {"target_modules": ["q_proj", "v_proj"]},  # the vision model has these as well
    "gemma3": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "qwen3_5": {"target_modules": r".*\.(in_proj_\w+|out_proj|q_proj|gate_proj)"},
}


@pytest.mark.filterwarnings("ignore")  # of PEFT, about what it saves
@pytest.mark.parametrize("name", TARGETS)
def test_an_adapter_that_peft_saved_equals_peft(saved, tmp_path, name):
    base = saved[0] / name / "base"
    trained = get_peft_model(families.open_plain(base), LoraConfig(r=4, lora_alpha=8, **TARGETS[name]))
    torch.manual_seed(0)
    for weight in trained.parameters():
        if weight.requires_grad:
            weight.data += torch.randn_like(weight) * 0.05
    trained.save_pretrained(tmp_path)
    processor = open_processor(base, name)
    if ROWS[name].image_tokens:
        limit_image_tokens(processor, ROWS[name], ROWS[name].image_tokens)
    whole = PeftModel.from_pretrained(families.open_plain(base), tmp_path).eval()
    expected = families.reference(name, whole, processor, plain_items())
    found = e5v_st.load(base, adapter=tmp_path, device="cpu").encode(reload.inputs())
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert np.abs(found - saved[1][f"{name}/saved"]).max() > 1e-3


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_the_language_model_alone_is_put_on_one_of_another_name(saved, tmp_path):
    """Idefics 3 calls its language model ``text_model``."""
    base = saved[0] / "smolvlm-instruct" / "base"
    whole = families.open_plain(base)
    from transformers import LlamaForCausalLM

    alone = LlamaForCausalLM(whole.config.text_config)
    alone.model.load_state_dict(whole.model.text_model.state_dict())
    alone.lm_head.load_state_dict(whole.lm_head.state_dict())
    trained = get_peft_model(alone.eval(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(0)
    for name, weight in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    trained.save_pretrained(tmp_path)
    processor = open_processor(base, "smolvlm-instruct")
    texts = plain_items()[: len(reload.TEXTS)]
    expected = families.reference("smolvlm-instruct", _OnTokens(trained), processor, texts)
    found = e5v_st.load(base, adapter=tmp_path, device="cpu").encode(list(reload.TEXTS))
    np.testing.assert_allclose(found, expected, atol=2e-5)


class _OnTokens:
    """Calls a language model with nothing but tokens."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, **inputs: Any) -> Any:
        return self.model(input_ids=inputs["input_ids"], output_hidden_states=True)
