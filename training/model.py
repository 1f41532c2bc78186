"""The model as it is trained: text only, LoRA on the language model, checkpoints that hold the adapter alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from transformers import LlavaNextConfig, LlavaNextModel

from e5v_st.files import locate
from e5v_st.loading import LORA_TARGETS
from e5v_st.model.adapter_e5v import find_adapter
from e5v_st.model.modeling_e5v import E5VTransformer
from e5v_st.model.packing_e5v import packed_last_states
from e5v_st.model.prompts_e5v import PROMPTS
from e5v_st.published import TINY, TINY_NAME

#: Published checkpoints' names (transformers before 4.52), which transformers maps for its own classes only.
OLD_KEYS = {r"^language_model\.model\.": "language_model."}

ADAPTER_WEIGHTS = "adapter_model.safetensors"


class TextOnlyLlavaNext(LlavaNextModel):
    """A LLaVA-NeXT without vision tower and projector: they are neither built nor read from the checkpoint."""

    _keys_to_ignore_on_load_unexpected: ClassVar = [
        "lm_head",
        "vision_tower",
        "multi_modal_projector",
        "image_newline",
    ]

    def __init__(self, config: LlavaNextConfig) -> None:
        super().__init__(config)
        del self.vision_tower, self.multi_modal_projector, self.image_newline


class TrainableTransformer(E5VTransformer):
    """E5-V's transformer for training on text: packs the texts of a batch, so that next to nothing is padding.

    Args:
        *args: See ``E5VTransformer``.
        text_only: Leave out the vision tower. Embedding an image then fails.
        **kwargs: See ``E5VTransformer``.
    """

    def __init__(self, *args: Any, text_only: bool = True, **kwargs: Any) -> None:
        self._text_only = text_only
        super().__init__(*args, **kwargs)

    def _load_encoder_only_model(self, model_name_or_path: str, config: Any, **kwargs: Any) -> Any:
        if not self._text_only:
            return None
        return TextOnlyLlavaNext.from_pretrained(model_name_or_path, config=config, key_mapping=OLD_KEYS, **kwargs)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Runs the language model; see ``E5VTransformer.forward``.

        Returns:
            The features with ``token_embeddings`` ``(n, 1, d)`` in float32 where texts were packed, each text's last
            state, and ``attention_mask`` to fit. Features with ``position_ids`` run as they are, padding included.
        """
        if "position_ids" in features:
            states = self.model.language_model(
                input_ids=features["input_ids"],
                attention_mask=features["attention_mask"],
                position_ids=features["position_ids"],
                use_cache=False,
            ).last_hidden_state
            features["token_embeddings"] = states.float()
            return features
        if not self.training or features.get("pixel_values") is not None:
            return super().forward(features, **kwargs)
        mask = features["attention_mask"]
        states = packed_last_states(self.model.language_model, features["input_ids"], mask.sum(1).tolist())
        # A new dictionary: losses with a guide or a second model give the same features to that one afterwards
        return {**features, "token_embeddings": states.float(), "attention_mask": mask.new_ones(states.shape[:2])}


# What is saved says which class loads it: the one whose source travels with the model, vision tower and all
TrainableTransformer.__name__ = TrainableTransformer.__qualname__ = E5VTransformer.__name__
TrainableTransformer.__module__ = E5VTransformer.__module__


