from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import e5v_st
from e5v_st.model.adapter_e5v import module_name


@pytest.fixture
def copy(small, tmp_path):
    """A copy of the small checkpoint to break."""
    return shutil.copytree(small, tmp_path / "copy")


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_missing_embedding_row_is_added_and_the_others_stay(model, small):
    published = load_file(small / "model.safetensors")["language_model.model.embed_tokens.weight"]
    rows = model[0].model.get_input_embeddings().weight.detach()
    assert rows.shape[0] == published.shape[0] + 1 == model[0].config.image_token_id + 1
    assert torch.equal(rows[:-1], published)


def test_loading_warns_of_nothing(small, caplog, capfd):
    from transformers.utils import logging as transformers_logging

    transformers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        e5v_st.load(small, device="cpu").encode(["A dog."])
    transformers_logging.disable_propagation()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert "UNEXPECTED" not in capfd.readouterr().err


def test_the_dtype_is_the_checkpoints_and_can_be_overridden(small, copy):
    change_weights(copy, lambda weights: weights.update({name: w.half() for name, w in weights.items()}))
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**settings, "torch_dtype": "float16"}))
    assert e5v_st.load(copy, device="cpu").dtype == torch.float16
    assert e5v_st.load(copy, device="cpu", model_kwargs={"dtype": torch.float32}).dtype == torch.float32
    assert e5v_st.load(small, device="cpu").dtype == torch.float32


