"""The proof that the parts of a cut model together equal the whole.

Equal means bit for bit, or within rounding: a received tensor is contiguous, while the whole model may have used a
strided one, and the gradients of a tensor used several times are added in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from cutlayer.copies import deep_copy
from cutlayer.eager import backward
from cutlayer.models.hooks import make_up_with, uses_made_up
from cutlayer.models.parts import (
    RAW_INPUT,
    Arguments,
    CannotCutError,
    Crossing,
    Part,
    one_line,
    storage_of,
    taken_apart,
)
from cutlayer.seeds import torch_seeded
from cutlayer.types import Rows, is_continuous

Result = TypeVar("Result")
Exchange = tuple[Rows, Rows]  # a part's received tensors and its outputs

_NO_LOGITS = "the model does not return logits with a row for every sample"
_MADE_UP = "something computed from the input before the cut (a mask, say) is used after it, beside the cut's output"
_ROUNDING = 1000  # units of the last place, of the largest value compared


def prove(
    model: nn.Module, parts: Sequence[Part], x: Arguments, inputs_may_cross: bool = False
) -> list[tuple[Crossing, ...]]:
    """The tensors that cross each cut, after the proof that `parts` equal `model`. Raises CannotCutError if they do
    not.
    """
    check_names(model, parts)
    crossings = _check_crossings(parts, x, inputs_may_cross)
    other = x.shuffled()
    for training in (True, False):
        for batch in (x, other):
            _check_run(model, parts, batch, training)
    _check_without_gradients(model, parts, other)
    _check_made_up(parts, x)
    return crossings


def describe(
    model: nn.Module, parts: Sequence[Part], x: Arguments, inputs_may_cross: bool = False
) -> list[tuple[Crossing, ...]]:
    """The tensors that cross each cut, after the checks of `prove` that need no values. Raises CannotCutError."""
    check_names(model, parts)
    crossings = _check_crossings(parts, x, inputs_may_cross)
    exchanges = _tried(partial(_forward, deep_copy(list(parts)), x, training=False))
    _check_rows(exchanges[-1][1], x)
    if any(uses_made_up(deep_copy(part), rows) for part, (rows, _) in zip(parts, exchanges, strict=True)):
        raise CannotCutError(_MADE_UP)
    return crossings


def protect(parts: Sequence[Part], x: Arguments) -> None:
    """Make parts that would write to received tensors copy them first."""
    for training in (True, False):
        rows: Rows = tuple(row.clone() for row in x.rows)
        for part in parts:
            running = deep_copy(part).train(training)
            versions = [row._version for row in rows]
            with torch.no_grad():
                given = _tried(partial(running, rows))
            part.copies_rows |= [row._version for row in rows] != versions
            rows = () if part.is_last_part else tuple(_wire(row) for row in given)


def check_names(model: nn.Module, parts: Sequence[nn.Module]) -> None:
    """Raises CannotCutError unless each tensor of the model's state belongs to exactly one part."""
    names = [name for part in parts for name in part.state_dict()]
    if sorted(names) != sorted(model.state_dict()):
        raise CannotCutError("the parts do not hold exactly the model's parameters and buffers")


def _check_crossings(parts: Sequence[Part], x: Arguments, inputs_may_cross: bool) -> list[tuple[Crossing, ...]]:
    """Check that every crossing tensor has the batch first, that none is the input itself, and that received tensors
    are not changed.
    """
    parts = deep_copy(list(parts))
    crossings = []
    batch = tuple(row.clone() for row in x.rows)  # kept, so that its memory is not used again
    sealed = {storage_of(batch[i]) for i in x.sealed()}
    rows: Rows = batch
    for part in parts[:-1]:
        with torch.no_grad():
            rows = _tried(partial(part.eval(), rows))
        if any(row.dim() < 1 or len(row) != len(x) for row in rows):
            raise CannotCutError("a tensor crosses whose first dimension is not the batch")
        if not inputs_may_cross and any(storage_of(row) in sealed for row in rows):
            raise CannotCutError(RAW_INPUT)
        names = part.crossing_names or ("",) * len(rows)
        crossings.append(tuple(Crossing(tuple(r.shape[1:]), r.dtype, n) for r, n in zip(rows, names, strict=True)))
    return crossings


def _check_run(model: nn.Module, parts: Sequence[Part], x: Arguments, training: bool) -> None:
    """Compare logits, gradients and buffers of the parts with those of the whole, for one batch."""
    mode = "training" if training else "evaluation"
    whole = deep_copy(model).train(training)
    whole.zero_grad(set_to_none=True)
    with torch_seeded(1, "proof", mode):
        expected, _ = taken_apart(_tried(lambda: x.run(whole)))
    _check_rows(expected, x)
    weights = [_weights(e) for e in expected]
    if roots := [(e, w) for e, w in zip(expected, weights, strict=True) if e.requires_grad]:
        backward([e for e, _ in roots], [w for _, w in roots])

    copies = deep_copy(list(parts))
    with torch_seeded(1, "proof", mode):
        given = _tried(lambda: _forward(copies, x, training))
    _compare(given[-1][1], expected, f"the logits in {mode}")
    _backward(given, weights)
    _compare_state(whole, copies, mode)


