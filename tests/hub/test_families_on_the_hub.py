"""Models of other families than LLaVA-NeXT: exported, merged and pushed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import families
import huggingface_hub as hf
import mteb
import numpy as np
import pytest
import torch
from hub_client import TOKEN
from mteb.results import TaskResult
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

import e5v_st
from e5v_st.fingerprint import digest_settings
from e5v_st.hub import reload
from e5v_st.hub.__main__ import main
from e5v_st.hub.add_st_files import add_st_files
from e5v_st.hub.export import export
from e5v_st.hub.merge import merge
from e5v_st.hub.push import push
from e5v_st.loading import lora_targets
from e5v_st.model.adapter_e5v import module_name, name_of_decoder
from e5v_st.model.backbone_e5v import BACKBONES
from e5v_st.model.prompts_e5v import PROMPTS, WRAPPERS
from e5v_st.model.upstream_e5v import import_processor
from e5v_st.mteb_tasks.models import make_meta

ROWS = {row.name: row for row in BACKBONES}
NATIVE = (
    "llava_next-mistral",
    "llava_next-vicuna",
    "llava_next-qwen2",
    "llava",
    "smolvlm-instruct",
    "idefics3",
    "gemma3",
)
REST = tuple(name for name in families.FAMILIES if name not in NATIVE)
#: Of different kinds: another name of the language model, three-dimensional positions, masks, recurrent layers.
MERGED = ("smolvlm-instruct", "qwen3_vl", "gemma3", "qwen3_5")


# ---- export ----


@pytest.mark.parametrize("name", families.FAMILIES)
def test_an_exported_checkpoint_of_every_family_keeps_its_files_and_gives_its_embeddings(checkpoint, tmp_path, name):
    base = checkpoint(name)
    out = export(base, tmp_path / "out")
    for file in base.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    expected = e5v_st.load(base, device="cpu").encode(reload.inputs())
    found = SentenceTransformer(str(out), trust_remote_code=True, device="cpu")
    assert type(found[0]).__name__ == "E5VTransformer"
    np.testing.assert_allclose(found.encode(reload.inputs()), expected, atol=1e-6)
    card = (out / "README.md").read_text()
    if ROWS[name].model_type != "llava_next":
        assert f"family `{name}` (`{ROWS[name].model_type}` in transformers)" in card
        assert json.dumps(WRAPPERS[ROWS[name].wrapper]) in card
        assert "Image layout" not in card


def many_items():
    """Template, text, images, and how sentence-transformers is given them."""
    red, green = Image.new("RGB", (90, 70), "red"), Image.new("RGB", (50, 130), "green")
    noise = reload.inputs()[len(reload.TEXTS)]
    two = {"role": "user", "content": [{"type": "image", "image": image} for image in (red, noise)]}
    return [
        *((PROMPTS["text"], text, [], text) for text in (*reload.TEXTS, "  two  spaces\n")),
        *((PROMPTS["image"], None, [image], image) for image in (red, green, noise)),
        (PROMPTS["composed"], "make it darker", [noise], {"image": noise, "text": "make it darker"}),
        (PROMPTS["image"], None, [red, noise], [two]),
    ]


@pytest.mark.parametrize("name", NATIVE)
def test_a_native_export_gives_the_embeddings_in_stock_sentence_transformers(checkpoint, tmp_path, name):
    base = shutil.copytree(checkpoint(name), tmp_path / "base")
    if ROWS[name].budget == "splitting":  # so large that the limit of image tokens has an effect
        change(base / "preprocessor_config.json", size={"longest_edge": 256})
    native = export(base, tmp_path / "native", native=True)
    assert not list(native.glob("*.py"))
    processor = AutoProcessor.from_pretrained(base)
    if ROWS[name].image_tokens:
        processor.image_processor.size = {"longest_edge": 192}  # 3 x 3 tiles and the whole image, of 4 tokens each
    *rows, (_, _, both, message) = many_items()
    plain = families.open_plain(base)
    expected = families.reference(name, plain, processor, [row[:3] for row in rows])
    items = [row[3] for row in rows]

    model = SentenceTransformer(str(native), device="cpu")
    assert type(model[0]) is Transformer
    np.testing.assert_allclose(model.encode(items), expected, atol=1e-5)
    np.testing.assert_allclose(model.encode(items, batch_size=2), expected, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([model.encode([item]) for item in items]), expected, atol=1e-5)
    for prompt in ("sts", "cirr-gallery"):
        item = "A dog." if prompt == "sts" else both[0]
        row = (PROMPTS[prompt], item if prompt == "sts" else None, [] if prompt == "sts" else [item])
        found = model.encode([item], prompt_name=prompt)
        np.testing.assert_allclose(found, families.reference(name, plain, processor, [row]), atol=1e-5)
    own = e5v_st.load(native, device="cpu")
    np.testing.assert_allclose(own.encode(items), expected, atol=1e-5)
    np.testing.assert_allclose(model.encode([message]), own.encode([{"image": both}]), atol=1e-5)


@pytest.mark.parametrize("name", ["smolvlm-instruct", "gemma3"])
def test_native_of_native_and_of_a_saved_model_are_the_same(checkpoint, tmp_path, name):
    native = export(checkpoint(name), tmp_path / "native", native=True)
    e5v_st.load(checkpoint(name), device="cpu").save_pretrained(str(tmp_path / "saved"))
    for source in (native, tmp_path / "saved"):
        again = export(source, tmp_path / f"of-{source.name}", native=True)
        for file in ("processor_config.json", "chat_template.jinja", "sentence_bert_config.json"):
            assert (again / file).read_bytes() == (native / file).read_bytes(), (source.name, file)


def test_the_limit_of_image_tokens_matters_to_a_native_export(checkpoint, tmp_path):
    """The comparison above would notice if it were left out."""
    base = shutil.copytree(checkpoint("smolvlm-instruct"), tmp_path / "base")
    change(base / "preprocessor_config.json", size={"longest_edge": 256})
    native = SentenceTransformer(str(export(base, tmp_path / "native", native=True)), device="cpu")
    image = many_items()[-1][2][1]
    limited = native.encode([image])
    native[0].processor.image_processor.size = {"longest_edge": 256}
    assert np.abs(native.encode([image]) - limited).max() > 1e-3


@pytest.mark.parametrize("name", REST)
def test_a_family_that_has_no_native_form_is_refused_with_the_reason_and_nothing_is_left(checkpoint, tmp_path, name):
    with pytest.raises(ValueError, match=rf"'{name}' model, whose processor .* needs torchvision.*leave out --native"):
        export(checkpoint(name), tmp_path / "out", native=True)
    assert not list(tmp_path.iterdir())


def test_what_a_familys_processor_needs_is_what_transformers_wants():
    for row in BACKBONES:
        videos = row.processor and "video_processor" in import_processor(row.processor).get_attributes()
        # Pixtral's module imports torchvision, without having a part for videos
        assert bool(row.extras) == bool(videos or row.name == "mistral3"), row.name


def test_a_maximum_of_image_tokens_needs_this_packages_code(checkpoint, tmp_path):
    model = e5v_st.load(checkpoint("smolvlm-instruct"), max_image_tokens=4, device="cpu")
    model.save_pretrained(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="max_image_tokens=4 needs this package's code: export without --native"):
        export(tmp_path / "saved", tmp_path / "native", native=True)
    exported = e5v_st.load(export(tmp_path / "saved", tmp_path / "out"), device="cpu")
    assert exported[0].max_image_tokens == 4
    np.testing.assert_allclose(exported.encode(reload.inputs()), model.encode(reload.inputs()), atol=1e-6)
    assert "An image takes about 4 tokens at most" in (tmp_path / "out" / "README.md").read_text()


def change(file, **settings):
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


# ---- merge ----


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory):
    """Returns an adapter with random weights that PEFT saved on the plain model of a family."""
    root = tmp_path_factory.mktemp("trained")

    def make(name):
        plain = families.open_plain(checkpoint(name))
        model = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, target_modules=r".*\.(q_proj|down_proj|out_proj)"))
        torch.manual_seed(0)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data += torch.randn_like(weight) * 0.05
        model.save_pretrained(root / name)
        return root / name

    return make


def test_a_published_model_of_others_keeps_its_words_exported_and_merged(checkpoint, trained, tmp_path, monkeypatch):
    """Its checkpoint lies by its published name below the working directory."""
    monkeypatch.chdir(tmp_path)
    name, other = "friedrichor/Unite-Base-Qwen2-VL-2B", "smolvlm-instruct"
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).symlink_to(checkpoint(other))
    adapter = trained(other)
    for made, how in ((export(name, "exported"), {}), (merge(adapter, "merged", base=name), {"adapter": adapter})):
        expected = e5v_st.load(name, device="cpu", **how).encode(reload.inputs())
        found = e5v_st.load(made, device="cpu")
        assert found[0].recipe == "unite"
        np.testing.assert_allclose(found.encode(reload.inputs()), expected, atol=2e-5)
        with pytest.raises(ValueError, match="recipe='unite' needs this package's code: export without --native"):
            export(made, "native", native=True)


@pytest.mark.parametrize("name", MERGED)
def test_a_merge_equals_the_adapter_on_its_base_and_loads_in_plain_transformers(checkpoint, trained, tmp_path, name):
    base, adapter = checkpoint(name), trained(name)
    merged = merge(adapter, tmp_path / "merged", base=base, shard_size=100_000)
    assert len(list(merged.glob("*.safetensors"))) > 1
    expected = e5v_st.load(base, adapter=adapter, device="cpu").encode(reload.inputs())
    for load in (e5v_st.load, lambda folder, **how: SentenceTransformer(str(folder), trust_remote_code=True, **how)):
        np.testing.assert_allclose(load(merged, device="cpu").encode(reload.inputs()), expected, atol=2e-5)
    assert np.abs(e5v_st.load(base, device="cpu").encode(reload.inputs()) - expected).max() > 1e-3
    model, found = AutoModelForImageTextToText.from_pretrained(merged, output_loading_info=True)
    assert not any(found[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    head = families.open_plain(base).get_output_embeddings().weight
    assert torch.equal(model.get_output_embeddings().weight, head)
    kept = {file.name for file in base.iterdir()} - {"model.safetensors"}
    assert {file for file in kept if (merged / file).read_bytes() != (base / file).read_bytes()} == set()


@pytest.mark.parametrize("name", ["smolvlm-instruct", "gemma3"])
def test_a_native_merge_gives_the_same_in_stock_sentence_transformers(checkpoint, trained, tmp_path, name):
    base, adapter = checkpoint(name), trained(name)
    native = SentenceTransformer(str(merge(adapter, tmp_path / "native", base=base, native=True)), device="cpu")
    expected = e5v_st.load(base, adapter=adapter, device="cpu").encode(reload.inputs())
    np.testing.assert_allclose(native.encode(reload.inputs()), expected, atol=2e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"native": True}, "'qwen3_vl' model, whose processor in transformers needs torchvision"),
        ({"keys": "current"}, "keys='current', but only weights of LLaVA-NeXT have other names"),
    ],
)
def test_what_a_family_has_not_is_refused_before_anything_is_merged(checkpoint, trained, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        merge(trained("qwen3_vl"), tmp_path / "out", base=checkpoint("qwen3_vl"), **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_weight_in_the_files_of_a_family_is_known_by_its_name_in_the_model(checkpoint, name):
    """So a merge finds the weight of every module that an adapter may be on."""
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(checkpoint(name)))
    with safe_open(checkpoint(name) / "model.safetensors", "pt") as file:
        found = {module_name(key, name_of_decoder(model)) for key in file.keys()}  # noqa: SIM118
    assert {each for each, _ in model.named_parameters()} <= found


# ---- push ----

# Loads models by their ids as anybody would; saves their embeddings of reload.py's inputs
CLEAN = """
import importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("reload", sys.argv[1])
reload = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reload)
np.savez(sys.argv[2], **{repo: reload.load(repo, own=False).encode(reload.inputs()) for repo in sys.argv[3:]})
"""


@pytest.fixture
def unchecked(monkeypatch):
    """Leaves out the reload before a push, which other tests are about."""
    monkeypatch.setattr("e5v_st.hub.push.check_reload", lambda folder, staged: None)


def add_lora(model):
    """Puts a random LoRA on a model."""
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=lora_targets(model[0])))
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)


@pytest.fixture
def run(checkpoint, tmp_path):
    """A run's folder: a LoRA of a SmolVLM."""
    model = e5v_st.load(checkpoint("smolvlm-instruct"), max_image_tokens=4, device="cpu")
    add_lora(model)
    model.save_pretrained(str(tmp_path / "run"))
    return tmp_path / "run"


