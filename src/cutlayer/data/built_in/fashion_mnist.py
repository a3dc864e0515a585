"""Fashion-MNIST, as Debian packages it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from cutlayer.data.built_in import data_set
from cutlayer.data.formats.idx import Idx
from cutlayer.data.unsplit import Raw
from cutlayer.errors import DataError

FASHION_MNIST_FOLDER = "/usr/share/datasets/fashion-mnist"
"""Where Debian's package puts the files; the environment variable CUTLAYER_FASHION_MNIST names another folder."""

FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


@data_set(
    "fashion-mnist",
    title="Fashion-MNIST",
    summary="70000 pictures of clothing, 28x28, 10 classes (Debian package dataset-fashion-mnist, or a folder of idx "
    "files)",
    paper="arXiv 1708.07747",
)
def fashion_mnist() -> Raw:
    """Pictures [n, 1, 28, 28], with the published test set."""
    folder = Path(os.environ.get("CUTLAYER_FASHION_MNIST") or FASHION_MNIST_FOLDER).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"Fashion-MNIST is not in {str(folder)!r}: `apt-get install dataset-fashion-mnist` on Debian, or name a "
            "folder with the four idx files (as data, or in the environment variable CUTLAYER_FASHION_MNIST)"
        )
    return dataclasses.replace(Idx().read(folder), name="fashion-mnist", class_names=FASHION_MNIST_CLASSES)
