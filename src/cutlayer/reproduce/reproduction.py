"""A reproduction: a folder in which cells are trained, and the report on their results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import tomli_w

from cutlayer.crew import cores
from cutlayer.errors import ConfigError, RunFolderError
from cutlayer.files import replace_file
from cutlayer.folder import LOCK, Folder, locked
from cutlayer.leakage import check_installed
from cutlayer.options import RunConfig, from_anywhere, read_toml
from cutlayer.plugins import find, load
from cutlayer.reproduce.cells import SIZES, SKEW, SizeName, Study
from cutlayer.reproduce.contest import contest
from cutlayer.reproduce.outcomes import Outcome, Outcomes, read, settled
from cutlayer.reproduce.tables import SECTIONS, cells_of, named
from cutlayer.reproduce.train import Job, Tell, folder_of, is_done, name_of, train

if TYPE_CHECKING:
    from cutlayer.reproduce.findings import Findings

SETTINGS = "reproduction.toml"


class Reproduction:
    """The request: tables at a size, on a data set and device, in the folder `out`.

    `model` replaces the size's models, `cut` is its cut, `task` its task; `options` are those of the data set, the
    model and the task.

    Raises ConfigError for an unknown table or model, and for a task that the tables cannot show; RunFolderError if
    `out` has other settings or other content. Nothing is written before `train`.
    """

    def __init__(
        self,
        tables: Iterable[str],
        size: SizeName,
        out: Path,
        data: str = "fashion-mnist",
        device: str = "cpu",
        options: Mapping[str, Any] = MappingProxyType({}),
        *,
        model: str | None = None,
        cut: str | None = None,
        task: str | None = None,
    ) -> None:
        # The same folder, independent of the working directory.
        named_things = from_anywhere({"data": data, "model": model, "cut": cut, "task": task})
        chosen = {name: named_things[name] for name in ("cut", "task") if named_things[name] is not None}
        self.size, self.out = size, out
        self.study = Study(
            SIZES[size],
            named_things["data"],
            device,
            tuple({**chosen, **options}.items()),
            extent=contest(SKEW).sizes[size],
        )
        if model is not None:
            find("model", model)
            self.study = self.study.of_model(named_things["model"])
        if task is not None:
            check_task(task)
        self.asked = named(tables)
        stored = self._stored()
        self.parts = tuple(name for name in SECTIONS if name in self.asked or name in stored)

    @property
    def jobs(self) -> list[Job]:
        """The requested runs, each cell once, all cells of a seed before those of the next, so that an interrupted
        reproduction has all cells for the seeds that it reached. Among cells with turns, those of a turn come before
        those of the next.
        """
        jobs = [(cell, seed) for cell in cells_of(self.study, self.asked).values() for seed in cell.seeds]
        return sorted(jobs, key=lambda job: (job[0].turn, job[0].seeds.index(job[1])))

    def waiting(self) -> list[Job]:
        """The jobs that are not done yet."""
        return [job for job in self.jobs if not is_done(self.out, *job)]

    def check(self, workers: int | None = 1) -> int:
        """Check that the data exist, that every kind of cell can be built, that finished runs fit the request, and that
        `workers` runs at once fit into memory. Returns their number, by default as many as cores and memory allow.
        Raises UsageError.
        """
        from cutlayer.allocator import give_back
        from cutlayer.build import assemble, deal
        from cutlayer.footprint import fitting, footprint, refuse_unless_fitting, room
        from cutlayer.reproduce.table6 import trained_work

        trained_work(self.study)  # a model whose cost cannot be measured is noticed now, not after the training
        self.outcomes()
        if any(cell.examined for cell, _ in self.waiting()):
            check_installed()
        device = self.study.device
        most = workers or (cores() if device == "cpu" else 1)
        kinds: dict[tuple[str, ...], dict[int, RunConfig]] = {}
        named: dict[tuple[str, ...], list[str]] = {}
        needs: dict[str, int] = {}
        for job in sorted(self.waiting(), key=lambda job: -job[0].config.clients):
            c = job[0].config
            # Whole models have no cut to check, so a split one stands for its kind where there is one.
            kind: tuple[str, ...] = (c.model, c.partition, str(c.traits.whole))
            for seed in job[0].seeds:
                kinds.setdefault(kind, {}).setdefault(seed, job[0].at(seed))
            named.setdefault(kind, []).append(name_of(job))
        for kind, configs in kinds.items():
            first, *others = configs.values()
            training = assemble(first)
            if most > 1:
                needs |= dict.fromkeys(named[kind], footprint(training, first, most))
            del training
            if first.partition != "iid":  # with another seed, a client may get no samples
                for config in others:
                    deal(config)
        if most == 1:
            return most
        give_back()
        free = room(device)
        if workers is None:
            return fitting(needs, min(most, len(needs)), free)
        refuse_unless_fitting(needs, most, free)
        return most

    def train(self, workers: int, tell: Tell | None = None) -> Iterator[Job]:
        """Train waiting jobs, `workers` runs at once; yields each job as it ends, and calls `tell` with the progress of
        each. Raises CutlayerError.
        """
        with self._held():
            yield from train(self.out, self.waiting(), workers, tell)

    def outcomes(self) -> Outcomes:
        """The results so far, for all tables that were ever requested in this folder."""
        return Outcomes(self.study, self.out, cells_of(self.study, self.parts).values())

    def outcome(self, job: Job) -> Outcome:
        """The result of a finished job."""
        cell, seed = job
        done = settled(self.out, cell) or cell
        return read(folder_of(self.out, done, seed), done.at(seed))

    def find(self) -> Findings:
        """All findings so far. Raises RunFolderError if no run is done, or if one is damaged."""
        from cutlayer.reproduce.findings import find

        findings = find(self.outcomes(), self.parts)
        done, planned = findings.done
        if planned and not done:
            raise RunFolderError(
                f"{str(self.out)!r} has no finished run to report on: train some, with --jobs 1 or more"
            )
        return findings

    def write(self, findings: Findings) -> list[Path]:
        """Write the report; returns the written paths. Raises RunFolderError if the folder cannot be written."""
        from cutlayer.reproduce.page import files

        contents = files(findings, self.size)
        if not (self.out / SETTINGS).exists():  # nothing had to be trained
            with self._held():
                pass
        for name, content in contents.items():
            replace_file(self.out / name, content)
        return [self.out / name for name in contents]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that all runs of a folder share, ready for TOML: size, data, device, and the meaning of the
        size.
        """
        size = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.study.size).items() if v is not None}
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in self.study.options if v is not None}
        study = {"size": self.size, "data": self.study.data, "device": self.study.device}
        return {**study, "options": options, "settings": size}

    def _stored(self) -> list[str]:
        """The tables that were requested in this folder before. Raises RunFolderError if the folder is not a
        reproduction's.
        """
        if self.out.exists() and not self.out.is_dir():
            raise RunFolderError(f"{str(self.out)!r} is a file: choose another --out")
        path = self.out / SETTINGS
        if not path.exists():
            if self.out.is_dir() and not all(map(_own, self.out.iterdir())):
                raise RunFolderError(
                    f"{str(self.out)!r} already holds files that are not of a reproduction: choose another --out"
                )
            return []
        stored = {"options": {}, **read_toml(path)}
        for name, have, want in _differences(stored, self.settings):
            raise RunFolderError(
                f"the reproduction in {str(self.out)!r} was made with {name} = {have!r}, not {want!r}: ask for what it "
                "was made with, or choose another --out"
            )
        return [str(name) for name in stored.get("tables", [])]

    @contextmanager
    def _held(self) -> Iterator[None]:
        """The folder with its settings, locked against other processes. Raises RunFolderError."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            folder = Folder(self.out, locked(self.out))
        except OSError as error:
            raise RunFolderError(f"cannot write to {str(self.out)!r}: {error.strerror}; choose another --out") from None
        with folder:
            settings = self.settings
            size = settings.pop("settings")
            folder.write_text(SETTINGS, tomli_w.dumps({**settings, "tables": list(self.parts), "settings": size}))
            yield


def check_task(task: str) -> None:
    """Check the task: the tables show accuracies of classes in percent, and deal classes to clients. Raises ConfigError
    for a task with another metric.
    """
    judged = load("task", task)
    if judged.primary == "accuracy" and find("task", task).facts["targets"] == "class":
        return
    by = f"judged by {judged.primary}" if judged.primary != "accuracy" else "about several labels per row"
    raise ConfigError(
        f"task = {task!r} is {by}, but the tables compare accuracies of one class per row, in percent: choose such a "
        "task, e.g. classification, or train yours with `cutlayer compare`"
    )


def _own(path: Path) -> bool:
    """Whether reproductions make this file or folder."""
    return path.name in ("runs", LOCK, f".{SETTINGS}.new") or path.stem == Path(SETTINGS).stem or path.suffix == ".png"


def _differences(stored: dict[str, Any], asked: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(name, stored, asked) of every setting that differs."""
    for name, want in asked.items():
        have = stored.get(name)
        if isinstance(want, dict) and isinstance(have, dict):
            names = dict.fromkeys([*want, *have])
            yield from ((n, have.get(n), want.get(n)) for n in names if have.get(n) != want.get(n))
        elif have != want:
            yield name, have, want
