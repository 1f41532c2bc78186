"""Images in a training step: each goes through a frozen tower once, and loss and gradients stay what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from adapters import draw_adapter
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses

from e5v_st.hub.export import export
from e5v_st.training.images import Memo, read_keys
from e5v_st.training.model import load_for_training
from e5v_st.training.trainer import Trainer

ROWS, RANK = 5, 4
#: The image of each row. Equal ones stand in one mini-batch of two rows, in two, and in several columns.
FIRST, SECOND = (0, 0, 1, 2, 1), (3, 4, 0, 3, 3)
SIZES = [(60, 50), (50, 120), (120, 50), (60, 60), (30, 70)]


def image(number: int) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 255, (*SIZES[number][::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def texts(what: str) -> list[dict[str, Any]]:
    return [{"text": f"{what} number {row}" + " and one" * row} for row in range(ROWS)]


def images(numbers: Sequence[int]) -> list[dict[str, Any]]:
    return [{"image": image(number)} for number in numbers]


def composed(numbers: Sequence[int], what: str) -> list[dict[str, Any]]:
    return [{**one, **other} for one, other in zip(images(numbers), texts(what), strict=True)]


#: Anchor, positive and negative.
COLUMNS = {
    "texts and images": [texts("A dog"), images(FIRST), images(SECOND)],
    "composed items": [composed(FIRST, "is red"), images(SECOND), composed(SECOND, "is larger")],
    "mixed columns": [
        [*texts("A dog")[:2], *composed(FIRST, "is blue")[2:]],
        [{"image": [image(0), image(3)], "text": "both"}, *images(SECOND)[1:3], *texts("Nothing")[3:]],
        [images(FIRST)[0], *texts("No image")[1:]],
    ],
}
LOSSES: dict[str, Callable[[Any], Any]] = {
    "plain": losses.MultipleNegativesRankingLoss,
    "cached": lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2),
    "cached by tokens": lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_num_tokens=150),
}


@pytest.fixture(scope="module")
def stock(small, tmp_path_factory) -> SentenceTransformer:
    """Plain sentence-transformers on the native export, with the same adapter."""
    model = SentenceTransformer(
        str(export(small, tmp_path_factory.mktemp("stock") / "native", native=True)), device="cpu"
    )
    model.requires_grad_(False)
    targets = r".*language_model\..*\.(q|k|v|o|gate|up|down)_proj"
    model[0].model.add_adapter(LoraConfig(r=RANK, lora_alpha=16, lora_dropout=0.0, target_modules=targets))
    draw_adapter(model)
    return model.train()


@pytest.fixture(scope="module")
def loaded(small) -> Any:
    model = load_for_training(str(small), bits=32, lora_r=RANK, lora_dropout=0.0, text_only=False).cpu()
    draw_adapter(model)
    return model


@pytest.fixture
def model(loaded) -> Iterator[Any]:
    """The model as it is trained; a test may change what is put back here."""
    yield loaded.train()
    draw_adapter(loaded)
    loaded[0].share_prefixes = True
    loaded[0].model.activation_checkpointing_disable()
    loaded[0].model.multi_modal_projector.requires_grad_(False)
    set_dropout(loaded, 0.0)


def set_dropout(model: Any, probability: float) -> None:
    for name, module in model.named_modules():
        if "lora_dropout" in name and not list(module.children()):
            parent = model.get_submodule(name.rpartition(".")[0])
            parent["default"] = torch.nn.Dropout(probability)


def features_of(model: Any, kind: str) -> list[dict[str, Any]]:
    return [model.preprocess(column) for column in COLUMNS[kind]]


def run(model: Any, make: Callable[[Any], Any], columns: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a loss and its gradient."""
    model.zero_grad()
    value = make(model)(columns, None)
    value.backward()
    trained = [weight.grad.flatten() for weight in model.parameters() if weight.requires_grad]
    return value.detach(), torch.cat(trained)


