"""What a run notes that it used, and the BibTeX of runs and comparisons, from Python and from folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import call, mlp, source
from test_references import parsed
from torch import nn

from cutlayer import Comparison, Run, RunConfig, RunFolderError, cite
from cutlayer.citing import used_by
from cutlayer.references import bibtex

ALWAYS = {"cutlayer", "torch", "numpy"}


def keys(config: RunConfig, **given: Any) -> set[str]:
    """The entries of a configuration, without those that every run has."""
    return set(parsed(bibtex(used_by(config, given.pop("metrics", ()), **given)))) - ALWAYS


def test_options_are_cited_where_they_have_an_effect() -> None:
    digits = {"alpaydin1998digits", "scikit-learn"}
    plain = RunConfig(algorithm="psl", client_optimizer="sgd", server_optimizer="sgd")
    assert keys(plain) == {"pal2021sglr", *digits}
    assert keys(RunConfig(algorithm="sflv1", client_optimizer="adamw")) >= {"thapa2020splitfed", "loshchilov2019adamw"}
    assert "mcmahan2017fedavg" in keys(RunConfig(algorithm="sflv1", averaging="mean"))
    assert "yin2018byzantine" in keys(RunConfig(algorithm="sflv1", averaging="median"))
    assert keys(plain, metrics=["auroc"]) == {"pal2021sglr", *digits}
    everything = RunConfig(
        algorithm="psl",
        client_optimizer="sgd",
        server_optimizer="sgd",
        data="fashion-mnist",
        model="resnet16",
        partition="dirichlet",
        up_codec="float8",
        down_codec="rand-top-k:0.5:0.1",
        nopeek=0.1,
        attack=("sign@1",),
        lr_schedule="cosine",
        logit_adjust="server",
    )
    assert keys(everything) == {
        *("pal2021sglr", "xiao2017fashion", "he2016resnet", "hsu2019measuring", "micikevicius2022fp8"),
        *("zheng2023randtopk", "vepakomma2020nopeek", "li2018rsa", "loshchilov2017sgdr", "menon2021longtail"),
    }


def test_data_of_others_are_cited_as_they_say() -> None:
    config = RunConfig(algorithm="psl", client_optimizer="sgd", data="patients.csv")
    entry = "@misc{ward2020,\n  title = {Ward}\n}"
    own = {"data": "dict"}
    assert {"ward2020", "datasets"} <= keys(config, data=("datasets", entry), own=own)
    noted = {(used["kind"], used["name"]): used for used in used_by(config, (), ("datasets",))}
    assert noted["data", "patients.csv"]["own"] == "yes"  # the library that reads them is not cited
    assert not any(used["own"] for used in used_by(config, (), (entry,), own))


class Net(nn.Sequential):
    """The user's own model."""

    def __init__(self) -> None:
        super().__init__(*mlp())


def test_runs_and_comparisons_give_their_entries(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "data": source([8, 8], (6,)),
        "partition": "column",
        "precision": "float64",
        "model": Net,
        "cut": "2",
        "clients": 2,
        "rounds": 1,
        "batch": 4,
        "engine": "local",
        "client_optimizer": "sgd",
        "server_optimizer": "sgd",
    }
    run = Run(algorithm="sflv3", out=tmp_path / "run", **options)
    begun = run.cite()
    result = run.run()
    assert set(parsed(begun)) == {*ALWAYS, "gawali2020comparison", "mcmahan2017fedavg"}
    assert begun.splitlines()[:2] == [
        "% model 'Net' names no paper: cite where it comes from",
        "% data set 'Source' names no paper: cite where it comes from",
    ]
    assert result.cite() == run.cite() == begun == cite(tmp_path / "run")
    (tmp_path / "run/result.json").unlink()
    assert cite(str(tmp_path / "run")) == begun  # the run is not finished
    comparison = Comparison(algorithms=("psl", "ssl"), seeds=(0, 1), out=tmp_path / "both", **options)
    assert set(parsed(comparison.cite())) == ALWAYS
    comparison.run()
    assert set(parsed(comparison.cite())) == {*ALWAYS, "pal2021sglr", "gupta2018distributed"}
    printed = call("cite", str(tmp_path / "both"), str(tmp_path / "run")).stdout
    wanted = {*ALWAYS, "pal2021sglr", "gupta2018distributed", "scipy"}
    assert set(parsed(printed)) == {*wanted, "gawali2020comparison", "mcmahan2017fedavg"}
    assert printed.count("% model 'Net'") == 1
    (tmp_path / "both/curves.png").touch()
    assert set(parsed(cite(tmp_path / "both"))) == {*wanted, "matplotlib"}


def test_folders_that_say_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="not a run folder"):
        cite(tmp_path)
    (tmp_path / "config.toml").write_text('algorithm = "psl"')
    with pytest.raises(RunFolderError, match="has not begun"):
        cite(tmp_path)
    (tmp_path / "algorithm.json").write_text(json.dumps({"title": "PSL"}))
    with pytest.raises(RunFolderError, match="does not say what it used, since an older version wrote it"):
        cite(tmp_path)
    (tmp_path / "algorithm.json").write_text(json.dumps({"used": ["psl"]}))
    with pytest.raises(RunFolderError, match="is damaged"):
        cite(tmp_path)
