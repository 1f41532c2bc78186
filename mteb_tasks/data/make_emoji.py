"""Makes every file of this folder from three Debian packages; run once, the results are committed.

    apt-get install fonts-noto-color-emoji unicode-cldr-core wordnet-base
    pip install emoji pillow pyarrow
    python mteb_tasks/data/make_emoji.py

Nothing is random: wherever a choice is made (what is held out, which sister word is the hard negative) things are
ordered by the SHA-256 of their name. README.md says what the files hold.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import emoji
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
CLDR = Path("/usr/share/unicode/cldr/common")
WORDNET = Path("/usr/share/wordnet")

#: Side of a stored picture in pixels: one tile of the small model, so that it is never enlarged.
SIDE = 60
#: Pictures whose mean absolute difference (0-255, over all pixels and channels) is below this count as near-identical.
NEAR_IDENTICAL = 2.0
#: The font has a bitmap of 136 px for every emoji it knows; a wider result is a sequence drawn piece by piece.
WIDEST = 140

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
#: What is held out: (split, kind, of people or things, number of concepts), in this order.
HELD_OUT = (
    ("concept", "concept", "thing", 158),
    ("concept", "concept", "person", 14),
    ("validation", "concept", "thing", 55),
    ("validation", "concept", "person", 5),
    ("combination", "tone", None, 62),
    ("combination", "gender", None, 14),
    ("validation", "tone", None, 14),
    ("validation", "gender", None, 4),
)

_GENDERS = {"man": "man", "men": "man", "boy": "man", "woman": "woman", "women": "woman", "girl": "woman"}
_GENDERED = re.compile(r"\b(man|men|woman|women|person|people|boy|girl|child)\b")
#: Names that no rule takes apart: name -> (concept, gender).
_IRREGULAR = {
    **{"merman": ("merperson", "man"), "mermaid": ("merperson", "woman")},
    **{"prince": ("royal", "man"), "princess": ("royal", "woman"), "person with crown": ("royal", "")},
    **{"Santa Claus": ("Claus", "man"), "Mrs. Claus": ("Claus", "woman"), "mx claus": ("Claus", "")},
    **{"older person": ("old", ""), "child": ("child", ""), "boy": ("child", "man"), "girl": ("child", "woman")},
}

TONE_CHANGES = ("change the skin tone to {}", "make the skin {}", "with {} skin", "{} skin tone")
GENDER_CHANGES = ("make this a {}", "change to a {}", "a {} instead", "turn into a {}")
TONE_WORDS = {"": "yellow"}
GENDER_WORDS = {"": "person"}

#: WordNet lexicographer files of nouns that can be pictured or felt: act, animal, artifact, body, event, feeling, food,
#: location, object, person, phenomenon, plant, shape, substance, time.
LEXICON = {4, 5, 6, 8, 11, 12, 13, 15, 17, 18, 19, 20, 25, 27, 28}

Row = dict[str, Any]


def order(key: str) -> str:
    """Returns the key by which things are put in an arbitrary but fixed order."""
    return hashlib.sha256(key.encode()).hexdigest()


def cldr_annotations() -> tuple[dict[str, str], dict[str, list[str]]]:
    """Returns the English short name and keywords of each sequence, keyed without variation selectors."""
    names: dict[str, str] = {}
    keywords: dict[str, list[str]] = {}
    for folder in ("annotations", "annotationsDerived"):
        for node in ElementTree.parse(CLDR / folder / "en.xml").iter("annotation"):  # noqa: S314 - the distribution's own file
            text, key = node.text or "", (node.get("cp") or "").replace("\ufe0f", "")
            if node.get("type") == "tts":
                names[key] = text
            else:
                keywords[key] = [word.strip() for word in text.split("|")]
    return names, keywords


def draw(sequence: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """Draws one emoji on white, ``SIDE`` x ``SIDE``, 128 colours; ``None`` if the font lacks it."""
    left, _, right, _ = font.getbbox(sequence)
    if not 0 < right - left <= WIDEST:
        return None
    canvas = Image.new("RGB", (136, 136), "white")
    ImageDraw.Draw(canvas).text((68 - (left + right) // 2, 4), sequence, font=font, embedded_color=True)
    small = canvas.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return small.quantize(128, dither=Image.Dither.NONE)


def png(image: Image.Image) -> bytes:
    """Returns the image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def parse_name(name: str, sequence: str, people: set[str]) -> tuple[str, str, str]:
    """Splits a CLDR name into (concept, gender, tone): "man artist: dark skin tone" -> ("artist", "man", "dark").

    ``people`` are the names that come with skin tones too; only people are told apart by gender.
    """
    head, _, tail = name.partition(": ")
    details = tail.split(", ") if tail else []
    tone = next((d.removesuffix(" skin tone") for d in details if d.endswith("skin tone")), "")
    rest = [d for d in details if not d.endswith("skin tone")]
    if head in ("kiss", "couple with heart", "family"):
        return head, "", tone
    base = ": ".join([head, ", ".join(rest)]) if rest else head
    if base in _IRREGULAR:
        return *_IRREGULAR[base], tone
    is_person = any(mark in sequence for mark in "\u2640\u2642\U0001f468\U0001f469\U0001f9d1") or tone
    if not is_person and base not in people:
        return base, "", tone
    found = _GENDERED.search(base)
    gender = _GENDERS.get(found.group(), "") if found else ""
    concept = re.sub(r"\s+", " ", _GENDERED.sub("", base)).strip(" :").removeprefix("in ")
    return concept or "person", gender, tone


