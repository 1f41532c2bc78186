"""What PEFT says of an adapter is what is embedded; what is not known to be so is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlamaForCausalLM, LlavaNextForConditionalGeneration, LlavaNextModel

import e5v_st
from e5v_st.model.prompts_e5v import PROMPTS, render

TEXT = "Two men play chess."
WEIGHTS = "adapter_model.safetensors"


def load_plain(base, kind):
    model = LlavaNextForConditionalGeneration.from_pretrained(base)
    if kind is LlavaNextForConditionalGeneration:
        return model
    if kind is LlavaNextModel:
        return model.model
    language_model = LlamaForCausalLM(model.config.text_config)
    language_model.model.load_state_dict(model.model.language_model.state_dict())
    return language_model


def save_adapter(base, kind, folder, **options):
    """Saves an adapter with random weights, as PEFT does."""
    model = get_peft_model(load_plain(base, kind), LoraConfig(**{"r": 4, "lora_alpha": 8, **options}))
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += torch.randn_like(weight) * 0.05
    model.save_pretrained(folder)
    return folder


def embed_plainly(model, base, pictures):
    """One by one, with plain transformers; a language model alone sees no image."""
    processor = AutoProcessor.from_pretrained(base)
    prompts = [(render(PROMPTS["text"], "llama3", TEXT), None)]
    if not isinstance(model.get_base_model(), LlamaForCausalLM):
        prompts.append((render(PROMPTS["image"], "llama3"), [Image.open(pictures[0]).convert("RGB")]))
    found = []
    for text, images in prompts:
        inputs = processor(text=[text], images=images, return_tensors="pt")
        with torch.inference_mode():
            state = model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
        found.append(torch.nn.functional.normalize(state, dim=0).numpy())
    return np.stack(found)


QV = {"target_modules": ["q_proj", "v_proj"]}
VARIANTS = {
    "a list that hits the tower too": QV,
    "all linear layers": {"target_modules": "all-linear"},
    "a regex": {"target_modules": r".*\.(q|up)_proj"},
    "what is excluded": {"target_modules": ["q_proj"], "exclude_modules": r".*vision.*"},
    "the projector": {"target_modules": ["linear_1", "linear_2"]},
    "a convolution": {"target_modules": ["patch_embedding"]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "lora_bias": {"target_modules": ["fc1", "q_proj"], "lora_bias": True},
    "bias of its layers": {"target_modules": ["fc1", "q_proj"], "bias": "lora_only"},
    "all biases": {"target_modules": ["q_proj"], "bias": "all"},
    "pissa": {**QV, "init_lora_weights": "pissa"},
    "olora": {**QV, "init_lora_weights": "olora"},
    "eva": {**QV, "init_lora_weights": "eva"},
    "orthogonal": {**QV, "init_lora_weights": "orthogonal"},
    "rank-stabilised": {**QV, "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "fc1"], "use_dora": True},
    "patterns": {
        **QV,
        "rank_pattern": {r"layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"language_model.layers.1.self_attn.q_proj": 32, "v_proj": 5},
    },
    "a norm whole": {**QV, "modules_to_save": ["norm"]},
    "the projector whole": {**QV, "modules_to_save": ["multi_modal_projector"]},
    "the tower whole": {"target_modules": ["o_proj"], "modules_to_save": ["vision_tower"]},
    "layers whole": {"target_modules": ["q_proj"], "layers_to_transform": [0], "modules_to_save": ["layers.1"]},
    "the embedding whole": {**QV, "modules_to_save": ["embed_tokens"]},
    "the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "tokens": {**QV, "trainable_token_indices": [1, 2, 40]},
}
OF_A_LANGUAGE_MODEL = {
    "a list": QV,
    "dora": {**QV, "use_dora": True},
    "patterns": {
        **QV,
        "rank_pattern": {"^model.layers.0.self_attn.v_proj": 3},
        "alpha_pattern": {"model.layers.1.self_attn.q_proj": 32},
    },
    "a norm whole": {**QV, "modules_to_save": ["model.norm"]},
    "tokens": {**QV, "trainable_token_indices": {"model.embed_tokens": [1, 2, 40]}},
    "the embedding": {"target_modules": ["embed_tokens"]},
}
CASES = [
    *(pytest.param(LlavaNextForConditionalGeneration, case, id=f"whole-{name}") for name, case in VARIANTS.items()),
    *(pytest.param(LlamaForCausalLM, case, id=f"language-{name}") for name, case in OF_A_LANGUAGE_MODEL.items()),
    pytest.param(LlavaNextModel, QV, id="model-a list"),
]


@pytest.mark.filterwarnings("ignore")  # of PEFT, about what it saves
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_an_adapter_equals_peft_and_still_does_after_saving_and_loading(base, pictures, tmp_path, kind, options):
    folder = save_adapter(base, kind, tmp_path / "adapter", **options)
    expected = embed_plainly(PeftModel.from_pretrained(load_plain(base, kind), folder).eval(), base, pictures)
    items = [TEXT, pictures[0]][: len(expected)]
    model = e5v_st.load(base, adapter=folder, device="cpu")
    np.testing.assert_allclose(model.encode(items), expected, atol=2e-5)
    assert np.abs(e5v_st.load(base, device="cpu").encode(items) - expected).max() > 1e-3

    model.save_pretrained(str(tmp_path / "saved"))
    np.testing.assert_allclose(e5v_st.load(tmp_path / "saved", device="cpu").encode(items), expected, atol=2e-5)


def test_a_dora_that_was_trained_here_loads_again(small, base, pictures, tmp_path):
    model = e5v_st.load(base, device="cpu")
    model.add_adapter(LoraConfig(r=4, use_dora=True, target_modules=["q_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    expected = model.encode([TEXT, pictures[0]])
    model.save_pretrained(str(tmp_path / "saved"))
    again = e5v_st.load(tmp_path / "saved", device="cpu")
    np.testing.assert_allclose(again.encode([TEXT, pictures[0]]), expected, atol=1e-6)


def change_settings(folder, **settings):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.fixture(scope="module")
def plain_adapter(base, tmp_path_factory):
    """An adapter's folder as PEFT writes it; do not change it."""
    return save_adapter(base, LlavaNextForConditionalGeneration, tmp_path_factory.mktemp("peft") / "adapter", **QV)


