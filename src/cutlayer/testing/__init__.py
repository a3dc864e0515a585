"""Tests for your own algorithm, codec, model, partition or defence, in three lines.

    from cutlayer.testing import check_algorithm

    def test_mine() -> None:
        check_algorithm("path/to/mine.py:Mine", strength=0.5)

A thing is given by its name, as path/to/file.py:name or package.module:name, or as the class or the configured object
itself. Models and data are made here: small, random, in double precision. If a property does not hold, an
AssertionError says which property it is, and how large the difference is.

`train_in_memory` trains with the clients of a deployment, all of them in this process.
"""

from cutlayer.testing.algorithm_checks import check_algorithm
from cutlayer.testing.codec_checks import check_codec
from cutlayer.testing.defence_checks import check_defence
from cutlayer.testing.deployed import InMemory, in_memory, train_in_memory
from cutlayer.testing.engine_checks import ENGINES, check_engine
from cutlayer.testing.material import random_samples, random_source
from cutlayer.testing.model_checks import check_model
from cutlayer.testing.partition_checks import check_partition

__all__ = [
    "ENGINES",
    "InMemory",
    "check_algorithm",
    "check_codec",
    "check_defence",
    "check_engine",
    "check_model",
    "check_partition",
    "in_memory",
    "random_samples",
    "random_source",
    "train_in_memory",
]
