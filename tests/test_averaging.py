"""Weighted means of models, name by name."""

from __future__ import annotations

import torch

from cutlayer.averaging import average


def test_complex_numbers_are_averaged_as_real_ones_are() -> None:
    states = [{"w": torch.tensor([1 + 0j, 2j])}, {"w": torch.tensor([3 + 2j, 4 - 2j])}]
    assert average(states, [1, 1])["w"].tolist() == [2 + 1j, 2 + 0j]
    assert average(states, [3, 1])["w"].tolist() == [1.5 + 0.5j, 1 + 1j]
    assert states[0]["w"].tolist() == [1 + 0j, 2j]  # unchanged


def test_counters_take_the_largest_value_and_statistics_the_mean() -> None:
    states = [{"n": torch.tensor(3), "mean": torch.tensor(1.0)}, {"n": torch.tensor(5), "mean": torch.tensor(3.0)}]
    mean = average(states, [3, 1])
    assert (int(mean["n"]), float(mean["mean"])) == (5, 1.5)