class AdapterModel(SentenceTransformer):
    """A SentenceTransformer that reads a checkpoint's adapter, not a second copy of the base, to resume from it."""

    @classmethod
    def _load_with_module_classes(cls, model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        """What the trainer calls to read a checkpoint, only to take its ``state_dict()``."""
        return AdapterCheckpoint(Path(model_name_or_path))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads weights; an adapter's alone where they come from a checkpoint, and then all of it.

        Raises:
            RuntimeError: If the checkpoint's adapter and the model's do not have the same weights, or scale them
                differently.
        """
        if not isinstance(state_dict, AdapterWeights):
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        trained = self[0].model.peft_config["default"]
        for field in (
            "lora_alpha",
            "use_rslora",
        ):  # neither names nor shapes tell of these
            if state_dict.settings[field] != getattr(trained, field):
                raise RuntimeError(
                    f"the checkpoint's adapter has {field}={state_dict.settings[field]}, the one that is trained "
                    f"{getattr(trained, field)}: give --lora_alpha as in the first run"
                )
        own = {name for name, weight in self.named_parameters() if weight.requires_grad}
        if own != set(state_dict):
            differing = sorted(own ^ set(state_dict))
            raise RuntimeError(
                f"the checkpoint's adapter is not the one that is trained: {len(differing)} of {len(own)} weights "
                f"are in one only ({', '.join(differing[:3])}). Give --lora_r and the base as in the first run"
            )
        return super().load_state_dict(state_dict, strict=False, assign=assign)


class AdapterWeights(dict):
    """Weights of an adapter, under their names in the whole model, and its configuration."""

    settings: dict[str, Any]


class AdapterCheckpoint:
    """Stands for the model that a checkpoint holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def state_dict(self) -> AdapterWeights:
        """Returns the adapter's weights."""
        from safetensors.torch import load_file

        weights = load_file(self.folder / ADAPTER_WEIGHTS)
        found = AdapterWeights(
            (key.replace("base_model.model.", "0.model.", 1).replace(".weight", ".default.weight"), value)
            for key, value in weights.items()
        )
        found.settings = json.loads((self.folder / "adapter_config.json").read_text(encoding="utf8"))
        return found


def load_for_training(
    name: str,
    *,
    revision: str | None = None,
    bits: int = 16,
    text_only: bool = True,
    lora_r: int = 64,
    lora_alpha: int = 16,
    lora_dropout: float = 0.05,
) -> AdapterModel:
    """Loads a base, puts a fresh LoRA on its language model and freezes everything else.

    Args:
        name: A directory, a hub id, or ``"e5v-tiny"``.
        revision: Of the hub id.
        bits: 4 (NF4, double quantisation, as ft_llm.py), 8, 16 (bfloat16, float16 on GPUs without it) or 32: how the
            frozen base is held. The LoRA is in float32 always.
        text_only: Neither load nor build the vision tower.
        lora_r: Rank.
        lora_alpha: The update is scaled by ``lora_alpha / lora_r``.
        lora_dropout: Probability.

    Raises:
        ValueError: If it is no LLaVA-NeXT, or an adapter already.
    """
    from peft import LoraConfig

    path = str(TINY if name == TINY_NAME else locate(name) or name)
    if find_adapter(path, revision=revision) is not None:
        raise ValueError(f"{path} is an adapter: merge it into its base first (python -m hub merge), then train that")
    transformer = TrainableTransformer.load(
        path, revision=revision, model_kwargs=precision(bits), init_defaults={"text_only": text_only}
    )
    model = AdapterModel(
        modules=[transformer, Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken"), Normalize()],
        prompts=PROMPTS,
    )
    model.requires_grad_(False)
    adapter = LoraConfig(
        r=lora_r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=LORA_TARGETS, bias="none"
    )
    transformer.model.add_adapter(adapter)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    adapter.base_model_name_or_path, adapter.revision = base_id(path, revision)
    transformer.model.peft_config["default"] = adapter
    return model


def precision(bits: int) -> dict[str, Any]:
    """Returns what ``from_pretrained`` needs to hold the base in 4, 8, 16 or 32 bits."""
    if bits == 32:
        return {"dtype": torch.float32}
    half = torch.float16 if torch.cuda.is_available() and not torch.cuda.is_bf16_supported() else torch.bfloat16
    if bits == 16:
        return {"dtype": half}
    if bits not in (4, 8):
        raise ValueError(f"got --bits {bits}, want 4, 8, 16 or 32")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=half,
        llm_int8_skip_modules=["vision_tower", "multi_modal_projector"],
    )
    where: Any = int(os.environ.get("LOCAL_RANK", 0)) if torch.cuda.is_available() else "cpu"
    return {"dtype": half, "quantization_config": config, "device_map": {"": where}}


def base_id(path: str, revision: str | None) -> tuple[str, str | None]:
    """Returns what an adapter should call its base: the hub id and commit where it has them, else the absolute path.

    A path into the hub's cache is such an id in disguise.
    """
    folder = Path(path)
    if not folder.is_dir():
        return path, revision
    repository = next((part for part in folder.absolute().parts if part.startswith("models--")), None)
    if repository is not None and folder.absolute().parent.name == "snapshots":
        return repository.removeprefix("models--").replace("--", "/"), folder.name
    return str(folder.resolve()), None
