"""The algorithms: one paper, one file. Each is a generator that trains one round and yields a record per step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cutlayer.algorithms.central import central
from cutlayer.algorithms.fedavg import fedavg
from cutlayer.algorithms.parallel import parallel
from cutlayer.algorithms.sequential import sequential
from cutlayer.algorithms.sglr import sgl, sglr, slr
from cutlayer.algorithms.splitfed import sfl, sflv1, sflv2, sflv3
from cutlayer.algorithms.ushaped import ushaped
from cutlayer.cohort import Cohort
from cutlayer.options import RunConfig
from cutlayer.server import Server
from cutlayer.types import Round, Step

Algorithm = Callable[[RunConfig, Server, Cohort, Round], Iterator[Step]]

ALGORITHMS: dict[str, Algorithm] = {
    "cl": central,
    "fl": fedavg,
    "ssl": sequential,
    "psl": parallel,
    "sfl": sfl,
    "sflv1": sflv1,
    "sflv2": sflv2,
    "sflv3": sflv3,
    "slr": slr,
    "sgl": sgl,
    "sglr": sglr,
    "ussl": ushaped,
}

__all__ = ["ALGORITHMS", "Algorithm"]
