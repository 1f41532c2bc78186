"""The training split of the emoji data, and the text that is made of it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

DATA = resources.files("e5v_st.mteb_tasks") / "data"
#: Words that say nothing of what is seen; every skin tone's name has "skin tone" in it.
_STOP_WORDS = "a an and at for from in into is it of on or s skin that the to tone used which with"
STOP_WORDS = frozenset(_STOP_WORDS.split())
#: An image whose name has one of these must not be mirrored.
HANDED = re.compile(
    r"left|right|clock|thirty|arrow|flag|keycap|button|down|up|sign|circled|east|west|input|square|ideograph"
)
Row = dict[str, Any]


@dataclass(frozen=True)
class Data:
    """The training part: images as uint8 (n, 3, 60, 60), rows, and triplets (reference, text, target) of indices."""

    pixels: torch.Tensor
    rows: list[Row]
    composed: list[tuple[int, str, int]]
    glosses: list[tuple[str, str]]
    things: list[int]


def read(name: str) -> list[Row]:
    """Returns the rows of one of the data's Parquet files."""
    import pyarrow.parquet as pq

    return pq.read_table(DATA / name).to_pylist()


def load_data() -> Data:
    """Returns the training split; nothing held out is in it."""
    import numpy as np
    import torch
    from PIL import Image

    rows = [row for row in read("emoji.parquet") if row["split"] == "train"]
    pictures = [np.asarray(Image.open(io.BytesIO(row.pop("image"))).convert("RGB")) for row in rows]
    where = {row["id"]: i for i, row in enumerate(rows)}
    composed = [r for r in read("composed.parquet") if r["split"] == "train"]
    glosses = [r for r in read("text_pairs.parquet") if r["split"] == "train" and r["kind"] == "gloss"]
    return Data(
        pixels=torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(),
        rows=rows,
        composed=[(where[r["reference"]], r["text"], where[r["target"]]) for r in composed],
        glosses=[(r["query"], r["target"]) for r in glosses],
        things=[i for i, row in enumerate(rows) if not row["tone"]],
    )


def pictures(rows: list[Row]) -> list[Any]:
    """Returns the rows' images as PIL images."""
    from PIL import Image

    return [Image.open(io.BytesIO(row["image"])).convert("RGB") for row in rows]


def content_words(text: str) -> list[str]:
    """Returns the lower-case words of a text that say something."""
    return [word for word in re.findall(r"[^\W_]+", text.lower()) if word not in STOP_WORDS]


def bag(tokenizer: PreTrainedTokenizerFast, parts: Sequence[tuple[float, Iterable[str]]]) -> dict[int, float]:
    """Returns token id -> probability: each part's weight spread over its words, each word's over its tokens."""
    found: dict[int, float] = {}
    for weight, texts in parts:
        words = [word for text in texts for word in content_words(text)]
        for word in words:
            ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
            for token in ids:
                found[token] = found.get(token, 0.0) + weight / len(words) / len(ids)
    total = sum(found.values())
    return {token: share / total for token, share in found.items()}


def mirror(name: str) -> bool:
    """Whether an image means the same when mirrored."""
    return HANDED.search(name.lower()) is None
