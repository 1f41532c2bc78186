from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, LlavaNextForConditionalGeneration, LlavaNextProcessor

import e5v_st
from e5v_st.hub.convert_llava import convert_llava, new_name
from e5v_st.hub.tensors import write_tensors

# Name in LLaVA's own shards -> published name (load_llama3_hf.py)
NAMES = {
    "model.embed_tokens.weight": "language_model.model.embed_tokens.weight",
    "model.layers.31.self_attn.q_proj.weight": "language_model.model.layers.31.self_attn.q_proj.weight",
    "model.norm.weight": "language_model.model.norm.weight",
    "lm_head.weight": "language_model.lm_head.weight",
    "model.image_newline": "image_newline",
    "model.mm_projector.0.weight": "multi_modal_projector.linear_1.weight",
    "model.mm_projector.2.bias": "multi_modal_projector.linear_2.bias",
    "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight": "vision_tower.vision_model.pre_layrnorm.weight",
}


def test_names_are_mapped_as_the_published_script_does():
    assert {name: new_name(name) for name in NAMES} == NAMES


def llava_name(name):
    for published, own in (
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("vision_tower.", "model.vision_tower.vision_tower."),
        ("image_newline", "model.image_newline"),
    ):
        if name.startswith(published):
            return own + name.removeprefix(published)
    raise AssertionError(name)


@pytest.fixture
def published(small, tmp_path):
    """The small checkpoint, its vision tower with CLIP's 64 values per head, which LLaVA's files leave out."""
    folder = shutil.copytree(small, tmp_path / "published")
    config = json.loads((small / "config.json").read_text())
    config["vision_config"]["num_attention_heads"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def llava(small, tmp_path):
    """The small checkpoint as LLaVA's own code would have saved it, in shards."""
    folder = tmp_path / "llava"
    folder.mkdir()
    config = json.loads((small / "config.json").read_text())
    settings = {
        **config["text_config"],
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "image_grid_pinpoints": config["image_grid_pinpoints"],
        "image_aspect_ratio": "anyres",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_vision_select_layer": -2,
        "mm_projector_type": "mlp2x_gelu",
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(settings))
    weights = load_file(small / "model.safetensors")
    tensors = [(llava_name(key), tensor) for key, tensor in weights.items()]
    tensors.append(("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(16)))
    write_tensors(tensors, folder, shard_size=10**6)
    tokenizer = json.loads((small / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "<image>"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((small / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"].pop("1500")
    settings.update(eos_token="<|end_of_text|>", padding_side="right", model_max_length=8192)
    settings.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_converted_model_equals_the_published_one(llava, published, goldens, tmp_path):
    from PIL import Image

    converted = convert_llava(llava, tmp_path / "converted", shard_size=10**6)
    assert len(list(converted.glob("*.safetensors"))) > 3
    old = LlavaNextForConditionalGeneration.from_pretrained(published).eval()
    new, found = LlavaNextForConditionalGeneration.from_pretrained(converted, output_loading_info=True)
    assert not any(found[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    rows = new.get_input_embeddings().weight
    assert rows.shape[0] == 1501 == new.config.image_token_id + 1
    assert torch.equal(rows[:1500], old.get_input_embeddings().weight)

    processor = LlavaNextProcessor.from_pretrained(converted)
    image = Image.open(sorted((goldens / "images" / "small").iterdir())[0]).convert("RGB")
    inputs = processor(text=["<image>\nA dog."], images=[image], return_tensors="pt")
    old.resize_token_embeddings(1501, mean_resizing=False)
    with torch.inference_mode():
        expected, got = (model.eval()(**inputs).logits[..., :1500] for model in (old, new))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_configuration_and_tokenizer_are_those_of_the_published_conversion(llava, published, tmp_path):
    converted = convert_llava(llava, tmp_path / "converted")
    ours, theirs = AutoConfig.from_pretrained(converted), AutoConfig.from_pretrained(published)
    for name in ("hidden_size", "intermediate_size", "image_size", "patch_size", "num_hidden_layers"):
        assert getattr(ours.vision_config, name) == getattr(theirs.vision_config, name), name
    for name in ("rope_parameters", "rms_norm_eps", "num_key_value_heads", "max_position_embeddings"):
        assert getattr(ours.text_config, name) == getattr(theirs.text_config, name), name
    assert (ours.image_token_id, ours.image_grid_pinpoints) == (theirs.image_token_id, theirs.image_grid_pinpoints)
    assert (ours.vision_feature_layer, ours.tie_word_embeddings) == (-2, False)
    mine, published_one = AutoTokenizer.from_pretrained(converted), AutoTokenizer.from_pretrained(published)
    for name in ("padding_side", "pad_token", "eos_token", "bos_token"):
        assert getattr(mine, name) == getattr(published_one, name), name
    text = "<|start_header_id|>user<|end_header_id|>\n\n<image>\nA dog.<|eot_id|>"
    assert mine(text).input_ids == published_one(text).input_ids
    own, known = (json.loads((folder / "preprocessor_config.json").read_text()) for folder in (converted, published))
    assert {name: own.get(name) for name in known} == known


def test_a_converted_model_embeds(llava, published, tmp_path):
    converted = convert_llava(llava, tmp_path / "converted")
    items = ["A dog.", "A cat sits on a mat."]
    expected = e5v_st.load(published, device="cpu").encode(items)
    torch.testing.assert_close(e5v_st.load(converted, device="cpu").encode(items), expected, atol=1e-6, rtol=0)


def change(folder, what):
    for file in sorted(folder.glob("*.safetensors")):
        weights = load_file(file)
        what(weights)
        save_file(weights, file, metadata={"format": "pt"})


def lose_one(weights):
    weights.pop("model.layers.3.mlp.up_proj.weight", None)


def add_one(weights):
    if "model.norm.weight" in weights:
        weights["model.surplus.weight"] = torch.ones(2)


def bend_one(weights):
    if "model.norm.weight" in weights:
        weights["model.norm.weight"] = torch.ones(127)


def lose_tower(weights):
    for key in [key for key in weights if "vision" in key]:
        weights.pop(key)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lose_one, r"1 weights are missing \['language_model\.layers\.3\.mlp\.up_proj\.weight'\] and 0 are left over"),
        (add_one, r"0 weights are missing \[\] and 1 are left over \['language_model\.surplus\.weight'\]"),
        (bend_one, r"language_model\.norm\.weight has the shape \(127,\), want \(128,\)"),
        (lose_tower, "no vision tower"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_left(llava, tmp_path, what, message):
    change(llava, what)
    with pytest.raises(ValueError, match=message):
        convert_llava(llava, tmp_path / "converted")
    assert [file.name for file in tmp_path.iterdir()] == ["llava"]


def test_a_checkpoint_that_is_converted_already_is_refused(small, tmp_path):
    with pytest.raises(ValueError, match="got a 'llava_next' checkpoint"):
        convert_llava(small, tmp_path / "out")
