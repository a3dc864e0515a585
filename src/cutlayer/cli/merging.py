"""Merges a file and flags into one checked configuration, and has the checks that several commands share."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cutlayer.errors import ConfigError
from cutlayer.options import BudgetConfig, FaultConfig, RunConfig, normalised, overlaid, read_toml


def run_config(options: BaseModel | None, config: Path | None) -> RunConfig:
    """A run's options: the file's with the flags over them, checked. Raises ConfigError."""
    values = merged_values(RunConfig, options, config)
    merged = RunConfig.of(values)
    merged.check(frozenset(values))
    return merged


def fault_config(flags: BaseModel | None, config: Path | None) -> FaultConfig:
    """The policy for faults: the file's table [faults] with the flags over it. Raises ConfigError."""
    return FaultConfig.of(_table("faults", "deadline = 30", flags, config))


def budget_config(flags: BaseModel | None, config: Path | None) -> BudgetConfig:
    """The limits for a server's requests: the file's table [budget] with the flags over it. Raises ConfigError."""
    return BudgetConfig.of(_table("budget", "max_rounds = 30", flags, config))


def _table(name: str, example: str, flags: BaseModel | None, config: Path | None) -> dict[str, Any]:
    """The file's table of that name with the flags over it. Raises ConfigError."""
    table = {} if config is None else read_toml(config).get(name, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{name} = {table!r} is not a table: write [{name}] on a line, and below it e.g. {example}")
    given = {} if flags is None else flags.model_dump(include=flags.model_fields_set)
    return {**normalised(table), **given}


def merged_values(model: type[BaseModel], options: BaseModel | None, config: Path | None) -> dict[str, Any]:
    """The file's values with the flags over them."""
    flags = {} if options is None else options.model_dump(include=options.model_fields_set)
    values = read_toml(config) if config is not None else {}
    if model is RunConfig:
        for table in ("faults", "budget"):  # for `serve` and `join`; without effect if all clients are in this process
            values.pop(table, None)
    return overlaid(values, flags)


def check_positive(**values: float | None) -> None:
    """Raises ConfigError for a given value that is not a finite number greater than 0."""
    for name, value in values.items():
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{name} = {value} is not possible: it must be greater than 0")


def fresh_folder(name: str) -> Path:
    """A folder that does not exist yet, named by the present time."""
    stem = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    count, path = 1, stem
    while path.exists():
        count, path = count + 1, stem.with_name(f"{stem.name}-{count}")
    return path
