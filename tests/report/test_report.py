"""Reports are made from files alone, so these tests write folders like those of runs."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from cutlayer.errors import RunFolderError
from cutlayer.report import format_bytes, write

NAMES = ["curves.png", "classes.png", "report.html"]


def make_run(
    path: Path,
    algorithm: str = "sglr",
    seed: int = 0,
    *,
    clients: int = 4,
    classes: int = 3,
    epochs: int = 4,
    accuracy: float = 0.8,
    done: bool = True,
    evaluated: bool = True,
    class_names: list[str] | None = None,
    validation: bool = True,
) -> None:
    """A run folder with two steps per epoch of 60 samples each. Accuracy grows linearly to `accuracy`."""
    path.mkdir(parents=True)
    config = {"algorithm": algorithm, "seed": seed, "data": "digits", "clients": clients, "partition": "iid"}
    config |= {
        "model": "mlp",
        "cut": "hidden2",
        "epochs": epochs,
        "batch": 8,
        "client_optimizer": "adam",
        "client_lr": 0.001,
    }
    (path / "config.toml").write_text(tomli_w.dumps(config))
    counts = [[120 // (clients * classes)] * classes for _ in range(clients)]
    names = class_names or [str(k) for k in range(classes)]
    (path / "classes.json").write_text(json.dumps({"class_names": names, "counts": counts}))
    with (path / "steps.jsonl").open("w") as file:
        for step in range(2 * epochs):
            record = {"step": step, "round": step // 2, "loss": 2.0 / (step + 1), "clients": list(range(clients))}
            record |= {"active": [], "samples": 60, "client_lr": 0.001, "server_lr": 0.004}
            record |= {"bytes_up": 1000 * (step + 1), "bytes_down": 900 * (step + 1), "seconds": 0.1 * (step + 1)}
            file.write(json.dumps(record) + "\n")
    with (path / "evaluations.jsonl").open("w") as file:
        for epoch in range(1, 1 + epochs * evaluated):
            now = accuracy * epoch / epochs
            scores = {"round": epoch, "step": 2 * epoch, "epochs": float(epoch), "test_score": now}
            scores |= {
                "validation_score": now + 0.01 if validation else None,
                "validation_loss": 0.5 * validation or None,
            }
            scores |= {"test_loss": 0.6, "test_score_worst": now - 0.1, "bytes_up": 2000 * epoch}
            file.write(json.dumps({**scores, "bytes_down": 1800 * epoch, "seconds": 0.2 * epoch}) + "\n")
    if done:
        result = {"algorithm": algorithm, "engine": "local", "test_score": accuracy, "best_test_score": accuracy}
        result |= {"best_round": epochs, "rounds": epochs, "steps": 2 * epochs, "samples": 120 * epochs, "seconds": 0.5}
        result |= {"bytes_up": 12_345_678, "bytes_down": 9_000_000, "bytes_down_broadcast": 4_000_000}
        kinds = [("down", "cut gradients", 9_000_000, 4_000_000), ("up", "smashed data", 12_345_678, 12_345_678)]
        table = [{"direction": d, "kind": k, "wire-unicast": u, "wire-broadcast": b} for d, k, u, b in kinds]
        (path / "result.json").write_text(json.dumps({**result, "bytes": table}))


def make_comparison(
    path: Path, entries: dict[str, str], seeds: tuple[int, ...] = (0, 1), *, finished: bool = True, **options: Any
) -> None:
    """A comparison of `entries` (name: algorithm), with accuracies of 80% and, for the second seed, 82%."""
    path.mkdir()
    plain = [name for name, algorithm in entries.items() if name == algorithm]
    variants = {name: {"algorithm": algorithm, "phi": 0.25} for name, algorithm in entries.items() if name != algorithm}
    config = {"algorithms": plain, "seeds": list(seeds), "data": "digits", "clients": 4, "partition": "iid", "batch": 8}
    (path / "config.toml").write_text(tomli_w.dumps({**config, "epochs": 4, "variant": variants}))
    rows = []
    for name, algorithm in entries.items():
        for seed in seeds:
            make_run(path / name / f"seed-{seed}", algorithm, seed, accuracy=0.8 + 0.02 * seed, **options)
        row = {"entry": name, "algorithm": algorithm, "title": name.upper() if name == algorithm else name}
        row |= {"seeds": list(seeds), "score_mean": 0.81, "best_score_mean": 0.805}
        row |= {
            "score_std": 0.0142 if len(seeds) > 1 else None,
            "best_score_std": 0.02 if len(seeds) > 1 else None,
        }
        row |= {"steps": 8.0, "steps_per_second": 16.04, "samples_per_second": 1234.5, "bytes_up": 12_345_678.0}
        rows.append({**row, "bytes_down": 9e6, "bytes_down_broadcast": 4e6, "seconds": 0.5})
    if finished:
        (path / "comparison.json").write_text(json.dumps({"rows": rows}))


class Page(HTMLParser):
    """The tags of a page, and the text that readers see."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw = (folder / "report.html").read_text()
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(self.raw)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


