"""Data sets that are read when batches need them give the same results as data in memory, in any process."""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from cutlayer import Run, RunConfig, scoring
from cutlayer.data import Source, from_arrays, from_dataset, from_memory, load_whole
from cutlayer.data import lazy as lazily
from cutlayer.data.ahead import ReadAhead
from cutlayer.data.batches import Batches
from cutlayer.data.lazy import Lazy
from cutlayer.errors import ConfigError, DataError, RunFolderError
from cutlayer.leakage.subject import _held_out
from cutlayer.run import Result
from cutlayer.testing.deployed import in_memory
from cutlayer.trained import find_trained

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 6)).astype(np.float32)
Y = [n % 4 for n in range(60)]
NEVER: dict[str, Any] = {"data_in_memory": "never"}


class Items(torch.utils.data.Dataset[Any]):
    """A data set whose items are `make(n)`. `read` lists the numbers that this process asked for."""

    def __init__(self, count: int, make: Callable[[int], Any] = lambda n: (X[n], Y[n])) -> None:
        self.count, self.make, self.read = count, make, list[int]()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, n: int) -> Any:
        self.read.append(n)
        return self.make(n)


def jittered(n: int) -> tuple[Tensor, int]:
    """A random transform that draws from all three global generators."""
    return torch.from_numpy(X[n]) + torch.randn(6) + np.random.rand() + random.random(), Y[n]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def run(data: Any, algorithm: str = "psl", **options: Any) -> Run:
    given = {"cut": "1"} if algorithm not in ("cl", "fl") else {}
    return Run(model=net(), data=data, algorithm=algorithm, clients=3, rounds=2, batch=5, **given, **options)


def figures(result: Result) -> tuple[Any, ...]:
    return result.test, result.best_test_score, result.bytes, result.steps


def same(a: Any, b: Any) -> bool:
    """Whether all rows of two samples are equal."""
    every = slice(0, len(a))
    return all(map(torch.equal, (*a[every].rows, a.y), (*b[every].rows, b.y)))


def equal(a: Source, b: Source) -> bool:
    parts = [(a.train, b.train), (a.validation, b.validation), (a.test, b.test)]
    return all(same(p, q) for p, q in parts) and a.class_names == b.class_names


@pytest.mark.parametrize(
    "make",
    [
        lambda n: (X[n].reshape(2, 3), Y[n]),
        lambda n: (torch.full((3, 4), n, dtype=torch.uint8), torch.tensor(Y[n])),
        lambda n: ([n, n + 1], str(Y[n])),
        lambda n: (Image.new("L", (4, 3), n), str(Y[n])),
        lambda n: (Image.fromarray(np.full((3, 4, 3), n, np.uint8)), Y[n]),
        lambda n: ((X[n], np.arange(n, n + 2)), Y[n]),
        lambda n: {"ids": torch.arange(n, n + 2), "mask": torch.ones(2), "labels": Y[n]},
    ],
)
def test_the_same_data_as_in_memory(make: Callable[[int], Any]) -> None:
    data = (Items(40, make), Items(12, make))
    kept, read = (from_memory(data, data_in_memory=how) for how in ("always", "never"))
    assert isinstance(read.train, Lazy)
    assert equal(kept, read)
    assert kept.account == read.account.replace("; items are read again for each batch", "")
    if isinstance(kept.train.inputs, Tensor):
        assert kept.preprocessing == read.preprocessing


@pytest.mark.parametrize("algorithm", ["psl", "fl", "sflv2", "cl"])
def test_engines_give_what_they_give_in_memory(algorithm: str) -> None:
    for engine in ("local",) if algorithm == "cl" else ("local", "stacked"):
        kept = run((Items(40), Items(12)), algorithm, engine=engine).run()
        read = run((Items(40), Items(12)), algorithm, engine=engine, **NEVER).run()
        assert figures(kept) == figures(read)


@pytest.mark.parametrize("make", [lambda n: (X[n], Y[n]), jittered])
def test_a_deployment_gives_what_a_simulation_gives(make: Callable[[int], Any]) -> None:
    data = (Items(40, make), Items(12))
    config = RunConfig(algorithm="psl", clients=3, rounds=2, batch=5, cut="1", engine="local", data_in_memory="never")
    deployed = in_memory(config, model=net(), data=data)
    assert figures(deployed.run.run()) == figures(run(data, engine="local", **NEVER).run())