def collect() -> list[Row]:
    """Returns a row for every emoji that the font draws and CLDR names, identical pictures only once."""
    names, keywords = cldr_annotations()
    font = ImageFont.truetype(str(FONT), 109, layout_engine=ImageFont.Layout.RAQM)
    people = {name.partition(": ")[0] for name in names.values() if name.endswith("skin tone")}
    sequences = (s for s, d in emoji.EMOJI_DATA.items() if d["status"] == emoji.STATUS["fully_qualified"])
    rows, seen = [], set()
    for sequence in sorted(sequences, key=lambda s: (len(s), s)):
        key = sequence.replace("\ufe0f", "")
        name = names.get(key)
        picture = draw(sequence, font) if name and name.count("skin tone") < 2 else None
        if name is None or picture is None:
            continue
        pixels = np.asarray(picture.convert("RGB"))
        if pixels.tobytes() in seen:
            continue
        seen.add(pixels.tobytes())
        concept, gender, tone = parse_name(name, key, people)
        rows.append(
            {
                "id": "-".join(f"{ord(c):x}" for c in key),
                "image": png(picture),
                "pixels": pixels,
                "name": name,
                "keywords": [k for k in keywords.get(key, []) if k.lower() != name.lower()],
                "concept": concept,
                "gender": gender,
                "tone": tone,
                "split": "train",
                "held_out": "",
            }
        )
    return rows


def neighbours(rows: list[Row]) -> list[set[int]]:
    """Returns for each row the indices of the rows with a near-identical picture.

    Averages over blocks differ by no more than the pixels do, so they rule out most pairs at little cost.
    """
    pixels = np.stack([r["pixels"] for r in rows]).astype(np.int16)
    coarse = pixels.reshape(len(rows), 6, 10, 6, 10, 3).mean((2, 4), dtype=np.float32)
    found = []
    for i in range(len(rows)):
        maybe = np.flatnonzero(np.abs(coarse - coarse[i]).mean((1, 2, 3)) < NEAR_IDENTICAL)
        close = np.abs(pixels[maybe] - pixels[i]).mean((1, 2, 3), dtype=np.float32) < NEAR_IDENTICAL
        found.append(set(maybe[close].tolist()) - {i})
    return found


def blocks_of(rows: list[Row], members: list[int], kind: str, concept: str) -> list[list[int]]:
    """Returns what may be held out of a concept: all of it, or the pictures of one tone or gender, in a fixed order."""
    if kind == "concept":
        return [members]
    values = sorted({rows[i][kind] for i in members} - {""}, key=lambda v: order(f"{concept} {v}"))
    return [[i for i in members if rows[i][kind] == v] for v in values] if len(values) >= 2 else []


def hold_out(rows: list[Row], near: list[set[int]]) -> None:
    """Sets ``split``, ``held_out``, ``gallery`` and ``family``.

    At most one block of a concept is held out, and never a block with a near-identical picture outside it.
    """
    concepts: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        concepts[row["concept"]].append(i)
    toned = {concept for concept, members in concepts.items() if any(rows[i]["tone"] for i in members)}
    taken: set[str] = set()
    for split, kind, among, count in HELD_OUT:
        candidates = [c for c in concepts if among is None or (c in toned) == (among == "person")]
        for concept in sorted(candidates, key=lambda c: order(f"{kind} {c}")):
            blocks = blocks_of(rows, concepts[concept], kind, concept)
            block = next((b for b in blocks if not any(near[i] - set(b) for i in b)), None)
            if count == 0 or block is None or concept in taken:
                continue
            count -= 1
            taken.add(concept)
            for i in block:
                rows[i].update(split=split, held_out=kind)
    for members in concepts.values():
        for i in members:
            rows[i]["family"] = [rows[j]["id"] for j in members]
            rows[i]["gallery"] = rows[i]["held_out"] != "concept" or i == members[0]


