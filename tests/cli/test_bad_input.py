"""Wrong input: one clear sentence with the value, the reason and the remedy; exit code 2; nothing is written.

Errors in single data files and partitions are tested in test_sources.py and test_partition.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import Done, call, source
from torch import Tensor, nn

from cutlayer import Comparison, ConfigError, CutlayerError, DataError, Run, RunConfig, UsageError
from cutlayer.algorithms.sglr import Sglr
from cutlayer.cli.flags import flags_of
from cutlayer.cli.merging import merged_values
from cutlayer.options import PlanConfig

MLP = ["--model", "mlp"]


class Desk:
    """A folder with input files. Nothing may be written to the working folder."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files, self.cwd = tmp_path / "files", tmp_path / "cwd"
        self.files.mkdir()
        self.cwd.mkdir()
        monkeypatch.chdir(self.cwd)

    def main(self, *argv: str) -> Done:
        """Exit code, standard output and standard error of a command line."""
        return call(*argv, code=None)

    def refused(self, *argv: str) -> str:
        """The sentence that refuses a command line. Nothing is written, and nothing else is printed."""
        code, out, err = self.main(*argv)
        assert (code, out) == (2, ""), err
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        assert not list(self.cwd.iterdir())
        return err

    def toml(self, text: str) -> str:
        """Write a configuration file, and return its path."""
        (self.files / "config.toml").write_text(text)
        return str(self.files / "config.toml")


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    here = Desk(tmp_path, monkeypatch)
    yield here
    assert not list(here.cwd.iterdir())


def holds(sentence: str, *words: str) -> None:
    for word in words:
        assert word in sentence, sentence


# ---- the command line -----------------------------------------------------------------------------------------------

