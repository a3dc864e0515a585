"""Perplexity of split fine-tuning: a small Llama-like model of English, tuned by four clients in four other languages.

    apt-get install fortunes fortunes-de fortunes-it fortunes-es fortunes-pl
    python benchmarks/language_models.py FOLDER [--fortunes /usr/share/games/fortunes] [--seeds 3] [--rates 0.002 ...]

Compared are the base itself, a guesser that only knows how frequent each token is, and the algorithms in `WAYS`.

Texts are Debian's fortune cookies. A byte-level BPE vocabulary and a model of about a million parameters are trained on
the English ones; then only LoRA adapters are trained on the texts of the clients, each of which has one language. Each
algorithm is run with seed 0 at all rates; the one with the lowest validation perplexity is run with the other seeds.
All have the same rates to choose from. Seconds are CPU seconds of training with one thread, without preparation and
evaluation, so other programs on the machine hardly change them. Results go to FOLDER/results.jsonl, line by line;
existing runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file

from cutlayer import Run
from cutlayer.errors import NonFiniteError

LANGUAGES = ("de", "es", "it", "pl")
BASE, PER_CLIENT, TEST = 1_000_000, 40_000, 16_000  # bytes of text
LENGTH, BLOCKS, VOCABULARY = 64, 4, 1024
RATES = (2e-3, 8e-3, 3.2e-2)
SPLIT: dict[str, Any] = {"cut": "2"}
BENT: dict[str, Any] = {"cut": "2", "tail_cut": "3"}
WAYS: dict[str, dict[str, Any]] = {
    "cl": {"algorithm": "cl"},
    "fl": {"algorithm": "fl"},
    "psl": {"algorithm": "psl", **SPLIT},
    "sfl": {"algorithm": "sfl", **SPLIT},
    "sglr": {"algorithm": "sglr", **SPLIT},
    "ssl": {"algorithm": "ssl", **SPLIT},
    "upsl": {"algorithm": "upsl", **BENT},
    "usfl": {"algorithm": "usfl", **BENT},
}


def cookies(folder: Path) -> Iterator[str]:
    """The fortunes in a folder's files, in order."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix not in (".dat", ".u8") and not file.is_symlink():
            text = file.read_text(encoding="utf-8", errors="replace")
            yield from (found for cookie in text.split("\n%") if (found := cookie.strip("%\n ")))


def some(folder: Path, size: int) -> list[str]:
    """Fortunes of this number of bytes in all, drawn from the whole folder."""
    every, taken, count = list(cookies(folder)), [], 0
    for i in torch.randperm(len(every), generator=torch.Generator().manual_seed(0)).tolist():
        if count < size:
            taken.append(every[i])
            count += len(every[i].encode())
    return taken


def write_lines(path: Path, texts: list[str]) -> None:
    """One JSON object for each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def prepared(root: Path, fortunes: Path) -> None:
    """Texts, tokenizer and base model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    english = some(fortunes, BASE)
    write_lines(root / "english.jsonl", english)
    for language in LANGUAGES:
        texts = some(fortunes / language, PER_CLIENT + TEST)
        sizes = torch.tensor([len(text.encode()) for text in texts])
        split = int((sizes.cumsum(0) <= TEST).sum())
        write_lines(root / "clients" / "test" / f"{language}.jsonl", texts[:split])
        write_lines(root / "clients" / "train" / f"{language}.jsonl", texts[split:])
    own = Tokenizer(models.BPE())
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    own.train_from_iterator(
        english,
        trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<pad>", "<end>"], initial_alphabet=alphabet),
    )
    PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", eos_token="<end>").save_pretrained(root / "base")
    LlamaConfig(
        architectures=["LlamaForCausalLM"], vocab_size=VOCABULARY, hidden_size=128, intermediate_size=352,
        num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=BLOCKS, max_position_embeddings=LENGTH,
        pad_token_id=0, eos_token_id=1, bos_token_id=None, tie_word_embeddings=False,
    ).save_pretrained(root / "base")  # fmt: skip
    start = time.perf_counter()
    run = Run(
        model=f"hf:{root}/base", data=str(root / "english.jsonl"), task="tokens", algorithm="cl", epochs=3, batch=16,
        client_lr=2e-3, client_optimizer="adamw", lr_schedule="cosine", sequence_length=LENGTH,
    )  # fmt: skip
    done = run.run()
    print(f"base: perplexity {done.test['perplexity']:.1f} of English, {time.perf_counter() - start:.0f} s", flush=True)
    save_file(run.model().state_dict(), root / "base" / "model.safetensors", metadata={"format": "pt"})


