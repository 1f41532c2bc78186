"""Small datasets in the schemas that mteb's own tasks read, with the score of each by plain NumPy.

A case is a task of mteb, the files that its published dataset would have, and a function that says what the score must
be, given a way to embed texts, images and pairs. The schemas (configurations, splits, columns, features) are those that
the installed task classes load and transform. Images have modes and sizes that published datasets have: colour, grey,
palette, transparent, one bit, CMYK, one pixel.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mteb
import numpy as np
from PIL import Image

Embed = Callable[[Sequence[Any]], np.ndarray]
Tables = Mapping[str, Mapping[str, Mapping[str, list[Any]]]]
MODES = ("RGB", "L", "RGBA", "P", "1", "LA", "CMYK")
SIZES = ((60, 60), (90, 40), (33, 71), (1, 1), (8, 3), (120, 120), (2, 64))
WORDS = "red green blue dog cat bird tree house car moon star fish hat book cake rain snow fire leaf king".split()  # noqa: SIM905


@dataclass(frozen=True)
class Case:
    """A task with its data.

    Attributes:
        name: mteb's name of the task.
        tables: Columns by configuration and split.
        expect: Returns the main score by subset, from a function that embeds items.
        ci: Whether it is in the run of every change: one task for each type and loader; the others run nightly.
        result: Name of the result's file, where the task is part of an aggregate.
    """

    name: str
    tables: Tables
    expect: Callable[[Embed], dict[str, float]]
    ci: bool = True

    @property
    def repo(self) -> tuple[str, str]:
        """Id and revision of the dataset."""
        dataset = mteb.get_task(self.name).metadata.dataset
        return dataset["path"], dataset["revision"]


def write(folder: Path, tables: Tables) -> Path:
    """Writes a dataset as the hub has it: a Parquet file for each configuration and split, and a card of them."""
    lines = ["---", "configs:"]
    for config, splits in tables.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, columns in splits.items():
            place = folder / config
            place.mkdir(parents=True, exist_ok=True)
            make(columns).to_parquet(place / f"{split}-00000-of-00001.parquet")
            lines += [f"  - split: '{split}'", f"    path: {config}/{split}-*"]  # Norwegian is no truth value
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


def make(columns: Mapping[str, list[Any]]) -> Any:
    """Returns a dataset; columns of images, also of missing ones, and of named labels are of these kinds."""
    from datasets import ClassLabel, Dataset
    from datasets import Image as ImageFeature

    data = Dataset.from_dict({name: list(values) for name, values in columns.items()})
    for name, values in columns.items():
        if isinstance(values, Structs):
            continue
        if is_image(values[0]) or (name == "image" and values[0] is None):
            data = data.cast_column(name, ImageFeature())
        if getattr(values, "names", ()):
            data = data.cast_column(name, ClassLabel(names=list(values.names)))
    return data


def is_image(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"bytes", "path"}


# ---- what datasets hold ----


class Structs(list):  # type: ignore[type-arg]
    """A column of images that the published dataset has as plain structures of bytes and path."""


class Labels(list):  # type: ignore[type-arg]
    """A column of labels whose names are part of the schema."""

    names: Sequence[str] = ()


def pictures(count: int, seed: int) -> list[dict[str, Any]]:
    """Files of images of every mode and size, as ``datasets`` stores them."""
    dice = np.random.default_rng(seed)
    found = []
    for index in range(count):
        width, height = SIZES[index % len(SIZES)]
        colours = dice.integers(0, 255, (max(1, height // 8), max(1, width // 8), 3), dtype=np.uint8)
        image = Image.fromarray(colours).resize((width, height)).convert("RGB")
        mode = MODES[index % len(MODES)]
        image = image.quantize(16) if mode == "P" else image.convert(mode)
        if mode in ("RGBA", "LA"):
            image.putalpha(128)
        buffer = io.BytesIO()
        image.save(buffer, "TIFF" if mode == "CMYK" else "PNG")
        found.append({"bytes": buffer.getvalue(), "path": None})
    return found


def texts(count: int, seed: int) -> list[str]:
    """Different texts of a few words."""
    dice = np.random.default_rng(seed)
    return [f"{' '.join(dice.choice(WORDS, 4))} {seed}{index}" for index in range(count)]


def items(side: Mapping[str, list[Any]], holds: str) -> list[Any]:
    """Returns the items of a side of a retrieval task, ``"t"``, ``"i"`` or ``"it"``; images as bytes of files."""
    if holds == "t":  # a document's title stands in front of its text
        titles = side.get("title", [""] * len(side["text"]))
        return [{"text": f"{title} {text}".strip()} for title, text in zip(titles, side["text"], strict=True)]
    if holds == "i":
        return [{"image": image["bytes"]} for image in side["image"]]
    pairs = zip(side["image"], side["text"], strict=True)
    return [{"image": image["bytes"], "text": text} for image, text in pairs]


# ---- scores by plain NumPy ----


def ranked(
    queries: np.ndarray, documents: np.ndarray, allowed: Sequence[Sequence[int]] | None = None
) -> list[list[int]]:
    """Returns the documents of each query, best first."""
    similarity = queries @ documents.T
    order = [list(np.argsort(-row, kind="stable")) for row in similarity]
    if allowed is None:
        return order
    return [[document for document in row if document in own] for row, own in zip(order, allowed, strict=True)]


def ndcg(order: Sequence[int], relevant: Sequence[int], k: int) -> float:
    gains = [1 / np.log2(place + 2) for place, document in enumerate(order[:k]) if document in relevant]
    return sum(gains) / sum(1 / np.log2(place + 2) for place in range(min(k, len(relevant))))


def precision_map(order: Sequence[int], relevant: Sequence[int], k: int) -> float:
    found = [place for place, document in enumerate(order[:k]) if document in relevant]
    return sum((hits + 1) / (place + 1) for hits, place in enumerate(found)) / len(relevant)


def hit(order: Sequence[int], relevant: Sequence[int], k: int) -> float:
    return float(bool(set(order[:k]) & set(relevant)))


def of_score(name: str) -> Callable[[Sequence[int], Sequence[int]], float]:
    """Returns the function of a main score of a query."""
    if name == "accuracy":
        return lambda order, relevant: hit(order, relevant, 1)
    kind, k = name.rsplit("_at_", 1)
    function = {"ndcg": ndcg, "hit_rate": hit, "map": precision_map}[kind]
    return lambda order, relevant: function(order, relevant, int(k))


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """For values without ties in ``one``; ties in ``other`` get their mean rank."""
    ranks = []
    for values in (one, other):
        order = np.argsort(np.argsort(values, kind="stable"), kind="stable").astype(float)
        ranks.append(np.array([order[values == value].mean() for value in values]))
    return float(np.corrcoef(*ranks)[0, 1])


# ---- retrieval ----


def retrieval(
    name: str,
    queries: Mapping[str, list[Any]],
    documents: Mapping[str, list[Any]],
    tables: Callable[..., Tables] | None = None,
    *,
    ci: bool = False,
    choices: int = 0,
    subsets: Sequence[str] = ("default",),
) -> Case:
    """A retrieval task: each query has one or two right documents; ``choices`` gives it so many to choose from."""
    meta = mteb.get_task(name).metadata
    asked, found = len(next(iter(queries.values()))), len(next(iter(documents.values())))
    dice = np.random.default_rng(len(name))
    relevant = [
        sorted(map(int, dice.choice(found, 1 if choices else 1 + row % 2, replace=False))) for row in range(asked)
    ]
    allowed = None
    if choices:
        others = [[int(i) for i in dice.permutation(found) if int(i) not in own][: choices - 1] for own in relevant]
        allowed = [[*own, *more] for own, more in zip(relevant, others, strict=True)]
    how = {"relevant": relevant, "allowed": allowed}
    made = (tables or beir)(queries=queries, documents=documents, subsets=subsets, **how)
    first, second = meta.category.split("2")

    def expect(embed: Embed) -> dict[str, float]:
        order = ranked(embed(items(queries, first)), embed(items(documents, second)), allowed)
        if getattr(type(mteb.get_task(name)), "skip_first_result", False):
            order = [row[1:] for row in order]
        score = of_score(meta.main_score)
        value = float(np.mean([score(row, own) for row, own in zip(order, relevant, strict=True)]))
        return dict.fromkeys(subsets, value)

    return Case(name, made, expect, ci)


def beir(
    queries: Mapping[str, list[Any]],
    documents: Mapping[str, list[Any]],
    relevant: Sequence[Sequence[int]],
    allowed: Sequence[Sequence[int]] | None,
    subsets: Sequence[str],
    names: tuple[str, str, str] = ("queries", "corpus", "qrels"),
) -> dict[str, Any]:
    """The schema of mteb's own loader: a configuration for each side, and one of right answers."""
    columns = {"query-id": [], "corpus-id": [], "score": []}
    for query, own in enumerate(relevant):
        for document in (allowed or relevant)[query]:
            columns["query-id"].append(f"q{query}")
            columns["corpus-id"].append(f"d{document}")
            columns["score"].append(int(document in own))
    sides = {
        names[0]: {"id": [f"q{row}" for row in range(len(relevant))], **queries},
        names[1]: {"id": [f"d{row}" for row in range(len(next(iter(documents.values()))))], **documents},
        names[2]: columns,
    }
    prefixes = ["" if subset == "default" else f"{subset}-" for subset in subsets]
    return {f"{prefix}{name}": {"test": side} for prefix in prefixes for name, side in sides.items()}


