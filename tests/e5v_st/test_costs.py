"""Counted tokens against those that models really take, sizes from statistics, and the plan of a job."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
from PIL import Image

import e5v_st
from e5v_st import costs
from e5v_st.cli import main
from e5v_st.costs import SAMPLE, Amount, Layers, find_counter, measure, shapes_of, sizes_of
from e5v_st.model.prompts_e5v import PROMPTS

SIZES = [(40, 90), (60, 90), (100, 64), (333, 500)]


def picture(size, seed=0):
    dice = np.random.default_rng(seed)
    return Image.fromarray(dice.integers(0, 255, (*size, 3), dtype=np.uint8))


def taken(model, items, prompt):
    """Tokens that the model's own preprocessing makes."""
    return int(model[0].preprocess(items, prompt=PROMPTS[prompt])["attention_mask"].sum())


@pytest.mark.parametrize("layout", ["upstream", "paper"])
@pytest.mark.parametrize("checkpoint_name", ["small", "realgrid"])
def test_tokens_of_images_are_exact_where_sizes_are_known(request, checkpoint_name, layout):
    folder = request.getfixturevalue(checkpoint_name)
    model = e5v_st.load(folder, device="cpu", image_layout=layout)
    counter = find_counter(str(folder), image_layout=layout)
    assert (counter.layout, counter.exact) == (layout, True)
    for prompt in ("image", "cirr-gallery"):
        amount = counter.count(PROMPTS[prompt], len(SIZES), shapes=sizes_of(SIZES))
        expected = taken(model, [picture(size) for size in SIZES], prompt)
        assert amount.tokens == pytest.approx(expected, abs=len(SIZES))  # the image's place is one token
        assert amount.images == len(SIZES)


@pytest.mark.parametrize("name", ["qwen3_vl", "smolvlm-instruct", "gemma3", "internvl", "llava_onevision"])
def test_tokens_of_other_families_are_within_a_tenth(checkpoint, name):
    model = e5v_st.load(checkpoint(name), device="cpu")
    counter = find_counter(str(checkpoint(name)))
    assert (counter.family, counter.layout) == (name, "")
    images = [picture(size) for size in SIZES]
    amount = counter.count(PROMPTS["image"], len(SIZES), shapes=sizes_of(SIZES))
    assert amount.tokens == pytest.approx(taken(model, images, "image"), rel=0.1)
    texts = list(SAMPLE)
    mean = sum(map(len, texts)) / len(texts)
    amount = counter.count(PROMPTS["text"], len(texts), characters=mean)
    assert amount.tokens == pytest.approx(taken(model, texts, "text"), rel=0.1)


def test_e5v_is_known_without_its_files(llama3):
    """Against Llama 3's own tokenizer, and the published image sizes."""
    from e5v_st.model.prompts_e5v import render

    counter = find_counter("royokong/e5-v")
    for prompt in ("text", "image", "composed"):
        own = len(llama3(render(PROMPTS[prompt], "llama3")).input_ids)
        assert counter.frame(PROMPTS[prompt]) == pytest.approx(own, rel=0.15)
    assert counter.image(400, 800)[0] == 1759 - 7  # with its frame, the published code's 1759
    assert find_counter("royokong/e5-v", image_layout="paper").image(400, 800)[0] < 1000
    assert find_counter("me/unknown").about.startswith("me/unknown is not on this machine")


@pytest.mark.parametrize(
    "language", ["eng-Latn", "deu-Latn", "rus-Cyrl", "jpn-Jpan", "zho-Hans", "kor-Hang", "hin-Deva", "ara-Arab"]
)
def test_characters_of_a_token_are_about_those_of_llama_3(llama3, language):
    texts = {
        "eng-Latn": "A small bird sits on the branch of a tree and looks at the camera.",
        "deu-Latn": "Ein kleiner Vogel sitzt auf dem Ast eines Baumes und schaut in die Kamera.",
        "rus-Cyrl": "Маленькая птица сидит на ветке дерева и смотрит в камеру.",
        "jpn-Jpan": "小さな鳥が木の枝にとまってカメラを見ている。",
        "zho-Hans": "一只小鸟站在树枝上看着镜头。",
        "kor-Hang": "작은 새가 나뭇가지에 앉아 카메라를 바라보고 있다.",
        "hin-Deva": "एक छोटी चिड़िया पेड़ की डाल पर बैठी है और कैमरे की ओर देख रही है।",
        "ara-Arab": "طائر صغير يجلس على غصن شجرة وينظر إلى الكاميرا.",
    }
    text = texts[language]
    own = len(text) / len(llama3(" " + text, add_special_tokens=False).input_ids)
    assert costs.characters_of(language) == pytest.approx(own, rel=0.35)


