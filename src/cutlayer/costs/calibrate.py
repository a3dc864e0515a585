"""Measures this machine's training speed and power, as a device profile.

A model of the zoo is trained on random rows in float32, as a client would train it, for some seconds. FLOP/s are the
counted FLOPs divided by the time, so the profile needs no `utilisation`. They are the profile's float32 rate, and its
rates in other precisions stay unknown. Power is measured if the machine can measure it (`measured.py`); otherwise it
comes from a meter at the wall.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import tomli_w
import torch
from torch import nn

from cutlayer import seeds
from cutlayer.allocator import keep_memory
from cutlayer.costs.flops import count
from cutlayer.costs.measure import check_takes
from cutlayer.costs.measured import Meter
from cutlayer.errors import ConfigError
from cutlayer.models import build, cut
from cutlayer.models.parts import logits

_WINDOWS = 10
_CLASSES = 10


@dataclass(frozen=True)
class Calibration:
    """FLOP/s reached in float32: median of the windows, lowest and highest; watts while training, and while idle."""

    flops_per_second: float
    lowest: float
    highest: float
    watts: float
    idle_watts: float | None
    basis: str
    source: str

    def toml(self, name: str) -> str:
        """A profile table for the option `profiles`."""
        figures: dict[str, object] = {
            "title": name,
            "flops_per_second": float(f"{self.flops_per_second:.4g}"),
            "watts": float(f"{self.watts:.4g}"),
            **({} if self.idle_watts is None else {"idle_watts": float(f"{self.idle_watts:.4g}")}),
            "basis": self.basis,
            "source": self.source,
        }
        return tomli_w.dumps({"device": {name: figures}})


def calibrate(
    model: str,
    *,
    batch: int,
    device: str,
    seconds: float,
    watts: float | None,
    idle_watts: float | None,
    shape: Sequence[int] = (1, 28, 28),
    kind: Literal["float32", "int64"] = "float32",
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Calibration:
    """Train `model` with its `options` on samples of a `shape` and `kind` for about `seconds`. `watts` (read from a
    meter) are for machines that cannot measure power.

    Raises ConfigError if power cannot be measured and no watts are given, for an unknown model or device, and for a
    model that does not take the samples.
    """
    meter = Meter()
    with meter:
        pass
    if meter.joules is None and watts is None:
        raise ConfigError(
            f"the power of this machine is {meter.method}: give watts, the power that a wall meter shows during the "
            "measurement"
        )
    with seeds.torch_seeded(0, "calibrate"):
        net = build(model, tuple(shape), _CLASSES, **options)
        rows = torch.rand(max(2, batch), *shape)
        x, y = rows if kind == "float32" else rows.mul(2).long(), torch.arange(len(rows)) % _CLASSES
    check_takes(net, x)
    flops = count(cut(net, "output", x), x).whole.training * len(x)
    try:
        net, x, y = net.to(device), x.to(device), y.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device = {device!r} cannot be used here ({str(error).splitlines()[0]})") from None
    if x.device.type == "cpu":
        keep_memory()
    idle = _idle(meter) if idle_watts is None and meter.joules is not None else idle_watts
    before, started = meter.joules, time.perf_counter()
    with meter, _no_tf32():
        rates = [steps * flops / took for steps, took in _windows(net, x, y, seconds / _WINDOWS)]
    took = time.perf_counter() - started
    measured = None if meter.joules is None or before is None else (meter.joules - before) / took
    return Calibration(
        statistics.median(rates),
        min(rates),
        max(rates),
        watts if watts is not None else measured or 0.0,
        idle,
        f"training {model}, batch {batch}, float32, on {device} with {torch.get_num_threads()} threads",
        "calibration; power " + ("as given" if watts is not None else meter.method),
    )


def _windows(net: nn.Module, x: torch.Tensor, y: torch.Tensor, seconds: float) -> Iterator[tuple[int, float]]:
    """Train; (steps, seconds) of each window, after one to warm up."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for window in range(_WINDOWS + 1):
        steps, started = 0, time.perf_counter()
        while (took := time.perf_counter() - started) < seconds or not steps:
            optimizer.zero_grad()
            _loss(logits(net(x)), y).backward()
            optimizer.step()
            if x.device.type == "cuda":
                torch.cuda.synchronize()
            steps += 1
        if window:
            yield steps, took


def _loss(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Cross entropy if the model scores the classes of `y`; otherwise any loss with gradients."""
    scored = outputs.dim() == 2 and outputs.shape[1] >= _CLASSES
    return nn.functional.cross_entropy(outputs, y) if scored else outputs.square().mean()


@contextmanager
def _no_tf32() -> Iterator[None]:
    """Let CUDA compute float32 products in float32: torch's default is TF32 for convolutions."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = False
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


def _idle(meter: Meter, seconds: float = 3.0) -> float:
    """Watts while the machine is idle."""
    before = meter.joules or 0.0
    with meter:
        time.sleep(seconds)
    return ((meter.joules or 0.0) - before) / seconds
