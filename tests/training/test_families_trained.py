"""Every family is trained as LLaVA-NeXT is: on texts without a vision tower, and on batches with images."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import families
import many_runs
import numpy as np
import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from adapters import draw_adapter
from PIL import Image
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses

import e5v_st
from e5v_st.model.backbone_e5v import BACKBONES
from e5v_st.model.packing_e5v import packed_last_states
from e5v_st.model.prompts_e5v import PROMPTS
from e5v_st.training.collate import make_collator
from e5v_st.training.model import load_for_training
from e5v_st.training.recipes import RECIPES, Settings
from e5v_st.training.train_nli import main
from e5v_st.training.trainer import name_layers

NAMES = list(families.FAMILIES)
PACKED = [row.name for row in BACKBONES if row.packing and row.name in NAMES]
RANK, ALPHA = 4, 16
#: More tokens than a row of packed texts has, an empty text, and one that is longer than Gemma's window.
TEXTS = ["A dog.", "Two men play chess in a park.", "", "A cat standing in the snow. " * 9, "a", "<image>", "7 " * 90]
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
RECURRENT = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
#: Layers without the parts that all others have: three of Qwen 3.5 are recurrent, two of Gemma 4 share keys and values.
OTHER_LAYERS = {
    "qwen3_5": [RECURRENT + MLP] * 3 + [ATTENTION + MLP],
    "gemma4": [ATTENTION + MLP] * 2 + [("q_proj", "o_proj", *MLP)] * 2,
}


@pytest.fixture(scope="module")
def trainable(checkpoint) -> Callable[[str], Any]:
    """Loads a family's model for training on texts, once."""
    loaded: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name not in loaded:
            torch.manual_seed(0)
            loaded[name] = load_for_training(
                str(checkpoint(name)), bits=32, lora_r=RANK, lora_alpha=ALPHA, lora_dropout=0.0
            )
        return loaded[name]

    return load


def noise(seed: int, size: tuple[int, int] = (90, 70)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# ---- texts alone ----


@pytest.mark.parametrize("name", NAMES)
def test_the_language_model_alone_is_there_and_its_layers_alone_are_trained(trainable, name):
    model = trainable(name)[0].model
    (decoder,) = [part for part, module in model.named_children()]
    assert getattr(model, decoder) is model.get_decoder()
    assert list(model.parameters(recurse=False)) == []
    layers = OTHER_LAYERS.get(name, [ATTENTION + MLP] * families.TINY.layers)
    expected = {f"{decoder}.layers.{layer}.{part}" for layer, parts in enumerate(layers) for part in parts}
    found = {place.removesuffix(".lora_A") for place, _ in model.named_modules() if place.endswith(".lora_A")}
    parents = ("self_attn.", "linear_attn.", "mlp.")
    assert {_without(place, parents) for place in found} == expected
    assert all("lora_" in place for place, weight in model.named_parameters() if weight.requires_grad)


def _without(place: str, parents: Sequence[str]) -> str:
    for parent in parents:
        place = place.replace(parent, "")
    return place


@pytest.mark.parametrize("name", NAMES)
def test_an_untrained_adapter_changes_nothing_and_packed_texts_are_as_alone(trainable, checkpoint, name):
    model = trainable(name)
    alone = e5v_st.load(checkpoint(name), device="cpu").encode(
        [{"text": text} for text in TEXTS], batch_size=1, convert_to_tensor=True
    )
    model.train()
    features = model(model.preprocess([{"text": text} for text in TEXTS]))
    assert (features["sentence_embedding"] - alone).abs().max() <= 2e-5
    assert features["token_embeddings"].shape[1] == (1 if name in PACKED else features["input_ids"].shape[1])


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_positions_of_one_number_would_mix_packed_texts_of_qwen(trainable, checkpoint, name):
    model = trainable(name)
    alone = e5v_st.load(checkpoint(name), device="cpu").encode(TEXTS[:5], batch_size=1, convert_to_tensor=True)
    features = model.preprocess(TEXTS[:5])
    lengths = features["attention_mask"].sum(1).tolist()
    with torch.no_grad():
        states = packed_last_states(model[0].model.get_decoder(), features["input_ids"], lengths, packing=1)
    assert (torch.nn.functional.normalize(states[:, 0], dim=1) - alone).abs().max() > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_of_a_model_for_texts_is_that_of_the_whole_plain_model(checkpoint, tmp_path, name):
    """The reference: plain transformers with its head, the adapter's product added to its weights by hand."""
    folder = checkpoint(name)
    model = load_for_training(str(folder), bits=32, lora_r=RANK, lora_alpha=ALPHA, lora_dropout=0.0)
    draw_adapter(model)
    model.save_pretrained(str(tmp_path / "run"), create_model_card=False)
    image, texts = noise(0), ["A dog.", "Two men play chess in a park while it rains."]

    whole = e5v_st.load(folder, adapter=tmp_path / "run", device="cpu")
    found = whole.encode([*texts, image, {"image": image, "text": "is red"}], convert_to_tensor=True)
    own = model.eval().encode(texts, convert_to_tensor=True)
    assert (own - found[:2]).abs().max() <= 2e-5
    run = e5v_st.load(tmp_path / "run", device="cpu").encode([*texts, image], convert_to_tensor=True)
    assert (run - found[:3]).abs().max() <= 2e-5

    plain = families.open_plain(folder)
    add_adapter(plain, load_file(tmp_path / "run/adapter_model.safetensors"))
    items = [(PROMPTS["text"], text, []) for text in texts]
    items += [(PROMPTS["image"], None, [image]), (PROMPTS["composed"], "is red", [image])]
    expected = families.reference(name, plain, whole[0].processor, items)
    assert (found - expected).abs().max() <= 2e-5
    base = e5v_st.load(folder, device="cpu").encode([*texts, image], convert_to_tensor=True)
    assert (found[:3] - base).abs().amax(1).min() > 1e-2


@torch.no_grad()
def add_adapter(plain: Any, weights: dict[str, torch.Tensor]) -> None:
    own = dict(plain.named_parameters())
    for key, down in weights.items():
        if ".lora_A." in key:
            up = weights[key.replace(".lora_A.", ".lora_B.")]
            place = key.replace("base_model.model.", "model.", 1).replace(".lora_A.", ".")
            own[place] += up @ down * (ALPHA / RANK)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "smolvlm-instruct", "gemma4"])
