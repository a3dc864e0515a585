"""What the server can learn from smashed data: measuring instruments on tensors.

`x` [n, ...] are private inputs, `z` [n, ...] their smashed data, `y` [n] their labels, a row being one sample.
No single number measures leakage; the instruments make a bracket:

- `mutual`: what no attacker can exceed where noise or quantisation make it finite, and held-out lower estimates;
- `information`: how much cheaper x is to code for a predictor that sees z;
- `reconstruct`, `hijack`: how well a passive and an active attacker in fact do, beside attackers that do nothing;
- `recovery`: how many tokens an attacker recovers, where inputs are tokens;
- `ranks`: cheap measures that only order; label leakage from cut gradients;
- `calibration`: what an estimator reads where the answer is known, and whether two readings may be ranked at all;
- `defences.dp`: what a noise guarantees, whatever the attacker does.

Every function takes a seed, leaves global random state alone, and returns frozen dataclasses of plain numbers.
"""

from importlib.util import find_spec

from cutlayer.errors import ConfigError


def check_installed() -> None:
    """Raises ConfigError where a library of the extra `leakage` is missing that a measurement would end at."""
    for name in ("dcor", "skimage"):
        if find_spec(name) is None:
            raise ConfigError(f"measuring leakage needs {name}: install the extra, pip install 'cutlayer[leakage]'")
