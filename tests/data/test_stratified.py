"""Held-out rows are exactly those that scikit-learn's function holds out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from cutlayer.data import load
from cutlayer.data.built_in.digits import digits
from cutlayer.data.stratified import held_out


def by_the_library(rows: int, count: int, classes: np.ndarray | None, state: int) -> np.ndarray:
    try:
        _, held = train_test_split(np.arange(rows), test_size=count, random_state=state, stratify=classes)
    except ValueError:  # a class has too few samples to be in both parts
        _, held = train_test_split(np.arange(rows), test_size=count, random_state=state)
    return np.sort(held)


@given(st.data())
def test_the_rows_are_the_librarys(data: st.DataObject) -> None:
    rows = data.draw(st.integers(2, 120))
    count = data.draw(st.integers(1, rows - 1))
    kinds = data.draw(st.lists(st.integers(-3, 9), min_size=1, max_size=6))
    state = data.draw(st.integers(0, 2**32 - 1))
    classes = np.random.default_rng(state).choice(kinds, rows)
    for given_classes in (classes, None):
        ours = np.sort(held_out(rows, count, given_classes, state))
        np.testing.assert_array_equal(ours, by_the_library(rows, count, given_classes, state))


@pytest.mark.parametrize(("rows", "count"), [(60_000, 6_000), (999, 333)])
def test_the_rows_are_the_librarys_at_real_sizes(rows: int, count: int) -> None:
    classes = np.random.default_rng(rows).integers(0, 10, rows)
    np.testing.assert_array_equal(np.sort(held_out(rows, count, classes, 7)), by_the_library(rows, count, classes, 7))


def test_the_digits_are_the_librarys() -> None:
    bundled, ours = load_digits(), digits()
    np.testing.assert_array_equal(ours.train.x, (bundled.images / 16).astype(np.float32)[:, None])
    np.testing.assert_array_equal(ours.train.y, bundled.target)
    assert len(load("digits").test) == round(0.2 * len(bundled.target))
