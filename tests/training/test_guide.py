"""False negatives by a guide: what sentence-transformers' guided loss gives, and what is computed by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sentence_transformers.sentence_transformer import losses
from torch.nn.functional import normalize

from e5v_st.training.guide import Before, GuidedRankingLoss

ROWS, SIZE, SCALE = 6, 5, 10.0


class Table(torch.nn.Module):
    """Stands for a model: a batch holds embeddings, which a trained matrix turns."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = torch.nn.Parameter(torch.eye(SIZE))

    def __getitem__(self, index: int) -> torch.nn.Module:
        return self

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"sentence_embedding": features["input_ids"] @ self.turn}


def columns(count: int) -> list[dict[str, torch.Tensor]]:
    numbers = torch.Generator().manual_seed(count)
    base = torch.randn(ROWS, SIZE, generator=numbers)
    near = [base + 0.9 * torch.randn(ROWS, SIZE, generator=numbers) for _ in range(count - 1)]
    return [{"input_ids": each} for each in (base, *near)]


def moved() -> tuple[Table, Before]:
    """A model that has been trained since its guide was taken."""
    model = Table()
    guide = Before(model)
    with torch.no_grad():
        model.turn += 0.3 * torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return model, guide


def compared(row: int, count: int, directions: tuple[str, ...]) -> Iterator[tuple[int, int, int, int, int | None]]:
    """What stands beside a row's positive: two columns and rows, and whose limit holds, none for a right pair."""
    docs = [(column, other) for column in range(1, count) for other in range(ROWS)]
    yield from ((0, row, column, other, row) for column, other in docs if (column, other) != (1, row))
    if "query_to_query" in directions:
        yield from ((0, row, 0, other, row) for other in range(ROWS) if other != row)
    if "doc_to_query" in directions:
        yield from ((1, row, 0, other, None if other == row else other) for other in range(ROWS))
    if "doc_to_doc" in directions:
        yield from ((1, row, column, other, row) for column, other in docs if other != row)


def by_hand(count: int, above: float, directions: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The loss, its gradient, and how many pairs are left out, row by row."""
    model, _ = moved()
    given = [each["input_ids"] for each in columns(count)]
    known = [normalize(each, dim=1) for each in given]
    own = [normalize(each @ model.turn, dim=1) for each in given]
    total, left_out = torch.zeros(()), 0
    for row in range(ROWS):
        logits = [own[0][row] @ own[1][row]]
        for column, place, other_column, other, limit in compared(row, count, directions):
            near = known[column][place] @ known[other_column][other]
            if limit is not None and near > known[0][limit] @ known[1][limit] + above:
                left_out += 1
            else:
                logits.append(own[column][place] @ own[other_column][other])
        total = total - torch.log_softmax(SCALE * torch.stack(logits), dim=0)[0] / ROWS
    total.backward()
    return total.detach(), model.turn.grad, left_out


def run(loss: torch.nn.Module, model: Table, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    value = loss(columns(count), None)
    value.backward()
    return value.detach(), model.turn.grad


@pytest.mark.parametrize("mini_batch_size", [4, 64])
@pytest.mark.parametrize("above", [0.0, -0.2])
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize(
    "directions",
    [
        ("query_to_doc",),
        ("query_to_doc", "doc_to_query"),
        ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),
    ],
    ids=["one", "both", "all"],
)
def test_the_loss_is_that_computed_by_hand(directions, count, above, mini_batch_size):
    expected, gradient, left_out = by_hand(count, above, directions)
    assert left_out > 0
    model, guide = moved()
    how = {"scale": SCALE, "directions": directions, "mini_batch_size": mini_batch_size}
    found = run(GuidedRankingLoss(model, guide, above, **how), model, count)
    torch.testing.assert_close(found, (expected, gradient), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [2, 3])
def test_it_is_the_stock_guided_loss_without_its_contrasts(small, count):
    """``GISTEmbedLoss`` wants whole models: here with the tokenizer of one, and the embeddings of the table."""
    model, guide = moved()
    expected = losses.GISTEmbedLoss(
        *(_with_tokenizer(each, small) for each in (model, Table())),
        temperature=1 / SCALE,
        margin=0.1,
        contrast_anchors=False,
        contrast_positives=False,
    )
    value, gradient = run(expected, model, count)
    model, guide = moved()
    found = run(GuidedRankingLoss(model, guide, -0.1, scale=SCALE), model, count)
    torch.testing.assert_close(found, (value, gradient), rtol=1e-5, atol=1e-6)


def _with_tokenizer(module: Table, small: Path) -> Table:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small)
    module.tokenizer, module.max_seq_length = tokenizer, 100
    return module


def test_the_guide_is_the_model_as_it_was_and_leaves_it_as_it_is():
    model = Table().train()
    guide = Before(model)
    batch = columns(2)[0]
    before = model(batch)["sentence_embedding"].detach()
    with torch.no_grad():
        model.turn *= 2
    torch.testing.assert_close(guide(batch)["sentence_embedding"], before)
    torch.testing.assert_close(model(batch)["sentence_embedding"], 2 * before)
    assert model.training
    assert not guide(batch)["sentence_embedding"].requires_grad
    with pytest.raises(RuntimeError), guide.restored():
        raise RuntimeError
    torch.testing.assert_close(model.turn.detach(), 2 * torch.eye(SIZE))
