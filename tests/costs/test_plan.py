"""Plans, compared with real runs, hand counts and brute force."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math
import struct
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT, Residual, call, made
from torch import Tensor, nn
from torch.nn import functional

from cutlayer import ConfigError, CutError, Run, cut
from cutlayer.costs import breakeven
from cutlayer.costs.breakeven import BreakEven, Duel, break_evens, bytes_of, lines
from cutlayer.costs.expect import Workload, expect
from cutlayer.costs.fleet import fleet
from cutlayer.costs.flops import Flops, ModelFlops, count
from cutlayer.costs.ledger import CONVENTIONS
from cutlayer.costs.measure import candidates, example, measure, placed, survey
from cutlayer.costs.plan import label_bytes, plan
from cutlayer.data.samples import Samples, Source
from cutlayer.models.cut import cut_unproved
from cutlayer.models.zoo import build
from cutlayer.options import PlanConfig
from cutlayer.report.planned import heading, notes

META = torch.device("meta")
DIGITS: dict[str, Any] = {"input": (1, 8, 8), "clients": 4, "samples_per_client": 20}
FLEET: dict[str, Any] = {"client_device": "raspberry-pi-zero-2w", "link": "lte", "server_device": "h100"}
ZOO = [("mlp", "hidden2"), ("cnn", "block1"), ("alexnet", "block1"), ("resnet16", "block4")]
# All algorithms that state their traffic.
ALGORITHMS = ("cl", "fl", "ssl", "psl", "slr", "sfl", "sflv1", "sflv2", "sflv3", "sgl", "sglr")
SPLIT = tuple(a for a in ALGORITHMS if a not in ("cl", "fl"))


def planned(**options: Any) -> Any:
    return plan(PlanConfig.of(options))


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with META:
        return make()


def seven_billion() -> types.ModuleType:
    path = ROOT / "examples" / "seven_billion.py"
    spec = importlib.util.spec_from_file_location("seven_billion", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- against real runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "at"), ZOO[:3])
def test_a_plan_is_what_a_run_counts(model: str, at: str) -> None:
    """The ledger's bytes, FLOPs, time and energy of one epoch, for every algorithm."""
    found = planned(model=model, cut=at, algorithms=ALGORITHMS, **DIGITS, **FLEET)
    runs = ALGORITHMS if model == "mlp" else ("fl", "sglr")
    for cost in found.costs:
        if cost.algorithm not in runs:
            continue
        options = {"clients": 4, "samples_per_client": 20, "data": "digits", "epochs": 1, "test": 30, **FLEET}
        own = {} if cost.algorithm in ("cl", "fl") else {"cut": at}
        run = Run(algorithm=cost.algorithm, model=model, **own, **options)
        result, ledger, e = run.run(), run.training.ledger, cost.expected
        assert e.up + e.once_up == ledger.total("up")
        assert e.down == ledger.total("down")
        assert e.down_broadcast == ledger.total("down", "wire-broadcast")
        assert e.paper == ledger.total("up", "paper") + ledger.total("down", "paper")
        assert (e.client_flops, e.server_flops) == (result.client_flops, result.server_flops)
        assert e.seconds == pytest.approx(result.virtual_seconds)
        assert cost.total == pytest.approx(result.clients_joules / 4)
        assert cost.marginal == pytest.approx(result.clients_marginal_joules / 4)
        if cost.algorithm == "psl":
            assert found.chosen.measured.flops == run.training.flops


@pytest.mark.parametrize("algorithm", ["cl", "fl", "ssl", "psl", "upsl"])
def test_a_plan_with_a_frozen_client_part_is_what_a_run_counts(algorithm: str) -> None:
    """Clients receive no gradients but still wait for the server. Whole models need no gradient at the cut either."""
    own: dict[str, Any] = {} if algorithm in ("cl", "fl") else {"cut": "hidden2"}
    bent: dict[str, Any] = {"tail_cut": "hidden3"} if algorithm == "upsl" else {}
    frozen = {"model": "mlp", "freeze": "hidden1|hidden2"}
    e = planned(**frozen, cut="hidden2", **bent, algorithms=(algorithm,), **DIGITS, **FLEET).costs[0].expected
    options = {"clients": 4, "samples_per_client": 20, "data": "digits", "epochs": 1, "test": 30, **FLEET}
    run = Run(algorithm=algorithm, **frozen, **own, **bent, **options)
    result, ledger = run.run(), run.training.ledger
    assert (e.up + e.once_up, e.down) == (ledger.total("up"), ledger.total("down"))
    assert (e.client_flops, e.server_flops) == (result.client_flops, result.server_flops)
    assert e.seconds == pytest.approx(result.virtual_seconds)


@pytest.mark.parametrize("options", [{}, {"upload_every": 2, "align_every": 1}])
@pytest.mark.parametrize(("model", "at"), ZOO[:2])
def test_a_plan_with_heads_is_what_a_run_counts(model: str, at: str, options: dict[str, int]) -> None:
    names = ("psl", "cse-fsl", "fsl-sage")
    for cost in planned(model=model, cut=at, algorithms=names, **options, **DIGITS, **FLEET).costs[1:]:
        common = {"clients": 4, "samples_per_client": 20, "data": "digits", "epochs": 1, "test": 30, **FLEET}
        own = {k: v for k, v in options.items() if cost.algorithm == "fsl-sage" or k == "upload_every"}
        run = Run(algorithm=cost.algorithm, model=model, cut=at, **common, **own)
        result, ledger, e = run.run(), run.training.ledger, cost.expected
        assert (e.up, e.down) == (ledger.total("up"), ledger.total("down"))
        assert e.paper == ledger.total("up", "paper") + ledger.total("down", "paper")
        assert e.down_broadcast == ledger.total("down", "wire-broadcast")
        assert (e.client_flops, e.server_flops) == (result.client_flops, result.server_flops)
        assert e.seconds == pytest.approx(result.virtual_seconds)
        assert result.virtual_seconds


