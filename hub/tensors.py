"""Weights, tensor by tensor: read from safetensors shards, changed, written to shards; never all in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from e5v_st.files import write_json

from .folders import INDEX, SINGLE
from .keys import EMBEDDING, HEAD, plain

if TYPE_CHECKING:
    import torch

#: Maximum number of bytes in a shard; transformers writes the same size.
SHARD_SIZE = 5 * 10**9

#: The names and tensors of a model, one by one.
Tensors = Iterable[tuple[str, "torch.Tensor"]]
#: Takes them, and yields them changed.
Change = Callable[[Tensors], Tensors]


def read_tensors(files: Iterable[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the names and tensors of safetensors files, one at a time, with a progress bar over their bytes."""
    from safetensors import safe_open
    from tqdm import tqdm

    files = list(files)
    size = sum(file.stat().st_size for file in files)
    with tqdm(total=size, unit="B", unit_scale=True, desc="weights", delay=1) as bar:
        for file in files:
            with tensor_faults(file), safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - it is not a mapping
                    tensor = tensors.get_tensor(key)
                    yield key, tensor
                    bar.update(tensor.nbytes)


def write_tensors(tensors: Iterable[tuple[str, torch.Tensor]], out: Path, shard_size: int = SHARD_SIZE) -> None:
    """Writes tensors to ``out``: one file if they fit in ``shard_size`` bytes, otherwise shards and their index.

    No shard knows its final name before the last one is written, because the names say how many there are::

        part-0, part-1, part-2  ->  model-00001-of-00003.safetensors, …

    Raises:
        ValueError: If a name comes twice.
    """
    from safetensors.torch import save_file

    parts: list[dict[str, int]] = []
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        with tensor_faults(out):
            save_file(shard, out / f"part-{len(parts)}", metadata={"format": "pt"})
        parts.append({key: tensor.nbytes for key, tensor in shard.items()})
        shard.clear()

    for key, tensor in tensors:
        if key in shard or any(key in part for part in parts):
            raise ValueError(f"there are two weights {key}")
        if shard and sum(known.nbytes for known in shard.values()) + tensor.nbytes > shard_size:
            flush()
        shard[key] = tensor.contiguous()
    flush()
    _name_parts(parts, out)


def _name_parts(parts: list[dict[str, int]], out: Path) -> None:
    if len(parts) == 1:
        (out / "part-0").rename(out / SINGLE)
        return
    names = [f"model-{number + 1:05}-of-{len(parts):05}.safetensors" for number in range(len(parts))]
    for number, name in enumerate(names):
        (out / f"part-{number}").rename(out / name)
    keys = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    size = sum(sum(part.values()) for part in parts)
    write_json(out / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(keys.items()))})


def add_rows(tensors: Iterable[tuple[str, torch.Tensor]], rows: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Fills the embedding and the head with zeros up to ``rows`` rows; the other rows stay bit for bit.

    The row of the image token is never used (image features take its place), but every library looks it up.
    """
    import torch

    for key, tensor in tensors:
        missing = rows - tensor.shape[0] if plain(key) in (EMBEDDING, HEAD) else 0
        yield key, torch.nn.functional.pad(tensor, (0, 0, 0, missing)) if missing > 0 else tensor


def count_rows(files: Iterable[Path]) -> int:
    """Returns the number of rows of the input embedding, reading no tensor.

    Raises:
        ValueError: If no file has an input embedding.
    """
    from safetensors import safe_open

    for file in files:
        with tensor_faults(file), safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                if plain(key) == EMBEDDING:
                    return tensors.get_slice(key).get_shape()[0]
    raise ValueError("the weights have no input embedding: this is not a LLaVA-NeXT checkpoint")


@contextmanager
def tensor_faults(file: Path) -> Iterator[None]:
    """Turns the faults of a file of weights (broken, cut off, disk full) into a ValueError that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read or written: {error}") from None
