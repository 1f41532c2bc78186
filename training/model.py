"""The model as it is trained: LoRA on the language model, checkpoints that hold the adapter alone.

    SentenceTransformer          AdapterModel            reads a checkpoint's adapter, not a second base
      0  E5VTransformer          TrainableTransformer    packs texts and computes what is frozen once, see images.py
           LlavaNextModel, …     make_text_only(…)       has no vision tower
      1  Pooling, 2  Normalize   as they are

The left column is what a saved model says of itself and is loaded as. The names that this overrides in other libraries
stand in ``upstream.py``, with what happens without them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from transformers import MODEL_MAPPING, PreTrainedModel

from e5v_st.files import locate
from e5v_st.model.adapter_e5v import CONFIG as ADAPTER_CONFIG
from e5v_st.model.adapter_e5v import WEIGHTS as ADAPTER_WEIGHTS
from e5v_st.model.adapter_e5v import find_adapter
from e5v_st.model.features_e5v import has_images
from e5v_st.model.modeling_e5v import E5VTransformer
from e5v_st.model.prompts_e5v import PROMPTS
from e5v_st.processes import local_rank
from e5v_st.published import TINY, TINY_NAME
from e5v_st.quantize import SKIPPED
from e5v_st.saved import load_later, read_modules

from .first_stage import put_first_stage
from .images import Memo, image_states, make_keys, make_memo
from .vision import check_trained, train_targets

if TYPE_CHECKING:
    from e5v_st.model.features_e5v import Features
    from e5v_st.model.items_e5v import Item


def make_text_only(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Returns the class of a family's models without vision tower and projector: neither kept nor read.

    Args:
        stock: The class of whole models, without head.
    """

    class TextOnly(stock):  # type: ignore[misc]
        _keys_to_ignore_on_load_unexpected: ClassVar = [
            r"^(?!.*(language_model|text_model)\.).*",
            r"\bvisual\.",
            "lm_head",
        ]

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for name, part in [*self.named_children(), *self.named_parameters(recurse=False)]:
                if part is not self.get_decoder():
                    delattr(self, name)

        def _init_weights(self, module: Any) -> None:
            if module is not self:  # the weights of its own are not there
                super()._init_weights(module)

    # transformers renames old keys for its own classes alone, which it knows by name
    TextOnly.__name__, TextOnly.__module__ = stock.__name__, stock.__module__
    return TextOnly


class TrainableTransformer(E5VTransformer):
    """E5-V's transformer for training: packs the texts of a batch into rows without padding.

    Batches with images take the way of ``images.py``: there is no padding, and within :meth:`one_step` each distinct
    image goes through a frozen tower and projector once.

    Args:
        *args: See ``E5VTransformer``.
        text_only: Leave out the vision tower. Embedding an image then fails.
        **kwargs: See ``E5VTransformer``.
    """

    _memo: Memo | None = None

    def __init__(self, *args: Any, text_only: bool = True, **kwargs: Any) -> None:
        self._text_only = text_only
        super().__init__(*args, **kwargs)

    def _load_encoder_only_model(self, model_name_or_path: str, config: Any, **kwargs: Any) -> Any:
        if not self._text_only:
            return None
        return make_text_only(MODEL_MAPPING[type(config)]).from_pretrained(model_name_or_path, config=config, **kwargs)

    @contextmanager
    def one_step(self) -> Iterator[None]:
        """Keeps the features of images that it computes until the end of a step, its backward pass included.

        Weights in front of the language model must not change in it. If one is trained, nothing is kept.
        """
        self._memo = make_memo(self.model)
        try:
            yield
        finally:
            self._memo = None

    def collate(
        self, items: Sequence[Item], max_length: int | None = None, *, share: bool = False, **kwargs: Any
    ) -> Features:
        """Makes features; see ``E5VTransformer.collate``. Those for training have ``image_keys``, too."""
        features = super().collate(items, max_length, share=share, **kwargs)
        if not share and has_images(features):
            features["image_keys"] = make_keys(items, self.reader)
        return features

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Runs the language model; see ``E5VTransformer.forward``.

        Returns:
            The features. In training, ``token_embeddings`` ``(n, 1, d)`` holds the last hidden state of each item in
            float32, and ``attention_mask`` fits it. Features with ``position_ids``, which the released quirks give, run
            as they are, padding included; so do families that cannot be packed.
        """
        if "position_ids" in features:
            states = self.model.get_decoder()(
                input_ids=features["input_ids"],
                attention_mask=features["attention_mask"],
                position_ids=features["position_ids"],
                use_cache=False,
            ).last_hidden_state
            features["token_embeddings"] = states.float()
            return features
        states = self._states_without_padding(features, **kwargs) if self.training and self.backbone.packing else None
        if states is None:
            return super().forward(features, **kwargs)
        # A new dictionary: losses with a guide or a second model give the same features to that one afterwards
        return {**features, "token_embeddings": states.float(), "attention_mask": features["attention_mask"][:, :1]}

    def _states_without_padding(self, features: dict[str, Any], **kwargs: Any) -> torch.Tensor | None:
        """Returns each item's last hidden state ``(n, 1, d)``, or ``None`` if a batch must run as it is."""
        if not has_images(features):
            return self.packed_states(features["input_ids"], features["attention_mask"].sum(1).tolist())
        if kwargs or "image_keys" not in features:
            return None
        return image_states(self, features, self._memo)