def test_processes_read_the_same_and_end() -> None:
    """The processes end with the run, and an item's error in a worker process arrives as one sentence."""
    data = (Items(40, jittered), Items(12))
    here = run(data, **NEVER).run()
    data[0].read.clear()
    there = run(data, data_workers=2, **NEVER)
    assert len(multiprocessing.active_children()) == 2
    assert figures(there.run()) == figures(here)
    assert set(data[0].read) == {0}  # this process has read one item, to learn its form
    assert multiprocessing.active_children() == []
    ragged = Items(40, lambda n: (X[n][: 6 - (n == 7)], Y[n]))
    source = from_dataset(ragged, data_workers=2, **NEVER)
    with pytest.raises(DataError, match=r"x of item 7 of the data set has shape \(5,\)"):
        source.train[:]
    source.close()


class Counted:
    """Makes items with a random transform and counts them over all processes."""

    def __init__(self) -> None:
        self.count = multiprocessing.Value("l", 0)

    def __call__(self, n: int) -> Any:
        with self.count:
            self.count.value += 1
        return jittered(n)


@pytest.mark.parametrize(
    ("algorithm", "engine"),
    [("psl", "local"), ("psl", "stacked"), ("ssl", "local"), ("fl", "local"), ("cse-fsl", "local")],
)
def test_what_is_read_ahead_is_what_is_trained_on(algorithm: str, engine: str) -> None:
    """Equal bit for bit to reading in this process, and no item is read in vain."""
    runs = []
    for workers in (0, 2):
        items = Counted()
        mine = run((Items(40, items), Items(12)), algorithm, engine=engine, data_workers=workers, **NEVER)
        runs.append((figures(mine.run()), items.count.value))
    assert runs[0] == runs[1]


def test_batches_are_foreseen_as_they_are_drawn() -> None:
    rows = [np.arange(7), np.arange(7, 10), np.arange(10, 30)]
    batches, same = (Batches(rows, 4, seed=3) for _ in range(2))
    for _ in range(5):
        foreseen = batches.coming([0, 2, 1], [9, 9, 2], 4)
        for turn in range(4):
            for k in (0, 2, 1):
                if k == 1 and turn > 1:
                    continue
                expected, sizes, clocks = same.draw([k])
                found, epochs = foreseen.pop(0)
                assert torch.equal(found, expected)
                assert epochs.tolist() == same.epochs([k], sizes, clocks).tolist()
        assert foreseen == []
        for k, often in ((0, 4), (2, 4), (1, 2)):  # the same batches as were foreseen
            for _ in range(often):
                batches.draw([k])
    assert batches.state() == same.state()


class Rung:
    """Answers a number with its square and rings a bell for each number. At 7, the process ends."""

    def __init__(self) -> None:
        self.bells = [multiprocessing.Event() for _ in range(8)]

    def __call__(self, number: int) -> int:
        self.bells[number].set()
        if number == 7:
            os._exit(3)
        return number**2


def test_workers_answer_before_anybody_waits() -> None:
    """A request that is needed now is answered before those that were made in advance, in any order."""
    rung = Rung()
    reader = ReadAhead(rung, 1)
    reader.ask([1, 2, 3, 4, 6])
    assert all(rung.bells[number].wait(60) for number in (1, 2))
    assert not rung.bells[4].is_set()  # two at a time until an answer is taken
    assert reader.take(5) == 25
    assert not rung.bells[6].is_set()
    assert [reader.take(number) for number in (2, 1)] == [4, 1]
    reader.close()
    assert [ReadAhead(rung, 0).take(3), reader.take(3), reader.depth, ReadAhead(rung, 0).depth] == [9, 9, 2, 0]
    with pytest.raises(DataError, match=r"a process that reads items has ended .* pass fewer data_workers than 1"):
        reader.take(7)
    reader.close()
    assert multiprocessing.active_children() == []


def test_random_transforms_differ_from_epoch_to_epoch_and_nothing_else_changes() -> None:
    source = from_dataset(Items(60, jittered), **NEVER)
    rows = torch.tensor([3, 4, 5])
    before = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    first, second = (source.train.batch(rows, np.array([epoch] * 3)) for epoch in (0, 1))
    after = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    assert after == (torch.rand(1), np.random.rand(), random.random()) != before
    assert not torch.equal(first.x, second.x)
    again = source.train.batch(rows.flip(0), np.array([0, 0, 1]))
    assert torch.equal(again.x, torch.stack([first.x[2], first.x[1], second.x[0]]))
    other = from_dataset(Items(60, jittered), seed=1, test=20, **NEVER).train
    at = source.train.at[:1]
    assert not torch.equal(other.items.read("train", at, None), source.train.items.read("train", at, None))


