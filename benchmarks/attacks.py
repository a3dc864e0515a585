"""The effect of hostile clients on training, and of defences: attack by defence, over seeds.

    python benchmarks/attacks.py [--seeds 0 1 2] [--only sfl] [--json FILE] [--write docs/security.md]

Ten clients hold 300 samples of Fashion-MNIST each; two or four of them are hostile. The small CNN is trained for three
epochs by SFL, which averages client models, and by PSL, which does not. Scores are the mean over the honest clients of
the accuracy of (that client's model, the server's model) on the first 1000 test images, at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pages
import scored

from cutlayer import Run, Source

MARK = "<!-- attacks -->"
CLIENTS, SAMPLES, EPOCHS, BATCH, RATE, TESTED = 10, 300, 3, 10, 0.003, 1000

ATTACKS = {
    "": "no attack",
    "only 8": "eight honest clients alone",
    "only 6": "six honest clients alone",
    "scale:1000@0-1": "all that is sent, 1000-fold",
    "features:1@0-1": "random smashed data",
    "labels:1@0-1": "flipped labels",
    "labels:1@0-3": "flipped labels, four of ten",
    "sign:1@0-1": "gradient ascent",
    "poison:10@0-1": "noise of ten times an update's length",
    "poison:-10@0-1": "the update, times minus ten",
}
BOUND: dict[str, Any] = {"screening": "median_bound", "row_multiple": 2.0}
DEFENCES: dict[str, dict[str, dict[str, Any]]] = {
    "sfl": {
        "mean": {},
        "norm_bound": {"averaging": "norm_bound"},
        "trimmed_mean": {"averaging": "trimmed_mean", "trim": 0.2},
        "median": {"averaging": "median"},
        "median_bound 2": BOUND,
        "median_bound 2, median": {**BOUND, "averaging": "median"},
    },
    "psl": {"none": {}, "median_bound 2": BOUND, "median_bound 1": {**BOUND, "row_multiple": 1.0}},
}
ONLY_UPDATES = ("poison",)  # without effect if models stay with their clients


def attacks_on(algorithm: str) -> list[str]:
    """The attacks that have an effect."""
    return [name for name in ATTACKS if algorithm == "sfl" or not name.startswith(ONLY_UPDATES)]


def accuracy(source: Source, algorithm: str, attack: str, defence: dict[str, Any], seed: int, **options: Any) -> float:
    """The score of a run in percent; nan if numbers became infinite or NaN."""
    alone = attack.startswith("only ")
    named = (attack,) if attack and not alone else ()
    options |= {"clients": int(attack.removeprefix("only "))} if alone else {}
    common: dict[str, Any] = {
        "client_lr": RATE,
        "eval_every": 10**6,
        "clients": CLIENTS,
        "samples_per_client": SAMPLES,
        "epochs": EPOCHS,
        "batch": BATCH,
    }
    run = Run(
        algorithm=algorithm, data=source, model="cnn", attack=named, seed=seed, **{**common, **defence, **options}
    )
    return scored.accuracy(run)


def figure(scores: list[float]) -> str:
    """Mean and standard deviation, or an empty string if there are no scores."""
    if not scores:
        return ""
    if any(s != s for s in scores):
        return "ends with NaN"
    spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
    return f"{statistics.fmean(scores):.1f} ± {spread:.1f}"


def table(algorithm: str, found: dict[tuple[str, str], list[float]]) -> Iterable[str]:
    """The lines of one algorithm's table."""
    names = list(DEFENCES[algorithm])
    yield f"| {algorithm}: attack | " + " | ".join(names) + " |"
    yield "|---|" + "---|" * len(names)
    for attack in attacks_on(algorithm):
        what = f"`{attack}`: {ATTACKS[attack]}" if "@" in attack else ATTACKS[attack]
        yield f"| {what} | " + " | ".join(figure(found.get((attack, name), [])) for name in names) + " |"


def main() -> None:
    """Trains everything and prints the tables or writes them to a page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", choices=list(DEFENCES), help="one algorithm")
    parser.add_argument("--data", default="/usr/share/datasets/fashion-mnist", help="the folder of Fashion-MNIST")
    parser.add_argument("--json", type=Path, help="add results to this file, a line each, and take those that it has")
    parser.add_argument("--write", type=Path, help=f"write the tables to this file, between its lines '{MARK}'")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    source, started, lines = scored.data(asked.data, TESTED), time.process_time(), list[str]()
    kept = {}
    if asked.json and asked.json.exists():
        for line in asked.json.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            kept[row["algorithm"], row["attack"], row["defence"], row["seed"]] = row["accuracy"]
    for algorithm, defences in DEFENCES.items():
        if asked.only not in (None, algorithm):
            continue
        found: dict[tuple[str, str], list[float]] = {}
        for attack in attacks_on(algorithm):
            for name, options in list(defences.items())[: 1 if attack.startswith("only") else None]:
                for seed in asked.seeds:
                    cell = (algorithm, attack, name, seed)
                    if cell not in kept:
                        kept[cell] = accuracy(source, algorithm, attack, options, seed)
                        if asked.json:
                            row = dict(zip(("algorithm", "attack", "defence", "seed"), cell, strict=True))
                            with asked.json.open("a", encoding="utf-8") as file:
                                file.write(json.dumps({**row, "accuracy": kept[cell]}) + "\n")
                    found.setdefault((attack, name), []).append(kept[cell])
                print(algorithm, attack, name, figure(found[attack, name]), flush=True)
        lines += ["", *table(algorithm, found)]
    lines.append("")
    print("\n".join(lines), f"\n{time.process_time() - started:.0f} s of one core")
    if asked.write:
        pages.put(asked.write, MARK, lines)


if __name__ == "__main__":
    main()
