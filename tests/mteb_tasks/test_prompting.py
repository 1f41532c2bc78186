"""Prompts by kind of task: which kind each task of MIEB has, what the defaults are, and how others are chosen."""

from __future__ import annotations

import doctest
import re
from collections import Counter
from pathlib import Path

import mteb
import numpy as np
import pytest
from mteb.types import PromptType
from PIL import Image

from e5v_st.cli import main
from e5v_st.model.prompts_e5v import PROMPTS
from e5v_st.mteb_tasks import prompting
from e5v_st.mteb_tasks.encoder import E5VEncoder
from e5v_st.mteb_tasks.models import make_meta
from e5v_st.mteb_tasks.prompting import KINDS, NAMED, PUBLIC, kind_of, read_choices
from e5v_st.mteb_tasks.store import Store

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))


def test_every_task_of_mieb_has_the_kind_that_its_type_or_data_say():
    """Counted by hand from the names and types of the 130 tasks."""
    found = Counter(kind_of(task.metadata).name for task in mteb.get_benchmark("MIEB(Multilingual)").tasks)
    assert found == {
        "retrieval": 36, "composed": 2, "question": 16, "compositionality": 7, "document": 10, "visual-sts": 9,
        "classification": 22, "clustering": 5, "zero-shot": 23,
    }  # fmt: skip
    text = {kind_of(task.metadata).name for task in mteb.get_benchmark("MTEB(eng, v2)").tasks}
    assert text == {"retrieval", "sts", "classification", "clustering"}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_defaults_are_those_of_the_public_scores(kind):
    """As mteb's own entry of E5-V chooses by what a row holds; it has no task of sentence pairs in MIEB."""
    expected = {"text": "sts" if kind.name == "sts" else "text", "image": "image", "composed": "composed"}
    assert {shape: kind.default(shape) for shape in prompting.SHAPES} == expected


def test_the_public_wording_of_a_text_beside_an_image_is_that_of_mtebs_own_entry():
    from mteb.models.model_implementations import e5_v

    source = Path(e5_v.__file__).read_text()
    (found,) = re.findall(r"'(\[INST\] .*\[/INST\])'", source)
    assert NAMED[PUBLIC] == found.replace("{}", "<sent>")


@pytest.mark.parametrize(
    ("words", "choices"),
    [
        ([], None),
        (["question=composed", "sts=sts", "retrieval=text"], None),
        (["question=fused"], "question=fused"),
        (["sts=text", "question=fused"], "question=fused,sts=text"),
        (["all=mteb-composed"], "all=mteb-composed"),
        (["all=text"], "sts=text"),  # all other kinds have it anyhow
        (["question=fused", "question=composed"], None),
    ],
)
def test_choices_have_one_spelling_without_defaults(words, choices):
    assert read_choices(words) == choices


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("questions=fused", "want KIND=NAME with one of the kinds all, composed, question"),
        ("fused", "want KIND=NAME"),
        ("question=fussed", "there is no prompt 'fussed'; is it 'fused'"),
        ("question=", "there is no prompt ''"),
    ],
)
def test_what_is_neither_a_kind_nor_a_prompt_is_refused(word, message, capsys):
    assert main(["eval", "e5v-tiny", "-t", "E5VEmojiSTS", "--prompt", word]) == 1
    assert message in capsys.readouterr().err


def test_a_prompt_that_is_not_the_default_becomes_part_of_the_name(small):
    name = "local/small"
    assert make_meta(str(small), prompts="question=composed").name == name
    assert make_meta(str(small), prompts="question=composed").loader_kwargs == {"path": str(small)}
    assert make_meta(str(small), prompts="sts=text,question=fused").name == f"{name} (question=fused, sts=text)"
    assert make_meta(str(small), normalize=True).name == name
    assert make_meta(str(small), normalize=False).name == f"{name} (normalize=False)"


def embed(encoder, task, role, **columns):
    from test_mteb_encoder import loader

    how = {"hf_split": "test", "hf_subset": "default", "show_progress_bar": False}
    return encoder.encode(loader(**columns), task_metadata=mteb.get_task(task).metadata, prompt_type=role, **how)


def test_a_chosen_prompt_goes_to_the_rows_that_hold_what_it_asks_for(e5v, small, tmp_path):
    both, text, image = {"image": [IMAGE], "text": ["a dog"]}, {"text": ["a dog"]}, {"image": [IMAGE]}
    items = {"composed": {"image": IMAGE, "text": "a dog"}, "text": "a dog", "image": IMAGE}
    encoder = E5VEncoder(e5v.model, store=Store(tmp_path), prompts="composed=cirr-gallery,question=fused,sts=text")
    cases = [
        ("OVENIT2TRetrieval", PromptType.query, both, "composed", "fused"),
        ("OVENIT2TRetrieval", PromptType.document, text, "text", "text"),
        ("Flickr30kT2IRetrieval", PromptType.query, text, "text", "text"),
        ("CIRRIT2IRetrieval", PromptType.query, both, "composed", "composed"),
        ("CIRRIT2IRetrieval", PromptType.document, image, "image", "cirr-gallery"),
        ("E5VCIRRRetrieval", PromptType.document, image, "image", "cirr-gallery"),
        ("STS12", None, {"text": ["a dog."]}, "sts", "text"),
    ]
    for task, role, columns, shape, prompt in cases:
        found = embed(encoder, task, role, **columns)
        item = items.get(shape, "a dog.")
        expected = e5v.model.encode([item], prompt=PROMPTS[prompt])
        np.testing.assert_allclose(found, expected, atol=2e-6, err_msg=f"{task} {role}")
        if task == "CIRRIT2IRetrieval":
            assert encoder.encoded == (2 if role == PromptType.query else 0)  # the gallery's was embedded beside it


def test_embeddings_that_are_not_normalised_are_the_hidden_states_themselves(e5v):
    from sentence_transformers import SentenceTransformer

    texts = ["a dog", "two cats on a mat"]
    found = embed(E5VEncoder(e5v.model, normalize=False), "CIFAR10", None, text=texts)
    raw = SentenceTransformer(modules=list(e5v.model)[:2], device="cpu").encode(texts, prompt=PROMPTS["text"])
    np.testing.assert_allclose(found, raw, rtol=2e-5, atol=1e-6)
    assert abs(np.linalg.norm(found, axis=1) - 1).min() > 0.1


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(prompting) == (0, 4)


def test_the_reference_lists_every_kind():
    text = (Path(__file__).parents[2] / "docs" / "reference.md").read_text(encoding="utf8")
    for kind in KINDS:
        assert f"\n| `{kind.name}` |" in text
    assert NAMED[PUBLIC] in text