@pytest.mark.parametrize(("at", "tail"), [("hidden1", "hidden2"), ("hidden1", "hidden3")])
def test_a_plan_with_tails_is_what_a_run_counts(at: str, tail: str) -> None:
    """U-shaped algorithms do not change the plans of the others in the same comparison."""
    bent = ("ussl", "upsl", "usfl", "usglr")
    cuts = {"model": "mlp", "cut": at}
    found = planned(**cuts, tail_cut=tail, algorithms=("fl", "psl", *bent), **DIGITS, **FLEET)
    plain = planned(**cuts, algorithms=("fl", "psl"), **DIGITS, **FLEET)
    assert found.costs[:2] == plain.costs
    assert found.break_evens[: len(plain.break_evens)] == plain.break_evens
    assert {b.algorithm for b in found.break_evens} == {"psl", *bent}
    assert any("cut again after" in line for line in heading(found))
    for cost in found.costs[2:]:
        options = {"clients": 4, "samples_per_client": 20, "data": "digits", "epochs": 1, "test": 30, **FLEET}
        run = Run(algorithm=cost.algorithm, **cuts, tail_cut=tail, **options)
        result, ledger, e = run.run(), run.training.ledger, cost.expected
        assert (e.up, e.down) == (ledger.total("up"), ledger.total("down"))
        assert e.down_broadcast == ledger.total("down", "wire-broadcast")
        assert (e.client_flops, e.server_flops) == (result.client_flops, result.server_flops)
        assert e.seconds == pytest.approx(result.virtual_seconds)
        assert cost.memory > found.costs[1].memory
    alone = planned(**cuts, tail_cut=tail, algorithms=("upsl",), **DIGITS)
    assert alone.chosen.measured.returning


@pytest.mark.parametrize(
    ("up", "down", "algorithms"),
    [
        ("int8", "top-k:0.25", ("psl", "sglr")),
        ("top-k:0.1", "int8", ("ssl", "cse-fsl")),
        ("float8", "int8", ("usglr",)),
    ],
)
def test_a_plan_with_codecs_is_what_a_run_counts(up: str, down: str, algorithms: tuple[str, ...]) -> None:
    """Images have scales per channel, shared by a batch, and the last batch is smaller."""
    codecs = {"up_codec": up, "down_codec": down}
    tail = {"tail_cut": "block2"} if "usglr" in algorithms else {}
    found = planned(model="cnn", cut="block1", **tail, **codecs, algorithms=algorithms, **DIGITS, **FLEET)
    for cost in found.costs:
        options = {"clients": 4, "samples_per_client": 20, "data": "digits", "epochs": 1, "test": 30, **FLEET}
        run = Run(algorithm=cost.algorithm, model="cnn", cut="block1", **tail, **codecs, **options)
        result, ledger, e = run.run(), run.training.ledger, cost.expected
        assert (e.up, e.down) == (ledger.total("up"), ledger.total("down"))
        assert e.down_broadcast == ledger.total("down", "wire-broadcast")
        assert e.paper == ledger.total("up", "paper") + ledger.total("down", "paper")
        assert e.seconds == pytest.approx(result.virtual_seconds)
    planned_as = up if up == down else f"{up} up, {down} down"
    (own,) = (one for one in found.coded if planned_as in one.codecs)
    judged = next(cost for cost in found.costs if cost.algorithm == found.judged)
    assert own.unicast == judged.expected.unicast
    assert [one.unicast for one in found.coded] == sorted((one.unicast for one in found.coded), reverse=True)
    assert found.coded[0].codecs == ("raw",)


def test_what_codecs_write_for_a_batch_decides_a_break_even() -> None:
    """With scales that are shared by a batch, the order changes exactly at the break-even."""
    found = planned(model="cnn", cut="block1", up_codec="int8", down_codec="int8", algorithms=("fl", "psl"), **DIGITS)
    config, work = found.config, found.works["psl"]
    split, whole = config.algorithm("psl"), config.algorithm("fl")
    (at,) = (b for b in found.break_evens if (b.quantity, b.convention) == ("samples per client", "wire-unicast"))
    assert at.last is not None
    assert at.exact == pytest.approx(at.last, abs=work.batch)

    def difference(n: int) -> int:
        dealt = replace(work, samples_per_client=n)
        return expect(split, dealt).unicast - expect(whole, dealt).unicast

    assert difference(at.last) <= 0 < difference(at.last + 1)


def test_up_to_how_many_epochs_data_cost_more() -> None:
    found = planned(model="mlp", algorithms=("cl", "fl", "psl"), **DIGITS)
    raw = {cost.algorithm: cost.expected.unicast for cost in found.costs}
    for b in found.data_break_evens:
        if b.convention == "wire-unicast":
            assert (b.last or 0) == raw["cl"] // raw[b.algorithm]
            assert b.against_name == "cl"
    assert not planned(model="mlp", algorithms=("fl", "psl"), **DIGITS).data_break_evens


