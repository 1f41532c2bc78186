"""Embeds images and texts with the small model, and answers queries. Needs no network.

The demo has two parts: what the small model is good at, and what it has never seen.
"""

from __future__ import annotations

import argparse
import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import write_atomically
from .gallery import COMBINATION, CONCEPT, GalleryImage, read_gallery
from .options import add_model_name

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer

#: Rows and columns of a similarity matrix.
MATRIX_SIZE = 5
#: Images that are shown for a query.
TOP = 5


@dataclass(frozen=True)
class Part:
    """A part of the demo: which images it shows, what is said of them, and what is searched for."""

    unseen: str
    title: str
    note: str
    queries: tuple[str, ...]


PARTS = (
    Part(
        COMBINATION,
        "Held-out combinations",
        "Training has shown these people and gestures to the small model, but never in this skin tone or gender. "
        "It finds most of them.",
        ("a woman scientist", "a woman with dark skin"),
    ),
    Part(
        CONCEPT,
        "Unseen concepts",
        "Training has shown neither these images nor their names to the small model. It is wrong about most of them.",
        ("a flag",),
    ),
)


@dataclass(frozen=True)
class Answer:
    """A query, the image in it if there is one, and the best images of the gallery with their cosines."""

    query: str
    shown: GalleryImage | None
    found: list[tuple[GalleryImage, float]]


@dataclass(frozen=True)
class Result:
    """What a part of the demo found.

    Attributes:
        part: The part.
        size: Number of images that were searched.
        images: Those of the matrix.
        matrix: Cosines between the names of ``images`` (rows) and ``images`` (columns).
        words: The model's own words for each of ``images``.
        answers: To the queries.
    """

    part: Part
    size: int
    images: list[GalleryImage]
    matrix: np.ndarray
    words: list[list[str]]
    answers: list[Answer]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``e5v demo``."""
    add_model_name(parser, default="e5v-tiny")
    parser.add_argument(
        "--html", type=Path, default=Path("demo.html"), help="where to write the page (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Runs ``e5v demo``: prints similarity matrices and rankings, and writes them with the images to a page."""
    from .loading import load

    model = load(args.model)
    gallery, composed = read_gallery()
    results = []
    for part in PARTS:
        images = [image for image in gallery if image.unseen == part.unseen]
        results.append(show_part(model, part, images, composed if part.unseen == COMBINATION else None))
        print(format_result(results[-1]))
    write_atomically(args.html, render_page(results))
    print(f"The same with images: {args.html.resolve()}")
    return 0


def show_part(
    model: SentenceTransformer,
    part: Part,
    gallery: Sequence[GalleryImage],
    composed: tuple[GalleryImage, str] | None,
) -> Result:
    """Computes a part of the demo.

    Args:
        model: An E5-V.
        part: What is shown.
        gallery: The images of this part.
        composed: An image and a modification text, to be answered too.
    """
    from .encoder import encode_all
    from .index.nearest import unit

    embeddings = unit(encode_all(model, [{"image": image.png} for image in gallery]))
    rows = pick_matrix(gallery)
    images = [gallery[row] for row in rows]
    matrix = unit(model.encode([{"text": image.name} for image in images])) @ embeddings[rows].T
    answers = [answer(model, gallery, embeddings, query) for query in part.queries]
    if composed is not None:
        answers.append(answer(model, gallery, embeddings, composed[1], composed[0]))
    answers.append(answer(model, gallery, embeddings, None, images[0]))
    return Result(part, len(gallery), images, matrix, read_words(model, images), answers)


