"""Trained models predict as evaluated: in the run, from its folder, and in other programs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from support import ALGORITHMS, call, difference, mlp, simulated, source, train, u_shaped, whole
from torch import nn

import cutlayer
from cutlayer import CutlayerError, Run, TrainedModel, load_model
from cutlayer.exporting import export, whose, whose_name
from cutlayer.foretold import as_archive, as_csv
from cutlayer.trained import find_trained

SIZES, SHAPE = (11, 8, 9), (6,)


def trained_run(algorithm: str, out: Path | None = None, **options: Any) -> Run:
    cuts = {} if cutlayer.RunConfig(algorithm=algorithm).traits.whole else {"cut": "1"}
    if u_shaped(algorithm):
        cuts["tail_cut"] = "3"
    return train(algorithm, mlp(), SIZES, SHAPE, out=out, **cuts, **options)


@pytest.mark.parametrize(
    ("algorithm", "engine"),
    [*((a, "auto") for a in ALGORITHMS), *((a, "local") for a in ("fl", "sfl", "sflv3", "sglr"))],
)
def test_a_model_predicts_as_it_was_judged(algorithm: str, engine: str, tmp_path: Path) -> None:
    """Every client's whole model has the score of the last evaluation, in the run and from its folder."""
    run = trained_run(algorithm, tmp_path / "run", engine=engine)
    task, test = run.training.task, run.training.source.test
    scores = run.training.clients.evaluate(test, run.training.server.predict).each("accuracy")
    for client, score in scores.items():
        found = run.predict(test, client)
        assert found.classes is not None
        assert (found.classes == test.y).double().mean().item() == score
        assert torch.equal(found.values, task.predictions(found.outputs))
        held = run.training.clients.held()  # if one model is evaluated for all, some clients may be at work on others
        whose = next(iter(held.models)) if held.everyones else client
        own = {n: t for n, t in whole(run, whose).items() if not n.startswith("auxiliary.")}
        assert difference(run.model(client).state_dict(), own) == 0
        kept = load_model(tmp_path / "run", client, model=mlp)
        assert not kept.training
        assert difference(kept.state_dict(), run.model(client).state_dict()) == 0


@pytest.mark.parametrize("algorithm", ["psl", "sflv3", "fl", "ssl"])
def test_the_average_of_the_clients(algorithm: str) -> None:
    """The mean is weighted by samples. If all clients have one model, the mean is that model, and no name is needed."""
    run = trained_run(algorithm)
    names = run.trained().names
    assert names == [0, 1, 2, "average"]
    states = [whole(run, k) for k in range(3)]
    if algorithm == "ssl":
        states = [whole(run, simulated(run).holder)] * 3
    mean = {n: sum(w * s[n] for w, s in zip(SIZES, states, strict=True)) / sum(SIZES) for n in states[0]}
    assert difference(run.model("average").state_dict(), mean) < 1e-12
    if algorithm in ("fl", "ssl"):
        assert difference(run.model().state_dict(), run.model(2).state_dict()) == 0
    else:
        with pytest.raises(cutlayer.ConfigError, match="the models of the 3 clients differ: say whose, client-0 to"):
            run.model()
    with pytest.raises(cutlayer.ConfigError, match="there is no model of client-3 here: there are those of client-0"):
        run.model(3)


def test_a_finished_run_gives_its_model_without_going_on(tmp_path: Path) -> None:
    run = trained_run("sglr", tmp_path / "run")
    again = Run.resume(tmp_path / "run", model=mlp(), data=source(SIZES, SHAPE))
    assert difference(again.model(1).state_dict(), run.model(1).state_dict()) == 0
    assert again.evaluations == run.evaluations
    assert again.run() == run.result


def test_the_present_model_while_it_trains() -> None:
    run = Run(algorithm="psl", model=mlp(), cut="1", data=source(SIZES, SHAPE), partition="column", clients=3, rounds=2)
    steps = iter(run)
    next(steps)
    first = run.model(0)
    next(steps)
    assert difference(first.state_dict(), run.model(0).state_dict()) > 0