# (command line, words that the sentence must have: the value, the reason or range, the remedy or the nearest name)
FLAGS: list[tuple[str, list[str]]] = [
    ("rum", ["rum", 'Did you mean "run"']),
    ("run extra", ["unexpected 'extra'", "--help"]),
    ("run --keep-best false", ["unexpected 'false'", "--no-NAME"]),
    ("run --lr 0.1", ["'--lr'", "here it is called --client-lr and --server-lr\n"]),
    ("compare --learning-rate 0.1", ["'--learning-rate'", "--client-lr and --server-lr\n"]),
    ("run --batch-size=3", ["'--batch-size'", "here it is called --batch\n"]),
    ("run --momentum 0.9", ["'--momentum'", "called --client-optimizer-options.momentum\n"]),
    ("run --client-optimizer ADMM", ["'admm'", "did you mean 'adam'"]),
    ("run --alhpa 2", ["--alhpa", "Did you mean --alpha"]),
    ("compare --sed 2", ["--sed", "Did you mean --seeds"]),
    ("run --config", ["--config", "requires an argument"]),
    ("list foo", ["foo", "algorithms", "models"]),
    ("run --algorithm sgrl", ["'sgrl'", "did you mean 'sgl'", "sglr"]),
    ("compare --algorithms psl sgrl", ["'sgrl'", "did you mean 'sgl'"]),
    ("run --data digit", ["'digit'", "did you mean 'digits'", "file or folder"]),
    ("run --data data/none.npz", ["data/none.npz", "digits", "file or folder"]),
    ("run --up-codec int7", ["up_codec", "'int7'", "did you mean 'int8'"]),
    ("run --down-codec top-k", ["down_codec", "fraction", "top-k:0.1"]),
    ("run --algorithm fl --up-codec int8", ["up_codec = 'int8' has no effect on fl"]),
    ("run --class-names a b", ["digits", "'0'", "not in class_names"]),
    ("serve --insecure --deadline -1", ["deadline = -1", "greater than or equal to 0"]),
    ("serve --insecure --faulty ignore", ["ignore", "exclude", "stop"]),
    ("leakage", ["no run is named"]),
    ("leakage nowhere", ["'nowhere' is not a run folder"]),
    ("leakage nowhere --clients 0", ["clients = 0", "greater than 0"]),
    ("leakage nowhere --knowledge modal", ["'modal'", "did you mean 'model'"]),
    ("run --model mpl", ["'mpl'", "did you mean 'mlp'"]),
    ("run --model mlp --cut hiden2", ["'hiden2'", "did you mean 'hidden2'"]),
    ("run --model mlp --algorithm ussl --cut hidden1 --tail-cut hiden3", ["'hiden3'", "did you mean 'hidden3'"]),
    ("run --partition iidd", ["'iidd'", "did you mean 'iid'", "dirichlet"]),
    ("run --data-format npzz", ["'npzz'", "did you mean 'npz'"]),
    ("run --server-lr-schedule stp", ["'stp'", "did you mean 'step'"]),
    ("run --alpha -1", ["alpha = -1", "greater than or equal to 0"]),
    ("run --alpha nan", ["alpha = nan", "must be"]),
    ("run --alpha inf", ["alpha = inf", "finite"]),
    ("run --alpha two", ["alpha = two", "number"]),
    ("run --model mlp --alpha 400", ["alpha = 400", "10^400", "smaller value"]),
    ("run --phi 1.5", ["phi = 1.5", "less than or equal to 1"]),
    ("run --phi -0.1", ["phi = -0.1", "greater than or equal to 0"]),
    ("compare --phi 2", ["phi = 2", "less than or equal to 1"]),
    ("run --phi-until 2", ["phi_until = 2", "less than or equal to 1"]),
    ("run --client-lr 0", ["client_lr = 0", "greater than 0"]),
    ("run --client-lr inf", ["client_lr = inf", "finite"]),
    ("run --server-lr -1", ["server_lr = -1", "greater than 0"]),
    ("run --lr-decay 0", ["lr_decay = 0", "greater than 0"]),
    ("run --lr-decay-at 1.5", ["lr_decay_at = 1.5", "between 0 and 1"]),
    ("run --clients 0", ["clients = 0", "greater than or equal to 1"]),
    ("run --clients 2.5", ["clients = 2.5", "it must be a whole number"]),
    ("run --model mlp --clients 5000", ["clients=5000", "training samples", "at most"]),
    ("run --model mlp --samples-per-client 900", ["samples_per_client=900", "at most 129 samples per client"]),
    ("run --model mlp --samples-per-client 9 --partition column", ["samples_per_client=9", "'column'", "leave it out"]),
    ("run --model mlp --partition dirichlet --dirichlet-alpha 0", ["dirichlet_alpha = 0", "greater than 0"]),
    ("run --model mlp --partition column", ["client column", "client_column", "another partition"]),
    ("run --model mlp --clients 50 --partition quantity --quantity exponential", ["client", "none", "fewer clients"]),
    ("run --batch 0", ["batch = 0", "greater than or equal to 1"]),
    ("run --participation 0", ["participation = 0", "greater than 0"]),
    ("run --epochs 0", ["epochs = 0", "greater than or equal to 1"]),
    ("run --eval-every 0", ["eval_every = 0", "greater than or equal to 1"]),
    ("run --checkpoint-every 0", ["checkpoint_every = 0", "greater than or equal to 1"]),
    ("run --seed -1", ["seed = -1", "greater than or equal to 0", "randomness"]),
    ("run --test 0", ["test = 0", "greater than 0"]),
    ("run --model mlp --validation 2000", ["validation=2000", "lower it"]),
    ("run --epochs 2 --rounds 3", ["epochs = 2", "rounds = 3", "give one"]),
    ("run --algorithm fl --local-epochs 2 --local-steps 3", ["local_epochs = 2", "local_steps = 3", "give one"]),
    ("run --algorithm psl --phi 0.5", ["phi = 0.5", "no effect on psl", "sglr"]),
    ("run --algorithm fl --server-lr 0.1", ["server_lr = 0.1", "no effect on fl", "psl"]),
    ("run --algorithm cl --participation 0.5", ["participation = 0.5", "no effect on cl", "psl"]),
    ("compare --algorithms cl fl --alpha 2", ["alpha = 2.0", "no effect on cl, fl", "sglr"]),
    ("run --algorithm ussl", ["tail_cut", "name the module"]),
    ("compare --algorithms psl ussl", ["tail_cut", "name the module"]),
    ("run --model mlp --algorithm ussl --cut hidden3 --tail-cut hidden1", ["'hidden1'", "not come after 'hidden3'"]),
    ("run --model mlp --algorithm ussl --cut hidden3 --tail-cut input", ["'input'", "must come after"]),
    ("run --model mlp --algorithm sgl --cut input", ["cut = 'input'", "client part has", "cut later", "such as "]),
    ("run --model mlp --algorithm sfl --cut input", ["cut = 'input'", "client part has no parameters", "cut later"]),
    ("run --model mlp --algorithm slr --cut output", ["cut = 'output'", "server part has no parameters", "earlier"]),
    ("run --model mlp --algorithm sflv3 --cut output", ["cut = 'output'", "server part has no parameters", "earlier"]),
    ("run --model mlp --defences noise", ["'noise'", "does nothing", "set --clip or --gaussian-noise or --laplace"]),
    ("run --model mlp --defences nopeek", ["'nopeek'", "does nothing", "set --nopeek, or leave it out"]),
    ("run --model mlp --client-optimizer admm", ["'admm'", "did you mean 'adam'"]),
    ("run --model mlp --server-optimizer lbfgs", ["'lbfgs'", "sgd"]),
    ("run --model mlp --client-optimizer-options.beta 1", ["'beta'", "did you mean 'betas'"]),
    ("run --model mlp --client-optimizer sgd --client-optimizer-options.momentum -1", ["'momentum': -1", "correct"]),
    ("compare --seeds 0 1 0", ["seeds", "0 twice", "once"]),
    ("compare --algorithms psl psl", ["algorithms", "'psl' twice", "once"]),
    ("compare --seeds -1", ["-1", "0 or greater"]),
    ("resume nowhere", ["'nowhere'", "not a run folder", "name the folder"]),
    ("report nowhere", ["'nowhere'", "not a run folder", "name the folder"]),
]  # fmt: skip


