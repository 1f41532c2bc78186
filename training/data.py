"""Training data: pairs or triplets from a file or the hub, checked row by row, and the cut of long sentences.

What is wrong with a file is counted and reported with line numbers. Nothing is dropped without saying so.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e5v_st.files import hash_file, is_hub_id, locate

if TYPE_CHECKING:
    from datasets import Dataset
    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

#: Data sets that are one file of a hub repository. E5-V's (ft_llm.py) are SimCSE's about 275,000 triplets from SNLI and
#: MultiNLI.
HUB_FILES = {"princeton-nlp/datasets-for-simcse": "nli_for_simcse.csv"}

#: Names that the columns may have, in the order anchor, positive, hard negative (the last may be missing).
COLUMNS = (("sent0", "anchor", "query", "premise"), ("sent1", "positive", "target"), ("hard_neg", "negative"))

ROOT = Path(__file__).parents[1]
_SHOWN = 5

Row = tuple[int, dict[str, Any]]


@dataclass
class Report:
    """What was found in a training file.

    ``incomplete`` rows lack a text and are left out; ``duplicates`` repeat an earlier row word for word and are kept.
    Both hold line numbers of the file (row numbers, from 1, for Parquet and data sets).
    """

    source: str
    rows: int = 0
    columns: tuple[str, ...] = ()
    sha256: str | None = None
    incomplete: list[int] = field(default_factory=list)
    duplicates: list[int] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Returns the report in words, a line for each fact."""
        found = [f"{self.source}: {self.rows:,} rows of {', '.join(self.columns)}"]
        if self.incomplete:
            found.append(f"{len(self.incomplete):,} rows with an empty text are left out: {_some(self.incomplete)}")
        if self.duplicates:
            found.append(f"{len(self.duplicates):,} rows repeat an earlier one and are kept: {_some(self.duplicates)}")
        return found


def _some(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - _SHOWN:,} more" if len(numbers) > _SHOWN else ""
    return f"line{'s' * (len(numbers) > 1)} " + ", ".join(map(str, numbers[:_SHOWN])) + more


def load_triplets(source: str) -> tuple[Dataset, Report]:
    """Reads pairs or triplets.

    Args:
        source: A ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet`` file (text may be gzipped) or the id of a data set on
            the hub, of which the ``train`` split is read. Columns are named as in :data:`COLUMNS`.

    Returns:
        A data set with the columns ``anchor``, ``positive`` and, for triplets, ``negative``; and what was found.

    Raises:
        ValueError: If columns are missing, the text is no UTF-8, a line is no JSON, or no row is left.
        OSError: If there is no such file or data set.
    """
    from datasets import Dataset

    path = find_file(source)
    report = Report(source=source, sha256=None if path is None else hash_file(path))
    rows = _hub_rows(source) if path is None else read_rows(path)
    names: list[str] = []
    columns: list[list[str]] = []
    seen: set[tuple[str, ...]] = set()
    for line, row in rows:
        if not names:
            names = _find_columns(source, list(row))
            columns = [[] for _ in names]
        texts = tuple(row.get(name) for name in names)
        if not all(isinstance(text, str) and text.strip() for text in texts):
            report.incomplete.append(line)
            continue
        if texts in seen:
            report.duplicates.append(line)
        seen.add(texts)
        for column, text in zip(columns, texts, strict=True):
            column.append(text)
    if not seen:
        raise ValueError(f"{source} has no complete row: {'; '.join(report.lines())}")
    report.columns, report.rows = tuple(names), len(columns[0])
    return Dataset.from_dict(dict(zip(("anchor", "positive", "negative"), columns, strict=False))), report


def _find_columns(source: str, found: list[str]) -> list[str]:
    """Returns the names of the anchor, the positive and, where there is one, the negative column."""
    names = [next((name for name in wanted if name in found), None) for wanted in COLUMNS]
    if names[0] is None or names[1] is None:
        missing = [" or ".join(wanted) for wanted, name in zip(COLUMNS[:2], names, strict=False) if name is None]
        raise ValueError(f"{source} lacks the column {' and '.join(missing)}; it has {', '.join(map(repr, found))}")
    return [name for name in names if name is not None]


