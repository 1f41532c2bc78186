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
from PIL import Image

from e5v_st import PROMPTS
from e5v_st.items_e5v import open_image
from e5v_st.prompts_e5v import render, resolve_prompt

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

    def encode(text: str | None, images: list[Image.Image]) -> np.ndarray:
        prompt = render(resolve_prompt(None, text is not None, len(images)), "llama3", text or "")
        inputs = processor(text=[prompt], images=images or None, return_tensors="pt")
        with torch.inference_mode():
            state = model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
        return torch.nn.functional.normalize(state, dim=0).numpy()

    return encode


@pytest.mark.slow
def test_random_mixed_batches_equal_the_plain_recipe_one_by_one(model, recipe, pictures):
    images = [Image.open(picture).convert("RGB") for picture in pictures]
    pool = [({"text": text}, (text, [])) for text in TEXTS]
    pool += [(image, (None, [image])) for image in images]
    pool += [({"image": image, "text": text}, (text, [image])) for image in images[:4] for text in TEXTS[:4]]
    pool += [({"image": images[:2], "text": "both"}, ("both", images[:2]))]
    expected = [recipe(*arguments) for _, arguments in pool]
    dice = random.Random(0)
    for number in range(3000 if NIGHTLY else 250):
        rows = [dice.randrange(len(pool)) for _ in range(dice.randint(1, 9))]
        found = model.encode([pool[row][0] for row in rows], batch_size=dice.randint(1, 9))
        np.testing.assert_allclose(found, [expected[row] for row in rows], atol=1e-5, err_msg=f"batch {number}: {rows}")


def encoded_pictures() -> list[bytes]:
    image = Image.effect_noise((40, 30), 80)
    found = []
    for mode, kind in [("RGB", "PNG"), ("P", "PNG"), ("RGB", "JPEG"), ("L", "GIF"), ("RGB", "WEBP"), ("CMYK", "TIFF")]:
        data = io.BytesIO()
        image.convert(mode).save(data, kind)
        found.append(data.getvalue())
    return found


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_give_an_image_or_a_value_error():
    files, dice = encoded_pictures(), random.Random(0)
    outcomes = {True: 0, False: 0}
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
        except ValueError:
            outcomes[False] += 1
    assert min(outcomes.values()) > 50  # both happen, or this shows nothing


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
    import e5v_st

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
