"""Partitions: no sample is lost or shared, the same seed gives the same result, and skew is as stated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cutlayer import plugins, seeds
from cutlayer.data import Partition, class_counts, partition
from cutlayer.data.partitions.dirichlet import Dirichlet
from cutlayer.errors import ConfigError, DataError

# The first example reads the registries, which would exceed any deadline.
settings.register_profile("partition", deadline=None, suppress_health_check=[HealthCheck.too_slow])
quick = settings(settings.get_profile("partition"), max_examples=25)
brisk = settings(settings.get_profile("partition"), max_examples=100)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    """Labels [n] of any distribution, a number of clients (at most n and 12), and a seed."""
    rows = draw(st.integers(1, 120))
    classes = draw(st.integers(1, 6))
    weights = np.array(draw(st.lists(st.floats(0.01, 1), min_size=classes, max_size=classes)))
    labels = np.random.default_rng(draw(st.integers(0, 99))).choice(classes, rows, p=weights / weights.sum())
    return labels, draw(st.integers(1, min(rows, 12))), draw(st.integers(0, 2**40))


def dealt_right(parts: list[np.ndarray], rows: int, clients: int) -> None:
    """Checks that parts are disjoint, complete, not empty, in ascending order and of type int64."""
    assert len(parts) == clients
    assert all(len(part) > 0 and part.dtype == np.int64 and np.all(np.diff(part) > 0) for part in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(rows))


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(p, q) for p, q in zip(a, b, strict=True))


def attempt(labels: np.ndarray, clients: int, how: str, **options: object) -> list[np.ndarray] | None:
    """The partition, or None if it is refused. Checks that the error names the client that would have no rows."""
    try:
        return partition(labels, clients, how, **options)  # type: ignore[arg-type]
    except DataError as error:
        refusal = str(error)
    assert "client " in refusal
    assert "use" in refusal
    return None


@brisk
@given(cases())
def test_iid_deals_every_row_once_and_evenly(case: tuple[np.ndarray, int, int]) -> None:
    labels, clients, seed = case
    parts = partition(labels, clients, "iid", seed=seed)
    dealt_right(parts, len(labels), clients)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert same(parts, partition(labels, clients, "iid", seed=seed))


@brisk
@given(cases(), st.data())
def test_samples_per_client_takes_just_so_many(case: tuple[np.ndarray, int, int], data: st.DataObject) -> None:
    labels, clients, seed = case
    each = data.draw(st.integers(1, len(labels) // clients))
    parts = partition(labels, clients, seed=seed, samples_per_client=each)
    assert [len(part) for part in parts] == [each] * clients
    rows = np.concatenate(parts)
    assert len(np.unique(rows)) == each * clients
    assert rows.min() >= 0
    assert rows.max() < len(labels)


@pytest.mark.parametrize("how", ["dirichlet", "shards", "quantity"])
def test_samples_per_client_is_the_mean_where_sizes_differ(how: str) -> None:
    parts = partition(LABELS, 4, how, seed=0, samples_per_client=60)
    rows = np.concatenate(parts)
    assert len(rows) == len(np.unique(rows)) == 240
    assert all(len(part) for part in parts)
    taken = partition(LABELS, 4, "iid", seed=0, samples_per_client=60)
    assert same([np.sort(rows)], [np.sort(np.concatenate(taken))])


@brisk
@given(cases(), st.integers(1, 4))
def test_shards_deals_every_row_once(case: tuple[np.ndarray, int, int], each: int) -> None:
    labels, clients, seed = case
    parts = attempt(labels, clients, "shards", seed=seed, shards_per_client=each)
    if parts is None:
        assert clients * each > len(labels)
        return
    dealt_right(parts, len(labels), clients)
    assert max(map(len, parts)) - min(map(len, parts)) <= each  # shards differ by at most one sample
    # A client's rows are `each` runs of the samples sorted by label, so it has few classes.
    held = (class_counts(labels, parts, int(labels.max()) + 1) > 0).sum(1)
    boundaries = len(np.unique(labels)) - 1
    assert held.max() <= each + boundaries
    assert same(parts, partition(labels, clients, "shards", seed=seed, shards_per_client=each))


@quick
@given(cases(), st.floats(0.05, 100))
def test_dirichlet_deals_every_row_once(case: tuple[np.ndarray, int, int], alpha: float) -> None:
    labels, clients, seed = case
    parts = attempt(labels, clients, "dirichlet", seed=seed, dirichlet_alpha=alpha)
    if parts is not None:
        dealt_right(parts, len(labels), clients)
        assert same(parts, partition(labels, clients, "dirichlet", seed=seed, dirichlet_alpha=alpha))


@quick
@given(cases(), st.sampled_from(["linear", "square", "exponential"]))
def test_quantity_deals_every_row_once_in_growing_parts(case: tuple[np.ndarray, int, int], quantity: str) -> None:
    labels, clients, seed = case
    parts = attempt(labels, clients, "quantity", seed=seed, quantity=quantity)
    if parts is not None:
        dealt_right(parts, len(labels), clients)
        assert [len(part) for part in parts] == sorted(len(part) for part in parts)
        assert same(parts, partition(labels, clients, "quantity", seed=seed, quantity=quantity))


@quick
@given(cases(), st.booleans())
def test_column_gives_everybody_their_own(case: tuple[np.ndarray, int, int], words: bool) -> None:
    labels, _, seed = case
    owner = np.random.default_rng(seed).integers(0, 7, len(labels)) * 10
    column = np.array([f"user {value:03d}" for value in owner]) if words else torch.from_numpy(owner)
    clients = len(np.unique(owner))
    parts = partition(labels, clients, "column", seed=seed, client_column=column)
    dealt_right(parts, len(labels), clients)
    for part, value in zip(parts, np.unique(owner), strict=True):
        assert np.array_equal(part, np.flatnonzero(owner == value))


LABELS = np.repeat(np.arange(10), 60)


@pytest.mark.parametrize("how", ["iid", "dirichlet", "shards", "quantity"])
def test_another_seed_deals_otherwise_and_the_same_seed_does_not(how: str) -> None:
    deals = [partition(LABELS, 5, how, seed=seed) for seed in range(4)]
    assert not any(same(deals[a], deals[b]) for a in range(4) for b in range(a))
    assert same(deals[2], partition(torch.from_numpy(LABELS), 5, how, seed=2))


@pytest.mark.parametrize("how", ["iid", "dirichlet", "shards", "quantity"])
def test_the_global_random_state_is_neither_read_nor_moved(how: str) -> None:
    np.random.seed(1)
    before = np.random.get_state()[1].copy()  # type: ignore[index]
    first = partition(LABELS, 5, how, seed=3)
    assert np.array_equal(before, np.random.get_state()[1])  # type: ignore[index]
    np.random.seed(2)
    assert same(first, partition(LABELS, 5, how, seed=3))


def test_small_alpha_skews_more_than_large() -> None:
    def skew(alpha: float) -> float:
        """Mean distance between a client's class shares and equal shares, over clients and seeds (0 to 1.8)."""
        distances = []
        for seed in range(5):
            counts = class_counts(LABELS, partition(LABELS, 5, "dirichlet", seed=seed, dirichlet_alpha=alpha), 10)
            distances.append(np.abs(counts / counts.sum(1, keepdims=True) - 0.1).sum(1).mean())
        return float(np.mean(distances))

    assert skew(0.1) > skew(1.0) + 0.2 > skew(100.0) + 0.4
    assert skew(1000.0) < 0.2