@pytest.mark.parametrize("side", ["client", "server"])
def test_memory_by_side(side: str) -> None:
    """The plan's memory is that of each part. The server holds the rows of all clients."""
    found = planned(model="mlp", cut="hidden2", algorithms=("fl", "psl"), **DIGITS)
    memory, m = {one.side: one for one in found.memory}, found.chosen.measured
    part, rows = (m.client, 8) if side == "client" else (m.server, 4 * 8)
    own = memory[side]
    assert (own.frozen, own.gradients, own.moments) == (0, part.trainable, 2 * part.trainable)
    assert own.activations == own.checkpointed == part.fixed + rows * part.per_row
    assert own.total == part.peak(rows, "adam")
    assert memory["client"].trained + memory["server"].trained == memory["client of FL"].trained


@pytest.mark.parametrize(("model", "at"), ZOO)
def test_cuts_without_values_are_those_with_values(model: str, at: str) -> None:
    """A cut without values has the same crossing, parameters, method and FLOPs as a proved cut of the real model."""
    picture = torch.rand(3, 1, 28, 28)
    real = cut(build(model, (1, 28, 28), 10), at, picture)
    net, x = on_meta(lambda: build(model, (1, 28, 28), 10)), picture.to(META)
    parts = cut_unproved(net, at, x)
    assert (parts.crossing, parts.method) == (real.crossing, real.method)
    for a, b in zip(parts.all, real.all, strict=True):
        assert {n: t.shape for n, t in a.state_dict().items()} == {n: t.shape for n, t in b.state_dict().items()}
    assert measure(net, at, x).flops == count(real, picture)


# ---- by hand --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "target", "label"),
    [("regression", (), 4), ("regression", (2,), 8), ("multilabel", (2,), 8), ("binary", (), 8)],
)
def test_a_plan_counts_targets_as_a_run_does(task: str, target: tuple[int, ...], label: int) -> None:
    """The width of the model and the bytes of labels follow from the task and from the shape of a target."""
    config = PlanConfig.of(
        {
            "model": "mlp", "input": (6,), "task": task, "algorithms": ("psl", "cl"), "clients": 2,
            "samples_per_client": 16, "batch": 8, "cut": "hidden2", **({"target": target} if target else {}),
        }
    )  # fmt: skip
    found = plan(config)
    x, y = torch.randn(44, 6), (torch.randn(44, *target) > 0)
    y = y.long() if task == "binary" else y.float()
    held = Samples(x[32:38], y[32:38])
    names = ("no", "yes") if task == "binary" else ()
    source = Source("drawn", Samples(x[:32], y[:32]), held, Samples(x[38:], y[38:]), names)
    for cost in found.costs:
        own = {} if cost.algorithm == "cl" else {"cut": "hidden2"}
        options = {"model": "mlp", "task": task, "clients": 2, "batch": 8, "rounds": 1, **own}
        run = Run(algorithm=cost.algorithm, data=source, **options)
        run.run()
        ledger, e = run.training.ledger, cost.expected
        assert (ledger.total("up"), ledger.total("down")) == (e.up + e.once_up, e.down)
        assert ledger.total("up", "paper") + ledger.total("down", "paper") == e.paper
    assert found.as_dict()["model"]["label_bytes"] == label


def test_a_class_for_each_place() -> None:
    """By default, targets have the input's shape without channels; for a vector of tokens, the whole shape."""

    def label(**options: Any) -> int:
        return label_bytes(PlanConfig.of(options))

    assert label(task="segmentation", input=(3, 8, 9)) == 8 * 72
    assert label(task="segmentation", input=(3, 8, 9), target=(4, 4)) == 8 * 16
    assert label(task="tokens", input=(12,), input_type="int64") == 8 * 12
    assert label(task="regression", target=(5, 2)) == 40
    assert label(task="regression", target=(5, 2), label_bytes=20) == 20


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))


def test_memory_by_hand() -> None:
    """Weights, gradients, Adam's moments and saved tensors, which are the input and each ReLU's output, once each."""
    found = measure(placed(small(), torch.float32), "1", example((6,), torch.float32))
    weights = 4 * (6 * 10 + 10)
    assert (found.client.state, found.client.trainable) == (weights, weights)
    assert (found.client.fixed, found.client.per_row) == (0, 4 * (6 + 10))
    assert found.client.peak(5, "adam") == 4 * weights + 5 * 64
    assert found.client.peak(5, "sgd") == 2 * weights + 5 * 64
    whole = weights + 4 * (10 * 8 + 8 + 8 * 3 + 3)
    assert found.whole.peak(5, "sgd") == 2 * whole + 5 * 4 * (6 + 10 + 8)
    assert found.parameters == whole // 4
    half = measure(placed(small(), torch.bfloat16), "1", example((6,), torch.bfloat16))
    assert half.client.peak(5, "adam") == found.client.peak(5, "adam") // 2
    assert half.smashed == found.smashed // 2 == 20


def test_frozen_parameters_have_no_gradients() -> None:
    net = placed(small(), torch.float32)
    net[0].requires_grad_(False)
    found = measure(net, "2", example((6,), torch.float32))
    assert found.client.trainable == 4 * (10 * 8 + 8)
    assert found.client.state == 4 * (6 * 10 + 10 + 10 * 8 + 8)
    assert found.flops.client == Flops(2 * (60 + 80), 2 * 80)


