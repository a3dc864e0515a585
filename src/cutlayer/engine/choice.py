"""Chooses the engine that simulates the clients, and how it computes: by rule or by measurement, and only in proven
ways.

`stacked` is used if possible, otherwise `local`, with the reason. Measurements only decide which of several equal ways
is the fastest for the model's own shapes (`tuning.py`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn

from cutlayer.algorithms import Algorithm
from cutlayer.allocator import sharing
from cutlayer.collective import world
from cutlayer.engine.layout import in_layout, layouts, same, smashed
from cutlayer.engine.remembered import key, recalled, remember
from cutlayer.engine.simulated import gradient_bytes
from cutlayer.engine.stackable import Stackability, bytes_per_row, stackable, unlike_alone
from cutlayer.engine.stacked import StackedCohort
from cutlayer.engine.tuning import MARGIN, Timed, Tuner
from cutlayer.engine.union import UnionCohort, row_by_row
from cutlayer.engine.ways import EngineName, Layout, Stacking, Way, Ways
from cutlayer.errors import ConfigError, CutlayerWarning
from cutlayer.models import Parts
from cutlayer.models.likeness import Established, of_tensor
from cutlayer.optim import ELEMENTWISE, MakeOptimizer, rule_of
from cutlayer.options import RunConfig
from cutlayer.types import Rows
from cutlayer.verbs import BACKWARD, LEARN, STEP_EACH

# Bytes of results of a group of clients in a forward pass: beyond this, larger groups are not faster.
_WORTHWHILE = 256 << 20
# Bytes of weights of a group on the CPU, which stay in the cache until the backward pass (measured).
_CACHED = 8 << 20
# Rows that a run trains on below which nothing is measured; the shortest time in which something can be, the usual one,
# and the longest, in seconds; the share of a run that it may take, and the share up to the usual time.
_FEWEST, _SHORTEST, _HALF, _LONGEST, _OF_LONG, _OF_SHORT = 5000, 0.02, 0.5, 5.0, 0.01, 0.05

_STACKABLE = Established()
_ESTIMATED = 16  # rows whose time gives an estimate for the whole run

Side = Literal["clients", "copies"]


@dataclass(frozen=True)
class Work:
    """The size of a run: `clients` are enrolled, `taking_part` of them at a time; `rows` are all training rows."""

    clients: int
    taking_part: int
    rows: float


@dataclass(frozen=True, eq=False)
class Chosen:
    """The parts as they are computed, and how; `remark` says what was measured, if anything."""

    split: Parts
    ways: Ways
    remark: str = ""


class Choice:
    """The possible choices for a run. `optimizers` are the clients' and the server's; `example`, each [n, s...], are a
    few rows for the proofs, `typical` some more for measurements: values matter, since processors predict branches.
    `head` is an auxiliary head, if clients have one.
    """

    def __init__(
        self,
        config: RunConfig,
        algorithm: Algorithm,
        split: Parts,
        optimizers: tuple[MakeOptimizer, MakeOptimizer],
        example: Rows,
        work: Work,
        typical: Rows | None = None,
        head: nn.Module | None = None,
    ) -> None:
        self.config, self.split, self.work, self.example = config, split, work, example
        self._tail = split.tail if head is None else head
        self._typical = example if typical is None else typical
        self.traits, self.averages_every_step = algorithm.traits, algorithm.averages_every_step
        self._means = config.thing("averaging", config.averaging).plain
        self.device = example[0].device
        self._makes = dict(zip(("clients", "copies"), optimizers, strict=True))
        self._plain: dict[Side, nn.Module] = {"clients": split.client, "copies": split.server}
        self._rows = {"clients": example, "copies": smashed(split.client, example)}
        self._parts: dict[tuple[Side, Layout], nn.Module] = {}
        self._verdicts: dict[tuple[Side, Layout], Stackability] = {}

    def made(self, stored: Ways | None = None) -> Chosen:
        """As `stored`, if a run is continued; otherwise the engine by rule and, if that is worth the time, the fastest
        ways. Warns if a model cannot be stacked. Raises ConfigError if the requested engine lacks a verb.
        """
        engine = self._engine()
        if stored is not None and self._proven(stored, engine):
            return self._chosen(stored)
        ruled = self._by_rule(engine)
        tune = self.config.tune if "tune" in self.config.given else os.environ.get("CUTLAYER_TUNE", self.config.tune)
        if tune == "off" or self.config.engine == "local":
            return self._chosen(ruled)
        name = key(self._subject())
        if (known := recalled(name)) is not None and self._proven(known, engine):
            return self._chosen(known, f"As measured here before: {known} (tune)")
        if tune == "cached" or (budget := self._budget()) < _SHORTEST:
            return self._chosen(ruled)
        tuner = Tuner(budget, self.device)
        found = self._quickest(tuner, ruled)
        remember(name, found)
        return self._chosen(found, f"Measured in {tuner.spent:.2g} s: {found} (tune)")

    def _chosen(self, ways: Ways, remark: str = "") -> Chosen:
        client = self._part("clients", ways.client_layout)
        server = self._part("copies", ways.server_layout)
        return Chosen(replace(self.split, client=client, server=server), ways, remark)

    # By rule

    def _engine(self) -> EngineName:
        config, needs = self.config, self.traits.needs
        nothing_to_stack = self.traits.takes_turns or self.work.clients == 1
        if config.engine == "local" or (nothing_to_stack and config.engine == "auto"):
            return "local"
        if config.engine == "auto" and not world().several and self._one_union_step():
            return "union"
        if config.engine == "auto" and self.traits.gradients_cross:  # equal models: nothing to gain
            return "local"
        if config.engine == "stacked" and (lacking := sorted(needs - StackedCohort.can)):
            raise ConfigError(
                f"engine = 'stacked' cannot run {config.algorithm}, which needs {', '.join(lacking)}: choose 'local' "
                "or 'auto'"
            )
        if why := self._unfit() or self._unstackable():
            warnings.warn(f"{config.algorithm} runs on the local engine: {why}", CutlayerWarning, stacklevel=6)
            return "local"
        return "stacked"

    @property
    def _stacked(self) -> Sequence[Side]:
        """The sides that have copies to stack."""
        return ("clients", "copies") if self.traits.server_copies else ("clients",)

    def _unfit(self) -> str:
        """Why this algorithm or its optimisers cannot be stacked with any model; empty if they can."""
        if lacking := sorted(self.traits.needs - StackedCohort.can):
            return f"it needs {', '.join(lacking)}, which the stacked engine cannot do"
        if self.traits.needs >= {LEARN, BACKWARD} and not rule_of(self._makes["clients"]).plain:
            return "its clients' heads may step less often than their models, and the optimiser counts steps"
        for make in (self._makes[side] for side in self._stacked):
            if make.own:
                if why := unlike_alone(make):
                    return f"the rule of {make.name} is not elementwise: {why}"
            elif make.name not in ELEMENTWISE:
                return f"the rule of {make.name} is not elementwise"
        return ""

    def _unstackable(self) -> str:
        """Why the model cannot be stacked; empty if it can."""
        for side in self._stacked:
            if reason := self._verdict(side, "plain").reason:
                return f"the model's {'client' if side == 'clients' else 'server'} part cannot be stacked: {reason}"
        if self._tail is None:
            return ""
        if (verdict := self._of_tail).reason:
            return f"the {'tail' if self.traits.u_shaped else 'auxiliary head'} cannot be stacked: {verdict.reason}"
        if {id(p) for p in self._tail.parameters()} & {id(p) for p in self.split.client.parameters()}:
            return "the clients' two parts share weights"
        if not self._common_ways(self._verdict("clients", "plain").ways):
            return "the clients' two parts cannot be stacked in the same way"
        return ""

    @cached_property
    def _of_tail(self) -> Stackability:
        """Whether the clients' tails, or auxiliary heads, can be stacked."""
        assert self._tail is not None, "it is asked where there is one"
        rows = smashed(self.split.server, self._rows["copies"]) if self.traits.u_shaped else self._rows["copies"]
        return stackable(self._tail, rows, self._makes["clients"], data=False)

    def _ways_of(self, side: Side, layout: Layout) -> tuple[Way, ...]:
        ways = self._verdict(side, layout).ways
        return self._common_ways(ways) if side == "clients" else ways

    def _common_ways(self, ways: tuple[Way, ...]) -> tuple[Way, ...]:
        """The clients' ways in which their tails can be computed, too."""
        return ways if self._tail is None else tuple(way for way in ways if way in self._of_tail.ways)

    def _one_union_step(self) -> bool:
        """Whether every step is followed by averaging, from equal models, with rules that allow to compute both as one
        step.
        """
        make, make_server, copies = self._makes["clients"], self._makes["copies"], self.traits.server_copies
        together = self.traits.gradients_cross
        if not (self.averages_every_step or together) or self.traits.needs - UnionCohort.can:
            return False
        if together and not (self.averages_every_step or self.config.attack):  # all take the same steps
            return row_by_row(self.split.client, self.example)
        if not self._means or self.config.attack:  # each client's own model is read or changed
            return False
        if self.config.start != "equal" or not rule_of(make).plain:
            return False
        if make.clip is not None or (copies and make_server.clip is not None):
            return False  # each model's own gradient is clipped
        if copies and not (rule_of(make_server).plain and row_by_row(self.split.server, self._rows["copies"])):
            return False
        return row_by_row(self.split.client, self.example)

    def _by_rule(self, engine: EngineName) -> Ways:
        """The usually fastest layout."""
        low, up = layouts(self.split.client)[0], layouts(self.split.server)[0]
        pairs: list[tuple[Layout, Layout]] = [(low, up), ("plain", up), (low, "plain")]
        tried = [Ways(engine, *pair) for pair in pairs if self._possible(*pair)]
        ways = next((ways for ways in tried if self._laid_out(ways)), Ways(engine))
        if engine != "stacked":
            return ways
        clients = self._stacking("clients", self._usual("clients", ways.client_layout))
        if not self.traits.server_copies:
            return replace(ways, clients=clients)
        return replace(
            ways, clients=clients, copies=self._stacking("copies", self._usual("copies", ways.server_layout))
        )

    def _usual(self, side: Side, layout: Layout) -> Way:
        """The usually fastest way. On the CPU, convolutions are computed client by client anyway, unless they can be
        one product; then everything else is, too.
        """
        ways = self._ways_of(side, layout)
        if self.device.type != "cpu" or "each" not in ways:
            return ways[0]
        kinds = [type(m) for m in self._part(side, layout).modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
        one_product = kinds == [nn.Conv2d] and layout == "last" and side == "clients"
        return "lowered" if "lowered" in ways and (one_product or not kinds) else "each"

    def _stacking(self, side: Side, way: Way) -> Stacking:
        """The number of clients at a time, and whether forward passes are kept or run twice, so that memory
        suffices.
        """
        part, config = self._plain[side], self.config
        limit = memory_limit(config)
        each = max(1, bytes_per_row(part, self._rows[side]) * config.batch)
        taking_part = max(1.0, config.clients * config.participation)
        chunk = max(1, int(min(limit / 4, _WORTHWHILE) // each))
        if config.device == "cpu":
            chunk = min(chunk, max(1, _CACHED // max(1, gradient_bytes(part))))
        return Stacking(way, None if chunk >= config.clients else chunk, keep=each * taking_part <= limit)

    # Possible and proven ways

    def _possible(self, client: Layout, server: Layout) -> bool:
        """Whether the parts can be tried in these layouts. If the local engine is requested by name, it uses them
        unchanged.
        """
        config = self.config
        if (client, server) == ("plain", "plain"):
            return True
        if config.engine == "local" or config.precision == "float64" or config.device != "cpu":
            return False  # measured to help on the CPU, whose library has no double precision convolutions
        fit = client in layouts(self.split.client) and server in layouts(self.split.server)
        return self._tail is None and fit

    def _laid_out(self, ways: Ways) -> bool:
        """Whether the parts in these layouts give the same results."""
        changed = (self._part("clients", ways.client_layout), self._part("copies", ways.server_layout))
        return same(self.split.client, self.split.server, changed, self.example)

    def _proven(self, ways: Ways, engine: EngineName) -> bool:
        """Whether these ways, chosen for that engine, give the same results as the plain ones."""
        if ways.engine != engine or not self._possible(ways.client_layout, ways.server_layout):
            return False
        if engine == "stacked" and not all(self._stacks(side, ways) for side in self._stacked):
            return False
        return self._laid_out(ways)

    def _stacks(self, side: Side, ways: Ways) -> bool:
        how, layout = (ways.clients, ways.client_layout) if side == "clients" else (ways.copies, ways.server_layout)
        return how.way in self._ways_of(side, layout)

    def _part(self, side: Side, layout: Layout) -> nn.Module:
        if (side, layout) not in self._parts:
            self._parts[side, layout] = in_layout(self._plain[side], layout)
        return self._parts[side, layout]

    def _verdict(self, side: Side, layout: Layout) -> Stackability:
        if (side, layout) not in self._verdicts:
            part, data = self._part(side, layout), side == "clients"
            rows, make = self._rows[side], self._makes[side]
            self._verdicts[side, layout] = _STACKABLE.of(
                self._key(part, side, layout), lambda: stackable(part, rows, make, data=data)
            )
        return self._verdicts[side, layout]

    def _key(self, part: nn.Module, side: Side, layout: Layout) -> Hashable | None:
        """The facts that decide whether a part can be stacked; None if they are not known."""
        like, make, rows = self.split.likeness, self._makes[side], self._rows[side]
        if like is None or make.own:
            return None
        tensors = [(name, of_tensor(t)) for name, t in (*part.named_parameters(), *part.named_buffers())]
        steps = make.name, repr(make.options), make.groups, make.clip, make.accumulate
        return like, side, layout, tuple(tensors), tuple(map(of_tensor, rows)), steps

    # Measured

    @cached_property
    def _measured(self) -> dict[Side, Rows]:
        """Rows for measurements, of both sides."""
        return {"clients": self._typical, "copies": smashed(self.split.client, self._typical)}

    def _subject(self) -> dict[str, Any]:
        """Everything on which a measurement depends, except the machine."""
        c, parts = self.config, self._plain.values()
        return {
            "layers": [(n, type(m).__name__, m.extra_repr()) for part in parts for n, m in part.named_modules()],
            "weights": [(n, list(p.shape), p.requires_grad) for part in parts for n, p in part.named_parameters()],
            "rows": [(list(r.shape[1:]), str(r.dtype)) for rows in self._rows.values() for r in rows],
            "optimizers": [(make.name, str(make.options)) for make in self._makes.values()],
            "run": [c.engine, c.algorithm, c.device, c.precision, c.start, c.batch, c.memory_limit],
            "clients": [self.work.clients, self.work.taking_part],
        }

    def _budget(self) -> float:
        """Seconds that measuring may take: 1 % of the run, 5 at most; or half a second, where that is 5 % at most."""
        if self.work.rows < _FEWEST:  # not even worth an estimate
            return 0.0
        tuner, rows = Tuner(float("inf"), self.device), min(self.config.batch, _ESTIMATED)
        once = tuner.alone(self.split.client, self._measured["clients"], rows, data=True, repeats=1)
        once += tuner.alone(self.split.server, self._measured["copies"], rows, data=False, repeats=1)
        run = once / rows * self.work.rows
        return max(min(_LONGEST, _OF_LONG * run), min(_HALF, _OF_SHORT * run))

    def _quickest(self, tuner: Tuner, ruled: Ways) -> Ways:
        """The fastest proven pair of layouts, and ways; the choice of the rule is measured first."""
        first: dict[Side, Layout] = {"clients": ruled.client_layout, "copies": ruled.server_layout}
        timed: dict[Side, dict[Layout, Timed]] = {
            side: {layout: self._side(tuner, side, layout, ruled)} for side, layout in first.items()
        }
        for side, part in self._plain.items():
            for layout in layouts(part):
                if layout != first[side]:
                    timed[side][layout] = self._side(tuner, side, layout, ruled)
        clients, server = timed["clients"], timed["copies"]
        usual = clients[ruled.client_layout].seconds + server[ruled.server_layout].seconds
        if usual == float("inf"):
            return ruled
        pairs = [(low.seconds + up.seconds, a, b) for a, low in clients.items() for b, up in server.items()]
        pairs = sorted(pair for pair in pairs if pair[0] < MARGIN * usual and self._possible(*pair[1:]))
        found = [replace(ruled, client_layout=a, server_layout=b) for _, a, b in pairs]
        best = next((ways for ways in found if self._laid_out(ways)), ruled)
        return replace(best, clients=clients[best.client_layout].how, copies=server[best.server_layout].how)

    def _side(self, tuner: Tuner, side: Side, layout: Layout, ruled: Ways) -> Timed:
        """Seconds of a step of one side in one layout."""
        part, rows, data, work = self._part(side, layout), self._measured[side], side == "clients", self.work
        batch, at_a_time = self.config.batch, work.taking_part
        if ruled.engine == "stacked" and side in self._stacked:
            usual = self._usual(side, layout)
            ways = [usual, *(way for way in self._ways_of(side, layout) if way != usual)]
            timed = [
                tuner.copies(part, rows, batch, at_a_time, self._makes[side], self._stacking(side, way), data=data)
                for way in ways
            ]
            best = min(timed, key=lambda one: one.seconds)
            return best if best.seconds < MARGIN * timed[0].seconds else timed[0]
        if self.traits.takes_turns or STEP_EACH in self.traits.needs:
            return Timed(tuner.alone(part, rows, batch, data=data) * at_a_time, Stacking())
        return Timed(tuner.alone(part, rows, batch * at_a_time, data=data), Stacking())


def one_by_one(config: RunConfig, split: Parts) -> Chosen:
    """The local engine, for clients with different cuts: their models are not stacked. Warns if another was named."""
    if config.engine == "stacked":
        why = "its clients have different cuts, so that their models cannot be stacked"
        warnings.warn(f"{config.algorithm} runs on the local engine: {why}", CutlayerWarning, stacklevel=3)
    return Chosen(split, Ways("local"))


def memory_limit(config: RunConfig, processes: int | None = None) -> float:
    """Bytes that the clients' forward passes may leave for their backward passes: as configured, or half of the free
    memory, shared by the `processes` that compute at the same time (by default the actual number).
    """
    if config.memory_limit is not None:
        return config.memory_limit * 1e9
    return _half_of_what_is_free(config) / (sharing() if processes is None else processes)


def _half_of_what_is_free(config: RunConfig) -> float:
    if config.device != "cpu":
        return torch.cuda.mem_get_info()[0] / 2 if config.device.startswith("cuda") else 4e9
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    except (ValueError, OSError):  # not all systems tell
        return 4e9
