"""Cutlayer: scalable split learning.

    import cutlayer

    run = cutlayer.Run(model=net, cut="block1", data=(x, y), algorithm="sglr", clients=10)
    for record in run:
        print(record.step, record.loss)
    print(run.result.test_score)

Importing this package imports nothing heavy; the names below are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cutlayer.compare import Comparison as Comparison
    from cutlayer.compare import Row as Row
    from cutlayer.data import Samples as Samples
    from cutlayer.data import Source as Source
    from cutlayer.data import from_arrays as from_arrays
    from cutlayer.data import from_dataset as from_dataset
    from cutlayer.data import load as load
    from cutlayer.data import partition as partition
    from cutlayer.errors import ConfigError as ConfigError
    from cutlayer.errors import CutError as CutError
    from cutlayer.errors import CutlayerError as CutlayerError
    from cutlayer.errors import DataError as DataError
    from cutlayer.errors import NonFiniteError as NonFiniteError
    from cutlayer.errors import RunFolderError as RunFolderError
    from cutlayer.errors import TrainingError as TrainingError
    from cutlayer.errors import UsageError as UsageError
    from cutlayer.models import Parts as Parts
    from cutlayer.models.cut import cut as cut
    from cutlayer.models.cut import cut_points as cut_points
    from cutlayer.options import CompareConfig as CompareConfig
    from cutlayer.options import RunConfig as RunConfig
    from cutlayer.report import cite as cite
    from cutlayer.report import tables as tables
    from cutlayer.run import Record as Record
    from cutlayer.run import Result as Result
    from cutlayer.run import Run as Run
    from cutlayer.run import Scores as Scores
    from cutlayer.trained import Predictions as Predictions
    from cutlayer.trained import TrainedModel as TrainedModel
    from cutlayer.trained import load_model as load_model

__version__ = "0.1.0"

_HOME = {
    "cutlayer.compare": ("Comparison", "Row"),
    "cutlayer.options": ("CompareConfig", "RunConfig"),
    "cutlayer.data": ("Samples", "Source", "from_arrays", "from_dataset", "load", "partition"),
    "cutlayer.errors": (
        "ConfigError",
        "CutError",
        "CutlayerError",
        "DataError",
        "NonFiniteError",
        "RunFolderError",
        "TrainingError",
        "UsageError",
    ),
    "cutlayer.models": ("Parts", "cut", "cut_points"),
    "cutlayer.report": ("cite", "tables"),
    "cutlayer.run": ("Record", "Result", "Run", "Scores"),
    "cutlayer.trained": ("Predictions", "TrainedModel", "load_model"),
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted([*_WHERE, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'cutlayer' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
