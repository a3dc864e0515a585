"""What there is to choose from, by name. Imports nothing heavy: the command line's help and checks read this.

`algorithms/`, `data/` and `models/` hold what the names stand for; a test keeps the two in step.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AlgorithmInfo:
    """One algorithm as users choose it.

    `options` are the options that change what it does, beyond those that every algorithm has. `client_part` and
    `server_part` say which side must have parameters for the algorithm to mean anything (and why);
    `whole` algorithms train uncut models, so that the cut plays no role.
    """

    title: str
    summary: str
    options: frozenset[str] = frozenset()
    whole: bool = False
    client_part: str = ""
    server_part: str = ""


@dataclass(frozen=True)
class DatasetInfo:
    """One built-in source of data."""

    summary: str


@dataclass(frozen=True)
class ModelInfo:
    """One model of the zoo: its named cut points in the order data flows, and the default one."""

    summary: str
    cuts: tuple[str, ...]
    default_cut: str


_LOCAL = frozenset({"local_epochs", "local_steps"})
_SPLIT_LR = frozenset({"alpha", "alpha_clients"})
_SPLIT_AVG = frozenset({"phi", "phi_when", "phi_until", "average_over", "average_reduce"})
_SCALE = frozenset({"gradient_scale"})
_TOUR = frozenset({"hand_over", "hand_over_optimizer", "visit_order"})
_AVERAGES = "it averages the client models"
_SPLITS_AVG = "SplitAvg averages the gradients that reach the client models"
_SPLITS_LR = "SplitLr accelerates the server model"

ALGORITHMS: dict[str, AlgorithmInfo] = {
    "cl": AlgorithmInfo("CL", "centralised: one model trained on everybody's data", whole=True),
    "fl": AlgorithmInfo(
        "FL", "federated (FedAvg): whole models trained locally, averaged every round", _LOCAL, whole=True
    ),
    "ssl": AlgorithmInfo("SSL", "sequential split learning: one client at a time, its model handed to the next", _TOUR),
    "psl": AlgorithmInfo("PSL", "parallel split learning: one server step on all clients' smashed data", _SCALE),
    "sfl": AlgorithmInfo(
        "SFL",
        "PSL plus averaging of the client models every step or round",
        _LOCAL | _SCALE | {"average_every"},
        client_part=_AVERAGES,
    ),
    "sflv1": AlgorithmInfo(
        "SplitFed V1", "a server copy per client, both sides averaged every round", _LOCAL, client_part=_AVERAGES
    ),
    "sflv2": AlgorithmInfo(
        "SplitFed V2",
        "one server model stepped client by client in random order, client models averaged every round",
        _LOCAL,
        client_part=_AVERAGES,
    ),
    "sflv3": AlgorithmInfo(
        "SplitFed V3",
        "a server copy per client, server copies averaged every round, client models never",
        _LOCAL,
        server_part="it averages the server copies",
    ),
    "slr": AlgorithmInfo(
        "SLR", "PSL with the server's rate scaled by C^alpha (SplitLr)", _SPLIT_LR | _SCALE, server_part=_SPLITS_LR
    ),
    "sgl": AlgorithmInfo(
        "SGL",
        "PSL with one common cut gradient for a random fraction phi of the clients (SplitAvg)",
        _SPLIT_AVG | _SCALE,
        client_part=_SPLITS_AVG,
    ),
    "sglr": AlgorithmInfo(
        "SGLR",
        "both: SplitAvg and SplitLr",
        _SPLIT_LR | _SPLIT_AVG | _SCALE,
        client_part=_SPLITS_AVG,
        server_part=_SPLITS_LR,
    ),
    "ussl": AlgorithmInfo(
        "U-shaped SSL",
        "sequential split learning that keeps labels private: the last layers stay with the client too",
        _TOUR | {"tail_cut"},
    ),
}

DATASETS: dict[str, DatasetInfo] = {
    "digits": DatasetInfo("1797 handwritten digits, 8x8, 10 classes (bundled with scikit-learn)"),
    "fashion-mnist": DatasetInfo(
        "70000 pieces of clothing, 28x28, 10 classes (Debian package dataset-fashion-mnist, or a folder of idx files)"
    ),
}

DATA_FORMATS: dict[str, str] = {
    "npz": "a .npz file with arrays x, y (and client), or x_train, y_train, x_test, y_test (and client_train)",
    "csv": "a .csv file of numeric features with a label column",
    "idx": "a folder with the four idx files of MNIST and its kin, gzipped or not",
    "images": "a folder with one sub-folder of pictures per class (or train/ and test/ of such folders)",
    "huggingface": "a folder written by datasets.save_to_disk, or holding parquet files",
}

MODELS: dict[str, ModelInfo] = {
    "mlp": ModelInfo(
        "multi-layer perceptron, three hidden layers of 128", ("hidden1", "hidden2", "hidden3"), "hidden2"
    ),
    "cnn": ModelInfo("small CNN: two convolution blocks, two linear layers", ("block1", "block2", "hidden"), "block1"),
    "resnet16": ModelInfo(
        "the paper's ResNet16, cut 9/7 after block4 (inputs resized to 3x32x32)",
        ("stem", "block1", "block2", "block3", "block4", "block5", "block6", "block7"),
        "block4",
    ),
    "alexnet": ModelInfo(
        "an AlexNet for 28x28 whose client part is one convolution and one max-pool (paper, Table 4)",
        ("block1", "block2", "conv3", "conv4", "block5", "hidden1", "hidden2"),
        "block1",
    ),
}
