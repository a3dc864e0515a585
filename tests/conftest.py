"""Settings and hooks of the whole test suite."""

import gc
import os
import signal

import pytest
from hypothesis import settings

# One thread per process, also in processes that tests start: more threads would wait for each other, and the last
# digits of sums depend on the number of threads. This must precede the import of torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUTLAYER_KEEP_MEMORY", "0")  # kept memory would add up over the many runs of the suite
# Only tests of tuning measure speeds: the fastest way varies between runs, and with it the last digits of results.
os.environ["CUTLAYER_TUNE"] = "off"

# A shell starts background processes with Ctrl-C ignored, and the processes that tests start would inherit this.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests draw the same examples each time, so a failure is due to a change. `make test-random` draws new ones.
settings.register_profile("same", derandomize=True)
settings.register_profile("random", max_examples=1000, deadline=None)
settings.load_profile("same")

# No power cut happens between tests, so files need not reach the disk. This saves a tenth of the time.
os.fsync = lambda fd: None

gc.disable()  # until everything is imported and collected


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-golden", action="store_true", help="write the golden losses anew instead of checking them"
    )


def pytest_collection_finish() -> None:
    """Keeps imports and tests out of the garbage collection.

    They stay until the end, and searching them repeatedly takes a tenth of the suite's time.
    """
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    gc.enable()
