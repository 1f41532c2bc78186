"""Opens checkpoints: published ones as they are, saved models, and adapters, those of the published script included."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .devices import check_device
from .files import locate

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import nn
    from transformers import LlavaNextModel

#: Repositories that hold an E5-V but no ``modules.json``. The startup hook makes exactly these load by their id.
PUBLISHED_IDS = frozenset({"royokong/e5-v"})

#: The small model that comes with this package, and the name that :func:`load` knows it by.
TINY = Path(__file__).parent / "tiny"
TINY_NAME = "e5v-tiny"

#: The language model's linear layers: a bare list of names would hit the vision tower too.
LORA_TARGETS = r".*language_model\..*\.(q|k|v|o|gate|up|down)_proj"


def load(
    path_or_id: str | Path,
    *,
    image_layout: str = "upstream",
    adapter: str | Path | None = None,
    quantize: str | None = None,
    strings: str | None = None,
    **kwargs: Any,
) -> SentenceTransformer:
    """Loads an E5-V with this package's own code, whatever code its repository holds.

    Args:
        path_or_id: A directory or hub id: a published checkpoint, a saved model, or an adapter's repository; or
            ``"e5v-tiny"``, the small model that comes with this package (in float32 unless told otherwise).
        image_layout: ``"upstream"`` (current transformers) or ``"paper"`` (transformers 4.41.2, the paper's numbers).
        adapter: A LoRA to put on it: a directory or hub id, in PEFT's current form or as the published training script
            leaves it.
        quantize: ``"int8"``, ``"nf4"`` or ``"fp8"``: holds the language model so; see ``quantize.py``, which also
            measures what that changes.
        strings: ``"auto"`` takes a bare string for an image where it is the path of an image file, an image URL or a
            ``data:image/`` address; ``"text"`` takes every bare string for a text, as a pipeline of texts should. It is
            saved with the model. As it was saved where ``None``, else ``"auto"``.
        **kwargs: Arguments of ``SentenceTransformer``.

    Raises:
        ValueError: If it is no LLaVA-NeXT, weights are missing, not finite, or not in safetensors, the library that
            quantises is not installed, there is no such path, or no such device.
    """
    from sentence_transformers import SentenceTransformer

    from .model.items_e5v import check_strings

    check_strings(strings or "auto")
    check_device(kwargs.get("device"))
    hub = {name: kwargs.pop(name) for name in list(kwargs) if name in _HUB_ARGUMENTS}
    if path_or_id == TINY_NAME or Path(path_or_id) == TINY:
        path_or_id = TINY
        hub["model_kwargs"] = {"dtype": "float32", **(hub.get("model_kwargs") or {})}
    path_or_id, adapter = (name and (locate(name) or name) for name in (path_or_id, adapter))
    if str(kwargs.get("device", "")).startswith("cpu"):  # a GPU may be at hand, but is not wanted
        hub["model_kwargs"] = {"dtype": "auto", **(hub.get("model_kwargs") or {})}
    if quantize is not None:
        from .quantize import quantization

        more = quantization(quantize, kwargs.get("device"), (hub.get("model_kwargs") or {}).get("dtype"))
        hub["model_kwargs"] = {**(hub.get("model_kwargs") or {}), **more}
    device_map = (hub.get("model_kwargs") or {}).get("device_map")
    modules = load_modules(str(path_or_id), image_layout=image_layout, **hub)
    if strings is not None:
        modules[0].strings = strings
    if adapter is not None:
        _refuse_offloaded(modules[0].model)
        _put_adapter(modules[0].model, str(adapter), str(path_or_id), hub)
    prompts = kwargs.pop("prompts", None)
    if device_map is not None:
        kwargs.setdefault("device", str(next(modules[0].parameters()).device))
    from .model.prompts_e5v import PROMPTS

    return SentenceTransformer(modules=modules, prompts={**PROMPTS, **(prompts or {})}, **kwargs)


_HUB_ARGUMENTS = (
    "cache_folder",
    "config_kwargs",
    "local_files_only",
    "model_kwargs",
    "processor_kwargs",
    "revision",
    "token",
    "trust_remote_code",
)


def _put_adapter(model: LlavaNextModel, adapter: str, base: str, hub: dict[str, Any]) -> None:
    from transformers.utils.hub import cached_file, extract_commit_hash

    from .model.adapter_e5v import load_adapter

    names = {"cache_dir": "cache_folder", "local_files_only": "local_files_only", "token": "token"}
    places = {name: hub[own] for name, own in names.items() if hub.get(own) is not None}
    if Path(base).is_dir():
        used = (str(Path(base).resolve()), None)
    else:
        file = cached_file(base, "config.json", revision=hub.get("revision"), **places)
        used = (base, extract_commit_hash(file, None))
    load_adapter(model, adapter, used, **places)


def load_modules(path_or_id: str, image_layout: str = "upstream", **kwargs: Any) -> list[nn.Module]:
    """Returns the modules of an E5-V: transformer, last-token pooling, normalisation."""
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    from .model.modeling_e5v import E5VTransformer

    transformer = E5VTransformer.load(path_or_id, init_defaults={"image_layout": image_layout}, **kwargs)
    transformer.image_layout = image_layout
    return [transformer, Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken"), Normalize()]


def compile_layers(model: SentenceTransformer, **options: Any) -> None:
    """Puts every layer of the language model through ``torch.compile``.

    Part by part, since ``sharing_e5v`` runs the parts of a layer one by one, and since equal parts compile once.

    Args:
        model: An E5-V.
        **options: Of ``torch.compile``, such as ``backend``.
    """
    for layer in model[0].model.language_model.layers:
        for part in layer.children():
            part.compile(dynamic=True, **options)


def _refuse_offloaded(model: nn.Module) -> None:
    offloaded = [name for name, weight in model.named_parameters() if weight.device.type == "meta"]
    if offloaded:
        raise ValueError(
            f"no adapter can be put on a model whose device_map offloads weights ({len(offloaded)}, such as "
            f"{offloaded[0]}): merge it first (e5v merge), and load the merged model"
        )


def make_published_ids_loadable(module: Any) -> None:
    """Makes ``SentenceTransformer(id, trust_remote_code=True)`` load the published ids as E5-V.

    sentence-transformers asks ``_load_default_modules`` only where a repository has no ``modules.json``; without this
    it would put mean pooling and no prompt on the checkpoint. Called by the startup hook.

    Args:
        module: ``sentence_transformers.sentence_transformer.model``, just imported.
    """
    stock = module.SentenceTransformer._load_default_modules

    def load_default_modules(self: Any, model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        if model_name_or_path not in PUBLISHED_IDS or not kwargs.get("trust_remote_code"):
            return stock(self, model_name_or_path, *args, **kwargs)
        from .model.prompts_e5v import PROMPTS

        modules = load_modules(model_name_or_path, *args, **kwargs)
        self.prompts = {**PROMPTS, **{name: prompt for name, prompt in self.prompts.items() if prompt}}
        self.model_card_data.set_base_model(model_name_or_path, revision=kwargs.get("revision"))
        return modules, {}

    module.SentenceTransformer._load_default_modules = load_default_modules
