"""Proofs for things of your own: an algorithm, a codec, a model, a partition or a defence, in three lines of test.

    from cutlayer.testing import check_algorithm

    def test_mine() -> None:
        check_algorithm("path/to/mine.py:Mine", strength=0.5)

A thing is given by its name, as path/to/file.py:name or package.module:name, or as the class or the configured object
itself. Models and data are made here: small, random, in double precision. What does not hold is an AssertionError
whose sentence says which property it is, and how far off.

`train_in_memory` trains with the clients of a deployment, all of them in this process.
"""

from cutlayer.testing.algorithms import check_algorithm
from cutlayer.testing.codecs import check_codec
from cutlayer.testing.defences import check_defence
from cutlayer.testing.engines import ENGINES, check_engine
from cutlayer.testing.made import random_samples, random_source
from cutlayer.testing.memory import InMemory, in_memory, train_in_memory
from cutlayer.testing.models import check_model
from cutlayer.testing.partitions import check_partition

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
