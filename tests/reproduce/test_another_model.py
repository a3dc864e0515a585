"""The paper's tables with the user's own model and task: training, the report, and refusals."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from support import call

from cutlayer.errors import ConfigError, RunFolderError
from cutlayer.options import cuts_of
from cutlayer.reproduce import formulas, table6, tables
from cutlayer.reproduce.cells import SIZES, Size, Study
from cutlayer.reproduce.claims import WORDS
from cutlayer.reproduce.outcomes import Outcomes
from cutlayer.reproduce.reproduction import Reproduction

TINY = Size("mlp", (2,), 1, (0, 1), 32, 100, 1, 1, 2, "mlp", 4, (1e-3,), 2)
NET = """\
from torch import nn

from cutlayer.plugins import option
from cutlayer.tasks.classification import Classification
from cutlayer.tasks.objective import task


def net(input_shape, classes, *, width: int = option(5, ge=1, help="Hidden numbers.")):
    rows, columns = input_shape[-2:]
    first = nn.Linear(rows * columns, width)
    first.weight.data.mul_(float(first.weight.abs().max() < 9))  # reads values: not on a device without any
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), nn.Linear(width, classes))


@task("half", targets="class")
class Half(Classification):
    "Half the loss."

    def losses(self, outputs, targets):
        return super().losses(outputs, targets) / 2
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the user's file. The size smoke takes seconds."""
    monkeypatch.setitem(SIZES, "smoke", TINY)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


def test_a_table_of_a_model_and_task_of_ones_own(place: Path) -> None:
    """Runs use its options and the given cut. The report and the JSON name the user's model."""
    flags = "--data digits --model net.py:net --cut 2 --width 6 --task net.py:Half --label-smoothing 0.1 --jobs 1"
    argv = ["reproduce", "table1", "table6", *flags.split(), "--out", "own"]
    done = call(*argv)
    text = (place / "own/reproduction.md").read_text()
    data = json.loads((place / "own/reproduction.json").read_text())
    runs = list((place / "own/runs").glob("**/config.toml"))
    assert len(runs) == 2 * 5
    for config in runs:
        stored = config.read_text()
        for line in (f'model = "{place}/net.py:net"', f'task = "{place}/net.py:Half"', "width = 6", 'cut = "2"'):
            assert line in stored
        assert "label_smoothing = 0.1" in stored

    assert "Size smoke: another model than the paper's (net.py:net, cut after 2) on digits" in text
    assert "The model was chosen by the user." in text
    assert "The model was chosen by the user." in (place / "own/reproduction.html").read_text()
    assert f"--model {place}/net.py:net --cut 2" in text
    assert data["another_model"] is True
    assert data["settings"]["model"] == data["settings"]["methods_model"] == f"{place}/net.py:net"
    assert {c["verdict"] for c in data["claims"]} <= {f"another model: {w}" for w in WORDS[:3]}
    compute, *traffic = data["counted"]
    assert compute["verdict"] == "counted"
    assert {f["verdict"] for f in traffic} <= {"another model: holds", "another model: does not hold"}
    assert [line.partition(" (")[0] for line in data["lines"][:3]] == [
        "Holds with another model",
        "Does not hold with another model",
        "Within noise with another model, so neither shown nor refuted",
    ]
    assert "another model: " in done.stdout
    assert re.search(r"\| alpha 2 \|.*\(82\.11\)", text)  # the paper's number is shown, too

    # The same folder can be continued only with the same model.
    assert call(*argv).stdout.count("test accuracy") == 0
    refused = call("reproduce", "--data", "digits", "--out", "own", code=2)
    assert "was made with cut = '2', not None" in refused.stderr