@pytest.mark.parametrize(("line", "words"), FLAGS, ids=[line for line, _ in FLAGS])
def test_flags(desk: Desk, line: str, words: list[str]) -> None:
    holds(desk.refused(*line.split()), *words)


# The same in a file, where users can also get names and types wrong.
TOMLS: list[tuple[str, str, list[str]]] = [
    ("serve --insecure", "[faults]\ndeadlin = 3", ["'deadlin'", "did you mean 'deadline'"]),
    ("serve --insecure", "faults = 3", ["faults = 3", "[faults]"]),
    ("run", "clietns = 3", ["'clietns'", "did you mean 'clients'"]),
    ("run", "clients-per-round = 3", ["'clients_per_round'", "known: "]),
    ("compare", "algorithm = 'psl'", ["'algorithm'", "did you mean 'algorithms'"]),
    ("run", "clients = 'ten'", ["clients = 'ten'", "it must be a whole number"]),
    ("run", "lr = 0.1", ["'lr'", "here it is called client_lr and server_lr\n"]),
    ("run", "weight_decay = 0.1", ["'weight_decay'", "here it is called client_optimizer_options.weight_decay\n"]),
    ("compare", "[variant.mine]\nlearning-rate = 0.3", ["'mine'", "'learning_rate'", "client_lr and server_lr\n"]),
    ("run", "epochs = '3'", ["epochs = '3'", "it must be a whole number"]),
    ("run", "epochs = true", ["epochs = True", "it must be a whole number"]),
    ("run", "client_lr = '0.1'", ["client_lr = '0.1'", "it must be a number"]),
    ("run", "multicast = 'yes'", ["multicast = 'yes'", "it must be true or false"]),
    ("run", "multicast = 1", ["multicast = 1", "it must be true or false"]),
    ("run", "phi = '0.5'", ["phi = '0.5'", "it must be a number"]),
    ("run", "lr_decay_at = ['0.5']", ["lr_decay_at = ['0.5']", "it must be a list, each a number"]),
    ("compare", "seeds = '0 1'", ["seeds = 0 1", "it must be a list"]),
    ("compare", "[variant.mine]\nphi = '0.3'", ["'mine'", "phi = '0.3'", "it must be a number"]),
    ("plan", "clients = '3'", ["clients = '3'", "it must be a whole number"]),
    ("serve --insecure", "[faults]\ndeadline = '3'", ["deadline = '3'", "it must be a number"]),
    ("run", "[client_optimizer_options]\nbetas = '[0.9, 0.99]'", ["'betas': '[0.9, 0.99]'", "correct these options"]),
    ("run", "alpha = inf", ["alpha = inf", "finite"]),
    ("run", "data = 3", ["data = 3", "it must be a text"]),
    ("run", "client_optimizer_options = 0.9", ["client_optimizer_options = 0.9", "dictionary", "momentum"]),
    ("run", "epochs = 2\nrounds = 3", ["epochs = 2", "rounds = 3", "give one"]),
    ("run", "clients = = 3", ["not valid TOML", "line 1", "correct"]),
    ("run", "clients = 3\nclients = 4", ["not valid TOML", "Cannot overwrite", "correct"]),
    ("compare", "algorithms = []", ["algorithms is empty", "--algorithms"]),
    ("compare", "seeds = []", ["seeds is empty", "--seeds"]),
    ("compare", "variant = 3", ["variant = 3", "[variant.NAME]"]),
    ("compare", "[variant.mine]\nalpah = 2", ["'mine'", "'alpah'", "did you mean 'alpha'"]),
    ("compare", "[variant.mine]\nalpha = -2", ["'mine'", "alpha = -2", "greater than or equal to 0"]),
    ("compare", "[variant.mine]\nalgorithm = 'sgrl'", ["'sgrl'", "did you mean 'sgl'"]),
    ("compare", "[variant.mine]\nalgorithm = 'psl'\nphi = 0.3", ["'mine'", "phi = 0.3", "no effect on psl"]),
    ("compare", "[variant.mine]\nalgorithm = 'ussl'", ["'mine'", "tail_cut"]),
    ("compare", "[variant.mine]\nepochs = 1\nrounds = 2", ["'mine'", "epochs = 1", "give one"]),
    ("compare", "[variant.mine]\nseed = 3", ["'mine'", "seed = 3", "use seeds"]),
    ("compare", "[variant.psl]\nphi = 0.3", ["'psl'", "name of an algorithm", "rename"]),
    ("compare", "[variant.'a/b']\nalgorithm = 'sglr'\nphi = 0.3", ["'a/b'", "folder", "use letters"]),
    ("compare", "model = 'mlp'\n[variant.mine]\nalgorithm = 'psl'\ncut = 'hiden1'", ["did you mean 'hidden1'"]),
]  # fmt: skip


