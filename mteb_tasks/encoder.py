"""The encoder behind the model entries: it embeds the rows of mteb's tasks, each distinct content once.

Raw states are kept in a :class:`~mteb_tasks.store.Store`, so that T2I, I2T, I2I and composed tasks share what they have
in common. ``contents.py`` says what is embedded for a row, ``ledger.py`` what is known and what is missing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from itertools import tee
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from mteb.models.abs_encoder import AbsEncoder
from tqdm.auto import tqdm

from e5v_st.fingerprint import fingerprint
from e5v_st.processes import own_device, rank, world_size

from .contents import Row, contents_of, prompt_name
from .ledger import Ledger
from .prompting import chosen_for, kind_of
from .ranks import gather, share
from .store import Store, default_folder, entry_name, open_store, pass_label
from .upstream import leave_writing_to_rank_0

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from sentence_transformers import SentenceTransformer

#: mteb's own number of items in a batch, which it passes where the user named none.
USUAL_BATCH = 32


class E5VEncoder(AbsEncoder):
    """Encodes the rows of mteb's tasks.

    Args:
        model: An E5-V. If it has a ``truncate_dim``, embeddings are the leading dimensions, normalised.
        batch_tokens: Maximum number of tokens in a batch; see ``e5v_st.encode_all``.
        store: Keeps raw states by content, in all their dimensions; ``None`` keeps nothing.
        prompts: Prompts other than the default, by kind of task; see ``prompting.read_choices``.
        normalize: Whether embeddings have the length 1. Those of the public scores do not have it, which the
            classifiers and clusterings of mteb see.

    Raises:
        ValueError: If the model has fewer dimensions than its ``truncate_dim``.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        batch_tokens: int | None = None,
        store: Store | None = None,
        *,
        prompts: str | None = None,
        normalize: bool = True,
    ) -> None:
        self.model = model
        self.raw = without_normalize(model)
        self.width = self.raw.get_embedding_dimension()
        self.embed_dim = self.width if model.truncate_dim is None else model.truncate_dim
        if not 1 <= self.embed_dim <= self.width:
            raise ValueError(f"got {self.embed_dim} dimensions to keep, want 1 to {self.width}")
        if model.default_prompt_name:
            instead = "the evaluation has its own prompts, which are used instead"
            warnings.warn(f"the model has the default prompt {model.default_prompt_name!r}: {instead}", stacklevel=2)
        self.batch_tokens = batch_tokens
        self.store = store
        self.prompts = prompts
        self.normalize = normalize
        self.fingerprint = fingerprint(model) if store else b""
        #: What results say of the model: its family, and how many tokens an image takes at most where that is limited.
        self.described = describe(model[0])
        #: Number of contents that the last call embedded in this process: neither repeated nor found in the store.
        self.encoded = 0
        #: Name of the prompt of the last call; ``None`` stands for the default prompts.
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
        """Encodes rows with the columns ``text`` and/or ``image``, and ``captions`` where a task has it.

        Args:
            inputs: A data loader of mteb.
            task_metadata: Chooses the prompt.
            hf_split: Part of the data; it makes no difference.
            hf_subset: Chooses the prompt where a task has several.
            prompt_type: Whether the rows are queries or documents.
            show_progress_bar: Whether to show a progress bar.
            batch_size: Not used, and a warning says so: batches are filled by tokens, see ``batch_tokens``.
            **others: Anything else is refused.

        Returns:
            float32 ``(rows, d)``, L2-normalised unless ``normalize`` is off. Each process returns the rows of all.

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
        # mteb encodes queries before documents, and a query's image is usually in the gallery too. With a store to
        # keep it, its gallery embedding is computed beside the query's, so that the image itself is computed once
        kind = kind_of(task_metadata)
        gallery = None
        if role == "query" and self.store and kind.name == "composed":
            gallery = prompt_name(task_metadata, hf_subset, "document") or "image"
        self.prompt = prompt_name(task_metadata, hf_subset, role)
        chosen, default = chosen_for(self.prompts, kind), self.model[0].default_prompts
        contents = contents_of(_own_rows(inputs, own), self.prompt, gallery, default, chosen)
        title = " ".join(filter(None, (task_metadata.name, hf_subset, role)))
        # A task of image-text pairs has a dataset of its own class, which knows its features alone
        data = inputs.dataset
        columns: set[str] = set(getattr(data, "column_names", None) or getattr(data, "features", None) or ())
        with tqdm(
            total=len(own),
            unit=" images" if "image" in columns else " texts",
            desc=title,
            disable=not show_progress_bar or rank() > 0,
            smoothing=0.05,
        ) as bar:
            states = gather(self._sum_states(contents, bar)[:, : self.embed_dim], rows)
        if self.store and rank() == 0 and self.mteb_model_meta is not None:
            holds = "composed" if columns >= {"image", "text"} else "image" if "image" in columns else "text"
            label = pass_label(task_metadata.name, hf_split, hf_subset, role, holds)
            self.store.note_pass(entry_name(self.mteb_model_meta), label)
        return _unit(states) if self.normalize else states

    def _sum_states(self, rows: Iterator[Row], bar: tqdm) -> np.ndarray:
        """Returns the sum of the raw states of each row's contents, float32 ``(rows, d)``."""
        from e5v_st.encoder import stream_all

        ledger = Ledger(self.fingerprint, self.store)
        # stream_all wants items and prompts apart; it takes one of each in turn, so tee holds one content at most
        items, prompts = tee(ledger.missing(rows))
        results = stream_all(  # refuses what is not finite, before anything is kept
            self.raw,
            (content.item() for content in items),
            prompt=(content.prompt for content in prompts),
            batch_tokens=self.batch_tokens,
            progress=False,
        )
        self.encoded = 0
        for result in results:
            rows_done = ledger.receive(result.embedding)
            self.encoded += 1
            bar.update(rows_done - bar.n)
        ledger.save()
        bar.update(len(ledger.rows) - bar.n)
        return ledger.sums(self.width)