def check_same(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert expected[1].norm() > 0
    assert (found[1] - expected[1]).norm() <= 1e-5 * expected[1].norm()


def without_keys(columns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Features as an unmodified ``E5VTransformer`` makes them: the padded batch runs as it is."""
    return [{name: value for name, value in column.items() if name != "image_keys"} for column in columns]


@contextmanager
def counted(module: torch.nn.Module) -> Iterator[list[int]]:
    """Counts what goes through a module: tiles or patches of a vision tower, tokens of a layer."""
    seen: list[int] = []

    def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs["pixel_values"]
        seen.append(given.shape[1] if given.ndim == 3 else len(given))

    handle = module.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def tiles(model: Any, numbers: Sequence[int]) -> int:
    return sum(model[0].reader.read((image(number),)).tensors["pixel_values"].shape[1] for number in numbers)


# ---- the same loss and gradients ----


@pytest.mark.parametrize("kind", COLUMNS)
def test_loss_and_gradients_of_a_step_are_those_of_plain_sentence_transformers(model, stock, kind):
    expected = run(stock, LOSSES["plain"], features_of(stock, kind))
    columns = features_of(model, kind)
    check_same(run(model, LOSSES["plain"], without_keys(columns)), expected)
    for name, step in [("plain", True), ("cached", True), ("cached", False), ("cached by tokens", True)]:
        with model[0].one_step() if step else nullcontext():
            check_same(run(model, LOSSES[name], [dict(column) for column in columns]), expected)


@pytest.mark.parametrize("way", ["checkpointing", "reentrant checkpointing", "nothing shared"])
def test_the_same_with_checkpointing_and_where_nothing_is_shared(model, stock, way):
    expected = run(stock, LOSSES["plain"], features_of(stock, "mixed columns"))
    if way == "nothing shared":
        model[0].share_prefixes = False
    else:
        model[0].model.activation_checkpointing_enable({"use_reentrant": way.startswith("reentrant")})
    for name in ("plain", "cached"):
        with model[0].one_step(), counted(model[0].model.vision_tower) as seen:
            check_same(run(model, LOSSES[name], features_of(model, "mixed columns")), expected)
        assert sum(seen) == tiles(model, range(5))


def test_features_under_a_wrong_key_would_be_noticed(model):
    pair = [model.preprocess([{"image": one.resize((60, 50))} for one in (image(0), image(3))]) for _ in range(2)]
    expected = run(model, LOSSES["plain"], without_keys(pair))
    pair[1]["image_keys"] = pair[1]["image_keys"].flip(0)
    with model[0].one_step():
        _, gradient = run(model, LOSSES["cached"], pair)
    assert (gradient - expected[1]).norm() > 1e-2 * expected[1].norm()


def test_rows_carry_the_keys_of_their_images(model):
    _, both, alone = (read_keys(column["image_keys"]) for column in features_of(model, "mixed columns"))
    assert [len(own) for own in both] == [2, 1, 1, 0, 0]
    assert [len(own) for own in alone] == [1, 0, 0, 0, 0]
    assert both[0][0] == both[2][0] == alone[0][0] != both[0][1]
    assert "image_keys" not in model.preprocess(texts("A dog"))


# ---- what is computed ----


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("name", LOSSES)
def test_a_frozen_tower_sees_each_image_of_a_step_once(model, kind, name):
    with model[0].one_step(), counted(model[0].model.vision_tower) as seen:
        run(model, LOSSES[name], features_of(model, kind))
    assert len(seen) == 5
    assert sum(seen) == tiles(model, range(5))


def test_without_a_step_equal_images_of_a_call_are_computed_once_and_nothing_is_kept(model):
    column = model.preprocess(composed(FIRST, "is red"))
    with counted(model[0].model.vision_tower) as seen:
        model(dict(column))
        model(dict(column))
    assert sum(seen) == 2 * tiles(model, set(FIRST))


def test_equal_beginnings_are_computed_once_in_both_passes(model):
    columns = [model.preprocess([{"image": image(0), "text": text}] * 2) for text in ("is red", "is blue")]
    with counted(model[0].model.language_model.layers[0]) as seen:
        run(model, LOSSES["cached"], columns)
    assert seen == [int(column["attention_mask"][0].sum()) for column in columns] * 2


def test_a_trained_projector_is_computed_anew_with_the_gradients_of_the_padded_batch(model):
    model[0].model.multi_modal_projector.requires_grad_(True)
    columns = features_of(model, "composed items")
    expected = run(model, LOSSES["plain"], without_keys(columns))
    for name in ("plain", "cached"):
        with model[0].one_step(), counted(model[0].model.vision_tower) as seen:
            check_same(run(model, LOSSES[name], [dict(column) for column in columns]), expected)
        assert sum(seen) > tiles(model, range(5))


@pytest.mark.parametrize("kind", ["composed items", "mixed columns"])
def test_dropout_is_the_same_in_both_passes_of_gradient_caching_and_another_in_each_row(model, kind):
    set_dropout(model, 0.5)
    made: list[torch.Tensor] = []
    handle = model[0].register_forward_hook(lambda _, __, found: made.append(found["token_embeddings"][:, 0].detach()))
    with model[0].one_step():
        run(model, LOSSES["cached"], features_of(model, kind))
        twice = model.preprocess([images(FIRST)[0]] * 2)
        model(twice)
    handle.remove()
    *passes, twice = made
    half = len(passes) // 2
    torch.testing.assert_close(torch.cat(passes[:half]), torch.cat(passes[half:]), rtol=0, atol=1e-5)
    assert (twice[0] - twice[1]).abs().max() > 1e-2


# ---- the memo ----


def test_the_memo_ends_with_the_step_and_with_an_error_in_it(model, tmp_path):
    kept: list[int] = []

    class Watched(losses.CachedMultipleNegativesRankingLoss):
        def calculate_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            kept.append(len(model[0]._memo))
            if len(kept) == 3:
                raise RuntimeError("broken")
            return super().calculate_loss(*args, **kwargs)

    rows = [{"anchor": f"Number {row}.", "positive": image(row)} for row in range(5)]
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=5, max_steps=3, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=args, train_dataset=Dataset.from_list(rows), loss=Watched(model, mini_batch_size=2)
    )
    after: list[Any] = []
    step = trainer.training_step
    trainer.training_step = lambda *args: (step(*args), after.append(model[0]._memo))[0]
    with counted(model[0].model.vision_tower) as seen, pytest.raises(RuntimeError, match="broken"):
        trainer.train()
    assert kept == [5, 5, 5]
    assert after == [None, None]
    assert model[0]._memo is None
    assert sum(seen) == 3 * tiles(model, range(5))


def test_a_memo_that_is_full_takes_no_more(model, stock, monkeypatch):
    with model[0].one_step(), counted(model[0].model.vision_tower) as seen:
        model[0]._memo.room = 60_000
        found = run(model, LOSSES["cached"], features_of(model, "composed items"))
        held = [each[0].numel() * 4 for each in model[0]._memo.values()]
    assert held
    assert sum(held) <= 60_000
    assert sum(seen) > tiles(model, range(5))
    check_same(found, run(stock, LOSSES["plain"], features_of(stock, "composed items")))


def test_features_on_another_device_have_another_place(model):
    memo = Memo(100)
    memo.keep((torch.device("cpu"), (1, 2)), (torch.ones(3),))
    assert (torch.device("meta"), (1, 2)) not in memo
    assert memo.room == 88


# ---- other families ----


@pytest.mark.parametrize(("name", "tower"), [("qwen3_vl", "visual"), ("gemma3", "vision_tower")])
def test_other_families_keep_what_stands_at_the_door_of_the_language_model(checkpoint, name, tower):
    model = load_for_training(str(checkpoint(name)), bits=32, lora_r=RANK, lora_dropout=0.0, text_only=False).train()
    draw_adapter(model)
    columns = features_of(model, "composed items")
    expected = run(model, LOSSES["plain"], without_keys(columns))
    alone = model.preprocess(images(range(5)))
    with counted(getattr(model[0].model, tower)) as once:
        model[0](without_keys([alone])[0])
    for make in LOSSES.values():
        with model[0].one_step(), counted(getattr(model[0].model, tower)) as seen:
            check_same(run(model, make, [dict(column) for column in columns]), expected)
        assert sum(seen) == sum(once)
