"""``e5v app``: a page on 127.0.0.1 that searches a table by a text, an image, or both.

The page shows what the table holds: thumbnails go into it as data, and no file of this machine is served. What the
browser uploads as a query is kept by Gradio in a temporary folder, and deleted after an hour. Needs the extra ``app``.
"""

from __future__ import annotations

import argparse
import base64
import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..devices import check_device
from ..model.images_e5v import open_image
from ..options import add_device
from .search import embed_with, find_models, open_model
from .table_search import MODES, open_for_search, search_table, vector_of

if TYPE_CHECKING:
    import gradio
    import numpy as np
    from sentence_transformers import SentenceTransformer

HOST = "127.0.0.1"
TOP, WORDS = 24, 5
#: Uploaded images are deleted after so many seconds, and looked for as often.
UPLOADS = (3600, 3600)
#: A larger query image than a camera takes is more likely a mistake.
MAX_UPLOAD = "64mb"
#: What is wrong with a query is said in so many characters.
SHOWN = 300
STYLE = """
.e5v{display:grid;grid-template-columns:repeat(auto-fill,minmax(9rem,1fr));gap:.75rem}
.e5v figure{margin:0;overflow-wrap:anywhere;font-size:.85rem}
.e5v img{width:100%;height:9rem;object-fit:contain}
.e5v .none{height:9rem;display:flex;align-items:center;justify-content:center;border:1px solid #8884;padding:.5rem}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``e5v app``."""
    parser.add_argument("index", metavar="table", type=Path, help="a table of `e5v index`, best with --thumbnails")
    for kind in ("model", "adapter"):
        parser.add_argument(f"--{kind}", help=f"where the {kind} of the table is now, if it has moved")
    add_device(parser)
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    parser.add_argument("--no-browser", action="store_true", help="do not open the page in a browser")


def run(args: argparse.Namespace) -> int:
    """Runs ``e5v app`` until Ctrl-C."""
    check_device(args.device)
    table, job = open_for_search(args.index)
    prepare_gradio()
    model, adapter = find_models(args, job)
    with open_model(job, model=model, adapter=adapter, device=args.device) as loaded:
        page = make_page(Searcher(table, job, loaded), args.index.name)
        start(page, port=args.port, inbrowser=not args.no_browser)
    return 0


# ---- what the page does ----


@dataclass(frozen=True)
class Answer:
    """What a query has found.

    Attributes:
        rows: As ``search_table`` returns them, with thumbnails.
        note: One line: what was found, or what is wrong with the query.
    """

    rows: Sequence[dict[str, Any]]
    note: str


class Searcher:
    """Answers the queries of a page; what cannot be read is said in one line.

    Args:
        table: Of LanceDB.
        job: What the table says of itself.
        model: The model that made it.
    """

    def __init__(self, table: Any, job: dict[str, Any], model: SentenceTransformer) -> None:
        self.table, self.job, self.model = table, job, model
        self._head: Any = None

    def search(self, text: str | None, image: str | None, where: str | None = None, mode: str = "vector") -> Answer:
        """Searches by a text, by an image file, or by an image with a modification text.

        Args:
            text: The text; nothing or blanks for an image alone.
            image: The path of an image.
            where: A condition; see ``search_table``.
            mode: See ``search_table``.
        """
        text = text.strip() if text else ""
        try:
            if not text and not image:
                raise ValueError("type a text, drop an image, or both")
            item: dict[str, Any] = {"text": text} if text else {}
            if image:
                item["image"] = _open(image)
            vector = None if mode == "text" else embed_with(self.model, item, self.job, None)
            return self._find(vector, text, where, mode, "the image as the text says" if len(item) == 2 else "")
        except (ValueError, TypeError) as error:
            return Answer([], _one_line(error))

    def more_like(self, name: str, where: str | None = None) -> Answer:
        """Searches by the embedding of a row."""
        try:
            return self._find(vector_of(self.table, name), None, where, "vector", f"more like {name}")
        except ValueError as error:
            return Answer([], _one_line(error))

    def _find(self, vector: np.ndarray | None, text: str | None, where: str | None, mode: str, what: str) -> Answer:
        where = where.strip() if where else None
        shown = bool(self.job["thumbnails"])
        rows = search_table(self.table, vector, text, mode=mode, where=where, top=TOP, thumbnails=shown)
        if not rows:
            return Answer([], "nothing was found" + (", with this filter" if where else ""))
        found = f"{len(rows)} of {self.table.count_rows():,} rows"
        words = self._words(rows[0]["id"])
        best = f"the model's words for the first: {words}" if words else ""
        return Answer(rows, "; ".join(filter(None, (found, what, best))))

    def _words(self, name: str) -> str:
        from ..readout import load_head, words_of

        try:
            self._head = load_head(self.model).float() if self._head is None else self._head
            return ", ".join(words_of(self.model, vector_of(self.table, name)[None], WORDS, self._head)[0])
        except ValueError:  # a model without a head, or with another pooling, has no words
            return ""


