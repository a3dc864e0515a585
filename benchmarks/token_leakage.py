"""Tokens that a server recovers while language models are tuned: by depth of the cut, codec and noise.

    python benchmarks/language_models.py FOLDER     # texts, tokenizer and base, if they are not there yet
    python benchmarks/token_leakage.py FOLDER [--seeds 3]

Each setting is a run of `sfl` with adapters on the clients of `language_models.py` for one epoch. Then rows of one
client are attacked, by an attacker that knows the client part, or the one that the run began with. Results go to
FOLDER/tokens.jsonl, line by line; a setting that is there already is not run again. The table has means and standard
deviations over the seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from language_models import LANGUAGES, LENGTH

from cutlayer import Run
from cutlayer.leakage.assess import Asked, examine
from cutlayer.leakage.subject import moments, subjects

ROWS, RATE = 64, 8e-3
COLUMNS = ("nearest, model", "inversion, model", "search, model", "nearest, smashed")
SETTINGS: dict[str, dict[str, Any]] = {
    "embedding": {"cut": "model.embed_tokens", "algorithm": "psl"},  # nothing of its clients is trained
    "block 1": {"cut": "1"},
    "block 2": {"cut": "2"},
    "block 3": {"cut": "3"},
    "block 2, int8": {"cut": "2", "up_codec": "int8"},
    "block 2, top 25 %": {"cut": "2", "up_codec": "top-k:0.25"},
    "block 2, noise 0.001": {"cut": "2", "clip": 350.0, "gaussian_noise": 0.001},
    "block 2, noise 0.01": {"cut": "2", "clip": 350.0, "gaussian_noise": 0.01},
    "block 2, noise 0.03": {"cut": "2", "clip": 350.0, "gaussian_noise": 0.03},
    "block 2, noise 0.1": {"cut": "2", "clip": 350.0, "gaussian_noise": 0.1},
}


def measured(root: Path, setting: str, seed: int) -> dict[str, Any]:
    """One run, and what is recovered of it."""
    given: dict[str, Any] = {
        "model": f"hf:{root}/base", "data": str(root / "clients"), "partition": "column", "clients": len(LANGUAGES),
        "task": "tokens", "sequence_length": LENGTH, "lora_rank": 8, "lora_targets": ("all-linear",),
        "algorithm": "sfl", "client_optimizer": "adamw", "client_lr": RATE, "lr_schedule": "cosine", "batch": 4,
        "epochs": 1, "seed": seed,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        done = Run(out=f"{folder}/run", **given | SETTINGS[setting]).run()
        (moment,) = moments(Path(folder) / "run")
        (subject,) = subjects(moment, 1, ROWS, None, seed)
        attacks = ("nearest", "inversion", "search")[: 2 if "," in setting else 3]  # the search is slow
        found = examine(subject, Asked(("model",), attacks=attacks, seed=seed)).finding.recovered
        found += examine(subject, Asked(("smashed",), attacks=attacks[:1], seed=seed)).finding.recovered
        length = float(subject.z.flatten(1).norm(dim=1).mean())
    recovered = {f"{r.attack}, {r.knowledge}": r.accuracy for r in found}
    about = {"setting": setting, "seed": seed, "test": done.test["perplexity"], "norm": length}
    return {**about, "unigram": found[0].unigram, **recovered}


def spread(values: list[float]) -> str:
    """Mean and standard deviation, as text; empty without values."""
    if len(values) < 2:
        return "".join(f"{value:.1f}" for value in values)
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def main() -> None:
    """Run what is missing; print each line, then the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = args.folder / "tokens.jsonl"
    found = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    done = {(row["setting"], row["seed"]) for row in found}
    for seed in range(args.seeds):
        for setting in args.settings:
            if (setting, seed) not in done:
                row = measured(args.folder, setting, seed)
                found.append(row)
                print(row, flush=True)
                with results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    for setting in args.settings:
        rows = [row for row in found if row["setting"] == setting and row["seed"] < args.seeds]
        shares = [spread([100 * row[name] for row in rows if name in row]) for name in COLUMNS]
        print(f"| {setting} | {spread([row['test'] for row in rows])} | {' | '.join(shares)} |")
    print(f"unigram guesser: {spread([100 * row['unigram'] for row in found])} %")


if __name__ == "__main__":
    main()
