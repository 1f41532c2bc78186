"""E5-V as a sentence-transformers module: load, preprocess, forward, save.

This file and its ``*_e5v.py`` siblings are copied beside every saved model, so that it loads with
``trust_remote_code=True`` where the ``e5v_st`` package is not installed.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from sentence_transformers.base.modules.transformer import Transformer
from transformers import MODEL_MAPPING, PROCESSOR_MAPPING, AutoConfig, AutoProcessor, AutoTokenizer

from .adapter_e5v import Base, find_adapter, find_base, found_at, load_adapter
from .backbone_e5v import (
    GENERIC,
    Backbone,
    check_model_type,
    find_backbone,
    make_generic,
    read_chat_format,
    read_image_string,
)
from .features_e5v import Features, distinct_groups, has_images
from .generic_e5v import (
    MASKED_NODES,
    forked_states,
    padded_last_states,
    short_pieces,
    stock_states,
    tree_states,
)
from .items_e5v import Item, check_strings, read_items
from .llava_next_e5v import LlavaNextReader, bind_layout, check_layout, repair_embedding, repair_processor
from .mistral3_e5v import keep_single_tokens
from .packing_e5v import packed_last_states
from .pixels_e5v import ImageReader, Pixels
from .planning_e5v import default_batch_tokens, plan_parts
from .pooling_e5v import check_modules, pools_last_tokens
from .probing_e5v import can_pack, check_causal
from .processor_e5v import limit_image_tokens, load_processor, read_template
from .prompts_e5v import PROMPTS, chat_template, find_format
from .published_e5v import find_recipe
from .sharing_e5v import can_share, plain_states, prepare_sharing, shared_states
from .skipping_e5v import prepare_skipping
from .tokens_e5v import PromptTokenizer
from .upstream_e5v import (
    allow_output_hooks,
    check_override,
    drop_output_hooks,
    find_caller,
    processor_loaded_by,
    share_weights,
    unexpected_keys_allowed,
)
from .weights_e5v import check_offloading, check_weights

#: Names of the files that travel with a model, without their common ending: all that stand beside this one.
SOURCES = tuple(sorted(file.name.removesuffix("_e5v.py") for file in Path(__file__).parent.glob("*_e5v.py")))
#: Versions that a saved model asks for: sentence-transformers compares them before it loads anything.
REQUIREMENTS = {
    "sentence-transformers": {
        "specifier": ">=6.2,<7",
        "reason": "The code beside the model overrides private methods of version 6, which another may not have.",
    },
    "transformers": {
        "specifier": ">=5.23,<6",
        "reason": "The code beside the model runs single layers of version 5, which another may build differently.",
    },
}

#: Where ``processing_kwargs`` may hold a maximum length.
_LENGTHS = (("text", "max_length"), ("common", "max_length"))
#: What ``processing_kwargs`` may say besides a maximum length, as it is what E5-V does in any case.
_SETTINGS = {
    ("text", "padding"): (True, "longest"),
    ("text", "truncation"): (True, "longest_first", "only_first"),
    ("common", "return_tensors"): ("pt",),
}

_OUTPUT = {"method": "forward", "method_output_name": "last_hidden_state"}


class E5VTransformer(Transformer):
    """Turns texts, images, and images with a change described in words into hidden states of a multimodal model.

    It stands first in a SentenceTransformer, before last-token pooling and normalisation. ``preprocess`` builds E5-V's
    prompts; ``forward`` runs the language model without its head, and writes the hidden states after the final norm.

    Args:
        model_name_or_path: A checkpoint (directory or hub id) of one of the families in ``backbone_e5v``, an adapter of
            one, or a saved E5-V model.
        generic: Take a model of any other type, if it passes the tests of ``probing_e5v``.
        chat_format: For such a model, what stands around a prompt, which is ``{}`` in it; by default it is read from
            the checkpoint's chat template.
        image_string: For such a model, what stands for an image in a prompt; by default it is read likewise.
        image_layout: ``"upstream"`` (current transformers) or ``"paper"`` (transformers 4.41.2, LLaVA-NeXT alone); see
            ``llava_next_e5v``.
        max_image_tokens: About how many tokens an image takes at most, where the family can choose; by default what
            ``backbone_e5v`` says, or what the model was saved with.
        recipe: How a published model of others is asked, a name in ``published_e5v``; ``None`` is E5-V's own way.
        share_prefixes: Compute once what prompts of a batch begin with alike (the chat header, an image, words). Exact;
            ``False`` is for measuring what it saves.
        strings: What a bare string is: ``"auto"`` (an image, where it is the path of an image file, an image URL or a
            ``data:image/`` address) or ``"text"`` (always a text).
        **kwargs: Arguments of sentence-transformers' ``Transformer``. ``model_kwargs={"dtype": ...}`` overrides the
            dtype: bfloat16 where a GPU is at hand, else the checkpoint's.

    Raises:
        ValueError: If the checkpoint is of no known family, there is no chat format for it, or weights are missing.

    Example:
        >>> import e5v_st
        >>> transformer = e5v_st.load("e5v-tiny", device="cpu")[0]
        >>> isinstance(transformer, e5v_st.E5VTransformer)
        True
        >>> features = transformer.preprocess([{"text": "A dog."}, {"text": "A dog runs."}])
        >>> states = transformer(features)["token_embeddings"]
        >>> (len(states), states.dtype)
        (2, torch.float32)
    """

    config_keys: ClassVar = [
        *Transformer.config_keys,
        *(
            "chat_format",
            "generic",
            "image_layout",
            "image_string",
            "max_image_tokens",
            "recipe",
            "share_prefixes",
            "strings",
        ),
    ]

    def __init__(
        self,
        model_name_or_path: str,
        *,
        generic: bool = False,
        chat_format: str | None = None,
        image_string: str | None = None,
        image_layout: str = "upstream",
        max_image_tokens: int | None = None,
        recipe: str | None = None,
        share_prefixes: bool = True,
        strings: str = "auto",
        **kwargs: Any,
    ) -> None:
        for method in ("_load_config", "_load_model"):
            check_override(Transformer, method)
        kwargs["modality_config"] = dict.fromkeys(("text", "image", ("image", "text"), "message"), _OUTPUT)
        kwargs["module_output_name"] = "token_embeddings"
        check_layout(image_layout)
        check_strings(strings)
        self.backbone: Backbone
        self.generic = generic
        self.chat_format, self.image_string = chat_format, image_string
        if chat_format is not None and not generic:
            raise ValueError(f"got chat_format={chat_format!r}, which is for backbone={GENERIC!r}: leave it out")
        with processor_loaded_by(self._load_processor):
            super().__init__(model_name_or_path, **kwargs)
        self.recipe = recipe
        self.default_prompts: Mapping[str, str] = find_recipe(recipe).prompts if recipe else PROMPTS
        if recipe:
            wrapper = find_format(self.backbone.wrapper) + find_recipe(recipe).suffix
            self.backbone = replace(self.backbone, wrapper=wrapper)
        self.wrapper = self.backbone.wrapper
        self.processor.chat_template = chat_template(self.wrapper, self.backbone.image, self.default_prompts)
        tokenizer: Any = self.tokenizer
        tokenizer.padding_side = "right"
        if self.backbone.is_llava_next:
            repair_processor(self.processor, self.config)
        self._stock_image_processor = copy.deepcopy(self.processor.image_processor)
        self._stock_grids = getattr(self.config, "image_grid_pinpoints", None)
        self._image_layout = image_layout
        image_id: int = self.config.image_token_id
        image_token: str = tokenizer.convert_ids_to_tokens(image_id)
        positions = self.model.get_decoder().config.max_position_embeddings
        self.prompt_tokenizer = PromptTokenizer(tokenizer, self.backbone, image_token, image_id, positions)
        self.share_prefixes = share_prefixes
        self.strings = strings
        self.forward_kwargs = {*self.forward_kwargs, "max_image_tokens"}  # what `encode` may be given besides its own
        self.image_layout = image_layout
        self.max_image_tokens = max_image_tokens
        if generic:
            self._probe(model_name_or_path)
        self.sharing = prepare_sharing(self.model, self.backbone.sharing)
        prepare_skipping(self.model, known=not generic)
        keep_single_tokens(self.model)

    def _probe(self, name: str) -> None:
        """Finds out what a model of another type can do; raises ValueError if the recipe cannot run on it."""
        tokenizer: Any = self.tokenizer
        vocabulary = min(len(tokenizer), self.model.get_input_embeddings().num_embeddings)
        check_causal(self.model, vocabulary, name)
        self.backbone = replace(self.backbone, packing=int(can_pack(self.model.get_decoder(), vocabulary)))

    def _load_processor(self, path: str, **kwargs: Any) -> Any:
        """Returns the checkpoint's processor, and notes which family it is of."""
        if self.config.model_type == "llava_next" and not self.generic:
            processor = AutoProcessor.from_pretrained(path, **kwargs)
            self.backbone = find_backbone(self.config, processor.tokenizer)
            return processor
        tokenizer = AutoTokenizer.from_pretrained(path, **kwargs)
        if self.generic:
            return self._load_any_processor(path, tokenizer, **kwargs)
        self.backbone = find_backbone(self.config, tokenizer, read_template(path, tokenizer, **kwargs))
        return load_processor(path, self.backbone, tokenizer, **kwargs)

    def _load_any_processor(self, path: str, tokenizer: Any, **kwargs: Any) -> Any:
        """Returns the processor of a checkpoint of another type, and makes its row from what the checkpoint says."""
        if type(self.config) not in PROCESSOR_MAPPING:
            raise ValueError(f"{path} is a {self.config.model_type!r}, for which transformers has no processor")
        self.chat_format = find_format(self.chat_format or read_chat_format(tokenizer))
        backbone = make_generic(self.config, tokenizer, PROCESSOR_MAPPING[type(self.config)], self.chat_format)
        processor = load_processor(path, backbone, tokenizer, **kwargs)
        self.image_string = self.image_string or read_image_string(tokenizer, self.chat_format, processor.image_token)
        self.backbone = replace(backbone, image=self.image_string)
        return processor

    @property
    def max_image_tokens(self) -> int | None:
        """The maximum in use, if a user chose one; may be set at any time."""
        return self._max_image_tokens

    @max_image_tokens.setter
    def max_image_tokens(self, value: int | None) -> None:
        limited = self._limited_processor(value)  # a copy: a number that is refused changes nothing
        self._max_image_tokens = value
        vars(self.processor).update(vars(limited))
        self._use_image_processor(limited.image_processor)

    def _limited_processor(self, value: int | None) -> Any:
        """Returns a copy of the processor in which an image takes at most so many tokens."""
        processor = copy.copy(self.processor)
        processor.image_processor = copy.deepcopy(self._stock_image_processor)
        limit = self.backbone.image_tokens if value is None else value
        if limit is not None:
            limit_image_tokens(processor, self.backbone, limit)
        return processor

    def _use_image_processor(self, image_processor: Any) -> None:
        """Reads images by it, and tells the model of its grids, where it has some."""
        self.processor.image_processor = image_processor
        if self.backbone.has_grids:
            grids = image_processor.image_grid_pinpoints
            own = self.backbone.is_llava_next and grids == self._stock_image_processor.image_grid_pinpoints
            self.config.image_grid_pinpoints = self._stock_grids if own else grids
        self._make_reader()

    def limited(self, max_image_tokens: int) -> E5VTransformer:
        """Returns a view with another maximum of image tokens over the same weights; this module stays as it is.

        Args:
            max_image_tokens: See the class.

        Raises:
            ValueError: If the family has no such limit, or knows other numbers.
        """
        view = share_weights(self)
        view.processor = copy.copy(self.processor)
        if self.backbone.has_grids:  # the model cuts features by its own configuration
            view.model = share_weights(self.model)
            view.model.config = copy.copy(self.config)
            if self.backbone.is_llava_next:
                bind_layout(view.model, self.image_layout)
        view.max_image_tokens = max_image_tokens
        return view

    @property
    def image_layout(self) -> str:
        """The layout in use; may be set at any time."""
        return self._image_layout

    @image_layout.setter
    def image_layout(self, value: str) -> None:
        self._image_layout = check_layout(value)
        if self.backbone.is_llava_next:
            bind_layout(self.model, value)
        elif value != "upstream":
            raise ValueError(f"got image_layout={value!r}, which only LLaVA-NeXT has: leave it out")
        self._make_reader()

    def _make_reader(self) -> None:
        """Makes what reads images, by the processor and the layout as they are now."""
        self.reader: ImageReader
        if self.backbone.is_llava_next:
            settings = self.processor.image_processor.to_dict()
            self.reader = LlavaNextReader(self.config, settings, self.image_layout)
        else:
            self.reader = ImageReader(self.processor, self.backbone, self.prompt_tokenizer.image_token)

    # What was named is a checkpoint, or an adapter of one. In the arguments of a call, `revision` and `subfolder` say
    # where that is. An adapter's base is elsewhere, at a revision of its own: `_load_config` finds it, `_load_model`
    # loads it as any checkpoint and puts the adapter on it. sentence-transformers is told of no adapter, as it would
    # load the base at its newest revision, and whatever of the adapter has its place.

    def _load_config(self, model_name_or_path: str, backend: str, config_kwargs: dict[str, Any]) -> tuple[Any, bool]:
        """Returns the configuration of the checkpoint, and that it is not an adapter."""
        self._base: Base | None = None
        checkpoint, arguments = model_name_or_path, config_kwargs
        settings = find_adapter(model_name_or_path, **config_kwargs)
        if settings is not None:
            self._base = find_base(model_name_or_path, settings, **config_kwargs)
            checkpoint, arguments = self._base.name, self._base.arguments(config_kwargs)
        config = AutoConfig.from_pretrained(checkpoint, **arguments)
        self.found_at = found_at(checkpoint, **arguments)
        if not self.generic:
            check_model_type(config, model_name_or_path)
        return config, False

    def _load_model(self, name: str, task: Any, config: Any, backend: str, is_peft_model: bool, **kwargs: Any) -> Any:
        """Returns the checkpoint's model, repaired and checked, with the adapter on it if one was named."""
        if torch.cuda.is_available() and kwargs.get("dtype", kwargs.get("torch_dtype")) is None:
            kwargs["dtype"] = torch.bfloat16
        checkpoint, arguments = name, kwargs
        if self._base is not None:
            checkpoint, arguments = self._base.name, self._base.arguments(kwargs)
        how = {"use_safetensors": True, "output_loading_info": True, **arguments}
        # A published checkpoint has a language model head, which embeddings do not need
        with unexpected_keys_allowed(MODEL_MAPPING[type(config)], [r"lm_head"]):
            model, found = super()._load_model(checkpoint, task, config, backend, is_peft_model, **how)
        check_offloading(model)
        if config.model_type == "llava_next":
            repair_embedding(model)
        check_weights(model, found)
        if self._base is not None:
            load_adapter(model, name, self._base, **kwargs)
        return model

    def preprocess(
        self,
        inputs: Sequence[Any],
        prompt: str | None = None,
        processing_kwargs: dict[str, dict[str, Any]] | None = None,
        max_image_tokens: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Reads, renders and tokenises a batch, and cuts its images into tiles.

        Args:
            inputs: Items, see ``items_e5v.read_item``.
            prompt: A template with ``<sent>`` and/or ``<image>``, an instruction, or ``None``; see
                ``prompts_e5v.resolve_prompt``.
            processing_kwargs: ``{"text": {"max_length": n}}`` cuts texts so that prompts have at most n tokens.
            max_image_tokens: See the class, for this call alone; ``encode`` passes it on.
            **kwargs: ``max_length`` does the same, and so do the module's ``query_length`` and ``document_length`` with
                a ``task``; what else sentence-transformers passes is not needed here.

        Returns:
            ``input_ids`` and ``attention_mask`` ``(n, tokens)``, padded on the right, and, where there are images,
            their pixels in float32. In inference these hold each distinct image once, and ``image_index`` says which
            items show it. Otherwise they have a row for each item, as all else; see ``features_e5v``.

        Raises:
            ValueError: If an item cannot be read or does not fit its prompt; the message names its index. Or if the
                model has modules, or ``processing_kwargs`` has settings, that E5-V cannot serve.
        """
        if not len(inputs):
            return {}
        model, output = find_caller(self)
        if model is not None:
            check_modules(model)
            if prompt and prompt in model.prompts:
                raise ValueError(f"got {prompt!r} as the prompt, which is a prompt's name: use prompt_name={prompt!r}")
        max_length = self.find_max_length(processing_kwargs, **kwargs)
        reading = self if max_image_tokens is None else self.limited(max_image_tokens)
        check = partial(reading.check, max_length=max_length)
        items = read_items(inputs, prompt, check, self.strings, self.default_prompts)
        # `encode` runs in inference mode; a batch made outside of it may be for training, which takes batches apart
        encodes = torch.is_inference_mode_enabled() and output == "sentence_embedding"
        how: dict[str, Any] = {}
        if encodes and pools_last_tokens(model):
            how = {"share": True, "batch_tokens": default_batch_tokens(self.model)}
        features: dict[str, Any] = {**reading.collate(items, max_length, **how)}
        if max_image_tokens is not None:
            features["max_image_tokens"] = max_image_tokens
        return features

    def find_max_length(
        self,
        processing_kwargs: dict[str, dict[str, Any]] | None = None,
        max_length: int | None = None,
        task: str | None = None,
        **_: Any,
    ) -> int | None:
        """Returns the maximum number of tokens of a prompt, in the order in which sentence-transformers looks for it.

        Args:
            processing_kwargs: Of a call; those that the module was made with stand behind them.
            max_length: Of a call.
            task: ``"query"`` or ``"document"``, for the module's ``query_length`` or ``document_length``.

        Raises:
            ValueError: If it is less than 1, or there are other settings that would change the features.
        """
        settings: dict[tuple[str, str], Any] = {}
        for group, values in (*self.processing_kwargs.items(), *(processing_kwargs or {}).items()):
            for name, value in values.items() if isinstance(values, Mapping) else [("", values)]:
                if (group, name) not in _LENGTHS and value not in _SETTINGS.get((group, name), ()):
                    raise ValueError(
                        f"got processing_kwargs={{{group!r}: {values!r}}}, which E5-V cannot do: of these settings it "
                        "takes {'text': {'max_length': n}} alone"
                    )
                settings[group, name] = value
        by_task = getattr(self, f"{task}_length", None) if task in ("query", "document") else None
        asked = [settings.get(place) for place in _LENGTHS]
        found = next((length for length in (*asked, max_length, by_task) if length is not None), None)
        if found is not None and found < 1:
            raise ValueError(f"got max_length={found}, want at least 1")
        return found

    def check(self, item: Item, max_length: int | None = None) -> None:
        """Raises ValueError for an item that this model cannot take, as one with too many images."""
        self.prompt_tokenizer.check(item, self.reader.count(item.images), max_length)

    def collate(
        self,
        items: Sequence[Item],
        max_length: int | None = None,
        *,
        share: bool = False,
        batch_tokens: float = math.inf,
        each_image: Callable[..., Iterable[Any]] = map,
    ) -> Features:
        """Makes the features of items that are read already; see :meth:`preprocess` and ``features_e5v``.

        Args:
            items: Items with their final prompts.
            max_length: See :meth:`preprocess`.
            share: Compute what is equal in the batch once. The batch must then stay as it is.
            batch_tokens: The maximum number of tokens that are then computed together.
            each_image: ``map``, or that of a pool of threads.
        """
        groups, shown = distinct_groups(items, self.reader)
        pixels: list[Pixels] = list(each_image(self.reader.read, groups))
        placeholders = [[place for index in own for place in pixels[index].shown] for own in shown]
        input_ids, attention_mask = self.prompt_tokenizer(items, placeholders, max_length)
        features: Features = {"input_ids": input_ids, "attention_mask": attention_mask}
        if not self.backbone.is_llava_next and self.processor.return_mm_token_type_ids:
            types = self.processor.create_mm_token_type_ids(input_ids.tolist())
            features[self._token_types] = torch.tensor(types) * attention_mask  # type: ignore[literal-required]
        if pixels:
            features.update(self.reader.join(pixels, shown, share=share))  # type: ignore[typeddict-item]
        if share:
            lengths = attention_mask.sum(1).tolist()
            if self.shares():
                prompts = [row[:length] for row, length in zip(input_ids.numpy(), lengths, strict=True)]
                sizes = [sum(sum(place.runs) for place in each.shown) for each in pixels]
                budget = min(batch_tokens, MASKED_NODES) if self.sharing == "masks" else batch_tokens
                features["parts"] = plan_parts(prompts, shown, self.config.image_token_id, sizes, budget)
            elif not (self.backbone.is_llava_next and pixels):
                features["lengths"] = lengths
        return features

    @property
    def _token_types(self) -> str:
        """The name of the field that says which tokens are images, where the family wants it."""
        old = "token_type_ids"
        return old if old in self._declared_forward_params else "mm_token_type_ids"

    def shares(self) -> bool:
        """Whether what prompts begin with alike is computed once; see ``sharing_e5v``."""
        return self.share_prefixes and can_share(self.model, self.sharing)

    def count_image_tokens(self, item: Item) -> int:
        """Returns how many tokens an item's images will take, without reading them."""
        return sum(self.reader.count(item.images))

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Runs the language model; see the class.

        Args:
            features: What :meth:`preprocess` returned, on the model's device.
            **kwargs: Arguments of the language model. ``encode`` passes ``max_image_tokens`` once more, which the
                features have already.

        Returns:
            The features with ``token_embeddings`` ``(n, tokens, d)`` in float32, and ``attention_mask`` to fit: where
            nothing but last tokens is read, only each row's last token is there.
        """
        kwargs.pop("max_image_tokens", None)
        limit = features.pop("max_image_tokens", None)
        if limit is not None and self.backbone.has_grids:
            return self.limited(limit).forward(features, **kwargs)
        parts, lengths = features.pop("parts", None), features.pop("lengths", None)
        stock = not self.backbone.is_llava_next
        if torch.is_grad_enabled() or (parts is None and lengths is None):
            states = (stock_states if stock else plain_states)(self.model, features, **kwargs)
        else:
            if self.backbone.sharing == "fork":
                kwargs = {**short_pieces(self.model), **kwargs}
            if parts is None and (not self.backbone.packing or has_images(features)):
                states = padded_last_states(self.model, features, lengths, **kwargs)
            elif parts is None:
                states = self.packed_states(features["input_ids"], lengths, **kwargs)
            elif self.sharing == "fork":
                states = forked_states(self.model, features, parts, **kwargs)
            elif stock:
                how = {"sharing": self.sharing, "image_id": self.config.image_token_id}
                states = tree_states(self.model, features, parts, **how, **kwargs)
            else:
                states = shared_states(self.model, features, parts, **kwargs)
            features["attention_mask"] = features["attention_mask"].new_ones(states.shape[:2])
        features["token_embeddings"] = states.float()
        return features

    def packed_states(self, input_ids: torch.Tensor, lengths: Sequence[int], **kwargs: Any) -> torch.Tensor:
        """Returns the last hidden state of each text, several of them in a row; see ``packing_e5v``."""
        # Of LLaVA-NeXT's many language models, each is looked at; those of the other families are known
        packing = None if self.backbone.is_llava_next else self.backbone.packing
        return packed_last_states(self.model.get_decoder(), input_ids, lengths, packing=packing, **kwargs)

    def on_model_ready(self, model: Any) -> None:
        """Keeps what stands behind this module in float32, as the hidden states that it gets are."""
        for module in list(model)[1:]:
            module.float()

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Saves weights, processor and configuration, and the code that loads them.

        The image processor is saved without the limit of ``max_image_tokens``, which stands in the configuration.
        """
        limited = self.processor.image_processor
        self._use_image_processor(self._stock_image_processor)
        try:
            super().save(output_path, *args, **kwargs)
        finally:
            self._use_image_processor(limited)
        here = Path(__file__).parent
        for name in SOURCES:
            shutil.copyfile(here / f"{name}_e5v.py", Path(output_path) / f"{name}_e5v.py")
        # sentence-transformers writes this file before it saves the modules, and checks what stands in it on loading
        settings = Path(output_path) / "config_sentence_transformers.json"
        if settings.is_file():
            content = json.loads(settings.read_text(encoding="utf8"))
            content |= {"requirements": REQUIREMENTS, "e5v": self.backbone.summary()}
            settings.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf8")

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class names itself by the file that travels with a model (see below), which only exists there
        drop_output_hooks(self.model)
        return _empty_module, (), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        allow_output_hooks(self.model)


def _empty_module() -> E5VTransformer:
    return E5VTransformer.__new__(E5VTransformer)


if __name__ == "e5v_st.model.modeling_e5v":
    # sentence-transformers writes this name to modules.json, and loads it from the file beside it
    E5VTransformer.__module__ = "modeling_e5v"
elif __name__.startswith("transformers_modules."):
    # transformers imports the code of each folder anew. Folders with the same code share one class, since
    # sentence-transformers merges models of one class only
    _code = hashlib.sha256(b"".join((Path(__file__).parent / f"{name}_e5v.py").read_bytes() for name in SOURCES))
    E5VTransformer = sys.modules.setdefault(f"e5v_{_code.hexdigest()}", sys.modules[__name__]).E5VTransformer

__all__ = ["PROMPTS", "E5VTransformer"]