def mbeir(name: str, **how: Any) -> Case:
    """A task of M-BEIR: every side has both columns, and one of them may hold nothing."""
    first, second = mteb.get_task(name).metadata.category.split("2")

    def side(holds: str, count: int, seed: int) -> dict[str, list[Any]]:
        images = pictures(count, seed) if "i" in holds else [None] * count
        words = texts(count, seed) if "t" in holds else [""] * count
        if holds == "it":
            words[1] = ""  # a document may have an image and no words
        return {"modality": [holds] * count, "image": images, "text": words}

    def only(side: dict[str, list[Any]], holds: str) -> dict[str, list[Any]]:
        return {key: value for key, value in side.items() if key == "modality" or key[0] in holds}

    queries, documents = side(first, 6, 1 + len(name)), side(second, 9, 2 + len(name))
    if name in ("WebQAT2TRetrieval", "OVENIT2TRetrieval"):
        documents = only(documents, second)
    return retrieval(name, queries, documents, **how)


def vidore(**made: Any) -> Tables:
    """ViDoRe's first two versions: numbers for names, and the language of each query beside it."""
    tables: Any = beir(**{**made, "subsets": ["default"]})
    queries, corpus, qrels = (tables[name]["test"] for name in ("queries", "corpus", "qrels"))
    columns = {"query-id": [int(name[1:]) for name in queries["id"]], "query": queries["text"]}
    if "language" in queries:
        columns["language"] = queries["language"]
    answers = {key: [int(name[1:]) for name in qrels[key]] for key in ("query-id", "corpus-id")} | {
        "score": qrels["score"]
    }
    pages = {"corpus-id": [int(name[1:]) for name in corpus["id"]], "image": corpus["image"]}
    return {"queries": {"test": columns}, "corpus": {"test": pages}, "qrels": {"test": answers}}


