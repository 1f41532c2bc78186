"""The encoder behind the model entries: what is E5-V's own in an evaluation.

Prompts by task and category, the edits of STS sentences, FashionIQ's two caption orders, and one encoding of each
distinct content: raw states are kept in a :class:`~mteb_tasks.store.Store`, so that T2I, I2T, I2I and composed tasks
share what they have in common.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice, tee
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from mteb.models.abs_encoder import AbsEncoder
from tqdm.auto import tqdm

from e5v_st.fingerprint import fingerprint
from e5v_st.model.prompts_e5v import PROMPTS, default_prompt

from .cir import clean_captions
from .ranks import gather, leave_writing_to_rank_0, own_device, rank, share, world_size
from .store import Store, default_folder, open_store

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from PIL.Image import Image
    from sentence_transformers import SentenceTransformer

#: mteb's own number of items in a batch, which it passes where nobody named one.
USUAL_BATCH = 32

#: Rows that are looked up in the store together, and new states that are kept together.
LOOK_UP, KEEP_EVERY = 64, 128

#: Prompt names of queries and documents by the task's name; other tasks have the default prompt for what a row holds.
TASK_PROMPTS = {
    "E5VFashionIQRetrieval": ("fashioniq-{subset}-query", "fashioniq-{subset}-gallery"),
    "E5VCIRRRetrieval": ("cirr-query", "cirr-gallery"),
    "E5VCIRRTest": ("cirr-query", "cirr-gallery"),
    "CIRRIT2IRetrieval": ("cirr-query", "cirr-gallery"),
}


def prompt_name(task: TaskMetadata, subset: str, role: str | None) -> str | None:
    """Returns the name of the prompt for a task's texts or images; ``None`` for the default prompt.

    Args:
        task: The task's metadata.
        subset: Such as a category of FashionIQ.
        role: ``"query"``, ``"document"`` or ``None``.
    """
    if task.type == "STS":
        return "sts"
    names = TASK_PROMPTS.get(task.name)
    return names[role == "document"].format(subset=subset) if names else None


def edit_sts_sentence(sentence: str) -> str:
    """Edits a sentence as the published ``eval_sts.py`` does, in its order; an empty one stays so."""
    sentence = " ".join(sentence.split())
    if sentence and not sentence.endswith((".", "?", '"', "'")):
        sentence += "."
    sentence = sentence.replace('"', "'")
    return sentence[:-1] + "." if sentence.endswith("?") else sentence


def caption_orders(captions: str) -> list[str]:
    """Returns the texts of a FashionIQ query: its captions in the given order and in reverse.

    Args:
        captions: One a line, as the task has them.
    """
    cleaned = clean_captions(captions.split("\n"))
    return [", ".join(cleaned), ", ".join(cleaned[::-1])]


class E5VEncoder(AbsEncoder):
    """Encodes the rows of mteb's tasks.

    Args:
        model: An E5-V. Where it has a ``truncate_dim``, embeddings are the leading dimensions, normalised.
        batch_tokens: Most tokens in a batch; see ``e5v_st.encode_all``.
        store: Keeps raw states by content, in all their dimensions; ``None`` keeps nothing.

    Raises:
        ValueError: If the model has fewer dimensions than its ``truncate_dim``.
    """

    def __init__(self, model: SentenceTransformer, batch_tokens: int | None = None, store: Store | None = None) -> None:
        self.model = model
        self.raw = without_normalize(model)
        self.width = self.raw.get_embedding_dimension()
        self.embed_dim = self.width if model.truncate_dim is None else model.truncate_dim
        if not 1 <= self.embed_dim <= self.width:
            raise ValueError(f"got {self.embed_dim} dimensions to keep, want 1 to {self.width}")
        self.batch_tokens = batch_tokens
        self.store = store
        self.fingerprint = fingerprint(model) if store else b""
        #: Contents that the last call encoded in this process: neither repeated nor found in the store.
        self.encoded = 0
        #: Name of the prompt of the last call; ``None`` for the default ones.
        self.prompt: str | None = None

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        show_progress_bar: bool = True,
        batch_size: int = USUAL_BATCH,
        **others: Any,
    ) -> np.ndarray:
        """Encodes rows with the columns ``text`` and/or ``image``, and ``captions`` where there is one.

        Args:
            inputs: A data loader of mteb.
            task_metadata: Chooses the prompt.
            hf_split: Part of the data; makes no difference.
            hf_subset: Chooses the prompt where a task has several.
            prompt_type: Whether they are queries or documents.
            show_progress_bar: Whether to show one.
            batch_size: Not used, and said so: batches are filled by tokens, see ``batch_tokens``.
            **others: Anything else is refused.

        Returns:
            float32 ``(rows, d)``, L2-normalised; in each process those of all processes.

        Raises:
            ValueError: If an argument is unknown, or an embedding is not finite.
        """
        if others:
            named = ", ".join(f"{key}={value!r}" for key, value in others.items())
            raise ValueError(f"encode_kwargs has {named}, which E5-V does not know: leave it out")
        if batch_size != USUAL_BATCH:
            used = "not used: E5-V fills batches by tokens (batch_tokens), and embeddings do not depend on them"
            warnings.warn(f"batch_size={batch_size} is {used}", stacklevel=2)
        role = getattr(prompt_type, "value", None)
        rows = len(inputs.dataset)
        own = share(rows)
        # mteb encodes queries before documents, and a query's image is as a rule in the gallery too: with a store to
        # keep it, its gallery embedding is computed beside the query's, after the same image
        gallery = prompt_name(task_metadata, hf_subset, "document") if role == "query" and self.store else None
        self.prompt = prompt_name(task_metadata, hf_subset, role)
        contents = _contents(_own_rows(inputs, own), self.prompt, gallery)
        title = " ".join(filter(None, (task_metadata.name, hf_subset, role)))
        has_images = "image" in (getattr(inputs.dataset, "column_names", None) or ())
        with tqdm(
            total=len(own),
            unit=" images" if has_images else " texts",
            desc=title,
            disable=not show_progress_bar or rank() > 0,
            smoothing=0.05,
        ) as bar:
            states = gather(self._sum_states(contents, bar)[:, : self.embed_dim], rows)
        bad = np.flatnonzero(~np.isfinite(states).all(axis=1))
        if len(bad):
            raise ValueError(
                f"{title}: {len(bad)} of {rows} embeddings are not finite, the first in row {bad[0]}; try bfloat16"
            )
        return _unit(states)

    def _sum_states(self, rows: Iterator[Row], bar: tqdm) -> np.ndarray:
        """Returns the sum of the raw states of each row's contents, float32 ``(rows, d)``."""
        from e5v_st.encoder import stream_all

        keys: list[list[bytes]] = []
        states: dict[bytes, np.ndarray] = {}
        coming: deque[tuple[bytes, int]] = deque()
        new: dict[bytes, np.ndarray] = {}
        items, prompts = tee(self._missing(rows, keys, states, coming))
        results = stream_all(
            self.raw,
            (content.item() for content in items),
            prompt=(content.prompt for content in prompts),
            batch_tokens=self.batch_tokens,
            progress=False,
        )
        self.encoded = 0
        for result in results:
            key, row = coming.popleft()
            states[key] = new[key] = result.embedding
            bar.update(row - bar.n)
            self.encoded += 1
            if len(new) >= KEEP_EVERY:
                self._keep(new)
        self._keep(new)
        bar.update(len(keys) - bar.n)
        sums = [np.sum([states[key] for key in row], axis=0) for row in keys]
        return np.array(sums, np.float32).reshape(-1, self.width)

    def _missing(
        self,
        rows: Iterator[Row],
        keys: list[list[bytes]],
        states: dict[bytes, np.ndarray],
        coming: deque[tuple[bytes, int]],
    ) -> Iterator[Content]:
        """Yields what must be encoded, and notes the keys of all rows and what the store holds."""
        awaited: set[bytes] = set()
        while chunk := list(islice(rows, LOOK_UP)):
            distinct: dict[bytes, tuple[Content, int]] = {}
            for contents, beside in chunk:
                own = [content.key(self.fingerprint) for content in contents]
                keys.append(own)
                distinct.update({key: (content, len(keys)) for key, content in zip(own, contents, strict=True)})
                distinct.update({content.key(self.fingerprint): (content, len(keys)) for content in beside})
            if self.store:
                states.update(self.store.get(distinct))
            for key, (content, row_number) in distinct.items():
                if key not in states and key not in awaited:
                    awaited.add(key)
                    coming.append((key, row_number))
                    yield content

    def _keep(self, new: dict[bytes, np.ndarray]) -> None:
        if self.store and new:
            self.store.put({key: state for key, state in new.items() if np.isfinite(state).all()})
        new.clear()


