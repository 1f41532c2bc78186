"""The ledger: which contents the model is given, and which states a row is the sum of."""

from __future__ import annotations

import numpy as np
import pytest

from e5v_st.mteb_tasks.contents import Content, Row
from e5v_st.mteb_tasks.ledger import Ledger
from e5v_st.mteb_tasks.store import Store

A, B, C, D = (Content(text, None, "p") for text in "ABCD")
STATES = {A: [1.0, 0], B: [0, 1.0], C: [4.0, 4.0], D: [9.0, 0]}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def state_of(content):
    return np.array(STATES[content], np.float32)


def test_the_example_in_its_docstring_holds(store):
    store.put({C.key(b"f"): state_of(C)})
    ledger = Ledger(b"f", store)
    rows = [Row([A, B], []), Row([C], []), Row([A], [D])]
    given = list(ledger.missing(rows))
    assert given == [A, B, D]
    assert [ledger.receive(state_of(content)) for content in given] == [1, 1, 3]
    assert not ledger.awaited
    np.testing.assert_array_equal(ledger.sums(2), [[1, 1], [4, 4], [1, 0]])
    assert not store.get([D.key(b"f")])
    ledger.save()
    np.testing.assert_array_equal(store.get([D.key(b"f")])[D.key(b"f")], state_of(D))


def test_a_content_is_given_once_however_far_the_model_reads_ahead():
    ledger = Ledger(b"f")
    rows = (Row([content], []) for content in [A, B] * 100)  # several times as many as are looked up together
    missing = ledger.missing(rows)
    first = next(missing)
    assert (first, next(missing), next(missing, None)) == (A, B, None)
    for content in (A, B):
        ledger.receive(state_of(content))
    np.testing.assert_array_equal(ledger.sums(2), [STATES[A], STATES[B]] * 100)


def test_states_are_saved_a_few_at_a_time_and_only_finite_ones(store, monkeypatch):
    monkeypatch.setattr("e5v_st.mteb_tasks.ledger.SAVE_EVERY", 2)
    ledger = Ledger(b"f", store)
    saved = []
    monkeypatch.setattr(store, "put", lambda states: saved.append(list(states)))
    for content in ledger.missing([Row([A], []), Row([B], []), Row([C], [])]):
        ledger.receive(state_of(content) if content is not B else np.full(2, np.nan, np.float32))
    ledger.save()
    ledger.save()
    assert saved == [[A.key(b"f")], [C.key(b"f")]]


def test_without_rows_there_are_no_sums():
    ledger = Ledger(b"f")
    assert list(ledger.missing([])) == []
    assert ledger.sums(3).shape == (0, 3)
