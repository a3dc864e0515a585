"""A trained model with everything that its use needs: weights, construction, preprocessing of new rows, meaning of
outputs.

A run keeps it in its folder, for its last and its best evaluation; a client on another machine keeps it in its own, if
the server shares its part. `load_model` reads it back.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import torch
from torch import Tensor, nn

from cutlayer import checkpoint, plugins, seeds
from cutlayer.adapters import shrink
from cutlayer.averaging import average
from cutlayer.averagings.products import MeanOfProducts
from cutlayer.build import Making, Model, Training, reading_options
from cutlayer.copies import deep_copy
from cutlayer.data.conversion import Conversion
from cutlayer.data.fresh import New, converted
from cutlayer.data.samples import Inputs, Source, called, each, inputs_of
from cutlayer.errors import ConfigError, CutlayerWarning, RunFolderError
from cutlayer.files import CONFIG
from cutlayer.folder import BEST, LAST, stored_config
from cutlayer.models import Parts, build
from cutlayer.models import make as make_own
from cutlayer.models.halved import single
from cutlayer.models.weights import check_fit, fitted, uncompiled
from cutlayer.options import RunConfig
from cutlayer.scoring import ROWS_PER_PASS
from cutlayer.stored import Amount, Count, Digits, MalformedError, Stored, all_finite, checked, reading, remade
from cutlayer.types import as_tuple

if TYPE_CHECKING:
    from cutlayer.tasks import Task

Whose = int | Literal["average"] | None
"""The owner of a model: client k, the average of all clients' models, or (None) the only model."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """The predictions of a model for n rows.

    `outputs` [n, ...] are the model's own (the first if it has several). `values` are the task's predictions.
    `probabilities` are those of the classes or labels, and `classes` the numbers of the predicted classes; both are
    None if the task has none. `class_names` are their names, if the data have names.
    """

    outputs: Tensor
    values: Tensor
    probabilities: Tensor | None
    classes: Tensor | None
    class_names: tuple[str, ...]

    @property
    def labels(self) -> list[Any]:
        """The names of the predicted classes, or their numbers if they have no names: a list with one entry per row, or
        one list per row if a row has several predictions. Raises ConfigError if there are no classes.
        """
        if self.classes is None:
            raise ConfigError("these predictions are not classes: look at values")
        named: list[Any] = _named(self.classes.tolist(), self.class_names)
        return named


def _named(numbers: Any, names: tuple[str, ...]) -> Any:
    if isinstance(numbers, list):
        return [_named(n, names) for n in numbers]
    return names[numbers] if numbers < len(names) else numbers


class _Trained(Stored):
    about: dict[str, Any]
    everyones: bool
    weights: list[Amount]
    server: dict[str, Tensor]
    clients: dict[Digits, dict[str, Tensor]]
    shared: dict[str, Tensor] = msgspec.field(default_factory=dict)
    mean: dict[str, Tensor] | None = None


class _Tensors(Stored):
    """The `inputs` of a model, in the form of `_specs`."""

    form: Literal["named", "one", "several"]
    names: list[str]
    tensors: list[_OneTensor]


class _OneTensor(Stored):
    shape: list[Count]
    dtype: str


class _About(Stored):
    """The description from `describe`, with additions."""

    algorithm: str
    model: str | None
    model_options: dict[str, Any]
    model_code: str
    cut: str | list[str] | None
    tail_cut: str | list[str] | None
    input_shape: list[Any]
    outputs: int | None
    inputs: _Tensors
    precision: Literal["float32", "float64"]
    task: str
    task_options: dict[str, Any]
    class_names: list[str]
    data_format: str
    reading: dict[str, Any]
    preprocessing: dict[str, Any]
    evaluation: dict[str, Any]
    clients: Count = 0


class _Column(Stored):
    name: str
    categories: list[str] | None = None


def _check_conversion(stored: Mapping[str, Any]) -> None:
    """The figures of a table's columns are finite, and one for each column. Raises MalformedError."""
    found = remade(Conversion, stored, "conversion")
    figures = [values for values in (found.mean, found.std, found.fill) if values is not None]
    wrong = len({len(values) for values in figures}) > 1 or not all(math.isfinite(x) for v in figures for x in v)
    if wrong or (found.mean is None) != (found.std is None) or (found.std and min(found.std) <= 0):
        raise MalformedError("conversion has no finite mean and positive deviation for each column")