def captioned(name: str, captions: str, extra: Mapping[str, Any], split: str = "test", ci: bool = False) -> Case:
    """Hateful memes, Memotion, SciMMIR: a row is an image with its own text, and both sides are made of the rows."""
    meta = mteb.get_task(name).metadata
    images, words = pictures(7, len(name)), texts(7, len(name))
    splits = (
        ("train", "validation", "test") if "Hateful" in name else ("train", "test") if "Memotion" in name else ("test",)
    )
    rows = {own: {"image": pictures(2, 50 + n), captions: texts(2, 50 + n)} for n, own in enumerate(splits)}
    rows["test"] = {"image": images, captions: words}
    tables: Any = {}
    for own, columns in rows.items():
        count = len(columns["image"])
        more = {key: [value] * count for key, value in extra.items()}
        ids = {"id": [f"{own}{row}" for row in range(count)]} if "Hateful" in name else {}
        tables[own] = {**ids, **columns, **more}

    def expect(embed: Embed) -> dict[str, float]:
        order = {"Hateful": ("test", "validation", "train"), "Memotion": splits, "SciMMIR": ("test",)}
        sources = next(value for key, value in order.items() if name.startswith(key))
        every = {key: [value for own in sources for value in rows[own][key]] for key in ("image", captions)}
        start = sum(len(rows[own]["image"]) for own in sources[: sources.index("test")])
        first, second = meta.category.split("2")
        kinds = {"t": lambda own: [{"text": text} for text in own[captions]], "i": lambda own: items(own, "i")}
        found = ranked(embed(kinds[first](rows["test"])), embed(kinds[second](every)))
        score = of_score(meta.main_score)
        return {"default": float(np.mean([score(row, [start + n]) for n, row in enumerate(found)]))}

    return Case(name, {"default": tables}, expect, ci)