def test_arguments_by_their_old_names_are_taken(small):
    dtype = {"torch_dtype": torch.bfloat16}
    found = e5v_st.load(small, device="cpu", model_kwargs=dtype, tokenizer_kwargs={"model_max_length": 77})
    assert found.dtype == torch.bfloat16
    assert found.tokenizer.model_max_length == 77
    assert dtype == {"torch_dtype": torch.bfloat16}
    assert e5v_st.load("e5v-tiny", device="cpu", model_kwargs={"torch_dtype": "bfloat16"}).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_kwargs": {"torch_dtype": "float16", "dtype": "float32"}}, "got torch_dtype and dtype"),
        ({"tokenizer_kwargs": {"a": 1}, "processor_kwargs": {"b": 2}}, "got tokenizer_kwargs and processor_kwargs"),
        ({"backend": "onnx"}, "backend='onnx', but E5-V runs in torch alone"),
        ({"revision": "v1"}, "the revision 'v1' of .*, which is a path: only hub ids have revisions"),
    ],
)
def test_arguments_that_would_do_nothing_are_refused(small, arguments, message):
    for path in (small, "e5v-tiny"):
        with pytest.raises(ValueError, match=message):
            e5v_st.load(path, device="cpu", **arguments)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory, small):
    """A checkpoint of the kind of llava-hf/llava-v1.6-mistral-7b-hf: another tokenizer, room for the image token."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import (
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessorPil,
        LlavaNextProcessor,
        MistralConfig,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("mistral")
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=list("[]INST/abcdefgh▁"))
    lines = ["a dog sits in the grass", "Summary above sentence in one word:", "[INST] [/INST]"]
    backend.train_from_iterator(lines, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    settings = json.loads((small / "config.json").read_text())
    text = MistralConfig(
        vocab_size=len(tokenizer) + 7,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=None,
    )
    config = LlavaNextConfig(
        vision_config=settings["vision_config"],
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=settings["image_grid_pinpoints"],
    )
    torch.manual_seed(0)
    LlavaNextForConditionalGeneration(config).eval().save_pretrained(folder)
    image_processor = LlavaNextImageProcessorPil.from_pretrained(small)
    LlavaNextProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


def test_a_mistral_checkpoint_gets_its_own_wrapper_and_equals_plain_transformers(mistral, pictures):
    from PIL import Image
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    model = e5v_st.load(mistral, device="cpu")
    assert model[0].wrapper == "mistral"
    found = model.encode(["a dog", pictures[0], {"image": pictures[0], "text": "a <image>"}, {"text": ""}])

    plain = LlavaNextForConditionalGeneration.from_pretrained(mistral).eval()
    settings = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = AutoProcessor.from_pretrained(mistral, **settings)
    image = Image.open(pictures[0]).convert("RGB")
    prompts = ["a dog\nSummary above sentence in one word: ", "<image>\nSummary above image in one word: "]
    for row, (prompt, images) in enumerate(zip(prompts, (None, [image]), strict=True)):
        inputs = processor(text=[f"[INST] {prompt} [/INST]"], images=images, return_tensors="pt")
        with torch.inference_mode():
            state = plain(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
        expected = torch.nn.functional.normalize(state, dim=0)
        np.testing.assert_allclose(found[row], expected, atol=1e-6)
    assert np.isfinite(found).all()


def test_another_architecture_is_refused(tmp_path):
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'bert' checkpoint, E5-V wants one of the model types gemma3, .*llava_next"):
        e5v_st.load(tmp_path)


def test_a_backbone_without_prompts_is_refused(copy):
    tokenizer = (copy / "tokenizer.json").read_text().replace("<|start_header_id|>", "<|header|>")
    (copy / "tokenizer.json").write_text(tokenizer)
    settings = (copy / "tokenizer_config.json").read_text().replace("<|start_header_id|>", "<|header|>")
    (copy / "tokenizer_config.json").write_text(settings)
    with pytest.raises(
        ValueError, match="no chat format for this 'llava_next' with a 'llama' language model: llava_next-llama3 wants"
    ):
        e5v_st.load(copy, device="cpu")


def test_missing_weights_are_refused_by_name(copy):
    change_weights(copy, lambda weights: weights.pop("language_model.model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"missing keys: .*layers\.1\.mlp\.up_proj"):
        e5v_st.load(copy, device="cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_numbers_are_refused_by_name(copy, value):
    change_weights(copy, lambda weights: weights["multi_modal_projector.linear_1.bias"][3:4].fill_(value))
    with pytest.raises(ValueError, match=r"multi_modal_projector\.linear_1\.bias are not all numbers"):
        e5v_st.load(copy, device="cpu")


def test_code_in_a_repository_is_not_run(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    mark = tmp_path / "was run"
    for name in ("modeling_evil.py", "modeling_e5v.py", "evil.py", "setup.py", "sitecustomize.py"):
        (copy / name).write_text(f"open({str(mark)!r}, 'w')\n")
    planted = {
        "config.json": {name: f"modeling_evil.{name}" for name in ("AutoConfig", "AutoModel", "AutoProcessor")},
        "tokenizer_config.json": {"AutoTokenizer": ["modeling_evil.Slow", "modeling_evil.Fast"]},
        "preprocessor_config.json": {"AutoImageProcessor": "evil.Images", "AutoProcessor": "evil.Processor"},
    }
    for name, entry in planted.items():
        settings = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps({**settings, "auto_map": entry}))
    found = e5v_st.load(copy, device="cpu").encode("A dog.")
    assert np.isfinite(found).all()
    assert not mark.exists()


def test_a_pickle_is_refused(copy):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        e5v_st.load(copy, device="cpu")


# ---- adapters ----


@pytest.mark.parametrize("layout", ["paper"])
def test_an_adapter_of_the_published_script_equals_its_published_merge(small, goldens, layout):
    numbers = np.load(goldens / "training.npz")
    model = e5v_st.load(small, adapter=goldens / "legacy_adapter", image_layout=layout, device="cpu")
    texts = [{"text": str(text)} for text in numbers["texts"]]
    images = [str(goldens / "images" / "small" / str(file)) for file in numbers["files"]]
    np.testing.assert_allclose(model.encode(texts), numbers["merged_text"], atol=2e-5)
    np.testing.assert_allclose(model.encode(images), numbers["merged_image"], atol=2e-5)


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.model.layers.3.mlp.up_proj.lora_A.weight",
        "base_model.model.model.language_model.layers.3.mlp.up_proj.lora_A.weight",
        "base_model.model.language_model.model.layers.3.mlp.up_proj.lora_A.weight",
        "base_model.model.language_model.layers.3.mlp.up_proj.lora_A.weight",
    ],
)
def test_adapter_keys_of_every_age_are_mapped(key):
    name = key.removeprefix("base_model.model.")
    assert module_name(name) == "language_model.layers.3.mlp.up_proj.lora_A.weight"


def test_an_adapter_of_another_model_is_refused(small, goldens, tmp_path):
    folder = shutil.copytree(goldens / "legacy_adapter", tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    renamed = {key.replace("layers.1.", "layers.77."): value for key, value in weights.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit: .*layers\.77"):
        e5v_st.load(small, adapter=folder, device="cpu")


def test_a_folder_without_an_adapter_is_refused(small, tmp_path):
    with pytest.raises(ValueError, match=r"is not an adapter that can be loaded: adapter_config\.json"):
        e5v_st.load(small, adapter=tmp_path, device="cpu")


# ---- words ----


def test_words_are_the_heads_own_top_tokens(model, small, pictures):
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    plain = LlavaNextForConditionalGeneration.from_pretrained(small).eval()
    text = e5v_st.model.prompts_e5v.render(e5v_st.PROMPTS["text"], "llama3", "A dog.")
    tokenizer = AutoProcessor.from_pretrained(small).tokenizer
    with torch.inference_mode():
        logits = plain(**tokenizer(text, return_tensors="pt")).logits[0, -1]
    expected = [tokenizer.decode([i], clean_up_tokenization_spaces=False).strip() for i in logits.topk(4).indices]
    found = e5v_st.words(model, ["A dog.", pictures[0]], k=4)
    assert found[0] == expected
    assert len(found[1]) == 4
    with pytest.raises(ValueError, match="k=0"):
        e5v_st.words(model, ["A dog."], k=0)


def test_words_say_so_when_the_head_is_gone(model, tmp_path):
    model.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="without its language model head"):
        e5v_st.words(e5v_st.load(tmp_path, device="cpu"), ["A dog."])


@pytest.mark.parametrize("items", ["a dog", {"image": "dog.png", "text": "red"}, b"dog"])
def test_words_of_a_single_item_are_refused(model, items):
    with pytest.raises(TypeError, match="got a single item"):
        e5v_st.words(model, items)


def test_words_of_no_items_are_none(model):
    assert e5v_st.words(model, []) == e5v_st.words(model, iter([])) == []


def test_words_are_read_with_the_head_of_the_revision_that_was_loaded(copy, small, tmp_path):
    change_weights(copy, lambda weights: weights["language_model.lm_head.weight"].neg_())
    cache = tmp_path / "cache" / "models--me--e5v"
    for commit, folder in (("a" * 40, small), ("b" * 40, copy)):
        shutil.copytree(folder, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a" * 40)
    found = e5v_st.load("me/e5v", revision="b" * 40, cache_folder=str(tmp_path / "cache"), device="cpu")
    expected = e5v_st.words(e5v_st.load(copy, device="cpu"), ["A dog."])
    assert e5v_st.words(found, ["A dog."]) == expected
    assert expected != e5v_st.words(e5v_st.load(small, device="cpu"), ["A dog."])


@pytest.mark.parametrize("share", [True, False], ids=["sharing", "plain"])
def test_an_embedding_on_the_disk_gives_the_published_numbers(small, goldens, tmp_path, share):
    where = {"device_map": "auto", "max_memory": {"cpu": "2MB"}, "offload_folder": str(tmp_path / "offloaded")}
    offloaded = e5v_st.load(small, model_kwargs=where)
    offloaded[0].share_prefixes = share
    assert offloaded[0].model.hf_device_map["language_model"] == "disk"
    numbers = np.load(goldens / "small.upstream.npz")
    images = [str(goldens / "images" / "small" / file) for file in numbers["files"]]
    np.testing.assert_allclose(offloaded.encode(images), numbers["image"], atol=2e-5)
    texts = [{"text": str(text)} for text in numbers["texts"]]
    np.testing.assert_allclose(offloaded.encode(texts), numbers["text"], atol=2e-5)


def test_what_cannot_be_offloaded_is_refused_in_one_line(small, goldens, tmp_path):
    where = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "offloaded")}
    with pytest.raises(ValueError, match="the device_map offloads image_newline"):
        e5v_st.load(small, model_kwargs=where)
    where |= {"device_map": "auto", "max_memory": {"cpu": "2MB"}}
    with pytest.raises(ValueError, match="no adapter can be put on a model whose device_map offloads weights"):
        e5v_st.load(small, model_kwargs=where, adapter=goldens / "legacy_adapter")