def configured(root: Path, way: str, rate: float, seed: int) -> Run:
    """A run that tunes adapters on the clients' texts."""
    common: dict[str, Any] = {
        "model": f"hf:{root}/base", "data": str(root / "clients"), "partition": "column", "clients": len(LANGUAGES),
        "task": "tokens", "sequence_length": LENGTH, "lora_rank": 8, "lora_targets": ("all-linear",),
        "client_optimizer": "adamw", "client_lr": rate, "lr_schedule": "cosine", "batch": 4, "epochs": 2, "seed": seed,
        "eval_every": 10**6,  # rounds: at the end only
    }  # fmt: skip
    return Run(**common | WAYS[way])


def untuned(root: Path) -> tuple[float, float]:
    """Perplexities of the base, and of the clients' token frequencies (one added to each count), of the test texts."""
    training = configured(root, "cl", RATES[0], 0).training
    source = training.source
    base = training.clients.evaluate(source.test, training.server.predict, None).mean("perplexity")
    learnt, asked = (y[y != -100] for y in (source.train.y, source.test.y))
    counts = torch.bincount(learnt, minlength=VOCABULARY) + 1
    return base, float((counts / counts.sum()).log()[asked].mean().neg().exp())


def tuned(root: Path, way: str, rate: float, seed: int) -> dict[str, Any]:
    """One run: perplexity, bytes, CPU seconds. Perplexities are infinite if it diverged."""
    row: dict[str, Any] = {"way": way, "rate": rate, "seed": seed, "validation": math.inf, "test": math.inf}
    run = configured(root, way, rate, seed)
    try:
        with patch("time.perf_counter", time.process_time):  # the clock of a run, which stops during evaluations
            done = run.run()
    except NonFiniteError:
        return row
    (end,) = run.evaluations
    return row | {
        "validation": end.validation["perplexity"], "test": end.test["perplexity"],
        "up": done.bytes_up, "down": done.bytes_down, "engine": done.engine,
        "cpu_seconds": done.seconds, "evaluation_cpu_seconds": done.evaluation_seconds,
    }  # fmt: skip


def main() -> None:
    """Run missing ones; print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fortunes", type=Path, default=Path("/usr/share/games/fortunes"))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    args = parser.parse_args()
    torch.set_num_threads(1)
    root, results = args.folder, args.folder / "results.jsonl"
    if not (root / "base" / "model.safetensors").is_file():
        prepared(root, args.fortunes)
    found = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []

    def result(way: str, rate: float, seed: int) -> dict[str, Any]:
        for row in found:
            if (row["way"], row["rate"], row["seed"]) == (way, rate, seed):
                return dict(row)
        row = tuned(root, way, rate, seed)
        found.append(row)
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row

    base, guesser = untuned(root)
    print(f"| base, not tuned | | {base:.1f} |\n| frequencies of single tokens | | {guesser:.1f} |", flush=True)
    for way in args.ways:
        tried = [result(way, rate, 0) for rate in args.rates]
        rate = min(tried, key=lambda row: float(row["validation"]))["rate"]
        rows = [result(way, rate, seed) for seed in range(args.seeds)]
        scores = [row["test"] for row in rows]
        spread = statistics.stdev(scores) if len(scores) > 1 else float("nan")
        cells = [f"{statistics.mean(scores):.1f} ± {spread:.1f}", *(f"{row['test']:.1f}" for row in tried)]
        cells += [f"{rows[0][direction] / 1e6:.1f}" for direction in ("up", "down")]
        seconds = statistics.mean(row["cpu_seconds"] for row in rows)
        print(f"| {way} | {rate:g} | {' | '.join(cells)} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
