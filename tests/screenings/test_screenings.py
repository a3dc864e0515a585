"""The user's own screenings: a bound or any function of rows, with the chain rule, and results that are refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from support import call, difference, make, mlp, server_state, source
from torch import Tensor

from cutlayer import ConfigError, Run, RunConfig, plugins
from cutlayer.gradients import column
from cutlayer.options import CompareConfig
from cutlayer.screenings import Screening, screening
from cutlayer.screenings.filtering import Screened
from cutlayer.screenings.length_bound import LengthBound
from cutlayer.screenings.lengths import lengths_of
from cutlayer.screenings.median_bound import MedianBound
from cutlayer.types import Rows

SIZES = (2, 3, 1)


def sent(seed: int = 0) -> Rows:
    """Six rows of two real tensors and one of integers."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(6, 3, generator=generator), torch.randn(6, 2, 2, generator=generator)
    return first.double(), torch.arange(6), second.double()


def screened(rule: Screening, rows: Rows) -> Screened:
    return rule.apply(rows, lengths_of(rows), SIZES)


def own(made: Callable[[Tensor, Sequence[int]], Any]) -> Screening:
    """A screening with this bound."""

    class Own(Screening):
        """A user's own screening."""

        entry = plugins.Entry("screening", "own", "", "own")

        def bound(self, lengths: Tensor, sizes: Sequence[int]) -> Any:
            """The result of the given function."""
            return made(lengths, sizes)

    return Own()


def changing(made: Callable[[Rows], Any]) -> Screening:
    """A screening with this function of rows."""

    class Changing(Screening):
        """A user's own screening."""

        entry = plugins.Entry("screening", "changing", "", "changing")

        def screen(self, rows: Rows, sizes: Sequence[int]) -> Any:
            """The result of the given function."""
            return made(rows)

    return Changing()


def real(rows: Rows) -> Rows:
    return tuple(r for r in rows if r.is_floating_point())


def clipped(rows: Rows) -> Rows:
    """Rows scaled down to a length of at most 1.5, differentiated by autograd."""
    length = torch.cat([r.flatten(1) for r in real(rows)], 1).norm(dim=1)
    factor = (1.5 / length).clamp(max=1)
    return tuple(r * column(factor, r) if r.is_floating_point() else r for r in rows)


def test_a_bound_and_a_function_that_bounds_are_the_same() -> None:
    """Equal rows and equal gradients, also for some of the rows in another order."""
    rows = sent()
    one, other = screened(LengthBound(row_limit=1.5), rows), screened(changing(clipped), rows)
    assert one.back is not None
    assert other.back is not None
    for a, b in zip(one.rows, other.rows, strict=True):
        torch.testing.assert_close(a, b)
    assert not other.rows[0].requires_grad
    for at in (range(6), (5, 2, 3), ()):
        gradient = tuple(torch.randn_like(r)[list(at)] for r in real(rows))
        for a, b in zip(one.back(gradient, list(at)), other.back(gradient, list(at)), strict=True):
            torch.testing.assert_close(a, b)
    again = other.back(gradient, list(at))
    assert [len(g) for g in again] == [0, 0]


def test_a_bound_for_each_row() -> None:
    """Longer rows are scaled down. Rows with the bound 0 become 0 and have no gradient."""
    rows = sent()
    lengths = lengths_of(rows)
    most = lengths.clone()
    most[1], most[4] = 0.25, 0
    found = screened(own(lambda lengths, sizes: most), rows)
    expected = lengths.clone()
    expected[1], expected[4] = 0.25, 0
    torch.testing.assert_close(lengths_of(found.rows), expected)
    assert found.back is not None
    gradient = tuple(torch.ones_like(r) for r in real(rows))
    back = found.back(gradient, range(6))
    assert not back[0][4].any()
    assert torch.equal(back[0][[0, 2, 3, 5]], gradient[0][[0, 2, 3, 5]])
    assert not torch.equal(back[0][1], gradient[0][1])


def test_what_bounds_nothing_changes_nothing() -> None:
    rows = sent()
    for rule in (own(lambda lengths, sizes: None), own(lambda lengths, sizes: 1e9), changing(lambda rows: rows)):
        assert screened(rule, rows).rows is rows
        assert screened(rule, rows).back is None
    nan = own(lambda lengths, sizes: lengths * float("nan"))  # the server reports rows that are not finite
    assert screened(nan, rows).rows is rows
    assert not Screening().active
    assert own(lambda lengths, sizes: 1.0).active


