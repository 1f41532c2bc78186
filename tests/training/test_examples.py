from __future__ import annotations

import gzip
import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from e5v_st.training.examples import load_triplets, read_split

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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "anchor,positive,label\na,b,0\n",
            "has the column 'label'.*Keep the rows whose two texts mean",
        ),
        ("a.csv", "sent0,sent1,Score\na,b,0.5\n", "has the column 'Score', which training does not use"),
        (
            "a.csv",
            "anchor,positive,negative_1,negative_2\na,b,c,d\n",
            "'negative_1' and 'negative_2', want hard_neg",
        ),
        ("a.jsonl", '{"anchor": "a", "positive": "b", "negatives": ["c"]}', "'negatives', want hard_neg or negative"),
    ],
)
def test_columns_that_would_change_the_meaning_of_the_others_are_refused(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        load_triplets(write(tmp_path / name, content))


def test_what_is_not_used_and_what_is_not_a_text_is_told(tmp_path):
    rows = [
        {"id": 1, "anchor": "a", "query": "q", "positive": "b", "negative": "c", "negative_2": "d"},
        {"id": 2, "anchor": "a", "positive": ["b"], "negative": "c"},
        {"id": 3, "anchor": "a", "positive": "b", "negative": 7},
        {"id": 4, "anchor": "", "positive": ["b"], "negative": None},
        {"id": 5, "anchor": "a", "positive": " ", "negative": None},
    ]
    found, report = load_triplets(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))
    assert found.to_list() == [{"anchor": "a", "positive": "b", "negative": "c"}]
    assert report.lines()[1:] == [
        "columns that are not used: id, query, negative_2",
        "1 rows with an empty text are left out: line 5",
        "2 rows with a value of type list, not a text, are left out: lines 2, 4",
        "1 rows with a value of type int, not a text, are left out: line 3",
    ]


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
        ("a.jsonl", '{"anchor": "a", "positive": ["b"]}', "no complete row.*type list, not a text.*line 1"),
        ("a.jsonl", '{"anchor": "a", "positive": "b"}\n{"anchor"', "line 2: not JSON"),
        ("a.jsonl", "[1]\n", "line 1: got a list"),
        ("a.xlsx", "", "unknown format"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_line(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        load_triplets(write(tmp_path / name, content))


def test_a_split_is_read_and_what_is_not_in_the_gallery_left_out(tmp_path):
    rows = [
        {"id": 1, "split": "validation", "gallery": True},
        {"id": 2, "split": "validation", "gallery": False},
        {"id": 3, "split": "test", "gallery": True},
    ]
    source = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert [row["id"] for _, row in read_split(source, "validation")] == [1]