@pytest.mark.parametrize(("command", "text", "words"), TOMLS, ids=[f"{c} {t!r}" for c, t, _ in TOMLS])
def test_configuration_files(desk: Desk, command: str, text: str, words: list[str]) -> None:
    holds(desk.refused(*command.split(), "--config", desk.toml(text)), *words)


def test_configurations_that_are_no_file(desk: Desk) -> None:
    holds(desk.refused("run", "--config", str(desk.files)), str(desk.files), "Is a directory", "check the path")
    holds(desk.refused("run", "--config", "none.toml"), "'none.toml'", "No such file", "check the path")
    (desk.files / "binary.toml").write_bytes(b"\xff\xfe\x00")
    holds(desk.refused("run", "--config", str(desk.files / "binary.toml")), "binary.toml", "not valid TOML")


def test_markup_and_lines_in_a_value_are_shown_as_they_are(desk: Desk) -> None:
    holds(desk.refused("run", "--model", "[red]mlp\\[/]"), "'[red]mlp\\\\[/]'")
    holds(desk.refused("run", "--model", "a\nb"), "'a\\nb'")
    holds(desk.refused("run", "--clients", "a\nb"), "clients = a b")


JOIN = (
    "join",
    "localhost:1",
    "--client",
    "client-0",
    "--insecure",
    "--data",
    "digits",
    "--model",
    "mlp",
    "--clients",
    "2",
)


def test_a_study_that_was_not_approved_is_not_joined(desk: Desk) -> None:
    holds(desk.refused(*JOIN, "--approve", "1234-5678"), "fingerprint", "'1234-5678' was approved", "join --show")
    code, out, err = desk.main(*JOIN, "--folder", "state", "--show")
    assert (code, err) == (0, "")
    assert re.search(r"fingerprint: (\w{4}-){7}\w{4}$", out.strip())
    assert not list(desk.cwd.iterdir())  # nothing is stored, and no server is contacted
    holds(desk.refused(*JOIN, "--max-rounds", "0"), "max_rounds", "0")
    holds(desk.refused(*JOIN, "--config", desk.toml("[budget]\nmax_round = 3\n")), "max_round")


# ---- data -----------------------------------------------------------------------------------------------------------


def npz(path: Path, x: Any, y: Any, **more: Any) -> str:
    np.savez(path, x=x, y=y, **more)
    return str(path)


X = np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32)
Y = np.arange(60) % 3


