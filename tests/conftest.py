"""Shared by all tests."""

import os

import pytest

# One thread for each process of the suite, and for those that tests start: more of them would wait for one another, and
# sums differ in their last digits by the number of threads. Before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUTLAYER_KEEP_MEMORY", "0")  # a suite of many runs is small, and would stay large


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-golden", action="store_true", help="write the golden losses anew instead of checking them"
    )
