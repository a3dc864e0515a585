"""Tables in Python have the same content as the CSV files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from support import mlp, source

from cutlayer import Comparison, ConfigError, Run, tables
from cutlayer.observations import Observations, flat
from cutlayer.report import collect_studies

OPTIONS: dict[str, Any] = {
    "model": mlp,
    "cut": "2",
    "partition": "column",
    "clients": 2,
    "rounds": 2,
    "batch": 4,
    "engine": "local",
    "eval_every": 1,
    "precision": "float64",
}


def test_frames_are_the_csv_files(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")

    def same(frame: Any, path: Path) -> None:
        stored = pandas.read_csv(path, dtype={"client": str})
        assert len(stored)
        pandas.testing.assert_frame_equal(frame, stored, check_dtype=False, rtol=1e-14)

    comparison = Comparison(
        algorithms=("psl", "sflv3"), seeds=(0, 1), data=source([8, 8], (6,)), out=tmp_path / "c", **OPTIONS
    )
    rows = comparison.run()
    run = Run(algorithm="psl", seed=3, data=source([8, 8], (6,)), out=tmp_path / "r", **OPTIONS)
    run.run()
    collect_studies([tmp_path / "c"], tmp_path / "one")
    found = tables(tmp_path / "c")
    assert list(found) == ["table", "steps", "evaluations", "clients"]
    for name, table in found.items():
        same(table.to_pandas().assign(study="c")[["study", *table.rows[0]]], tmp_path / f"one/{name}.csv")
    assert len(found["evaluations"]) == 2 * 2 * 2
    same(rows.to_pandas().assign(study="c")[["study", *rows.rows[0]]], tmp_path / "one/table.csv")
    collect_studies([tmp_path / "c", tmp_path / "r"], tmp_path / "both")
    for name, table in tables(tmp_path / "c", str(tmp_path / "r")).items():
        same(table.to_pandas(), tmp_path / f"both/{name}.csv")
    alone = tables(tmp_path / "r")["evaluations"].to_pandas()
    pandas.testing.assert_frame_equal(run.evaluations.to_pandas(), alone)
    assert list(alone["seed"]) == [3, 3]


def test_rows_have_all_columns_and_lists_are_counted() -> None:
    found = Observations([{"a": 1}, {"b": {"c": 2, "d": [1]}, "clients": (1, 2)}], flat)
    assert found.rows == [{"a": 1, "b.c": None, "clients": None}, {"a": None, "b.c": 2, "clients": 2}]
    assert found == [{"a": 1}, {"b": {"c": 2, "d": [1]}, "clients": (1, 2)}]


def test_without_pandas_an_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match=r"to_pandas needs the package pandas.*pip install 'cutlayer\[pandas\]'"):
        Observations([{"a": 1}], dict).to_pandas()
