"""Embeds pictures and sentences with the embedded model, and answers queries; needs no network."""

from __future__ import annotations

import argparse
import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import write_atomically

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer

QUERIES = ("a flag", "a man lifting weights", "a woman with dark skin")
#: Rows and columns of the similarity matrix: names of pictures that no training step has seen.
MATRIX_SIZE = 5
TOP = 5


@dataclass(frozen=True)
class Picture:
    """A picture of the gallery."""

    name: str
    png: bytes


@dataclass(frozen=True)
class Answer:
    """A query, its own picture where it has one, and the gallery's best with their cosines."""

    query: str
    shown: Picture | None
    found: list[tuple[Picture, float]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``e5v demo``."""
    parser.add_argument(
        "--model", default="e5v-tiny", help="any E5-V: a directory or hub id (default: the embedded one)"
    )
    parser.add_argument(
        "--html", type=Path, default=Path("demo.html"), help="where to write the page (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Runs ``e5v demo``: prints the similarity matrix and rankings, and writes them with pictures to a page."""
    from .encoder import encode_all
    from .loading import load

    model = load(args.model)
    gallery, composed = read_gallery()
    embeddings = encode_all(model, [{"image": picture.png} for picture in gallery])
    rows = pick_matrix(gallery)
    matrix = model.encode([gallery[row].name for row in rows]) @ embeddings[rows].T
    words = read_words(model, [gallery[row] for row in rows])
    answers = [answer(model, gallery, embeddings, query) for query in QUERIES]
    reference, change = composed
    answers.append(answer(model, gallery, embeddings, change, reference))
    answers.append(answer(model, gallery, embeddings, None, gallery[rows[0]]))

    names = [gallery[row].name for row in rows]
    print(format_matrix(names, matrix))
    print("\nThe picture in the model's own words:")
    for name, row in zip(names, words, strict=True):
        print(f"  {name:28.28} {', '.join(row)}")
    for each in answers:
        print(f"\n{each.query}")
        for picture, score in each.found:
            print(f"  {score:6.3f}  {picture.name}")
    page = render_page([gallery[row] for row in rows], matrix, words, answers, len(gallery))
    write_atomically(args.html, page)
    print(f"\nThe same with pictures: {args.html.resolve()}")
    return 0


def read_gallery() -> tuple[list[Picture], tuple[Picture, str]]:
    """Returns the held-out pictures of the small benchmark, and one composed query (reference, change in words)."""
    import pyarrow.parquet as pq

    folder = resources.files("e5v_st.mteb_tasks") / "data"
    columns = ["id", "image", "name", "split", "gallery"]
    rows = pq.read_table(folder / "emoji.parquet", columns=columns).to_pylist()
    pictures = {row["id"]: Picture(row["name"], row["image"]) for row in rows}
    gallery = [pictures[row["id"]] for row in rows if row["gallery"] and row["split"] in ("combination", "concept")]
    triplets = pq.read_table(folder / "composed.parquet").to_pylist()
    triplet = next(row for row in triplets if row["split"] == "combination" and row["change"] == "tone")
    return gallery, (pictures[triplet["reference"]], triplet["text"])


def pick_matrix(gallery: Sequence[Picture]) -> list[int]:
    """Evenly spaced pictures with short names, so that the matrix is readable and not chosen by its outcome."""
    short = [row for row, picture in enumerate(gallery) if len(picture.name) <= 16]
    return short[:: max(1, len(short) // MATRIX_SIZE)][:MATRIX_SIZE]


def read_words(model: SentenceTransformer, pictures: Sequence[Picture]) -> list[list[str]]:
    """The model's own words for each picture, or none where the checkpoint has lost its head."""
    from .readout import words

    try:
        return words(model, [{"image": picture.png} for picture in pictures], k=4)
    except ValueError:
        return [[] for _ in pictures]


def answer(
    model: SentenceTransformer,
    gallery: Sequence[Picture],
    embeddings: np.ndarray,
    text: str | None,
    shown: Picture | None = None,
) -> Answer:
    """Ranks the gallery for a text, a picture, or a picture with a change in words; the shown picture is left out."""
    item: dict[str, Any] = {"image": shown.png} if shown else {}
    if text is not None:
        item["text"] = text
    scores = embeddings @ model.encode(item)
    best = [row for row in (-scores).argsort() if gallery[row] != shown][:TOP]
    label = f"{shown.name} + “{text}”" if shown and text else f"“{text}”" if text else f"like {shown.name}"
    return Answer(label, shown, [(gallery[row], float(scores[row])) for row in best])


def format_matrix(names: Sequence[str], matrix: np.ndarray) -> str:
    """The cosines of sentences (rows) and pictures (columns) as text."""
    width = max(map(len, names))
    lines = ["Sentences (down) and pictures (across), cosine:", ""]
    lines.append(" " * width + "  " + "  ".join(f"{name[:10]:>10}" for name in names))
    lines += [
        f"{name:{width}}  " + "  ".join(f"{value:10.3f}" for value in row)
        for name, row in zip(names, matrix, strict=True)
    ]
    return "\n".join(lines)


STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
h1{font-size:1.6rem} h2{font-size:1.1rem;margin:2rem 0 .5rem}
table{border-collapse:collapse} td,th{padding:.3rem .6rem;text-align:center} th[scope=row]{text-align:right}
img{width:60px;height:60px} figure{margin:0;width:7rem;text-align:center;font-size:.8rem} figcaption b{display:block}
.row{display:flex;flex-wrap:wrap;gap:.75rem;align-items:flex-start} .scroll{overflow-x:auto}
.query{border-right:2px solid #ccc;padding-right:.75rem}
"""


def render_page(
    pictures: Sequence[Picture],
    matrix: np.ndarray,
    words: Sequence[Sequence[str]],
    answers: Sequence[Answer],
    size: int,
) -> str:
    """The whole demo as one HTML page that opens from disk."""
    head = "".join(f"<th>{_image(picture)}</th>" for picture in pictures)
    body = "".join(
        f"<tr><th scope=row>{html.escape(picture.name)}</th>"
        + "".join(f'<td style="background:rgba(46,125,50,{max(0.0, float(v)):.2f})">{v:.2f}</td>' for v in row)
        + "</tr>"
        for picture, row in zip(pictures, matrix, strict=True)
    )
    read = "".join(f"<td>{html.escape(', '.join(row)) or '–'}</td>" for row in words)
    table = f"<table><tr><td></td>{head}</tr>{body}<tr><th scope=row>in its own words</th>{read}</tr></table>"
    sections = "".join(
        f"<h2>{html.escape(each.query)}</h2><div class=row>"
        + (f"<figure class=query>{_image(each.shown)}<figcaption>query</figcaption></figure>" if each.shown else "")
        + "".join(
            f"<figure>{_image(picture)}<figcaption><b>{score:.3f}</b>{html.escape(picture.name)}</figcaption></figure>"
            for picture, score in each.found
        )
        + "</div>"
        for each in answers
    )
    return (
        '<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>E5-V demo</title><style>{STYLE}</style><h1>E5-V: words and pictures in one space</h1>"
        f"<p>{size} pictures that were held out of training, found by words, by a picture, and by a picture with a "
        f"change in words.</p><div class=scroll>{table}</div>{sections}</html>\n"
    )


def _image(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return f'<img alt="{html.escape(picture.name)}" src="data:image/png;base64,{data}">'