def test_engines_agree_on_random_transforms_which_training_notices() -> None:
    data = (Items(40, jittered), Items(12))
    local, stacked = (figures(run(data, engine=engine, **NEVER).run()) for engine in ("local", "stacked"))
    assert local == stacked != figures(run(data, engine="local").run())


def test_a_resumed_run_draws_what_the_uninterrupted_one_draws(tmp_path: Path) -> None:
    data = (Items(40, jittered), Items(12))
    whole = run(data, out=tmp_path / "whole", **NEVER).run()
    broken = iter(run(data, out=tmp_path / "broken", checkpoint_every=1, **NEVER))
    for _ in range(4):
        next(broken)
    broken.close()  # type: ignore[attr-defined]
    del broken
    run(data, out=tmp_path / "other", checkpoint_every=1, **NEVER).run()
    assert figures(Run.resume(tmp_path / "broken", model=net(), data=data).run()) == figures(whole)
    changed = (Items(40, lambda n: (X[n] + 1, Y[n])), Items(12))
    with pytest.raises(RunFolderError, match="another data set than"):
        Run.resume(tmp_path / "other", model=net(), data=changed).run()


def test_a_run_read_in_memory_is_not_resumed_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = (Items(40), Items(12))
    run(data, out=tmp_path / "run").run()
    monkeypatch.setattr(lazily, "_free_memory", lambda: 100.0)
    with pytest.raises(RunFolderError, match="data_in_memory"):
        Run.resume(tmp_path / "run", model=net(), data=data).run()


def test_auto_keeps_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 52 * 6 * 4
    for free, kept in ((4 * size + 1, True), (4 * size, False), (None, True)):
        monkeypatch.setattr(lazily, "_free_memory", lambda free=free: free)
        source = from_memory((Items(40), Items(12)), data_in_memory="auto")
        assert source.train.in_memory == kept
        assert ("data_in_memory = 'always'" in source.account) != kept


def test_the_free_memory_is_known_here() -> None:
    free = lazily._free_memory()
    assert free is not None
    assert 1e6 < free < 1e15


def test_targets_are_taken_from_where_a_data_set_holds_them() -> None:
    """An attribute of the data set is used if its values are those of the items, also for subsets."""

    def with_targets(**attributes: Any) -> Any:
        items = Items(60)
        vars(items).update(attributes)
        return items

    def looked_at(items: Any, given: Any = None) -> tuple[set[int], str]:
        source = from_memory(given or items, **NEVER)
        assert equal(source, from_memory(given or Items(60)))
        return set(items.read[:61]), source.account

    known = with_targets(targets=torch.tensor(Y))
    source = from_dataset(known, **NEVER)
    assert set(known.read) == {0, 30, 59}
    assert "targets are those of its attribute 'targets'" in source.account
    assert equal(source, from_dataset(Items(60)))
    named = with_targets(labels=[str(y) for y in Y])  # items have numbers instead, so they are read
    assert set(from_dataset(named, **NEVER).train.items._fetch.parts["train"].read) == set(range(60))
    short = with_targets(targets=Y[:5])
    assert "attribute" not in from_dataset(short, **NEVER).account
    assert equal(from_dataset(short, **NEVER), from_dataset(Items(60)))
    base = with_targets(targets=Y)
    parts = [torch.utils.data.Subset(base, list(range(k, 60, 2))) for k in (1, 0)]
    clients = from_memory(parts, **NEVER)
    assert len(set(base.read)) <= 5
    assert equal(clients, from_memory(parts))
    assert clients.client_column is not None
    assert torch.equal(clients.client_column, from_memory(parts).client_column)  # type: ignore[arg-type]


def test_a_list_of_data_sets_is_one_for_each_client() -> None:
    data = [Items(20), Items(15), Items(25)]
    kept, read = (run(data, partition="column", data_in_memory=how).run() for how in ("always", "never"))
    assert figures(kept) == figures(read)


def test_by_reference(tmp_path: Path) -> None:
    """By reference to a file of the user's own. A client alone has all items."""
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n\n\nclass Mine:\n    def __len__(self):\n        return 30\n\n"
        "    def __getitem__(self, n):\n        return np.full(6, n, np.float32), n % 4\n"
    )
    name = f"{tmp_path / 'mine.py'}:Mine"
    whole = load_whole(name, **NEVER)
    assert not whole.train.in_memory
    assert whole.train[:].x[:, 0].tolist() == list(range(30))
    kept, read = (run(name, data_in_memory=how).run() for how in ("always", "never"))
    assert figures(kept) == figures(read)