def test_a_single_row_is_measured_from_more() -> None:
    """Batch normalisation cannot train on one row, so its memory is derived from larger batches."""
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    found = measure(placed(net, torch.float32), "1", example((4,), torch.float32))
    assert found.client.per_row == 4 * (4 + 5)
    assert found.client.fixed == 2 * 4 * 5  # mean and deviation
    assert found.client.state == 4 * (25 + 10 + 10) + 8  # with running statistics and the number of batches


def test_all_that_crosses_is_counted() -> None:
    """Inside a residual block, two tensors cross. The FLOPs are those of the parts."""
    net = placed(nn.Sequential(nn.Linear(6, 8), Residual(8), nn.Linear(8, 4)), torch.float32)
    x = example((6,), torch.float32)
    found = measure(net, "1.first", x)
    assert found.smashed == found.gradient == 2 * 8 * 4
    assert found.flops == count(cut_unproved(net, "1.first", x), x)


class Masked(nn.Module):
    """Token ids [R, n] -> scores. A mask made from the ids crosses and has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        keep = ids != 0  # [R, n]
        x = torch.tanh(self.mix(torch.tanh(self.embed(ids))))
        return self.head((x * keep[..., None]).sum(1))


def test_masks_go_up_and_not_down() -> None:
    found = plan(PlanConfig(cut="embed", input=(7,), input_type="int64", clients=2, samples_per_client=5), Masked)
    m = found.chosen.measured
    assert m.smashed == 7 * 4 * 4 + 7
    assert m.gradient == 7 * 4 * 4
    psl = next(c.expected for c in found.costs if c.algorithm == "psl")
    assert (psl.up, psl.down) == (10 * (m.smashed + 8), 10 * m.gradient)


class Tied(nn.Module):
    """The first and the last layer share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.final = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.final.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.final(functional.relu(self.middle(functional.relu(self.first(x)))))


def test_tied_weights_on_both_sides_are_refused() -> None:
    with pytest.raises(CutError, match="used on both sides"):
        cut(Tied(), "middle", torch.rand(4, 6))
    with pytest.raises(CutError, match="used on both sides"):
        plan(PlanConfig(cut="middle", input=(6,)), Tied())
    assert placed(Tied(), torch.float32).final.weight is not None
    tied = placed(Tied(), torch.float32)
    assert tied.final.weight is tied.first.weight
    with pytest.raises(CutError, match=r"cannot be cut at its children.*both sides"):
        plan(PlanConfig(cut="all", input=(6,)), Tied())