def test_an_adapter_and_a_merged_model_of_smolvlm_are_pushed_and_load_elsewhere(
    server, unchecked, run, checkpoint, tmp_path
):
    server.add_repo("you/smolvlm", checkpoint("smolvlm-instruct"))
    repos = ("me/smolvlm-lora", "me/smolvlm-e5v")
    assert main(["push", str(run), "--repo", repos[0], "--base", "you/smolvlm", "--license", "apache-2.0"]) == 0
    push(merge(run, tmp_path / "merged", base="you/smolvlm"), repos[1], license="apache-2.0")

    env = {**os.environ, **server.env(tmp_path / "clean", token=TOKEN), "E5V_AUTOLOAD": "0"}
    command = [sys.executable, "-P", "-c", CLEAN, reload.__file__, str(tmp_path / "found.npz"), *repos]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "found.npz")
    expected = e5v_st.load(run, device="cpu").encode(reload.inputs())
    np.testing.assert_allclose(found[repos[0]], expected, atol=1e-6)
    np.testing.assert_allclose(found[repos[1]], expected, atol=2e-5)

    for repo, relation in zip(repos, ("adapter", "finetune"), strict=True):
        card = hf.ModelCard(server.files(repo)["README.md"].decode())
        assert (card.data.license, card.data.base_model) == ("apache-2.0", "you/smolvlm")
        assert card.data.base_model_relation == relation
        text = " ".join(card.text.split())
        assert "Of the family `smolvlm-instruct` (`idefics3` in transformers)" in text
        assert f"chat format `smolvlm`: `{json.dumps(WRAPPERS['smolvlm'])}`" in text
        assert "An image takes about 4 tokens at most; `model[0].max_image_tokens` chooses another" in text