def find_file(source: str) -> Path | None:
    """Returns the file that ``source`` names, fetched from the hub if need be; ``None`` for a data set on the hub.

    A relative path is looked for in the current directory, then where this package lies (so that recipes can name the
    files that come with it).

    Raises:
        FileNotFoundError: If it looks like a file, but there is none.
        ValueError: If it looks like a misspelt path, or what was fetched is not what the hub has.
    """
    if source in HUB_FILES:
        return fetch(source, HUB_FILES[source])
    source = os.path.expanduser(source)
    for path in (Path(source), ROOT / source):
        if path.is_file():
            return path
    if not Path(source).is_dir() and not is_hub_id(source):
        raise FileNotFoundError(f"there is no file {source} (looked in {Path.cwd()} and {ROOT})")
    locate(source)  # refuses what is more likely a misspelt path
    return None


def fetch(repository: str, name: str) -> Path:
    """Downloads a file of a data set on the hub, going on where an earlier try stopped, and checks its hash.

    Raises:
        ValueError: If the file's SHA-256 is not the one that the hub has stored it under.
    """
    from huggingface_hub import hf_hub_download

    path = Path(hf_hub_download(repository, name, repo_type="dataset"))
    stored = path.resolve().name  # the cache names large files by the SHA-256 that the hub gives for them
    if len(stored) == 64 and stored != hash_file(path):
        raise ValueError(f"{path} is damaged: its SHA-256 is not {stored}. Delete {path.resolve()} and start again")
    return path


def read_rows(path: Path) -> Iterator[Row]:
    """Yields line number and row of a CSV, TSV, JSONL or Parquet file.

    Raises:
        ValueError: If the format is not known, the text is not UTF-8, or a line cannot be read; it names the line.
    """
    name = path.name.removesuffix(".gz")
    reader = _READERS.get(Path(name).suffix)
    if reader is None:
        raise ValueError(f"{path.name} is of an unknown format, want one of {', '.join(_READERS)} (text may be .gz)")
    return reader(path)


def _read_text(path: Path) -> str:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {line}: the byte 0x{data[error.start]:02x} is not UTF-8. "
            f"Convert the file, for example: iconv -f latin1 -t utf8 {path.name} > utf8-{path.name}"
        ) from None


def _read_separated(path: Path, delimiter: str = ",") -> Iterator[Row]:
    csv.field_size_limit(2**24)
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), delimiter=delimiter, strict=True)
    line = 2
    try:
        for row in reader:
            if None in row:
                raise ValueError(f"{path}, line {line}: {len(row[None])} more fields than the header names")
            yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: {error}") from error


def _read_tabs(path: Path) -> Iterator[Row]:
    return _read_separated(path, "\t")


def _read_json_lines(path: Path) -> Iterator[Row]:
    for line, text in enumerate(_read_text(path).splitlines(), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: no JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {line}: got a {type(row).__name__}, want an object with the columns")
        yield line, row


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet as pq

    line = 0
    for batch in pq.ParquetFile(path).iter_batches():
        for row in batch.to_pylist():
            line += 1
            yield line, row


_READERS = {".csv": _read_separated, ".tsv": _read_tabs, ".jsonl": _read_json_lines, ".parquet": _read_parquet}


def _hub_rows(source: str, split: str = "train") -> Iterator[Row]:
    from datasets import load_dataset

    return enumerate(load_dataset(source, split=split), start=1)


def read_split(source: str, split: str) -> list[dict[str, Any]]:
    """Returns the rows of a file or a data set on the hub that belong to a split.

    A file belongs to the split as a whole unless it has a column ``split``; rows whose column ``gallery`` is false are
    left out.
    """
    path = find_file(source)
    rows = _hub_rows(source, split) if path is None else read_rows(path)
    return [row for _, row in rows if row.get("split", split) == split and row.get("gallery", True) is not False]


def cut_sentences(tokenizer: Tokenizer, sentences: Sequence[str], max_tokens: int) -> list[str]:
    """Returns the sentences, each cut after ``max_tokens`` tokens (32 in ft_llm.py); shorter ones to the letter.

    Args:
        tokenizer: One that takes every text as content, such as ``PromptTokenizer.plain``.
        sentences: Without any prompt.
        max_tokens: At least 1.
    """
    encoded = tokenizer.encode_batch(list(sentences), add_special_tokens=False)
    return [
        sentence if len(encoding) <= max_tokens else sentence[: encoding.offsets[max_tokens - 1][1]]
        for sentence, encoding in zip(sentences, encoded, strict=True)
    ]
