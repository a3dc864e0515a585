"""Instruments that measure what the server can learn from smashed data, as functions of tensors.

`x` [n, ...] are private inputs, `z` [n, ...] their smashed data, `y` [n] their labels, a row being one sample.
No single number measures leakage; the instruments make a bracket:

- `mutual`: upper bounds for every attacker, if noise or quantisation make them finite, and held-out lower estimates;
- `information`: how much cheaper x is to code for a predictor that sees z;
- `reconstruct`, `hijack`: the results of a passive and an active attacker, beside attackers that do nothing;
- `recovery`: how many tokens an attacker recovers, if inputs are tokens;
- `ranks`: cheap measures that only order; label leakage from cut gradients;
- `calibration`: an estimator's readings for known answers, and whether two readings may be ranked at all;
- `defences.dp`: the guarantee of noise against every attacker.

Every function takes a seed, leaves global random state alone, and returns frozen dataclasses of plain numbers.
"""

from importlib.util import find_spec

from cutlayer.errors import ConfigError


def check_installed() -> None:
    """Raises ConfigError if a library of the extra `leakage` is missing that a measurement needs."""
    for name in ("dcor", "skimage"):
        if find_spec(name) is None:
            raise ConfigError(f"measuring leakage needs {name}: install the extra, pip install 'cutlayer[leakage]'")
