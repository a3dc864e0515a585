"""FedAvg of other simulators compared with ours in one process: pfl-research and BlazeFL, if they are installed.

    pip install pfl blazefl tqdm                                  # BlazeFL from Python 3.12 on
    pip install --ignore-requires-python blazefl==2.0.3 tqdm     # before: its FedAvg runs on Python 3.11, too
    python benchmarks/peers.py [--seconds 4]

Each is used through its public interface. It gets the same weights, the same batches, ready in memory, and plain SGD
with the same rate. Every client has STEPS batches, which are the local epoch of a round. Columns state how many times
as fast our default engine is: the median and the quartiles of paired ratios of CPU times on one thread. The last column
is the largest difference between their averaged weights and those of FedAvg by hand after the same rounds.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import engines
import torch
from engines import STEPS, Material, Workload, interleave, quartiles, spread
from torch import Tensor, nn
from torch.nn import functional

from cutlayer.allocator import keep_memory

Batches = list[list[tuple[Tensor, Tensor]]]  # for each client, in order

SIZES = [(10, 8), (10, 32), (100, 8), (200, 4)]
CELLS = [Workload(m, "fl", c, b, batches=STEPS) for m in ("lenet5", "mlp") for c, b in SIZES]


class Pfl:
    """FedAvg of pfl-research, simulated by its `SimulatedBackend`."""

    def __init__(self, w: Workload, net: nn.Module, batches: Batches) -> None:
        from pfl.aggregate.simulate import SimulatedBackend
        from pfl.algorithm.federated_averaging import FederatedAveraging
        from pfl.data.federated_dataset import FederatedDataset
        from pfl.data.pytorch import PyTorchTensorDataset
        from pfl.data.sampling import get_user_sampler
        from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
        from pfl.model.pytorch import PyTorchModel

        self.net = WithLoss(net)
        users = [
            PyTorchTensorDataset((torch.cat([x for x, _ in own]), torch.cat([y for _, y in own]))) for own in batches
        ]
        source = FederatedDataset(users.__getitem__, get_user_sampler("minimize_reuse", list(range(w.clients))))
        central = torch.optim.SGD(self.net.parameters(), lr=1.0)
        self.model = PyTorchModel(self.net, local_optimizer_create=torch.optim.SGD, central_optimizer=central)
        self.backend = SimulatedBackend(training_data=source, val_data=source)
        self.algorithm, self.clients, self.rounds = FederatedAveraging(), w.clients, 0
        self.training = NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=engines.RATE, local_batch_size=w.batch
        )
        self.judging = NNEvalHyperParams(local_batch_size=w.batch)

    def __call__(self, steps: int) -> None:
        """Trains this number of steps in whole rounds. A later `run` continues after the last one."""
        from pfl.algorithm.base import NNAlgorithmParams

        self.rounds += steps // STEPS
        wanted = NNAlgorithmParams(
            central_num_iterations=self.rounds, evaluation_frequency=10**9, train_cohort_size=self.clients,
            val_cohort_size=0,
        )  # fmt: skip
        self.algorithm.run(
            wanted, self.backend, self.model, self.training, self.judging, send_metrics_to_platform=False
        )

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The averaged model."""
        return self.net.net.state_dict()


class WithLoss(nn.Module):
    """A model with the two methods that pfl-research requires."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean cross entropy."""
        return functional.cross_entropy(self.net(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """No metrics, since nothing is evaluated."""
        return {}


class Blaze:
    """FedAvg of BlazeFL, with the trainer that trains one client after another in this process."""

    def __init__(self, w: Workload, net: nn.Module, batches: Batches) -> None:
        from blazefl.contrib import fedavg

        loaders = [torch.utils.data.DataLoader(own, batch_size=None) for own in batches]  # type: ignore[arg-type]
        models, data = Fixed(net), Loaders(loaders)
        self.server = fedavg.FedAvgBaseServerHandler(
            model_selector=models, model_name="", dataset=data, global_round=10**9, num_clients=w.clients,
            sample_ratio=1.0, device="cpu", batch_size=w.batch, seed=0,
        )  # fmt: skip
        self.trainer = fedavg.FedAvgBaseClientTrainer(
            model_selector=models, model_name="", dataset=data, device="cpu", num_clients=w.clients, epochs=1,
            batch_size=w.batch, lr=engines.RATE, seed=0,
        )  # fmt: skip

    def __call__(self, steps: int) -> None:
        """Trains this number of steps in whole rounds."""
        for _ in range(steps // STEPS):
            self.trainer.local_process(self.server.downlink_package(), self.server.sample_clients())
            for package in self.trainer.uplink_package():
                self.server.load(package)

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The averaged model."""
        return self.server.model.state_dict()


class Fixed:
    """Returns copies of one model."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def select_model(self, model_name: str) -> nn.Module:
        """A copy of the model."""
        return copy.deepcopy(self.net)


class Loaders:
    """Returns the loader of each client."""

    def __init__(self, loaders: list[Iterable[Any]]) -> None:
        self.loaders = loaders

    def get_dataloader(self, type_: str, cid: int, batch_size: int, generator: torch.Generator) -> Iterable[Any]:
        """The loader of client `cid`."""
        return self.loaders[cid]


PEERS: dict[str, tuple[str, Callable[..., Any]]] = {"pfl-research": ("pfl", Pfl), "BlazeFL": ("blazefl", Blaze)}
"""Title -> (the package to import, the class that uses it)."""


def installed() -> dict[str, Callable[..., Any]]:
    """The peers that can be imported. Prints a line for each missing one."""
    found = {}
    for title, (package, make) in PEERS.items():
        if importlib.util.find_spec(package) is None:
            print(f"{title} is not installed (pip install {package}): left out.")
        else:
            found[title] = make
    return found


def measure(w: Workload, peers: Mapping[str, Callable[..., Any]], seconds: float) -> list[str]:
    """One line of the table."""
    material = Material.of(w)
    given = material.given
    batches = [[(x.split(w.batch)[k], y.split(w.batch)[k]) for x, y in given.batches] for k in range(w.clients)]
    thunks = {"fast": material.contestant("fast"), "loop": material.contestant("loop")}
    thunks |= {title: make(w, copy.deepcopy(material.net), batches) for title, make in peers.items()}
    times = interleave(thunks, w, seconds, time.process_time)
    hand = thunks["loop"].lowers[0].state_dict()
    apart = [f"{max(float((thunks[t].state[n] - v).abs().max()) for n, v in hand.items()):.0e}" for t in peers]
    return [str(w), *(spread(quartiles(times[n], times["fast"])) for n in ("loop", *peers)), " ".join(apart)]


def main() -> None:
    """Measures and prints line by line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="CPU seconds per cell")
    options = parser.parse_args()
    peers = installed()
    if not peers:
        return
    torch.set_num_threads(1)
    keep_memory()
    print("\n".join(engines.heading(["cell", "fast/loop", *(f"fast/{title}" for title in peers), "apart"])), flush=True)
    for w in CELLS:
        print("| " + " | ".join(measure(w, peers, options.seconds)) + " |", flush=True)


if __name__ == "__main__":
    main()
