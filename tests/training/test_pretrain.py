from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch.nn import functional as F

from e5v_st.training.tiny.data import bag, load_data, mirror
from e5v_st.training.tiny.model import augment, build_model, image_tokens, last_states, normalised
from e5v_st.training.tiny.pretrain import train
from e5v_st.training.tiny.publish import export
from e5v_st.training.tiny.scoring import embed, open_plain, recalls
from e5v_st.training.tiny.settings import Settings
from e5v_st.training.tiny.step import TEMPERATURE, Trainer, learning_rate, match
from e5v_st.training.tiny.tokenizer import ROWS, train_tokenizer

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "tests" / "data" / "goldens" / "small"


@pytest.fixture(scope="module")
def data():
    return load_data()


@pytest.fixture(scope="module")
def tokenizer(data):
    return train_tokenizer(data)


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    """A model with random weights, and the folder it was written to."""
    folder = tmp_path_factory.mktemp("tiny")
    model = build_model(seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())  # so that writing in half precision loses nothing
    export(model, tokenizer, folder)
    return model.eval(), folder


@pytest.fixture(scope="module")
def plain(exported):
    return open_plain(exported[1])


def settings(folder, **changes):
    small = {"steps": 4, "warmup": 2, "triplets": 2, "singles": 2, "glosses": 2, "save_every": 2, "threads": 1}
    return Settings(output_dir=folder, **{**small, **changes})


def weights(folder):
    with safe_open(folder / "state.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def test_help_comes_without_torch():
    code = "import sys; sys.argv.append('--help')\nfrom e5v_st.training.tiny.pretrain import main\n"
    code += "try: main()\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "False"
    assert "--steps" in done.stdout


def test_training_data_holds_nothing_held_out(data):
    assert {row["split"] for row in data.rows} == {"train"}
    assert len(data.pixels) == len(data.rows)


@pytest.mark.parametrize(("prompt", "sentence"), [("image", ""), ("composed", "make it dark"), ("text", "a red apple")])
def test_the_forward_of_training_equals_plain_transformers(exported, plain, tokenizer, data, prompt, sentence):
    pixels = data.pixels[[0, 700, 1500]]
    images = [Image.fromarray(one.permute(1, 2, 0).numpy()) if prompt != "text" else None for one in pixels]
    wanted = embed(*plain, prompt, [(image, sentence) for image in images])
    from e5v_st.model.prompts_e5v import PROMPTS, render

    ids = tokenizer([render(PROMPTS[prompt], sentence=sentence)] * 3)["input_ids"]
    with torch.no_grad():
        sees = image_tokens(exported[0], normalised(pixels / 255)) if prompt != "text" else None
        found = F.normalize(last_states(exported[0], ids, sees), dim=-1)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)


def test_two_tiles_a_side_equal_plain_transformers(exported, plain, tokenizer, data):
    from e5v_st.model.prompts_e5v import PROMPTS, render

    image = Image.fromarray(data.pixels[5].permute(1, 2, 0).numpy()).resize((120, 120), Image.Resampling.BICUBIC)
    wanted = embed(*plain, "image", [(image, "")])
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    ids = tokenizer([render(PROMPTS["image"])])["input_ids"]
    with torch.no_grad():
        found = last_states(exported[0], ids, image_tokens(exported[0], normalised(pixels), grid=2))
    # The whole picture is made smaller here from floats and there from bytes.
    assert F.cosine_similarity(found, wanted).item() > 0.9999


def test_sentences_of_different_lengths_do_not_touch_each_other(exported, tokenizer):
    long, short = tokenizer(["a very long sentence about a red apple", "apple"])["input_ids"]
    with torch.no_grad():
        together = last_states(exported[0], [long, short])
        alone = last_states(exported[0], [short])
    torch.testing.assert_close(together[1:], alone, atol=2e-5, rtol=0)


def test_written_weights_have_the_published_names(exported):
    def names(path):
        with safe_open(path / "model.safetensors", "pt") as file:
            return {re.sub(r"\.\d+\.", ".N.", name) for name in file.keys()}  # noqa: SIM118 - not a mapping

    assert names(exported[1]) == names(PUBLISHED)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer_config.json"])