@pytest.fixture
def adapter(plain_adapter, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(plain_adapter, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alora_invocation_tokens", [1, 2]),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("target_parameters", ["up_proj.weight"]),
        ("use_qalora", True),
        ("fan_in_fan_out", True),
        ("kasa_config", {"beta": 1e-4}),
        ("a_field_of_tomorrow", 1),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
    ],
)
def test_a_field_that_is_not_known_is_refused_by_its_name(small, adapter, field, value):
    change_settings(adapter, **{field: value})
    with pytest.raises(ValueError, match=f"{field}="):
        e5v_st.load(small, adapter=adapter, device="cpu")


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        LoHaConfig(target_modules=["q_proj"]),
        PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_another_kind_of_adapter_is_refused_by_its_name(small, adapter, config):
    config.save_pretrained(adapter)
    with pytest.raises(ValueError, match=f"type '{config.peft_type.value}', only LoRA"):
        e5v_st.load(small, adapter=adapter, device="cpu")
    with pytest.raises(ValueError, match=f"type '{config.peft_type.value}', only LoRA"):
        e5v_st.load(adapter, device="cpu")


def change_weights(folder, change):
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


NAME = "base_model.model.model.language_model.layers.1.self_attn.q_proj"
DAMAGES = {
    "a weight of a layer that is not there": (
        lambda weights: weights.update({NAME.replace("layers.1", "layers.77") + ".lora_A.weight": torch.ones(4, 128)}),
        r"1 of its \d+ weights have no place in the model, .*layers\.77",
    ),
    "of the head": (
        lambda weights: weights.update({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 128)}),
        r"no place in the model, .*lm_head",
    ),
    "a weight that nothing names": (
        lambda weights: weights.update({"base_model.model.model.language_model.norm.weight": torch.ones(128)}),
        r"1 weights belong to nothing that its configuration names, language_model\.norm",
    ),
    "a half of a pair": (
        lambda weights: weights.pop(f"{NAME}.lora_B.weight"),
        r"1 weights are not in the file, .*layers\.1\.self_attn\.q_proj\.lora_B",
    ),
    "a shape": (
        lambda weights: weights.update({f"{NAME}.lora_B.weight": torch.ones(5, 4)}),
        r"does not fit: .*size mismatch",
    ),
    "two of a place": (
        lambda weights: weights.update({f"{NAME.replace('model.model', 'model')}.lora_B.weight": torch.ones(128, 4)}),
        "several weights for one place",
    ),
    "a value": (lambda weights: weights[f"{NAME}.lora_B.weight"].fill_(float("nan")), "NaN"),
    "nothing": (lambda weights: weights.clear(), "no weights"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGES.values(), ids=DAMAGES)
