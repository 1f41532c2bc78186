"""What a training would do, before any weight is loaded: rows and tokens by source, steps, and memory.

Rows are read and checked as for the training itself. Tokens are those of a sample of each source, in the model's own
prompts. Memory is computed from the shapes of the layers. It leaves out what the libraries themselves take: the steps
of ``benchmarks/train_speed.py``, of 21 million weights on a CPU, took 0.4 to 0.6 GiB more, of texts and of images.

    weights      of the base, in the precision of bits
    training     LoRA, its gradient and Adam's two moments, in float32
    mini-batch   what the layers keep for the way back: with gradient checkpointing, what goes into each layer and all
                 of one; without, all of every layer
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .collate import read_cell
from .item_rows import load_sources
from .recipes import Settings
from .sampling import steps_of
from .sources import Source
from .vision import train_targets

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainingArguments

#: Rows of a source whose tokens are counted.
SAMPLE = 64
#: Bytes for each trained weight: itself, its gradient, and Adam's moments.
TRAINED_BYTES = 16
#: Vectors of the model's size, and of the feed-forward's, that a layer holds for each token on the way back: normed and
#: unnormed inputs, queries, keys, values, what attention gives; gate, up and their product; and what each LoRA adds.
KEPT, KEPT_FORWARD = 16, 8


def make_plan(
    settings: Settings, args: SentenceTransformerTrainingArguments, sources: Mapping[str, Source]
) -> list[str]:
    """Returns the plan, a line for each fact.

    Args:
        settings: Our arguments.
        args: The trainer's.
        sources: By their names.

    Raises:
        ValueError: As the training would, if data or base are not right.
    """
    from e5v_st.counting import count_weights, open_without_weights

    transformer = open_without_weights(settings.model, **_revision(settings))
    rows = min(settings.mini_batch_size, args.per_device_train_batch_size)
    cached = args.per_device_train_batch_size > rows
    lines, steps, most = [], 0, 0.0
    data, reports, _ = load_sources(sources, settings)
    for name, source in sources.items():
        own = steps_of(source.weight, len(data[name]) // args.per_device_train_batch_size, args.world_size)
        tokens = tokens_of_row(transformer, data[name], source)
        a_row = sum(tokens.values())
        lines += reports[name].lines()
        lines.append(
            f"  {own:,} steps an epoch; tokens of a row: "
            + ", ".join(f"{role} {count:,.0f}" for role, count in tokens.items())
            + f"; {a_row * settings.batch_size:,.0f} in a step"
        )
        # Gradient caching goes back through one column at a time
        steps, most = steps + own, max(most, rows * (max(tokens.values()) if cached else a_row))
    total = args.max_steps if args.max_steps > 0 else int(steps * args.num_train_epochs)
    trained = count_trained(transformer, settings)
    weights = count_weights(transformer)
    checkpointing = bool(args.gradient_checkpointing)
    kept = activation_bytes(transformer.model.get_decoder().config, most, settings.bits, checkpointing)
    lines.append(f"{total:,} steps of {settings.batch_size:,} rows, {steps:,} an epoch")
    lines.append(f"{trained:,} trained weights of {weights:,}")
    lines.append(
        f"memory, roughly: weights {_gib(weights * settings.bits / 8)}, training {_gib(trained * TRAINED_BYTES)}, "
        f"a mini-batch of {rows} rows {_gib(kept)}"
    )
    return lines


def _revision(settings: Settings) -> dict[str, Any]:
    return {"revision": settings.model_revision} if settings.model_revision else {}


def tokens_of_row(transformer: Any, data: Dataset, source: Source) -> dict[str, float]:
    """Returns the mean number of tokens of each column, of rows that are evenly spread over a source."""
    from e5v_st.counting import count_tokens

    rows = data.select(range(0, len(data), max(1, len(data) // SAMPLE)))
    prompts = transformer.default_prompts
    found = {}
    for role in (name for name in data.column_names if name != "label"):
        prompt = source.prompt_of(role)
        counts = count_tokens(transformer, [read_cell(cell) for cell in rows[role]], prompts.get(prompt, prompt))
        found[role] = sum(counts) / len(counts)
    return found


def count_trained(transformer: Any, settings: Settings) -> int:
    """Returns the number of weights that a LoRA will have."""
    import torch

    rank = settings.lora_r
    if settings.init_adapter:
        from e5v_st.model.adapter_e5v import find_adapter

        rank = (find_adapter(settings.init_adapter) or {}).get("r", rank)
    pattern = re.compile(train_targets(transformer, settings.train_vision).pattern)
    modules = [module for name, module in transformer.model.named_modules() if pattern.fullmatch(name)]
    return sum(rank * (each.in_features + each.out_features) for each in modules if isinstance(each, torch.nn.Linear))


def activation_bytes(config: Any, tokens: float, bits: int, checkpointing: bool) -> float:
    """Returns what the language model keeps of a mini-batch for the way back.

    Args:
        config: Of the language model.
        tokens: In the mini-batch.
        bits: Precision of the base; what is kept has 16 at most, or 32.
        checkpointing: Whether a layer keeps only what goes into it.
    """
    number = 4 if bits == 32 else 2
    layer: float = tokens * number * (KEPT * config.hidden_size + KEPT_FORWARD * config.intermediate_size)
    if not checkpointing:
        kept: float = layer * config.num_hidden_layers
        return kept
    inputs: float = tokens * number * config.hidden_size * config.num_hidden_layers
    return layer + inputs


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