class _Preprocessing(msgspec.Struct):
    """The common fields of all kinds of preprocessing; the user's own kinds may have more."""

    kind: str = ""
    shape: list[Count] = msgspec.field(default_factory=list)
    conversion: dict[str, Any] = msgspec.field(default_factory=dict)
    columns: list[_Column] = msgspec.field(default_factory=list)


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """The weights of a model, separately for the clients' parts and the server's part, under the names of the whole
    model.

    `about` says in plain values how the model is built, what its inputs are, and to which evaluation the weights
    belong. `clients` contains each client's part, or a single one if `everyones` is true. `weights` [C] are the
    clients' weights in the average of their models. If only some of very many clients' parts are kept, `mean` is the
    average of all.
    """

    about: dict[str, Any]
    server: Mapping[str, Tensor]
    clients: Mapping[int, Mapping[str, Tensor]]
    everyones: bool
    weights: tuple[float, ...]
    mean: Mapping[str, Tensor] | None = None

    @classmethod
    def of(cls, config: RunConfig, training: Training, *, own: bool, evaluation: Mapping[str, Any]) -> TrainedModel:
        """The present one of a training. `own`: its model was given from Python. `evaluation`: the last scores."""
        cuts = () if training.depths is None else training.depths.names
        held, about = training.clients.held(), describe(config, training.source, training.making, own=own, cuts=cuts)
        copies: dict[_Place, Tensor] = {}  # clients share the same tensors here, too
        return cls(
            {**about, "clients": len(training.clients.samples), "evaluation": dict(evaluation)},
            _copied(training.server.model.state_dict()),
            {k: _copied(_without_head(training.parts, state), copies) for k, state in held.models.items()},
            held.everyones,
            tuple(map(float, training.clients.samples)),
            None if held.mean is None else _copied(_without_head(training.parts, held.mean), copies),
        )

    @classmethod
    def of_client(
        cls, about: Mapping[str, Any], client: int, own: Mapping[str, Tensor], server: Mapping[str, Tensor], round: int
    ) -> TrainedModel:
        """That of one client: its `own` part, under the names of the whole model, and the server's after a round."""
        whole = {**about, "evaluation": {"round": round}}
        return cls(whole, _copied(server), {client: _copied(own)}, everyones=False, weights=())

    def write(self, path: Path) -> None:
        """Write it to a file, atomically."""
        shared = _shared(list(self.clients.values()))
        clients = {str(k): {n: t for n, t in s.items() if n not in shared} for k, s in self.clients.items()}
        about = {"about": self.about, "everyones": self.everyones, "weights": list(self.weights)}
        mean = {} if self.mean is None else {"mean": dict(self.mean)}
        checkpoint.write(path, {**about, "server": dict(self.server), "clients": clients, "shared": shared, **mean})

    @classmethod
    def read(cls, path: Path) -> TrainedModel:
        """Read it from a file. Raises RunFolderError if the file is not complete."""
        with reading(path, "it is not a trained model of Cutlayer's, or was changed: restore it, or train anew"):
            found = checked(checkpoint.read(path), _Trained)
            about = checked(found.about, _About, "about")
            checked(about.preprocessing, _Preprocessing, "preprocessing")
            _check_conversion(about.preprocessing.get("conversion", {}))
            alone = (("the server", found.server), ("all clients", found.shared), ("the mean", found.mean or {}))
            for what, state in (*alone, *found.clients.items()):
                if lacking := [name for name, tensor in state.items() if not all_finite(tensor)]:
                    raise MalformedError(f"{lacking[0]!r} of {what} holds NaN or infinite numbers")
            clients = {int(k): {**found.shared, **state} for k, state in found.clients.items()}
            return cls(found.about, found.server, clients, found.everyones, tuple(found.weights), found.mean)

    @property
    def names(self) -> list[Whose]:
        """Whose models there are."""
        if not self.clients:
            return []
        return [*(range(len(self.weights)) if self.everyones else sorted(self.clients)), "average"]

    def chosen(self, client: Whose) -> Whose:
        """The owner of the model; if none is named and only one client's model is here, that client."""
        return next(iter(self.clients)) if client is None and len(self.clients) == 1 and not self.everyones else client

    def state(self, client: Whose = None) -> dict[str, Tensor]:
        """The weights of the whole model, by name. Raises ConfigError if there is no such client."""
        return {**self._part(client), **self.server}

    def model(self, client: Whose = None, *, model: Model | None = None) -> nn.Module:
        """The whole model in evaluation mode, with these weights. Pass `model`, the module or function, if the run
        received it from Python. Raises ConfigError if there is no such client, or if the model is not the one that was
        trained.
        """
        state = self.state(client)
        made = fitted(uncompiled(self._made(model)), state)
        if getattr(made, "client_ranks", ()):  # a client on another machine had adapters of its own rank
            shrink(made, {name: tuple(t.shape) for name, t in state.items()})
        check_fit(made.state_dict(), state, "the trained weights", "give the model that was trained")
        made.load_state_dict(state)
        return made.eval()

    def predict(
        self,
        x: Any,
        client: Whose = None,
        *,
        model: Model | None = None,
        device: str | torch.device = "cpu",
    ) -> Predictions:
        """The model's predictions for new rows, given in the form of the run's data: arrays or tensors, or columns by
        name. They are scaled and encoded as in training; `Samples` and results of `data.fresh.read` are used without
        changes.
        """
        whole = self.model(client, model=model).to(device)
        inputs = x.inputs if isinstance(x, New) else converted(x, self.about["preprocessing"])
        dtype = torch.float64 if self._double else torch.float32
        inputs = each(inputs, lambda t: t.to(dtype) if t.is_floating_point() else t)
        outputs = _outputs(whole, inputs, torch.device(device))
        task = self.task
        return Predictions(
            outputs, task.predictions(outputs), task.probabilities(outputs), task.decided(outputs), self.class_names
        )

    @property
    def task(self) -> Task:
        """The task for which it was trained. Raises ConfigError if the task cannot be found here."""
        made = plugins.load("task", self.about["task"])
        task: Task = made.of(self.about["task_options"])
        return task

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in order; empty if they have none."""
        return tuple(self.about["class_names"])

    @property
    def _double(self) -> bool:
        return bool(self.about["precision"] == "float64")

    def _part(self, client: Whose) -> Mapping[str, Tensor]:
        """A client's part of the weights. Raises ConfigError."""
        if not self.clients:
            raise ConfigError(
                "the clients' parts of this model are with the clients: start the server with share_server_model, and "
                "export from the folder of a client"
            )
        if isinstance(client, int) and client not in self.names:
            raise ConfigError(f"there is no model of client-{client} here: there are those of {self._listed}")
        if len(self.clients) == 1:
            return next(iter(self.clients.values()))
        if client is None:
            raise ConfigError(
                f"the models of the {len(self.weights)} clients differ: say whose, {self._listed}, or average"
            )
        if isinstance(client, int):
            return self.clients[client]
        if self.mean is not None:
            return self.mean
        states = list(self.clients.values())
        alike = {n: t for n, t in states[0].items() if all(torch.equal(t, s[n]) for s in states[1:])}  # what is frozen
        # The mean of factors with different ranks does not belong to any adapters.
        rule = MeanOfProducts.of({}) if self.about["model_options"].get("lora_ranks") else None
        return {**average(states, [self.weights[k] for k in self.clients], rule), **alike}

    @property
    def _listed(self) -> str:
        """The available models, in words."""
        there = self.names[:-1]
        if there == list(range(len(there))) and len(there) > 1:
            return f"client-0 to client-{len(there) - 1}"
        more = f" and {len(there) - 10} more" if len(there) > 10 else ""
        return ", ".join(f"client-{k}" for k in there[:10]) + more

    def _made(self, model: Model | None) -> nn.Module:
        """The model with arbitrary weights. Raises ConfigError."""
        a = self.about
        if model is None and a["model"] is None:
            raise ConfigError("this run was given its model from Python: give it again, model=...")
        with seeds.torch_seeded(0, "model"):
            if isinstance(model, nn.Module):
                made = deep_copy(model)
            elif model is not None:
                made = make_own(model, a["input_shape"], a["outputs"], at=self._cuts)
            else:
                self._compare_code()
                made = build(a["model"], a["input_shape"], a["outputs"], at=self._cuts, **a["model_options"])
        return made.double() if self._double else single(made)

    @property
    def _cuts(self) -> tuple[str, ...]:
        """The modules after which the model was cut: none, one or two."""
        found = [self.about["cut"], self.about["tail_cut"]]
        if any("," in cut for cut in found if cut):  # clients had cuts of their own
            return ()
        return tuple(cut if isinstance(cut, str) else cut[0] for cut in found if cut)

    def _compare_code(self) -> None:
        """Warn if the file of an own model has changed."""
        now, then = plugins.fingerprint("model", self.about["model"]), self.about["model_code"]
        if now != then:
            warnings.warn(
                f"the file of {self.about['model']!r} has changed since the training: the weights may mean something "
                "else in the new code",
                CutlayerWarning,
                stacklevel=4,
            )