def test_data_files(desk: Desk) -> None:
    """One error of each kind; all others are in test_sources.py."""
    bad = X.copy()
    bad[7, 2] = np.nan
    path = npz(desk.files / "nan.npz", bad, Y)
    holds(desk.refused("run", *MLP, "--data", path), "nan", "NaN", "row 7", "fill them in or remove")
    path = npz(desk.files / "short.npz", X, Y[:50])
    holds(desk.refused("run", *MLP, "--data", path), "60 inputs", "50 labels", "give one label each")
    (desk.files / "truncated.npz").write_bytes((desk.files / "nan.npz").read_bytes()[:500])
    holds(desk.refused("run", *MLP, "--data", str(desk.files / "truncated.npz")), "truncated.npz", "again")
    np.savez(desk.files / "names.npz", first=X, second=Y)
    holds(desk.refused("run", *MLP, "--data", str(desk.files / "names.npz")), "'x'", "first", "np.savez")
    (desk.files / "own.csv").write_text("a,b,lable\n" + "1,2,x\n3,4,y\n" * 9)
    holds(desk.refused("run", *MLP, "--data", str(desk.files / "own.csv")), "'label'", "did you mean 'lable'")
    holds(desk.refused("compare", *MLP, "--data", str(desk.files / "empty-folder")), "empty-folder", "file or folder")


def test_pictures_for_the_wrong_model(desk: Desk) -> None:
    path = npz(desk.files / "features.npz", X, Y)
    holds(desk.refused("run", "--model", "cnn", "--data", path), "'cnn'", "(6,)", "use 'mlp'")
    holds(desk.refused("run", "--model", "resnet16", "--data", path), "'resnet16'", "(6,)", "use 'mlp'")


def test_a_client_column_that_is_not_one_of_clients(desk: Desk) -> None:
    path = npz(desk.files / "owned.npz", X, Y, client=np.arange(60) % 4)
    line = ["run", *MLP, "--data", path, "--partition", "column", "--clients"]
    holds(desk.refused(*line, "3"), "4 distinct values", "clients=3", "pass clients=4")


def test_an_owner_of_one_row_is_not_lost_to_the_hold_out(desk: Desk) -> None:
    """An owner keeps one row for training, so the same number of clients works with every seed."""
    path = npz(desk.files / "owned.npz", X, Y, client=np.repeat([0, 1, 2], [1, 30, 29]))
    for seed in range(8):
        run = Run(model="mlp", data=path, partition="column", clients=3, seed=seed, algorithm="psl", rounds=1)
        assert run.training.clients.samples[0] == 1


def test_a_client_without_samples_on_a_later_seed_is_found_before_the_first_is_trained(desk: Desk) -> None:
    """With one seed, all clients get samples. With another, the partition leaves one client without any."""
    path = npz(desk.files / "skewed.npz", X, Y)
    skew: dict[str, Any] = {"partition": "dirichlet", "dirichlet_alpha": 0.15, "clients": 8}
    fits: dict[int, bool] = {}
    for seed in range(20):
        try:
            Run(model="mlp", data=path, **skew, seed=seed, algorithm="psl", rounds=1)
            fits[seed] = True
        except DataError:
            fits[seed] = False
    good, bad = next(s for s in fits if fits[s]), next(s for s in fits if not fits[s])
    flags = ["--partition", "dirichlet", "--dirichlet-alpha", "0.15", "--clients", "8"]
    line = ["compare", *MLP, "--data", path, *flags, "--algorithms", "psl"]
    holds(desk.refused(*line, "--seeds", str(good), str(bad)), "would get none", "raise dirichlet_alpha")


# ---- output folders -------------------------------------------------------------------------------------------------


def test_output_that_is_a_file_or_beneath_one(desk: Desk) -> None:
    (desk.files / "a-file").write_text("mine")
    holds(desk.refused("run", *MLP, "--out", str(desk.files / "a-file")), "a-file", "is a file", "another --out")
    beneath = str(desk.files / "a-file" / "run")
    holds(desk.refused("run", *MLP, "--out", beneath), beneath, "Not a directory", "another --out")
    assert (desk.files / "a-file").read_text() == "mine"


def test_a_folder_of_other_files_is_left_alone(desk: Desk) -> None:
    """The folder stays unchanged, and there is no advice to resume, since it is not a run."""
    for name in ("thesis.txt", ".lock"):
        (desk.files / name).write_text("mine")
    for command in ("run", "compare"):
        sentence = desk.refused(command, *MLP, "--out", str(desk.files))
        holds(sentence, str(desk.files), "already holds files", "another --out")
        assert "resume" not in sentence
    assert {p.name: p.read_text() for p in desk.files.iterdir()} == {"thesis.txt": "mine", ".lock": "mine"}