def pick_matrix(gallery: Sequence[GalleryImage]) -> list[int]:
    """Returns evenly spaced images with short names: the matrix is readable, and not chosen by its outcome."""
    short = [row for row, image in enumerate(gallery) if len(image.name) <= 16]
    return short[:: max(1, len(short) // MATRIX_SIZE)][:MATRIX_SIZE]


def read_words(model: SentenceTransformer, images: Sequence[GalleryImage]) -> list[list[str]]:
    """Returns the model's own words for each image, or none if the checkpoint has lost its head."""
    from .readout import words

    try:
        return words(model, [{"image": image.png} for image in images], k=4)
    except ValueError:
        return [[] for _ in images]


def answer(
    model: SentenceTransformer,
    gallery: Sequence[GalleryImage],
    embeddings: np.ndarray,
    text: str | None,
    shown: GalleryImage | None = None,
) -> Answer:
    """Ranks the gallery for a text, an image, or an image with a modification text. The query's image is left out."""
    from .index.nearest import unit

    item: dict[str, Any] = {"image": shown.png} if shown else {}
    if text is not None:
        item["text"] = text
    scores = embeddings @ unit(model.encode(item))
    best = [row for row in (-scores).argsort() if gallery[row] != shown][:TOP]
    label = f"“{text}”" if text else ""
    if shown is not None:
        label = f"{shown.name} + {label}" if label else f"like {shown.name}"
    return Answer(label, shown, [(gallery[row], float(scores[row])) for row in best])


# ---- as text ----


def format_result(result: Result) -> str:
    """Returns what a part of the demo found, as text."""
    names = [image.name for image in result.images]
    lines = [result.part.title, "", result.part.note, "", format_matrix(names, result.matrix)]
    lines += ["", "The images in the model's own words:"]
    lines += [f"  {name:28.28} {', '.join(row)}" for name, row in zip(names, result.words, strict=True)]
    for each in result.answers:
        lines += ["", each.query, *(f"  {score:6.3f}  {image.name}" for image, score in each.found)]
    return "\n".join([*lines, ""])


def format_matrix(names: Sequence[str], matrix: np.ndarray) -> str:
    """Returns the cosines of texts (rows) and images (columns), as text."""
    width = max(map(len, names))
    lines = ["Texts (down) and images (across), cosine:", ""]
    lines.append(" " * width + "  " + "  ".join(f"{name[:10]:>10}" for name in names))
    lines += [
        f"{name:{width}}  " + "  ".join(f"{value:10.3f}" for value in row)
        for name, row in zip(names, matrix, strict=True)
    ]
    return "\n".join(lines)


# ---- as a page ----

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
h1{font-size:1.6rem} h2{font-size:1.3rem;margin:2.5rem 0 .5rem} h3{font-size:1.1rem;margin:2rem 0 .5rem}
table{border-collapse:collapse} td,th{padding:.3rem .6rem;text-align:center} th[scope=row]{text-align:right}
img{width:60px;height:60px} figure{margin:0;width:7rem;text-align:center;font-size:.8rem} figcaption b{display:block}
.row{display:flex;flex-wrap:wrap;gap:.75rem;align-items:flex-start} .scroll{overflow-x:auto}
.query{border-right:2px solid #ccc;padding-right:.75rem}
"""


def render_page(results: Sequence[Result]) -> str:
    """Returns the whole demo as one HTML page that opens from disk."""
    size = sum(result.size for result in results)
    return (
        '<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>E5-V demo</title><style>{STYLE}</style><h1>E5-V: texts and images in one space</h1>"
        f"<p>{size} images that were held out of training, found by a text, by an image, and by an image with a "
        f"modification text.</p>{''.join(map(_render_result, results))}</html>\n"
    )


def _render_result(result: Result) -> str:
    note = f"{result.part.note} {result.size} images are searched."
    table, answers = _render_matrix(result), "".join(map(_render_answer, result.answers))
    return f"<h2>{result.part.title}</h2><p>{note}</p><div class=scroll>{table}</div>{answers}"


def _render_matrix(result: Result) -> str:
    head = "".join(f"<th>{_image(image)}</th>" for image in result.images)
    rows = ""
    for image, values in zip(result.images, result.matrix, strict=True):
        cells = (f'<td style="background:rgba(46,125,50,{max(0.0, float(v)):.2f})">{v:.2f}</td>' for v in values)
        rows += f"<tr><th scope=row>{html.escape(image.name)}</th>{''.join(cells)}</tr>"
    words = "".join(f"<td>{html.escape(', '.join(row)) or '–'}</td>" for row in result.words)
    return f"<table><tr><td></td>{head}</tr>{rows}<tr><th scope=row>in its own words</th>{words}</tr></table>"


def _render_answer(answer: Answer) -> str:
    shown = answer.shown and f"<figure class=query>{_image(answer.shown)}<figcaption>query</figcaption></figure>"
    found = "".join(
        f"<figure>{_image(image)}<figcaption><b>{score:.3f}</b>{html.escape(image.name)}</figcaption></figure>"
        for image, score in answer.found
    )
    return f"<h3>{html.escape(answer.query)}</h3><div class=row>{shown or ''}{found}</div>"


def _image(image: GalleryImage) -> str:
    data = base64.b64encode(image.png).decode()
    return f'<img alt="{html.escape(image.name)}" src="data:image/png;base64,{data}">'
