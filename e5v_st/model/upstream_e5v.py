"""Every private name of another library that these files use, once: why, and what happens without it.

:data:`PRIVATE_NAMES` is the list, which ``tests/test_upstream.py`` asks for name by name: when a new version of a
library has lost one, the test says which. A public way takes precedence wherever there is one. Nothing heavy is
imported here before it is needed.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

AnyModule = TypeVar("AnyModule", bound="torch.nn.Module")

TRANSFORMERS, SENTENCE_TRANSFORMERS, TORCH = "transformers 5.23", "sentence-transformers 6.2", "torch 2.13"


class PrivateName(NamedTuple):
    """A name that another library may change without notice.

    Attributes:
        name: ``"module:path.of.attributes"``. With ``"(word)"`` behind it, the word is a parameter, a variable or an
            attribute in the code of that function.
        version: The library's, in which it was read.
        reason: Why it is used.
        without: What happens if it is gone.
    """

    name: str
    version: str
    reason: str
    without: str


PRIVATE_NAMES = (
    PrivateName(
        "transformers:PreTrainedConfig._attn_implementation",
        TRANSFORMERS,
        "says which attention a model uses; there is a public way to set it, and none to read it",
        "no model can be loaded: AttributeError",
    ),
    PrivateName(
        "transformers:PreTrainedModel._keys_to_ignore_on_load_unexpected",
        TRANSFORMERS,
        "keeps the head, which embeddings do not need, out of the report of loading; a filter of log lines would hide "
        "the rest of the report with it",
        "each load of a published checkpoint reports lm_head.weight as unexpected",
    ),
    PrivateName(
        "transformers:PreTrainedModel._hf_peft_config_loaded",
        TRANSFORMERS,
        "tells save_pretrained that the model has an adapter; transformers sets it where it loads one itself, which "
        "drops weights without an error",
        "a model with an adapter is saved whole, under names that cannot be loaded",
    ),
    PrivateName(
        "transformers.models.llava_next.image_processing_pil_llava_next:LlavaNextImageProcessorPil._get_padding_size",
        TRANSFORMERS,
        'the layout "paper" pads differently, which is a method of its own there',
        'the layout "paper" cannot be used: RuntimeError, see check_override',
    ),
    PrivateName(
        "transformers.models.idefics3.processing_idefics3:Idefics3Processor._get_num_multimodal_tokens",
        TRANSFORMERS,
        "counts the tokens of an image before it is read, as the methods of that name of other processors do",
        "no job over many images can be planned: AttributeError",
    ),
    PrivateName(
        "transformers.models.smolvlm.processing_smolvlm:num2words",
        TRANSFORMERS,
        "a library that writes numbers around videos as words, without which no SmolVLM processor can be made",
        "SmolVLM 2 cannot be loaded without num2words",
    ),
    PrivateName(
        "transformers.models.qwen3_5.modeling_qwen3_5:torch_chunk_gated_delta_rule(chunk_size)",
        TRANSFORMERS,
        "is handed on from the arguments of the model: recurrent layers compute short texts in short pieces",
        "captions with Qwen3.5 take a fifth longer on a CPU",
    ),
    PrivateName(
        "transformers.processing_utils:ProcessorMixin.check_argument_for_proper_class",
        TRANSFORMERS,
        "overridden: a processor may lack its part for videos, which needs torchvision",
        "most families cannot be loaded without torchvision: TypeError",
    ),
    PrivateName(
        "transformers.utils.hub:cached_files(_raise_exceptions_for_missing_entries)",
        TRANSFORMERS,
        "looks whether a repository has a file, without an error if it has not",
        "OSError where a repository lacks a file that may be missing",
    ),
    PrivateName(
        "transformers.utils.hub:cached_files(_raise_exceptions_for_connection_errors)",
        TRANSFORMERS,
        "the same without a network",
        "OSError where a file may be missing and there is no network",
    ),
    PrivateName(
        "transformers.utils.output_capturing:install_all_output_capturing_hooks(_output_capturing_hooks_installed)",
        TRANSFORMERS,
        "makes transformers put its hooks on a model again, after they were removed for pickling",
        "a model that was copied or sent to another process gives no output_hidden_states",
    ),
    PrivateName(
        "torch.nn:Module.add_module(_modules)",
        TORCH,
        "makes a view of a model with settings of its own over the same weights, for max_image_tokens in one call",
        "encode(max_image_tokens=) cannot be used: KeyError",
    ),
    PrivateName(
        "torch.nn:Module.compile(_compiled_call_impl)",
        TORCH,
        "keeps such a view of a compiled model from running the model itself",
        "encode(max_image_tokens=) of a model that was compiled as a whole reads images without the limit, or fails",
    ),
    PrivateName(
        "torch.nn:Module.register_forward_hook(_forward_hooks)",
        TORCH,
        "removes the hooks of transformers, which cannot be pickled; there is no handle of them",
        "encode() with several devices fails after a call with output_hidden_states: the model cannot be pickled",
    ),
    PrivateName(
        "sentence_transformers.base.modules.transformer:AutoProcessor",
        SENTENCE_TRANSFORMERS,
        "replaced while a model is loaded: its processor is made without the part for videos",
        "families that have a part for videos cannot be loaded without torchvision",
    ),
    PrivateName(
        "sentence_transformers.base.modules.transformer:Transformer._load_config(config_kwargs)",
        SENTENCE_TRANSFORMERS,
        "overridden: the configuration is that of an adapter's base at its own revision, and must be one of E5-V",
        "no model can be loaded: RuntimeError, see check_override",
    ),
    PrivateName(
        "sentence_transformers.base.modules.transformer:Transformer._load_model(is_peft_model)",
        SENTENCE_TRANSFORMERS,
        "overridden: published checkpoints are repaired, weights are checked, and all of an adapter is loaded",
        "no model can be loaded: RuntimeError, see check_override",
    ),
    *(
        PrivateName(
            name,
            SENTENCE_TRANSFORMERS,
            "names the item of an error by its index in the caller's list, which a module is not told",
            "errors name the index in the batch, and a warning says so",
        )
        for name in (
            "sys:_getframe",
            "sentence_transformers:SentenceTransformer.encode(inputs)",
            "sentence_transformers:SentenceTransformer._inference(inputs)",
            "sentence_transformers.base.model:BaseModel._multi_process_worker(inputs)",
            "sentence_transformers.base.model:BaseModel._multi_process_worker(chunk_id)",
            "sentence_transformers.util.distributed:_DistributedInference._infer_and_gather(inputs)",
        )
    ),
    PrivateName(
        "sentence_transformers:SentenceTransformer._inference(output_value)",
        SENTENCE_TRANSFORMERS,
        "tells whether only embeddings are wanted, for which last tokens are enough; a module is not told",
        "all hidden states are computed, which takes longer, and a warning says so",
    ),
)


def is_there(name: str) -> bool:
    """Whether the installed libraries have a name; see :class:`PrivateName` for how it is written."""
    module, _, path = name.partition(":")
    path, _, word = path.removesuffix(")").partition("(")
    try:
        found: Any = import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return False
    if not word:
        return True
    code = getattr(inspect.unwrap(found), "__code__", None)
    return code is not None and word in (*code.co_varnames, *code.co_names, *code.co_consts)


@cache
def _warn_once(names: tuple[str, ...], effect: str) -> None:
    lost = [name for name in names if not is_there(name)]
    if lost:
        warnings.warn(
            f"the installed libraries lack {', '.join(lost)}, so {effect}; E5-V was tested with {TRANSFORMERS} and "
            f"{SENTENCE_TRANSFORMERS}",
            RuntimeWarning,
            stacklevel=3,
        )


# ---- transformers ----

#: Arguments of ``transformers.utils.cached_file``: the answer for a file that is not there is ``None``, not an error.
NONE_IF_MISSING = {"_raise_exceptions_for_missing_entries": False}
#: The same where there is no network.
NONE_IF_OFFLINE = {"_raise_exceptions_for_connection_errors": False}


def attention_of(config: Any) -> str | None:
    """Returns the name of the attention that a model with this configuration uses."""
    return config._attn_implementation


def unexpected_keys_allowed(kind: type, patterns: list[str]) -> AbstractContextManager[None]:
    """Returns a context in which loading a model of this class does not report keys that match the patterns."""
    from sentence_transformers.base.modules.transformer import set_temporary_class_attrs

    return set_temporary_class_attrs(kind, _keys_to_ignore_on_load_unexpected=patterns)


#: Where transformers has its families.
MODELS = "transformers.models."


def import_processor(path: str) -> type:
    """Returns the class of a processor, though torchvision and num2words, which serve videos alone, may be missing.

    Args:
        path: Module and name, below :data:`MODELS`.
    """
    module, _, name = f"{MODELS}{path}".partition(":")
    lent = {}
    if name == "PixtralProcessor" and importlib.util.find_spec("torchvision") is None:
        # It takes one function from the module that needs torchvision; the one for Pillow has the same
        usual = "transformers.models.pixtral.image_processing_pixtral"
        lent[usual] = import_module("transformers.models.pixtral.image_processing_pil_pixtral")
    sys.modules.update(lent)
    try:
        code: Any = import_module(module)
    finally:
        for each in lent:
            sys.modules.pop(each, None)
    if getattr(code, "num2words", True) is None:
        code.num2words = str  # writes the numbers in the words around a video
    found = getattr(code, name)
    kind: type = getattr(found, "__wrapped__", found)
    return kind


def planned_image_tokens(processor: Any, sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Returns how many tokens a processor will put in the place of each image, before any is read.

    Args:
        processor: Of a model family.
        sizes: Height and width of each image.
    """
    count = getattr(processor, "_get_num_multimodal_tokens", None)
    if count is None:  # SmolVLM, which does as Idefics 3 does
        from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

        count = partial(Idefics3Processor._get_num_multimodal_tokens, processor)
    if type(processor).__name__ == "PixtralProcessor":
        # It takes a height of 1 or 3 for the number of colours; 2 or 4 pixels are in one row of patches as well
        sizes = [(height + (height in (1, 3)), width) for height, width in sizes]
    return list(count(image_sizes=[list(size) for size in sizes])["num_image_tokens"])


