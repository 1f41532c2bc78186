from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hub_client import contents
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlavaNextForConditionalGeneration

import e5v_st
from e5v_st.hub.__main__ import main
from e5v_st.hub.keys import plain, rename
from e5v_st.hub.merge import merge

WEIGHTS = "model.safetensors"
TEXTS = ["A dog sits in the grass.", "", "Two men play chess."]


@pytest.fixture(scope="module")
def pictures(goldens):
    return sorted(map(str, (goldens / "images" / "small").glob("*.png")))[:3]


def encode(model, pictures):
    return model.encode([*TEXTS, *pictures, {"image": pictures[0], "text": "is red"}])


def test_the_published_scripts_adapter_merges_to_its_own_published_merge(small, goldens, tmp_path):
    numbers = np.load(goldens / "training.npz")
    merged = merge(goldens / "legacy_adapter", tmp_path / "merged", base=small)
    model = e5v_st.load(merged, image_layout="paper", device="cpu")
    texts = [{"text": str(text)} for text in numbers["texts"]]
    images = [str(goldens / "images" / "small" / str(file)) for file in numbers["files"]]
    np.testing.assert_allclose(model.encode(texts), numbers["merged_text"], atol=2e-5)
    np.testing.assert_allclose(model.encode(images), numbers["merged_image"], atol=2e-5)


VARIANTS = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {r"layers\.1\..*q_proj": 2}, "alpha_pattern": {r"layers\.2\..*": 32}},
    "the tower too": {"target_modules": ["q_proj", "linear_1"]},
    "olora": {"init_lora_weights": "olora"},
    "pissa": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_a_merged_model_equals_its_adapter_on_its_base(make_adapter, small, pictures, tmp_path, options):
    run = make_adapter(tmp_path / "run", **options)
    merged = merge(run, tmp_path / "merged")
    base = e5v_st.load(small, device="cpu")
    PeftModel.from_pretrained(base[0].model, run)  # changes the model in place
    expected = encode(base, pictures)
    found = encode(e5v_st.load(merged, device="cpu"), pictures)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected - encode(e5v_st.load(small, device="cpu"), pictures)).max() > 1e-2


def test_the_custom_and_the_native_merge_load_in_sentence_transformers(adapter, pictures, tmp_path):
    from sentence_transformers import SentenceTransformer

    expected = encode(e5v_st.load(adapter, device="cpu"), pictures)
    custom = SentenceTransformer(str(merge(adapter, tmp_path / "a")), trust_remote_code=True, device="cpu")
    native = SentenceTransformer(str(merge(adapter, tmp_path / "b", native=True)), device="cpu")
    np.testing.assert_allclose(encode(custom, pictures), expected, atol=1e-5)
    np.testing.assert_allclose(encode(native, pictures), expected, atol=1e-5)


