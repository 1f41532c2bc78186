"""Load, fuzz and randomised differential tests. ``E5V_NIGHTLY=1`` runs them at full length."""

from __future__ import annotations

import gc
import io
import os
import random
import resource
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import e5v_st
from e5v_st import PROMPTS, encode_all
from e5v_st.encoder import stream_all
from e5v_st.model.images_e5v import open_image
from e5v_st.model.prompts_e5v import render, resolve_prompt

NIGHTLY = os.environ.get("E5V_NIGHTLY") == "1"
TEXTS = [
    "",
    "a",
    "A dog.",
    "naïve café 你好 🙂",
    "What? “No” — it's 3:30!",
    "word " * 40,
    "\n\n \n",
    "A cat in the snow.",
]


@pytest.fixture(scope="module")
def recipe(small):
    """The published README recipe on plain transformers, one input at a time."""
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    model = LlavaNextForConditionalGeneration.from_pretrained(small, dtype=torch.float32).eval()
    model.resize_token_embeddings(model.config.image_token_id + 1, mean_resizing=False)
    settings = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = AutoProcessor.from_pretrained(small, **settings)

    def encode(text: str | None, images: list[Image.Image], wanted: str | None = None) -> np.ndarray:
        prompt = render(resolve_prompt(wanted, text is not None, len(images)), "llama3", text or "")
        inputs = processor(text=[prompt], images=images or None, return_tensors="pt")
        with torch.inference_mode():
            state = model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
        return torch.nn.functional.normalize(state, dim=0).numpy()

    return encode


@pytest.fixture(scope="module")
def pool(recipe, pictures):
    """Items, the prompts that they may have, and their embeddings by the plain recipe."""
    images = [Image.open(picture).convert("RGB") for picture in pictures]
    pool = [({"text": text}, (text, [])) for text in TEXTS]
    pool += [(image, (None, [image])) for image in images]
    pool += [({"image": image, "text": text}, (text, [image])) for image in images[:4] for text in TEXTS[:4]]
    pool += [({"image": images[:2], "text": "both"}, ("both", images[:2]))]
    prompted = [({"text": text}, (text, [], prompt)) for text in TEXTS[:4] for prompt in (PROMPTS["sts"], "Query: ")]
    names = ("cirr-gallery", "fashioniq-dress-gallery")
    prompted += [(image, (None, [image], PROMPTS[name])) for image in images[:4] for name in names]
    return [(item, (*arguments, None)[2], recipe(*arguments)) for item, arguments in pool + prompted]


@pytest.mark.slow
def test_random_mixed_batches_equal_the_plain_recipe_one_by_one(model, pool):
    pool = [(item, expected) for item, prompt, expected in pool if prompt is None]
    dice = random.Random(0)
    for number in range(3000 if NIGHTLY else 250):
        rows = [dice.randrange(len(pool)) for _ in range(dice.randint(1, 9))]
        found = model.encode([pool[row][0] for row in rows], batch_size=dice.randint(1, 9))
        expected = [pool[row][1] for row in rows]
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=f"batch {number}: {rows}")


