"""What an evaluation will take, from the descriptive statistics of its tasks: nothing is downloaded or loaded.

A task asks for groups of contents: its queries' texts, its documents' images, and so on. Groups of several tasks that
are read from one dataset and split, are as many, as long and as large, and have one prompt, are taken for the same
contents: these are embedded once, thanks to the store. So are contents that a task repeats. More may be shared than a
plan can see, such as images that two datasets have in common.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e5v_st.costs import Amount, Shape, TokenCounter, find_counter, measure, shapes_of, tell_number, tell_time
from e5v_st.model_files import revision_of
from e5v_st.provenance import find_folder

from .contents import TASK_PROMPTS
from .models import PUBLISHED, REVISION
from .prompting import NAMED, chosen_for, kind_of
from .sources import REVISIONS
from .store import FILE, default_folder, entry_name, open_store, pass_label

if TYPE_CHECKING:
    from mteb.models.model_meta import ModelMeta

#: Names of statistics: what has the texts or images, which of the two, and which of a pair.
_STATISTICS = re.compile(r"(?P<side>.*?)_?(?P<what>text|image|sentence|summaries)(?P<number>\d?)(?:_statistics)$")
#: What mteb's tasks draw at most, where they do not take all.
DRAWN = {"AbsTaskClustering": 16_384}
#: Sizes of the images of the paper's datasets, whose statistics nobody has published: the usual ones of each, as
#: height and width. Most of COCO is 640x480 and 500x375, most of Flickr30K 500x333; FashionIQ's are upright.
USUAL_SHAPES: dict[str, Sequence[Shape]] = {
    "royokong/coco_test": [(480, 640, 0.5), (375, 500, 0.5)],
    "royokong/flickr30k_test": [(333, 500, 0.5), (500, 333, 0.5)],
    "royokong/fashioniq_val": [(400, 300, 1.0)],
    "royokong/cirr_val": [(480, 640, 0.25), (375, 500, 0.25), (333, 500, 0.25), (500, 333, 0.25)],
}
#: A caption drawn on a card.
CARD: Sequence[Shape] = [(400, 800, 1.0)]
#: Characters of a text of these: captions of Flickr30K and COCO as mteb counts them, changes as a caption of the same
#: length, and FashionIQ's two together.
USUAL_CHARACTERS = {"royokong/flickr30k_test": 64.0, "royokong/coco_test": 52.0, "royokong/cirr_val": 52.0}
USUAL_CHARACTERS["royokong/fashioniq_val"] = 48.0


@dataclass(frozen=True)
class Group:
    """Contents of a task that have the same data and the same prompt.

    Attributes:
        task: The task's name.
        label: Which contents, as a finished pass of the encoder is noted in the store.
        data: What they are read from.
        holds: ``"text"``, ``"image"`` or ``"composed"``.
        number: Of different contents.
        prompt: The template.
        characters: Of a text on average.
        language: Of the texts.
        shapes: Of the images.
    """

    task: str
    label: tuple[str, ...]
    data: tuple[str, ...]
    holds: str
    number: float
    prompt: str
    characters: float | None = None
    language: str = "eng-Latn"
    shapes: Sequence[Shape] = ()

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for groups that hold the same contents, as far as statistics tell."""
        return (*self.data, self.prompt, self.number, self.characters, tuple(self.shapes))

    def amount(self, counter: TokenCounter) -> Amount:
        """Returns what the contents take."""
        return counter.count(
            self.prompt, self.number, characters=self.characters, language=self.language, shapes=self.shapes
        )


@dataclass
class Planned:
    """A task's line of the plan: its own amount, what earlier tasks have already, and what the store has."""

    task: str
    whole: Amount = field(default_factory=Amount)
    shared: Amount = field(default_factory=Amount)
    stored: Amount = field(default_factory=Amount)

    @property
    def left(self) -> Amount:
        """What is to be computed."""
        return self.whole + self.shared.times(-1) + self.stored.times(-1)


