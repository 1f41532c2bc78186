"""A teacher's stored embeddings as labels."""

from __future__ import annotations

import json

import numpy as np
import pytest

import e5v_st
from e5v_st.cli import main
from e5v_st.training.item_rows import load_items
from e5v_st.training.sources import Source, read_sources

ROWS = [
    {"id": f"row-{n}", "anchor": f"a dog number {n}", "positive": f"dog {n}", "negative": f"no dog {n}"}
    for n in range(5)
]


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A table, and an index of each of its columns."""
    folder = tmp_path_factory.mktemp("taught")
    table = folder / "rows.jsonl"
    table.write_text("\n".join(map(json.dumps, ROWS)))
    for role in ("anchor", "positive", "negative"):
        words = ["embed", str(table), str(folder / role), "--model", "e5v-tiny", "--text-column", role]
        assert main(words) == 0
    return table, {role: str(folder / role) for role in ("anchor", "positive", "negative")}


def test_labels_are_the_teachers_cosines_of_each_row(taught):
    table, teacher = taught
    model = e5v_st.load("e5v-tiny", device="cpu")
    anchor, positive, negative = (
        model.encode([row[role] for row in ROWS]) for role in ("anchor", "positive", "negative")
    )
    expected = np.stack([(anchor * positive).sum(1), (anchor * negative).sum(1)], axis=1)
    data, _ = load_items(Source(str(table), teacher=teacher))
    np.testing.assert_allclose(data["label"], expected, atol=1e-5)


def test_a_pair_has_one_number(taught, tmp_path):
    table, teacher = taught
    columns = {"anchor": "anchor", "positive": "positive"}
    data, _ = load_items(Source(str(table), columns=columns, teacher=teacher))
    assert np.shape(data["label"]) == (5,)


def test_a_role_without_a_teacher_and_another_table_are_refused(taught, tmp_path):
    table, teacher = taught
    with pytest.raises(ValueError, match="names no index of negative"):
        load_items(Source(str(table), teacher={role: teacher[role] for role in ("anchor", "positive")}))
    other = tmp_path / "rows.jsonl"
    other.write_text(table.read_text() + "\n")
    with pytest.raises(ValueError, match="was made from another table"):
        load_items(Source(str(other), teacher=teacher))
    with pytest.raises(ValueError, match="is not an index"):
        load_items(Source(str(table), teacher={**teacher, "anchor": str(tmp_path)}))


def test_one_folder_may_hold_the_indexes_by_their_roles(taught):
    table, teacher = taught
    (source,) = read_sources([{"data": str(table), "teacher": str(table.parent)}])
    assert dict(source.teacher) == teacher
    with pytest.raises(ValueError, match="has none of the folders anchor, positive, negative"):
        read_sources([{"data": str(table), "teacher": str(table.parent / "anchor")}])