@pytest.mark.slow
def test_random_jobs_equal_the_plain_recipe_one_by_one(small, pool):
    model, dice = e5v_st.load(small, device="cpu"), random.Random(1)
    for number in range(2000 if NIGHTLY else 60):
        rows = [dice.randrange(len(pool)) for _ in range(dice.randint(1, 30))]
        bad = {place for place in range(len(rows)) if dice.random() < 0.05}
        items = [None if place in bad else pool[row][0] for place, row in enumerate(rows)]
        model[0].share_prefixes = dice.random() < 0.7
        window, batch_tokens = dice.choice([1, 2, 7, 256]), dice.choice([1, 64, 200, 1000, 10_000])
        results = list(
            stream_all(
                model,
                iter(items),
                prompt=[pool[row][1] for row in rows],
                batch_tokens=batch_tokens,
                on_error="skip",
                progress=False,
                window=window,
            )
        )
        message = f"job {number}: {rows}, {window}, {batch_tokens}"
        assert [result.index for result in results] == list(range(len(rows))), message
        assert {result.index for result in results if result.embedding is None} == bad, message
        found = [result.embedding for result in results if result.index not in bad]
        expected = [pool[row][2] for place, row in enumerate(rows) if place not in bad]
        if found:
            np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=message)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_random_batches_in_half_precision_stay_close_to_the_plain_recipe(small, pool, dtype):
    model, dice = e5v_st.load(small, device="cpu", model_kwargs={"dtype": dtype}), random.Random(2)
    pool = [(item, expected) for item, prompt, expected in pool if prompt is None]
    for number in range(300 if NIGHTLY else 15):
        rows = [dice.randrange(len(pool)) for _ in range(dice.randint(1, 9))]
        model[0].share_prefixes = dice.random() < 0.7
        found = model.encode([pool[row][0] for row in rows], batch_size=dice.randint(1, 9))
        cosines = (found * [pool[row][1] for row in rows]).sum(1)
        assert cosines.min() > 0.98, f"batch {number}: {rows}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_left_padded_mixed_and_long_batches_are_finite_in_every_dtype(small, pictures, dtype):
    model = e5v_st.load(small, device="cpu", model_kwargs={"dtype": dtype})
    items = [{"text": "word " * 500}, {"text": ""}, {"image": pictures[0], "text": "red"}, {"text": "A dog."}]
    features = model.preprocess(items)
    mask = features["attention_mask"]
    padding = [int(len(row) - row.sum()) for row in mask]
    features["input_ids"] = torch.stack([row.roll(n) for row, n in zip(features["input_ids"], padding, strict=True)])
    features["attention_mask"] = mask.flip(1)
    with torch.inference_mode():
        found = model(features)["sentence_embedding"]
    assert torch.isfinite(found).all()
    assert (found.numpy() * model.encode(items)).sum(1).min() > (0.99999 if dtype == torch.float32 else 0.98)