@dataclass(frozen=True)
class Content:
    """One input of the model with its prompt: a sentence, an image, or both.

    ``image`` is what ``datasets`` stores (``bytes`` and ``path``), or a PIL image.
    """

    text: str | None
    image: Any
    prompt: str

    def item(self) -> dict[str, Any]:
        """Returns it as ``e5v_st.encode_all`` takes it; the image is decoded later, by a thread."""
        image = _open_lazily(self.image) if isinstance(self.image, dict) else self.image
        return {key: value for key, value in (("text", self.text), ("image", image)) if value is not None}

    def key(self, fingerprint: bytes) -> bytes:
        """Returns a digest of the content and of what encodes it."""
        state = hashlib.blake2b(fingerprint, digest_size=20)
        state.update(json.dumps([self.prompt, self.text]).encode())
        if isinstance(self.image, dict):
            state.update(_file_bytes(self.image))
        elif self.image is not None:
            state.update(repr((self.image.mode, self.image.size)).encode() + self.image.tobytes())
        return state.digest()


#: The contents of a row, whose states are summed, and those that are computed beside them for a later call.
Row = tuple[list[Content], list[Content]]


def _file_bytes(image: dict[str, Any]) -> bytes:
    return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


def _open_lazily(image: dict[str, Any]) -> Image:
    """Opens an image file as ``datasets`` does, but leaves decoding to whoever needs the pixels."""
    from PIL import ExifTags, ImageOps
    from PIL import Image as PILImage

    opened = PILImage.open(io.BytesIO(_file_bytes(image)))
    turned = opened.getexif().get(ExifTags.Base.Orientation) not in (None, 1)
    return ImageOps.exif_transpose(opened) if turned else opened