@contextmanager
def colours_first() -> Iterator[None]:
    """Drops the warning that in an image of 1 or 3 pixels another axis could be that of the colours.

    Processors for Pillow put the colours first, and some then guess where they are. That is what they guess. Other
    threads may go on with warnings of their own.
    """
    thread, log = threading.get_ident(), logging.getLogger("transformers.image_utils")

    def is_wanted(record: logging.LogRecord) -> bool:
        return record.thread != thread or "channel dimension is ambiguous" not in record.getMessage()

    log.addFilter(is_wanted)
    try:
        yield
    finally:
        log.removeFilter(is_wanted)


@contextmanager
def processor_loaded_by(load: Callable[..., Any]) -> Iterator[None]:
    """Makes sentence-transformers' module load its processor by a function, while this lasts."""
    transformer: Any = import_module("sentence_transformers.base.modules.transformer")

    class Loader:
        from_pretrained = staticmethod(load)

    with _LOADING:
        stock = transformer.AutoProcessor
        transformer.AutoProcessor = Loader
        try:
            yield
        finally:
            transformer.AutoProcessor = stock


_LOADING = threading.RLock()


def note_adapter(model: Any) -> None:
    """Tells ``save_pretrained`` that a model has an adapter, which is then saved without the base."""
    model._hf_peft_config_loaded = True