def triplets(rows: list[Row], near: list[set[int]]) -> list[Row]:
    """Returns (reference, change in words, target) within families; two references for each held-out target and kind.

    The reference differs from the target in exactly one of tone and gender. Pictures with a near-identical relative are
    left out, for there the answer is not to be seen. Training triplets have a training picture at both ends.
    """
    found = []
    families: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        if row["concept"] != "family" and not near[i]:
            families[row["concept"]].append(i)
    for members, kind in itertools.product(families.values(), ("tone", "gender")):
        other = "gender" if kind == "tone" else "tone"
        for t in members:
            target = rows[t]
            sources = [rows[i] for i in members if rows[i][kind] != target[kind] and rows[i][other] == target[other]]
            sources.sort(key=lambda r: order(f"{r['id']} {target['id']}"))
            seen = target["split"] == "train"
            sources = [r for r in sources if r["split"] == "train"] if seen else sources[:2]
            wordings = TONE_CHANGES if kind == "tone" else GENDER_CHANGES
            words = (TONE_WORDS if kind == "tone" else GENDER_WORDS).get(target[kind], target[kind])
            for source in sources:
                row = {"split": target["split"], "change": kind, "reference": source["id"], "target": target["id"]}
                pick = int(order(f"{source['id']}>{target['id']}"), 16) % len(wordings)
                wording = wordings[pick if seen else 0]
                found.append({**row, "text": wording.format(words)})
    return found


def first_senses() -> dict[int, str]:
    """Returns the nouns of WordNet's sense-tagged texts whose most frequent sense is this synset: offset -> lemma."""
    tagged = {line.split("%")[0] for line in (WORDNET / "cntlist.rev").read_text().splitlines() if "%1:" in line}
    senses: dict[int, str] = {}
    for line in (WORDNET / "index.noun").read_text().splitlines():
        fields = line.split()
        if line.startswith(" ") or fields[0] not in tagged:
            continue
        offset = int(next(f for f in fields[4:] if len(f) == 8 and f.isdigit()))
        senses.setdefault(offset, fields[0].replace("_", " "))
    return senses


def glosses() -> list[Row]:
    """Returns lemma, gloss and hypernym of WordNet's common nouns that can be pictured or felt."""
    senses = first_senses()
    rows = []
    for line in (WORDNET / "data.noun").read_text().splitlines():
        if line.startswith(" ") or int(line[:8]) not in senses:
            continue
        head, _, gloss = line.partition("|")
        fields = head.split()
        gloss = re.sub(r"\(.*?\)", "", re.sub(r'".*', "", gloss).split(";")[0])
        gloss = re.sub(r"\s+", " ", gloss).strip(" ,")
        parent = fields[fields.index("@") + 1] if "@" in fields else ""
        lemma = senses[int(line[:8])]
        if int(fields[1]) in LEXICON and 3 <= len(gloss.split()) <= 14 and lemma not in gloss:
            rows.append({"lemma": lemma, "gloss": gloss, "parent": parent})
    return rows


def split_glosses(rows: list[Row], held_out: set[str]) -> None:
    """Sets ``split`` and ``sister`` (another synset under the same hypernym, from the same split).

    Words that name a held-out emoji concept are never in the training part.
    """
    shuffled = sorted(rows, key=lambda r: order(r["gloss"]))
    for i, row in enumerate(shuffled):
        row["split"] = "test" if i < 500 else "validation" if i < 700 else "train"
    rows[:] = [r for r in shuffled if r["split"] != "train" or r["lemma"].lower() not in held_out]
    sisters: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        sisters[row["split"], row["parent"]].append(row)
    for group in sisters.values():
        for row, sister in zip(group, group[1:] + group[:1], strict=True):
            row["sister"] = sister["lemma"] if sister is not row else ""
            row["sister_gloss"] = sister["gloss"] if sister is not row else ""


def text_pairs(rows: list[Row], words: list[Row]) -> list[Row]:
    """Returns (query, target) sentence pairs: an emoji's keywords and its name, a word's gloss and the word.

    Keywords that belong to several emoji without a tone (those of every flag are just "flag") are left out.
    """
    pairs = []
    times = Counter(tuple(r["keywords"]) for r in rows if r["gallery"] and not r["tone"])
    for row in rows:
        split = {"train": "train", "validation": "validation", "concept": "test"}.get(row["split"])
        if split and row["gallery"] and row["keywords"] and not row["tone"] and times[tuple(row["keywords"])] == 1:
            pair = {"kind": "keywords", "query": ", ".join(row["keywords"]), "target": row["name"]}
            pairs.append({"split": split, **pair})
    for word in words:
        pairs.append({"split": word["split"], "kind": "gloss", "query": word["gloss"], "target": word["lemma"]})
    return pairs