def _open(path: str) -> Any:
    """Opens an uploaded image; the message names the file as the user knows it, without Gradio's folder."""
    try:
        return open_image(Path(path))
    except ValueError as error:
        reason = str(error).rpartition(" as an image: ")[2].replace(path, Path(path).name)
        raise ValueError(f"{Path(path).name} cannot be read as an image: {reason}") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def render(rows: Sequence[dict[str, Any]]) -> str:
    """Returns results as HTML, with their thumbnails as data."""
    return f'<div class="e5v">{"".join(map(_figure, range(1, len(rows) + 1), rows))}</div>'


def _figure(rank: int, row: dict[str, Any]) -> str:
    name, text = html.escape(str(row["id"])), html.escape(str(row.get("text") or ""))
    if row.get("thumbnail"):
        data = base64.b64encode(row["thumbnail"]).decode()
        shown = f'<img alt="{name}" src="data:image/jpeg;base64,{data}">'
    else:
        shown = f'<div class="none">{text or name}</div>'
    caption = f"<b>{rank}. {row['score']:.3f}</b><br>{name}{'<br>' + text if text and text != name else ''}"
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"


# ---- the page ----


def prepare_gradio() -> None:
    """Switches off what Gradio would tell others, before it is imported."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio  # noqa: F401 - the line that names the extra comes before a model is loaded


def make_page(searcher: Searcher, title: str) -> gradio.Blocks:
    """Returns the page.

    Args:
        searcher: Answers its queries.
        title: Its heading.
    """
    import gradio as gr

    columns = ", ".join(name for name in searcher.table.schema.names if name not in ("vector", "content", "details"))
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=UPLOADS) as page:
        gr.Markdown(f"# {title}")
        with gr.Row():
            with gr.Column(min_width=280):
                text = gr.Textbox(label="Text", placeholder="a dog in the snow", lines=2, max_lines=4, elem_id="text")
                where = gr.Textbox(label="Filter", placeholder="width > 800", info=f"columns: {columns}", max_lines=1)
                mode = gr.Radio(list(MODES), value="vector", label="By", visible=_has_words(searcher.table))
            with gr.Column(min_width=280):
                image = gr.File(label="Image: drop it here", type="filepath", height=140, elem_id="image")
        go = gr.Button("Search", variant="primary", elem_id="go")
        note = gr.Textbox(label="Found", interactive=False, elem_id="note", lines=2)
        results = gr.HTML(elem_id="results")
        like = gr.Radio([], label="More like this", visible=False, elem_id="like")

        def show(answer: Answer) -> tuple[str, str, Any]:
            names = [str(row["id"]) for row in answer.rows]
            return answer.note, render(answer.rows), gr.Radio(names, value=None, visible=bool(names))

        outputs = [note, results, like]
        gr.on(
            [go.click, text.submit, where.submit],
            lambda *query: show(searcher.search(*query)),
            [text, image, where, mode],
            outputs,
            api_name="search",
        )
        like.input(lambda name, where: show(searcher.more_like(name, where)), [like, where], outputs, api_name="more")
    return page


def _has_words(table: Any) -> bool:
    from .lance_table import index_of

    return index_of(table, "text") is not None


def start(page: gradio.Blocks, *, port: int, inbrowser: bool = False, block: bool = True) -> str:
    """Serves a page on 127.0.0.1, and on nothing else.

    Args:
        page: See :func:`make_page`.
        port: Its port; 0 takes any that is free.
        inbrowser: Whether to open it.
        block: Whether to wait until Ctrl-C.

    Returns:
        Its address.
    """
    import gradio as gr

    fonts = ["system-ui", "sans-serif"]  # Gradio's own come from a server
    try:
        _, address, _ = page.launch(
            server_name=HOST,
            server_port=port or None,
            share=False,
            inbrowser=inbrowser,
            quiet=True,
            allowed_paths=[],
            max_file_size=MAX_UPLOAD,
            prevent_thread_lock=True,
            footer_links=[],
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            css=STYLE,
            theme=gr.themes.Base(font=fonts, font_mono=["monospace"]),
        )
    except OSError as error:
        raise OSError(f"port {port} of {HOST} cannot be had: choose another with --port") from error
    print(f"the page is at {address} (Ctrl-C ends it)")
    if block:
        page.block_thread()
    return str(address)