def check_override(kind: type, method: str) -> None:
    """Raises RuntimeError if a method that a subclass overrides is no longer there, so that nobody would call it."""
    if not hasattr(kind, method):
        raise RuntimeError(
            f"{kind.__module__}.{kind.__name__} has no {method}, which E5-V overrides: want {TRANSFORMERS} and "
            f"{SENTENCE_TRANSFORMERS}, with which it was tested"
        )


def drop_output_hooks(model: torch.nn.Module) -> None:
    """Removes the hooks that transformers puts on a model to record hidden states: they cannot be pickled.

    They come back with the next call that needs them.
    """
    from transformers.utils import output_capturing

    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__module__", None) == output_capturing.__name__:
                del module._forward_hooks[key]
        if hasattr(module, "_output_capturing_hooks_installed"):
            module._output_capturing_hooks_installed = False


def allow_output_hooks(model: Any) -> None:
    """Tells transformers what an unpickled model can record, which it notes only where a model is constructed.

    So one of the same class is constructed, without weights: a quarter of a second for 8 B parameters.
    """
    import torch

    with torch.device("meta"):
        type(model)(copy.deepcopy(model.config))


# ---- sentence-transformers: what stands in the frames of the functions that called ----


def index_for_caller(value: Any, position: int) -> str:
    """Returns the index of a value in the list that the user passed to ``encode``.

    sentence-transformers sorts the inputs by length before it hands batches to a module, so the position in the batch
    would name the wrong item; the caller's list is found in the frames of ``encode``. Where another process has that
    list, the index is that in this process's part of it, and says so.

    Args:
        value: The item.
        position: Its index in the batch, for a batch that ``encode`` has not made.
    """
    readers = tuple(row.name for row in PRIVATE_NAMES if row.name.endswith(("(inputs)", "(chunk_id)", ":_getframe")))
    _warn_once(readers, "the index of an item in an error may be that in its batch")
    if not hasattr(sys, "_getframe"):
        return str(position)
    frame, index, part = sys._getframe(1), position, ""
    while frame := frame.f_back:
        name, inputs = frame.f_code.co_name, frame.f_locals.get("inputs")
        if not isinstance(inputs, (list, tuple)) or part:
            continue
        if name in ("encode", "_inference"):
            index = next((i for i, other in enumerate(inputs) if other is value), index)
        elif name == "_multi_process_worker":  # of encode(pool=...); the caller alone knows the size of all chunks
            chunk = frame.f_locals.get("chunk_id")
            part = f" of chunk {chunk} (both are counted from 0; this chunk has {len(inputs)} items)"
        elif name == "_infer_and_gather":  # of an evaluator under torch.distributed
            part = f" of the {len(inputs)} of this process"
    return f"{index}{part}"