@pytest.mark.parametrize("keys", ["published", "current"])
def test_key_names_are_as_asked_for_and_the_head_stays(adapter, small, tmp_path, keys):
    merged = merge(adapter, tmp_path / "merged", keys=keys, shard_size=10**6)
    base = load_file(small / "model.safetensors")
    shards = [load_file(file) for file in merged.glob("*.safetensors")]
    assert len(shards) > 3
    weights = {key: tensor for shard in shards for key, tensor in shard.items()}
    model, found = LlavaNextForConditionalGeneration.from_pretrained(merged, output_loading_info=True)
    assert not any(found[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert weights.keys() == (base.keys() if keys == "published" else model.state_dict().keys())
    head = base["language_model.lm_head.weight"]
    assert torch.equal(model.lm_head.weight[: len(head)], head)
    assert torch.equal(
        model.model.vision_tower.embeddings.class_embedding,
        base["vision_tower.vision_model.embeddings.class_embedding"],
    )


def test_names_of_every_age_are_one():
    ages = {
        "language_model.model.layers.0.mlp.up_proj.weight": "model.language_model.layers.0.mlp.up_proj.weight",
        "language_model.lm_head.weight": "lm_head.weight",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias": "model.vision_tower.encoder.layers.0.mlp.fc1.bias",
        "multi_modal_projector.linear_1.bias": "model.multi_modal_projector.linear_1.bias",
        "image_newline": "model.image_newline",
    }
    for published, current in ages.items():
        assert plain(published) == plain(current) == plain(plain(current))
        assert rename(current, "published") == rename(published, "published") == published
        assert rename(published, "current") == rename(current, "current") == current


def test_the_base_is_taken_at_the_revision_that_is_named(server, adapter, small, tmp_path):
    commit = server.add_repo("you/base", small)
    weights = {key: weight * 2 if "norm" in key else weight for key, weight in load_file(small / WEIGHTS).items()}
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    server.add_repo("you/base", {**contents(small), WEIGHTS: (tmp_path / WEIGHTS).read_bytes()})
    expected = load_file(merge(adapter, tmp_path / "a", base=small) / WEIGHTS)
    assert_equal(load_file(merge(adapter, tmp_path / "b", base=f"you/base@{commit}") / WEIGHTS), expected)
    named = shutil.copytree(adapter, tmp_path / "named")
    settings = json.loads((named / "adapter_config.json").read_text())
    settings |= {"base_model_name_or_path": "you/base", "revision": commit}
    (named / "adapter_config.json").write_text(json.dumps(settings))
    assert_equal(load_file(merge(named, tmp_path / "c") / WEIGHTS), expected)
    texts = e5v_st.load(tmp_path / "c", device="cpu").encode(TEXTS)
    np.testing.assert_allclose(e5v_st.load(named, device="cpu").encode(TEXTS), texts, atol=1e-5)
    with pytest.raises(AssertionError):
        assert_equal(load_file(merge(adapter, tmp_path / "d", base="you/base") / WEIGHTS), expected)
    with pytest.raises(ValueError, match=r"there is no you/base \(revision nope\)"):
        merge(adapter, tmp_path / "e", base="you/base@nope")


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def test_what_is_no_adapter_is_named_before_its_weights_are_downloaded(server, small, tmp_path):
    server.add_repo("royokong/e5-v", small)
    with pytest.raises(ValueError, match="royokong/e5-v is not an adapter"):
        merge("royokong/e5-v", tmp_path / "out")
    assert not [path for method, path in server.requests if method == "GET" and path.endswith(WEIGHTS)]


def test_a_merge_whose_push_fails_says_where_the_model_is(server, adapter, small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("e5v_st.hub.push.check_reload", lambda folder, staged: None)
    words = ["merge", str(adapter), "--base", str(small), "--push", "you/e5v", "--out"]
    assert main([*words, str(tmp_path / "merged")]) == 1
    said = capsys.readouterr().err
    assert "may not write to you/e5v" in said
    assert f"the merged model is in {tmp_path / 'merged'}, `push` uploads it" in said
    assert main(["merge", str(adapter), "--base", str(small), "--push", "no-user", "--out", str(tmp_path / "x")]) == 1
    assert not (tmp_path / "x").exists()


def test_half_precision_stays_and_is_rounded_once(adapter, small, tmp_path):
    base = shutil.copytree(small, tmp_path / "half")
    weights = {key: tensor.bfloat16() for key, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    merged = load_file(merge(adapter, tmp_path / "merged", base=base) / "model.safetensors")
    key = "language_model.layers.2.self_attn.q_proj"
    lora = load_file(adapter / "adapter_model.safetensors")
    down, up = (lora[f"base_model.model.{key}.lora_{part}.weight"] for part in "AB")
    name = "language_model.model.layers.2.self_attn.q_proj.weight"
    expected = weights[name].double() + 8 / 4 * up.double() @ down.double()
    assert merged[name].dtype == torch.bfloat16
    off = (merged[name].double() - expected).abs() / expected.abs().clamp(min=1e-3)
    assert off.max() <= 2**-8 * 1.001  # half a unit in the last place


def test_the_layout_that_the_adapter_was_trained_in_is_kept(make_adapter, tmp_path):
    run = make_adapter(tmp_path / "run", image_layout="paper")
    merged = merge(run, tmp_path / "merged")
    assert json.loads((merged / "sentence_bert_config.json").read_text())["image_layout"] == "paper"


def test_an_adapter_that_takes_strings_for_texts_does_so_merged(make_adapter, tmp_path):
    run = make_adapter(tmp_path / "run")
    settings = json.loads((run / "sentence_bert_config.json").read_text())
    (run / "sentence_bert_config.json").write_text(json.dumps({**settings, "strings": "text"}))
    merged = merge(run, tmp_path / "merged")
    assert json.loads((merged / "sentence_bert_config.json").read_text())["strings"] == "text"


# ---- memory ----

MEASURE = """
import resource, sys, hub.merge, peft, transformers, sentence_transformers
from pathlib import Path
from e5v_st.hub.tensors import read_tensors, write_tensors
from e5v_st.hub.merge import add_adapter, read_adapter
parts, config = read_adapter(Path(sys.argv[2]))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
files = sorted(Path(sys.argv[1]).glob("*.safetensors"))
write_tensors(add_adapter(read_tensors(files[:1]), {}, config), Path(sys.argv[4]), 20_000_000)
before = peak()
write_tensors(add_adapter(read_tensors(files), parts, config), Path(sys.argv[3]), 20_000_000)
print((peak() - before) * 1024)
"""


def test_memory_holds_shards_and_never_the_model(tmp_path):
    """160 MB of weights in shards of 20 MB, every one of them with an adapter."""
    from peft import LoraConfig

    folders = [tmp_path / name for name in ("base", "adapter", "out", "warm-up")]
    for folder in folders:
        folder.mkdir()
    names = [f"language_model.layers.{n}.mlp.up_proj" for n in range(40)]
    for start in range(0, 40, 5):
        shard = {f"{name}.weight": torch.ones(1000, 1000) for name in names[start : start + 5]}
        save_file(shard, tmp_path / "base" / f"model-{start:02}.safetensors")
    lora = {
        f"base_model.model.{name}.lora_{part}.weight": torch.ones((1, 1000) if part == "A" else (1000, 1))
        for name in names
        for part in "AB"
    }
    save_file(lora, tmp_path / "adapter" / "adapter_model.safetensors")
    LoraConfig(r=1, lora_alpha=1, target_modules=["up_proj"]).save_pretrained(tmp_path / "adapter")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, folders)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 3 * 20_000_000
    sums = [tensor[0, 0].item() for f in (tmp_path / "out").glob("*.safetensors") for tensor in load_file(f).values()]
    assert sums == [2.0] * 40


# ---- what is refused ----


def change_settings(run, **settings):
    file = run / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def rename_weights(run, old, new):
    weights = load_file(run / "adapter_model.safetensors")
    save_file({key.replace(old, new): value for key, value in weights.items()}, run / "adapter_model.safetensors")


def lose_half(run):
    weights = load_file(run / "adapter_model.safetensors")
    save_file({key: value for key, value in weights.items() if "lora_B" not in key}, run / "adapter_model.safetensors")


def spoil(run):
    weights = load_file(run / "adapter_model.safetensors")
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, run / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: change_settings(run, base_model_name_or_path=""), "name it with --base"),
        (lambda run: change_settings(run, base_model_name_or_path="runs/x/y"), "no file or folder runs/x/y"),
        (
            lambda run: rename_weights(run, "layers.1.", "layers.77."),
            r"does not fit its base: .*layers\.77.*7 like this",
        ),
        (lambda run: rename_weights(run, ".lora_A.weight", ".weight"), "not LoRA's"),
        (lambda run: (run / "adapter_model.safetensors").rename(run / "adapter_model.bin"), "pickles are not read"),
        (lose_half, "do not fit its configuration"),
        (spoil, "NaN"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused_and_nothing_is_left(run, tmp_path, damage, message):
    damage(run)
    with pytest.raises(ValueError, match=message):
        merge(run, tmp_path / "merged")
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_bias": True}, "lora_bias=True"),
        ({"modules_to_save": ["norm"]}, r"not LoRA's of a linear layer.*norm"),
        ({"target_modules": ["embed_tokens"]}, r"not LoRA's of a linear layer.*embed_tokens"),
        ({"target_modules": ["patch_embedding"]}, "patch_embedding, which is not a linear layer"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of PEFT
def test_what_is_not_a_linear_layers_is_not_merged(make_adapter, tmp_path, options, message):
    run = make_adapter(tmp_path / "run", **options)
    with pytest.raises(ValueError, match=message):
        merge(run, tmp_path / "merged")
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(("field", "value"), [("alora_invocation_tokens", [1]), ("init_lora_weights", "loftq")])
def test_a_field_that_is_not_known_is_not_merged(run, tmp_path, field, value):
    change_settings(run, **{field: value})
    with pytest.raises(ValueError, match=f"{field}="):
        merge(run, tmp_path / "merged")


def test_patterns_of_a_language_models_adapter_are_merged(small, goldens, tmp_path):
    run = shutil.copytree(goldens / "legacy_adapter", tmp_path / "run")
    change_settings(run, alpha_pattern={"^model.layers.0.self_attn.q_proj": 3}, base_model_name_or_path=str(small))
    lora = load_file(run / "adapter_model.safetensors")
    up, down = (lora[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight"] for part in "BA")
    key = "language_model.model.layers.0.self_attn.q_proj.weight"
    expected = load_file(small / WEIGHTS)[key].double() + 3 / len(down) * up.double() @ down.double()
    found = load_file(merge(run, tmp_path / "merged") / WEIGHTS)[key]
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)


def test_another_kind_of_adapter_is_refused(run, tmp_path):
    from peft import IA3Config

    IA3Config().save_pretrained(run)
    with pytest.raises(ValueError, match="type 'IA3', only LoRA"):
        merge(run, tmp_path / "merged", base="x/y")


def test_an_adapter_by_id_is_saved_with_the_commit_of_the_base_that_it_was_put_on(server, adapter, small, tmp_path):
    commit = server.add_repo("you/base", small)
    server.add_repo("me/lora", adapter)
    model = e5v_st.load("you/base", adapter="me/lora", device="cpu", cache_folder=str(tmp_path / "cache"))
    assert (tmp_path / "cache" / "models--me--lora").is_dir()
    model.save_pretrained(str(tmp_path / "saved"))
    settings = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("you/base", commit)
    again = e5v_st.load(tmp_path / "saved", device="cpu")
    np.testing.assert_allclose(again.encode(TEXTS), model.encode(TEXTS), atol=1e-6)