@pytest.mark.parametrize(
    ("fault", "message"), [("missing", "the checkpoint has 1 missing"), ("nan", "are not all numbers")]
)
def test_missing_and_broken_weights_of_the_language_model_are_refused(checkpoint, tmp_path, name, fault, message):
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in checkpoint(name).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    key = next(key for key in weights if "visual" not in key and key.endswith("layers.1.mlp.up_proj.weight"))
    if fault == "missing":
        del weights[key]
    else:
        weights[key][0, 0] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_for_training(str(folder), bits=32)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "idefics3", "gemma3"])
def test_a_base_is_read_under_all_names_that_its_weights_may_have_and_the_towers_are_not_told_of(
    checkpoint, tmp_path, name, monkeypatch
):
    told: list[str] = []
    monkeypatch.setattr("logging.Logger.warning", lambda _, text, *__: told.append(text))
    model = e5v_st.load(checkpoint(name), device="cpu")
    expected = model.encode(["A dog."])
    model.save(str(tmp_path / "saved"))  # as the model without head calls them
    shutil.copytree(checkpoint(name), tmp_path / "today")  # as today's transformers does
    weights = families.open_plain(checkpoint(name)).state_dict()
    save_file({key: weight.clone() for key, weight in weights.items()}, tmp_path / "today/model.safetensors")
    for folder in (tmp_path / "saved", tmp_path / "today"):
        found = load_for_training(str(folder), bits=32, lora_r=RANK).eval().encode(["A dog."])
        assert abs(found - expected).max() <= 2e-5
    assert not [text for text in told if "UNEXPECTED" in text]


# ---- the script ----