def describe(
    config: RunConfig, source: Source, making: Making, *, own: bool, cuts: Sequence[str] = ()
) -> dict[str, Any]:
    """The facts about a model that are needed besides its weights, in plain values. `cuts` [C]: each client's."""
    task = plugins.find("task", config.task)
    cut = ",".join(cuts) if len(set(cuts)) > 1 else cuts[0] if cuts else None
    return {
        "algorithm": config.algorithm,
        "model": None if own else plugins.absolute(config.model),
        "model_options": {} if own else config.options_of(plugins.find("model", config.model)),
        "model_code": "" if own else plugins.fingerprint("model", config.model),
        "cut": None if config.traits.whole else cut,
        "tail_cut": config.tail_cut,
        "input_shape": list(making.input_shape),
        "outputs": making.outputs,
        "inputs": _specs(source.train.form.inputs),
        "precision": config.precision,
        "task": plugins.absolute(config.task),
        "task_options": config.options_of(task),
        "class_names": list(source.class_names),
        "data_format": plugins.absolute(config.data_format),
        "reading": reading_options(config),
        "preprocessing": dict(source.preprocessing),
    }


def load_model(out: str | Path, client: Whose = None, *, best: bool = False, model: Model | None = None) -> nn.Module:
    """The whole model of a finished run (or of a client's folder), in evaluation mode and with its trained weights.

    `client` is a number k (client k's part with the server's) or "average". It is not needed if all clients have the
    same model or one model travels. With `best`, the weights are those of the best evaluation on the validation set,
    instead of the last. Pass `model`, the module or function, if the run received it from Python.
    """
    return find_trained(Path(out), best=best).model(client, model=model)