def test_results_of_a_run_of_another_family_go_on_its_card(server, unchecked, run, tmp_path):
    scores = {"main_score": 0.5, "hf_subset": "default", "languages": ["eng-Latn"]}
    result = TaskResult.from_task_results(mteb.get_task("E5VSTS12"), {"test": {"default": scores}}, 1.0)
    mteb.ResultCache(tmp_path / "results").save_to_cache(result, make_meta(str(run)))
    push(run, "me/smolvlm-lora", base="you/smolvlm", results=tmp_path / "results", license="mit")
    card = hf.ModelCard(server.files("me/smolvlm-lora")["README.md"].decode())
    assert [(each.dataset_type, each.metric_value) for each in card.data.eval_results] == [("E5VSTS12", 0.5)]


def test_a_pull_request_makes_a_plain_checkpoint_of_another_family_load(server, unchecked, checkpoint, monkeypatch):
    monkeypatch.setattr("e5v_st.hub.add_st_files.check_reload", lambda folder, staged: None)
    base = checkpoint("smolvlm-instruct")
    server.add_repo("you/smolvlm", base)
    add_st_files("you/smolvlm")
    model = SentenceTransformer("you/smolvlm", revision="refs/pr/1", trust_remote_code=True, device="cpu")
    expected = e5v_st.load(base, device="cpu").encode(reload.inputs())
    np.testing.assert_allclose(model.encode(reload.inputs()), expected, atol=1e-6)