def _check_rows(outputs: Rows, x: Arguments) -> None:
    if any(output.dim() < 1 or len(output) != len(x) for output in outputs):
        raise CannotCutError(_NO_LOGITS)


def _weights(output: Tensor) -> Tensor:
    return torch.linspace(-1, 1, output.numel(), device=output.device).reshape(output.shape).to(output.dtype)


def _forward(parts: Sequence[Part], x: Arguments, training: bool) -> list[Exchange]:
    """Run the parts one after another, as if their rows were sent over a wire."""
    exchanges: list[Exchange] = []
    rows: Rows = tuple(row.clone() for row in x.rows)
    for part in parts:
        given = part.train(training)(rows)
        exchanges.append((rows, taken_apart(given)[0] if part.is_last_part else given))
        rows = tuple(_wire(row) for row in exchanges[-1][1])
    return exchanges


def _wire(row: Tensor) -> Tensor:
    arrived = row.detach().clone(memory_format=torch.contiguous_format)
    return arrived.requires_grad_(row.requires_grad)


def _backward(exchanges: list[Exchange], weights: Sequence[Tensor]) -> None:
    gradients: list[Tensor | None] = list(weights)
    for received, given in reversed(exchanges):
        pairs = [(g, d) for g, d in zip(given, gradients, strict=True) if g.requires_grad and d is not None]
        if pairs:
            backward([g for g, _ in pairs], [d for _, d in pairs])
        gradients = [row.grad for row in received]


def _compare_state(whole: nn.Module, parts: Sequence[nn.Module], mode: str) -> None:
    gradients = {n: p.grad for part in parts for n, p in part.named_parameters(remove_duplicate=False)}
    expected = {n: p.grad for n, p in whole.named_parameters(remove_duplicate=False)}
    found = {n for n, g in gradients.items() if g is not None}
    if differing := found ^ {n for n, g in expected.items() if g is not None}:
        raise CannotCutError(f"the parts differ from the whole in which parameters have gradients ({min(differing)!r})")
    pairs = [(gradients[n], expected[n]) for n in sorted(found)]
    _compare([g for g, _ in pairs if g is not None], [e for _, e in pairs if e is not None], f"the gradients in {mode}")
    state = {n: t for part in parts for n, t in part.state_dict().items()}
    for name, tensor in whole.state_dict().items():
        _compare([state[name]], [tensor], f"{name!r} after a step in {mode}")


def _check_without_gradients(model: nn.Module, parts: Sequence[Part], x: Arguments) -> None:
    """Also compare without gradients, when some modules use a faster path in evaluation."""
    with torch.no_grad(), torch_seeded(1, "proof"):
        expected, _ = taken_apart(x.run(deep_copy(model).eval()))
    with torch.no_grad(), torch_seeded(1, "proof"):
        given = _tried(lambda: _forward(deep_copy(list(parts)), x, training=False))
    _compare(given[-1][1], expected, "the logits in evaluation without gradients")


def _check_made_up(parts: Sequence[Part], x: Arguments) -> None:
    """Check that a part's made-up values in place of earlier layers do not reach its result."""
    for training in (True, False):
        copies = deep_copy(list(parts))
        with torch_seeded(1, "proof"):
            exchanges = _tried(partial(_forward, copies, x, training))
            if any(
                _tried(partial(uses_made_up, part, rows)) for part, (rows, _) in zip(copies, exchanges, strict=True)
            ):
                raise CannotCutError(_MADE_UP)
    results = []
    for fill in (0, 1, -1) if all(row.is_floating_point() for row in x.rows) else (0, 1):
        copies = deep_copy(list(parts))
        for part in copies:
            make_up_with(part, fill)
        with torch.no_grad(), torch_seeded(1, "proof"):
            results.append(_tried(partial(_forward, copies, x, training=False))[-1][1])
    for result in results[1:]:
        _compare(result, results[0], f"{_MADE_UP}: the logits")


def _tried(run: Callable[[], Result]) -> Result:
    try:
        return run()
    except CannotCutError:
        raise
    except Exception as error:  # the user's code: anything can come out
        raise CannotCutError(f"it does not run ({one_line(error)})") from error


def _compare(given: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    """Raises CannotCutError unless the tensors are equal, up to rounding of the largest of them."""
    given, expected = [g.detach() for g in given], [e.detach() for e in expected]
    floats = [e for e in expected if is_continuous(e) and e.numel()]
    largest = max((float(e.abs().nan_to_num(0, 0, 0).max()) for e in floats), default=0.0)
    for g, e in zip(given, expected, strict=True):
        if g.shape != e.shape or g.dtype != e.dtype:
            raise CannotCutError(f"{what} have another shape or type than the whole model's")
        if torch.equal(g, e):
            continue
        tolerance = _ROUNDING * torch.finfo(e.dtype).eps * largest if is_continuous(e) else 0.0
        if not torch.isclose(g, e, rtol=0.0, atol=tolerance, equal_nan=True).all():
            raise CannotCutError(f"{what} are not those of the whole model")