def find_trained(out: Path, *, best: bool = False) -> TrainedModel:
    """The trained model in a folder. Raises RunFolderError with the reason and the remedy if there is none."""
    path = out / (BEST if best else LAST)
    if path.is_file():
        return TrainedModel.read(path)
    shown = repr(str(out))
    if (out / CONFIG).is_file() and "algorithms" in stored_config(out):
        raise RunFolderError(f"{shown} is a comparison: name one of its runs, such as {out}/ENTRY/seed-0")
    if not (out / CONFIG).is_file() and not (out / LAST).is_file():
        raise RunFolderError(f"{shown} is not a run folder: it has no {CONFIG}; name the folder of a run")
    if not best:
        raise RunFolderError(
            f"the run in {shown} is not finished: `cutlayer resume {out}` goes on with it; its best model so far is "
            "that of --best"
        )
    raise RunFolderError(
        f"{shown} holds no model of the best evaluation: the run had keep_best = false, no validation set, or clients "
        "on other machines; take the last model"
    )


def _outputs(model: nn.Module, inputs: Inputs, device: torch.device) -> Tensor:
    """The model's first output for all rows: [n, ...], on the CPU."""
    count, found = len(inputs_of(inputs)[0]), []
    with torch.no_grad():
        for start in range(0, count, ROWS_PER_PASS):
            part = each(inputs, lambda t, s=start: t[s : s + ROWS_PER_PASS].to(device))  # type: ignore[misc]
            found.append(as_tuple(called(model, part))[0].cpu())
    return torch.cat(found)


def _specs(inputs: Inputs) -> dict[str, Any]:
    """The form of a model's inputs, and the shape of one row and the type of each tensor."""
    names = list(inputs) if isinstance(inputs, Mapping) else []
    form = "named" if isinstance(inputs, Mapping) else "one" if isinstance(inputs, Tensor) else "several"
    tensors = [{"shape": list(t.shape[1:]), "dtype": str(t.dtype).removeprefix("torch.")} for t in inputs_of(inputs)]
    return {"form": form, "names": names, "tensors": tensors}


def _without_head(split: Parts, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A client's part of the whole model, without an auxiliary head that it trained with."""
    held = [split.client, *([] if split.tail is None else [split.tail])]
    names = {name for part in held for name in part.state_dict()}
    return {name: tensor for name, tensor in state.items() if name in names}


_Place = tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]


def _place(tensor: Tensor) -> _Place:
    """The memory and layout of a tensor: two tensors with the same value are one."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _copied(state: Mapping[str, Tensor], copies: dict[_Place, Tensor] | None = None) -> dict[str, Tensor]:
    """Copies on the CPU. `copies` are those made so far, which tensors at the same places share; they must still lie
    there.
    """
    copies = {} if copies is None else copies
    for tensor in state.values():
        if _place(tensor) not in copies:
            copies[_place(tensor)] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return {name: copies[_place(tensor)] for name, tensor in state.items()}


def _shared(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors that are the same in all of several states: the frozen base of all clients."""
    if len(states) < 2:
        return {}
    return {n: t for n, t in states[0].items() if all(n in s and s[n] is t for s in states[1:])}