def test_dirichlet_shares_have_the_expected_mean_and_variance() -> None:
    # A share of a class is Beta(a, (C-1)a): mean 1/C = 0.25, variance (C-1)/(C^2 (C a + 1)) = 3/(16 * 3) = 0.0625
    labels = np.repeat(np.arange(10), 400)
    shares = np.concatenate(
        [
            class_counts(labels, partition(labels, 4, "dirichlet", seed=seed, dirichlet_alpha=0.5), 10).ravel() / 400
            for seed in range(20)
        ]
    )
    assert abs(shares.mean() - 0.25) < 1e-12
    assert abs(shares.var() - 0.0625) < 0.01  # 800 shares: standard error about 0.003


def test_shards_that_divide_evenly_give_each_client_few_classes() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 60))
    counts = class_counts(labels, partition(labels, 10, "shards", seed=0, shards_per_client=2), 10)
    assert np.all(counts.sum(1) == 60)
    assert np.all((counts > 0).sum(1) <= 2)
    assert set(np.unique(counts)) <= {0, 30, 60}


@pytest.mark.parametrize(
    ("quantity", "expected"),
    [
        ("linear", [100, 200, 300]),
        ("square", [42, 171, 387]),  # 600 k^2 / 14, rounded down; the last client has the rest
        ("exponential", [54, 146, 400]),  # 600 e^k / (e + e^2 + e^3)
    ],
)
def test_quantity_sizes(quantity: str, expected: list[int]) -> None:
    assert [len(part) for part in partition(LABELS, 3, "quantity", seed=0, quantity=quantity)] == expected


