"""Rows of any kind become items, and each row that cannot be used is told by file and line."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from e5v_st.model.items_e5v import read_item
from e5v_st.training.collate import read_cell
from e5v_st.training.item_rows import load_items
from e5v_st.training.sources import Source
from e5v_st.training.webdataset import Shards, expand_braces


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8))


def png(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "m").mkdir()
    for seed in range(4):
        picture(seed).save(tmp_path / "m" / f"{seed}.png")
    (tmp_path / "m" / "broken.png").write_bytes(png(9)[:60])
    return tmp_path


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def contents(cell: Any) -> tuple[str | None, list[list[list[list[int]]]]]:
    """Text and pixels of a cell, as encode would read them."""
    item = read_item(read_cell(cell))
    return item.sentence, [np.asarray(image).tolist() for image in item.images]


def pixels(*seeds: int) -> list[list[list[list[int]]]]:
    return [np.asarray(picture(seed)).tolist() for seed in seeds]


ROW = {"anchor_text": "is red", "anchor_image": "m/0.png", "positive_image": "m/1.png", "negative_image": "m/2.png"}


def test_columns_of_texts_and_images_become_items(folder):
    data, report = load_items(Source(write_lines(folder / "a.jsonl", [ROW])))
    assert data.column_names == ["anchor", "positive", "negative"]
    assert [contents(data[0][role]) for role in data.column_names] == [
        ("is red", pixels(0)),
        (None, pixels(1)),
        (None, pixels(2)),
    ]
    assert (report.rows, report.unused) == (1, ())


def test_every_format_gives_the_same_items(folder):
    row = {"anchor_text": "a mug", "positive_image": "m/1.png"}
    sources = [write_lines(folder / "a.jsonl", [row])]
    for name, mark in (("a.csv", ","), ("a.tsv", "\t")):
        (folder / name).write_text(f"anchor_text{mark}positive_image\na mug{mark}m/1.png\n")
        sources.append(str(folder / name))
    pq.write_table(pa.table({"anchor_text": ["a mug"], "positive_image": [png(1)]}), folder / "a.parquet")
    sources.append(str(folder / "a.parquet"))
    with tarfile.open(folder / "a-00.tar", "w") as archive:
        for name, content in (("7.anchor.txt", b"a mug"), ("7.positive.png", png(1))):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    sources.append(str(folder / "a-{00..00}.tar"))
    (folder / "data-url.csv").write_text(f'anchor,positive_image\na mug,"{data_url(png(1))}"\n')
    sources.append(str(folder / "data-url.csv"))
    (folder / "m" / "metadata.csv").write_text("file_name,text\n1.png,a mug\n")
    sources.append(str(folder / "m"))
    for source in sources:
        data, _ = load_items(Source(source))
        found = [contents(data[0][role]) for role in ("anchor", "positive")]
        assert found == [("a mug", []), (None, pixels(1))], source


def data_url(content: bytes) -> str:
    import base64

    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def test_images_of_a_dataset_of_the_hub_are_left_undecoded_and_used(folder, monkeypatch):
    import datasets

    rows = datasets.Dataset.from_dict({"anchor": ["a mug"], "positive": [{"bytes": png(1), "path": None}]})
    rows = rows.cast_column("positive", datasets.Image())
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    data, _ = load_items(Source("me/mugs"))
    assert [contents(data[0][role]) for role in ("anchor", "positive")] == [("a mug", []), (None, pixels(1))]


def test_a_row_may_show_several_images_and_hold_several_negatives(folder):
    row = {"anchor": "two", "positive_image": ["m/0.png", "m/1.png"], "negative_1": "no", "negative_2_image": "m/3.png"}
    data, _ = load_items(Source(write_lines(folder / "a.jsonl", [row])))
    assert data.column_names == ["anchor", "positive", "negative_1", "negative_2"]
    assert contents(data[0]["positive"]) == (None, pixels(0, 1))
    assert contents(data[0]["negative_2"]) == (None, pixels(3))


def test_a_bare_string_is_a_text_even_where_it_names_an_image(folder, monkeypatch):
    monkeypatch.chdir(folder)
    data, _ = load_items(Source(write_lines(folder / "a.jsonl", [{"anchor": "m/0.png", "positive_image": "m/0.png"}])))
    assert contents(data[0]["anchor"]) == ("m/0.png", [])


def test_columns_with_other_names_are_named_in_the_recipe(folder):
    source = write_lines(folder / "a.jsonl", [{"title": "a mug", "photo": "m/1.png", "price": 3}])
    data, report = load_items(Source(source, columns={"anchor_text": "title", "positive_image": "photo"}))
    assert contents(data[0]["positive"]) == (None, pixels(1))
    assert report.unused == ("price",)
    with pytest.raises(ValueError, match="there is no column 'foto'"):
        load_items(Source(source, columns={"anchor_text": "title", "positive_image": "foto"}))
    with pytest.raises(ValueError, match="'query_image_text' is no role"):
        load_items(Source(source, columns={"query_image_text": "title", "positive_image": "photo"}))


def test_a_column_of_ids_is_looked_up_in_a_table_of_images(folder):
    pq.write_table(pa.table({"id": ["x", "y"], "image": [png(0), png(1)]}), folder / "images.parquet")
    rows = [{"anchor_image": "x", "anchor_text": "is blue", "positive_image": "y"}]
    data, _ = load_items(Source(write_lines(folder / "a.jsonl", rows), images=str(folder / "images.parquet")))
    assert contents(data[0]["anchor"]) == ("is blue", pixels(0))
    rows[0]["positive_image"] = "z"
    with pytest.raises(ValueError, match=r"b.jsonl, line 1: column 'positive_image': no image has the id 'z'"):
        load_items(Source(write_lines(folder / "b.jsonl", rows), images=str(folder / "images.parquet")))


def test_rows_of_another_split_are_left_out(folder):
    rows = [{"anchor": f"{n}", "positive_image": "m/1.png", "split": split} for n, split in enumerate("aab")]
    data, _ = load_items(Source(write_lines(folder / "a.jsonl", rows), split="a"))
    assert [contents(cell)[0] for cell in data["anchor"]] == ["0", "1"]


def test_texts_alone_stay_plain_texts(folder):
    (folder / "a.csv").write_text("anchor,positive\na,b\n")
    data, _ = load_items(Source(str(folder / "a.csv")))
    assert data[0] == {"anchor": "a", "positive": "b"}


def test_scores_become_labels_where_the_loss_wants_them(folder):
    source = Source(write_lines(folder / "a.jsonl", [{"anchor": "a", "positive_image": "m/1.png", "score": "0.5"}]))
    data, _ = load_items(source, labelled=True)
    assert data.column_names == ["anchor", "positive", "label"]
    assert data[0]["label"] == 0.5
    with pytest.raises(ValueError, match="which this loss does not use"):
        load_items(source)
    with pytest.raises(ValueError, match="which the loss needs"):
        load_items(Source(write_lines(folder / "b.jsonl", [ROW])), labelled=True)


BAD = {
    "a file that is missing": ({"positive_image": "m/none.png"}, "there is no such file"),
    "a truncated image": ({"positive_image": "m/broken.png"}, "cannot read .*broken.png"),
    "an empty item": ({"positive_image": ""}, "there is nothing for the positive"),
    "a blank text alone": ({"anchor_text": " ", "anchor_image": None}, "there is nothing for the anchor"),
    "a number for a text": ({"anchor_text": 3}, "column 'anchor_text': got 3, want a text"),
    "a negative that is the positive": ({"negative_image": "m/1.png"}, "the negative equals its anchor or positive"),
    "an address that is not fetched": ({"positive_image": "s3://a/b.png"}, "only http:// and https://"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_told_by_file_and_line_and_skipped_on_request(folder, kind):
    change, message = BAD[kind]
    source = Source(write_lines(folder / "a.jsonl", [ROW, {**ROW, "anchor_text": "is worse", **change}, ROW]))
    with pytest.raises(ValueError, match=rf"1 rows cannot be used: .*a.jsonl, line 2: .*{message}.*on_bad_row: skip"):
        load_items(source)
    data, report = load_items(source, on_bad_row="skip")
    assert len(data) == report.rows == 2
    assert list(report.left_out.values()) == [[2]]
    assert "1 rows with " in "\n".join(report.lines())
    assert report.duplicates == [3]


def test_equal_pixels_in_another_file_are_the_same_image(folder):
    picture(1).save(folder / "m" / "copy.bmp")
    source = Source(write_lines(folder / "a.jsonl", [{**ROW, "negative_image": "m/copy.bmp"}]))
    with pytest.raises(ValueError, match="the negative equals its anchor or positive"):
        load_items(source)


@pytest.mark.parametrize("on_bad_row", ["stop", "skip"])
def test_a_source_without_a_usable_row_is_refused(folder, on_bad_row):
    with pytest.raises(ValueError, match="1 rows cannot be used"):
        load_items(
            Source(write_lines(folder / "a.jsonl", [{**ROW, "positive_image": "no.png"}])), on_bad_row=on_bad_row
        )
    with pytest.raises(ValueError, match="has no rows of the split 'test'"):
        load_items(Source(write_lines(folder / "b.jsonl", [{**ROW, "split": "train"}]), split="test"))


def test_missing_columns_are_named(folder):
    with pytest.raises(ValueError, match="lacks the column positive; it has 'anchor', 'other'"):
        load_items(Source(write_lines(folder / "a.jsonl", [{"anchor": "a", "other": "b"}])))


def test_braces_stand_for_the_names_of_shards():
    assert expand_braces("a-{08..10}-{0..1}.tar")[:3] == ["a-08-0.tar", "a-08-1.tar", "a-09-0.tar"]
    with pytest.raises(FileNotFoundError, match="there is no file nowhere-"):
        Shards("nowhere-*.tar")


def test_a_damaged_shard_is_named(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"a.tar cannot be read"):
        Shards(str(tmp_path / "a.tar"))