def statistics(sizes):
    """What mteb says of images."""
    found = {}
    for side, own in zip(("height", "width"), zip(*sizes, strict=True), strict=True):
        found |= {f"min_image_{side}": min(own), f"max_image_{side}": max(own)}
        found[f"average_image_{side}"] = sum(own) / len(own)
    return found


def test_sizes_are_exact_where_all_images_have_one():
    assert shapes_of(statistics([(448, 448)] * 5)) == [(448, 448, 1.0)]


def test_photographs_with_one_longer_side_are_told_upright_from_flat():
    """Flickr30K's sizes in their usual shares: tokens from averages alone are within a tenth."""
    sizes = [(333, 500)] * 45 + [(375, 500)] * 25 + [(500, 333)] * 18 + [(500, 375)] * 12
    shapes = shapes_of(statistics(sizes))
    assert sum(share for *_, share in shapes) == pytest.approx(1)
    assert sum(share for height, width, share in shapes if height > width) == pytest.approx(0.3, abs=0.05)
    counter = find_counter("royokong/e5-v")
    exact = np.mean([counter.image(*size)[0] for size in sizes])
    planned = sum(counter.image(height, width)[0] * share for height, width, share in shapes)
    assert planned == pytest.approx(exact, rel=0.1)


def test_other_images_lie_around_their_average():
    dice = np.random.default_rng(0)
    sizes = [(int(h), int(w)) for h, w in dice.normal((600, 800), (60, 80), (500, 2))]
    shapes = shapes_of(statistics(sizes))
    counter = find_counter("royokong/e5-v")
    exact = np.mean([counter.image(*size)[0] for size in sizes])
    planned = sum(counter.image(height, width)[0] * share for height, width, share in shapes)
    assert planned == pytest.approx(exact, rel=0.1)


def test_the_arithmetic_of_a_model_is_that_of_its_weights(small):
    """Two operations for each weight of the layers, which are counted in the model itself."""
    model = e5v_st.load(small, device="cpu")[0].model
    layers = [weight for name, weight in model.language_model.layers.named_parameters() if name.endswith("proj.weight")]
    counter = find_counter(str(small))
    assert counter.language.products == 2 * sum(weight.numel() for weight in layers)
    assert counter.seconds(Amount(tokens=1000), 1e6) == pytest.approx(counter.language.products * 1000 / 1e6)


def test_a_rate_is_measured_with_the_models_own_sizes():
    assert measure(Layers(2, 64, 128, 32, gated=True), "cpu", "float32", seconds=1, rows=8) > 1e6


def test_the_plan_of_a_folder_counts_its_images_and_writes_nothing(small, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for index, size in enumerate(SIZES):
        picture(size, index).save(folder / f"{index}.png")
    words = ["embed", str(folder), str(tmp_path / "out"), "--model", str(small), "--device", "cpu"]
    model = e5v_st.load(small, device="cpu")
    expected = taken(model, [picture(size) for size in SIZES], "image")
    assert main([*words, "--plan", "--rate", "10"]) == 0
    printed = capsys.readouterr().out
    assert "4 rows, 0 done, 4 to embed" in printed
    (tokens,) = (int(line.split()[0].replace(",", "")) for line in printed.splitlines() if "tokens of whole" in line)
    assert tokens == pytest.approx(expected, abs=4)
    assert not (tmp_path / "out").exists()

    assert main([*words, "--rows-per-shard", "2"]) == 0
    (tmp_path / "out" / next(p.name for p in sorted((tmp_path / "out").glob("*.parquet")))).unlink()
    capsys.readouterr()
    assert main([*words, "--rows-per-shard", "2", "--plan", "--rate", "10"]) == 0
    assert "4 rows, 2 done, 2 to embed" in capsys.readouterr().out


def test_the_plan_of_a_table_counts_texts_and_pairs(small, tmp_path, capsys):
    picture((40, 90)).save(tmp_path / "a.png")
    lines = ["text,image", *(f"{text},a.png" for text in SAMPLE), *(f"{text}," for text in SAMPLE)]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    words = [
        "embed",
        str(tmp_path / "table.csv"),
        str(tmp_path / "out"),
        "--model",
        str(small),
        "--plan",
        "--rate",
        "10",
    ]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "4 texts, 4 of both" in printed
    model = e5v_st.load(small, device="cpu")
    expected = taken(model, list(SAMPLE), "text")
    expected += taken(model, [{"text": text, "image": picture((40, 90))} for text in SAMPLE], "composed")
    (tokens,) = (int(line.split()[0].replace(",", "")) for line in printed.splitlines() if "tokens of whole" in line)
    assert tokens == pytest.approx(expected, rel=0.1)


def test_a_plan_downloads_no_dataset(tmp_path, capsys):
    assert main(["embed", "me/photographs", str(tmp_path / "out"), "--plan"]) == 1
    assert "--plan downloads nothing" in capsys.readouterr().err


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(costs) == (0, 2)
