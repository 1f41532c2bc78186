"""What a user does with a model of another family than LLaVA-NeXT: an index, fewer bits, compiled layers, processes."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec

import families
import numpy as np
import pytest
from PIL import Image

import e5v_st
from e5v_st.cli import main
from e5v_st.index.manifest import MANIFEST
from e5v_st.loading import compile_layers
from e5v_st.quantize import LIBRARIES

NIGHTLY = os.environ.get("E5V_NIGHTLY") == "1"
#: One family for each way of sharing that LLaVA-NeXT does not have, and one whose language model has another name.
KINDS = tuple(families.FAMILIES) if NIGHTLY else ("qwen3_vl", "gemma3", "qwen3_5", "smolvlm-instruct")
#: Two maximum numbers of image tokens by kind of budget.
LIMITS = {"soft tokens": (70, 140), "grids": (10, 16), "longest edge": (4, 8)}


def draw(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (50, 60 + 10 * seed, 3), dtype=np.uint8))


ITEMS = [draw(0), {"text": "A dog."}, {"image": draw(0), "text": "is red"}, {"text": "A dog runs."}, draw(1)]


@pytest.fixture(scope="module", params=KINDS)
def folder(request, checkpoint):
    return checkpoint(request.param)


@pytest.fixture(scope="module")
def model(folder):
    return e5v_st.load(folder, device="cpu")


def test_an_index_of_images_is_made_and_searched(folder, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    images = {f"{seed}.png": draw(seed) for seed in range(3)}
    for name, image in images.items():
        image.save(tmp_path / "photos" / name)
    assert main(["embed", "photos", "index", "--model", str(folder)]) == 0
    embedded = capsys.readouterr().out
    default = model[0].backbone.image_tokens
    assert (f"an image takes about {default} tokens at most" in embedded) == (default is not None)
    assert json.loads((tmp_path / "index" / MANIFEST).read_text())["max_image_tokens"] is None
    assert main(["search", "index", "a dog", "--top", "3"]) == 0
    found = [line.split()[1:3] for line in capsys.readouterr().out.splitlines() if line.strip()[:1].isdigit()]
    scores = model.encode(["a dog"]) @ model.encode(list(images.values())).T
    expected = sorted(zip(scores[0], images, strict=True), reverse=True)
    assert [name for _, name in found] == [name for _, name in expected]
    np.testing.assert_allclose([float(score) for score, _ in found], [score for score, _ in expected], atol=1e-4)


@pytest.mark.skipif(find_spec("lancedb") is None, reason="lancedb is not installed")
def test_a_table_of_images_is_made_and_searched(folder, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for seed in range(3):
        draw(seed).save(tmp_path / "photos" / f"{seed}.png")
    assert main(["index", "photos", "photos.lance", "--model", str(folder)]) == 0
    capsys.readouterr()
    assert main(["search", "photos.lance", "a dog", "--top", "1"]) == 0
    scores = model.encode(["a dog"]) @ model.encode([draw(seed) for seed in range(3)]).T
    assert f"{int(scores.argmax())}.png" in capsys.readouterr().out


def test_an_index_knows_its_maximum_of_image_tokens(folder, model, tmp_path, capsys, monkeypatch):
    if model[0].backbone.budget is None:
        pytest.skip("the family has no such limit")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    draw(2).save(tmp_path / "photos" / "a.png")
    embed = ["embed", "photos", "index", "--model", str(folder), "--max-image-tokens"]
    few, more = LIMITS.get(model[0].backbone.budget, (4, 8))
    assert main([*embed, str(few)]) == 0
    assert main([*embed, str(more)]) == 1
    assert f"index holds another job: max_image_tokens {few} (now {more})" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["int8", "fp8"])
def test_quantised_only_the_language_model_changes(folder, model, mode):
    pytest.importorskip(LIBRARIES[mode])
    fewer = e5v_st.load(folder, device="cpu", quantize=mode)
    cosines = (fewer.encode(ITEMS) * model.encode(ITEMS)).sum(1)
    assert 0.99 < cosines.min() < 0.9999999
    whole, stock = fewer[0].model, model[0].model
    own = {id(part) for part in whole.get_decoder().modules()}
    outside = {name: type(part) for name, part in whole.named_modules() if id(part) not in own}
    known = dict(stock.named_modules())
    assert all(type(known[name]) is kind for name, kind in outside.items())


def test_compiled_layers_change_nothing(folder, model):
    if not NIGHTLY and model[0].backbone.name != "smolvlm-instruct":
        pytest.skip("tracing takes long, and layers are compiled one by one in any family")
    compiled = e5v_st.load(folder, device="cpu")
    compile_layers(compiled, backend="eager")
    np.testing.assert_allclose(compiled.encode(ITEMS), model.encode(ITEMS), atol=1e-5)


def test_another_attention_changes_nothing(folder, model):
    eager = e5v_st.load(folder, device="cpu", model_kwargs={"attn_implementation": "eager"})
    np.testing.assert_allclose(eager.encode(ITEMS), model.encode(ITEMS), atol=1e-5)
    assert not eager[0].shares()


def test_a_device_map_and_sixteen_bits_keep_the_embeddings(folder, model):
    mapped = e5v_st.load(folder, model_kwargs={"device_map": "auto", "dtype": "float32"}, device="cpu")
    np.testing.assert_allclose(mapped.encode(ITEMS), model.encode(ITEMS), atol=1e-5)
    half = e5v_st.load(folder, device="cpu", model_kwargs={"dtype": "bfloat16"})
    assert (half.encode(ITEMS) * model.encode(ITEMS)).sum(1).min() > 0.99


@pytest.mark.slow
@pytest.mark.skipif(not NIGHTLY, reason="starting processes takes long")
def test_two_processes_give_the_embeddings_of_one(model):
    found = model.encode(ITEMS, device=["cpu", "cpu"], batch_size=2, chunk_size=3)
    np.testing.assert_allclose(found, model.encode(ITEMS, batch_size=2), atol=1e-6)


def test_rays_actor_embeds_with_any_family(folder, model):
    actor = e5v_st.E5VActor(str(folder), device="cpu")
    texts = ["A dog.", "A cat."]
    found = actor({"id": np.array(["a", "b"]), "text": np.array(texts)})
    np.testing.assert_allclose(
        np.array(found["embedding"].to_pylist()), model.encode([{"text": text} for text in texts]), atol=1e-5
    )
