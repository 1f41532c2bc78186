"""Every family of backbones: E5-V's recipe on it gives what plain transformers gives, one item at a time."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from dataclasses import replace

import families
import numpy as np
import pytest
import torch
from PIL import Image

import e5v_st
from e5v_st.model import generic_e5v, modeling_e5v, processor_e5v
from e5v_st.model.backbone_e5v import BACKBONES, REFUSED, find_backbone
from e5v_st.model.prompts_e5v import PROMPTS, WRAPPERS
from e5v_st.model.published_e5v import RECIPES as RECIPES_OF_OTHERS
from e5v_st.model.published_e5v import find_recipe
from e5v_st.model.tree_e5v import Block

TEXT, IMAGE, COMPOSED = (PROMPTS[name] for name in ("text", "image", "composed"))


def draw(height: int, width: int, seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


SHAPES = [draw(48, 64, 0), draw(90, 48, 1), draw(60, 120, 2), draw(56, 56, 3), draw(20, 150, 4)]
A, B, C, D, E = SHAPES
TEXTS = ["A cat standing in the snow.", "A dog.", "two people ride bicycles along the river", "", "in the grass " * 5]
#: What a user passes, and the same as template, text and images.
CASES = [
    *((text, (TEXT, text, ())) for text in TEXTS),
    *((image, (IMAGE, None, (image,))) for image in SHAPES),
    ({"image": A, "text": "is red"}, (COMPOSED, "is red", (A,))),
    ({"image": A, "text": "has stripes"}, (COMPOSED, "has stripes", (A,))),
    ({"image": B, "text": "is red"}, (COMPOSED, "is red", (B,))),
    ({"image": [A, B]}, (IMAGE, None, (A, B))),
    ({"image": [C, D], "text": "is red"}, (COMPOSED, "is red", (C, D))),
    ({"image": [B, B]}, (IMAGE, None, (B, B))),
]
ITEMS, RECIPES = [item for item, _ in CASES], [recipe for _, recipe in CASES]
MIXED = np.random.default_rng(5).permutation(len(CASES))
FAMILIES = list(families.FAMILIES)


def load(path, **how):
    """Loads a tiny model as it is published: images are split where its processor splits them."""
    model = e5v_st.load(path, device="cpu", **how)
    if model[0].backbone.budget == "splitting" and "max_image_tokens" not in how:
        model[0].max_image_tokens = 1000
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name, checkpoint):
    return load(checkpoint(name))


@pytest.fixture(scope="module")
def plain(name, checkpoint):
    return families.open_plain(checkpoint(name))


@pytest.fixture(scope="module")
def expected(name, model, plain):
    return families.reference(name, plain, model[0].processor, RECIPES).numpy()


# ---- the numbers ----


def test_a_family_is_told_by_its_files(model, name):
    assert model[0].backbone.name == name


@pytest.mark.parametrize("share", [True, False], ids=["shared", "alone"])
@pytest.mark.parametrize("batch_size", [1, 3, 8, 15])
def test_mixed_batches_give_what_plain_transformers_gives_one_by_one(model, expected, batch_size, share):
    model[0].share_prefixes = share
    try:
        found = model.encode([ITEMS[case] for case in MIXED], batch_size=batch_size)
    finally:
        model[0].share_prefixes = True
    np.testing.assert_allclose(found, expected[MIXED], atol=2e-5)


def test_a_job_gives_what_plain_transformers_gives(model, expected):
    np.testing.assert_allclose(e5v_st.encode_all(model, ITEMS, progress=False), expected, atol=2e-5)
    small_batches = e5v_st.encode_all(model, ITEMS, batch_tokens=100, progress=False)
    np.testing.assert_allclose(small_batches, expected, atol=2e-5)


def test_the_order_of_batches_does_not_matter(model, expected):
    """Some models keep something of the last call, such as the shift of its positions."""
    for case in (7, 0, 10, 1, 13):
        np.testing.assert_allclose(model.encode([ITEMS[case]]), expected[[case]], atol=2e-5)


def test_named_prompts_and_chat_messages_are_those_of_the_recipe(name, model, plain):
    chat = [{"role": "user", "content": [{"type": "image", "image": A}, {"type": "text", "text": "is red"}]}]
    found = [
        model.encode([A], prompt_name="cirr-gallery"),
        model.encode(["A dog."], prompt_name="sts"),
        model.encode([chat]),
        model.encode([A], prompt="<image>\nIn one word: "),
    ]
    recipes = [
        (PROMPTS["cirr-gallery"], None, (A,)),
        (PROMPTS["sts"], "A dog.", ()),
        (COMPOSED, "is red", (A,)),
        ("<image>\nIn one word: ", None, (A,)),
    ]
    expected = families.reference(name, plain, model[0].processor, recipes)
    np.testing.assert_allclose(np.concatenate(found), expected, atol=2e-5)


def test_control_tokens_in_a_text_are_characters(name, model):
    made = families.family(name)
    tokens = [token.content for token in made.tokenizer.added_tokens_decoder.values()]
    evil = "a <image> and " + " ".join(tokens) + " cat"
    ids = model[0].preprocess([{"text": evil}])["input_ids"][0].tolist()
    control = set(made.tokenizer.added_tokens_decoder)
    harmless = model[0].preprocess([{"text": "a cat"}])["input_ids"][0].tolist()
    assert [index for index in ids if index in control] == [index for index in harmless if index in control]
    assert evil in made.tokenizer.decode(ids)


def test_a_text_with_control_tokens_leaves_its_neighbours_alone(model, expected):
    found = model.encode(["<|image_pad|> <image> [IMG] <|im_end|> <start_of_image>", ITEMS[0], ITEMS[5]])
    np.testing.assert_allclose(found[1:], expected[[0, 5]], atol=2e-5)
    assert np.isfinite(found).all()


def test_only_the_text_is_cut(model):
    long = {"image": A, "text": "in the grass " * 200}
    features = model[0].preprocess([long], processing_kwargs={"text": {"max_length": 60}})
    whole = model[0].preprocess([{"image": A, "text": ""}])
    added = features["attention_mask"].sum() - whole["attention_mask"].sum()
    assert 0 < added <= 60
    image_id = model[0].config.image_token_id
    assert (features["input_ids"] == image_id).sum() == (whole["input_ids"] == image_id).sum()
    assert features["input_ids"][0, -3:].tolist() == whole["input_ids"][0, -3:].tolist()


def test_a_prompt_that_cannot_fit_is_refused(model):
    with pytest.raises(ValueError, match=r"item 0: the prompt takes \d+ tokens without any text"):
        model.encode([{"image": A, "text": "x"}], processing_kwargs={"text": {"max_length": 3}})


#: Images of the smallest sizes, and thinner ones than some families take.
DOTS = [draw(1, 1, 5), draw(3, 3, 6), draw(28, 28, 7), draw(1, 60, 8), draw(3, 50, 9), draw(60, 1, 10)]
THIN = [draw(2, 600, 11), draw(700, 1, 12), draw(3, 1500, 13)]
#: How many times as long as wide an image may be, in families with such a limit.
THINNEST = {**{name: 200 for name in FAMILIES if name.startswith("qwen")}, "mistral3": 112}


@pytest.mark.parametrize("shape", range(len(DOTS + THIN)))
def test_an_image_of_any_size_has_an_embedding(name, model, plain, shape):
    """Of one that is too thin for the family, the embedding is that of the same image at the least width."""
    image = (DOTS + THIN)[shape]
    longest = max(image.size)
    least = -(-longest // THINNEST.get(name, longest))
    taken = image.resize([max(side, least) for side in image.size], Image.Resampling.NEAREST)
    items, recipes = [A, image], [(IMAGE, None, (A,)), (IMAGE, None, (taken,))]
    in_plain = _side_by_side if name == "mistral3" else families.reference
    expected = np.asarray(in_plain(name, plain, model[0].processor, recipes))
    np.testing.assert_allclose(model.encode(items), expected, atol=2e-5)
    np.testing.assert_allclose(model.encode([image]), expected[1:], atol=2e-5)


@torch.inference_mode()
def _side_by_side(name, plain, processor, recipes):
    """Returns what ``families.reference`` does, in a padded batch: stock Mistral 3 takes no single token alone."""
    made = families.family(name)
    inputs = processor(
        text=[families.render(made, template, text, len(images)) for template, text, images in recipes],
        images=[list(images) for _, _, images in recipes],
        padding=True,
        return_tensors="pt",
        add_special_tokens=made.adds_bos,
    )
    states = plain(**inputs, output_hidden_states=True).hidden_states[-1]
    last = inputs["attention_mask"].sum(1) - 1
    return torch.nn.functional.normalize(states[torch.arange(len(last)), last].float(), dim=-1)


@pytest.mark.parametrize(
    "images",
    [(A,), (C,), (E,), (A, B), *((image,) for image in DOTS + THIN)],
    ids=["small", "wide", "flat", "two", *(f"{image.width}x{image.height}" for image in DOTS + THIN)],
)
def test_planned_tokens_are_those_of_the_processor(model, images):
    transformer = model[0]
    planned = transformer.reader.count(images)
    shown = transformer.reader.read(images[:1]).shown if len(transformer.reader.groups(_item(images))) > 1 else None
    shown = shown or transformer.reader.read(images).shown
    own = [sum(place.runs) for place in shown]
    length = transformer.tokenizer(shown[0].text, add_special_tokens=False).input_ids
    whole = own[0] + len(length) - len(shown[0].runs)
    assert own[0] <= planned[0] <= whole


def _item(images):
    return _read([{"image": list(images)}])[0]


def _read(items):
    from e5v_st.model.items_e5v import read_item

    return [read_item(item) for item in items]


@torch.no_grad()
def test_the_words_that_an_image_makes_a_model_think_of_are_the_heads(name, model, plain, checkpoint):
    """The head is read beside the model, which is loaded without it."""
    found = e5v_st.words(model, [A, "A dog."], k=3)
    states = families.reference(name, plain, model[0].processor, [RECIPES[5], RECIPES[1]])
    top = (states @ plain.get_output_embeddings().weight.detach().T).topk(3).indices
    assert found == [[model.tokenizer.decode([index]).strip() for index in row] for row in top.tolist()]


def test_a_maximum_of_image_tokens_is_kept_and_saved(model, name, checkpoint, tmp_path):
    transformer = model[0]
    budget = transformer.backbone.budget
    big = draw(500, 300, 7)
    if budget is None:
        with pytest.raises(ValueError, match=r"but the family .* has no such limit"):
            e5v_st.load(checkpoint(name), device="cpu", max_image_tokens=16)
        return
    limit = {"soft tokens": 70, "splitting": 4, "patches": 8, "grids": 10}.get(budget, 16)
    few = e5v_st.load(checkpoint(name), device="cpu", max_image_tokens=limit)
    assert (
        few[0].count_image_tokens(_item([big])) < transformer.count_image_tokens(_item([big]))
        or budget == "soft tokens"
    )
    assert sum(few[0].reader.read([big]).shown[0].runs) <= limit
    few.save(str(tmp_path))
    again = e5v_st.load(tmp_path, device="cpu")
    assert again[0].max_image_tokens == limit
    # Weights that lie elsewhere in memory may be added up in another order
    np.testing.assert_allclose(again.encode([big]), few.encode([big]), rtol=0, atol=1e-6 if budget == "grids" else 0)
    more = e5v_st.load(tmp_path, device="cpu", max_image_tokens=1120 if budget == "soft tokens" else 1000)
    assert more[0].count_image_tokens(_item([big])) > few[0].count_image_tokens(_item([big])) or budget == "soft tokens"


def test_an_image_that_several_prompts_show_is_computed_once(model, name):
    whole = model[0].model
    decoder = {id(part) for part in whole.get_decoder().modules()}
    tower = next(part for part in whole.children() if id(part) not in decoder and sum(1 for _ in part.modules()) > 10)
    rows = []
    hook = tower.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len((*args, *kwargs.values())[0])), with_kwargs=True
    )
    try:
        model.encode([A])
        alone = sum(rows)
        rows.clear()
        model.encode([A, {"image": A, "text": "is red"}, {"image": A, "text": "has stripes"}], batch_size=8)
    finally:
        hook.remove()
    assert sum(rows) == alone > 0


def test_what_prompts_begin_with_is_computed_once(model, name):
    """Of the last prompts, only what is their own goes through the language model."""
    tokens = []
    part = model[0].model.get_decoder().layers[0].mlp
    hook = part.register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[:-1].numel()))
    prompts = [{"image": C, "text": text} for text in ("is red", "is blue", "has stripes")]
    try:
        for share in (True, False):
            model[0].share_prefixes = share
            tokens.append(0)
            model.encode(prompts, batch_size=8)
            tokens.append(-1)
    finally:
        model[0].share_prefixes = True
        hook.remove()
    shared, alone = (sum(part) for part in (tokens[: tokens.index(-1)], tokens[tokens.index(-1) + 1 : -1]))
    assert 0 < shared < 0.75 * alone


@pytest.mark.parametrize("padded", [generic_e5v.PADDED_TOKENS, 60], ids=["together", "in groups"])
def test_texts_of_a_recurrent_model_share_what_all_begin_with(padded, checkpoint, monkeypatch):
    """An instruction goes through the language model once, and each text in short pieces of the recurrence."""
    monkeypatch.setattr(generic_e5v, "PADDED_TOKENS", padded)
    folder = checkpoint("qwen3_5")
    model, plain = load(folder), families.open_plain(folder)
    template = "two people ride bicycles along the river " * 6 + "<sent> in one word:"
    texts = [f"{text} {number}" for number in range(3) for text in TEXTS]
    rows, pieces = [], []
    decoder = model[0].model.get_decoder()
    hooks = [
        decoder.layers[0].mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:-1].numel())),
        decoder.register_forward_pre_hook(lambda *given: pieces.append(given[-1].get("chunk_size")), with_kwargs=True),
    ]
    try:
        found = model.encode(texts, prompt=template, batch_size=len(texts))
    finally:
        for hook in hooks:
            hook.remove()
    whole = int(model[0].preprocess(texts, prompt=template)["attention_mask"].sum())
    assert 0 < sum(rows) < 0.5 * whole
    assert set(pieces) == {generic_e5v.PIECE}
    recipes = [(template, text, ()) for text in texts]
    np.testing.assert_allclose(found, families.reference("qwen3_5", plain, model[0].processor, recipes), atol=2e-5)


def test_texts_of_a_recurrent_model_that_begin_alike_by_little_are_computed_as_they_are(checkpoint, monkeypatch):
    """A pass of its own over three tokens takes longer than it saves, unless many texts share it."""
    forks = []
    stock = generic_e5v._fork
    monkeypatch.setattr(generic_e5v, "_fork", lambda *args, **how: forks.append(len(args[4])) or stock(*args, **how))
    model = load(checkpoint("qwen3_5"))
    model.encode(TEXTS, batch_size=len(TEXTS))
    assert not forks
    model.encode([f"{text} {number}" for number in range(8) for text in TEXTS], batch_size=40)
    assert forks == [40]


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3"])
@pytest.mark.parametrize(
    ("items", "in_trees"),
    [([A], 0), ([A, C], 0), ([A, TEXTS[0]], 1), ([A, {"image": [A], "text": "is red"}, TEXTS[0]], 2)],
    ids=["one", "two", "beside a text", "with two prompts"],
)
def test_images_that_share_nothing_go_through_the_stock_model_as_they_are(
    name, items, in_trees, checkpoint, monkeypatch
):
    """A tree is slower there. Texts beside them have one of their own."""
    trees, stock = [], generic_e5v._states_of_part
    monkeypatch.setattr(generic_e5v, "_states_of_part", lambda *args, **how: trees.append(1) or stock(*args, **how))
    model = load(checkpoint(name))
    model.encode(items, batch_size=8)
    assert len(trees) == in_trees


# ---- that the comparison would notice ----

BROKEN = {
    "positions": ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
    "deepstack": ("qwen3_vl",),
    "both ways": ("gemma3", "gemma4"),
    "window": ("gemma3", "gemma4"),
    "branches": ("llava", "internvl", "smolvlm-instruct"),
}


@pytest.mark.parametrize(("part", "name"), [(part, name) for part, names in BROKEN.items() for name in names])
def test_the_comparison_notices_when_a_part_is_left_out(part, name, checkpoint, monkeypatch):
    model = load(checkpoint(name))
    items = [*(ITEMS[case] for case in (10, 11, 5)), *TEXTS]
    right = model.encode(items, batch_size=8)
    _break(part, monkeypatch)
    assert np.abs(model.encode(items, batch_size=8) - right).max() > 1e-3


def _break(part, monkeypatch):
    if part == "positions":
        monkeypatch.setattr(generic_e5v, "_positions", lambda *args: args[-1].positions.unsqueeze(0))
    elif part == "deepstack":
        stock = generic_e5v._at_the_door
        without = {"deepstack_visual_embeds": None}
        monkeypatch.setattr(generic_e5v, "_at_the_door", lambda *args: {**stock(*args), **without})
    elif part == "branches":
        stock_branches = generic_e5v.Branches
        monkeypatch.setattr(generic_e5v, "Branches", lambda blocks: stock_branches((_one_row(blocks),)))
    else:
        stock_masks = generic_e5v.full_masks
        monkeypatch.setattr(generic_e5v, "full_masks", lambda *args: _spoil(part, stock_masks(*args)))


def _one_row(blocks):
    """All nodes as one prompt."""
    ends = [
        block.queries.stop if isinstance(block.queries, slice) else int(block.queries.max()) + 1 for block in blocks
    ]
    return Block.prefix(slice(0, max(ends)))


def _spoil(part, masks):
    nodes = next(iter(masks.values())).shape[-1]
    causal = torch.ones(nodes, nodes, dtype=torch.bool).tril()
    if part == "both ways":
        return {name: mask & causal for name, mask in masks.items()}
    return {**masks, "sliding_attention": masks["full_attention"]}


#: A yarn of 16 tokens lets Ministral scale its queries.
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16}
YARN |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
DENSE = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
#: Shorter than the prompts.
WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
AUDIO = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "output_proj_dims": 32}
#: Checkpoints that differ from the tiny model of their family: the family, the language model's settings, the whole's.
VARIANTS = {
    "Ministral 3": ("mistral3", {"model_type": "ministral3", "rope_parameters": YARN}, {}),
    "InternVL 3.5": ("internvl", {"model_type": "qwen3", "head_dim": 16}, {}),
    "a Gemma 4 without second embeddings": (
        "gemma4",
        {**DENSE, "attention_k_eq_v": True, "num_global_key_value_heads": 2},
        {},
    ),
    "a Gemma 4 with experts": ("gemma4", {**DENSE, **EXPERTS}, {}),
    "a Gemma 4 with a part for sounds": ("gemma4", {}, {"audio_config": AUDIO}),
    "a LLaVA-OneVision with windows": ("llava_onevision", WINDOWS, {}),
    "a Mistral with windows": ("llava_next-mistral", {"sliding_window": 8}, {}),
    "a Mistral 3 with windows": ("mistral3", {"sliding_window": 8}, {}),
    "a Qwen3-VL with one matrix at both ends": ("qwen3_vl", {"tie_word_embeddings": True}, {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_checkpoints_of_a_family_give_what_plain_transformers_gives(variant, tmp_path):
    name, text, config = VARIANTS[variant]
    folder = families.save(name, tmp_path / "model", text=text, **config)
    model = load(folder)
    assert model[0].backbone.name == name
    expected = families.reference(name, families.open_plain(folder), model[0].processor, RECIPES)
    np.testing.assert_allclose(model.encode(ITEMS, batch_size=8), expected, atol=2e-5)
    np.testing.assert_allclose(e5v_st.encode_all(model, ITEMS, progress=False), expected, atol=2e-5)
    model[0].share_prefixes = False  # texts are packed, all else is padded
    np.testing.assert_allclose(model.encode(TEXTS, batch_size=8), expected[: len(TEXTS)], atol=2e-5)
    np.testing.assert_allclose(model.encode(ITEMS, batch_size=8), expected, atol=2e-5)


def test_a_gemma_4_that_reads_images_in_one_direction_has_no_masks_for_them(checkpoint, tmp_path):
    """Its small models do."""
    shutil.copytree(checkpoint("gemma4"), tmp_path / "small")
    file = tmp_path / "small" / "config.json"
    settings = json.loads(file.read_text())
    settings["text_config"]["use_bidirectional_attention"] = None
    file.write_text(json.dumps(settings))
    model = load(tmp_path / "small")
    expected = families.reference("gemma4", families.open_plain(tmp_path / "small"), model[0].processor, RECIPES)
    np.testing.assert_allclose(model.encode(ITEMS, batch_size=8), expected, atol=2e-5)
    assert np.abs(model.encode(ITEMS[5:8]) - load(checkpoint("gemma4")).encode(ITEMS[5:8])).max() > 1e-3


@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_trees_with_masks_are_split_so_that_the_masks_stay_small(name, checkpoint, monkeypatch):
    model = load(checkpoint(name))
    monkeypatch.setattr(modeling_e5v, "MASKED_NODES", 200)
    items = [{"image": image, "text": f"{text} {number}"} for image in SHAPES for number, text in enumerate(TEXTS)]
    read = [replace(item, prompt=COMPOSED) for item in _read(items)]
    found = model[0].collate(read, share=True)["parts"]
    assert all(len(part.tree.ids) < 200 + 140 for part in found)  # the texts, and one image
    assert len(found) > 1
    np.testing.assert_allclose(model.encode(items, batch_size=25), model.encode(items, batch_size=1), atol=2e-5)


def test_prompts_of_like_length_are_computed_together_where_nothing_is_shared(checkpoint, monkeypatch):
    model = load(checkpoint("qwen3_5"))
    model[0].share_prefixes = False
    monkeypatch.setattr(generic_e5v, "PADDED_TOKENS", 100)
    stock, shapes = generic_e5v.stock_states, []

    def spy(model, features, **kwargs):
        shapes.append(tuple(features["input_ids"].shape))
        return stock(model, features, **kwargs)

    monkeypatch.setattr(generic_e5v, "stock_states", spy)
    found = model.encode(ITEMS, batch_size=len(ITEMS))
    assert all(rows == 1 or rows * tokens <= 100 for rows, tokens in shapes)
    assert 1 < len(shapes) < len(ITEMS)
    np.testing.assert_allclose(found, model.encode(ITEMS, batch_size=1), atol=2e-5)


# ---- loading ----


def test_neither_torchvision_nor_num2words_is_needed(model):
    assert type(model[0].processor.image_processor).__name__.endswith("Pil")
    assert "torchvision" not in sys.modules
    assert getattr(model[0].processor, "video_processor", None) is None


def test_every_row_has_a_chat_format_a_tiny_model_and_one_place_for_the_prompt():
    assert {row.name for row in BACKBONES} == {*FAMILIES, "llava_next-llama3"}
    for row in BACKBONES:
        assert WRAPPERS[row.wrapper].count("{}") == 1


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_a_model_that_the_recipe_cannot_run_on_is_refused_with_the_reason(kind, tmp_path):
    (tmp_path / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    with pytest.raises(ValueError, match=f"is a '{kind}' checkpoint, which E5-V cannot use: it") as caught:
        e5v_st.load(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)


def test_an_unknown_model_type_is_refused_with_the_nearest(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_audio"}')
    with pytest.raises(ValueError, match=r"'qwen2_audio' checkpoint, E5-V wants one of .*qwen2_vl.* nearest\)"):
        e5v_st.load(tmp_path, device="cpu")


def test_a_tokenizer_without_the_familys_control_tokens_is_refused(checkpoint, tmp_path):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint("gemma3"))
    other = families.family("mistral3").tokenizer
    with pytest.raises(ValueError, match=r"no chat format for this 'gemma3' .*the tokens <start_of_turn>"):
        find_backbone(config, other)


def test_a_family_that_transformers_lacks_harms_no_other(checkpoint, monkeypatch):
    def missing(path):
        raise ImportError(f"no module {path}")

    monkeypatch.setattr(processor_e5v, "without_videos", missing)
    with pytest.raises(ImportError, match="qwen3_vl"):
        e5v_st.load(checkpoint("qwen3_vl"), device="cpu")
    monkeypatch.undo()
    assert e5v_st.load(checkpoint("llava"), device="cpu").encode("A dog.").shape == (64,)


def test_no_layout_but_llava_nexts_is_refused(checkpoint):
    with pytest.raises(ValueError, match="got image_layout='paper', which only LLaVA-NeXT has: leave it out"):
        e5v_st.load(checkpoint("llava"), device="cpu", image_layout="paper")


@pytest.mark.parametrize("file", ["chat_template.json", "chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_template_tells_families_apart_wherever_it_stands(file, checkpoint, tmp_path):
    template = families.family("qwen3_vl-thinking").template
    shutil.copytree(checkpoint("qwen3_vl"), tmp_path / "model")
    path = tmp_path / "model" / file
    settings = json.loads(path.read_text()) if file == "tokenizer_config.json" else {}
    content = template if file.endswith("jinja") else json.dumps({**settings, "chat_template": template})
    path.write_text(content)
    assert e5v_st.load(tmp_path / "model", device="cpu")[0].backbone.name == "qwen3_vl-thinking"


# ---- models of another type ----

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def other(checkpoint, tmp_path_factory):
    """A Qwen3-VL with its chat template, for which the rows are not looked at."""
    copy = tmp_path_factory.mktemp("other") / "qwen3_vl"
    shutil.copytree(checkpoint("qwen3_vl"), copy)
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    return copy


def test_any_causal_model_is_taken_with_the_format_of_its_own_template(other, checkpoint, tmp_path):
    generic = e5v_st.load(other, device="cpu", backbone="generic")
    assert generic[0].wrapper == families.family("qwen3_vl").wrapper
    known = e5v_st.load(checkpoint("qwen3_vl"), device="cpu")
    np.testing.assert_allclose(generic.encode(ITEMS), known.encode(ITEMS), atol=2e-5)
    generic.save(str(tmp_path))
    np.testing.assert_array_equal(e5v_st.load(tmp_path, device="cpu").encode(ITEMS[:9]), generic.encode(ITEMS[:9]))


def test_a_chat_format_may_be_given(checkpoint):
    wrapper = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\nIn short: "
    generic = e5v_st.load(checkpoint("internvl"), device="cpu", backbone="generic", chat_format=wrapper)
    ids = generic[0].preprocess(["A dog."])["input_ids"][0]
    assert generic.tokenizer.decode(ids) == wrapper.replace("{}", TEXT.replace("<sent>", "A dog."))


def test_a_chat_format_counts_for_a_llava_next_too(checkpoint):
    path, wrapper = checkpoint("llava_next-mistral"), families.family("llava_next-mistral").wrapper
    same = e5v_st.load(path, device="cpu", backbone="generic", chat_format=wrapper)
    np.testing.assert_allclose(same.encode(ITEMS), e5v_st.load(path, device="cpu").encode(ITEMS), atol=2e-5)
    other = e5v_st.load(path, device="cpu", backbone="generic", chat_format=wrapper + "In short: ")
    assert np.abs(other.encode(ITEMS[:1]) - same.encode(ITEMS[:1])).max() > 1e-3


def test_without_a_template_the_chat_format_is_asked_for(checkpoint):
    with pytest.raises(ValueError, match=r"cannot be read from the checkpoint's template: give chat_format="):
        e5v_st.load(checkpoint("internvl"), device="cpu", backbone="generic")
    with pytest.raises(ValueError, match="unknown chat format 'no place'"):
        e5v_st.load(checkpoint("internvl"), device="cpu", backbone="generic", chat_format="no place")
    with pytest.raises(ValueError, match="which is for backbone='generic': leave it out"):
        e5v_st.load(checkpoint("internvl"), device="cpu", chat_format="{}")
    with pytest.raises(ValueError, match="got backbone='llava', want 'generic', or leave it out"):
        e5v_st.load(checkpoint("internvl"), device="cpu", backbone="llava")


@pytest.mark.parametrize("fault", ["what stands behind", "padding"])
def test_a_model_whose_states_depend_on_what_follows_is_refused(other, fault, monkeypatch):
    from transformers import Qwen3VLModel

    stock = Qwen3VLModel.forward

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        found = stock(self, input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        spoils = attention_mask is not None and not attention_mask.all() if fault == "padding" else True
        if spoils:
            found.last_hidden_state = found.last_hidden_state + found.last_hidden_state[:, -1:]
        return found

    monkeypatch.setattr(Qwen3VLModel, "forward", forward)
    said = "is not causal: what stands behind" if fault != "padding" else "gives other states with padding"
    with pytest.raises(ValueError, match=said):
        e5v_st.load(other, device="cpu", backbone="generic")


def test_texts_of_an_unknown_model_are_packed_only_if_they_keep_apart(checkpoint):
    packs = {}
    for name in ("internvl", "qwen2_5_vl", "qwen3_5"):
        wrapper = families.family(name).wrapper
        generic = e5v_st.load(checkpoint(name), device="cpu", backbone="generic", chat_format=wrapper)
        packs[name] = generic[0].backbone.packing
    assert packs == {"internvl": 1, "qwen2_5_vl": 0, "qwen3_5": 0}


# ---- published models of others ----

#: Recipe -> family, and whole prompts as their authors' code renders them, by what an item holds.
CHATML = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
CHATML += "<|im_start|>assistant\n"
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
OTHERS = {
    "unime-llava-1.6": (
        "llava_next-mistral",
        "[INST] {}\nSummary above sentence in one word: [/INST]",
        "[INST] <image>\nSummary above image in one word: [/INST]",
        None,
    ),
    "lamra-ret": (
        "qwen2_vl",
        CHATML.replace("{}", "{}\nSummarize above sentence in one word: "),
        CHATML.replace("{}", PICTURE + "\nSummarize above image in one word: "),
        CHATML.replace("{}", PICTURE + "{}\nSummarize above image and sentence in one word: "),
    ),
    "unite": (
        "qwen2_vl",
        CHATML.replace("{}", "{}\nSummary above sentence in one word:") + "<|endoftext|>",
        CHATML.replace("{}", PICTURE + "\nSummary above image in one word:") + "<|endoftext|>",
        CHATML.replace("{}", PICTURE + "{}\nSummary above sentence and image in one word:") + "<|endoftext|>",
    ),
}


@pytest.mark.parametrize("recipe", OTHERS)
def test_a_published_model_of_others_is_asked_as_its_authors_ask_it(recipe, checkpoint, tmp_path, monkeypatch):
    name, *strings = OTHERS[recipe]
    ids = find_recipe(recipe).ids
    # The checkpoint by its published name, below the working directory
    monkeypatch.chdir(tmp_path)
    (tmp_path / ids[0]).parent.mkdir(parents=True)
    (tmp_path / ids[0]).symlink_to(checkpoint(name))
    model = e5v_st.load(ids[0], device="cpu")
    items = [{"text": "A dog."}, {"image": A}, {"image": A, "text": "is red"}][: 3 if strings[2] else 2]
    plain, adds_bos = families.open_plain(checkpoint(name)), families.family(name).adds_bos
    expected = []
    for string, item in zip(strings, items, strict=False):
        images = [[item["image"]]] if "image" in item else None
        text = string.replace("{}", item.get("text", ""))
        inputs = model[0].processor(text=[text], images=images, return_tensors="pt", add_special_tokens=adds_bos)
        with torch.inference_mode():
            state = plain(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
        expected.append(torch.nn.functional.normalize(state, dim=0).numpy())
    np.testing.assert_allclose(model.encode(items), expected, atol=2e-5)
    np.testing.assert_allclose(e5v_st.encode_all(model, items, progress=False), expected, atol=2e-5)
    model.save(str(tmp_path / "saved"))
    np.testing.assert_array_equal(e5v_st.load(tmp_path / "saved", device="cpu").encode(items), model.encode(items))
    if strings[2] is None:
        with pytest.raises(ValueError, match="item 0: the model's authors state no prompt of the kind 'composed'"):
            model.encode([{"image": A, "text": "is red"}])


def test_every_published_recipe_is_tested_and_says_where_it_is_stated():
    assert {recipe.name for recipe in RECIPES_OF_OTHERS} == set(OTHERS)
    assert all(recipe.source.count("/") >= 1 and recipe.ids for recipe in RECIPES_OF_OTHERS)
    with pytest.raises(ValueError, match=r"got recipe='lamra', want one of 'unime-llava-1.6', 'lamra-ret', 'unite'"):
        find_recipe("lamra")


@pytest.mark.parametrize("name", ["smolvlm", "internvl", "gemma4", "mistral3"])
def test_nothing_is_said_that_a_user_cannot_act_on(name, checkpoint, caplog):
    log = logging.getLogger("transformers")  # which keeps what is said to itself
    log.addHandler(caplog.handler)
    try:
        e5v_st.load(checkpoint(name), device="cpu").encode([A, draw(1, 1, 0), draw(3, 3, 1), draw(1, 50, 2)])
    finally:
        log.removeHandler(caplog.handler)
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
