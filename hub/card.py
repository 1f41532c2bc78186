"""The model card: one template for adapters, merged models and exported ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from e5v_st.files import hash_file, is_hub_id

from .files import ADAPTER_CONFIG, RUN_FILES, read_json
from .results import read_results

TEMPLATE = Path(__file__).parent / "card.md.jinja"

#: What a training run leaves: its arguments, scores by name ``before`` and ``after``, and a plot.
RECIPE, EVALUATION, PLOT = RUN_FILES

#: A merged model's metadata keeps here which adapter is in it.
ADAPTER_KEY = "merged_adapter"

TAGS = (
    "sentence-transformers",
    "sentence-similarity",
    "feature-extraction",
    "multimodal",
    "image-text-retrieval",
    "composed-image-retrieval",
    "e5-v",
)


@dataclass
class Card:
    """What a card says that does not stand in the model's folder.

    Attributes:
        base: Hub id (or path) of the model that this one was made from.
        base_revision: Its commit or branch.
        adapter: Hub id or path of the adapter that was merged into it.
        repo_id: Where the model goes; the folder's name where it goes nowhere.
        license: A licence identifier of the hub.
        ask_base: Whether to take the licence from the base's card where nothing else says it; may ask the hub.
        language: Language codes.
        results: A folder with mteb's result files.
        results_model: ``NAME`` or ``NAME@REVISION`` of those to take, where the folder has several.
    """

    base: str | None = None
    base_revision: str | None = None
    adapter: str | None = None
    repo_id: str | None = None
    license: str | None = None
    ask_base: bool = False
    language: list[str] = field(default_factory=lambda: ["en"])
    results: Path | None = None
    results_model: str | None = None


def write_card(folder: Path, card: Card, run: Path | None = None) -> None:
    """Writes ``README.md``.

    Args:
        folder: The model, with its sentence-transformers files.
        card: What the folder does not say.
        run: The folder of the training run, where there is one: its ``README.md`` may name licence, base and data.
    """
    from huggingface_hub import ModelCard, ModelCardData

    run = run or folder
    known = _known_data(run)
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    base, adapter = _base(card, known), card.adapter or known.get(ADAPTER_KEY)
    is_hub_id = base is not None and looks_like_id(base)
    name = card.repo_id or folder.name
    measured = read_results(card.results, run, card.repo_id, card.results_model) if card.results else None
    scores = measured.scores if measured else []
    license_ = {"license": card.license} if card.license else _license_in(known)
    if not license_ and card.ask_base and base:
        license_ = license_of(base, card.base_revision if base == card.base else None)
    data = ModelCardData(
        language=card.language,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        datasets=known.get("datasets"),
        base_model=base if is_hub_id else None,
        base_model_relation=_relation(is_adapter, adapter) if is_hub_id else None,
        tags=[*TAGS, *(["peft", "lora"] if is_adapter else []), *(["mteb"] if scores else [])],
        model_name=name.split("/")[-1],
        eval_results=_eval_results(scores) or None,
        **(license_ or {"license": "unknown"}),
        **({ADAPTER_KEY: public_name(adapter)} if adapter else {}),
    )
    if not scores:
        data.pop("model_name")
    settings = read_json(folder / "sentence_bert_config.json")
    content = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        base=base and public_name(base),
        adapter=adapter and public_name(adapter),
        is_adapter=is_adapter,
        native="image_layout" not in settings,
        image_layout=settings.get("image_layout", "upstream"),
        dimension=read_json(folder / "1_Pooling" / "config.json")["embedding_dimension"],
        recipe=_read_recipe(run / RECIPE),
        evaluation=_read_evaluation(run / EVALUATION),
        plot=PLOT if (run / PLOT).is_file() and is_adapter else None,
        scores=scores,
        measured=measured and public_name(measured.name),
        measured_revision=measured and measured.revision,
        sources={file.name: hash_file(file) for file in sorted(folder.glob("*_e5v.py"))},
    )
    (folder / "README.md").write_text(str(content), encoding="utf8")


def _eval_results(scores: list[dict[str, Any]]) -> Any:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="sentence-similarity",
            dataset_type=score["task"],
            dataset_name=f"MTEB {score['task']} ({score['subset']})",
            dataset_config=score["subset"],
            dataset_split=score["split"],
            dataset_revision=score["revision"],
            metric_type="main_score",
            metric_value=score["score"],
        )
        for score in scores
    ]


def _base(card: Card, known: dict[str, Any]) -> str | None:
    """Returns the base's name: of a path, and of a copy of a merged model, the model's own card may know more."""
    said = known.get("base_model")
    said = said[0] if isinstance(said, list) and said else said
    if not isinstance(said, str) or not looks_like_id(said):
        return card.base
    copied = card.adapter is None and ADAPTER_KEY in known
    return card.base if card.base and looks_like_id(card.base) and not copied else said


def _relation(is_adapter: bool, adapter: str | None) -> str | None:
    if is_adapter:
        return "adapter"
    return "finetune" if adapter else None


def looks_like_id(name: str) -> bool:
    """Tells a hub id from a path."""
    return is_hub_id(name) and not Path(name).exists()


def public_name(name: str) -> str:
    """Returns a hub id as it is, and of a path the last part: nobody else needs to know where folders lie."""
    return name if looks_like_id(name) else Path(name).name


def _read_recipe(file: Path) -> dict[str, Any]:
    """Returns a run's arguments, of paths only the last part."""
    import yaml

    with _naming(file):
        recipe = dict(yaml.safe_load(file.read_text(encoding="utf8")) or {}) if file.is_file() else {}
    return {
        name: Path(value).name if isinstance(value, str) and value.startswith(("/", "~", "..")) else value
        for name, value in recipe.items()
        if value not in (None, "", [])
    }


def _license_in(data: dict[str, Any]) -> dict[str, Any]:
    """Returns what a card's metadata says of the licence: its identifier, and the name and address of a special one."""
    if data.get("license") in (None, "", [], "unknown"):
        return {}
    link = data.get("license_link")
    known = {**data, "license_link": link if str(link).startswith("http") else None}  # others lead nowhere from here
    return {name: known[name] for name in ("license", "license_name", "license_link") if known.get(name)}


def license_of(model: str | Path, revision: str | None = None) -> dict[str, Any]:
    """Returns what the card of a model (a directory, or a hub id) says of its licence.

    Nothing depends on it, so whatever goes wrong is no error: then nothing is known.
    """
    from huggingface_hub import hf_hub_download

    try:
        folder = (
            Path(model) if Path(model).is_dir() else Path(hf_hub_download(model, "README.md", revision=revision)).parent
        )
        return _license_in(_known_data(folder))
    except Exception:
        return {}


def _known_data(folder: Path) -> dict[str, Any]:
    """Returns the metadata of the card that a folder has already."""
    from huggingface_hub import ModelCard

    if not (folder / "README.md").is_file():
        return {}
    with _naming(folder / "README.md"):
        return ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.to_dict()


def _read_evaluation(file: Path) -> dict[str, dict[str, Any]]:
    """Returns a run's scores by name, before and after."""
    with _naming(file):
        content = dict(read_json(file)) if file.is_file() else {}
        return {when: dict(content[when]) for when in ("before", "after") if content.get(when)}


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Turns what is wrong with a file for the card into a ValueError that names it."""
    import yaml

    try:
        yield
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"{file}, which the card is made from, cannot be read: mend or remove it ({error})") from None