def find_caller(module: Any) -> tuple[SentenceTransformer | None, Any]:
    """Returns the model that has handed a batch to its first module, and ``encode``'s ``output_value``.

    sentence-transformers tells a module neither what stands behind it nor which output is wanted, but both are in the
    frames of its methods. Where they are not found, the model or the value is ``None``: then all hidden states are
    computed, which takes longer and is always right.
    """
    from sentence_transformers import SentenceTransformer

    readers = ("sys:_getframe", "sentence_transformers:SentenceTransformer._inference(output_value)")
    _warn_once(readers, "encode() computes all hidden states, which takes longer")
    model: SentenceTransformer | None = None
    frame = sys._getframe(1) if hasattr(sys, "_getframe") else None
    while frame and (frame := frame.f_back):
        owner = frame.f_locals.get("self")
        if isinstance(owner, SentenceTransformer) and owner[0] is module:
            model = owner
            if "output_value" in frame.f_locals:
                return model, frame.f_locals["output_value"]
    return model, None


def share_weights(module: AnyModule) -> AnyModule:
    """Returns a view of a module: the same weights and parts, but attributes of its own, which may be set.

    Other threads may use the module meanwhile. (``copy.copy`` would share the table of parts, and so change both.)

    Raises:
        ValueError: If accelerate runs the module (``device_map="auto"``), as it would go on with the module itself.
    """
    own = dict(vars(module))
    if "forward" in own:
        raise ValueError("the model is spread by a device_map: set max_image_tokens for all calls, not for one")
    own["_modules"] = dict(own["_modules"])
    own.pop("_compiled_call_impl", None)
    view = object.__new__(type(module))
    vars(view).update(own)
    return view
