"""Shared by all tests."""

import gc
import os
import signal

import pytest
from hypothesis import settings

# One thread for each process of the suite, and for those that tests start: more of them would wait for one another, and
# sums differ in their last digits by the number of threads. Before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUTLAYER_KEEP_MEMORY", "0")  # a suite of many runs is small, and would stay large
# Nothing is measured unless a test is about that: what is the quickest differs from run to run, and its last digits.
os.environ["CUTLAYER_TUNE"] = "off"

# A shell starts what runs in the background with Ctrl-C ignored, and so would be whatever the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples each time: what lands is decided by the change, not by luck. `make test-random` looks for new ones.
settings.register_profile("same", derandomize=True)
settings.register_profile("random", max_examples=1000, deadline=None)
settings.load_profile("same")

# No power cut comes between two tests: what they write need not be on disk when they go on. A tenth of their time.
os.fsync = lambda fd: None

gc.disable()  # until all has been imported and collected


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-golden", action="store_true", help="write the golden losses anew instead of checking them"
    )


def pytest_collection_finish() -> None:
    """Imports and tests stay to the end: do not search them for garbage again and again, which takes a tenth of the
    suite's time.
    """
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    gc.enable()