def test_evaluation_reads_once_and_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_READ", 5 * 6 * 4)
    taken: list[int] = []
    read = lazily.Items.read

    def counted(self: Any, part: str, at: Tensor, *how: Any) -> Any:
        taken.extend([len(at)] if part == "test" else [])
        return read(self, part, at, *how)

    monkeypatch.setattr(lazily.Items, "read", counted)
    kept = run((Items(40), Items(12)), engine="local").run()
    found = run((Items(40), Items(12)), engine="local", eval_every=2, **NEVER).run()
    assert taken == [5, 5, 2]
    assert found.test["accuracy"] == kept.test["accuracy"]
    assert found.test["loss"] == pytest.approx(kept.test["loss"], rel=1e-6)


def test_each_client_is_judged_on_rows_of_its_own() -> None:
    kept, read = (run(Items(60), evaluate_on="own", data_in_memory=how).run() for how in ("always", "never"))
    assert figures(kept) == figures(read)


def test_trained_models_predict_for_what_is_read(tmp_path: Path) -> None:
    data = (Items(40), Items(12))
    run(data, out=tmp_path / "run", **NEVER).run()
    trained = find_trained(tmp_path / "run")
    kept, read = (
        trained.predict(from_memory(data, data_in_memory=how).test, "average", model=net())
        for how in ("always", "never")
    )
    assert len(kept.outputs) == 12
    assert torch.equal(kept.outputs, read.outputs)


def test_float64_and_whole_numbers_as_real_ones() -> None:
    whole = (Items(40, lambda n: (np.arange(6) * n, Y[n])), Items(12, lambda n: (np.arange(6) * n, Y[n])))
    for options in ({}, {"precision": "float64"}):
        kept, read = (run(whole, data_in_memory=how, **options).run() for how in ("always", "never"))
        assert figures(kept) == figures(read)


def test_held_out_rows_of_both_parts_come_in_the_order_asked_for() -> None:
    kept, read = (from_memory((Items(40), Items(12)), data_in_memory=how) for how in ("always", "never"))
    together = torch.cat([kept.validation.x, kept.test.x])
    rows = torch.tensor([15, 0, 3, 4, 9, 1])
    assert torch.equal(_held_out(kept, rows).x, together[rows])
    assert same(_held_out(kept, rows), _held_out(read, rows))


def test_what_cannot_be_read_item_by_item() -> None:
    with pytest.raises(ConfigError, match="data_in_memory = 'never' has no effect on arrays"):
        run((X, np.array(Y)), **NEVER)
    with pytest.raises(ConfigError, match="data_in_memory = 'never' has no effect on arrays"):
        run(from_arrays(X, np.array(Y)), **NEVER)
    with pytest.raises(ConfigError, match="data_workers = 2 has no effect with data_in_memory = 'always'"):
        run(Items(40), data_workers=2, data_in_memory="always")
    source = from_dataset(Items(60), **NEVER)
    for look in (lambda: source.train.x, lambda: source.train.rows):
        with pytest.raises(DataError, match="pass data_in_memory = 'always'"):
            look()
    with pytest.raises(ConfigError, match="cache_features is not possible: items are read again for each batch"):
        run((Items(40), Items(12)), cache_features=True, freeze="0", **NEVER)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda n: (X[n] * (np.nan if n == 9 else 1), Y[n]), "item 9 of the data set holds NaN"),
        (lambda n: (X[n] if n != 9 else np.arange(6), Y[n]), "type int64, item 0 has"),
        (lambda n: (Image.new("L", (4, 3 + (n == 9))), Y[n]), "4x4 pixels"),
        (lambda n: ((X[n], X[n][: 2 + (n > 5)]), Y[n]), "in one shape"),
        (lambda n: (1.0, Y[n]), "give at least one feature"),
        (lambda n: ("a text", Y[n]), "are of type <U6|give at least"),
        (lambda n: X[n], "is not a pair"),
        (lambda n: (X[n], Y[n]) if n != 9 else X[n], "item 9 of the data set is not a pair"),
    ],
)
def test_items_that_do_not_fit_are_named(make: Callable[[int], Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        from_dataset(Items(60, make), **NEVER).train[:]
