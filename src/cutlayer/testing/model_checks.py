"""Proofs of models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cutlayer import plugins
from cutlayer.algorithms import Algorithm
from cutlayer.algorithms.parallel import Psl
from cutlayer.algorithms.splitfed import SflV1
from cutlayer.errors import CutError
from cutlayer.models import Parts, build, cut, cut_points, make
from cutlayer.run import Run
from cutlayer.seeds import torch_seeded
from cutlayer.testing.candidate import trained
from cutlayer.testing.material import demand_equal, fail, random_samples, random_source

_SIZES = (6, 4, 6)
_ALGORITHMS = (Psl, SflV1)  # client parts are stacked; the server's copies too
_TYPES = (torch.float32, torch.float64)


def check_model(
    reference: str | Callable[..., nn.Module],
    input_shape: Sequence[int],
    classes: int,
    *,
    cuts: Sequence[str] | None = None,
    stacked: bool = True,
    **options: Any,
) -> None:
    """Test that a model can be trained in parts. `options` are its own.

    - It gives `classes` numbers for each sample of `input_shape`.
    - At all `cuts` (by default those that it was registered with, or all that are found), the parts give the same as
      the whole: outputs, gradients and buffers, in training and in evaluation.
    - With `stacked`: the models of several clients, trained all at once, become the same as when trained one by one.

    Raises AssertionError, which says what does not hold and by how much, and ConfigError for a model that cannot be
    found or made.
    """
    name = reference if isinstance(reference, str) else getattr(reference, "__name__", "the model")
    model = _built(reference, input_shape, classes, options)
    x = random_samples(4, input_shape, classes=classes).x
    _check_outputs(name, model, x, classes)
    named = _cuts(reference, model, x, cuts)
    if not named:
        fail(name, "no module is found after which it can be cut")
    for at in named:
        _check_cut(name, model, at, x)
    if stacked:
        for algorithm in _ALGORITHMS:
            _check_stacked(name, model, algorithm, _default(reference) or named[0], input_shape, classes)


def _built(
    reference: str | Callable[..., nn.Module], input_shape: Sequence[int], classes: int, options: dict[str, Any]
) -> nn.Module:
    with torch_seeded(0, "model"):
        if isinstance(reference, str):
            return build(reference, input_shape, classes, **options).double()
        return make(reference, input_shape, classes, options=options).double()


def _check_outputs(name: str, model: nn.Module, x: Tensor, classes: int) -> None:
    with torch.no_grad(), torch_seeded(0, "outputs"):
        for training in (True, False):
            given = copy.deepcopy(model).train(training)(x)
            if not isinstance(given, Tensor) or given.shape != (len(x), classes):
                said = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
                fail(
                    name,
                    f"it gives {said} for {len(x)} samples of {classes} classes: ({len(x)}, {classes}) is expected",
                )


def _cuts(reference: object, model: nn.Module, x: Tensor, cuts: Sequence[str] | None) -> Sequence[str]:
    if cuts is not None:
        return cuts
    return _facts(reference).get("cuts") or cut_points(model, x)


def _default(reference: object) -> str | None:
    return _facts(reference).get("default_cut")


def _facts(reference: object) -> dict[str, Any]:
    if isinstance(reference, str):
        return dict(plugins.find("model", reference).facts)
    entry = getattr(reference, "entry", None)
    return {} if entry is None else dict(entry.facts)


def _check_cut(name: str, model: nn.Module, at: str, x: Tensor) -> None:
    try:
        parts = cut(model, at, x)
    except CutError as error:
        fail(name, str(error))
    for training in (True, False):
        mode = "training" if training else "evaluation"
        whole, halves = _passed(model, None, x, training), _passed(model, parts, x, training)
        demand_equal(name, f"cut at {at!r} it does not give in {mode} what the whole gives", halves, whole)


def _passed(model: nn.Module, parts: Parts | None, x: Tensor, training: bool) -> dict[str, Any]:
    """Outputs, gradients and buffers of a pass through a copy of the model, or of its parts."""
    made = copy.deepcopy([model] if parts is None else list(parts.all))
    for part in made:
        part.train(training).zero_grad()
    rows: Any = x.clone()
    with torch_seeded(0, "pass"):
        for part in made:
            rows = part(rows)
    rows.square().mean().backward()
    weights = {n: p.grad for part in made for n, p in part.named_parameters() if p.grad is not None}
    buffers = {n: b for part in made for n, b in part.named_buffers()}
    return {"outputs": rows.detach(), "gradients": weights, "buffers": buffers}


def _check_stacked(
    name: str, model: nn.Module, algorithm: type[Algorithm], at: str, input_shape: Sequence[int], classes: int
) -> None:
    found = []
    for engine in ("stacked", "local"):
        run = Run(
            algorithm=algorithm.entry.name,
            model=model,
            data=random_source(_SIZES, input_shape, classes=classes),
            clients=len(_SIZES),
            cut=at,
            partition="column",
            precision="float64",
            client_lr=0.01,
            batch=3,
            rounds=2,
            engine=engine,
        )
        if run.training.engine != engine:
            fail(
                name, "its clients cannot be trained all at once (the warning says why): allow that with stacked=False"
            )
        found.append(trained(run))
    for what, value in found[0].parts.items():
        sentence = f"trained by {algorithm.entry.title}, all clients at once, it comes to other {what}"
        demand_equal(name, sentence, value, found[1].parts[what])
