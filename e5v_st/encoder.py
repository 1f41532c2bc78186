"""Plans a whole embedding job: what is equal is computed once, and the model never waits for an image.

``SentenceTransformer.encode`` sees one batch at a time. Here a window of items is read at once, so that repetitions are
dropped, prompts about one image stay together (their image is computed once, see ``sharing_e5v``), and batches are
packed by tokens instead of by items. While the model runs, threads read what comes next, and for a GPU tile it too.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from .model.images_e5v import is_file_object, looks_like_image
from .model.items_e5v import Item, decoded_bytes, read_items
from .model.planning_e5v import default_batch_tokens, plan_batches
from .model.pooling_e5v import check_modules, pools_last_tokens

if TYPE_CHECKING:
    import numpy as np
    import torch
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

#: Images that are read, planned and held in memory together: 256 decoded 640x480 photographs take 300 MB.
WINDOW = 256
#: Decoded images of a window, and one image more; while it is computed, the next one is read.
WINDOW_BYTES = 2**29
#: Batches of texts, of so many tokens each, that make a window where that is more: they are sorted by length.
TEXT_BATCHES, TEXT_TOKENS = 8, 32
#: Batches that are prepared while a GPU computes another.
AHEAD = 2
#: Memory for the embeddings of earlier windows, which are not computed again when their items come back.
RECENT_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Encoded:
    """One result: the item's place in the input, and its embedding (float32, L2-normalised) or what was wrong."""

    index: int
    embedding: np.ndarray | None
    error: str | None = None