@pytest.mark.parametrize("name", ["smolvlm-instruct", "qwen3_vl"])
def test_the_script_trains_a_family_and_gradient_caching_changes_nothing(recipe, checkpoint, tmp_path, name):
    flags = {"model": str(checkpoint(name)), "lora_dropout": 0.0, "optim": "sgd", "learning_rate": 0.1, "max_steps": 2}
    path = str(recipe(**flags, save_steps=2))
    assert main([path]) == 0
    cached = ["--mini_batch_size", "3", "--gradient_checkpointing", "--output_dir", str(tmp_path / "cached")]
    assert main([path, *cached]) == 0
    one, other = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("run", "cached"))
    assert one.keys() == other.keys()
    assert max((one[key] - other[key]).abs().max() for key in one) <= 1e-6
    assert all(one[key].abs().max() > 0 for key in one if "lora_B" in key)

    items = ["A dog.", noise(0)]
    found = e5v_st.load(tmp_path / "run", device="cpu").encode(items)
    whole = e5v_st.load(checkpoint(name), adapter=tmp_path / "run", device="cpu").encode(items)
    assert abs(found - whole).max() <= 2e-5
    assert abs(found - e5v_st.load(checkpoint(name), device="cpu").encode(items)).max() > 1e-4
    settings = json.loads((tmp_path / "run/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(checkpoint(name).resolve())


def test_a_run_of_a_family_is_continued_and_measured_on_images(recipe, checkpoint, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = str(recipe(model=str(checkpoint("qwen3_vl")), lora_dropout=0.2, max_steps=3))
    assert main([path]) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped/checkpoint-3")
    assert main([path, "--output_dir", str(tmp_path / "stopped"), "--resume"]) == 0
    one, other = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("run", "stopped"))
    assert all(torch.equal(one[key], other[key]) for key in one)

    for row in range(6):
        noise(row).save(tmp_path / f"{row}.png")
    rows = [{"image": f"{row}.png", "text": f"Number {row}."} for row in range(6)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "images.parquet")
    measured = ["--eval_images", str(tmp_path / "images.parquet"), "--output_dir", str(tmp_path / "measured")]
    assert main([path, *measured]) == 0
    scores = json.loads((tmp_path / "measured/evaluation.json").read_text())
    assert set(scores["after"]) == {"t2i_recall@1", "t2i_recall@5"}
    assert (
        load_file(tmp_path / "measured/adapter_model.safetensors").keys() == one.keys()
    )  # with the vision tower there


def test_the_quirks_of_the_published_run_are_those_of_its_backbones_alone(trainable):
    with pytest.raises(ValueError, match="released_quirks repeats the published run, which was on LLaVA-NeXT"):
        make_collator(trainable("qwen3_vl"), Settings(released_quirks=True))


# ---- batches with images ----

ROWS = 4


def column(*kinds: str, seed: int, word: str) -> list[Any]:
    """Items of some kinds in turn, images in several shapes."""
    made = []
    for row in range(ROWS):
        text, image = f"{word} number {row}" + " and one" * row, noise(seed + row, (60 + 40 * (row % 2), 60))
        item = {"text": {"text": text}, "image": image, "composed": {"image": image, "text": text}}
        made.append(item[kinds[row % len(kinds)]])
    return made


COLUMNS = {
    "image-text pairs": [column("text", seed=0, word="A red square"), column("image", seed=0, word="")],
    "composed triplets": [
        column("composed", seed=10, word="is red"),
        column("image", seed=20, word=""),
        column("composed", seed=30, word="is larger"),
    ],
    "mixed columns": [
        column("text", "image", seed=40, word="A dog"),
        column("composed", "text", "image", seed=50, word="is blue"),
        column("text", seed=60, word="No image"),
    ],
}


@pytest.fixture(scope="module")
def with_images(checkpoint) -> Callable[[str], Any]:
    """Loads a family's whole model for training, once; images are cut into tiles."""
    loaded: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name not in loaded:
            folder = str(checkpoint(name))
            loaded[name] = load_for_training(folder, bits=32, lora_r=RANK, lora_dropout=0.0, text_only=False)
            draw_adapter(loaded[name])
        return loaded[name].train()

    return load


def gradient(model: Any, value: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    value.backward()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(weight.grad is None for weight in model.parameters() if not weight.requires_grad)
    return torch.cat([weight.grad.flatten() for weight in trained.values()])


def plain_embeddings(name: str, model: Any, items: Sequence[Any]) -> torch.Tensor:
    """Embeds each item alone: the family's own processor, and the stock forward."""
    made, found = families.family(name), []
    for item in items:
        item = item if isinstance(item, dict) else {"image": item}
        kind = "composed" if len(item) == 2 else next(iter(item))
        string = made.wrapper.replace("{}", PROMPTS[kind]).replace("<image>", made.image)
        inputs = model[0].processor(
            text=[string.replace("<sent>", item.get("text", ""))],
            images=[[item["image"]]] if "image" in item else None,
            return_tensors="pt",
            add_special_tokens=made.adds_bos,
        )
        found.append(model[0].model(**inputs).last_hidden_state[0, -1])
    return torch.nn.functional.normalize(torch.stack(found), dim=-1)


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("name", ["qwen3_vl", "smolvlm-instruct", "gemma3", "internvl"])
def test_gradients_of_batches_with_images_are_those_of_plain_transformers(with_images, name, kind):
    model = with_images(name)

    def value(make: Any) -> torch.Tensor:
        return make(model)([model.preprocess(items) for items in COLUMNS[kind]], None)

    anchors, *others = [plain_embeddings(name, model, items) for items in COLUMNS[kind]]
    scores = 20 * anchors @ torch.cat(others).T
    expected = gradient(model, torch.nn.functional.cross_entropy(scores, torch.arange(ROWS)))
    assert expected.norm() > 0
    for make in (
        losses.MultipleNegativesRankingLoss,
        lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3),
        lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=1),
    ):
        assert (gradient(model, value(make)) - expected).norm() <= 1e-5 * expected.norm()


def test_smolvlm_is_trained_on_images_that_are_split(with_images):
    features = with_images("smolvlm-instruct").preprocess(COLUMNS["image-text pairs"][1])
    rows, tiles = features["by_sample_pixel_values_data"].shape[2:4]
    assert (rows, tiles > 1) == (1, True)


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3"])
def test_the_trainer_takes_images_and_caching_gives_the_same_weights(checkpoint, tmp_path, name):
    files = []
    for seed in range(8):
        files.append(str(tmp_path / f"{seed}.png"))
        noise(seed, (60 + 10 * seed, 60)).save(files[-1])
    for cached in (False, True):
        many_runs.train_images(str(checkpoint(name)), files, str(tmp_path / str(cached)), cached)
    one, other = (load_file(tmp_path / cached / "adapter_model.safetensors") for cached in ("False", "True"))
    assert max((one[key] - other[key]).abs().max() for key in one) <= 1e-5


# ---- with the weights spread over processes ----

#: Family -> the class of its language model's layers in transformers.
LAYERS = {
    "llava_next-mistral": "MistralDecoderLayer",
    "llava_next-qwen2": "Qwen2DecoderLayer",
    "llava_next-vicuna": "LlamaDecoderLayer",
    "llava": "LlamaDecoderLayer",
    "llava_onevision": "Qwen2DecoderLayer",
    "qwen2_vl": "Qwen2VLDecoderLayer",
    "qwen2_5_vl": "Qwen2_5_VLDecoderLayer",
    "qwen3_vl-thinking": "Qwen3VLTextDecoderLayer",
    "qwen3_vl": "Qwen3VLTextDecoderLayer",
    "qwen3_5": "Qwen3_5DecoderLayer",
    "smolvlm-instruct": "LlamaDecoderLayer",
    "idefics3": "LlamaDecoderLayer",
    "smolvlm": "LlamaDecoderLayer",
    "internvl": "Qwen2DecoderLayer",
    "gemma3": "Gemma3DecoderLayer",
    "gemma4": "Gemma4TextDecoderLayer",
    "mistral3": "MistralDecoderLayer",
}


def fsdp_arguments(folder: Path, **more: Any) -> Any:
    settings = {**json.loads((RECIPES / "fsdp2.json").read_text()), **more}
    return SentenceTransformerTrainingArguments(output_dir=str(folder), fsdp=True, fsdp_config=settings, use_cpu=True)


@pytest.mark.parametrize("name", NAMES)
def test_fsdp_gathers_the_layers_of_every_family_one_by_one(trainable, tmp_path, name):
    args, model = fsdp_arguments(tmp_path), trainable(name)
    name_layers(args, model)
    plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
    assert plugin.transformer_cls_names_to_wrap == [LAYERS[name]]
    chosen = [part for part in model.modules() if fsdp2_prepare_auto_wrap_policy(plugin, model)(part)]
    assert chosen == list(model[0].model.get_decoder().layers)


def test_classes_that_a_configuration_of_fsdp_names_stay(trainable, tmp_path):
    args = fsdp_arguments(tmp_path, transformer_layer_cls_to_wrap=["Gemma3MLP"])
    name_layers(args, trainable("gemma3"))
    assert args.fsdp_plugin_args["transformer_cls_names_to_wrap"] == "Gemma3MLP"
    by_size = fsdp_arguments(tmp_path, auto_wrap_policy="SIZE_BASED_WRAP", min_num_params=10)
    name_layers(by_size, trainable("gemma3"))
    assert "transformer_cls_names_to_wrap" not in by_size.fsdp_plugin_args