def test_what_a_run_left_that_was_killed_before_it_began_is_no_obstacle(desk: Desk) -> None:
    (desk.files / ".lock").write_text("123")
    (desk.files / ".config.toml.new").write_text("")
    run = Run(model="mlp", algorithm="psl", clients=2, samples_per_client=9, rounds=1, out=desk.files)
    assert run.run().rounds == 1


def test_resuming_with_another_configuration(desk: Desk) -> None:
    options: dict[str, Any] = {"model": "mlp", "clients": 2, "samples_per_client": 9, "rounds": 1}
    Run(algorithm="psl", out=desk.files / "run", **options).run()
    before = {p.name: p.read_bytes() for p in (desk.files / "run").iterdir()}
    folder = str(desk.files / "run")
    holds(desk.refused("resume", folder, "--clients", "3"), "clients = 2, not 3", "resume without it")
    holds(desk.refused("resume", folder, "--lr-decay-at", "0.5"), "lr_decay_at = [0.8]", "0.5", "resume without it")
    holds(desk.refused("resume", folder, "--alhpa", "3"), "--alhpa", "Did you mean --alpha")
    sentence = desk.refused("run", *MLP, "--out", folder)
    holds(sentence, "already holds files", "another --out", f"cutlayer resume {folder}")
    assert {p.name: p.read_bytes() for p in (desk.files / "run").iterdir()} == before
    Comparison(algorithms=("psl",), seeds=(0,), out=desk.files / "compare", **options).run()
    holds(desk.refused("resume", str(desk.files / "compare"), "--clients", "3"), "clients = 3", "leave options out")


def test_a_stored_configuration_that_was_damaged(desk: Desk) -> None:
    folder = desk.files / "run"
    folder.mkdir()
    (folder / "config.toml").write_text("clients = ")
    for command in ("resume", "report"):
        holds(desk.refused(command, str(folder)), str(folder / "config.toml"), "not valid TOML", "correct")
    (folder / "config.toml").write_text("clietns = 3")
    holds(desk.refused("resume", str(folder)), "'clietns'", "did you mean 'clients'")
    assert [p.name for p in folder.iterdir()] == ["config.toml"]


# ---- models and data of one's own ------------------------------------------------------------------------------------