class Attention(nn.Module):
    """[R, n, d] -> scores, through fused attention."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.into(x).chunk(3, -1))  # [R, 4, n, 4]
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2).mean(1))


def test_attention_is_counted_and_keeps_no_scores() -> None:
    """FLOPs include attention's products. Memory is that of a real device, whose kernel keeps no [n, n] scores."""
    rows, length, width = 2, 32, 16
    net = Attention()
    found = measure(placed(net, torch.float32), "into", example((length, width), torch.float32, rows))
    products = 2 * 2 * length * length * width
    assert found.flops.server.forward == products + 2 * width * 3
    assert found.flops.server.backward == 2 * products + 2 * 2 * width * 3
    saved: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}

    def save(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        alive.append(t)
        return t

    alive: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        net(torch.rand(rows, length, width))
    kept = sum(n for at, n in saved.items() if at not in own)
    assert found.whole.fixed + rows * found.whole.per_row == kept


# ---- all cuts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["mlp", "cnn", "alexnet", pytest.param("resnet16", marks=pytest.mark.slow)])
def test_one_pass_of_the_whole_is_what_the_parts_count(model: str) -> None:
    net, x = on_meta(lambda: build(model, (1, 28, 28), 10)), example((1, 28, 28), torch.float32)
    found = survey(net, x)
    names = [c.name for c in found.cuts]
    order = [n for n in dict(net.named_modules()) if n in names]
    children = [n for n, _ in net.named_children()]
    assert sorted(names, key=lambda n: children.index(n.split(".")[0])) == names
    assert set(order) == set(names)
    assert {"head"} <= set(found.refused)
    assert [c.client_parameters for c in found.cuts] == sorted(c.client_parameters for c in found.cuts)
    for c in found.cuts:
        alone = measure(net, c.name, x)
        assert c == alone
        assert c.flops == count(cut_unproved(net, c.name, x), x)
        assert c.flops.whole.forward == found.cuts[0].flops.whole.forward


def test_candidates_are_children_and_members_of_lists() -> None:
    net = seven_billion().Decoder(8, 16, 2, 3, 11)
    assert candidates(net) == ["embedding", "blocks.0", "blocks.1", "blocks.2", "norm", "head"]

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.out = net, nn.Linear(11, 3)

    assert [n for n in candidates(Wrapped()) if "blocks" in n] == ["model.blocks.0", "model.blocks.1", "model.blocks.2"]


def test_the_server_computes_at_the_rate_of_the_precision() -> None:
    options = {**DIGITS, **FLEET, "model": "mlp", "algorithms": ("psl", "sglr")}
    plain, narrow = planned(**options), planned(**options, precision="bfloat16")
    for slow, fast in zip(plain.costs, narrow.costs, strict=True):
        assert slow.expected.server_flops == fast.expected.server_flops
        served = [c.server_share * c.expected.seconds for c in (slow, fast)]
        assert served[0] / served[1] == pytest.approx(989.4 / 67)
        assert slow.expected.server_joules == pytest.approx(fast.expected.server_joules * 989.4 / 67)
    assert plain.notes == ()
    (note,) = narrow.notes
    assert note.startswith(
        "raspberry-pi-zero-2w has no known rate in bfloat16: its float32 rate, 370 MFLOP/s, is used."
    )
    assert note in notes(narrow)
    assert narrow.as_dict()["notes"] == [note]


def test_a_device_without_a_rate_keeps_its_float32_rate(tmp_path: Path) -> None:
    """In float16, clients compute as long as in float32 unless a profile states a rate."""
    own = "[device.desk]\nflops_per_second = 1e6\nwatts = 2.0\nsource = 'me'\n"
    (tmp_path / "plain.toml").write_text(own)
    (tmp_path / "known.toml").write_text(f"{own}rates.float16 = 4e6\n")
    options = {**DIGITS, **FLEET, "model": "mlp", "algorithms": ("psl",), "client_device": "desk"}

    def computing(profiles: str, precision: str) -> float:
        found = planned(**options, profiles=str(tmp_path / profiles), precision=precision)
        noted = [note.split()[0] for note in found.notes]
        assert noted == (["desk"] if (profiles, precision) == ("plain.toml", "float16") else [])
        return found.costs[0].expected.clients.computing  # type: ignore[no-any-return]

    plain = computing("plain.toml", "float32")
    assert computing("plain.toml", "float16") == computing("known.toml", "float32") == plain
    assert computing("known.toml", "float16") == pytest.approx(plain / 4)


def test_the_best_cut_by_brute_force() -> None:
    options = {**DIGITS, **FLEET, "model": "alexnet", "cut": "all"}
    free = planned(**options)
    for budgets in (
        {},
        {"memory_budget": 0.0025},
        {"energy_budget": 1.0},
        {"memory_budget": 0.0015, "energy_budget": 4.0},
    ):
        found = planned(**options, **budgets)
        fitting = [
            c
            for c in free.cuts
            if c.cost.memory <= 1e9 * budgets.get("memory_budget", 1e9)
            and c.cost.marginal <= budgets.get("energy_budget", 1e9)
        ]
        assert [c.measured.name for c in found.cuts if c.strain <= 1] == [c.measured.name for c in fitting]
        if not fitting:
            assert found.bests == {}
            continue
        least = min(c.costs.unicast for c in fitting)
        ties = [c for c in fitting if c.costs.unicast == least]
        assert found.bests["bytes"] == min(ties, key=lambda c: c.costs.client_flops).measured.name
        assert found.bests["energy"] == min(fitting, key=lambda c: c.cost.marginal).measured.name
        assert found.bests["time"] == min(fitting, key=lambda c: c.costs.seconds).measured.name
        assert found.chosen.measured.name == found.bests["bytes"]
    none = planned(**options, memory_budget=1e-9)
    nearest = min(free.cuts, key=lambda c: c.cost.memory)
    assert none.bests == {}
    assert none.chosen.measured.name == nearest.measured.name
    assert none.verdict.startswith("No cut is within 1 B of a client's memory: ")
    assert f"'{nearest.measured.name}' comes nearest" in none.verdict


# ---- break-evens ----------------------------------------------------------------------------------------------------

WORK = Workload(
    clients=10,
    samples_per_client=100,
    batch=8,
    smashed=500,
    gradient=400,
    label=8,
    raw=3000,
    model=200_000,
    client_model=30_000,
    flops=ModelFlops(Flops(1e6, 2e6), Flops(9e6, 18e6)),
)


def duel(algorithm: str) -> Duel:
    return Duel(made(algorithm), made("fl"))


def at(b: BreakEven, value: int, work: Workload, phi: float) -> tuple[int, int]:
    """Bytes of the algorithm and of fl if the break-even's quantity is `value`."""
    if b.quantity == "samples per client":
        work = replace(work, samples_per_client=value)
    elif b.quantity == "model bytes":
        work = replace(work, model=value)
    else:
        work = replace(work, clients=value, samples_per_client=work.samples / value)  # type: ignore[arg-type]
    assert b.convention is not None
    own, federated = made(b.algorithm, phi=phi), made("fl")
    return bytes_of(expect(own, work), b.convention), bytes_of(expect(federated, work), b.convention)


@pytest.mark.parametrize("phi", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("algorithm", SPLIT)
def test_on_both_sides_of_a_break_even_the_order_differs(algorithm: str, phi: float) -> None:
    """The closed form is the point of change, up to the rounding of the number of active clients."""
    work = WORK
    found = break_evens([(made(algorithm, phi=phi), work), (made("fl"), work)], None)
    assert len(found) == 3 * len(CONVENTIONS)
    for b in found:
        if b.last is None:
            assert b.dearer in ("always", "never")
            for value in (1, 10, 10**4, 10**7):
                own, federated = at(b, value, work, phi)
                assert (own > federated) == (b.dearer == "always")
            continue
        (below, fl_below), (above, fl_above) = at(b, b.last, work, phi), at(b, b.last + 1, work, phi)
        if b.dearer == "above":
            assert below <= fl_below
            assert above > fl_above
        else:
            assert below >= fl_below
            assert above < fl_above
        assert b.exact is not None
        if not (b.quantity == "clients" and phi == 0.5):
            assert b.last == math.floor(b.exact)
        else:
            assert abs(b.last - b.exact) <= 2


def test_ssl_with_most_of_the_model_costs_more_with_many_clients() -> None:
    """By wire-broadcast, fl sends its model down once, SSL to client after client. The test tries all client counts."""
    work = replace(WORK, clients=2, samples_per_client=12, smashed=6, gradient=6, label=1, model=430, client_model=245)
    found = breakeven.clients(duel("ssl"), work, "wire-broadcast")

    def dearer(c: int) -> bool:
        return 24 * (6 + 6 + 1) + 2 * (c - 1) * 245 > (c + 1) * 430

    assert (found.dearer, found.last) == ("above", max(c for c in range(1, 200) if not dearer(c)))
    assert found.where == "up to 10"
    few = breakeven.clients(duel("ssl"), replace(work, samples_per_client=1000), "wire-broadcast")
    assert few.where == "never"


def test_break_evens_that_read_alike_are_one_line() -> None:
    found = [breakeven.model_size(duel(a), WORK, "wire-unicast") for a in ("psl", "sfl")]
    near = [replace(found[0], last=12_500_000), replace(found[1], last=12_500_321)]
    assert lines(near) == [("wire-unicast", ["PSL", "SFL"], {"model bytes": "above 12.5 MB"})]


def test_the_papers_break_even() -> None:
    """At the paper's sizes, PSL and FL cost the same at 2 C S(w) = 2 |D| S(L)."""
    work = replace(WORK, clients=100, smashed=24_000, gradient=24_000, model=200_000_000, client_model=67_000_000)
    psl = breakeven.samples_per_client(duel("psl"), work, "paper")
    assert psl.exact == pytest.approx(200_000 / 24)
    assert psl.last == 8333
    size = breakeven.model_size(duel("psl"), replace(work, samples_per_client=500), "paper")
    assert size.exact == 500 * 24_000
    assert breakeven.clients(duel("psl"), replace(work, samples_per_client=500), "paper").last == 6
    assert psl.where == "up to 8,333"


@pytest.mark.parametrize("algorithm", ["psl", "sfl", "sglr", "ssl"])
def test_time_breaks_even_where_it_says(algorithm: str) -> None:
    kinds = set()
    for device, model in itertools.product(("mac-mini-m4", "raspberry-pi-zero-2w"), (10_000, 10**6, 10**8, 10**10)):
        machines = fleet(PlanConfig(**{**FLEET, "client_device": device}, latency_ms=0.0), 10)
        work = replace(WORK, model=model)
        b = breakeven.duration(duel(algorithm), work, machines)
        kinds.add(b.dearer)

        def longer(n: int, work: Workload = work, machines: Any = machines) -> bool:
            both = (made(a) for a in (algorithm, "fl"))
            own, other = (expect(a, replace(work, samples_per_client=n), machines).seconds for a in both)
            return own > other * (1 + 1e-12)  # type: ignore[operator]

        if b.last is None:
            assert {longer(n) for n in (1, 8, 80, 8000)} == {b.dearer == "always"}
        else:
            assert (longer(b.last), longer(b.last + 1)) == ((False, True) if b.dearer == "above" else (True, False))
    assert len(kinds) > 1


def test_a_line_is_there_once_for_all_that_say_the_same() -> None:
    found = [breakeven.samples_per_client(duel(a), WORK, "wire-unicast") for a in ("psl", "sglr", "sfl")]
    first, second = lines(found)
    assert first == ("wire-unicast", ["PSL", "SGLR"], {"samples per client": "up to 440"})
    assert second[1] == ["SFL"]


# ---- large ----------------------------------------------------------------------------------------------------------


def test_a_million_clients_and_billions_of_parameters() -> None:
    """An eighth of the example's blocks, a billion parameters: FLOPs as by hand, planned within a minute."""
    seven, length, width, hidden = seven_billion(), 512, 4096, 11008
    start = time.process_time()
    config = PlanConfig(
        cut="blocks.1",
        input=(length,),
        input_type="int64",
        precision="bfloat16",
        clients=10**6,
        samples_per_client=100,
        batch=1,
        client_device="jetson-orin-nano",
        link="lte",
        server_device="h100",
        servers=1000,
    )
    found = plan(config, lambda: seven.Decoder(width, hidden, 32, 4, 32000))
    assert time.process_time() - start < 60
    m = found.chosen.measured
    block = 4 * width**2 + 3 * width * hidden + 2 * width
    assert m.parameters == 2 * 32000 * width + 4 * block + width
    assert m.client_parameters == 32000 * width + 2 * block
    assert (m.smashed, m.gradient) == (2 * length * width, 2 * length * width)
    products = 2 * length * (4 * width**2 + 3 * width * hidden) + 2 * 2 * length**2 * width
    assert m.flops.client == Flops(2 * products, 2 * 2 * products)
    assert m.flops.server.forward == 2 * products + 2 * width * 32000
    sglr = next(c for c in found.costs if c.algorithm == "sglr")
    assert sglr.expected.up == 10**8 * (m.smashed + 8)
    assert sglr.expected.down_broadcast == (500_000 + 1) * 100 * m.gradient
    assert sglr.memory == 4 * m.client.state + m.client.fixed + m.client.per_row
    assert sglr.total is None  # the device's idle power is not known
    one = plan(config.model_copy(update={"servers": 1}), lambda: seven.Decoder(width, hidden, 32, 4, 32000))
    alone = next(c for c in one.costs if c.algorithm == "sglr")
    assert sglr.expected.server_joules == pytest.approx(alone.expected.server_joules)
    served = [c.expected.seconds * c.server_share for c in (alone, sglr)]
    assert served[0] == pytest.approx(1000 * served[1])
    assert served[0] == pytest.approx(10**8 * m.flops.server.training / 989.4e12)  # its rate in bfloat16
    assert served[0] / alone.expected.seconds == alone.server_share > 0.99
    # A client's own epoch: 100 samples at its float32 rate, the only one that is known.
    assert sglr.marginal - 100 * m.flops.client.training / 1.28e12 * 15 == pytest.approx(
        (0.0767 * sglr.expected.up + 0.0115 * sglr.expected.down) * 8 / 1e6 / 10**6
    )
    (note,) = found.notes
    assert note.startswith("jetson-orin-nano has no known rate in bfloat16: its float32 rate, 1.28 TFLOP/s, is used.")


@pytest.mark.slow
def test_all_cuts_of_seven_billion() -> None:
    seven = seven_billion()
    config = PlanConfig(cut="all", input=(2048,), input_type="int64", precision="bfloat16", clients=10**6, batch=1)
    start = time.process_time()
    found = plan(config, seven.model)
    assert time.process_time() - start < 60
    assert [c.measured.name for c in found.cuts] == ["embedding", *(f"blocks.{i}" for i in range(32)), "norm"]
    assert found.chosen.measured.parameters == 6_738_415_616
    net, x = placed(on_meta(seven.model), torch.bfloat16), example((2048,), torch.int64)
    assert found.cuts[16].measured.flops == count(cut_unproved(net, "blocks.15", x), x)


def test_the_example_runs_with_values_too() -> None:
    """A smaller model, cut with the proof, has the same crossing and parameters as without values."""
    seven, ids = seven_billion(), torch.randint(0, 11, (4, 6))
    net = seven.Decoder(16, 32, 4, 3, 11)
    real = cut(net, "blocks.1", ids)
    parts = cut_unproved(placed(net, torch.float32), "blocks.1", ids.to(META))
    assert (parts.crossing, parts.method) == (real.crossing, real.method)
    assert set(parts.client.state_dict()) == set(real.client.state_dict())


def test_models_that_cannot_be_traced_are_replayed() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.relu(layer(x)) if x.shape[1] > 2 and bool(x.dim() == 2) else x
            return self.head(x) if len(x) else x

    net, rows = Branching(), torch.rand(4, 6)
    real, parts = cut(net, "layers.1", rows), cut_unproved(placed(net, torch.float32), "layers.1", rows.to(META))
    assert real.method == parts.method == "hooks"
    assert real.crossing == parts.crossing
    found = survey(placed(net, torch.float32), rows.to(META))
    assert [c.name for c in found.cuts] == ["layers.0", "layers.1", "layers.2"]
    assert [c.client_parameters for c in found.cuts] == [42, 84, 126]
    assert found.cuts[1].flops == count(parts, rows.to(META))


# ---- bad input ------------------------------------------------------------------------------------------------------


def needs_values() -> nn.Module:
    net = small()
    nn.init.constant_(net[0].weight, float(net[0].weight.sum()))
    return net


def no_module() -> Any:
    return 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"client_device": "raspberry-pi-44", "link": "lte"}, ["'raspberry-pi-44'", "did you mean 'raspberry-pi-4'"]),
        ({**FLEET, "up_mbps": -1.0}, ["up_mbps = -1.0", "greater than 0"]),
        ({"cut": "blok1"}, ["'blok1'", "did you mean 'block1'", "hidden"]),
        ({"cut": "head"}, ["'head'", "nothing is computed after"]),
        ({"model": "cn"}, ["'cn'", "did you mean 'cnn'", "file.py:name"]),
        ({"model": "nowhere.py:model"}, ["nowhere.py", "there is no file"]),
        ({"model": "test_plan:smal"}, ["did you mean 'small'"]),
        ({"model": "no_such_package.models:net"}, ["no_such_package", "cannot be imported"]),
        ({"model": "test_plan:needs_values", "input": (6,)}, ["meta device", "item()", "without reading values"]),
        ({"model": "test_plan:no_module"}, ["returns a int", "nn.Module"]),
        ({"model": "test_plan:small", "input": (7,)}, ["shape (7,)", "--input"]),
        ({"model": "test_plan:small", "input": (6,), "classes": 3}, ["classes = 3", "no effect"]),
        ({"input": (28, 28)}, ["cnn", "(28, 28)"]),
        ({"input": (1, 0, 28)}, ["[1, 0, 28]", "sizes of 1 or more"]),
        ({"input": ()}, ["[]", "shape"]),
        ({"phi": 1.5}, ["phi = 1.5"]),
        ({"memory_budget": 0}, ["memory_budget = 0", "greater than 0"]),
        ({**FLEET, "energy_budget": -2.0}, ["energy_budget = -2.0", "greater than 0"]),
        ({"energy_budget": 2.0}, ["energy_budget = 2.0", "without client_device"]),
        (
            {"client_device": "raspberry-pi-4", "up_mbps": 1.0, "down_mbps": 1.0, "energy_budget": 2.0},
            ["energy_budget = 2", "no figures"],
        ),
        ({"servers": 3}, ["servers = 3", "without server_device"]),
        ({"seed": 3}, ["seed = 3", "without client_device"]),
        ({"link": "lte"}, ["link = 'lte'", "without client_device"]),
        ({"algorithms": ("fl", "sgrl")}, ["'sgrl'", "did you mean 'sgl"]),
        ({"algorithms": ("psl", "ussl")}, ["ussl needs tail_cut", "--tail-cut hidden3"]),
        ({"algorithms": ("psl",), "tail_cut": "3"}, ["tail_cut = '3' has no effect on psl", "U-shaped"]),
        (
            {"algorithms": ("ussl",), "model": "mlp", "cut": "all", "tail_cut": "hidden3"},
            ["tail_cut = 'hidden3' needs one cut before it"],
        ),
        (
            {"algorithms": ("ussl",), "model": "mlp", "cut": "hidden3", "tail_cut": "hidden1"},
            ["tail_cut = 'hidden1' does not come after cut = 'hidden3'"],
        ),
        (
            {"algorithms": ("ussl",), "model": "mlp", "cut": "hidden1", "tail_cut": "hiden3"},
            ["'hiden3'", "did you mean 'hidden3'"],
        ),
        ({"algorithms": ("fl", "fl")}, ["'fl' twice"]),
        ({"algorithms": ()}, ["algorithms is empty"]),
        ({"task": "regresion"}, ["unknown task 'regresion'", "did you mean 'regression'"]),
        ({"task": "regression", "classes": 3}, ["classes = 3", "'regression'", "give their shape with target"]),
        ({"task": "binary", "target": (3,)}, ["target = [3]", "'binary'", "leave it out"]),
        ({"task": "regression", "target": (0,)}, ["target = [0]", "sizes of 1 or more"]),
        ({"precision": "float8"}, ["'float8'", "float32, bfloat16, float16"]),
    ],
)
def test_bad_input(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises((ConfigError, CutError)) as error:
        planned(**options)
    text = str(error.value)
    assert all(word in text for word in words), text
    assert "\n" not in text


# ---- the command line -----------------------------------------------------------------------------------------------


def test_the_command_prints_tables_and_writes_files(tmp_path: Path) -> None:
    """Needs no data and trains nothing. Flags override the options of a file."""
    (tmp_path / "own.py").write_text(
        "from dataclasses import dataclass\nfrom torch import nn\n\n\n@dataclass\nclass Sizes:\n    wide: int = 12\n\n"
        "def net():\n    n = Sizes().wide\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, n), nn.ReLU(), "
        "nn.Linear(n, 10))\n"
    )
    (tmp_path / "plan.toml").write_text(
        'model = "own.py:net"\ninput = [8, 8]\nclients = 7\nclient-device = "raspberry-pi-4"\nlink = "lte"\n'
    )
    line = "plan --config plan.toml --clients 5 --memory-budget 1 --algorithms fl psl sglr --out here"
    printed = call(*line.split(), cwd=tmp_path).stdout
    assert {p.name for p in (tmp_path / "here").iterdir()} == {"plan.json", "plan.png"}
    content = (tmp_path / "here" / "plan.png").read_bytes()
    assert content[:4] == b"\x89PNG"
    assert struct.unpack(">II", content[16:24]) > (2000, 500)
    stored = json.loads((tmp_path / "here" / "plan.json").read_text())
    assert stored["config"]["clients"] == 5
    assert [row["cut"] for row in stored["cuts"]] == ["1", "2"]
    assert stored["refused"] == {
        "0": "the raw input itself would be sent (to mean that, say 'input'): no privacy would be left",
        "3": "nothing is computed after '3'",
    }
    for words in (
        "5 clients",
        "SGLR",
        "not known",
        "Where they cost no more than FL",
        "time on these machines",
        "Of the cuts within 1.00 GB",
    ):
        assert words in printed, words
    refused = call(*line.split(), cwd=tmp_path, code=2)
    assert refused.stderr == "error: 'here' already holds files: choose another --out\n"


def test_json_and_exit_codes(tmp_path: Path) -> None:
    done = call("plan", "--model", "mlp", "--input", "8", "8", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert found["cut"] == "hidden2"
    assert [row["algorithm"] for row in found["algorithms"]] == ["cl", "fl", "ssl", "psl", "sfl", "sglr"]
    assert found["algorithms"][0]["seconds"] is None
    assert all(set(b) >= {"sentence", "last", "dearer", "exact"} for b in found["break_evens"])
    assert found == json.loads(json.dumps(planned(model="mlp", input=(8, 8)).as_dict()))
    for flags, words in (("--phi 2", "phi = 2"), ("--precision float8", "float16"), ("--cut nowhere", "'nowhere'")):
        refused = call("plan", *flags.split(), cwd=tmp_path, code=2)
        assert refused.stderr.startswith("error: ")
        assert words in refused.stderr
        assert refused.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_list_profiles_says_what_is_not_known(tmp_path: Path) -> None:
    printed = call("list", "profiles", cwd=tmp_path).stdout
    assert all(word in printed for word in ("raspberry-pi-4", "lte", "11.889 GFLOP/s", "not known", "geerlingguy"))
    row = next(line for line in printed.splitlines() if "989,400" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["h100", "989,400", "989,400", "494,700", "66,900"]
    assert "h100: NVIDIA's white paper" in printed
    assert "raspberry-pi-5       │ not known │" in printed


def test_the_model_is_left_as_it_is() -> None:
    net = small()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    random = torch.get_rng_state()
    plan(PlanConfig(cut="all", input=(6,)), net)
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    assert all(p.device.type == "cpu" and p.grad is None for p in net.parameters())
    assert torch.equal(random, torch.get_rng_state())
    assert dataclasses.is_dataclass(plan(PlanConfig(cut="output", input=(6,)), net))
