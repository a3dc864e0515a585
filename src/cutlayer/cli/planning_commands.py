"""`plan` and `calibrate`: the costs of training, and the speed of this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from pydantic import BaseModel

from cutlayer.cli.application import FILES, ConfigFile, Out, err, out
from cutlayer.cli.flags import command
from cutlayer.cli.merging import check_positive, merged_values
from cutlayer.cli.printing import print_exactly, wide
from cutlayer.errors import ConfigError
from cutlayer.files import replace_file
from cutlayer.options import CalibrateConfig, PlanConfig

if TYPE_CHECKING:
    from rich.console import Console

    from cutlayer.costs.plan import Plan


@command(sort_key=6, options=PlanConfig)
def plan(
    *,
    options: BaseModel | None = None,
    config: ConfigFile = None,
    out: Out = None,
    json: Annotated[bool, Parameter(group=FILES, negative=())] = False,
) -> None:
    """Estimate what split learning would cost, without training: bytes, FLOPs, memory, time, energy, and the best cut.

    The model is built without allocating its weights, so even billions of parameters and a million clients take only
    seconds. You can name your own model: any function without arguments that returns an nn.Module.

    Parameters
    ----------
    config
        A TOML file with any of the options above.
    out
        A folder to create for plan.json and plan.png. Default: write nothing.
    json
        Print JSON instead of tables.
    """
    merged = PlanConfig.of(merged_values(PlanConfig, options, config))
    merged.check(frozenset(merged.model_fields_set))
    _plan(merged, out, json)


@command(sort_key=8, options=CalibrateConfig)
def calibrate(
    *,
    options: BaseModel | None = None,
    name: str = "this-machine",
    batch: int = 8,
    device: str = "cpu",
    seconds: float = 10.0,
    watts: float | None = None,
    idle_watts: float | None = None,
    out: Out = None,
) -> None:
    """Measure this machine's training speed and power, and write a device profile for `--profiles`.

    Parameters
    ----------
    name
        Name of the profile.
    batch
        The batch size.
    device
        The device to measure: cpu, cuda, ...
    seconds
        Length of the measurement in seconds.
    watts
        Power in watts that a wall meter shows during the measurement, if this machine cannot measure its power.
    idle_watts
        Power in watts that the meter shows while the machine is idle.
    out
        The file to write. Default: print the profile.
    """
    from cutlayer.costs.calibrate import calibrate as measure

    check_positive(batch=batch, seconds=seconds, watts=watts, idle_watts=idle_watts)
    if out is not None and out.exists():
        raise ConfigError(f"out = {str(out)!r} exists already: choose another file")
    chosen = CalibrateConfig.of(merged_values(CalibrateConfig, options, None))
    found = measure(
        chosen.model,
        batch=batch,
        device=device,
        seconds=seconds,
        watts=watts,
        idle_watts=idle_watts,
        shape=chosen.input,
        kind=chosen.input_type,
        options=chosen.specific,
    )
    spread = f"{found.lowest / 1e9:.3g} to {found.highest / 1e9:.3g}"
    err.print(f"{found.flops_per_second / 1e9:.3g} GFLOP/s ({spread}) at {found.watts:.3g} W", highlight=False)
    if out is None:
        print_exactly(found.toml(name))
    else:
        replace_file(out, found.toml(name).encode())
        err.print(f"use it with: --profiles {out} --client-device {name}", highlight=False, soft_wrap=True)


def _plan(config: PlanConfig, folder: Path | None, as_json: bool) -> None:
    """Calculate, print, write."""
    import json

    from cutlayer.costs.plan import plan
    from cutlayer.folder import refuse_used

    if folder is not None:
        refuse_used(folder)
    found = plan(config)
    text = json.dumps(found.as_dict(), indent=1, allow_nan=False)
    if as_json:
        sys.stdout.write(f"{text}\n")
    else:
        from cutlayer.report.planned import show

        show(found, wide(140))
    if folder is not None:
        _write_plan(found, text, folder, err if as_json else out)


def _write_plan(found: Plan, text: str, folder: Path, console: Console) -> None:
    """Write plan.json and plan.png and print their paths."""
    from cutlayer.report.planned import picture

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out = {str(folder)!r} cannot be made: {error.strerror}; choose another --out") from None
    for name, content in (("plan.json", f"{text}\n".encode()), ("plan.png", picture(found))):
        replace_file(folder / name, content)
        console.print(str(folder / name), soft_wrap=True, highlight=False)