def _own_rows(inputs: Any, own: range) -> Iterator[dict[str, Any]]:
    """Yields this process's rows of a data loader, with images as they are stored where that is possible."""
    import datasets
    from torch.utils.data import DataLoader, Subset

    data = inputs.dataset
    if isinstance(data, datasets.Dataset):
        for column, feature in data.features.items():
            if isinstance(feature, datasets.Image):
                data = data.cast_column(column, datasets.Image(decode=False))
        yield from (data if len(own) == len(data) else data.select(own))
        return
    if world_size() > 1:
        inputs = DataLoader(Subset(data, own), batch_size=inputs.batch_size, collate_fn=inputs.collate_fn)
    for batch in inputs:
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _contents(rows: Iterable[dict[str, Any]], name: str | None, gallery: str | None = None) -> Iterator[Row]:
    """Yields the contents of each row.

    Args:
        rows: With the columns of the task.
        name: Of the prompt, ``None`` for the default one.
        gallery: The prompt that the row's image has in the gallery, where it is to be computed beside them.
    """
    for row in rows:
        image = row.get("image")
        # mteb strips the texts of documents, and puts the title in front of them; `body` is the text as it was
        text = row["body"] if "body" in row and "title" not in row else row.get("text")
        texts = [text]
        if name == "sts" and text is not None:
            texts = [edit_sts_sentence(text)]
        elif name and re.match("fashioniq-.*-query", name) and "captions" in row:
            texts = caption_orders(row["captions"])
        prompt = PROMPTS[name] if name else default_prompt(text is not None, int(image is not None))
        beside = [Content(None, image, PROMPTS[gallery])] if gallery and image is not None else []
        yield [Content(text, image, prompt) for text in texts], beside


def without_normalize(model: SentenceTransformer) -> SentenceTransformer:
    """Returns the model without its last step; the modules are shared, not copied."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize

    modules = [module for module in model if not isinstance(module, Normalize)]
    return SentenceTransformer(modules=modules, device=str(model.device), prompts=model.prompts)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def load_encoder(
    path: str,
    *,
    revision: str | None = None,
    device: str | None = None,
    image_layout: str = "upstream",
    adapter: str | None = None,
    dtype: str | None = None,
    embed_dim: int | None = None,
    quantize: str | None = None,
    batch_tokens: int | None = None,
    store: str | Path | bool = True,
) -> E5VEncoder:
    """Loads an encoder.

    Args:
        path: A directory or hub id.
        revision: Of the hub's repository.
        device: Of torch; each process has its own under ``accelerate launch``.
        image_layout: ``"upstream"`` or ``"paper"``.
        adapter: A LoRA to put on it.
        dtype: Such as ``"bfloat16"``; by default bfloat16 on GPUs, else the checkpoint's.
        embed_dim: Leading dimensions to keep, for models that were trained for it; all by default.
        quantize: ``"int8"``, ``"nf4"`` or ``"fp8"``; the cosine to the unquantised model is printed.
        batch_tokens: Most tokens in a batch.
        store: A folder to keep embeddings in, ``False`` for none; by default see ``store.default_folder``.
    """
    from e5v_st import load
    from e5v_st.probes import embed_unquantised, print_cosines

    leave_writing_to_rank_0()
    load_model = partial(
        load,
        path,
        image_layout=image_layout,
        adapter=adapter,
        revision=revision,
        device=own_device(device),
        truncate_dim=embed_dim,
        model_kwargs={"dtype": dtype} if dtype else {},
    )
    unquantised = embed_unquantised(load_model) if quantize else None
    folder = default_folder() if store is True else store or None
    # The fingerprint is taken first: bitsandbytes may repack weights when they are first used
    encoder = E5VEncoder(load_model(quantize=quantize), batch_tokens, open_store(folder))
    print_cosines(encoder.model, quantize, unquantised)
    return encoder
