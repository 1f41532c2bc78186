"""The encoder of an evaluation: each content is encoded once, whatever the task, as the model itself does it."""

from __future__ import annotations

import mteb
import numpy as np
import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from sentence_transformers import SentenceTransformer

from e5v_st.model.prompts_e5v import PROMPTS
from e5v_st.model.weights_e5v import find_scales
from e5v_st.mteb_tasks.encoder import E5VEncoder, fingerprint, load_encoder
from e5v_st.mteb_tasks.models import make_meta
from e5v_st.mteb_tasks.store import Store


def loader(**columns):
    from torch.utils.data import DataLoader

    data = Dataset.from_dict(columns)
    if "image" in columns:
        data = data.cast_column("image", ImageFeature())
    return DataLoader(data, batch_size=4)


def encode(encoder, inputs, task="E5VCOCOT2IRetrieval"):
    metadata = mteb.get_task(task).metadata
    return encoder.encode(inputs, task_metadata=metadata, hf_split="test", hf_subset="default", show_progress_bar=False)


@pytest.fixture
def stored(e5v, tmp_path):
    return E5VEncoder(e5v.model, store=Store(tmp_path))


def pictures(*modes):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8))
    return [noise.convert(mode) for mode in modes]


def test_pictures_of_any_mode_are_converted_as_the_model_does(e5v):
    modes = ("RGB", "L", "P", "RGBA", "CMYK", "1")
    images = pictures(*modes)
    files = [image if image.mode != "CMYK" else image.convert("CMYK") for image in images]
    found = encode(e5v, loader(image=[{"bytes": to_bytes(image), "path": None} for image in files]))
    np.testing.assert_allclose(found, e5v.model.encode([image.convert("RGB") for image in images]), atol=2e-6)


def to_bytes(image):
    import io

    buffer = io.BytesIO()
    image.save(buffer, "TIFF")
    return buffer.getvalue()


def test_each_content_is_encoded_once_within_a_task(stored):
    image = pictures("RGB")[0]
    found = encode(stored, loader(image=[image] * 5))
    assert stored.encoded == 1
    assert np.ptp(found, axis=0).max() == 0


def test_contents_are_shared_across_tasks_but_not_across_prompts(stored):
    images = noise_images(4)
    first = encode(stored, loader(image=images), "E5VCOCOT2IRetrieval")
    assert stored.encoded == 4
    again = encode(stored, loader(image=images), "E5VFlickr30kI2TRetrieval")
    assert stored.encoded == 0
    np.testing.assert_array_equal(first, again)
    metadata = mteb.get_task("E5VCIRRRetrieval").metadata
    role = mteb.types.PromptType.document
    stored.encode(loader(image=images), task_metadata=metadata, hf_split="val", hf_subset="default", prompt_type=role)
    assert stored.encoded == 4


def test_the_gallery_embedding_of_a_query_image_is_computed_beside_the_querys(stored, monkeypatch):
    from e5v_st.model.tree_e5v import plan_tree

    trees = []
    monkeypatch.setattr(
        "e5v_st.model.planning_e5v.plan_tree", lambda *args: trees.append(plan_tree(*args)) or trees[-1]
    )
    images, captions = noise_images(3), ["is red", "is blue", "is longer"]
    how = {"task_metadata": mteb.get_task("E5VCIRRRetrieval").metadata, "hf_split": "val", "hf_subset": "default"}
    roles = mteb.types.PromptType
    queries = stored.encode(loader(image=images, text=captions), prompt_type=roles.query, **how)
    assert stored.encoded == 6
    features = [tree.image_features.tolist() for tree in trees]
    assert sum(map(len, features)) == sum(len(set(each)) for each in features)  # each feature stands there once
    assert sum(len(tree.last) for tree in trees) == 6
    gallery = stored.encode(loader(image=images), prompt_type=roles.document, **how)
    assert stored.encoded == 0
    expected = stored.model.encode(images, prompt_name="cirr-gallery")
    np.testing.assert_allclose(gallery, expected, atol=2e-6)
    items = [{"image": image, "text": text} for image, text in zip(images, captions, strict=True)]
    np.testing.assert_allclose(queries, stored.model.encode(items, prompt_name="cirr-query"), atol=2e-6)


def noise_images(count):
    rng = np.random.default_rng(1)
    return [Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)) for _ in range(count)]


def test_another_model_finds_nothing_in_the_store(stored, small):
    images = noise_images(2)
    encode(stored, loader(image=images))
    paper = make_meta(str(small), image_layout="paper", store=stored.store.path.parent).load_model(device="cpu")
    encode(paper, loader(image=images))
    assert paper.encoded == 2


def test_the_fingerprint_knows_weights_and_dtype(e5v, small):
    import e5v_st

    other = e5v_st.load(small, device="cpu")
    assert fingerprint(other) == fingerprint(e5v.model)
    weight = next(iter(other[0].model.parameters()))
    weight.data.mul_(1.001)
    assert fingerprint(other) != fingerprint(e5v.model)
    assert fingerprint(e5v_st.load(small, device="cpu", model_kwargs={"dtype": "bfloat16"})) != fingerprint(e5v.model)