def sentence_of(call: Callable[[], object], kind: type[CutlayerError] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def own(model: Any, tmp_path: Path | None = None, sizes: tuple[int, ...] = (8, 8), **options: Any) -> Run:
    """A run on data with 4 classes and 6 features, in float32."""
    cut = {} if options.get("algorithm") in ("fl", "cl") else {"cut": "0"}
    defaults: dict[str, Any] = {"algorithm": "psl", "clients": len(sizes), "partition": "column", **cut}
    out = None if tmp_path is None else tmp_path / "out"
    return Run(model=model, data=source(sizes, (6,)), out=out, **{**defaults, "batch": 4, "rounds": 2, **options})


class Raises(nn.Module):
    """A model whose forward pass raises an error."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.layer, self.error = nn.Linear(6, 4), error

    def forward(self, x: Tensor) -> Tensor:
        """Raises the error."""
        raise self.error


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), ["3 classes", "data have 4", "widen its last layer to 4"]),
        (nn.Sequential(nn.Linear(6, 8), nn.Unflatten(1, (2, 4))), ["(3, 2, 4)", "one row of class scores per sample"]),
        (nn.Sequential(nn.Linear(6, 8), nn.Flatten(0)), ["(24,)", "return one row per sample"]),
        (nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 4)), ["(6,)", "mat1 and mat2", "choose a model that fits"]),
        (nn.Sequential(nn.Conv2d(1, 8, 3), nn.Linear(8, 4)), ["(6,)", "choose a model that fits"]),
        (nn.Sequential(nn.Embedding(6, 8), nn.Linear(8, 4)), ["(6,)", "choose a model that fits"]),
        (Raises(KeyError("mask")), ["KeyError", "'mask'", "choose a model that fits"]),
        (Raises(ValueError()), ["ValueError", "choose a model that fits"]),
        (Raises(AssertionError("two\nlines")), ["AssertionError: two", "choose a model that fits"]),
    ],
    ids=["narrow", "rank 3", "rank 1", "other width", "pictures", "tokens", "KeyError", "bare", "lines"],
)
def test_models_that_do_not_fit_the_data(model: nn.Module, words: list[str], tmp_path: Path) -> None:
    holds(sentence_of(lambda: own(model, tmp_path)), *words)
    assert not (tmp_path / "out").exists()


def test_names_of_a_model_of_ones_own() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    holds(sentence_of(lambda: own(model, cut=None)), "psl needs cut", "its modules are '0', '1' and those inside them")
    holds(sentence_of(lambda: own(model, cut="00"), UsageError), "'00'", "did you mean '0'")
    holds(
        sentence_of(lambda: own(model, cut="1"), UsageError), "'1'", "nothing is computed after", "Names that work: 0"
    )


def test_independent_starts_of_one_module() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    holds(sentence_of(lambda: own(model, start="independent")), "start = 'independent'", "give a function")
    assert own(lambda: model, start="independent").rounds == 2


def batch_norm(lower: bool) -> nn.Module:
    """A model with batch normalisation below or only above a cut at 1."""
    norm = nn.BatchNorm1d(8)
    return nn.Sequential(
        nn.Linear(6, 8), norm if lower else nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)
    )


@pytest.mark.parametrize(
    ("algorithm", "lower", "sizes", "refused"),
    [
        ("psl", True, (8, 9), 1),  # the last batch of client 1 has one row
        ("psl", True, (8, 10), None),
        ("psl", False, (8, 8, 5), None),  # the server gets 4 + 4 + 1 rows
        ("psl", False, (8, 4, 9), 2),  # in the third step, client 2 is alone and has one row
        ("psl", False, (9, 4, 9), None),  # two rows
        ("ssl", False, (8, 9), 1),
        ("sflv2", False, (9, 8), 0),
        ("fl", False, (8, 9), 1),
        ("cl", False, (9, 9), None),  # 18 rows of one owner
        ("cl", False, (8, 9), 0),  # 17 rows
    ],
)
def test_batch_norm_cannot_train_on_one_row(
    algorithm: str, lower: bool, sizes: tuple[int, ...], refused: int | None
) -> None:
    """It is refused in exactly the cases in which training would fail."""
    options = {} if algorithm in ("fl", "cl") else {"cut": "1"}
    make = lambda: own(batch_norm(lower), sizes=sizes, algorithm=algorithm, **options)  # noqa: E731
    if refused is None:
        assert make().run().rounds == 2
    else:
        rows = sum(sizes) if algorithm == "cl" else sizes[refused]
        words = [f"batch = 4 leaves client {refused} ({rows} samples)", "one sample", "choose another batch"]
        holds(sentence_of(make), *words)


def test_batch_norm_in_the_tail_and_with_sampled_clients() -> None:
    tail = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    make = lambda: own(tail, sizes=(8, 9), algorithm="ussl", tail_cut="1")  # noqa: E731
    holds(sentence_of(make), "batch = 4 leaves client 1", "choose another batch")
    sampled: dict[str, Any] = {"participation": 0.3, "rounds": 20, "cut": "1"}
    holds(sentence_of(lambda: own(batch_norm(False), sizes=(8, 9, 9), **sampled)), "a batch of one sample")
    assert own(batch_norm(False), sizes=(8, 10, 12), **sampled).run().rounds == 20


def test_checking_the_batches_leaves_the_random_state_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    own(model, sizes=(8, 9), cut="1")
    assert torch.equal(torch.rand(1), expected)


def test_data_of_ones_own() -> None:
    bad = torch.from_numpy(X.copy())
    bad[3, 1] = torch.inf
    holds(sentence_of(lambda: Run(model="mlp", data=(bad, torch.from_numpy(Y))), DataError), "row 3", "infinite")
    holds(sentence_of(lambda: Run(model="mlp", data=(X, Y[:9])), DataError), "60 inputs", "9 labels")
    holds(sentence_of(lambda: Run(model="mlp", data=(X, Y), clients=50), DataError), "clients=50", "at most 43")


def test_comparisons_check_all_entries_before_the_first_is_trained(tmp_path: Path) -> None:
    """The third of three entries cannot be cut there, so nothing is trained or written."""
    comparison = Comparison(
        model="mlp", algorithms=("cl", "psl", "sgl"), cut="input", clients=2, rounds=1, out=tmp_path / "out"
    )
    holds(sentence_of(comparison.run, UsageError), "sgl cannot work with cut = 'input'", "cut later")
    assert not list(tmp_path.iterdir())


def test_a_comparison_with_a_model_of_ones_own_is_not_resumed_without_it(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    options: dict[str, Any] = {"algorithms": ("psl",), "seeds": (0, 1), "clients": 2, "partition": "column"}
    data = source([8, 8], (6,))
    comparison = Comparison(model=model, data=data, cut="0", rounds=1, out=tmp_path / "out", **options)
    next(iter(comparison))
    words = ["model of your own", "give it again", "model=..."]
    holds(sentence_of(lambda: Comparison.resume(tmp_path / "out", data=data), UsageError), *words)
    assert len(Comparison.resume(tmp_path / "out", model=model, data=data).run()) == 1


# ---- options over options -------------------------------------------------------------------------------------------


def test_rounds_on_top_replace_epochs_below(desk: Desk) -> None:
    """A flag wins over a file, an option over a configuration, a variant over its comparison."""
    values = merged_values(RunConfig, flags_of(RunConfig)(rounds=3), Path(desk.toml("epochs = 9\nlocal_epochs = 2")))
    assert values == {"rounds": 3, "local_epochs": 2}
    run = Run(RunConfig(epochs=9, model="mlp", clients=2), rounds=3)
    assert (run.rounds, run.config.rounds) == (3, 3)
    plan = Comparison(
        algorithms=("psl",), epochs=9, seeds=(4,), variant={"short": {"algorithm": "psl", "rounds": 3}}
    ).plan
    short = plan["short"][4]
    assert (short.rounds, short.seed, "epochs" in short.model_fields_set) == (3, 4, False)
    assert (plan["psl"][4].epochs, plan["psl"][4].rounds) == (9, None)
    assert Run(short, model="mlp").rounds == 3  # as the comparison will make it
    assert RunConfig(epochs=9, rounds=None).resolved()["epochs"] == 9


def test_a_variant_may_have_what_the_others_lack(tmp_path: Path) -> None:
    """ussl has a second cut, which the other algorithms do not know."""
    variant = {"u": {"algorithm": "ussl", "cut": "hidden1", "tail_cut": "hidden3"}}
    rows = Comparison(
        model="mlp", algorithms=("psl",), seeds=(0,), variant=variant, clients=2, samples_per_client=9, rounds=1
    ).run()
    assert [row.entry for row in rows] == ["psl", "u"]


def test_optimizer_options_as_flags_are_numbers() -> None:
    texts = {"momentum": "0.9", "nesterov": "True", "betas": "[0.9, 0.99]", "foo": "bar", "inf": "Infinity"}
    options = flags_of(RunConfig)(client_optimizer_options=texts).client_optimizer_options  # type: ignore[attr-defined]
    assert options == {"momentum": 0.9, "nesterov": True, "betas": [0.9, 0.99], "foo": "bar", "inf": "Infinity"}
    assert RunConfig(client_optimizer_options=texts).client_optimizer_options == texts


def test_optimizers_may_be_spelled_as_in_torch() -> None:
    spelled = RunConfig(client_optimizer="SGD", server_optimizer="AdamW")
    assert (spelled.client_optimizer, spelled.server_optimizer) == ("sgd", "adamw")
    assert PlanConfig(client_optimizer="SGD").client_optimizer == "sgd"
    assert flags_of(PlanConfig)(client_optimizer="Adam").client_optimizer == "adam"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="unknown option 'lr': here it is called client_lr and server_lr"):
        Run(lr=0.1)


def test_keywords_are_not_converted() -> None:
    wrong: list[tuple[type[Any], dict[str, Any], str]] = [
        (RunConfig, {"epochs": "3"}, "epochs = '3' is not possible: it must be a whole number"),
        (RunConfig, {"algorithm": "sglr", "alpha": True}, "alpha = True is not possible: it must be a number"),
        (Sglr, {"phi": "0.5"}, "phi = '0.5' is not possible: it must be a number"),
    ]
    for made, options, said in wrong:
        with pytest.raises(ConfigError, match=re.escape(said)):
            made(**options)
    assert RunConfig(clients=np.int64(3), client_lr=1, lr_decay_at=[0.5]).clients == 3


def test_a_parameter_of_a_model_that_is_no_option(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("from torch import nn\ndef make(width=8): return nn.Linear(64, width)\n")
    done = call("run", "--model", "net.py:make", "--width", "9", cwd=tmp_path, code=2)
    holds(done.stderr, "'width' is a parameter of net.py:make", "not an option", "(*, width=...)")