def test_the_best_model_is_that_of_the_best_evaluation(tmp_path: Path) -> None:
    """Later rates ruin the model, so the best round is not the last."""
    data = cutlayer.from_arrays(*blobs(), test=0.2, validation=0.2)
    torch.manual_seed(0)
    made = Run(
        algorithm="psl", model=mlp(), cut="1", data=data, clients=2, out=tmp_path / "run", rounds=6, engine="local",
        client_lr=0.05, client_optimizer="sgd", lr_schedule=ruin,
    )  # fmt: skip
    result = made.run()
    assert result.best_round < result.rounds
    best = find_trained(tmp_path / "run", best=True)
    assert best.about["evaluation"]["round"] == result.best_round
    of_best = [(best.predict(data.test, k, model=mlp).classes == data.test.y).double().mean().item() for k in range(2)]
    assert np.mean(of_best) == pytest.approx(result.best_test_score)
    assert difference(best.state(0), made.trained().state(0)) > 0
    assert difference(made.model(0, best=True).state_dict(), best.state(0)) == 0


def ruin(progress: float) -> float:
    return 1.0 if progress < 0.5 else 1000.0


def blobs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y = np.arange(240) % 4
    return (np.eye(6)[y] * 3 + rng.normal(size=(240, 6))).astype(np.float32), y


def test_the_best_model_is_not_kept_if_not_wanted(tmp_path: Path) -> None:
    data = cutlayer.from_arrays(*blobs())
    run = Run(model=mlp(), cut="1", data=data, clients=2, out=tmp_path / "run", rounds=1, keep_best=False)
    run.run()
    assert not (tmp_path / "run/best.safetensors").exists()
    with pytest.raises(cutlayer.RunFolderError, match="holds no model of the best evaluation"):
        run.model(0, best=True)


def test_folders_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(cutlayer.RunFolderError, match="is not a run folder"):
        load_model(tmp_path)
    run = Run(model="mlp", clients=2, out=tmp_path / "run", rounds=2, samples_per_client=40)
    next(iter(run))
    with pytest.raises(cutlayer.RunFolderError, match="is not finished: `cutlayer resume"):
        load_model(tmp_path / "run")