def encoded_pictures() -> list[bytes]:
    image = Image.effect_noise((40, 30), 80)
    found = []
    kinds = [("RGB", "PNG"), ("P", "PNG"), ("RGB", "JPEG"), ("L", "GIF"), ("RGB", "WEBP"), ("CMYK", "TIFF")]
    kinds += [("RGB", "BMP"), ("RGBA", "ICO"), ("RGB", "PPM"), ("RGB", "TGA"), ("RGB", "PCX"), ("RGB", "SGI")]
    kinds += [("RGBA", "DDS"), ("RGB", "JPEG2000"), ("I;16", "PNG"), ("1", "TIFF"), ("1", "MSP")]
    for mode, kind in kinds:
        data = io.BytesIO()
        image.convert(mode).save(data, kind)
        found.append(data.getvalue())
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_give_an_image_or_a_value_error(model, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    files, dice = encoded_pictures(), random.Random(0)
    outcomes = {True: 0, False: 0}
    survivors = []
    for _ in range(20_000 if NIGHTLY else 1500):
        data = bytearray(dice.choice(files))
        for _ in range(dice.randint(1, 8)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        data = data[: dice.randint(1, len(data))] if dice.random() < 0.3 else data
        try:
            image = open_image(bytes(data))
            outcomes[True] += 1
            assert image.mode == "RGB"
            assert min(image.size) > 0
            survivors.append(image)
        except ValueError:
            outcomes[False] += 1
    assert min(outcomes.values()) > 50  # both happen, or this shows nothing
    assert np.isfinite(encode_all(model, survivors[: 2000 if NIGHTLY else 40], progress=False)).all()


GOOD = [{"text": ""}, {"text": "A dog."}, "\u202e\0<|eot_id|>", Image.new("L", (3, 5), 7)]
good = st.sampled_from(GOOD)
bad = st.sampled_from(
    [None, 3, [], ["a"], {}, {"image": b""}, {"text": None}, "\udfff", {"image": np.zeros((2, 2))}, float("nan")]
)


@pytest.mark.slow
@settings(max_examples=2000 if NIGHTLY else 40, deadline=None)
@given(st.lists(st.one_of(good, good, bad), min_size=1, max_size=8), st.sampled_from([1, 100, 4096]))
def test_bad_items_at_any_place_leave_their_neighbours_as_they_are(model, items, batch_tokens):
    sound = [place for place, item in enumerate(items) if any(item is other for other in GOOD)]
    found = encode_all(model, items, on_error="skip", batch_tokens=batch_tokens, progress=False)
    assert np.flatnonzero(np.isfinite(found).all(axis=1)).tolist() == sound
    for place in sound:
        np.testing.assert_allclose(found[place], model.encode([items[place]])[0], atol=1e-5)
    wrong = [place for place in range(len(items)) if place not in sound]
    if wrong:
        with pytest.raises(ValueError, match=rf"^item ({'|'.join(map(str, wrong))}): "):
            model.encode(items, batch_size=3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=1000 if NIGHTLY else 40, deadline=None)
@given(
    st.sampled_from(
        ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"]
    ),
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(0, 2**32 - 1),
)
def test_any_image_of_any_mode_and_size_is_finite(model, mode, width, height, seed):
    if mode in ("I", "F", "I;16"):
        kinds = {"I": np.int32, "F": np.float32, "I;16": np.uint16}
        # Modes I and F have no range of their own: 16 bits, and 0 to 1
        data = np.random.default_rng(seed).integers(256, 2**16, (height, width)) / (65535 if mode == "F" else 1)
        image = Image.frombytes(mode, (width, height), data.astype(kinds[mode]).tobytes())
    else:
        image = Image.frombytes(mode, (width, height), np.random.default_rng(seed).bytes(width * height * 4))
    assert np.isfinite(model.encode(image)).all()


def test_eight_threads_share_one_model(model, pictures):
    items = ["A dog.", pictures[0], {"image": pictures[1], "text": "red"}, {"text": ""}]
    expected = model.encode(items)
    with ThreadPoolExecutor(8) as threads:
        orders = [random.Random(seed).sample(range(4), 4) for seed in range(24)]
        for order, found in zip(
            orders, threads.map(lambda o: model.encode([items[i] for i in o]), orders), strict=True
        ):
            np.testing.assert_allclose(found, expected[order], atol=1e-5)


@pytest.mark.slow
def test_memory_does_not_grow_with_calls(model, pictures):
    calls = 10_000 if NIGHTLY else 600
    for _ in range(100):
        model.encode(["A dog.", {"text": "warm up"}])
    model.encode([pictures[0]])
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(calls):
        model.encode([f"text number {number}"])
    model.encode([pictures[0]])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 * 1024  # KiB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_long_and_mixed_batches_are_finite_in_every_dtype(small, pictures, dtype):
    model = e5v_st.load(small, device="cpu", model_kwargs={"dtype": dtype})
    items = [{"text": "word " * 1500}, {"text": ""}, pictures[0], {"image": pictures[0], "text": "long " * 500}]
    assert np.isfinite(model.encode(items)).all()


def test_a_megabyte_of_text_is_cut_and_embedded(model):
    model_limit = model.max_seq_length
    try:
        model.max_seq_length = 256
        found = model.encode({"text": "All work and no play. " * 50_000})
    finally:
        model.max_seq_length = model_limit
    assert np.isfinite(found).all()


def test_prompts_inside_prompts_are_content(model):
    inner = render(PROMPTS["text"], "llama3", "A dog.")
    nested, plain = model.encode([{"text": inner}, {"text": "A dog."}])
    assert float(nested @ plain) < 0.999
