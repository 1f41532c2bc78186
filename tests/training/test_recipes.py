"""Recipes, and where the value of an argument comes from."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from e5v_st.training import recipes
from e5v_st.training.losses import kind_of
from e5v_st.training.recipes import MACHINES, RECIPES, read_arguments
from e5v_st.training.sources import read_sources

FILES = sorted(RECIPES.glob("*.yaml"))


#: Temperature and batch of recipes that do not have the paper's.
OTHERS = {"tiny": (0.05, 128), "tiny_second_stage": (0.05, 64), "lamra_style": (0.05, 576), "lco_style": (0.03, 1056)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recipe_can_be_read_and_has_the_papers_loss(path, tmp_path):
    settings, args = read_arguments([str(path), "--output_dir", str(tmp_path)])
    assert settings.max_tokens == 32
    assert args.per_device_train_batch_size == settings.batch_size
    assert (settings.temperature, settings.batch_size) == OTHERS.get(path.stem, (0.05, 768))
    sources = read_sources(settings.train) if settings.train else []
    for source in sources:
        assert not kind_of(source.loss or settings.loss, path.stem).labelled


def test_a_flag_overrules_the_recipe_which_overrules_the_papers(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("temperature: 0.1\nlora_r: 8\nwarmup_steps: 7\nlearning_rate: 1e-3")
    flags = ["--lora_r", "2", "--learning_rate=2e-4", "--output_dir", str(tmp_path)]
    settings, args = read_arguments([str(path), *flags])
    assert (settings.temperature, settings.lora_r, settings.lora_alpha) == (0.1, 2, 16)
    assert (args.learning_rate, args.warmup_steps, args.num_train_epochs) == (2e-4, 7, 2)


@pytest.mark.parametrize("flags", [["--lerning_rate", "1"], ["--fsdp_", "x"], ["stray"]])
def test_a_word_that_is_not_an_argument_is_refused(tmp_path, flags):
    with pytest.raises(ValueError, match=f"got {' '.join(flags)}, which is neither"):
        read_arguments(["tiny", "--output_dir", str(tmp_path), *flags])


def test_the_papers_recipe_is_the_papers(tmp_path):
    settings, args = read_arguments(["paper", "--output_dir", str(tmp_path)])
    assert (settings.lora_r, settings.lora_alpha, settings.lora_dropout, settings.bits) == (64, 16, 0.05, 4)
    assert (args.learning_rate, args.num_train_epochs, args.warmup_steps) == (4e-4, 2, 100)
    assert (args.lr_scheduler_type, args.gradient_checkpointing, args.save_steps) == ("linear", True, 50)


def test_the_batch_of_a_process_is_its_share(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "7")
    with pytest.raises(ValueError, match="768 cannot be split over 7"):
        read_arguments(["paper", "--output_dir", str(tmp_path)])


def test_the_settings_for_fsdp_are_what_the_engine_takes_and_name_the_layers(tmp_path, small):
    from accelerate import FullyShardedDataParallelPlugin

    from e5v_st.training.model import load_for_training
    from e5v_st.training.trainer import name_layers

    settings = str(RECIPES / "fsdp2.json")
    flags = ["--bits", "16", "--gradient_checkpointing", "false", "--fsdp", "--fsdp_config", settings]
    _, args = read_arguments(["paper", "--output_dir", str(tmp_path), *flags])
    model = load_for_training(str(small), bits=16)
    name_layers(args, model)
    plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
    assert plugin.fsdp_version == 2
    assert plugin.activation_checkpointing
    assert plugin.transformer_cls_names_to_wrap == ["LlamaDecoderLayer"]
    layers = {type(module).__name__ for module in model.modules()}
    assert set(plugin.transformer_cls_names_to_wrap) <= layers


def test_deepspeed_gets_from_the_recipe_what_the_recipe_decides():
    settings = json.loads((RECIPES / "deepspeed_zero2.json").read_text())
    assert settings["zero_optimization"]["stage"] == 2
    decided = ("gradient_clipping", "gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "train_batch_size")
    assert {settings[name] for name in decided} == {"auto"}
    assert settings["bf16"]["enabled"] == settings["fp16"]["enabled"] == "auto"


#: Recipe -> family of its base, rows of a part on a GPU of 24 GiB and on one of 80.
OF_FAMILIES = {
    "smolvlm_256m": ("smolvlm-instruct", 384, 768),
    "smolvlm_500m": ("smolvlm-instruct", 384, 768),
    "qwen3_vl_2b": ("qwen3_vl", 96, 384),
    "qwen2_5_vl_3b": ("qwen2_5_vl", 96, 384),
    "gemma3_4b": ("gemma3", 64, 256),
}


@pytest.mark.parametrize("name", OF_FAMILIES)
@pytest.mark.parametrize("gib", [0, 24, 80])
def test_a_recipe_is_chosen_by_its_name_with_the_sizes_of_this_machine(name, gib, tmp_path, monkeypatch, capsys):
    from e5v_st.backbones import EXAMPLES

    family, small_gpu, large_gpu = OF_FAMILIES[name]
    properties = SimpleNamespace(name="a GPU", total_memory=gib * 2**30)
    monkeypatch.setattr(recipes, "find_machine", lambda: recipes.machine_of(properties if gib else None))
    settings, args = read_arguments([name, "--output_dir", str(tmp_path)])
    assert settings.model.split("/")[0] == EXAMPLES[family].checkpoint.split("/")[0]
    assert settings.mini_batch_size == {0: 8, 24: small_gpu, 80: large_gpu}[gib]
    assert args.max_steps == (-1 if gib else 30)
    assert (args.learning_rate, args.lr_scheduler_type, args.warmup_steps) == (2e-4, "cosine", 0.03)
    assert settings.lora_alpha == (128 if "qwen" in name else 16)
    assert f"{name}: " in capsys.readouterr().err


def test_a_flag_overrules_the_sizes_of_this_machine(tmp_path):
    settings, _ = read_arguments(["smolvlm_500m", "--mini_batch_size", "5", "--output_dir", str(tmp_path)])
    assert settings.mini_batch_size == 5


@pytest.mark.parametrize("sizes", [{"laptop": {"bits": 4}}, {"cpu": 4}, [1]])
def test_sizes_for_what_is_not_a_machine_are_refused(tmp_path, sizes):
    (tmp_path / "mine.yaml").write_text(json.dumps({"machines": sizes}))
    with pytest.raises(ValueError, match="want arguments for some of cpu, 24gb, 80gb"):
        read_arguments([str(tmp_path / "mine.yaml"), "--output_dir", str(tmp_path)])


def test_sizes_for_this_machine_that_are_not_arguments_are_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text(json.dumps({"machines": {name: {"lerning_rate": 1} for name in MACHINES}}))
    with pytest.raises(ValueError, match="names lerning_rate"):
        read_arguments([str(tmp_path / "mine.yaml"), "--output_dir", str(tmp_path)])
