"""Rows of tables, compared with what ``csv``, ``json``, pandas and pyarrow read from the same file."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from e5v_st.tables import PARQUET_ROWS, beside, load_folder, open_table, read_number, read_truth

#: Texts that writers quote, and readers guess a type of.
HARD = [
    "",
    "a",
    "007",
    "1e5",
    "NA",
    "None",
    "true",
    "2024-01-31",
    "ü",
    "a,b",
    "a\tb",
    'a "b"',
    '"',
    "a\nb",
    "a\r\nb",
    "a\rb",
]
HARD += ["\u2028", "\x85", " a ", "a;b", '""', ",", "\t", "\x00", "\ufeff", "'"]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(path):
    return list(open_table(path))


def none_if_empty(found):
    return [{name: value or None for name, value in row.items()} for row in found]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("seed", range(4))
def test_a_csv_has_the_rows_that_pythons_csv_reads(tmp_path, seed, end):
    choose = random.Random(seed)
    text = io.StringIO(newline="")
    # Python's writer leaves a break that is not its own without quotes, which its reader does not take for a text
    writer = csv.writer(text, lineterminator=end, quoting=csv.QUOTE_MINIMAL if end == "\r\n" else csv.QUOTE_ALL)
    writer.writerow(["id", "text", "note"])
    writer.writerows([[choose.choice(HARD) for _ in range(3)] for _ in range(200)])
    path = write(tmp_path / "a.csv", text.getvalue())
    table = open_table(path)
    reader = csv.DictReader(io.StringIO(text.getvalue(), newline=""))
    assert list(table) == none_if_empty(reader)
    assert table["text"] == [row["text"] for row in table]
    order = choose.sample(range(200), 50)
    assert [table[row] for row in order] == [list(table)[row] for row in order]
    assert table[-1] == table[199]
    with pytest.raises(IndexError):
        table[200]
    assert rows(write(tmp_path / "a.csv.gz", gzip.compress(path.read_bytes()))) == list(table)


@pytest.mark.parametrize("seed", range(4))
def test_a_tsv_that_pandas_wrote_has_its_rows(tmp_path, seed):
    choose = random.Random(seed)
    frame = pd.DataFrame([[choose.choice(HARD) for _ in range(3)] for _ in range(200)], columns=["id", "text", "note"])
    frame.to_csv(tmp_path / "a.tsv", sep="\t", index=False, lineterminator="\r\n")
    assert rows(tmp_path / "a.tsv") == none_if_empty(frame.to_dict("records"))


@pytest.mark.parametrize(
    "texts",
    [
        ['"hello', "two", "three", 'say "', "five"],
        ["one", '"two" and more', "three"],
        ["one", '"two', 'three"', "four"],
        ['"', '"', '"'],
    ],
)
def test_a_stray_quote_in_a_tsv_swallows_no_row(tmp_path, texts):
    for columns in ("id\ttext", "text\tid"):
        flip = columns.startswith("text")
        lines = [f"{text}\t{i}" if flip else f"{i}\t{text}" for i, text in enumerate(texts)]
        path = write(tmp_path / "a.tsv", "\n".join([columns, *lines]))
        table = open_table(path)
        expected = pd.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE, dtype=str)["text"].tolist()
        assert table["text"] == expected == texts
        assert table["id"] == [str(i) for i in range(len(texts))]
        line = next(i for i, text in enumerate(texts, start=2) if text.startswith('"'))
        assert table.notes == [
            f"quotes are read as characters, since one that opens on line {line} is not closed there"
        ]


def test_a_stray_quote_beside_quoted_tabs_is_refused_and_not_guessed(tmp_path):
    path = write(tmp_path / "a.tsv", 'id\ttext\n1\t"a\tb"\n2\t"c\n3\td"\n4\te\n')
    with pytest.raises(ValueError, match=r"a\.tsv cannot be read: line 2: 1 more fields than the header names"):
        open_table(path)


def test_a_quote_in_a_csv_that_may_have_swallowed_rows_is_told(tmp_path):
    path = write(tmp_path / "a.csv", 'id,text\n1,"hello\n2,two\n3,say "\n4,"a\nb"\n')
    assert open_table(path).notes == ["1 quote that may have swallowed rows: line 2"]
    assert open_table(path)["id"] == pd.read_csv(path, dtype=str)["id"].tolist() == ["1", "4"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", 'id,text\n1,a\n2,"b\n3,c\n', r"line 3 \(read up to line 4\): its quotes do not fit: unexpected end"),
        ("a.csv", 'id,text\n1,"a" b\n', "line 2: its quotes do not fit: ',' expected after"),
        ("a.csv", "id,text\n1,a, b\n", "line 2: 1 more fields than the header names"),
        ("a.csv", "id,text\n1,a\nb\n", "line 3: got 1 fields, want the 2 that the header names"),
        ("a.csv", "id,text,id\n1,a,2\n", "it has 2 columns named 'id'"),
        ("a.csv", ",,\n1,a,2\n", "no column has a name"),
        ("a.csv", "\n\n", "it is empty"),
        ("a.csv", "id;text\n1;a, b\n", "'id;text', has semicolons between the names.*want commas: save it with commas"),
        ("a.csv", '"id";"text"\n"1";"a"\n', "has semicolons"),
        ("a.csv", "id\ttext\n1\ta\n", "has tabs between the names of the columns, want commas: name it .tsv"),
        ("a.tsv", "id,text\n1,a\n", "has commas between the names of the columns, want tabs: save it with tabs"),
        ("a.csv", "id,text\n1,a\n".encode("utf-16"), "it is UTF-16.*iconv -f utf-16"),
        ("a.csv.gz", b"id,text\n", "Not a gzipped file"),
        ("a.csv.gz", gzip.compress(b"id,text\n1,a\n", mtime=0)[:10] + b"\xff" * 20, "Error -3 while decompressing"),
        ("a.csv.gz", gzip.compress(b"id,text\n1,a\n", mtime=0)[:-9], "Compressed file ended"),
        ("a.jsonl", '{"text": "a", "text": "b"}\n', "line 1: not JSON .the key 'text' stands twice"),
        ("a.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", '{"text": "a"}\n\n[1]\n', "line 3: got a list, want an object"),
        ("a.json", '[{"text": "a"}, 3]', "row 2: got a int, want an object"),
        ("a.json", '[{"text": "a"}', "it is not JSON"),
        ("a.json", b'[{"text": "a"},\n{"text": "\xe9"}]', "line 2: the byte 0xe9 is not UTF-8"),
        ("a.parquet", b"PAR1" * 9, "a.parquet cannot be read"),
    ],
)
def test_what_would_be_read_wrongly_is_refused_with_its_line(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=f"{name} cannot be read: .*{message}|{message}") as caught:
        open_table(write(tmp_path / name, content))
    assert str(caught.value).startswith(f"{tmp_path / name} cannot be read: ")


def test_fields_without_name_and_content_are_no_fault(tmp_path):
    path = write(tmp_path / "a.csv", ",id,text,\n0,x,A dog.\n1,y,A cat.,,\n")
    table = open_table(path)
    assert table.column_names == ["id", "text"]
    assert list(table) == [{"id": "x", "text": "A dog."}, {"id": "y", "text": "A cat."}]


def test_empty_lines_are_left_out_and_told(tmp_path):
    content = "\nid,text\n1,a\n\n  \n,\n" + "\n" * 5 + "2,b\n"
    table = open_table(write(tmp_path / "a.csv", content))
    assert table["text"] == ["a", None, "b"]
    assert len(table) == len(pd.read_csv(io.StringIO(content)))
    assert table.lines.tolist() == [3, 6, 12]
    assert table.notes == ["8 empty lines left out: lines 1, 4, 5, 7, 8 and 3 more"]
    table = open_table(write(tmp_path / "a.jsonl", '{"text": "a"}\n\n{"text": "b"}\n'))
    assert table.where(1) == f"{tmp_path / 'a.jsonl'}, line 3"
    assert table.notes == ["1 empty line left out: line 2"]
    one = write(tmp_path / "one.csv", 'text\na\n""\n\nb\n')  # an empty text, as pandas writes it, is a row
    assert open_table(one)["text"] == ["a", None, "b"]


def test_json_lines_have_the_values_that_pythons_json_reads(tmp_path):
    values = [
        12345678901234567890123,
        -1,
        1.5,
        True,
        None,
        "2024-01-31",
        "\u2028\u2029\x85\x1c",
        "😀",
        [1],
        {"a": 1},
    ]
    found = [{"id": i, "value": value} for i, value in enumerate(values)] + [{"late": "x"}]
    for ascii_only in (True, False):
        lines = [json.dumps(row, ensure_ascii=ascii_only) for row in found]
        text = "\ufeff" + "\r\n".join(lines) + "\n"
        table = open_table(write(tmp_path / "a.jsonl", text))
        assert table.column_names == ["id", "value", "late"]
        full = [{"id": None, "value": None, "late": None, **json.loads(line)} for line in lines]
        assert list(table) == full
        as_list = write(tmp_path / "a.json", "[" + ",\n".join(lines) + "]")
        assert rows(as_list) == full
        assert rows(write(tmp_path / "b.json", text)) == full
        assert open_table(as_list).where(3) == f"{as_list}, row 4"


@pytest.mark.parametrize("group", [10, 1000])
def test_parquet_has_its_rows_in_any_order(tmp_path, group):
    count = 3 * PARQUET_ROWS + 7
    found = [{"id": i, "image": {"bytes": bytes([i % 256]), "path": None}, "a.b": [i]} for i in range(count)]
    pq.write_table(pa.Table.from_pylist(found), tmp_path / "a.parquet", row_group_size=group)
    table = open_table(tmp_path / "a.parquet")
    assert list(table) == pq.read_table(tmp_path / "a.parquet").to_pylist() == found
    order = random.Random(0).sample(range(count), count)
    images = table.select_columns(["image"])
    assert [images[row] for row in order] == [{"image": found[row]["image"]} for row in order]
    assert table["a.b"] == [[i] for i in range(count)]
    assert table.where(0) == f"{tmp_path / 'a.parquet'}, row 1"


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_that_changes_while_it_is_read_is_refused(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    frame = pd.DataFrame({"id": [str(i) for i in range(500)]})
    save = frame.to_parquet if suffix == ".parquet" else frame.to_csv
    save(path, index=False)
    table = open_table(path)
    assert table[0] == {"id": "0"}
    os.utime(path, (1, 1))
    with pytest.raises(ValueError, match="has changed since it was opened: start again"):
        table[499]


def test_a_damaged_page_of_parquet_names_file_and_row(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"id": [os.urandom(50).hex() for _ in range(500)]})
    pq.write_table(table, path, compression="zstd", row_group_size=100)
    data = bytearray(path.read_bytes())
    data[4:40] = b"\xff" * 36
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read: row 1: "):
        open_table(path)[0]


def test_paths_in_a_table_are_relative_to_its_folder_and_addresses_are_not_paths(tmp_path):
    for address in ("https://x/a.png", "data:image/png;base64,iVBORw0KGgo=", b"bytes", None, "/a.png"):
        assert beside(address, tmp_path) == (Path("/a.png") if address == "/a.png" else address)
    for path in ("a.png", "../data/a.png"):
        expected = tmp_path / path
        assert beside(path, tmp_path) == beside({"bytes": None, "path": path}, tmp_path) == expected
        assert beside([path, b"x"], tmp_path) == [expected, b"x"]
    assert beside({"bytes": b"x", "path": "a.png"}, tmp_path) == {"bytes": b"x", "path": "a.png"}


def test_numbers_and_truth_values_are_read_from_text_and_nothing_else_is():
    for text in ("10.0", "4", "-0.5", " 3 ", "1e-3"):
        assert read_number(text, "") == json.loads(text)
    assert read_number(3, "") == 3.0
    for bad in ("", "4,5", "nan", "inf", "high", "1_000", None, True, [1], "9" * 400, float("nan"), 10**400):
        with pytest.raises(ValueError, match=r"rows\.csv, line 3: got .*, want a number"):
            read_number(bad, "rows.csv, line 3")
    for text in ("True", "true", "TRUE", " 1", "1.0", 1, True, 1.0):
        assert read_truth(text, "") is True
    for text in ("False", "false", "FALSE", "0", "0.0", 0, False, 0.0):
        assert read_truth(text, "") is False
    for bad in ("", "yes!", None, 2, "2"):
        with pytest.raises(ValueError, match=r"rows\.csv, line 3: got .*, want true or false"):
            read_truth(bad, "rows.csv, line 3")


def test_a_folder_for_datasets_is_read_again_when_its_content_changed(tmp_path):
    """Compressed too: ``datasets`` finds what it has unpacked by the path alone."""
    folder = tmp_path / "data"
    folder.mkdir()
    for text in ("A dog.", "A cat.", "A dog."):
        with gzip.GzipFile(folder / "test.jsonl.gz", "wb", mtime=0) as file:
            file.write(json.dumps({"text": text}).encode())
        os.utime(folder / "test.jsonl.gz", (1_700_000_000, 1_700_000_000))
        assert load_folder(folder, "test").to_list() == [{"text": text}]