@dataclass
class Budget:
    """Tokens of a batch; halved, and kept so, when memory runs out."""

    tokens: int

    def halve(self) -> None:
        """Halves the budget for the rest of the job."""
        self.tokens = max(1, self.tokens // 2)


def encode_all(
    model: SentenceTransformer,
    items: Iterable[Any],
    *,
    prompt: str | Iterable[str | None] | None = None,
    prompt_name: str | None = None,
    batch_tokens: int | None = None,
    on_error: str = "raise",
    progress: bool = True,
) -> np.ndarray:
    """Embeds any number of items.

    Args:
        model: An E5-V. Any other SentenceTransformer, as a native export, gives what its ``encode`` gives.
        items: See ``items_e5v.read_item``; a generator or data set is never held in memory whole.
        prompt: One prompt for all, or one for each item; see ``prompts_e5v.resolve_prompt``.
        prompt_name: Instead, a key of ``model.prompts``. Where there is neither, the model's default, as in ``encode``.
        batch_tokens: Maximum number of tokens computed together, for an E5-V alone; found from the free memory where
            ``None``.
        on_error: ``"raise"`` stops at the first bad item; ``"skip"`` goes on, gives it a row of NaN and says so once.
        progress: Whether to show a progress bar with rate and time left.

    Returns:
        Embeddings, float32 ``(n, d)``, L2-normalised (before ``truncate_dim`` cuts them), in input order.

    Raises:
        ValueError: If an item is bad; the message names its index.
        TypeError: If ``items`` is a single one, or ``model`` is not a SentenceTransformer.
    """
    import numpy as np

    rows, bad = [], []
    options = {"prompt": prompt, "prompt_name": prompt_name, "batch_tokens": batch_tokens}
    for result in stream_all(model, items, **options, on_error=on_error, progress=progress):
        if result.error is not None:
            bad.append(result.index)
        rows.append(result.embedding)
    missing = np.full(model.get_embedding_dimension(), np.nan, np.float32)
    if bad:
        logger.warning("%d of %d items were skipped, their rows are NaN: %s", len(bad), len(rows), bad[:20])
    if not rows:
        return np.zeros((0, len(missing)), np.float32)
    return np.stack([missing if row is None else row for row in rows])


def stream_all(
    model: SentenceTransformer,
    items: Iterable[Any],
    *,
    prompt: str | Iterable[str | None] | None = None,
    prompt_name: str | None = None,
    batch_tokens: int | None = None,
    on_error: str = "raise",
    progress: bool = True,
    total: int | None = None,
    window: int = WINDOW,
) -> Iterator[Encoded]:
    """Yields embeddings in input order, window by window; see :func:`encode_all`.

    Args:
        model: An E5-V.
        items: See :func:`encode_all`.
        prompt: See :func:`encode_all`.
        prompt_name: See :func:`encode_all`.
        batch_tokens: See :func:`encode_all`.
        on_error: See :func:`encode_all`.
        progress: See :func:`encode_all`.
        total: Number of items, for the time left, where ``items`` does not know it.
        window: Most images that are read and planned together; of texts it may be more, by the tokens of a batch.

    Raises:
        ValueError: If an item is bad and ``on_error`` is ``"raise"``, after everything before it was yielded.
        torch.OutOfMemoryError: Likewise, if a single item does not fit into memory.
        TypeError: If ``items`` is a single one.
        Exception: What ``items`` itself raises, after everything before it was yielded.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from tqdm.auto import tqdm

    if on_error not in ("raise", "skip"):
        raise ValueError(f"got on_error={on_error!r}, want 'raise' or 'skip'")
    if batch_tokens is not None and batch_tokens < 1:
        raise ValueError(f"got {batch_tokens} tokens for a batch, want at least 1")
    if not isinstance(model, SentenceTransformer):
        raise TypeError(
            f"got a {type(model).__name__} as the model, want a SentenceTransformer, as e5v_st.load returns"
        )
    plans = hasattr(model[0], "collate")
    if plans:
        check_modules(model)
        model[0].find_max_length()  # refuses settings that E5-V cannot do
    elif batch_tokens is not None:
        raise ValueError(f"got batch_tokens={batch_tokens} for a model that is not loaded as an E5-V: leave it out")
    prompt = _find_prompt(model, prompt, prompt_name)
    prompts = itertools.repeat(prompt) if prompt is None or isinstance(prompt, str) else prompt
    total = len(items) if total is None and hasattr(items, "__len__") else total
    _check_many(items)
    pairs = zip(_iterate(items) if plans else items, prompts, strict=not isinstance(prompts, itertools.repeat))
    numbered = ((index, *pair) for index, pair in enumerate(pairs))
    bar = tqdm(total=total, unit="item", disable=not progress, smoothing=0.05)
    if not plans:
        yield from _stream_stock(model, numbered, on_error, bar, window)
        return
    budget = Budget(batch_tokens or default_batch_tokens(model[0].model))
    recent: OrderedDict[bytes, np.ndarray] = OrderedDict()
    model.eval()
    # A model on the CPU needs its cores itself
    more = (os.cpu_count() or 1) if model.device.type == "cuda" else 0
    # Two pools, so that a batch that is prepared does not wait for a window that is read
    readers = ThreadPoolExecutor(more + 1, thread_name_prefix="e5v-read")
    preparers = ThreadPoolExecutor(more + AHEAD, thread_name_prefix="e5v-prepare")
    with readers, preparers, bar:
        try:
            coming = _read_window(model, readers, numbered, window, budget)
            while coming:
                now, failure = _finished(coming)
                coming = [] if failure else _read_window(model, readers, numbered, window, budget)
                with torch.inference_mode():
                    embeddings = _encode_window(model, now, budget, preparers, recent, bar.update)
                for place, row in enumerate(now):
                    found = embeddings.get(place)
                    fault = ValueError(row.error) if row.error is not None else found
                    if isinstance(fault, Exception):
                        if on_error == "raise":
                            raise fault
                        yield Encoded(row.index, None, row.error or f"item {row.index}: {fault}")
                    else:
                        yield Encoded(row.index, found)
                if failure:
                    raise failure
        finally:  # Ctrl-C, or a caller that has seen enough, need not wait for what is read in vain
            readers.shutdown(wait=False, cancel_futures=True)
            preparers.shutdown(wait=False, cancel_futures=True)


def _find_prompt(
    model: SentenceTransformer, prompt: str | Iterable[str | None] | None, name: str | None
) -> str | Iterable[str | None] | None:
    """Returns the prompt as sentence-transformers would find it."""
    if name is not None and name not in model.prompts:
        raise ValueError(f"there is no prompt {name!r}, but {', '.join(model.prompts)}")
    return model.prompts.get(name or model.default_prompt_name) if prompt is None else prompt


def _stream_stock(
    model: SentenceTransformer,
    numbered: Iterator[tuple[int, Any, str | None]],
    on_error: str,
    bar: Any,
    window: int,
) -> Iterator[Encoded]:
    """Yields what ``encode`` says of each item, for a model without E5-V's own code, as a native export."""
    failure = None
    with bar:
        while failure is None:
            rows, failure = _take(numbered, window)
            if not rows:
                break
            found: dict[int, np.ndarray | Exception] = {}
            for prompt in {row[2]: None for row in rows}:
                indexes, part, _ = zip(*(row for row in rows if row[2] == prompt), strict=True)
                found |= zip(indexes, _encode_stock(model, list(part), prompt), strict=True)
                bar.update(len(part))
            for index, *_ in rows:
                result = found[index]
                if not isinstance(result, Exception):
                    yield Encoded(index, result)
                elif on_error == "raise":
                    raise ValueError(f"item {index}: {result}") from result
                else:
                    yield Encoded(index, None, f"item {index}: {result}")
    if failure:
        raise failure


def _take(rows: Iterator[Any], count: int) -> tuple[list[Any], Exception | None]:
    """Takes up to ``count`` rows; returns them, and what was raised in place of the next one."""
    found: list[Any] = []
    try:
        found.extend(itertools.islice(rows, count))
    except Exception as error:
        return found, error
    return found, None


def _encode_stock(model: SentenceTransformer, items: list[Any], prompt: str | None) -> list[np.ndarray | Exception]:
    """Encodes items; where that fails, halves them until those that it fails for are found."""
    try:
        # A prompt of no characters, as there would be the model's default in place of None
        return list(model.encode(items, prompt=prompt or "", show_progress_bar=False).astype("float32"))
    except (ValueError, TypeError, OSError) as error:
        if len(items) == 1:
            return [error]
    half = len(items) // 2
    return [*_encode_stock(model, items[:half], prompt), *_encode_stock(model, items[half:], prompt)]


# ---- reading ----


def leave_images_undecoded(rows: Any) -> Any:
    """Returns a dataset of ``datasets`` whose images are read where a bad one is the fault of its row alone."""
    for name, feature in (rows.features or {}).items():
        undecoded = _undecoded(feature)
        if undecoded != feature:
            rows = rows.cast_column(name, undecoded)
    return rows


def _undecoded(feature: Any) -> Any:
    """Returns a feature of ``datasets`` with each image in it left undecoded."""
    from datasets import Image

    if isinstance(feature, Image):
        # Decoding applies the mode; to RGB, reading does it too
        return replace(feature, decode=False) if feature.mode in (None, "RGB", "RGBA") else feature
    if isinstance(feature, dict):
        return {name: _undecoded(part) for name, part in feature.items()}
    if isinstance(feature, list):
        return [_undecoded(part) for part in feature]
    return replace(feature, feature=_undecoded(feature.feature)) if hasattr(feature, "feature") else feature


def _leave_column_undecoded(rows: Any) -> Any:
    """The same for a dataset or a column of one, which may be that of another column."""
    if hasattr(rows, "column_name"):
        return _leave_column_undecoded(rows.source)[rows.column_name]
    return leave_images_undecoded(rows)


def _is_of_datasets(items: Any) -> bool:
    return type(items).__module__.startswith("datasets.") and not isinstance(items, Mapping)


def _check_many(items: Any) -> None:
    if not _is_of_datasets(items) and _is_single(items):
        raise TypeError(f"got a single item, a {type(items).__name__}, want an iterable of items: put it into a list")


def _iterate(items: Any) -> Iterable[Any]:
    if _is_of_datasets(items):
        return _leave_column_undecoded(items)
    # Without the protocol of iterators, Python would ask for one index after the other until the first error
    return items if hasattr(items, "__iter__") else (items[index] for index in range(len(items)))


def _is_single(items: Any) -> bool:
    """Whether what should be many items is one of them, whose parts would be taken for items."""
    if isinstance(items, (str, bytes, bytearray, memoryview, os.PathLike, Mapping)) or is_file_object(items):
        return True
    # An image as an array or from PIL, a table of pandas
    return len(getattr(items, "shape", ())) in (2, 3) or hasattr(items, "getbands")


@dataclass(frozen=True)
class _Row:
    """An item that was read, and what it has in common with equal ones; or what is wrong with it."""

    index: int
    item: Item | None
    key: bytes = b""
    error: str | None = None


def _read_window(
    model: SentenceTransformer,
    threads: ThreadPoolExecutor,
    numbered: Iterator[tuple[int, Any, str | None]],
    window: int,
    budget: Budget,
) -> list[Future[_Row]]:
    rows = []
    room = texts = max(window, TEXT_BATCHES * budget.tokens // TEXT_TOKENS)
    memory = WINDOW_BYTES
    while room > 0 and memory > 0:
        try:
            entry = next(numbered, None)
        except Exception as error:  # of the caller's iterable, whose turn comes after what it gave before
            rows.append(Future())
            rows[-1].set_exception(error)
            break
        if entry is None:
            break
        if _is_text(entry[1], model[0].strings):
            room -= 1
        else:
            room -= texts // window
            memory -= decoded_bytes(entry[1])
        rows.append(threads.submit(_read_one, model, *entry))
    return rows


def _finished(rows: Sequence[Future[_Row]]) -> tuple[list[_Row], Exception | None]:
    """Waits for rows; returns those up to the first that could not be made, and why it could not."""
    found: list[_Row] = []
    for row in rows:
        try:
            found.append(row.result())
        except Exception as error:
            return found, error
    return found, None


def _is_text(value: Any, strings: str) -> bool:
    if isinstance(value, Mapping):
        return "image" not in value and isinstance(value.get("text"), str)
    return isinstance(value, str) and (strings == "text" or not looks_like_image(value))


def _read_one(model: SentenceTransformer, index: int, value: Any, prompt: str | None) -> _Row:
    try:
        check = partial(model[0].check, max_length=model[0].find_max_length())
        item = read_items([value], prompt, check, model[0].strings)[0]
        content = repr((item.prompt, item.sentence, item.image_keys))
        return _Row(index, item, hashlib.blake2b(content.encode(), digest_size=20).digest())
    except ValueError as error:
        return _Row(index, None, error=str(error).replace("item 0:", f"item {index}:", 1))
    except Exception as error:
        raise RuntimeError(f"item {index} could not be read: {error!r}") from error


# ---- computing ----


def _encode_window(
    model: SentenceTransformer,
    rows: Sequence[_Row],
    budget: Budget,
    threads: ThreadPoolExecutor,
    recent: OrderedDict[bytes, np.ndarray],
    advance: Callable[[int], Any],
) -> dict[int, np.ndarray | Exception]:
    """Embeds the items of a window; returns for each place that holds an item its embedding, or why there is none."""
    places: dict[bytes, list[int]] = {}
    distinct: dict[bytes, _Row] = {}
    for place, row in enumerate(rows):
        if row.item is None:
            advance(1)
            continue
        places.setdefault(row.key, []).append(place)
        distinct.setdefault(row.key, row)

    found: dict[int, np.ndarray | Exception] = {}

    def settle(key: bytes, result: np.ndarray | Exception) -> None:
        found.update(dict.fromkeys(places[key], result))
        advance(len(places[key]))
        if not isinstance(result, Exception):
            recent[key] = result
            recent.move_to_end(key)

    for key in [key for key in distinct if key in recent]:
        settle(key, recent[key])
        del distinct[key]
    wanted = [(row, _count_tokens(model, row.item)) for row in distinct.values()]
    # Prompts about one image stand together, and so do texts that begin alike: they share what they begin with
    wanted.sort(
        key=lambda pair: (-pair[1][0], pair[0].item.image_keys, pair[0].item.prompt, pair[0].item.sentence or "")
    )
    running: deque[tuple[list[_Row], Callable[[], Sequence[np.ndarray | Exception]]]] = deque()
    for batch, features in _prepared_ahead(model, wanted, budget, threads):
        running.append((batch, _launch(model, features, [row.item for row in batch], budget)))
        if len(running) > 1:  # the one before has been computed while this one was launched
            _settle_all(*running.popleft(), settle)
    for batch in running:
        _settle_all(*batch, settle)
    while recent and len(recent) * next(iter(recent.values())).nbytes > RECENT_BYTES:
        recent.popitem(last=False)
    return found


def _settle_all(rows: Sequence[_Row], wait: Callable[[], Sequence[np.ndarray | Exception]], settle: Callable) -> None:
    for row, result in zip(rows, wait(), strict=True):
        settle(row.key, result)


def _count_tokens(model: SentenceTransformer, item: Item) -> tuple[int, int]:
    """Tokens of an item's images, and a guess at those of its text that needs no tokenizer."""
    from .model.llava_next_e5v import count_tokens

    transformer = model[0]
    images = sum(count_tokens(i.height, i.width, transformer.config, transformer.image_layout) for i in item.images)
    return images, 12 + (len(item.prompt or "") + len(item.sentence or "")) // 3


def _prepared_ahead(
    model: SentenceTransformer,
    rows: Sequence[tuple[_Row, tuple[int, int]]],
    budget: Budget,
    threads: ThreadPoolExecutor,
) -> Iterator[tuple[list[_Row], dict[str, Any]]]:
    """Yields batches of rows and their features.

    Threads make the next ones while a GPU computes; beside a model on the CPU they would only take its cores. What is
    left is planned anew when the budget has changed meanwhile.
    """
    max_length, last = model[0].find_max_length(), pools_last_tokens(model)
    on_gpu, shares = model.device.type == "cuda", last and model[0].shares()

    def prepare(batch: Sequence[_Row]) -> dict[str, Any]:
        try:
            each_image = threads.map if on_gpu else map
            options = {"max_length": max_length, "share": last, "each_image": each_image}
            features = model[0].collate([row.item for row in batch], **options)
        except Exception as error:
            numbers = sorted(row.index for row in batch)
            raise RuntimeError(f"no batch could be made of the items {numbers}: {error!r}") from error
        return _pinned(features) if on_gpu else features

    def shown(row: _Row) -> tuple[Any, ...]:
        keys = row.item.image_keys
        return keys if shares or not keys else (*keys, row.index)  # where nothing is shared, each row has its own

    left = list(rows)
    while left:
        tokens = budget.tokens
        plan = plan_batches([shown(row) for row, _ in left], [cost for _, cost in left], tokens)
        batches = deque([left[place][0] for place in batch] for batch in plan)
        coming: deque[tuple[list[_Row], Callable[[], dict[str, Any]]]] = deque()
        while (batches or coming) and budget.tokens == tokens:
            while batches and len(coming) < (AHEAD if on_gpu else 1):
                batch = batches.popleft()
                coming.append((batch, threads.submit(prepare, batch).result if on_gpu else partial(prepare, batch)))
            batch, features = coming.popleft()
            left = left[len(batch) :]
            yield batch, features()


def _pinned(features: dict[str, Any]) -> dict[str, Any]:
    """Features in memory that a GPU copies from while it computes."""
    import torch

    pinned = {name: value.pin_memory() for name, value in features.items() if isinstance(value, torch.Tensor)}
    if "parts" in features:
        pinned["parts"] = tuple(part.map(torch.Tensor.pin_memory) for part in features["parts"])
    return {**features, **pinned}


def _launch(
    model: SentenceTransformer, features: dict[str, Any], items: Sequence[Item], budget: Budget
) -> Callable[[], Sequence[np.ndarray | Exception]]:
    """Starts a batch; what it returns waits for the embeddings.

    Where memory runs out, halves the batch, and all that come later. An item that does not fit alone gets the error.
    """
    import torch
    from sentence_transformers.util import truncate_embeddings

    tensors = {name: value for name, value in features.items() if isinstance(value, torch.Tensor)}
    try:
        moved = {name: value.to(model.device, non_blocking=True) for name, value in tensors.items()}
        output = model({**features, **moved})["sentence_embedding"]
        return _copied(truncate_embeddings(output, model.truncate_dim))
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        failed = type(error)(*error.args)  # without the stack, which would hold on to the tensors
    if len(items) == 1:
        return lambda: [failed]
    budget.halve()
    logger.warning("out of memory with %d items: going on with %d tokens a batch", len(items), budget.tokens)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(items) // 2
    options = {"max_length": model[0].find_max_length(), "share": pools_last_tokens(model)}
    parts = [_launch(model, model[0].collate(p, **options), p, budget) for p in (items[:half], items[half:])]
    return lambda: [row for wait in parts for row in wait()]


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    # On a CPU, torch raises a plain RuntimeError
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def _copied(embeddings: torch.Tensor) -> Callable[[], np.ndarray]:
    """Starts the copy of embeddings to the host's memory; what it returns waits for it."""
    import torch

    if embeddings.device.type != "cuda":
        return embeddings.float().cpu().numpy
    host = torch.empty(embeddings.shape, dtype=torch.float32, pin_memory=True)
    host.copy_(embeddings.float(), non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait() -> np.ndarray:
        done.synchronize()
        return host.numpy()

    return wait
