"""`export` and `predict`: the trained model of a run, and its predictions for new rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from cutlayer.cli.application import FILES, Folder, err
from cutlayer.cli.flags import command
from cutlayer.cli.printing import print_exactly, say
from cutlayer.errors import ConfigError

if TYPE_CHECKING:
    from cutlayer.trained import TrainedModel

_FILE = Parameter(group=FILES)
Model = Annotated[str | None, _FILE]


@command(sort_key=5)
def export(
    folder: Folder,
    *,
    client: Annotated[str | None, _FILE] = None,
    best: Annotated[bool, Parameter(group=FILES, negative=())] = False,
    last: Annotated[bool, Parameter(group=FILES, negative=())] = False,
    format: Annotated[Literal["safetensors", "onnx", "torch-export", "peft"] | None, _FILE] = None,
    out: Annotated[Path | None, _FILE] = None,
    model: Model = None,
) -> None:
    """Write the whole trained model of a run for other programs, with a JSON file that describes it.

    Parameters
    ----------
    folder
        The folder of a finished run, or of a client on another machine.
    client
        Whose model to write: client-0, client-1, ..., average (of all clients' parts), or all (a file per client). Not
        needed if all clients have the same model.
    best
        Use the model of the evaluation that was best on the validation set.
    last
        Use the model at the end of the training (the default).
    format
        Named weights (safetensors), a program (torch-export, a .pt2 file, or onnx, which needs the extra `onnx`), or
        only the adapters, in a folder that peft loads onto the base (peft). Default: as the name of --out ends, or
        safetensors.
    out
        The file (or, for peft, the folder) to write. Default: export/WHICH-CLIENT in the folder.
    model
        The model, if the run received it from Python or its file has moved: path/to/file.py:name.
    """
    from cutlayer.exporting import SUFFIXES, whose, whose_name
    from cutlayer.exporting import export as write
    from cutlayer.trained import find_trained

    _refuse_both(best, last)
    trained = _with_model(find_trained(folder, best=best), model)
    by_suffix = {suffix: form for form, suffix in SUFFIXES.items()}
    form = format or by_suffix.get(out.suffix if out else ".safetensors")
    if form is None:
        raise ConfigError(
            f"the format does not follow from the name {str(out)!r}: give it with --format ({', '.join(SUFFIXES)})"
        )
    everyone = [name for name in trained.names if isinstance(name, int)]
    for who in everyone if client == "all" else [trained.chosen(whose(client))]:
        name = whose_name(who)
        path = out or folder / "export" / f"{'best' if best else 'last'}-{name}{SUFFIXES[form]}"
        path = path.with_name(f"{path.stem}-{name}{path.suffix}") if out and client == "all" else path
        for written in write(trained, who, form, path):
            say(str(written))
    say(_which(trained, client, best=best))


@command(sort_key=6)
def predict(
    folder: Folder,
    data: Annotated[Path, _FILE],
    *,
    client: Annotated[str | None, _FILE] = None,
    best: Annotated[bool, Parameter(group=FILES, negative=())] = False,
    last: Annotated[bool, Parameter(group=FILES, negative=())] = False,
    out: Annotated[Path | None, _FILE] = None,
    model: Model = None,
) -> None:
    """Predict new rows with the trained model of a run. The rows need no labels.

    Columns are found by name, and scaled and encoded as in training. The result is a CSV file with the class and the
    probability of every class, or with the predicted numbers.

    Parameters
    ----------
    folder
        The folder of a finished run, or of a client on another machine.
    data
        New rows in the format of the run's data.
    client
        Whose model to use: client-0, client-1, ..., or average (of all clients' parts). Not needed if all clients have
        the same model.
    best
        Use the model of the evaluation that was best on the validation set.
    last
        Use the model at the end of the training (the default).
    out
        The file to write: .csv, or .npz for arrays. Default: CSV on standard output.
    model
        The model, if the run received it from Python or its file has moved: path/to/file.py:name.
    """
    from cutlayer.data.fresh import read
    from cutlayer.exporting import whose
    from cutlayer.files import replace_file
    from cutlayer.foretold import as_archive, as_csv
    from cutlayer.trained import find_trained

    _refuse_both(best, last)
    trained = _with_model(find_trained(folder, best=best), model)
    new = read(data, trained.about)
    found = trained.predict(new, whose(client))
    for note in (*new.notes, _which(trained, client, best=best)):
        err.print(note, highlight=False, soft_wrap=True)
    if out is None:
        print_exactly(as_csv(found, new.names))
    else:
        replace_file(out, as_archive(found) if out.suffix == ".npz" else as_csv(found, new.names).encode())
        say(str(out))


def _refuse_both(best: bool, last: bool) -> None:
    if best and last:
        raise ConfigError("best and last exclude each other: leave one out")


def _with_model(trained: TrainedModel, model: str | None) -> TrainedModel:
    """The same with the model of that reference."""
    from dataclasses import replace

    from cutlayer import plugins

    if model is None:
        return trained
    options = trained.about["model_options"] or plugins.find("model", model).defaults
    changed: dict[str, Any] = {
        "model": model,
        "model_options": options,
        "model_code": plugins.fingerprint("model", model),
    }
    return replace(trained, about={**trained.about, **changed})


def _which(trained: TrainedModel, client: str | None, *, best: bool) -> str:
    """A line that says which weights are used."""
    from cutlayer.exporting import whose, whose_name

    of = trained.about["evaluation"]
    name = client if client == "all" else whose_name(trained.chosen(whose(client)))
    who = "the model of all clients" if name == "all" else "the average of the clients' models"
    who = f"the model of {name}" if name.startswith("client-") else who
    when = f", after round {of['round']}" if of else ""
    validation = of.get("validation_score") if of else None
    score = "" if validation is None else f", validation score {validation:.4g}"
    return f"Weights: {who}, {'best' if best else 'last'} evaluation{when}{score}."
