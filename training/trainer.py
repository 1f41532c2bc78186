"""sentence-transformers' own trainer, with model, loss, data, evaluators and callbacks put in."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import EarlyStoppingCallback, TrainerState, set_seed

from .collate import make_collator
from .evaluation import make_evaluators
from .losses import make_loss, make_losses
from .model import AdapterCheckpoint, load_for_training
from .recipes import Settings
from .resume import TRAINER_STATE
from .sampling import WeightedBatchSampler
from .sources import Source
from .stopping import StopOnSignal

#: accelerate's name for the policy of FSDP that gathers modules by their classes.
BY_CLASS = "TRANSFORMER_BASED_WRAP"


class Trainer(SentenceTransformerTrainer):
    """The trainer, which leaves no half of a checkpoint where the disk is full, and knows the signal that stopped it.

    Instead of the many-line errors of torch and safetensors, it raises an OSError of one line.

    Args:
        *args: See the parent.
        weights: Of several sources, see ``sampling.py``.
        **kwargs: See the parent.
    """

    def __init__(self, *args: Any, weights: Sequence[float] = (), **kwargs: Any) -> None:
        self._weights = weights
        super().__init__(*args, **kwargs)

    @property
    def stopped_by(self) -> int:
        """The number of the signal that stopped the training; 0 if there was none."""
        callbacks = self.callback_handler.callbacks
        return next((callback.received for callback in callbacks if isinstance(callback, StopOnSignal)), 0)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Makes a step, backward pass included, in which a frozen vision tower sees each image once."""
        transformer: Any = self.model[0]
        with transformer.one_step():
            return super().training_step(model, inputs, *args, **kwargs)

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Leaves out sentence-transformers' own card, which shows examples and fails on those that are not texts."""
        if not self._weights:
            super().add_model_card_callback(default_args_dict)

    def get_multi_dataset_batch_sampler(
        self, dataset: Any, batch_samplers: Any, generator: torch.Generator | None = None, seed: int | None = 0
    ) -> Any:
        """Returns what draws the batches of several sources."""
        return WeightedBatchSampler(
            dataset,
            batch_samplers,
            weights=self._weights,
            processes=self.args.world_size,
            generator=generator,
            seed=seed or 0,
        )

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Trains to the last step. A checkpoint of that step is loaded, and no step is made.

        From such a checkpoint the stock trainer makes one step more if ``max_steps`` ends within an epoch, since it
        looks at the number of steps only after a step.
        """
        if resume_from_checkpoint and self.args.max_steps > 0:
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE))
            if state.global_step >= self.args.max_steps:
                best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
                self.model.load_state_dict(AdapterCheckpoint(Path(best or resume_from_checkpoint)).state_dict())
                self.state = state
                return None
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # sentence-transformers leaves it to transformers to call this in one process alone, but transformers 5 calls it
        # in all, which would write the same files at once. Only sharded weights (FSDP) need all to take part.
        if self.args.should_save or self.is_fsdp_enabled:
            super()._save(output_dir, state_dict)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except Exception as error:  # torch and safetensors have errors of their own for a full disk
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise OSError(f"cannot write {folder}: {' '.join(str(error).split())}") from error


def make_trainer(
    settings: Settings,
    args: SentenceTransformerTrainingArguments,
    data: Dataset | Mapping[str, Dataset],
    held_out: Dataset | None = None,
    sources: Mapping[str, Source] | None = None,
) -> Trainer:
    """Loads the base, puts a LoRA on it, and returns the trainer.

    Args:
        settings: Our arguments.
        args: The trainer's arguments.
        data: Pairs or triplets to train on; with ``sources``, those of each.
        held_out: Triplets to evaluate on.
        sources: What the recipe says of each source, by its name.

    Raises:
        ValueError: If the base or the data for evaluation is not right.
        OSError: If one of them is missing.
    """
    # Before the model is loaded, which takes long: a fault of the data is found at once
    more = {"composed": settings.eval_composed, "retrieval": settings.eval_retrieval}
    evaluators = make_evaluators(settings.eval_sts, held_out, settings.eval_images, **more)
    set_seed(args.seed)
    model = load_for_training(
        settings.model,
        revision=settings.model_revision or None,
        bits=settings.bits,
        text_only=not needs_images(settings, data, held_out),
        lora_r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        init_adapter=settings.init_adapter,
        train_vision=settings.train_vision,
    )
    name_layers(args, model)
    rows, processes = args.per_device_train_batch_size, args.world_size
    prompts: dict[str, dict[str, str]] | None = None
    if sources is not None:
        prompts = {name: prompts_of(source, data[name].column_names) for name, source in sources.items()}
        data = DatasetDict(data)
    callbacks: list[Any] = [StopOnSignal()]
    if settings.early_stop:
        callbacks.append(EarlyStoppingCallback(settings.early_stop))
    return Trainer(
        model=model,
        args=args,
        train_dataset=data,
        loss=make_losses(model, settings, sources, rows, processes)
        if sources is not None
        else make_loss(model, settings, rows, processes),
        evaluator=evaluators or None,
        data_collator=make_collator(model, settings, prompts),
        callbacks=callbacks,
        weights=[source.weight for source in sources.values()] if sources is not None else (),
    )


def needs_images(settings: Settings, data: Dataset | Mapping[str, Dataset], held_out: Dataset | None) -> bool:
    """Whether anything of a training may be an image, so that the model needs its vision tower."""
    parts = [*(data.values() if isinstance(data, Mapping) else [data]), *([held_out] if held_out else [])]
    items = any(isinstance(feature, dict) for part in parts for feature in part.features.values())
    asked = settings.eval_images or settings.eval_composed or settings.eval_retrieval
    return bool(items or asked or settings.train_vision != "none")


def prompts_of(source: Source, columns: Sequence[str]) -> dict[str, str]:
    """Returns the prompt of each column that has one."""
    return {column: prompt for column in columns if (prompt := source.prompt_of(column))}


def name_layers(args: SentenceTransformerTrainingArguments, model: SentenceTransformer) -> None:
    """Has FSDP gather the language model's layers one by one, unless its configuration names other classes.

    Args:
        args: The trainer's arguments, which are changed.
        model: What is trained; each family has a class of its own for its layers.
    """
    plugin = args.fsdp_plugin_args
    if plugin is None or plugin["auto_wrap_policy"] != BY_CLASS or "transformer_cls_names_to_wrap" in plugin:
        return
    transformer: Any = model[0]
    layers = transformer.model.get_decoder().layers
    plugin["transformer_cls_names_to_wrap"] = ",".join(sorted({type(layer).__name__ for layer in layers}))