def png_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", content[16:24])


def test_comparison(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    make_comparison(folder, {"cl": "cl", "psl": "psl", "sglr": "sglr"})
    assert write(folder) == [folder / name for name in NAMES]
    assert png_size(folder / "curves.png")[0] > 2000
    assert png_size(folder / "classes.png")[0] > 1000
    assert not list(folder.glob(".*.new"))
    page = Page(folder)
    assert page.open == []
    assert "@media screen and (prefers-color-scheme: dark) { img { filter: invert(0.88)" in page.raw
    for shown in (
        "81.00 ± 1.42",
        "80.50 ± 2.00",
        "16.0",
        "1,234",
        "12.3 MB",
        "9.00 MB",
        "21.3 MB",
        "4.00 MB",
        "16.3 MB",
    ):
        assert shown in page.text
    assert "CL, PSL and SGLR compared on digits, divided among 4 clients" in page.text
    assert "2 seeds" in page.text
    assert "cutlayer compare --config config.toml" in page.text
    assert "smashed data" in page.text
    assert "Not finished" not in page.text


def test_page_loads_nothing_and_describes_its_pictures(tmp_path: Path) -> None:
    make_comparison(tmp_path / "c", {"psl": "psl"})
    write(tmp_path / "c")
    page = Page(tmp_path / "c")
    links = [a[k] or "" for _, a in page.tags for k in ("src", "href", "srcset", "action") if k in a]
    assert len(links) == 4
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert "url(" not in page.raw
    assert "@import" not in page.raw
    assert all(a["alt"] for tag, a in page.tags if tag == "img")


def test_single_run(tmp_path: Path) -> None:
    make_run(tmp_path / "r")
    write(tmp_path / "r")
    page = Page(tmp_path / "r")
    assert "SGLR on digits" in page.text
    assert "cutlayer run --config config.toml" in page.text
    assert "80.00" in page.text
    assert "±" not in page.text
    assert "With one seed" in page.text
    assert "The clients' learning rate" in page.text  # the configuration explains itself


def test_run_without_validation(tmp_path: Path) -> None:
    make_run(tmp_path / "r", validation=False)
    assert len(write(tmp_path / "r")) == 3


def test_single_seed_has_no_spread(tmp_path: Path) -> None:
    make_comparison(tmp_path / "c", {"psl": "psl", "sgl": "sgl"}, (0,))
    write(tmp_path / "c")
    page = Page(tmp_path / "c")
    assert "81.00" in page.text
    assert "±" not in page.text
    assert "the spread is not known" in page.text


NASTY = ["<b>x", "a $\\frac{ $b", "_hidden", "ünïcode 模型", "x" * 90, "{{ 7*7 }}"]


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    names = {"sglr": "sglr", **dict.fromkeys(NASTY, "sglr")}
    make_comparison(tmp_path / "c", names, (0,), classes=len(NASTY) + 1, class_names=[*NASTY, "</td>"])
    rows = json.loads((tmp_path / "c/comparison.json").read_text())
    for row, nasty in zip(rows["rows"][1:], NASTY, strict=True):
        row["title"] = f"{nasty}</b>"
    (tmp_path / "c/comparison.json").write_text(json.dumps(rows))
    write(tmp_path / "c")
    page = Page(tmp_path / "c")
    assert page.open == []
    assert "b" not in {tag for tag, _ in page.tags}
    for nasty in NASTY:
        assert " ".join(f"{nasty}</b>".split()) in page.text


def test_unfinished_run(tmp_path: Path) -> None:
    make_run(tmp_path / "r", done=False)
    with (tmp_path / "r/steps.jsonl").open("a") as file:
        file.write('{"step": 8, "rou')  # a line that was cut off by a crash
    write(tmp_path / "r")
    page = Page(tmp_path / "r")
    assert page.text.index("Not finished") < page.text.index("Result")
    assert "step 8" in page.text
    assert "80.00" in page.text
    assert "10.0" in page.text  # 8 steps in 0.8 seconds


def test_unfinished_comparison(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    make_comparison(folder, {"psl": "psl", "sfl": "sfl", "sglr": "sglr", "slow": "sglr"}, finished=False)
    (folder / "sfl/seed-1/result.json").unlink()
    for seed in (0, 1):
        (folder / f"sglr/seed-{seed}/result.json").unlink()
        (folder / f"slow/seed-{seed}/evaluations.jsonl").unlink()
    write(folder)
    page = Page(folder)
    assert "5 of its 8 runs are done" not in page.text  # runs without an evaluation count as not done
    assert "3 of its 8 runs are done; not evaluated yet: slow" in page.text
    assert "81.00 ± 1.41" in page.text  # psl: mean of both seeds
    assert "80.00" in page.text  # sfl: the seed that is finished
    assert "not finished: after 4 epochs" in page.text  # sglr: no seed is finished


@pytest.mark.parametrize(
    ("clients", "classes"),
    [(1, 1), (30, 10), *(pytest.param(*n, marks=pytest.mark.long) for n in [(1, 10), (200, 10), (1000, 100)])],
)
def test_any_number_of_clients_and_classes(tmp_path: Path, clients: int, classes: int) -> None:
    make_run(
        tmp_path / "r", clients=clients, classes=classes, class_names=[f"class number {k}" for k in range(classes)]
    )
    write(tmp_path / "r")
    width, height = png_size(tmp_path / "r/classes.png")
    assert width > 1000
    assert 300 < height < 1800


def test_many_entries(tmp_path: Path) -> None:
    entries = {"sglr": "sglr"} | {f"phi {k / 40}, a variant with a long name": "sglr" for k in range(40)}
    make_comparison(tmp_path / "c", entries, (0,))
    write(tmp_path / "c")
    assert png_size(tmp_path / "c/curves.png")[1] >= 700


def test_no_evaluation_yet(tmp_path: Path) -> None:
    make_run(tmp_path / "r", evaluated=False, done=False)
    make_comparison(tmp_path / "c", {"psl": "psl"}, finished=False, evaluated=False, done=False)
    for folder in (tmp_path / "r", tmp_path / "c"):
        with pytest.raises(RunFolderError, match=f"^'{folder}' has no evaluation yet.*cutlayer resume") as caught:
            write(folder)
        assert "\n" not in str(caught.value)
        assert not any((folder / name).exists() for name in NAMES)


def test_no_run_and_damaged_runs(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="not a run folder"):
        write(tmp_path)
    make_run(tmp_path / "r")
    (tmp_path / "r/steps.jsonl").write_text("{]\n")
    with pytest.raises(RunFolderError, match=r"line 1 of .*steps\.jsonl"):
        write(tmp_path / "r")
    make_run(tmp_path / "s")
    (tmp_path / "s/result.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"result\.json.* is damaged"):
        write(tmp_path / "s")


def test_same_folder_same_report(tmp_path: Path) -> None:
    make_run(tmp_path / "r")
    first = [path.read_bytes() for path in write(tmp_path / "r")]
    assert [path.read_bytes() for path in write(tmp_path / "r")] == first


def test_torch_is_not_imported(tmp_path: Path) -> None:
    make_run(tmp_path / "r")
    code = "import sys, pathlib; from cutlayer.report import write; {}; print(sorted(sys.modules))"
    run = f"write(pathlib.Path({str(tmp_path / 'r')!r}))"
    loaded = [
        subprocess.run(
            [sys.executable, "-c", code.format(what)], capture_output=True, text=True, check=True, timeout=120
        )
        for what in ("pass", run)
    ]
    assert (tmp_path / "r/report.html").exists()
    assert not re.search(r"'(torch|matplotlib|jinja2)'", loaded[0].stdout)  # format_bytes needs no imports
    assert "'torch'" not in loaded[1].stdout
    assert "'matplotlib.pyplot'" not in loaded[1].stdout


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (99_960, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (12_345_678, "12.3 MB"),
        (1_800_024_000, "1.80 GB"),
        (10**21, "1000 EB"),
    ],
)
def test_format_bytes(n: int, text: str) -> None:
    assert format_bytes(n) == text


def make_judged(path: Path, metric: str, *, share: bool, maximise: bool, classes: int = 0, clients: int = 4) -> None:
    """A run folder like that of `make_run`, with another metric and with every client's scores."""
    make_run(path, clients=clients, classes=max(1, classes))
    (path / "metric.json").write_text(json.dumps({"name": metric, "share": share, "maximise": maximise}))
    if not classes:
        (path / "classes.json").write_text(json.dumps({"class_names": [], "counts": [[30]] * clients}))
    each = {str(k): {metric: 0.5 + 0.01 * k, "loss": 1.0} for k in range(clients)}
    lines = [{"round": 4, "step": 8, "on": where, "clients": each} for where in ("global", "own")]
    (path / "clients.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluations = [json.loads(line) for line in (path / "evaluations.jsonl").read_text().splitlines()]
    for e in evaluations:
        e["test"] = {metric: e["test_score"], "undefined": None, "recall": [0.5] * classes}
        e["test"]["confusion"] = [[3.0] * classes] * classes
    (path / "evaluations.jsonl").write_text("".join(json.dumps(e) + "\n" for e in evaluations))


@pytest.mark.parametrize("clients", [4, 100])
def test_another_metric_without_classes(tmp_path: Path, clients: int) -> None:
    make_judged(tmp_path / "r", "rmse", share=False, maximise=False, clients=clients)
    write(tmp_path / "r")
    page = (tmp_path / "r/report.html").read_text()
    assert "Test rmse" in page
    assert "accuracy" not in page.partition('<h2 id="read">')[0].lower()
    assert "small differences may be chance" in page
    assert f"{clients} clients, {30 * clients:,} training samples" in page
    assert "its own test rows" in page
    assert "not defined" in page
    worst = f"{0.5 + 0.01 * (clients - 1):.4g}"
    assert f"<td>{worst}</td></tr>" in page
    assert ("60 between them are left out" in page) == (clients == 100)


def test_metrics_of_each_class(tmp_path: Path) -> None:
    make_judged(tmp_path / "r", "macro_f1", share=True, maximise=True, classes=3)
    write(tmp_path / "r")
    page = (tmp_path / "r/report.html").read_text()
    assert "Test macro f1 (%)" in page
    assert "as 2" in page
    assert "<td>0.5</td>" in page


def test_less_is_better(tmp_path: Path) -> None:
    """The best evaluation, and the cost of reaching a score, follow the direction of the metric."""
    for name, last in (("psl", 0.8), ("fl", 0.4)):
        for seed in (0, 1):
            place = tmp_path / "c" / name / f"seed-{seed}"
            make_run(place, name, seed, accuracy=last)
            (place / "metric.json").write_text(json.dumps({"name": "mae", "share": False, "maximise": False}))
    (tmp_path / "c/config.toml").write_text(tomli_w.dumps({"algorithms": ["psl", "fl"], "seeds": [0, 1]}))
    write(tmp_path / "c")
    page = (tmp_path / "c/report.html").read_text()
    assert "To reach 0.2 test mae" in page  # the first evaluation of psl is its best
    assert "rounded up" in page


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {},
            "The rmse of each client&#39;s model with the server&#39;s model on the whole test",
        ),
        ({"judge": "average", "evaluate_on": "own"}, "the server&#39;s model on its own test rows."),
        ({"judge": "ensemble"}, "The rmse of the mean of the predictions of"),
    ],
)
def test_the_page_says_whose_model_is_judged(tmp_path: Path, options: dict[str, str], sentence: str) -> None:
    make_judged(tmp_path / "r", "rmse", share=False, maximise=False)
    with (tmp_path / "r/config.toml").open("a") as file:
        file.write(tomli_w.dumps(options))
    write(tmp_path / "r")
    assert sentence in (tmp_path / "r/report.html").read_text()