def test_class_counts() -> None:
    parts = [np.array([0, 1]), np.array([2, 3, 4]), np.array([], dtype=np.int64)]
    expected = [[2, 0, 0, 0], [0, 2, 1, 0], [0, 0, 0, 0]]
    for labels in (np.array([0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 2])):
        assert class_counts(labels, parts, 4).tolist() == expected


@pytest.mark.parametrize("how", ["dirichlet", "quantity", "column"])
def test_dealing_prints_nothing(how: str, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    partition(LABELS, 5, how, seed=0, client_column=np.arange(600) % 5)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


@pytest.mark.parametrize(
    ("error", "words", "clients", "how", "options"),
    [
        (ConfigError, ["'dirichlett'", "did you mean 'dirichlet'?"], 5, "dirichlett", {}),
        (ConfigError, ["clients=0", "1 or more"], 0, "iid", {}),
        (DataError, ["clients=601", "600 training samples", "at most 600"], 601, "iid", {}),
        (ConfigError, ["samples_per_client=9", "'column'", "another partition"], 5, "column",
         {"samples_per_client": 9}),
        (ConfigError, ["samples_per_client=0", "1 or more"], 5, "iid", {"samples_per_client": 0}),
        (DataError, ["samples_per_client=200", "1000", "600", "at most 120", "fewer clients"], 5, "iid",
         {"samples_per_client": 200}),
        (ConfigError, ["dirichlet_alpha = 0", "greater than 0", "Label skew"], 5, "dirichlet", {"dirichlet_alpha": 0}),
        (ConfigError, ["dirichlet_alpha = -1", "greater than 0"], 5, "dirichlet", {"dirichlet_alpha": -1}),
        (ConfigError, ["dirichlet_alpha = nan", "finite number"], 5, "dirichlet", {"dirichlet_alpha": float("nan")}),
        (ConfigError, ["dirichlet_alpha = inf", "finite number"], 5, "dirichlet", {"dirichlet_alpha": float("inf")}),
        (DataError, ["client ", "dirichlet_alpha=0.01", "100 clients", "raise dirichlet_alpha"], 100, "dirichlet",
         {"dirichlet_alpha": 0.01}),
        (ConfigError, ["shards_per_client = 0", "greater than or equal to 1"], 5, "shards", {"shards_per_client": 0}),
        (DataError, ["shards_per_client=121", "605 shards", "600", "at most 120"], 5, "shards",
         {"shards_per_client": 121}),
        (ConfigError, ["'linea'", "did you mean 'linear'?"], 5, "quantity", {"quantity": "linea"}),
        (DataError, ["client 0 ", "'exponential'", "20 clients", "fewer clients", "'linear'"], 20, "quantity",
         {"quantity": "exponential"}),
        (DataError, ["client 0 ", "599 clients", "fewer clients"], 599, "quantity", {"quantity": "linear"}),
        (DataError, ["no client column", "client_column"], 5, "column", {}),
        (DataError, ["7 distinct values", "clients=5", "pass clients=7"], 5, "column",
         {"client_column": np.arange(600) % 7}),
        (DataError, ["(3,)", "(600,)"], 3, "column", {"client_column": np.arange(3)}),
        (ConfigError, ["dirichlet_alpha = 0.5", "no effect", "'iid'", "'dirichlet'"], 5, "iid",
         {"dirichlet_alpha": 0.5}),
        (ConfigError, ["alfa = 1", "no effect", "'dirichlet'"], 5, "dirichlet", {"alfa": 1}),
    ],
)  # fmt: skip
def test_errors_name_the_value_and_the_remedy(
    error: type[Exception], words: list[str], clients: int, how: str, options: dict[str, object]
) -> None:
    with pytest.raises(error) as caught:
        partition(LABELS, clients, how, seed=0, **options)  # type: ignore[arg-type]
    for word in words:
        assert word in str(caught.value)


def test_so_many_clients_that_their_exponential_overflows() -> None:
    with pytest.raises(DataError, match=r"client 0 .*fewer clients"):
        partition(np.zeros(2000, np.int64), 1000, "quantity", seed=0, quantity="exponential")


# --- against flwr-datasets ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flower() -> Any:
    """The partitioners of flwr-datasets. The import takes seconds."""
    pytest.importorskip("datasets", reason="the extra cutlayer[datasets] is not installed")
    return pytest.importorskip("flwr_datasets.partitioner", reason="the extra cutlayer[datasets] is not installed")


def theirs(partitioner: Any, clients: int, **columns: np.ndarray) -> list[list[int]]:
    """The column `row` of each client in the partition of flwr-datasets."""
    import datasets

    partitioner.dataset = datasets.Dataset.from_dict(columns)
    return [partitioner.load_partition(client)["row"][:] for client in range(clients)]


def ours(how: str, clients: int, seed: int, labels: np.ndarray, order: np.ndarray, **options: Any) -> list[list[int]]:
    """The rows of each client in the scheme's order."""
    scheme = plugins.load("partition", how).of(options)
    return [np.asarray(part).tolist() for part in scheme.deal(labels, order, clients, seed, None)]


def random_case(n: int) -> tuple[np.random.Generator, np.ndarray, np.ndarray, int]:
    """Labels of any distribution, the rows to deal (all or some), and a number of clients."""
    rng = np.random.default_rng(n)
    rows = int(rng.integers(5, 400))
    labels = rng.choice(int(rng.integers(1, 12)), rows) * int(rng.integers(1, 4)) - 1
    order = rng.permutation(rows)[: rows if n % 3 else int(rng.integers(4, rows + 1))]
    return rng, labels, order, int(rng.integers(1, min(len(order), 15) + 1))


@pytest.mark.parametrize("n", range(60))
def test_dirichlet_deals_what_flwr_datasets_deals(flower: Any, n: int) -> None:
    rng, labels, order, clients = random_case(n)
    alpha = float(10 ** rng.uniform(-1.5, 2))
    if n % 5 == 0:
        labels = np.array([f"class {label}" for label in labels])
    for attempt in range(10):
        seed = seeds.derive(n, "partition", "dirichlet", attempt)
        drawn = flower.DirichletPartitioner(clients, "label", alpha, min_partition_size=0, shuffle=False, seed=seed)
        expected = theirs(drawn, clients, row=order, label=labels[order])
        if all(expected):
            assert ours("dirichlet", clients, n, labels, order, dirichlet_alpha=alpha) == expected
            return
    with pytest.raises(DataError, match="10 draws tried"):
        ours("dirichlet", clients, n, labels, order, dirichlet_alpha=alpha)


@pytest.mark.parametrize("n", range(60))
def test_quantity_deals_what_flwr_datasets_deals(flower: Any, n: int) -> None:
    _, labels, order, clients = random_case(n)
    quantity, kind = [("linear", "Linear"), ("square", "Square"), ("exponential", "Exponential")][n % 3]
    try:
        expected = theirs(getattr(flower, f"{kind}Partitioner")(clients), clients, row=order)
    except ValueError:
        with pytest.raises(DataError, match="would get none"):
            ours("quantity", clients, n, labels, order, quantity=quantity)
        return
    assert ours("quantity", clients, n, labels, order, quantity=quantity) == expected


@pytest.mark.parametrize("n", range(30))
def test_column_deals_what_flwr_datasets_deals(flower: Any, n: int, capfd: pytest.CaptureFixture[str]) -> None:
    rng, labels, _, _ = random_case(n)
    owner = rng.integers(-3, 9, len(labels)) * 5
    if n % 2:
        owner = np.array([["Zoë", "amy", "B 10", "b 9", ""][value % 5] + str(value) for value in owner])
    clients = len(np.unique(owner))
    natural = flower.NaturalIdPartitioner(partition_by="owner")
    expected = theirs(natural, clients, row=np.arange(len(labels)), owner=owner)
    assert [part.tolist() for part in partition(labels, clients, "column", seed=n, client_column=owner)] == expected


# --- partitions of the user's own, and options -------------------------------------------------------------------

OWN = """
import numpy as np
from cutlayer import seeds
from cutlayer.data import Partition, partition_scheme
from cutlayer.plugins import option


@partition_scheme("first", title="First", summary="the first client gets a share of its own")
class First(Partition):
    share: float = option(0.5, gt=0, lt=1, help="The first client's share.")

    def deal(self, labels, order, clients, seed, owners):
        many = int(self.share * len(order))
        return [order[:many], *np.array_split(order[many:], clients - 1)]


@partition_scheme("wrong", title="Wrong", summary="makes a mistake")
class Wrong(Partition):
    mistake: str = option("few")

    def deal(self, labels, order, clients, seed, owners):
        return {
            "few": [order],
            "none": [order, order[:0]],
            "twice": [order, order[:3]],
            "beyond": [order, [len(order)]],
            "real": [order / 2, order],
        }[self.mistake]


@partition_scheme("empty", title="Empty", summary="has no method")
class Empty(Partition):
    pass


class Plain:
    pass
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    """A file with the user's own partitions."""
    (tmp_path / "deals.py").write_text(OWN)
    return str(tmp_path / "deals.py")


def test_a_partition_of_ones_own(own: str) -> None:
    parts = partition(LABELS, 5, f"{own}:First", seed=1, share=0.25)
    dealt_right(parts, 600, 5)
    assert [len(part) for part in parts] == [150, 113, 113, 112, 112]
    assert len(partition(LABELS, 5, f"{own}:First", seed=1)[0]) == 300
    made = plugins.load("partition", f"{own}:First")(share=0.25)
    assert same(parts, partition(LABELS, 5, made, seed=1))
    assert len(partition(LABELS, 5, made, seed=1, samples_per_client=40)[0]) == 50


@pytest.mark.parametrize(
    ("name", "options", "error", "words"),
    [
        ("First", {"share": 2}, ConfigError, ["share = 2", "less than 1", "first client's"]),
        ("First", {"part": 2}, ConfigError, ["part = 2", "no effect"]),
        ("Wrong", {}, DataError, ["1 parts for 2 clients"]),
        ("Wrong", {"mistake": "none"}, DataError, ["client 1", "(0,)", "at least one"]),
        ("Wrong", {"mistake": "twice"}, DataError, ["each row once"]),
        ("Wrong", {"mistake": "beyond"}, DataError, ["not available"]),
        ("Wrong", {"mistake": "real"}, DataError, ["client 0", "float64", "row numbers"]),
        ("Wrong", {"mistake": "else"}, ConfigError, ["KeyError: 'else'", "correct"]),
        ("Empty", {}, ConfigError, ["method deal"]),
        ("Plain", {}, ConfigError, ["not registered"]),
        ("Frist", {}, ConfigError, ["did you mean 'First'"]),
    ],
)
def test_partitions_of_ones_own_that_cannot_be_used(
    own: str, name: str, options: dict[str, Any], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        partition(LABELS, 2, f"{own}:{name}", seed=0, **options)
    for word in words:
        assert word in str(caught.value)


def test_a_configured_partition_has_its_options() -> None:
    scheme: Partition = Dirichlet(dirichlet_alpha=0.2)
    expected = partition(LABELS, 5, "dirichlet", seed=3, dirichlet_alpha=0.2)
    assert same(partition(LABELS, 5, scheme, seed=3), expected)
    with pytest.raises(ConfigError, match="dirichlet_alpha is given beside"):
        partition(LABELS, 5, scheme, seed=3, dirichlet_alpha=0.3)


def test_options_are_those_of_a_run() -> None:
    entries = plugins.index("partition")
    assert set(entries) == {"iid", "dirichlet", "shards", "quantity", "column"}
    options = [o for entry in entries.values() for o in entry.options]
    assert {o.name for o in options} == {"dirichlet_alpha", "shards_per_client", "quantity"}
    assert all(o.help for o in options)
