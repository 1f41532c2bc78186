from __future__ import annotations

import csv
import gzip
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

DATA = Path(__file__).parents[2] / "mteb_tasks" / "data"
NEAR_IDENTICAL = 2.0  # mean absolute pixel difference, as README.md says


@pytest.fixture(scope="module")
def emoji():
    return pq.read_table(DATA / "emoji.parquet").to_pylist()


@pytest.fixture(scope="module")
def pixels(emoji):
    return np.stack([np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB")) for row in emoji]).astype(np.int16)


@pytest.fixture(scope="module")
def by_id(emoji):
    return {row["id"]: row for row in emoji}


def pairs(name):
    return pq.read_table(DATA / name).to_pylist()


def difference_hash(pixels):
    """64 bits for each picture: whether grey falls from each of 8 x 9 block averages to the next on its right."""
    grey = pixels.mean(3)
    rows = np.stack([part.mean(1) for part in np.array_split(grey, 8, axis=1)], 1)
    blocks = np.stack([part.mean(2) for part in np.array_split(rows, 9, axis=2)], 2)
    return (blocks[:, :, :-1] > blocks[:, :, 1:] + 1).reshape(len(pixels), 64)


def test_every_picture_is_60_pixels_wide_and_high(pixels):
    assert pixels.shape[1:] == (60, 60, 3)


def test_no_picture_and_no_near_identical_picture_is_in_two_splits(emoji, pixels):
    held = [i for i, row in enumerate(emoji) if row["split"] != "train"]
    coarse = pixels.reshape(len(pixels), 12, 5, 12, 5, 3).mean((2, 4), dtype=np.float32)
    for i in held:
        maybe = np.flatnonzero(np.abs(coarse - coarse[i]).mean((1, 2, 3)) < NEAR_IDENTICAL)
        close = maybe[np.abs(pixels[maybe] - pixels[i]).mean((1, 2, 3)) < NEAR_IDENTICAL]
        assert {emoji[j]["split"] for j in close} == {emoji[i]["split"]}, emoji[i]["name"]


def test_pictures_of_unseen_concepts_that_share_an_image_hash_with_training_differ_in_their_pixels(emoji, pixels):
    hashes = [bits.tobytes() for bits in difference_hash(pixels)]
    train = {}
    for i, row in enumerate(emoji):
        if row["split"] == "train":
            train.setdefault(hashes[i], []).append(i)
    for i, row in enumerate(emoji):
        if row["held_out"] == "concept":
            for j in train.get(hashes[i], []):
                assert np.abs(pixels[i] - pixels[j]).mean() >= NEAR_IDENTICAL, (row["name"], emoji[j]["name"])


def test_no_two_pictures_are_identical(pixels):
    assert len({one.tobytes() for one in pixels}) == len(pixels)


def test_the_galleries_are_large_enough(emoji):
    sizes = Counter(row["split"] for row in emoji if row["gallery"])
    assert sizes["combination"] >= 200
    assert sizes["concept"] >= 150


def test_an_unseen_concept_has_no_picture_in_another_split(emoji):
    splits = {}
    for row in emoji:
        splits.setdefault(row["concept"], set()).add(row["split"])
    held = {row["concept"] for row in emoji if row["held_out"] == "concept"}
    assert len(held) > 200
    assert all(len(splits[concept]) == 1 for concept in held)


@pytest.mark.parametrize("kind", ["tone", "gender"])
def test_an_unseen_combination_has_a_known_concept_and_a_value_never_seen_with_it(emoji, kind):
    seen = {(row["concept"], row[kind]) for row in emoji if row["split"] == "train"}
    concepts = {concept for concept, _ in seen}
    held = [row for row in emoji if row["held_out"] == kind]
    assert held
    for row in held:
        assert row["concept"] in concepts
        assert (row["concept"], row[kind]) not in seen


def test_names_tell_tone_and_gender(emoji):
    for row in emoji:
        assert bool(row["tone"]) == ("skin tone" in row["name"])
        if row["tone"]:
            assert f"{row['tone']} skin tone" in row["name"]
    names = {row["name"]: row for row in emoji}
    artist = names["man artist: dark skin tone"]
    assert (artist["concept"], artist["gender"], artist["tone"]) == ("artist", "man", "dark")
    assert (names["mermaid"]["concept"], names["mermaid"]["gender"]) == ("merperson", "woman")
    assert (names["flag: Kenya"]["concept"], names["flag: Kenya"]["gender"]) == ("flag: Kenya", "")


def test_a_family_is_every_picture_of_the_concept(emoji):
    members = {}
    for row in emoji:
        members.setdefault(row["concept"], []).append(row["id"])
    assert all(row["family"] == members[row["concept"]] for row in emoji)


def test_composed_triplets_change_one_thing_and_the_target_is_held_out(by_id):
    for row in pairs("composed.parquet"):
        reference, target = by_id[row["reference"]], by_id[row["target"]]
        assert target["split"] == row["split"]
        assert reference["concept"] == target["concept"]
        changed = {kind for kind in ("tone", "gender") if reference[kind] != target[kind]}
        assert changed == {row["change"]}
        if row["split"] == "train":
            assert reference["split"] == "train"


def test_held_out_composed_triplets_have_no_look_alike_among_the_relatives(by_id, emoji, pixels):
    index = {row["id"]: i for i, row in enumerate(emoji)}
    for target in {row["target"] for row in pairs("composed.parquet") if row["split"] != "train"}:
        family = [index[i] for i in by_id[target]["family"] if i != target]
        assert np.abs(pixels[family] - pixels[index[target]]).mean((1, 2, 3)).min() >= NEAR_IDENTICAL


def test_text_pairs_are_held_out_by_query_and_by_target(emoji):
    rows = pairs("text_pairs.parquet")
    for kind in ("keywords", "gloss"):
        seen = {row["query"] for row in rows if row["split"] == "train" and row["kind"] == kind}
        held = [row for row in rows if row["split"] != "train" and row["kind"] == kind]
        assert not seen & {row["query"] for row in held}
        assert len(held) > 150
    unseen = {row["concept"].lower() for row in emoji if row["held_out"] == "concept"}
    assert not unseen & {row["target"].lower() for row in rows if row["split"] == "train"}


def test_training_triplets_hold_no_held_out_name_and_no_held_out_gloss(emoji):
    with gzip.open(DATA / "tiny_triplets.csv.gz", "rt", newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == {"sent0", "sent1", "hard_neg"}
    used = {row[column] for row in rows for column in ("sent0", "hard_neg")}  # sent1: keywords may name a relative
    train_names = {row["name"] for row in emoji if row["split"] == "train"}
    glosses = [row for row in pairs("text_pairs.parquet") if row["kind"] == "gloss"]
    train_lemmas = {row["target"] for row in glosses if row["split"] == "train"}
    held_names = {row["name"] for row in emoji if row["split"] != "train"} - train_names - train_lemmas
    held_glosses = {row["query"] for row in glosses if row["split"] != "train"}
    assert not used & held_names
    assert not used & held_glosses
    assert all(row["hard_neg"] not in (row["sent0"], row["sent1"]) for row in rows)


def test_the_licences_stand_beside_the_data():
    for name, words in {"noto-emoji": "SIL OPEN FONT LICENSE", "cldr": "UNICODE", "wordnet": "Princeton"}.items():
        assert words.lower() in (DATA / f"LICENSE-{name}.txt").read_text().lower()
    assert sum(path.stat().st_size for path in DATA.glob("*.parquet")) < 12e6