# What is saved says which class loads it: the one whose source travels with the model, vision tower and all
TrainableTransformer.__name__ = TrainableTransformer.__qualname__ = E5VTransformer.__name__
TrainableTransformer.__module__ = E5VTransformer.__module__


class AdapterModel(SentenceTransformer):
    """A SentenceTransformer that resumes from a checkpoint's adapter, without a second copy of the base."""

    @classmethod
    def _load_with_module_classes(cls, model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        """Stands in for loading a whole model: the trainer only takes the ``state_dict()`` of what it gets."""
        return AdapterCheckpoint(Path(model_name_or_path))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads weights. Weights from a checkpoint are the adapter's alone, and none of the adapter's may be missing.

        Raises:
            RuntimeError: If the adapters of checkpoint and model do not have the same weights, or scale them
                differently.
        """
        if not isinstance(state_dict, AdapterWeights):
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        trained = self[0].model.peft_config["default"]
        for field in ("lora_alpha", "use_rslora"):  # neither names nor shapes of the weights tell of these
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
        found.settings = json.loads((self.folder / ADAPTER_CONFIG).read_text(encoding="utf8"))
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
    init_adapter: str = "",
    train_vision: str = "none",
) -> AdapterModel:
    """Loads a base, puts a LoRA on its language model and freezes everything else.

    Args:
        name: A directory, a hub id, or ``"e5v-tiny"``.
        revision: Branch, tag or commit of the hub id.
        bits: Precision of the frozen base: 4 (NF4 with double quantisation, as in ft_llm.py), 8, 16 (bfloat16, or
            float16 on GPUs without it) or 32. The LoRA is always in float32.
        text_only: Leave out the vision tower.
        lora_r: Rank of the LoRA.
        lora_alpha: The LoRA is scaled by ``lora_alpha / lora_r``.
        lora_dropout: Probability of dropout before the LoRA.
        init_adapter: An adapter to go on from, see ``first_stage.py``; by default the LoRA is a fresh one.
        train_vision: What else gets a LoRA: ``"none"``, ``"projector"`` or ``"lora"``, see ``vision.py``.

    Raises:
        ValueError: If ``name`` is of no known family, or is already an adapter; or ``init_adapter`` does not fit, or
            has other layers than those that are to be trained.

    Example:
        >>> model = load_for_training("e5v-tiny", bits=32, lora_r=8)
        >>> sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        116736
    """
    from peft import LoraConfig

    path = str(TINY if name == TINY_NAME else locate(name) or name)
    if find_adapter(path, revision=revision) is not None:
        raise ValueError(f"{path} is an adapter: merge it into its base first (e5v merge), then train that")
    _check_modules(path, revision)
    transformer = TrainableTransformer.load(
        path, revision=revision, model_kwargs=precision(bits), init_defaults={"text_only": text_only}
    )
    model = AdapterModel(
        modules=[transformer, Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken"), Normalize()],
        prompts=PROMPTS,
    )
    model.requires_grad_(False)
    targets = train_targets(transformer, train_vision)
    if init_adapter:
        adapter = put_first_stage(transformer, init_adapter, dropout=lora_dropout, base=name)
    else:
        adapter = LoraConfig(
            r=lora_r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=targets.pattern, bias="none"
        )
        transformer.model.add_adapter(adapter)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    trained = [key for key, weight in transformer.model.named_parameters() if weight.requires_grad]
    check_trained(trained, targets, init_adapter)
    adapter.base_model_name_or_path, adapter.revision = base_id(path, revision)
    transformer.model.peft_config["default"] = adapter
    return model


def _check_modules(path: str, revision: str | None) -> None:
    """Refuses a base whose own modules behind the transformer would be lost: a run saves E5-V's."""
    hub = {} if revision is None else {"revision": revision}
    modules = load_later(path, read_modules(path, **hub), **hub)
    kinds = [type(module) for module in modules]
    modes = [module.pooling_mode for module in modules if isinstance(module, Pooling)]
    if kinds not in ([], [Pooling, Normalize]) or modes not in ([], ["lasttoken"]):
        raise ValueError(
            f"{path} has other modules behind its transformer than last-token pooling and normalisation "
            f"({', '.join(kind.__name__ for kind in kinds)}), which training would not keep: train the model that it "
            "was made from"
        )


def precision(bits: int) -> dict[str, Any]:
    """Returns the arguments of ``from_pretrained`` that load the base in 4, 8, 16 or 32 bits."""
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
        llm_int8_skip_modules=SKIPPED,
    )
    where: Any = local_rank() if torch.cuda.is_available() else "cpu"
    return {"dtype": half, "quantization_config": config, "device_map": {"": where}}


def base_id(path: str, revision: str | None) -> tuple[str, str | None]:
    """Returns what an adapter should call its base: the hub id and commit where it has them, else the absolute path.

    A path into the hub's cache names both:

        …/models--royokong--e5-v/snapshots/0c1f226   ->   ("royokong/e5-v", "0c1f226")
        runs/merged                                  ->   ("/home/me/runs/merged", None)
    """
    folder = Path(path)
    if not folder.is_dir():
        return path, revision
    repository = next((part for part in folder.absolute().parts if part.startswith("models--")), None)
    if repository is not None and folder.absolute().parent.name == "snapshots":
        return repository.removeprefix("models--").replace("--", "/"), folder.name
    return str(folder.resolve()), None