def test_table_6_follows_from_the_model(place: Path) -> None:
    """Bytes follow from the paper's formulas and the model's own sizes, also for another cut or width."""
    for cut, width in (("2", 6), ("1", 6), ("2", 3)):
        out, own = place / "out", {"width": width}
        work_of = Reproduction(["table6"], "smoke", out, "digits", options=own, model="net.py:net", cut=cut)
        study, work = work_of.study, table6.trained_work(work_of.study)
        assert work.model == 4 * (65 * width + 10 * (width + 1))
        assert work.client_model == 4 * 65 * width
        assert work.smashed == work.gradient == 4 * width
        sizes = formulas.Sizes(4, 4 * 32, work.smashed, work.model, work.client_model)
        for method in formulas.METHODS:
            assert table6.of_method(study, method).paper == formulas.total(method, sizes)


def test_nothing_has_to_be_trained_for_table_6(place: Path) -> None:
    call("reproduce", "table6", "--data", "digits", "--out", "t6", "--jobs", "0")
    assert "Table 6" in (place / "t6/reproduction.md").read_text()
    with pytest.raises(RunFolderError, match="size = 'smoke', not 'reduced'"):
        Reproduction(["table6"], "reduced", place / "t6", "digits")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            "--model net.py:net",
            "net.py:net' does not say where it is cut: name a module of it with --cut (its modules are '",
        ),
        ("--model net.py:net --cut 9", "'9'"),
        ("--model net.py:net --cut 2 --width 0", "width = 0"),
        ("--model mlpp", "unknown model 'mlpp': did you mean 'mlp'?"),
        ("--model nothing.py:net --cut 2", "nothing.py"),
        ("--width 3", "width"),
        ("--task regression", "task = 'regression' is judged by rmse, but the tables compare accuracies of one class"),
        ("--task multilabel", "task = 'multilabel' is about several labels per row, but the tables compare"),
        ("--task clasification", "did you mean 'classification'?"),
    ],
)
def test_wrong_input_is_one_sentence_and_writes_nothing(flags: str, said: str, place: Path) -> None:
    done = call("reproduce", "table1", "--data", "digits", "--jobs", "1", *flags.split(), code=2)
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in place.iterdir() if path.name != "__pycache__"] == ["net.py"]


def test_inputs_of_several_tensors_are_refused_before_training(place: Path) -> None:
    (place / "pairs.py").write_text(
        "import torch\n\ndef pairs():\n    x = torch.rand(400, 3)\n    return {'a': x, 'b': x}, torch.arange(400) % 4\n"
    )
    work = Reproduction(["table1"], "smoke", place / "out", "pairs.py:pairs", model="net.py:net", cut="2")
    with pytest.raises(ConfigError, match="is 2 tensors, but the tables count the bytes and FLOPs of one"):
        work.check()


def test_the_depths_of_a_model_are_its_named_cuts_or_the_one_it_has(place: Path) -> None:
    cnn = Study(replace(TINY, model="cnn", methods_model="cnn"), "digits")
    assert cnn.cuts == cuts_of("cnn")
    assert cnn.cut == "block1"
    own = Study(TINY, "digits", options=(("cut", "2"),)).of_model(f"{place / 'net.py'}:net")
    assert own.cuts == ("2",)
    mlp = Study(TINY, "digits", options=(("cut", "hidden1"),)).of_model("mlp")
    assert mlp.cut == "hidden1"
    assert mlp.at_depth("hidden1") == mlp.attacked("psl")
    assert mlp.at_depth("hidden2").config.cut == "hidden2"


def test_words_of_the_papers_models_stay_as_they_are(tmp_path: Path) -> None:
    study = Study(TINY, "digits")
    assert [study.verdict(w) for w in ("holds", "counted")] == ["holds", "counted"]
    another = study.of_model("mlp")
    assert [another.verdict(w) for w in ("does not hold", "not measured", "by construction")] == [
        "another model: does not hold",
        "not measured",
        "by construction",
    ]
    of_both = (t for s in (study, another) for t in tables.table4(Outcomes(s, tmp_path, [])))
    columns = [t.columns for t in of_both if t.name == "table4-compute"]
    assert columns == [
        ("mlp", "AlexNet", "AlexNet, 3 x forward", "of FL", "paper, whole training"),
        ("mlp", "mlp, 3 x forward", "of FL", "paper, whole training"),
    ]
