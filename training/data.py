"""Training data: pairs or triplets from a file or the hub, checked row by row, and the cut of long sentences.

What is wrong with a file is counted and reported with line numbers. Nothing is dropped without saying so.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e5v_st.files import hash_file, is_hub_id, locate
from e5v_st.tables import Table, beside, is_table, load_folder, open_table, read_truth

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


@dataclass
class Report:
    """What was found in a training file.

    ``notes`` tell how it was read. ``incomplete`` rows lack a text and are left out; ``duplicates`` repeat an earlier
    row word for word and are kept. Both hold line numbers of the file (row numbers, from 1, for Parquet and data sets).
    """

    source: str
    rows: int = 0
    columns: tuple[str, ...] = ()
    sha256: str | None = None
    notes: list[str] = field(default_factory=list)
    incomplete: list[int] = field(default_factory=list)
    duplicates: list[int] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Returns the report in words, a line for each fact."""
        found = [f"{self.source}: {self.rows:,} rows of {', '.join(self.columns)}", *self.notes]
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
        source: A table (see ``e5v_st.tables``) or the id of a data set on the hub, of which the ``train`` split is
            read. Columns are named as in :data:`COLUMNS`.

    Returns:
        A data set with the columns ``anchor``, ``positive`` and, for triplets, ``negative``; and what was found.

    Raises:
        ValueError: If columns are missing, the file cannot be read, or no row is left.
        OSError: If there is no such file or data set.
    """
    from datasets import Dataset

    rows, _, _ = _open_rows(source, "train")
    is_file = isinstance(rows, Table)
    report = Report(source, sha256=rows.sha256 if is_file else None, notes=rows.notes if is_file else [])
    names = _find_columns(source, rows.column_names)
    columns: list[list[str]] = [[] for _ in names]
    seen: set[tuple[str, ...]] = set()
    for line, row in zip(rows.lines if is_file else range(1, len(rows) + 1), rows, strict=True):
        texts = tuple(row[name] for name in names)
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
    if not Path(source).is_dir() and (is_table(Path(source)) or not is_hub_id(source)):
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


def _open_rows(source: str, split: str) -> tuple[Table | Dataset, Callable[[int], str], Path | None]:
    """Opens a file or a data set.

    Returns:
        The rows; what tells a user where a row stands; and the file, if it is one.
    """
    path = find_file(source)
    if path is not None:
        table = open_table(path)
        return table, table.where, path
    if Path(source).is_dir():
        data = load_folder(Path(source), split)
    else:
        from datasets import load_dataset

        data = load_dataset(source, split=split)
    return data, lambda row: f"{source} ({split}), row {row + 1}", None


def read_split(source: str, split: str) -> list[tuple[str, dict[str, Any]]]:
    """Returns the rows of a file or a data set on the hub that belong to a split, each with where it stands.

    A file belongs to the split as a whole unless it has a column ``split``; rows whose column ``gallery`` is false are
    left out. Paths in the column ``image`` of a file are relative to its folder.

    Raises:
        ValueError: If the file cannot be read, or its column ``split`` or ``gallery`` holds something else.
    """
    rows, where, path = _open_rows(source, split)
    names = rows.column_names
    for note in rows.notes if isinstance(rows, Table) else ():
        logger.warning("%s: %s", source, note)
    found = []
    for number, row in enumerate(rows):
        if path is not None and "split" in names and row["split"] is None:
            raise ValueError(f"{where(number)}: the column 'split' is empty")
        if "split" in names and row["split"] != split:
            continue
        shown = row.get("gallery")
        if shown is not None and not read_truth(shown, f"{where(number)}, column 'gallery'"):
            continue
        if path is not None and "image" in names:
            row["image"] = beside(row["image"], path.parent)
        found.append((where(number), row))
    return found


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