def describe(transformer: Any) -> dict[str, str]:
    """Returns a model's family, and the limit of its images' tokens if there is one; nothing for another module."""
    backbone = getattr(transformer, "backbone", None)
    if backbone is None:
        return {}
    limit = transformer.max_image_tokens or backbone.image_tokens
    return {"family": backbone.name, **({"image tokens": f"at most {limit}"} if limit else {})}


def _own_rows(inputs: Any, own: range) -> Iterator[dict[str, Any]]:
    """Yields this process's rows of a data loader; images stay as they are stored where that is possible."""
    import datasets
    from torch.utils.data import DataLoader, Subset

    data = inputs.dataset
    if not own:  # there are more processes than rows, such as names of classes
        return
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


def without_normalize(model: SentenceTransformer) -> SentenceTransformer:
    """Returns the model without its last step, if that normalises; the modules are shared, not copied."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize

    modules = list(model)[: -1 if isinstance(model[-1], Normalize) else None]
    return SentenceTransformer(modules=modules, device=str(model.device), prompts=model.prompts)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def load_encoder(
    path: str,
    *,
    revision: str | None = None,
    device: str | None = None,
    image_layout: str | None = None,
    max_image_tokens: int | None = None,
    adapter: str | None = None,
    dtype: str | None = None,
    embed_dim: int | None = None,
    quantize: str | None = None,
    batch_tokens: int | None = None,
    store: str | Path | bool = True,
    prompts: str | None = None,
    normalize: bool = True,
) -> E5VEncoder:
    """Loads an encoder.

    Args:
        path: A directory or hub id.
        revision: Of the hub's repository.
        device: A device of torch; each process has its own under ``accelerate launch``.
        image_layout: ``"upstream"`` or ``"paper"``; by default the one that the model was saved with.
        max_image_tokens: See ``e5v_st.load``.
        adapter: A LoRA to put on the model.
        dtype: Such as ``"bfloat16"``; by default bfloat16 on GPUs, otherwise the checkpoint's.
        embed_dim: Leading dimensions to keep, for models that were trained for it; all by default.
        quantize: ``"int8"``, ``"nf4"`` or ``"fp8"``; the cosine to the unquantised model is printed.
        batch_tokens: Maximum number of tokens in a batch.
        store: A folder to keep embeddings in, or ``False`` for none; by default see ``store.default_folder``.
        prompts: See :class:`E5VEncoder`.
        normalize: See :class:`E5VEncoder`.
    """
    from e5v_st import load
    from e5v_st.probes import embed_unquantised, print_cosines

    leave_writing_to_rank_0()
    load_model = partial(
        load,
        path,
        image_layout=image_layout,
        max_image_tokens=max_image_tokens,
        adapter=adapter,
        revision=revision,
        device=own_device(device),
        truncate_dim=embed_dim,
        model_kwargs={"dtype": dtype} if dtype else {},
    )
    unquantised = embed_unquantised(load_model) if quantize else None
    folder = default_folder() if store is True else store or None
    # The fingerprint is taken first: bitsandbytes may repack weights when they are first used
    model = load_model(quantize=quantize)
    encoder = E5VEncoder(model, batch_tokens, open_store(folder), prompts=prompts, normalize=normalize)
    print_cosines(encoder.model, quantize, unquantised)
    return encoder