# ---- a model of a type that no family is for ----


@pytest.fixture(scope="module")
def unknown(tmp_path_factory):
    """A checkpoint, it saved as it is, and it saved with an adapter."""
    root = tmp_path_factory.mktemp("unknown")
    base = families.save_unknown(root / "base")
    model = e5v_st.load(base, backbone="generic", chat_format="<s>USER: {} ASSISTANT:", device="cpu")
    model.save_pretrained(str(root / "saved"))
    add_lora(model)
    model.save_pretrained(str(root / "run"))
    return root


def test_a_model_loaded_as_generic_is_exported_and_pushed_with_what_it_was_loaded_with(
    unknown, unchecked, tmp_path, capsys
):
    rows, base = many_items()[:-1], unknown / "base"
    plain, processor = families.open_plain(base), AutoProcessor.from_pretrained(base)
    expected = families.reference("llava", plain, processor, [row[:3] for row in rows])
    out = export(unknown / "saved", tmp_path / "out")
    for folder in (unknown / "saved", out):
        found = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
        np.testing.assert_allclose(found.encode([row[3] for row in rows]), expected, atol=2e-5)
    assert main(["push", str(out), "--repo", "me/vip", "--dry-run"]) == 0
    assert "would be uploaded to me/vip" in capsys.readouterr().out
    card = " ".join((out / "README.md").read_text().split())
    assert "(`vipllava` in transformers), loaded as `generic`. Prompts stand in the chat format" in card
    assert json.dumps("<s>USER: {} ASSISTANT:") in card
    assert "Image layout" not in card


def test_an_adapter_of_a_model_loaded_as_generic_is_merged(unknown, tmp_path):
    merged = merge(unknown / "run", tmp_path / "merged", base=unknown / "base")
    expected = e5v_st.load(unknown / "run", device="cpu").encode(reload.inputs())
    np.testing.assert_allclose(e5v_st.load(merged, device="cpu").encode(reload.inputs()), expected, atol=2e-5)
    assert np.abs(expected - e5v_st.load(unknown / "saved", device="cpu").encode(reload.inputs())).max() > 1e-3


def test_what_a_model_loaded_as_generic_cannot_be_is_refused_in_one_line(unknown, tmp_path):
    for write, source in ((export, unknown / "saved"), (merge, unknown / "run")):
        more = {"base": unknown / "base"} if write is merge else {}
        with pytest.raises(ValueError, match="is loaded as 'generic', which needs this package's code: leave out --na"):
            write(source, tmp_path / "native", native=True, **more)
    with pytest.raises(ValueError, match=r"is a 'vipllava' checkpoint, .*backbone=\"generic\" tries"):
        export(unknown / "base", tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ---- what tells models apart ----


def test_a_chat_template_that_tells_families_apart_is_part_of_a_models_digest(checkpoint, tmp_path):
    """A Qwen3-VL that thinks is known by its chat template alone."""
    base = shutil.copytree(checkpoint("qwen3_vl-thinking"), tmp_path / "base")
    before = digest_settings([base])
    (base / "chat_template.jinja").unlink()
    assert e5v_st.load(base, device="cpu")[0].backbone.name == "qwen3_vl"
    assert digest_settings([base]) != before
