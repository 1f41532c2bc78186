from __future__ import annotations

import gzip
import hashlib
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from e5v_st.training import data
from e5v_st.training.data import cut_sentences, fetch, load_triplets, read_split

CSV = """sent0,sent1,hard_neg
a dog,an animal,no dog
"two
lines",two,one
,empty,x
a dog,an animal,no dog
"""


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_a_file_is_read_and_what_is_wrong_is_said_with_line_numbers(tmp_path):
    rows, report = load_triplets(write(tmp_path / "a.csv", CSV))
    assert rows["anchor"][:] == ["a dog", "two\nlines", "a dog"]
    assert rows["negative"][:] == ["no dog", "one", "no dog"]
    assert report.incomplete == [5]
    assert report.duplicates == [6]
    assert [line.split(":")[-1] for line in report.lines()[1:]] == [" line 5", " line 6"]
    assert report.sha256 == hashlib.sha256(CSV.encode()).hexdigest()


def test_every_format_gives_the_same_rows(tmp_path):
    rows = [{"anchor": "a", "positive": "b"}, {"anchor": "ä", "positive": "d\te"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    sources = [
        str(tmp_path / "a.parquet"),
        write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n"),
        write(tmp_path / "a.csv", "\ufeffanchor,positive\na,b\nä,d\te\n"),
        write(tmp_path / "a.csv.gz", gzip.compress("anchor,positive\na,b\nä,d\te\n".encode())),
        write(tmp_path / "a.tsv", 'anchor\tpositive\na\tb\nä\t"d\te"\n'),
    ]
    for source in sources:
        assert load_triplets(source)[0].to_list() == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "one,two\n1,2\n", "lacks the column sent0 or anchor.*it has 'one', 'two'"),
        (
            "a.csv",
            "anchor,positive\nfine,fine\ncaf\xe9,x\n".encode("latin1"),
            "line 3: the byte 0xe9 is not UTF-8.*iconv",
        ),
        ("a.csv", "anchor,positive\na,b,c\n", "line 2: 1 more fields"),
        ("a.csv", 'anchor,positive\na,b\n"open,b\n', "line 3"),
        ("a.csv", "anchor,positive\n", "no complete row"),
        ("a.csv", "anchor,positive\n ,b\n", "no complete row.*line 2"),
        ("a.jsonl", '{"anchor": "a", "positive": "b"}\n{"anchor"', "line 2: not JSON"),
        ("a.jsonl", "[1]\n", "line 1: got a list"),
        ("a.xlsx", "", "unknown format"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_line(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        load_triplets(write(tmp_path / name, content))


def test_a_missing_file_is_not_looked_for_on_the_hub():
    with pytest.raises(FileNotFoundError, match=r"no file nowhere/a\.csv"):
        load_triplets("nowhere/a.csv")


def test_files_that_come_with_the_project_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows, report = load_triplets("mteb_tasks/data/tiny_triplets.csv.gz")
    assert len(rows) == report.rows == 9336
    assert not report.incomplete


def test_a_damaged_download_is_refused(tmp_path, monkeypatch):
    import huggingface_hub

    good = tmp_path / hashlib.sha256(b"good").hexdigest()
    (tmp_path / "file.csv").symlink_to(good)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **kwargs: str(tmp_path / "file.csv"))
    good.write_bytes(b"good")
    assert fetch("some/data", "file.csv").read_bytes() == b"good"
    good.write_bytes(b"gold")
    with pytest.raises(ValueError, match="damaged"):
        fetch("some/data", "file.csv")


def test_the_papers_data_set_is_its_one_file(tmp_path, monkeypatch):
    asked = []
    path = tmp_path / "nli.csv"
    path.write_text("sent0,sent1,hard_neg\na,b,c\n")
    monkeypatch.setattr(data, "fetch", lambda *what: asked.append(what) or path)
    assert len(load_triplets("princeton-nlp/datasets-for-simcse")[0]) == 1
    assert asked == [("princeton-nlp/datasets-for-simcse", "nli_for_simcse.csv")]


def test_a_split_is_read_and_what_is_not_in_the_gallery_left_out(tmp_path):
    rows = [
        {"id": 1, "split": "validation", "gallery": True},
        {"id": 2, "split": "validation", "gallery": False},
        {"id": 3, "split": "test", "gallery": True},
    ]
    source = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert [row["id"] for _, row in read_split(source, "validation")] == [1]


def test_a_local_folder_of_the_shape_of_a_hub_id_is_read_as_it_is_now(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "nli").mkdir(parents=True)
    for text in ("a", "b"):
        write(tmp_path / "me" / "nli" / "train.jsonl", json.dumps({"anchor": text, "positive": "c"}))
        os.utime(tmp_path / "me" / "nli" / "train.jsonl", (1_700_000_000, 1_700_000_000))
        assert load_triplets("me/nli")[0]["anchor"][:] == [text]


def test_only_sentences_that_are_too_long_are_cut(small):
    import e5v_st

    plain = e5v_st.load(small, device="cpu")[0].prompt_tokenizer.plain
    long = "Two men are playing chess in a park while it rains on <image> and more and more."
    short, cut = cut_sentences(plain, ["A  dog. ", long], 12)
    assert short == "A  dog. "
    assert long.startswith(cut)
    assert len(plain.encode(cut).ids) == 12