def test_what_is_cut_off_from_the_rows_sends_nothing_back() -> None:
    """Constants in place of rows have zero gradients. Other functions have the gradients of autograd."""
    rows = sent()
    gradient = tuple(torch.ones_like(r) for r in real(rows))
    constant = screened(changing(lambda rows: tuple(torch.zeros_like(r) for r in rows)), rows)
    assert constant.back is not None
    assert not any(g.any() for g in constant.back(gradient, range(6)))
    half = screened(changing(lambda rows: (rows[0] / 2, rows[1], rows[2].detach())), rows)
    assert half.back is not None
    first, second = half.back(gradient, range(6))
    assert torch.equal(first, gradient[0] / 2)
    assert not second.any()


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (own(lambda lengths, sizes: -1.0), r"`bound` of the screening 'own' gives -1 for 6 rows: return one length"),
        (own(lambda lengths, sizes: lengths[:2]), r"gives a tensor of the shape \(2,\) for 6 rows"),
        (own(lambda lengths, sizes: lengths[9]), r"`bound` .*failed at .*test_screenings.py:[0-9]+ .*IndexError"),
        (own(lambda lengths, sizes: "long"), r"`bound` of the screening 'own' failed"),
        (changing(lambda rows: rows[:1]), r"`screen` .*gives float64 \(6, 3\) for float64 \(6, 3\), int64 \(6,\), "),
        (changing(lambda rows: tuple(r.float() for r in rows)), r"gives float32 \(6, 3\), float32 \(6,\), "),
        (changing(lambda rows: rows[3]), r"`screen` .*failed at .*test_screenings.py:[0-9]+ .*IndexError"),
    ],
)
def test_what_is_not_a_screening(rule: Screening, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        screened(rule, sent())


@screening("damped", title="Damped")
class Damped(Screening):
    """Numbers above a limit grow only like their logarithm."""

    compares: ClassVar[bool] = False

    damp_above: float = plugins.option(0.1, gt=0)
    """The largest number that does not change."""

    def screen(self, rows: Rows, sizes: Sequence[int]) -> Rows:
        """Damps each number by itself."""
        return tuple(
            torch.where(
                r.abs() > self.damp_above, r.sign() * self.damp_above * (1 + (r.abs() / self.damp_above).log()), r
            )
            if r.is_floating_point()
            else r
            for r in rows
        )


def test_one_of_ones_own_in_python() -> None:
    """Given as a class or an object. All engines give the same result, which differs from that without screening."""
    options: dict[str, Any] = {
        "algorithm": "psl", "model": make(mlp), "data": source((10, 6, 7), (6,)), "clients": 3, "precision": "float64",
        "batch": 4, "rounds": 2, "partition": "column", "cut": "2", "client_lr": 0.05,
    }  # fmt: skip
    local, stacked = (
        Run(**options, screening=Damped(damp_above=0.05), engine=engine) for engine in ("local", "stacked")
    )
    plain = Run(**options, engine="local")
    for run in (local, stacked, plain):
        run.run()
    assert difference(server_state(local), server_state(stacked)) < 1e-12
    assert difference(server_state(local), server_state(plain)) > 1e-6
    assert local.config.resolved()["damp_above"] == 0.05
    assert Run(**options, screening=Damped).config.screening.endswith(":Damped")
    with pytest.raises(ConfigError, match=r"is not derived from cutlayer\.screenings\.Screening"):
        Run(**options, screening=NotOne)


@plugins.register("screening", "not-one", when="split")
class NotOne(plugins.Thing):
    """Not a screening."""


OWN = """
from cutlayer.plugins import option
from cutlayer.screenings import Screening, screening

@screening("quantile_bound")
class QuantileBound(Screening):
    compares = True
    quantile: float = option(0.5, gt=0, le=1)

    def bound(self, lengths, sizes):
        return lengths.quantile(self.quantile)
"""


def test_one_of_ones_own_on_the_command_line(tmp_path: Path) -> None:
    """Its options are flags. If clients take turns, a bound that compares clients has no effect, which is an error."""
    (tmp_path / "own.py").write_text(OWN)
    words = ("run", "--screening", "own.py:QuantileBound", "--quantile", "0.25", "--model", "mlp", "--rounds", "1")
    call(*words, "--algorithm", "psl", "--clients", "3", "--samples-per-client", "8", "--out", "r", cwd=tmp_path)
    assert "quantile = 0.25" in (tmp_path / "r/config.toml").read_text()
    told = call(*words, "--algorithm", "ssl", cwd=tmp_path, code=2).stderr
    assert "QuantileBound' has no effect on ssl: it belongs to " in told


def test_a_comparison_screens_where_it_has_an_effect() -> None:
    """A bound that compares clients is left out, with its options, if clients take turns. A fixed one is kept."""
    given = {"screening": "median_bound", "row_multiple": 3.0}
    c = CompareConfig.of({"algorithms": ("fl", "ssl", "psl"), "seeds": (0,), **given})
    found = {name: runs[0] for name, runs in c.runs(frozenset(c.model_fields_set | set(given))).items()}
    assert {name: run.screening for name, run in found.items()} == {"fl": "none", "ssl": "none", "psl": "median_bound"}
    assert found["psl"].resolved()["row_multiple"] == 3.0
    assert "screening" not in found["fl"].resolved()
    fixed = {"screening": "length_bound", "row_limit": 3.0}
    c = CompareConfig.of({"algorithms": ("fl", "ssl"), "seeds": (0,), **fixed})
    found = {name: runs[0] for name, runs in c.runs(frozenset(c.model_fields_set | set(fixed))).items()}
    assert {name: run.screening for name, run in found.items()} == {"fl": "none", "ssl": "length_bound"}


def test_it_is_the_servers_own_choice() -> None:
    """The handshake compares no option of a screening."""
    for entry in plugins.index("screening").values():
        assert not any(o.shared for o in entry.options)
    assert RunConfig(algorithm="psl", screening="median_bound").specific["row_multiple"] == 2.0
    assert MedianBound().bound(torch.tensor([1.0, 2, 3, 50]), (1, 1, 1, 1)) == 4.0