def by_language(name: str, extra: Mapping[str, Any] | None = None, ci: bool = False) -> Case:
    """WIT and XM3600: a split for each language, an image with several captions."""
    task = mteb.get_task(name)
    images = Structs(pictures(4, len(name))) if extra else pictures(4, len(name))
    tables = {}
    for place, language in enumerate(task.hf_subsets):
        words = texts(8, 100 + place)
        captions = [words[:2], words[2:5], words[5:7], words[7:]]
        more = {key: [value] * 4 for key, value in (extra or {}).items()}
        tables[language] = {"image_id": [f"{n}" for n in range(4)], "image": images, "captions": captions, **more}
    return Case(name, {"default": tables}, partial(_by_language, tables), ci)


def flickr_co(name: str, ci: bool = False) -> Case:
    """XFlickr&CO: a split for each language, an image with one caption."""
    images = Structs(pictures(6, len(name)))
    tables = {
        language: {"id": [f"{n}" for n in range(6)], "image": images, "sentences": texts(6, 100 + place)}
        for place, language in enumerate(mteb.get_task(name).hf_subsets)
    }
    return Case(name, {"default": tables}, partial(_by_language, tables), ci)


def _by_language(tables: Mapping[str, Mapping[str, list[Any]]], embed: Embed) -> dict[str, float]:
    found = {}
    for language, columns in tables.items():
        captions = columns["captions"] if "captions" in columns else [[text] for text in columns["sentences"]]
        pairs = [(text, image) for image, own in enumerate(captions) for text in own]
        order = ranked(embed([{"text": text} for text, _ in pairs]), embed(items(columns, "i")))
        scores = [ndcg(row, [image], 10) for row, (_, image) in zip(order, pairs, strict=True)]
        found[language] = float(np.mean(scores))
    return found


def cv_bench(name: str, ci: bool) -> Case:
    """Questions about an image, each with its own choices; the answer is a letter."""
    subtask = name.removeprefix("CVBench")
    images, questions = pictures(6, 9), texts(6, 9)
    choices = [[str(n), str(n + 1), str(n + 2)] for n in range(6)]
    answers = [n % 3 for n in range(6)]
    names = (
        "idx",
        "type",
        "filename",
        "source",
        "source_dataset",
        "source_filename",
        "target_class",
        "target_size",
        "bbox",
        "prompt",
    )
    columns = {
        "task": [subtask] * 6, "image": images, "question": questions, "choices": choices,
        "answer": [f"({'ABC'[answer]})" for answer in answers], **{own: ["x"] * 6 for own in names},
    }  # fmt: skip
    columns["task"][5] = "Other"

    def expect(embed: Embed) -> dict[str, float]:
        distinct = list(dict.fromkeys(choice for own in choices[:5] for choice in own))
        documents = embed([{"text": choice} for choice in distinct])
        queries = embed(items({"image": images[:5], "text": questions[:5]}, "it"))
        allowed = [[distinct.index(choice) for choice in own] for own in choices[:5]]
        order = ranked(queries, documents, allowed)
        return {
            "default": float(
                np.mean([row[0] == own[answer] for row, own, answer in zip(order, allowed, answers, strict=False)])
            )
        }

    return Case(name, {"default": {"test": columns}}, expect, ci)


# ---- pairs, classes, groups ----