@pytest.mark.parametrize(("mode", "library"), [("int8", "bitsandbytes"), ("nf4", "bitsandbytes"), ("fp8", "torchao")])
def test_a_quantised_model_is_measured_and_has_a_fingerprint_of_its_own(e5v, small, mode, library, capsys):
    import e5v_st

    pytest.importorskip(library)
    encoder = load_encoder(str(small), device="cpu", quantize=mode, store=False)
    assert capsys.readouterr().out.startswith(f"{mode}: cosine to the same model in float32: 8 texts mean 0.9")
    assert encoder.model[0].model.config.quantization_config is not None
    found = fingerprint(e5v_st.load(small, device="cpu", quantize=mode))
    assert found == fingerprint(e5v_st.load(small, device="cpu", quantize=mode))
    assert found != fingerprint(e5v.model)

    # Scaled weights quantise to the same integers: their scales tell them apart
    other = e5v_st.load(small, device="cpu", quantize=mode)
    scales = find_scales(other[0].model.language_model.layers[0].mlp.up_proj.weight)
    scales.data.mul_(1.5)
    assert fingerprint(other) != found


def test_a_killed_run_goes_on_where_it_was(stored, monkeypatch):
    monkeypatch.setattr("e5v_st.mteb_tasks.ledger.SAVE_EVERY", 8)
    texts = [f"sentence {i}" for i in range(300)]
    rest = [*texts, None]  # the last row cannot be read

    with pytest.raises(ValueError, match="item 300"):
        encode(stored, loader(text=rest))
    kept = stored.encoded
    assert kept >= 200
    found = encode(stored, loader(text=texts))
    assert stored.encoded <= 300 - kept + 8
    np.testing.assert_allclose(found, stored.model.encode(texts), atol=2e-6)


def test_no_rows_give_no_embeddings(e5v):
    assert encode(e5v, loader(text=[])).shape == (0, 128)


def test_a_batch_size_is_said_not_to_be_used(e5v):
    inputs, how = loader(text=["a", "b"]), {"task_metadata": mteb.get_task("E5VSTS12").metadata}
    how |= {"hf_split": "test", "hf_subset": "default", "show_progress_bar": False}
    with pytest.warns(UserWarning, match="batch_size=8 is not used"):
        found = e5v.encode(inputs, batch_size=8, **how)
    np.testing.assert_array_equal(found, e5v.encode(inputs, batch_size=32, **how))  # mteb's own number


def test_a_models_own_default_prompt_is_said_not_to_be_used(e5v):
    own = SentenceTransformer(modules=list(e5v.model), prompts={"mine": "Of a film: "}, default_prompt_name="mine")
    with pytest.warns(UserWarning, match="the model has the default prompt 'mine': the evaluation has its own prompts"):
        wrapped = E5VEncoder(own)
    rows = loader(text=["a dog", "a cat"])
    np.testing.assert_array_equal(encode(wrapped, rows), encode(e5v, rows))


@pytest.mark.parametrize("unknown", [{"precision": "int8"}, {"normalize_embeddings": False}, {"prompt_name": "text"}])
def test_other_encode_kwargs_are_refused(e5v, unknown, tmp_path):
    named = ", ".join(f"{key}={value!r}" for key, value in unknown.items())
    with pytest.raises(ValueError, match=f"encode_kwargs has {named}, which E5-V does not know"):
        mteb.evaluate(e5v, mteb.get_task("E5VEmojiSTS"), encode_kwargs=unknown, cache=mteb.ResultCache(tmp_path))


def test_leading_dimensions_are_those_of_sentence_transformers_and_share_the_store(small, tmp_path):
    import e5v_st

    texts = ["a dog", "a cat", "a house"]
    for size in (None, 32, 128, 64):
        entry = make_meta(str(small), store=tmp_path, embed_dim=size)
        encoder = entry.load_model(device="cpu")
        found = encode(encoder, loader(text=texts))
        expected = e5v_st.load(small, device="cpu").encode(texts, truncate_dim=size)
        expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(found, expected, atol=2e-6)
        assert encoder.encoded == (3 if size is None else 0)
        assert encoder.mteb_model_meta.embed_dim == found.shape[1] == (size or 128)


def test_a_model_that_truncates_by_itself_is_measured_so(e5v, small):
    import e5v_st

    model = e5v_st.load(small, device="cpu", truncate_dim=32)
    found = encode(E5VEncoder(model), loader(text=["a dog", "a cat"]))
    full = encode(e5v, loader(text=["a dog", "a cat"]))[:, :32]
    np.testing.assert_allclose(found, full / np.linalg.norm(full, axis=1, keepdims=True), atol=2e-6)


@pytest.mark.parametrize(
    ("size", "message"),
    [(0, "got truncate_dim=0, want at least 1"), (129, "got 129 dimensions to keep, want 1 to 128")],
)
def test_dimensions_that_a_model_does_not_have_are_refused(small, size, message):
    with pytest.raises(ValueError, match=message):
        make_meta(str(small), store=False, embed_dim=size).load_model(device="cpu")


def test_embeddings_that_are_not_finite_are_refused_and_not_kept(small, tmp_path):
    encoder = make_meta(str(small), store=tmp_path).load_model(device="cpu")
    table = encoder.model[0].model.get_input_embeddings().weight
    words = (" zebra", PROMPTS["text"] + " a dog")
    odd, others = (set(encoder.model.tokenizer(text)["input_ids"]) for text in words)
    odd = sorted(odd - others)
    kept = table.data[odd].clone()
    table.data[odd] = float("nan")
    with pytest.raises(ValueError, match=r"^item 0: its embedding is not finite in float32"):
        encode(encoder, loader(text=["a zebra"]))
    table.data[odd] = kept
    found = encode(encoder, loader(text=["a zebra"]))
    assert encoder.encoded == 1
    np.testing.assert_allclose(found, encoder.model.encode(["a zebra"]), atol=2e-6)