def graded_pairs(rows: list[Row], words: list[Row]) -> list[Row]:
    """Returns sentence pairs with a grade: 2 the same thing, 1 related, 0 unrelated; held-out splits only.

    Emoji: name and keywords of the same emoji; of two that share a keyword; of two that share none. WordNet: word and
    gloss of the same synset; of two under one hypernym; of two that are not.
    """
    pairs = []
    for split, source in (("test", "concept"), ("validation", "validation")):
        things = [r for r in rows if r["split"] == source and r["gallery"] and not r["tone"] and r["keywords"]]
        for row in things:
            others = sorted((r for r in things if r is not row), key=lambda r: order(row["id"] + r["id"]))
            shared = [r for r in others if set(r["keywords"]) & set(row["keywords"])]
            alien = [r for r in others if not set(r["keywords"]) & set(row["keywords"])]
            for other, grade in ((row, 2), *((r, 1) for r in shared[:1]), *((r, 0) for r in alien[:1])):
                texts = {"sentence1": row["name"], "sentence2": ", ".join(other["keywords"])}
                pairs.append({"split": split, "kind": "keywords", **texts, "score": float(grade)})
        held = [w for w in words if w["split"] == split]
        for i, word in enumerate(held):
            alien = held[(i + len(held) // 2) % len(held)]
            graded = [(word["gloss"], 2), (word["sister_gloss"], 1), (alien["gloss"], 0)]
            for text, grade in graded:
                texts = {"sentence1": word["lemma"], "sentence2": text}
                if text:
                    pairs.append({"split": split, "kind": "gloss", **texts, "score": float(grade)})
    return pairs


def training_triplets(rows: list[Row], words: list[Row]) -> list[tuple[str, str, str]]:
    """Returns (sentence, what means the same, what is close but different), from the training split alone.

    Emoji: name, keywords, and the name of a relative (another tone or gender) or, without one, of an emoji that shares
    a keyword. WordNet: word, gloss, gloss of a sister; and gloss, word, sister.
    """
    train = [r for r in rows if r["split"] == "train" and r["keywords"]]
    relatives, sharing = defaultdict(list), defaultdict(list)
    for row in train:
        relatives[row["concept"]].append(row)
        for word in row["keywords"]:
            sharing[word].append(row)
    found = []
    for row in train:
        close = relatives[row["concept"]] + [r for word in row["keywords"] for r in sharing[word]]
        family = {r["name"] for r in relatives[row["concept"]]} - {row["name"]}
        names = family or {r["name"] for r in close} - {row["name"]}
        if names:
            negative = min(names, key=lambda n: order(row["name"] + n))
            found.append((row["name"], ", ".join(row["keywords"]), negative))
    for word in words:
        if word["split"] == "train" and word["sister"] and word["sister_gloss"] != word["gloss"]:
            found.append((word["lemma"], word["gloss"], word["sister_gloss"]))
            found.append((word["gloss"], word["lemma"], word["sister"]))
    return sorted(found, key=lambda t: order("|".join(t)))


def write_parquet(name: str, rows: Iterable[Row], columns: list[str]) -> None:
    """Writes the columns of the rows as one Parquet file, under a temporary name first."""
    path = HERE / name
    table = pa.table({c: [row[c] for row in rows] for c in columns})
    pq.write_table(table, path.with_suffix(".tmp"), compression="zstd")
    os.replace(path.with_suffix(".tmp"), path)
    print(f"{name}: {table.num_rows} rows, {path.stat().st_size / 1e6:.1f} MB")


def write_csv(name: str, header: tuple[str, ...], rows: list[tuple[str, str, str]]) -> None:
    """Writes a gzipped CSV that is the same byte for byte each time."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    path = HERE / name
    path.with_suffix(".tmp").write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))
    os.replace(path.with_suffix(".tmp"), path)
    print(f"{name}: {len(rows)} rows, {path.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    """Makes all files."""
    rows = collect()
    near = neighbours(rows)
    hold_out(rows, near)
    unseen = {r[k].lower() for r in rows if r["held_out"] == "concept" for k in ("concept", "name")}
    words = glosses()
    split_glosses(words, unseen)
    columns = ["id", "image", "name", "keywords", "concept", "gender", "tone", "family", "split", "held_out", "gallery"]
    write_parquet("emoji.parquet", rows, columns)
    write_parquet("composed.parquet", triplets(rows, near), ["split", "change", "reference", "text", "target"])
    write_parquet("text_pairs.parquet", text_pairs(rows, words), ["split", "kind", "query", "target"])
    write_parquet(
        "graded_pairs.parquet", graded_pairs(rows, words), ["split", "kind", "sentence1", "sentence2", "score"]
    )
    write_csv("tiny_triplets.csv.gz", ("sent0", "sent1", "hard_neg"), training_triplets(rows, words))


if __name__ == "__main__":
    main()