def test_written_configs_have_the_published_fields(exported, name):
    ours, published = (json.loads((folder / name).read_text()) for folder in (exported[1], PUBLISHED))
    assert ours.keys() == published.keys()
    if name == "config.json":
        assert ours["text_config"].keys() == published["text_config"].keys()
        assert ours["vision_config"].keys() == published["vision_config"].keys()
        assert ours["image_token_index"] == ours["text_config"]["vocab_size"]  # out of range by one, as published


def test_an_export_of_broken_weights_is_refused(tokenizer, tmp_path):
    model = build_model(seed=1)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e6  # not to be had in half precision
    with pytest.raises(ValueError, match="not finite"):
        export(model, tokenizer, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_control_tokens_and_image_have_their_ids(tokenizer):
    ids = tokenizer("<|start_header_id|>user<|end_header_id|>\n\n<image>A<|eot_id|>")["input_ids"]
    assert [ids[0], ids[1], ids[3], ids[-1]] == [0, 2, 3, 4]
    assert ROWS in ids
    assert tokenizer("Apple")["input_ids"] == tokenizer("apple")["input_ids"]


def test_a_stopped_run_that_goes_on_ends_with_the_same_weights(tmp_path, monkeypatch):
    train(settings(tmp_path / "whole"))
    losses = Trainer.losses

    def stop_at_three(self, step):
        if step == 3:
            raise KeyboardInterrupt
        return losses(self, step)

    monkeypatch.setattr(Trainer, "losses", stop_at_three)
    with pytest.raises(SystemExit, match="--resume"):
        train(settings(tmp_path / "halves"))
    monkeypatch.undo()
    train(settings(tmp_path / "halves", resume=True))
    whole, halves = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    assert whole.keys() == halves.keys()
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_another_seed_gives_other_weights(tmp_path):
    assert not torch.equal(build_model(0).lm_head.weight, build_model(1).lm_head.weight)


def test_resuming_from_nothing_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="leave out --resume"):
        train(settings(tmp_path, resume=True))


def test_a_bag_of_words_shares_its_weight_by_hand(tokenizer):
    found = bag(tokenizer, [(0.7, ["red apple"]), (0.3, ["the fruit"])])
    red, apple, fruit = (
        tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in ("red", "apple", "fruit")
    )
    assert sum(found[t] for t in red) == pytest.approx(0.35)
    assert sum(found[t] for t in apple) == pytest.approx(0.35)
    assert sum(found[t] for t in fruit) == pytest.approx(0.3)


def test_matching_loss_by_hand():
    queries, keys = torch.tensor([[2.0, 0.0]]), torch.tensor([[5.0, 0.0], [0.0, 1.0]])
    wanted = np.log(1 + np.exp(-1 / TEMPERATURE))
    assert match(queries, keys, torch.tensor([0])).item() == pytest.approx(wanted, abs=1e-6)


def test_a_tie_counts_against_the_model_and_nan_is_refused():
    scores = torch.tensor([[0.5, 0.5], [0.1, 0.9]])
    assert recalls(scores, [0, 1])["R@1"] == 50.0
    with pytest.raises(ValueError, match="not numbers"):
        recalls(torch.tensor([[float("nan")]]), [0])


def test_the_learning_rate_warms_up_and_ends_near_zero():
    run = Settings(steps=1000, warmup=100, lr=1.0)
    rates = [learning_rate(run, step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == rates[100] == 1.0
    assert rates[550] == pytest.approx(0.5)
    assert rates[-1] < 1e-5


def test_only_pictures_that_stay_the_same_are_mirrored():
    assert mirror("red apple")
    assert not any(map(mirror, ("backhand index pointing left", "flag: Kenya", "COOL button", "one o’clock")))


def test_augmentation_keeps_skin_tones_apart(data):
    rows = {(row["concept"], row["gender"], row["tone"]): i for i, row in enumerate(data.rows)}
    tones = [rows[key] for key in (("artist", "woman", tone) for tone in ("light", "medium", "dark")) if key in rows]
    assert len(tones) >= 2
    plain = data.pixels[tones].float().div(255).mean((1, 2, 3))
    moved = augment(data.pixels[tones], [True] * len(tones), torch.Generator().manual_seed(0)).mean((1, 2, 3))
    assert moved.argsort().tolist() == plain.argsort().tolist()
    torch.testing.assert_close(moved, plain, atol=0.12, rtol=0)