def pairs_of_captions(name: str, split: str = "test", ci: bool = False) -> Case:
    """Compositionality: images and captions of a row, of which the first belong together."""
    task: Any = mteb.get_task(name)
    dice = len(name)
    images = {column: pictures(6, dice + n) for n, column in enumerate(task.images_column_names)}
    words = {column: texts(6, dice + n) for n, column in enumerate(task.texts_column_names)}

    def expect(embed: Embed) -> dict[str, float]:
        shown = np.stack([embed(items({"image": own}, "i")) for own in images.values()], 1)
        said = np.stack([embed([{"text": text} for text in own]) for own in words.values()], 1)
        right = {"text": [], "image": []}
        for one, other in zip(shown, said, strict=True):
            similarity = one @ other.T
            right["text"].append(bool((similarity.argmax(1) == np.arange(len(one))).all()))
            right["image"].append(bool((similarity.argmax(0) == np.arange(len(other))).all()))
        both = np.logical_and(right["text"], right["image"])
        scores = {"text_acc": right["text"], "image_acc": right["image"], "accuracy": both}
        return {"default": float(np.mean(scores[task.metadata.main_score]))}

    return Case(name, {"default": {split: {**images, **words}}}, expect, ci)


def image_code(ci: bool) -> Case:
    """ImageCoDe: a caption, and ten images of which one is right."""
    images, captions = pictures(12, 77), texts(4, 77)
    dice = np.random.default_rng(5)
    pools = [list(map(int, dice.permutation(12)[:10])) for _ in captions]
    rows = [(f"q{q}", f"d{d}", int(place == 3)) for q, pool in enumerate(pools) for place, d in enumerate(pool)]
    tables = {
        "corpus": {"corpus": {"id": [f"d{n}" for n in range(12)], "image": images}},
        "query": {"test": {"id": [f"q{n}" for n in range(4)], "text": captions}},
        "qrels": {
            "test": dict(zip(("query-id", "corpus-id", "score"), map(list, zip(*rows, strict=True)), strict=True))
        },
    }

    def expect(embed: Embed) -> dict[str, float]:
        shown, said = embed(items({"image": images}, "i")), embed([{"text": text} for text in captions])
        right = [int(np.argmax(shown[pool] @ text)) == 3 for pool, text in zip(pools, said, strict=True)]
        return {"default": float(np.mean(right))}

    return Case("ImageCoDe", tables, expect, ci)


def drawn_sentences(name: str, holds: str = "i", ci: bool = False) -> Case:
    """STS and visual STS: two columns and a score, for each pair of languages in a configuration of its own."""
    task: Any = mteb.get_task(name)
    tables, sides = {}, {}
    for place, subset in enumerate(task.hf_subsets):
        make = pictures if holds == "i" else texts
        sides[subset] = make(7, 200 + place), make(7, 300 + place), [float(n % 5) for n in range(7)]
        columns = dict(zip(("sentence1", "sentence2", "score"), sides[subset], strict=True))
        tables[subset] = {"test": columns}
    if task.fast_loading:  # one table of all pairs of languages
        whole: dict[str, list[Any]] = {"sentence1": [], "sentence2": [], "score": [], "lang": []}
        for subset, own in tables.items():
            for key, values in own["test"].items():
                whole[key] += values
            whole["lang"] += [subset] * 7
        tables = {"default": {"test": whole}}

    def expect(embed: Embed) -> dict[str, float]:
        found = {}
        for subset, (one, other, score) in sides.items():
            if holds == "i":
                first, second = (embed(items({"image": own}, "i")) for own in (one, other))
            else:
                first, second = (embed([{"sts": text} for text in own]) for own in (one, other))
            found[subset] = spearman((first * second).sum(1), np.array(score))
        return found

    return Case(name, tables, expect, ci)


def classes(name: str, column: str, label: str, ci: bool = False, words: bool = False) -> Case:
    """Classification: every experiment draws all of the few training rows, so that all have one result."""
    make = texts if words else pictures
    train, test = make(14, 31), make(10, 32)
    names = ["robin", "crow", "owl"]
    kinds = [names[n % 3] if label == "common" else n % 3 for n in range(14)]
    tables = {"train": {column: train, label: kinds}, "test": {column: test, label: kinds[:10]}}

    def expect(embed: Embed) -> dict[str, float]:
        from sklearn.linear_model import LogisticRegression

        wrap = (lambda own: [{"text": text} for text in own]) if words else (lambda own: items({"image": own}, "i"))
        fitted = LogisticRegression(max_iter=100, random_state=42).fit(embed(wrap(train)), kinds)
        return {"default": float(np.mean(fitted.predict(embed(wrap(test))) == np.array(kinds[:10])))}

    return Case(name, {"default": tables}, expect, ci)


