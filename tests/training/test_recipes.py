"""Recipes, and where the value of an argument comes from."""

from __future__ import annotations

import json

import pytest

from e5v_st.training.recipes import RECIPES, read_arguments

FILES = sorted(RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recipe_can_be_read_and_has_the_papers_loss(path, tmp_path):
    settings, args = read_arguments([str(path), "--output_dir", str(tmp_path)])
    assert settings.temperature == 0.05
    assert settings.max_tokens == 32
    assert args.per_device_train_batch_size == settings.batch_size
    assert path.stem == "tiny" or settings.batch_size == 768


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

    settings = str(RECIPES / "fsdp2.json")
    flags = ["--bits", "16", "--gradient_checkpointing", "false", "--fsdp", "--fsdp_config", settings]
    _, args = read_arguments(["paper", "--output_dir", str(tmp_path), *flags])
    plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
    assert plugin.fsdp_version == 2
    assert plugin.activation_checkpointing
    layers = {type(module).__name__ for module in load_for_training(str(small), bits=16).modules()}
    assert set(plugin.transformer_cls_names_to_wrap) <= layers


def test_deepspeed_gets_from_the_recipe_what_the_recipe_decides():
    settings = json.loads((RECIPES / "deepspeed_zero2.json").read_text())
    assert settings["zero_optimization"]["stage"] == 2
    decided = ("gradient_clipping", "gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "train_batch_size")
    assert {settings[name] for name in decided} == {"auto"}
    assert settings["bf16"]["enabled"] == settings["fp16"]["enabled"] == "auto"