def test_an_adapter_of_which_a_weight_is_not_used_or_not_there_is_refused(small, adapter, change, message):
    change_weights(adapter, change)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        e5v_st.load(small, adapter=adapter, device="cpu")


def test_magnitudes_that_a_dora_lacks_are_refused(small, adapter):
    change_settings(adapter, use_dora=True)
    with pytest.raises(ValueError, match=r"are not in the file, .*lora_magnitude_vector"):
        e5v_st.load(small, adapter=adapter, device="cpu")


def test_a_folder_that_peft_wrote_says_to_use_adapter(small, adapter):
    change_settings(adapter, base_model_name_or_path=str(small))
    with pytest.raises(ValueError, match=r"adapter without the processor.*use adapter=, as e5v_st\.load\('.*small'"):
        e5v_st.load(adapter, device="cpu")
    change_settings(adapter, base_model_name_or_path="")
    with pytest.raises(ValueError, match="does not name its base: use adapter="):
        e5v_st.load(adapter, device="cpu")


def test_a_folder_with_an_adapter_and_a_model_is_refused(small, adapter):
    change_settings(adapter, base_model_name_or_path=str(small))
    for file in Path(small).iterdir():
        shutil.copyfile(file, adapter / file.name)
    (adapter / "processor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds both an adapter and a model"):
        e5v_st.load(adapter, device="cpu")


def test_a_second_adapter_is_refused(base, adapter, tmp_path):
    change_settings(adapter, base_model_name_or_path=str(base))
    saved = tmp_path / "saved"
    e5v_st.load(base, adapter=adapter, device="cpu").save_pretrained(str(saved))
    with pytest.raises(ValueError, match="this one has one"):
        e5v_st.load(saved, adapter=adapter, device="cpu")
    change_settings(saved, base_model_name_or_path=str(shutil.copytree(saved, tmp_path / "copy")))
    with pytest.raises(ValueError, match=r"the base .*copy is itself an adapter: merge"):
        e5v_st.load(saved, device="cpu")


@pytest.mark.parametrize(("content", "message"), [("{", "is not JSON"), ("[]", "holds a list, want the fields")])
def test_a_configuration_that_is_none_is_refused_by_its_file(small, adapter, content, message):
    (adapter / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"adapter_config\.json {message}"):
        e5v_st.load(small, adapter=adapter, device="cpu")


def test_weights_that_are_cut_off_are_refused_by_their_file(small, adapter):
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors cannot be read"):
        e5v_st.load(small, adapter=adapter, device="cpu")


def test_a_change_of_the_base_is_refused_where_that_is_quantised(small, adapter):
    change_settings(adapter, init_lora_weights="pissa")
    with pytest.raises(ValueError, match="init_lora_weights='pissa', which changes the base's weights, but these"):
        e5v_st.load(small, adapter=adapter, device="cpu", quantize="nf4")


def test_a_rank_that_is_not_that_of_the_weights_is_refused(small, adapter):
    change_settings(adapter, r=8)
    with pytest.raises(ValueError, match=r"r=8 for .*_proj, but its weights have the rank 4"):
        e5v_st.load(small, adapter=adapter, device="cpu")
    change_settings(adapter, r=4, rank_pattern={"layers.1.self_attn.q_proj": 2})
    with pytest.raises(ValueError, match=r"r=2 for .*layers\.1\.self_attn\.q_proj, but its weights have the rank 4"):
        e5v_st.load(small, adapter=adapter, device="cpu")


def test_what_is_saved_names_the_base_that_it_was_loaded_with(base, adapter, pictures, tmp_path):
    """Not the one that the adapter was trained on, if that is another."""
    other = shutil.copytree(base, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["language_model.model.norm.weight"] = torch.rand(128) + 0.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    change_settings(adapter, base_model_name_or_path=str(base))
    model = e5v_st.load(other, adapter=adapter, device="cpu")
    model.save_pretrained(str(tmp_path / "saved"))
    expected = model.encode([TEXT, pictures[0]])
    found = e5v_st.load(tmp_path / "saved", device="cpu").encode([TEXT, pictures[0]])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(e5v_st.load(base, adapter=adapter, device="cpu").encode([TEXT, pictures[0]]) - expected).max() > 1e-3