def several_classes(ci: bool) -> Case:
    """VOC2007: several labels for an image, by the five nearest neighbours."""
    train, test = pictures(14, 41), pictures(9, 42)
    labels = [sorted({n % 3, (n * 2) % 5}) for n in range(14)]
    tables = {"train": {"image": train, "classes": labels}, "test": {"image": test, "classes": labels[:9]}}

    def expect(embed: Embed) -> dict[str, float]:
        every = sorted({label for own in labels[:9] for label in own})
        known = np.array([[label in own for label in every] for own in labels])
        near = np.argsort(
            ((embed(items({"image": test}, "i"))[:, None] - embed(items({"image": train}, "i"))[None]) ** 2).sum(2), 1
        )
        votes = known[near[:, :5]].mean(1) > 0.5
        scores = []
        for own, vote in zip(known[:9], votes, strict=True):
            right = np.flatnonzero(own)
            above = [np.sum(vote >= vote[label]) for label in right]
            both = [np.sum(vote[right] >= vote[label]) for label in right]
            scores.append(np.mean(np.array(both) / np.array(above)))
        return {"default": float(np.mean(scores))}

    return Case("VOC2007", {"default": tables}, expect, ci)


def labelled_images(
    name: str, column: str, label: str, split: str, names: Sequence[str] = (), ci: bool = False
) -> Case:
    """Zero-shot classification: the name of a class in mteb's template that is nearest to the image."""
    images = pictures(8, 61)
    kinds = Labels(n % (len(names) or 2) for n in range(8))
    kinds.names = names
    tables = {split: {column: images, label: kinds}}

    def expect(embed: Embed) -> dict[str, float]:
        task: Any = mteb.get_task(name)
        task.dataset = {split: make(tables[split])}
        said = embed([{"text": text} for text in task.get_candidate_labels()])
        similarity = embed(items({"image": images}, "i")) @ said.T
        return {"default": float(np.mean(similarity.argmax(1) == kinds))}

    return Case(name, {"default": tables}, expect, ci)


def groups(name: str, column: str, label: str, split: str, ci: bool = False) -> Case:
    """Clustering: k-means of the library that mteb uses, on our own embeddings; mutual information by NumPy."""
    images = pictures(12, 71)
    kinds = [n % 3 for n in range(12)]

    def expect(embed: Embed) -> dict[str, float]:
        from sklearn.cluster import MiniBatchKMeans

        model = MiniBatchKMeans(3, batch_size=500, n_init="auto", random_state=42)
        found = model.fit(embed(items({"image": images}, "i"))).labels_
        joint = np.array(
            [[np.mean((found == one) & (np.array(kinds) == other)) for other in range(3)] for one in range(3)]
        )
        rows, columns = joint.sum(1), joint.sum(0)
        there = joint > 0
        shared = (joint * np.log(joint / np.outer(rows, columns), where=there, out=np.zeros_like(joint)))[there].sum()
        entropy = [-(part[part > 0] * np.log(part[part > 0])).sum() for part in (rows, columns)]
        return {"default": float(shared / np.mean(entropy))}

    return Case(name, {"default": {split: {column: images, label: kinds}}}, expect, ci)