def plan(
    tasks: Iterable[Any], counter: TokenCounter, prompts: str | None = None, done: Iterable[Any] = ()
) -> list[Planned]:
    """Returns a line for each task, in their order.

    Args:
        tasks: Of mteb; those that are made of others stand for these.
        counter: Of the model.
        prompts: See ``prompting.read_choices``.
        done: Labels of passes whose contents are in the store.
    """
    finished, seen = set(map(tuple, done)), set()
    lines = []
    for task in parts_of(tasks):
        line = Planned(task.metadata.name)
        for group in groups_of(task, prompts):
            amount = group.amount(counter)
            line.whole += amount
            if group.key in seen:
                line.shared += amount
            elif group.label in finished:
                line.stored += amount
            seen.add(group.key)
        lines.append(line)
    return lines


def parts_of(tasks: Iterable[Any]) -> Iterator[Any]:
    """Yields tasks, and those that an aggregate is made of in its place, each once."""
    seen = set()
    for task in tasks:
        for part in getattr(task, "tasks", None) or [task]:
            name = (part.metadata.name, tuple(part.hf_subsets or ()))
            if name not in seen:
                seen.add(name)
                yield part


# ---- groups from statistics ----


def groups_of(task: Any, prompts: str | None = None) -> Iterator[Group]:
    """Yields the groups of a task's contents, as its statistics tell them.

    Args:
        task: Of mteb.
        prompts: See ``prompting.read_choices``.
    """
    if task.metadata.dataset["path"] in REVISIONS:
        yield from _groups_of_paper(task, prompts)
        return
    statistics = _known_statistics(task)
    for split in task.eval_splits:
        for subset, known in _subsets(task, statistics.get(split) or {}):
            yield from _groups(task, split, subset, known, prompts)
    train = getattr(task, "train_split", None)
    if train in statistics and train is not None:
        for group in _groups(task, train, "default", statistics[train], prompts):
            drawn = _drawn_for_training(task, statistics[train])
            yield Group(**{**vars(group), "number": min(group.number, drawn)})


def _known_statistics(task: Any) -> Mapping[str, Any]:
    """Returns a task's statistics, or those of the task that it was adapted from: the texts are alike."""
    known = task.metadata.descriptive_stats or {}
    has_some = any(_STATISTICS.match(name) and value for split in known.values() for name, value in split.items())
    if has_some or not task.metadata.adapted_from:
        return known
    import mteb

    return mteb.get_task(task.metadata.adapted_from[0]).metadata.descriptive_stats or {}


