"""The consoles, and the flags that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter
from rich.console import Console

FILES = Group("Files", sort_key=9)

HELP = """Scalable split learning: train and compare algorithms that split a model between clients and a server.

Start with `cutlayer compare`, which trains several algorithms on handwritten digits with ten clients and three seeds.
`cutlayer list` shows all algorithms (including federated and centralised learning), models, data sets and so on. Each
command shows its most common options with `--help` and all options with `--help-all`. You can also write options into
a TOML file (`--config`), with underscores in place of hyphens; flags override the file. The resolved configuration is
stored with the run, and running from it reproduces the run.

Exit codes: 0 done, 1 training failed, 2 wrong input (nothing was written), 3 disk full, 75 not possible now (the same
command may succeed later), 130 interrupted. After 3 and 130, `cutlayer resume` continues the run. `--debug` shows the
traceback of an error, for example one in your own code.
"""
# Markup is off: square brackets in names, paths and others' messages are text.
out = Console(markup=False)
err = Console(stderr=True, markup=False)

# Annotations of parameters that several commands have.
ConfigFile = Annotated[Path | None, Parameter(name="--config", group=FILES)]
Out = Annotated[Path | None, Parameter(group=FILES)]
Overwrite = Annotated[bool, Parameter(group=FILES, negative=())]
Folder = Annotated[Path, Parameter(group=FILES)]