@functools.cache
def cases() -> dict[str, Case]:
    """Returns every case by the task's name."""
    meme = {"split": "test", "label": 0}
    mood = dict.fromkeys(("split", "text_ocr", "humor", "sarcasm", "offensive", "motivational", "sentiment"), "x")
    figure = dict.fromkeys(("file_name_index", "class", "super_class", "sub_class", "split"), "x")
    local = {"image_locale": "x", "captions_tokenized": ["x"], "captions_tokenized_lowercase": ["x"]}
    languages = ("french", "spanish", "english", "german")
    spoken = {"text": texts(6, 8), "language": ["french", "spanish", "english", "german", "english", "english"]}
    asked = {"image": pictures(5, 7), "text": texts(5, 7)}
    found = [
        mbeir("MSCOCOT2IRetrieval", ci=True),
        mbeir("Fashion200kI2TRetrieval"),
        mbeir("VisualNewsI2TRetrieval"),
        mbeir("NIGHTSI2IRetrieval"),
        mbeir("CIRRIT2IRetrieval"),
        mbeir("OVENIT2TRetrieval", ci=True),
        mbeir("InfoSeekIT2ITRetrieval"),
        mbeir("EDIST2ITRetrieval"),
        mbeir("WebQAT2ITRetrieval", ci=True),
        mbeir("WebQAT2TRetrieval"),
        retrieval("CUB200I2IRetrieval", {"image": pictures(6, 3)}, {"image": pictures(9, 4)}),
        retrieval("ROxfordEasyI2IRetrieval", {"image": pictures(6, 5)}, {"image": pictures(9, 6)}),
        retrieval("ImageCoDeT2IRetrieval", {"text": texts(6, 5)}, {"image": pictures(9, 6)}),
        retrieval("BLINKIT2IRetrieval", asked, {"image": pictures(7, 8)}),
        retrieval("BLINKIT2IMultiChoice", asked, {"image": pictures(7, 8)}, choices=3, ci=True),
        retrieval("BLINKIT2TMultiChoice", asked, {"text": texts(7, 8)}, choices=3),
        cv_bench("CVBenchCount", ci=False),
        by_language("WITT2IRetrieval"),
        by_language("XM3600T2IRetrieval", local),
        flickr_co("XFlickr30kCoT2IRetrieval", ci=True),
        captioned("HatefulMemesT2IRetrieval", "text", meme, ci=True),
        captioned("HatefulMemesI2TRetrieval", "text", meme),
        captioned("MemotionT2IRetrieval", "text_corrected", mood),
        captioned("MemotionI2TRetrieval", "text_corrected", mood),
        captioned("SciMMIRI2TRetrieval", "text", figure),
        captioned("SciMMIRT2IRetrieval", "text", figure),
        retrieval("VidoreArxivQARetrieval", {"text": texts(6, 8)}, {"image": pictures(9, 9)}, vidore, ci=True),
        spoken_pages("Vidore2ESGReportsRetrieval", spoken, languages, ci=True),
        retrieval("Vidore3FinanceEnRetrieval", {"text": texts(5, 8)}, {"image": pictures(7, 9)}, ci=True,
                  subsets=(*languages, "italian", "portuguese")),
        retrieval("Vidore3FinanceEnRetrieval.v2", {"text": texts(5, 8)}, {"image": pictures(7, 9), "text": texts(7, 9)},
                  subsets=(*languages, "italian", "portuguese")),
        pairs_of_captions("Winoground", ci=True),
        pairs_of_captions("AROVisualAttribution"),
        pairs_of_captions("AROCocoOrder"),
        pairs_of_captions("SugarCrepe", split="train"),
        image_code(ci=False),
        drawn_sentences("STS12VisualSTS", ci=True),
        drawn_sentences("STS17MultilingualVisualSTS"),
        drawn_sentences("STS12", holds="t", ci=True),
        drawn_sentences("STS17", holds="t"),
        classes("DTD", "image", "label", ci=True),
        classes("Birdsnap", "image", "common"),
        classes("Banking77Classification", "text", "label", words=True),
        several_classes(ci=False),
        groups("TinyImageNetClustering", "image", "label", "valid", ci=True),
        labelled_images("STL10ZeroShot", "image", "label", "test", ("bird", "cat", "horse"), ci=True),
        labelled_images("RenderedSST2", "png", "cls", "test"),
        retrieval("NFCorpus", {"text": texts(6, 8)}, {"text": texts(9, 9), "title": ["", *texts(8, 10)]}, ci=True),
    ]  # fmt: skip
    return {case.name: case for case in found}


def spoken_pages(name: str, queries: Mapping[str, list[Any]], languages: Sequence[str], ci: bool) -> Case:
    """ViDoRe v2: every language has its own queries and all pages."""
    whole = retrieval(name, queries, {"image": pictures(9, 9)}, vidore, ci=ci)
    answers = whole.tables["qrels"]["test"]
    right: dict[int, list[int]] = {}
    for query, page in zip(answers["query-id"], answers["corpus-id"], strict=True):
        right.setdefault(query, []).append(page)

    def expect(embed: Embed) -> dict[str, float]:
        order = ranked(embed(items(queries, "t")), embed(items(whole.tables["corpus"]["test"], "i")))
        scores = [ndcg(row, right[query], 5) for query, row in enumerate(order)]
        return {
            language: float(
                np.mean([score for score, own in zip(scores, queries["language"], strict=True) if own == language])
            )
            for language in languages
        }

    return Case(name, whole.tables, expect, ci)
