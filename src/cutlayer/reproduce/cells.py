"""The trainings for the paper's tables: cells, one configuration each, at three sizes.

A cell is trained once, even if several tables use it. Its name is its folder, so that a later call finds it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cutlayer import plugins
from cutlayer.options import RunConfig, cuts_of, default_cut, traits
from cutlayer.reproduce.contest import ContestSize, contest

SizeName = Literal["smoke", "reduced", "full"]
When = tuple[Literal["always", "initial", "final"], float]

ALPHAS = (0.0, 0.5, 1.0, 1.5, 2.0)  # Table 1; 0: no SplitLr
ALPHAS_WITH_PHI = (0.0, 0.5, 1.0)  # Table 2
PHIS = (0.0, 0.25, 0.5, 0.75)  # Table 2; 0: no SplitAvg
PHASES: dict[str, When] = {  # Table 3, at phi = 1 and alpha = 1
    "initial 60 %": ("initial", 0.6),
    "initial 40 %": ("initial", 0.4),
    "final 60 %": ("final", 0.6),
    "final 40 %": ("final", 0.4),
    "full": ("always", 1.0),
}
HALVES = {  # with SplitLr, with SplitAvg
    (False, False): "psl",
    (True, False): "slr",
    (False, True): "sgl",
    (True, True): "sglr",
}
TABLE4_METHODS = ("cl", "fl", "sglr", "sfl", "psl")  # Table 4
SKEW = "skew"  # the contest beyond the paper
_DECIDED = ("holds", "does not hold", "within noise")  # verdicts about a model
LEAKING_PHIS = (0.0, 0.25, 0.5, 0.75, 1.0)  # Table 5
LEAKING_OTHERS = ("psl", "sfl", "ssl")  # compared with SGLR
LEAKING_METHODS = (*LEAKING_OTHERS, "sglr")
# Defences of PSL, by kind and strength. With the reduced size's model smashed data are some 25 long (Euclidean norm),
# or some 700 (sum of absolute values).
LEAKING_DEFENCES: dict[str, dict[str, dict[str, Any]]] = {
    "Gaussian noise": {f"{s:g} x clip 10": {"clip": 10.0, "gaussian_noise": s} for s in (0.005, 0.02, 0.1, 3.0)},
    "Laplace noise": {f"{s:g} x clip 300": {"clip": 300.0, "laplace_noise": s} for s in (1e-4, 5e-4, 3e-3)},
    "feature dropout": {f"{p:g}": {"feature_dropout": p} for p in (0.5, 0.9, 0.98)},
    "NoPeek": {f"weight {w:g}": {"nopeek": w} for w in (0.5, 5.0, 50.0)},
    "codec": {c: {"up_codec": c} for c in ("int8", "top-k:0.05", "top-k:0.01")},
}


@dataclass(frozen=True)
class Size:
    """How much is trained. Rates in `rates` are what each method of Table 4 is tuned over; `evaluations` and
    `curve_evaluations` (Table 4's methods) are how often a run is evaluated, on the models of `eval_clients` clients.
    Runs that are attacked take `leakage_epochs`, and are evaluated (and attacked, where they are followed)
    `leakage_moments` times.
    """

    model: str
    clients: tuple[int, ...]
    epochs: int
    seeds: tuple[int, ...]
    samples_per_client: int
    validation: int
    evaluations: int
    curve_evaluations: int
    eval_clients: int | None
    methods_model: str
    methods_clients: int
    rates: tuple[float, ...]
    skewed_clients: int
    engine: Literal["auto", "local"] = "auto"
    leakage_epochs: int = 6
    leakage_moments: int = 3


SIZES: dict[str, Size] = {
    "smoke": Size("mlp", (1, 2, 5), 2, (0, 1), 100, 500, 2, 2, 2, "mlp", 5, (1e-3, 3e-3), 5, leakage_epochs=1),
    "reduced": Size("cnn", (1, 2, 5, 10, 20), 20, (0, 1, 2), 1000, 1000, 4, 10, 3, "cnn", 5, (3e-4, 1e-3, 3e-3), 10),
    "full": Size(
        "resnet16",
        (1, 2, 4, 6, 8, 10, 15, 20),
        200,
        (0, 1, 2),
        1000,
        10000,
        40,
        40,
        None,
        "alexnet",
        5,
        (3e-4, 1e-3, 3e-3),
        10,
        leakage_epochs=200,
    ),
}


@dataclass(frozen=True)
class Cell:
    """One configuration, to be trained once with each of `seeds`. If it is `examined`, its leakage is measured, too, at
    its end and at every snapshot.

    If it has `trials`, its learning rate is that of the trial with the best validation accuracy. A cell is trained once
    all cells of earlier turns are done, its trials among them.
    """

    name: str
    config: RunConfig
    examined: bool = False
    seeds: tuple[int, ...] = ()
    trials: tuple[Cell, ...] = ()
    turn: int = 0

    def at(self, seed: int) -> RunConfig:
        """The configuration with that seed."""
        return self.config.model_copy(update={"seed": seed})

    @property
    def weight(self) -> int:
        """The training samples of one of its runs, as an estimate of its cost."""
        return (self.config.samples_per_client or 0) * self.config.clients * self.config.epochs


@dataclass(frozen=True)
class Study:
    """The cells of a reproduction at one size, on one data set and device.

    `options` are those of the data set, the model and the task, with `cut` and `task` among them where they are chosen.
    `another_model`: the user chose the model, so that the numbers are not meant to be the paper's.
    """

    size: Size
    data: str
    device: str = "cpu"
    options: tuple[tuple[str, Any], ...] = ()
    another_model: bool = False
    extent: ContestSize = field(default_factory=lambda: contest(SKEW).sizes["smoke"])

    def of_model(self, model: str) -> Study:
        """The same with that model in every table."""
        return replace(self, size=replace(self.size, model=model, methods_model=model), another_model=True)

    @property
    def cut(self) -> str | None:
        """The cut of the model of Tables 1 to 3."""
        chosen = dict(self.options).get("cut")
        return default_cut(self.size.model) if chosen is None else str(chosen)

    @property
    def cuts(self) -> tuple[str, ...]:
        """The compared depths: the named cuts of the model, or its only known cut if it names none."""
        named = cuts_of(self.size.model)
        known = () if self.cut is None else (self.cut,)
        return named if set(known) <= set(named) else (*known, *named)

    def verdict(self, word: str) -> str:
        """The display of a verdict: a verdict about another model is not one about the paper's."""
        return f"another model: {word}" if self.another_model and word in _DECIDED else word

    @property
    def model_names(self) -> tuple[str, str]:
        """The names in pages for the model of Tables 1 to 3 and that of Table 4; for a user's own file, without the
        folder.
        """
        return self.size.model.rpartition("/")[2], self.size.methods_model.rpartition("/")[2]

    def grid(self, clients: int, alpha: float, phi: float, phase: str | None = None) -> Cell:
        """A cell of Tables 1 to 3. With one client, alpha and phi change nothing (identity 1): one cell for all."""
        own: dict[str, Any] = {}
        if clients == 1:
            return self._cell("C1/psl", 1, "psl", {})
        algorithm = HALVES[alpha > 0, phi > 0]
        own |= {"alpha": alpha} if alpha > 0 else {}
        own |= {"phi": phi} if phi > 0 else {}
        name = f"C{clients}/alpha-{alpha:g}-phi-{phi:g}"
        if phase is not None:
            when, until = PHASES[phase]
            own |= {"phi_when": when} | ({} if when == "always" else {"phi_until": until})
            name += "" if when == "always" else f"-{when}-{until:g}"
        return self._cell(name, clients, algorithm, own)

    def method(self, algorithm: str, rate: float) -> Cell:
        """A cell of Table 4: one method at one learning rate."""
        s = self.size
        own = {"client_lr": rate, "eval_every": max(1, s.epochs // s.curve_evaluations), "model": s.methods_model}
        name = f"methods/{algorithm}-rate-{rate:g}"
        return self._cell(name, s.methods_clients, algorithm, own)

    def contestant(self, setting: str, method: str) -> Cell:
        """A method of the contest in a setting, at the best of its rates, which its trials find."""
        extent = self.extent
        tried = [self._contestant(extent.tuning(setting), method, rate) for rate in extent.rates]
        trials = tuple(replace(cell, seeds=(extent.tuning_seed,)) for cell in tried)
        return replace(self._contestant(setting, method), seeds=extent.seeds, trials=trials, turn=1)

    def _contestant(self, setting: str, method: str, rate: float | None = None) -> Cell:
        """All clients are evaluated, at the end. Centralised learning has all data in one place: it is the same in all
        settings.
        """
        described, extent = contest(SKEW), self.extent
        chosen = dict(described.methods[method])
        algorithm = chosen.pop("algorithm")
        central = traits(algorithm).central
        own = {n: getattr(extent, n) for n in ("samples_per_client", "epochs", "batch")}
        own |= {"eval_clients": None, "eval_every": extent.epochs, "keep_best": False, "client_lr": rate, **chosen}
        own |= {} if central else described.settings[setting].options
        name = f"{SKEW}/{_slug('anywhere' if central else setting)}/{_slug(method)}"
        if rate is not None:
            name += f"/rate-{rate:g}"
        return self._cell(name, self.size.skewed_clients, algorithm, own)

    def contest(self) -> dict[str, tuple[str, ...]]:
        """The methods of the contest, by setting, as far as its extent has them."""
        described, extent = contest(SKEW), self.extent
        return {
            name: tuple(m for m in setting.methods if extent.methods is None or m in extent.methods)
            for name, setting in described.settings.items()
            if extent.settings is None or name in extent.settings
        }

    def table1(self) -> Iterator[Cell]:
        """SplitLr: alpha by number of clients."""
        yield from (self.grid(c, alpha, 0) for c in self.size.clients for alpha in ALPHAS)

    def table2(self) -> Iterator[Cell]:
        """SplitLr and SplitAvg: alpha and phi by number of clients."""
        yield from (self.grid(c, alpha, phi) for c in self.size.clients for alpha in ALPHAS_WITH_PHI for phi in PHIS)

    def table3(self) -> Iterator[Cell]:
        """Phased SplitAvg at phi = 1, alpha = 1."""
        for clients in self.size.clients:
            yield self.grid(clients, 1, 0)
            yield from (self.grid(clients, 1, 1, phase) for phase in PHASES)

    def table4(self) -> Iterator[Cell]:
        """The methods, each at each rate."""
        yield from (self.method(algorithm, rate) for algorithm in TABLE4_METHODS for rate in self.size.rates)

    def skew(self) -> Iterator[Cell]:
        """The contest: every method in every setting, and its trials."""
        for setting, methods in self.contest().items():
            for method in methods:
                cell = self.contestant(setting, method)
                yield from (*cell.trials, cell)

    def leaking(self, name: str, algorithm: str, *, followed: bool = False, **own: Any) -> Cell:
        """A run that is attacked after training and, if it is `followed`, also during training."""
        s = self.size
        every = max(1, s.leakage_epochs // s.leakage_moments)
        options = {"epochs": s.leakage_epochs, "eval_every": every, "eval_clients": None, **own}
        if followed:
            options["snapshot_every"] = every
        return replace(self._cell(f"leakage/{name}", s.methods_clients, algorithm, options), examined=True)

    def by_phi(self, phi: float) -> Cell:
        """A cell of Table 5: SGLR with that active fraction."""
        if phi == 0:
            return self.leaking("slr", "slr", followed=True)
        return self.leaking(f"sglr-phi-{phi:g}", "sglr", followed=True, phi=phi)

    def attacked(self, method: str) -> Cell:
        """A method, undefended; SplitAvg's with its default fraction, which is a cell of Table 5 too."""
        phi = plugins.find("algorithm", method).defaults.get("phi")
        return self.leaking(method, method, followed=True) if phi is None else self.by_phi(phi)

    def at_depth(self, cut: str) -> Cell:
        """PSL cut there."""
        return self.attacked("psl") if cut == self.cut else self.leaking(f"psl-cut-{cut}", "psl", cut=cut)

    def defended(self, kind: str, strength: str) -> Cell:
        """PSL with a defence."""
        name = f"psl-{kind}-{strength}".lower().replace(" ", "-").replace(":", "-")
        return self.leaking(name, "psl", **LEAKING_DEFENCES[kind][strength])

    def table5(self) -> Iterator[Cell]:
        """Reconstruction by phi."""
        yield from (self.by_phi(phi) for phi in LEAKING_PHIS)

    def leakage(self) -> Iterator[Cell]:
        """Methods, depths of the cut and defences (beyond the paper)."""
        yield from (self.attacked(method) for method in LEAKING_METHODS)
        yield from (self.at_depth(cut) for cut in self.cuts)
        yield from (self.defended(kind, strength) for kind, own in LEAKING_DEFENCES.items() for strength in own)

    def _cell(self, name: str, clients: int, algorithm: str, own: dict[str, Any]) -> Cell:
        s = self.size
        options: dict[str, Any] = {
            "algorithm": algorithm,
            "data": self.data,
            **dict(self.options),
            "model": s.model,
            "clients": clients,
            "samples_per_client": s.samples_per_client,
            "validation": s.validation,
            "epochs": s.epochs,
            "eval_every": max(1, s.epochs // s.evaluations),
            "eval_clients": None if s.eval_clients is None or s.eval_clients >= clients else s.eval_clients,
            "device": self.device,
            "engine": s.engine,
            **own,
        }
        config = RunConfig.of({k: v for k, v in options.items() if v is not None})
        config.check(frozenset())
        return Cell(name, config, seeds=s.seeds)


def _slug(name: str) -> str:
    """A name as that of a folder: "SFL + client" is sfl-client."""
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in name.lower()).split())