def _subsets(task: Any, known: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the subsets that a task runs, with their statistics; all of it at once where that is all there is."""
    own = known.get("hf_subset_descriptive_stats") or {}
    wanted = [subset for subset in task.hf_subsets or () if subset in own]
    if wanted:
        yield from ((subset, own[subset]) for subset in wanted)
    else:
        yield "default", known


def _groups(task: Any, split: str, subset: str, known: Mapping[str, Any], prompts: str | None) -> Iterator[Group]:
    meta = task.metadata
    kind = kind_of(meta)
    chosen = chosen_for(prompts, kind)
    sides: dict[tuple[str, str], dict[str, Any]] = {}
    for name, value in known.items():
        found = _STATISTICS.match(name)
        if found and value:
            what = "image" if found["what"] == "image" else "text"
            sides.setdefault((found["side"], found["number"]), {})[what] = value
    for (side, number), own in sides.items():
        role = {"queries": "query", "documents": "document"}.get(side, "")
        together = [("composed", own)] if role and len(own) == 2 else [(what, {what: own[what]}) for what in own]
        for holds, parts in together:
            name = chosen.get(holds, kind.default(holds))
            yield Group(
                task=meta.name,
                label=pass_label(meta.name, split, subset, role, holds),
                data=(
                    meta.dataset["path"],
                    split,
                    _shared_subset(task, subset, holds),
                    *((side + number,) * (not role)),
                ),
                holds=holds,
                number=_number(task, known, role, parts),
                prompt=NAMED[name],
                characters=parts["text"]["average_text_length"] if "text" in parts else None,
                language=_language(task, subset),
                shapes=shapes_of(parts["image"]) if "image" in parts else (),
            )


def _shared_subset(task: Any, subset: str, holds: str) -> str:
    """Returns what tells the subsets' data apart: the images of XM3600 are the same ones in all its languages."""
    (known, *_) = task.metadata.descriptive_stats.values()
    whole, part = (
        (own.get("documents_image_statistics") or {}).get("unique_images")
        for own in (known, known.get("hf_subset_descriptive_stats", {}).get(subset, {}))
    )
    return "" if holds == "image" and whole is not None and whole == part else subset


def _number(task: Any, known: Mapping[str, Any], role: str, parts: Mapping[str, Any]) -> float:
    """Returns how many different contents there are; pairs of both may repeat a text or an image, but not both."""
    rows = {"query": known.get("num_queries"), "document": known.get("num_documents")}.get(role)
    unique = max(part["unique_texts" if what == "text" else "unique_images"] for what, part in parts.items())
    number = max(unique, rows or unique) if len(parts) == 2 else unique
    most = [DRAWN[kind.__name__] for kind in type(task).__mro__ if kind.__name__ in DRAWN]
    most += [task.max_eval_samples] if getattr(task, "max_eval_samples", None) else []
    return float(min([number, *most]))


def _language(task: Any, subset: str) -> str:
    langs = task.metadata.eval_langs
    own = langs.get(subset) if isinstance(langs, Mapping) else langs
    return str(own[-1]) if own else "eng-Latn"


def _drawn_for_training(task: Any, known: Mapping[str, Any]) -> float:
    """Returns how many different rows the experiments of a classification draw: 8 of each label, 10 times."""
    counts = [row["count"] for row in (known.get("label_statistics") or {}).get("labels", {}).values()]
    each, times = task.samples_per_label, task.n_experiments
    if not counts:
        return float(known["num_samples"])
    return float(sum(count * (1 - (1 - min(1.0, each / count)) ** times) for count in counts))


# ---- the paper's tasks, whose statistics are not published ----


def _groups_of_paper(task: Any, prompts: str | None) -> Iterator[Group]:
    meta = task.metadata
    path, name, split = meta.dataset["path"], meta.name, task.eval_splits[0]
    known = meta.descriptive_stats[split]
    shapes = USUAL_SHAPES.get(path, USUAL_SHAPES["royokong/cirr_val"])
    characters = USUAL_CHARACTERS.get(path, 52.0)
    chosen = chosen_for(prompts, kind_of(meta))

    def group(subset: str, role: str, holds: str, number: float, prompt: str, data: str, own: Any = shapes) -> Group:
        return Group(
            name,
            pass_label(name, split, subset, role, holds),
            (data,),
            holds,
            number,
            NAMED[chosen.get(holds, prompt)],
            characters=None if holds == "image" else characters,
            shapes=() if holds == "text" else own,
        )

    for subset in task.hf_subsets:
        own = (known.get("hf_subset_descriptive_stats") or {}).get(subset, known)
        if name in TASK_PROMPTS:
            query, gallery = (prompt.format(subset=subset) for prompt in TASK_PROMPTS[name])
            orders = 2 if "FashionIQ" in name else 1
            yield group(subset, "query", "composed", orders * own["num_queries"], query, f"{path} {subset}")
            images = own.get("num_documents") or GALLERIES.get(subset, own["num_queries"])
            yield group(subset, "document", "image", images, gallery, f"{path} {subset}")
            continue
        finds_images = "t2i" in (meta.category, subset)
        captions, pictures = ("query", "document") if finds_images else ("document", "query")
        counts = {"query": own["num_queries"], "document": own["num_documents"]}
        yield group(subset, pictures, "image", counts[pictures], "image", f"{path} images")
        if meta.category == "i2i":
            yield group(subset, captions, "image", counts[captions], "image", f"{path} cards", CARD)
        else:
            yield group(subset, captions, "text", counts[captions], "text", f"{path} captions")


#: Images of FashionIQ's categories that are searched, where the statistics do not say: as papers on it usually count
#: them; nobody has counted those of the published dataset here.
GALLERIES = {"dress": 3817, "shirt": 6346, "toptee": 5373}


# ---- the command ----


def run_plan(args: Namespace, tasks: Sequence[Any], meta: ModelMeta) -> str:
    """Returns what ``e5v eval --plan`` prints.

    Args:
        args: Of ``e5v eval``.
        tasks: To be run.
        meta: The model's entry.
    """
    settings = {"path": meta.name, **meta.loader_kwargs}
    path, commit, adapter = settings["path"], settings.get("commit"), settings.get("adapter")
    commit = commit or (REVISION if path == PUBLISHED else None)
    known = {"image_layout": settings.get("image_layout"), "max_image_tokens": settings.get("max_image_tokens")}
    counter = find_counter(path, revision=commit, **known)
    done: list[tuple[str, ...]] = []
    folder = None if args.no_store else Path(args.store) if args.store else default_folder()
    if folder and (folder / FILE).is_file() and (store := open_store(folder)):
        there = find_folder(path, commit) is not None
        revision = revision_of(path, commit, adapter, loaded=there) if there else meta.revision
        done = store.passes(entry_name(meta.model_copy(update={"revision": revision})))
        store.close()
    speed = None if args.rate else measure(counter.language, args.device, args.dtype)
    return as_text(plan(tasks, counter, settings.get("prompts"), done), counter, speed, args.rate)


# ---- telling ----


def as_text(lines: Sequence[Planned], counter: TokenCounter, speed: float | None, rate: float | None) -> str:
    """Returns the plan for a terminal.

    Args:
        lines: Of the tasks.
        counter: Of the model.
        speed: Multiplications and additions a second that were measured.
        rate: Tokens a second that a user named, in place of it.
    """
    head = ["task", "texts", "images", "both", "tokens", "shared", "in the store", "left", "time"]
    rows = [_row(line.task, line, counter, speed, rate) for line in lines]
    total = Planned("all")
    for line in lines:
        total.whole, total.shared, total.stored = (
            total.whole + line.whole, total.shared + line.shared, total.stored + line.stored
        )  # fmt: skip
    rows.append(_row(f"{len(lines)} tasks", total, counter, speed, rate))
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    pad = [str.ljust] + [str.rjust] * (len(head) - 1)
    table = [
        "  ".join(f(cell, w) for f, cell, w in zip(pad, row, widths, strict=True)).rstrip() for row in [head, *rows]
    ]
    return "\n".join([*table, "", *_notes(counter, speed, rate)])


def _row(name: str, line: Planned, counter: TokenCounter, speed: float | None, rate: float | None) -> list[str]:
    whole, left = line.whole, line.left
    seconds = left.tokens / rate if rate else counter.seconds(left, speed) if speed else None
    counts = [tell_number(value) if value else "" for value in (whole.texts, whole.images, whole.both)]
    parts = [
        f"{100 * part.tokens / whole.tokens:.0f} %" if whole.tokens and part.tokens else ""
        for part in (line.shared, line.stored)
    ]
    return [
        name,
        *counts,
        tell_number(whole.tokens),
        *parts,
        tell_number(left.tokens),
        "" if seconds is None else tell_time(seconds),
    ]


def _notes(counter: TokenCounter, speed: float | None, rate: float | None) -> Iterator[str]:
    layout = f", image layout {counter.layout}" if counter.layout else ""
    about = f"{counter.about} ({counter.family}{layout})"
    yield f"tokens of whole prompts, each different text and image once, as in {about}"
    yield "shared: tasks before it read the same data with the same prompt; in the store: passes that were completed"
    if rate:
        yield f"time at {rate:,.0f} tokens a second, as --rate says"
    elif speed:
        texts = f"{speed / counter.language.products:,.0f} tokens of text a second"
        yield (
            f"time at {speed / 1e9:,.0f} G operations a second ({texts}), measured on this machine in one layer with "
            "random numbers; a run takes longer by reading data, and more so for a small model"
        )
    else:
        yield "no time: give --rate TOKENS_PER_SECOND"