def test_a_model_from_python_must_be_given_again(tmp_path: Path) -> None:
    trained_run("psl", tmp_path / "run")
    with pytest.raises(cutlayer.ConfigError, match="was given its model from Python: give it again, model="):
        load_model(tmp_path / "run", 0)
    with pytest.raises(cutlayer.ConfigError, match="give the model that was trained"):
        load_model(tmp_path / "run", 0, model=nn.Linear(6, 4))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table with numbers and categories, and a run that was trained on it."""
    folder = tmp_path_factory.mktemp("table")
    rng = np.random.default_rng(1)
    size, colour = rng.normal(170, 10, 240), rng.choice(["blue", "red"], 240)
    label = np.where((size > 170) ^ (colour == "red"), "tall", "small")
    lines = [f"{s:.2f},{c},{name}" for s, c, name in zip(size, colour, label, strict=True)]
    (folder / "people.csv").write_text("\n".join(["size,colour,label", *lines]) + "\n")
    lines = [f"{c},{k},{s:.2f}" for k, (s, c) in enumerate(zip(size, colour, strict=True))]
    (folder / "new.csv").write_text("\n".join(["colour,number,size", *lines]) + "\n")
    options = ("--data", "people.csv", "--model", "mlp", "--algorithm", "sfl", "--clients", "2", "--rounds", "4")
    call("run", *options, "--batch", "4", "--client-lr", "0.01", "--out", "run", cwd=folder)
    return folder


def test_predicting_from_a_table(table: Path) -> None:
    """Columns are found by name in any order. The numbers are those of the model for the same rows."""
    done = call("predict", "run", "new.csv", cwd=table)
    assert "ignored the column 'number', which the model does not use" in done.stderr
    assert "Weights: the model of all clients, last evaluation, after round 4" in done.stderr
    head, *rows = [line.split(",") for line in done.stdout.splitlines()]
    assert head == ["row", "label", "probability_small", "probability_tall"]
    assert len(rows) == 240
    truth = [line.rsplit(",", 1)[1] for line in (table / "people.csv").read_text().splitlines()[1:]]
    right = np.mean([row[1] == name for row, name in zip(rows, truth, strict=True)])
    assert right > 0.8  # the model has learnt, so swapped columns would be noticed

    run = Run.resume(table / "run")
    found = run.predict({"size": ["150", "190"], "colour": ["red", "red"]})
    by_hand = run.model()(run.training.source.train.x[:2])
    assert by_hand.shape == found.outputs.shape
    assert found.labels == ["tall", "small"]
    assert torch.allclose(found.probabilities.sum(1), torch.ones(2))


def test_new_rows_that_do_not_fit(table: Path) -> None:
    (table / "short.csv").write_text("colour\nred\n")
    assert "'size'" in call("predict", "run", "short.csv", cwd=table, code=2).stderr
    assert "no file or folder" in call("predict", "run", "nowhere.csv", cwd=table, code=2).stderr
    done = call("predict", "run", "new.csv", "--best", "--last", cwd=table, code=2)
    assert "best and last exclude each other" in done.stderr
    done = call("predict", "run", "new.csv", "--client", "Bob", cwd=table, code=2)
    assert "'Bob' is not a client name: use client-0, client-1" in done.stderr


def test_predicting_to_a_file(table: Path) -> None:
    assert call("predict", "run", "new.csv", "--out", "said.csv", cwd=table).stdout.strip() == "said.csv"
    assert (table / "said.csv").read_text() == call("predict", "run", "new.csv", cwd=table).stdout
    call("predict", "run", "new.csv", "--out", "said.npz", "--best", cwd=table)
    with np.load(table / "said.npz") as arrays:
        assert arrays["probabilities"].shape == (240, 2)
        assert arrays["class_names"].tolist() == ["small", "tall"]


def test_exporting_weights(table: Path) -> None:
    """Weights with the names of the model's own class, and all information that is needed to use them."""
    lines = call("export", "run", "--best", "--out", "out/model.safetensors", cwd=table).stdout.splitlines()
    assert lines[:2] == ["out/model.safetensors", "out/model.safetensors.json"]
    about = json.loads((table / "out/model.safetensors.json").read_text())
    assert about["class_names"] == ["small", "tall"]
    assert [c["name"] for c in about["preprocessing"]["columns"]] == ["size", "colour"]
    assert about["model"] == "mlp"
    with safe_open(table / "out/model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["cutlayer"]) == about
        named = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert difference(named, load_model(table / "run", best=True).state_dict()) == 0


def test_exporting_programs(table: Path) -> None:
    """A program returns the model's results for any number of rows."""
    call("export", "run", "--out", "model.pt2", cwd=table)
    program = torch.export.load(table / "model.pt2").module()
    rows = torch.randn(7, 3)
    assert torch.allclose(program(rows), load_model(table / "run")(rows), atol=1e-6)
    done = call("export", "run", "--out", "model.bin", cwd=table, code=2)
    assert "give it with --format (safetensors, onnx, torch-export, peft)" in done.stderr


def test_an_onnx_file_gives_what_the_model_gives(table: Path) -> None:
    """Another runtime gives the same for any number of rows. The file also stores preprocessing and class names."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    call("export", "run", "--out", "model.onnx", cwd=table)
    about = {p.key: p.value for p in onnx.load(table / "model.onnx").metadata_props}["cutlayer"]
    assert json.loads(about)["class_names"] == ["small", "tall"]
    session = runtime.InferenceSession(str(table / "model.onnx"), providers=["CPUExecutionProvider"])
    (name,) = (i.name for i in session.get_inputs())
    for rows in (torch.randn(7, 3), torch.randn(1, 3)):
        (scores,) = session.run(None, {name: rows.numpy()})
        assert np.allclose(scores, load_model(table / "run")(rows).detach().numpy(), atol=1e-5)


def test_onnx_without_its_packages_is_refused(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = call("export", "run", "--out", "refused.onnx", cwd=table, code=2)
    assert "needs the packages onnx" in done.stderr
    assert not (table / "refused.onnx").exists()


def test_exporting_everyone(tmp_path: Path) -> None:
    run = trained_run("psl", tmp_path / "run")
    files = call("export", "run", "--client", "all", "--out", "m.safetensors", cwd=tmp_path).stdout.splitlines()
    assert [f for f in files if f.endswith(".safetensors")] == [f"m-client-{k}.safetensors" for k in range(3)]
    with safe_open(tmp_path / "m-client-2.safetensors", "pt") as file:
        named = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert difference(named, whole(run, 2)) == 0


class Moody(nn.Module):
    """Depends on the values of its input, which no program can represent."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.last(y if y.sum().item() > 0 else -y)


def test_a_model_that_no_program_can_hold(tmp_path: Path) -> None:
    run = Run(
        algorithm="fl",
        model=Moody(),
        data=source(SIZES, SHAPE),
        partition="column",
        clients=3,
        rounds=1,
        engine="local",
    )
    run.run()
    trained = run.trained()
    with pytest.raises(cutlayer.ConfigError, match=r"torch.export cannot turn this model into a program"):
        export(trained, None, "torch-export", tmp_path / "m.pt2", model=Moody)
    assert not (tmp_path / "m.pt2").exists()
    export(trained, None, "safetensors", tmp_path / "m.safetensors")


def test_predictions_of_other_tasks(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(80, 6)).astype(np.float32)
    two = Run(model="mlp", task="binary", data=(x, (x[:, 0] > 0).astype(int)), clients=2, rounds=1)
    two.run()
    found = two.predict(x, 0)
    assert found.probabilities.shape == (80, 2)
    assert set(found.labels) <= {"0", "1"}
    assert as_csv(found).splitlines()[0] == "row,label,probability_0,probability_1"

    number = Run(model="mlp", task="regression", data=(x, x[:, :2]), clients=2, rounds=1)
    number.run()
    found = number.predict(x, "average")
    assert found.probabilities is None
    assert as_csv(found).splitlines()[0] == "row,prediction_0,prediction_1"
    with pytest.raises(cutlayer.ConfigError, match="these predictions are not classes"):
        _ = found.labels
    assert b"values" in as_archive(found)


class Tied(nn.Module):
    """The first and the last layer share a weight, which a cut between them may untie."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 4, bias=False), nn.Linear(4, 4), nn.Linear(6, 4, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(nn.functional.pad(torch.relu(self.middle(torch.relu(self.first(x)))), (0, 2)))


def test_a_weight_that_was_untied() -> None:
    data = source(SIZES, SHAPE)
    options = {"cut": "first", "untie": True, "precision": "float64", "client_lr": 0.05}
    run = Run(algorithm="psl", model=Tied, data=data, clients=3, partition="column", rounds=2, **options)
    run.run()
    state = run.model(0).state_dict()
    assert difference(state, whole(run, 0)) == 0
    assert not torch.equal(state["first.weight"], state["last.weight"])
    scores = run.training.clients.evaluate(data.test, run.training.server.predict).each("accuracy")
    assert (run.predict(data.test, 0).classes == data.test.y).double().mean().item() == scores[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_and_lazy_models() -> None:
    data = source(SIZES, SHAPE)
    lazy = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 4))
    for model, cut in ((torch.compile(mlp(), backend="eager"), "1"), (lazy, "0")):
        run = Run(algorithm="psl", model=model, cut=cut, data=data, clients=3, partition="column", rounds=1)
        run.run()
        assert difference(run.model(0).state_dict(), whole(run, 0)) == 0
        assert run.predict(data.test, 0).outputs.shape == (len(data.test), 4)


class Pair(nn.Module):
    """Takes two tensors per row."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 2), nn.Linear(3, 2)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self.one(left) + self.two(right)


def test_several_inputs_per_row(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = {"left": rng.normal(size=(60, 6)).astype(np.float32), "right": rng.normal(size=(60, 3)).astype(np.float32)}
    y = (x["left"][:, 0] > 0).astype(int)
    run = Run(algorithm="fl", model=Pair, data=(x, y), clients=2, rounds=1, out=tmp_path / "run")
    run.run()
    found = run.predict(x)
    by_hand = run.model()(**{name: torch.from_numpy(array) for name, array in x.items()})
    assert torch.equal(found.outputs, by_hand)
    np.savez(tmp_path / "new.npz", **x)
    (tmp_path / "pair.py").write_text("from test_trained import Pair as make\n", encoding="utf-8")
    done = call("predict", "run", "new.npz", "--model", "pair.py:make", cwd=tmp_path)
    assert [line.split(",")[1] for line in done.stdout.splitlines()[1:]] == found.labels
    np.savez(tmp_path / "half.npz", left=x["left"])
    done = call("predict", "run", "half.npz", "--model", "pair.py:make", cwd=tmp_path, code=2)
    assert "half.npz lacks the array 'right' (it has left): add it" in done.stderr
    export(run.trained(), None, "torch-export", tmp_path / "m.pt2", model=Pair)
    program = torch.export.load(tmp_path / "m.pt2").module()
    assert program(left=torch.zeros(5, 6), right=torch.zeros(5, 3)).shape == (5, 2)


def test_names_of_clients() -> None:
    for text in ("client-0", "client-12", "average", None):
        assert whose_name(whose(text)) == (text or "all")


def test_damaged_models(tmp_path: Path) -> None:
    (tmp_path / "last.safetensors").write_bytes(b"no")
    with pytest.raises(CutlayerError, match="is not a whole checkpoint"):
        TrainedModel.read(tmp_path / "last.safetensors")
