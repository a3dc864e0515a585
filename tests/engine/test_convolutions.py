"""Every form of a convolution equals torch's convolution of each client alone, with all gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cutlayer.engine.convolutions import forms, rule

CLIENTS, ROWS = 3, 2
CASES: dict[str, tuple[int, int, int, int, dict[str, Any]]] = {  # dims, inputs, outputs, kernel
    "signal": (1, 3, 4, 5, {"padding": 2}),
    "signal, strided and dilated": (1, 2, 4, 3, {"stride": 2, "dilation": 2, "padding": 1}),
    "image": (2, 1, 6, 5, {"padding": 2}),
    "image, unequal": (2, 3, 4, 3, {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}),
    "depthwise": (2, 4, 8, 3, {"padding": 1, "groups": 4}),
    "same": (2, 2, 3, 3, {"padding": "same"}),
    "volume": (3, 2, 3, 3, {"padding": 1, "stride": 2}),
}


@pytest.mark.parametrize("last", [False, True], ids=["", "channels last"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("data", [True, False], ids=["data", "between"])
@pytest.mark.parametrize("case", CASES)
def test_forms_are_equal(case: str, data: bool, bias: bool, last: bool) -> None:
    dims, inputs, outputs, kernel, how = CASES[case]
    how = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, **how}
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(CLIENTS * ROWS, inputs, *(9, 8, 7)[:dims], generator=noise, dtype=torch.float64)
    if last and dims == 2:
        x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(CLIENTS, outputs, inputs // how["groups"], *[kernel] * dims, generator=noise).double()
    shift = torch.randn(CLIENTS, outputs, generator=noise).double() if bias else None
    conv = (functional.conv1d, functional.conv2d, functional.conv3d)[dims - 1]

    def alone(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        each = zip(x.split(ROWS), w.unbind(0), [None] * CLIENTS if b is None else b.unbind(0), strict=True)
        return torch.cat([conv(*one, **how) for one in each])

    x.requires_grad_(not data)
    possible = forms(x, weight, **how)
    assert ("columns" in possible) == (dims == 2 and data and how["groups"] == 1 and how["padding"] != "same")
    assert ("dense" in possible) == (how["padding"] != "same")
    assert rule(possible, weight, last) in possible
    expected = results(alone, x, weight, shift)
    for name, form in possible.items():
        for a, b in zip(expected, results(form, x, weight, shift), strict=True):
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def results(form: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """The output, and the gradients of all inputs that require one."""
    leaves = [None if t is None else t.detach().clone() for t in (x, weight, bias)]
    trained = [t.requires_grad_() for t in (*leaves[x.requires_grad ^ 1 :],) if t is not None]
    y = form(*leaves)
    y.backward(torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape))
    return [y, *(t.grad for t in trained)]


def test_few_inputs_and_many_outputs_are_one_product() -> None:
    x = torch.randn(4, 1, 8, 8)
    for outputs, last, expected in ((16, True, "columns"), (6, True, "dense"), (16, False, "dense")):
        weight = torch.randn(2, outputs, 1, 3, 3)
        assert rule(forms(x, weight, 1, 1, 1, 1), weight, last) == expected
