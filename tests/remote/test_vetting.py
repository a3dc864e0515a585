"""Checks of the numbers that clients send, including complex numbers."""

from __future__ import annotations

import math

import pytest
import torch

from cutlayer.remote.vetting import largest, outlying
from cutlayer.stored import MalformedError, all_finite, fits

FAR = torch.tensor([1 - 7j, 2 + 3j])
BROKEN = torch.tensor([complex(1, math.nan), 2])


def test_the_parts_of_complex_numbers_count() -> None:
    assert largest([torch.ones(2), FAR]) == 7.0
    assert math.isnan(largest([BROKEN]))


def test_complex_numbers_have_to_be_finite() -> None:
    assert all_finite(FAR)
    assert not all_finite(BROKEN)
    with pytest.raises(MalformedError, match="NaN or infinite"):
        fits(BROKEN, FAR, "the weight")


def test_a_complex_model_that_moved_far_is_named() -> None:
    before = {"w": torch.zeros(2, dtype=torch.complex64)}
    models = {k: {"w": before["w"] + step} for k, step in enumerate((1j, -1j, 100j, 1 + 0j))}
    assert outlying(models, before) == {2: pytest.approx(100.0)}
