"""A resolved configuration, written to TOML and read again, is the same configuration."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import ALGORITHMS, u_shaped

from cutlayer import CompareConfig, plugins
from cutlayer.errors import ConfigError
from cutlayer.options import CommonConfig, RunConfig, TracedConfig, about, read_toml, traits

NAMES = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
WHOLE, POSITIVE = st.integers(1, 2**40), st.floats(0, 1e30, exclude_min=True)
UNIT, ABOVE_ZERO = st.floats(0, 1), st.floats(0, 1, exclude_min=True)
OPTIMIZER = st.dictionaries(
    st.sampled_from(["momentum", "weight_decay", "betas", "nesterov"]),
    st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.lists(UNIT) | NAMES,
)


def words(*values: str) -> st.SearchStrategy[str]:
    return st.sampled_from(values)


SCHEDULES = words("step", "cosine", "constant", "linear")
GROUPS = st.lists(
    st.fixed_dictionaries({"match": NAMES}, optional={"lr": POSITIVE, "weight_decay": st.floats(0, 1)}), max_size=2
).map(tuple)

# A value for every option, except rounds, epochs and others that exclude each other.
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "client_device": NAMES,
    "server_device": NAMES,
    "keep_best": st.booleans(),
    "weights": NAMES,
    "weights_strict": st.just(True),
    "class_names": st.lists(NAMES, unique=True, max_size=4).map(tuple),
    "metrics": st.lists(st.sampled_from(["auroc", "macro_f1"]), unique=True).map(tuple),
    "primary_metric": st.sampled_from(["accuracy", "loss"]),
    "judge": st.sampled_from(["mean", "average", "ensemble"]),
    "evaluate_on": st.sampled_from(["global", "own", "both"]),
    "own_test": st.floats(0.1, 0.5),
    "data_in_memory": st.sampled_from(["auto", "always", "never"]),
    "data_workers": st.integers(0, 4),
    "up_codec": st.sampled_from(["raw", "int8", "top-k:0.1+zstd"]),
    "down_codec": st.sampled_from(["raw", "bfloat16", "float8+zstd"]),
    "link": NAMES,
    "up_mbps": POSITIVE,
    "down_mbps": POSITIVE,
    "latency_ms": st.floats(0, 1e9),
    "server_mbps": POSITIVE,
    "multicast": st.booleans(),
    "utilisation": ABOVE_ZERO,
    "speed_spread": st.floats(0, 5),
    "rate_spread": st.floats(0, 5),
    "stragglers": UNIT,
    "trace": NAMES,
    "trace_period": st.floats(1e-3, 1e30),
    "straggler_slowdown": st.floats(1, 1e9),
    "profiles": NAMES,
    "data": NAMES.filter(lambda name: not plugins.is_reference(name)),  # a reference would be imported
    "data_format": words("auto", "npz", "csv", "idx", "images", "huggingface", "text"),
    "label_column": NAMES,
    "client_column": NAMES,
    "columns": st.lists(NAMES, max_size=3).map(tuple),
    "ignore_columns": st.lists(NAMES, max_size=3).map(tuple),
    "resize": NAMES,
    "impute": words("mean", "median", "zero"),
    "validation": st.floats(0, 1e9),
    "test": POSITIVE,
    "test_seed": st.integers(0, 2**40),
    "clients": WHOLE,
    "partition": words("iid", "dirichlet", "shards", "quantity", "column"),
    "dirichlet_alpha": POSITIVE,
    "shards_per_client": WHOLE,
    "quantity": words("linear", "square", "exponential"),
    "samples_per_client": WHOLE,
    "participation": ABOVE_ZERO,
    "model": words("mlp", "cnn", "resnet16", "alexnet"),
    "tokenizer": NAMES,
    "sequence_length": st.integers(2, 64),
    "packing": words("auto", "packed", "padded"),
    "padding_side": words("right", "left"),
    "loss_on": words("auto", "all", "answers"),
    "documents": words("file", "paragraph", "line"),
    "text_column": NAMES,
    "messages_column": NAMES,
    "prompt_column": NAMES,
    "completion_column": NAMES,
    "model_head": words("auto", "language", "classification"),
    "lora_rank": st.integers(0, 64),
    "lora_ranks": st.lists(st.integers(1, 64), max_size=3).map(tuple),
    "lora_alpha": POSITIVE,
    "lora_targets": st.lists(NAMES, max_size=3).map(tuple),
    "lora_dropout": st.floats(0, 0.99),
    "base_precision": words("float32", "bfloat16"),
    "lora_sides": words("both", "client", "server"),
    "cut": NAMES.filter(lambda name: "," not in name),
    "cut_by": words("profile"),
    "client_memory": st.lists(POSITIVE, min_size=1, max_size=1).map(tuple),
    "client_seconds": st.lists(POSITIVE, min_size=1, max_size=1).map(tuple),
    "tail_cut": NAMES,
    "freeze": NAMES,
    "cache_features": st.booleans(),
    "untie": st.booleans(),
    "start": words("equal", "independent"),
    "batch": WHOLE,
    "client_optimizer": NAMES,
    "client_optimizer_options": OPTIMIZER,
    "client_lr": POSITIVE,
    "server_optimizer": NAMES,
    "server_optimizer_options": OPTIMIZER,
    "server_lr": POSITIVE,
    "client_clip_grad_norm": POSITIVE,
    "server_clip_grad_norm": POSITIVE,
    "accumulate": WHOLE,
    "gradient_checkpointing": st.sampled_from(["none", "client", "server", "both"]),
    "server_accumulate": WHOLE,
    "param_groups": GROUPS,
    "lr_schedule": SCHEDULES,
    "server_lr_schedule": SCHEDULES,
    "lr_warmup": st.floats(0, 0.99),
    "averaging": words("mean", "median", "norm_bound", "products", "trimmed_mean"),
    "attack": st.lists(st.sampled_from(["scale:2@1", "labels@0,2-3"]), unique=True).map(tuple),
    "screening": words("none", "median_bound", "length_bound"),
    "row_multiple": POSITIVE,
    "row_limit": POSITIVE,
    "norm_multiple": POSITIVE,
    "norm_limit": POSITIVE,
    "trim": st.floats(0, 0.49),
    "lr_end": UNIT,
    "lr_peak_at": st.floats(0.01, 0.99),
    "lr_first": ABOVE_ZERO,
    "lr_last": UNIT,
    "lr_decay": ABOVE_ZERO,
    "lr_decay_at": st.lists(st.floats(0.01, 0.99), max_size=3).map(tuple),
    "alpha": st.floats(0, 1e30),
    "alpha_clients": words("participating", "enrolled"),
    "phi": UNIT,
    "phi_when": words("always", "initial", "final"),
    "phi_until": UNIT,
    "working": st.integers(1, 99),
    "buffer_batches": st.integers(1, 99),
    "buffer_models": st.integers(1, 99),
    "answer": words("arrival", "full"),
    "generate": words("complete", "seen", "never"),
    "fill": words("share", "most"),
    "statistics": words("growing", "equal"),
    "decay": st.floats(0.01, 1),
    "average_over": words("clients", "clients-and-rows"),
    "average_reduce": words("mean", "sum"),
    "gradient_scale": words("own", "union"),
    "aux": NAMES,
    "upload_every": WHOLE,
    "align_every": WHOLE,
    "align_rows": WHOLE,
    "align_epochs": WHOLE,
    "align_batch": WHOLE,
    "align_lr": POSITIVE,
    "align_scale": words("row", "mean"),
    "client_share": st.floats(0.01, 0.99),
    "pool_batch": WHOLE,
    "logit_adjust": words("none", "client"),
    "server_batch": WHOLE,
    "running_statistics": st.booleans(),
    "sampling": words("fixed", "proportional", "global"),
    "tau": st.floats(0, 9),
    "server_order": words("interleaved", "sequential"),
    "average_every": words("step", "round", "gradients"),
    "hand_over": words("batch", "epoch"),
    "hand_over_optimizer": st.booleans(),
    "visit_order": words("fixed", "random"),
    "task": words("classification", "binary", "multilabel", "regression", "segmentation", "tokens"),
    "auxiliary_weights": st.lists(st.floats(0, 1e3), max_size=3).map(tuple),
    "class_weights": st.lists(st.floats(0, 1e3), min_size=1, max_size=3).map(tuple),
    "balanced_classes": st.booleans(),
    "label_smoothing": st.floats(0, 0.99),
    "ignore_index": st.integers(-100, 255),
    "next_token": st.booleans(),
    "positive_weight": POSITIVE,
    "positive_weights": st.lists(st.floats(0, 1e3), max_size=3).map(tuple),
    "loss": words("mse", "l1", "huber", "poisson"),
    "huber_delta": POSITIVE,
    "engine": words("auto", "local", "stacked"),
    "tune": words("off", "cached", "on"),
    "deterministic": st.booleans(),
    "device": words("cpu", "cuda", "cuda:1", "mps"),
    "precision": words("float32", "float64", "bfloat16", "tf32"),
    "memory_limit": st.floats(0.1, 100),
    "client_states": words("auto", "memory", "disk"),
    "eval_every": WHOLE,
    "eval_clients": WHOLE,
    "log_to": st.lists(words("csv", "tensorboard", "wandb", "mlflow", "trackio"), unique=True).map(tuple),
    "log_every": WHOLE,
    "wandb_project": NAMES,
    "wandb_mode": words("online", "offline"),
    "mlflow_uri": NAMES,
    "mlflow_experiment": NAMES,
    "trackio_project": NAMES,
    "stop_after": WHOLE,
    "checkpoint_every": WHOLE,
    "snapshot_every": WHOLE,
    "clip": POSITIVE,
    "gaussian_noise": st.floats(0, 1e3),
    "laplace_noise": st.floats(0, 1e3),
    "feature_dropout": st.floats(0, 0.99),
    "nopeek": st.floats(0, 1e3),
}
BESIDE_A_TRACE = ("up_mbps", "down_mbps", "rate_spread")  # without effect if there is a trace
LENGTH = st.one_of(st.just({}), st.builds(dict, epochs=WHOLE), st.builds(dict, rounds=WHOLE))
LOCAL = st.one_of(st.just({}), st.builds(dict, local_epochs=WHOLE), st.builds(dict, local_steps=WHOLE))


@st.composite
def values(draw: st.DrawFn, algorithms: tuple[str, ...]) -> dict[str, Any]:
    """Random options for these algorithms."""
    found = draw(st.fixed_dictionaries({}, optional=VALUES)) | draw(LENGTH) | draw(LOCAL)
    if "client_device" not in found:
        found = {k: v for k, v in found.items() if k not in TracedConfig.model_fields}
        found.pop("client_seconds", None)
    for name in BESIDE_A_TRACE if "trace" in found else ("trace_period",):
        found.pop(name, None)
    if (
        "client_device" not in found
        or "cut" in found
        or any(t.split and not t.mixes_cuts for t in map(traits, algorithms))
    ):
        found.pop("cut_by", None)
    if any(t.split and not t.lower_only for t in map(traits, algorithms)):
        found = {k: v for k, v in found.items() if k not in ("client_memory", "client_seconds")}
    if "clip" not in found or found.get("gaussian_noise"):
        found.pop("laplace_noise", None)
    if "clip" not in found:
        found.pop("gaussian_noise", None)
    if "norm_limit" in found:
        found.pop("norm_multiple", None)
    if {"usfl"} & {*algorithms} and found.get("average_every") == "gradients":  # only sfl has this choice
        found["average_every"] = "step"
    if any(map(u_shaped, algorithms)):
        found.setdefault("tail_cut", "hidden3")
    if found.get("logit_adjust", "none") == "none":
        found.pop("tau", None)
    return {k: v for k, v in found.items() if has_effect(k, found, algorithms) and taken(k, v, algorithms)}


def taken(name: str, value: Any, algorithms: tuple[str, ...]) -> bool:
    """Whether all algorithms that have an option of this name accept the value.

    Algorithms can have different choices for options of the same name.
    """
    for entry in (plugins.find("algorithm", a) for a in algorithms):
        if name in entry.option_names:
            try:
                entry.checked({name: value})
            except ConfigError:
                return False
    return True


def has_effect(name: str, chosen: dict[str, Any], algorithms: tuple[str, ...]) -> bool:
    """Whether the option belongs to something that is chosen."""
    own = [traits(a) for a in algorithms]
    if name in CommonConfig.model_fields:
        when = about(CommonConfig.model_fields[name], "when")
        if name == "screening":
            when = plugins.find(name, chosen.get(name, "none")).facts["when"]
        return any(
            {
                "": True,
                "split": t.split,
                "lower": t.lower_only,
                "mixed": t.mixes_cuts,
                "together": t.split and not t.takes_turns,
                "u-shaped": t.u_shaped,
                "group": not t.central,
                "averages": t.averages or t.server_copies,
            }[when]
            for t in own
        )
    schedules = [chosen.get("lr_schedule", "step")]
    if any(t.split for t in own):
        schedules.append(chosen.get("server_lr_schedule") or schedules[0])
    things = [("algorithm", a) for a in algorithms] + [("schedule", s) for s in schedules]
    things.append(("partition", chosen.get("partition", "iid")))
    if any(t.averages or t.server_copies for t in own):
        things.append(("averaging", chosen.get("averaging", "mean")))
    screening = chosen.get("screening", "none")
    if any(t.split if screening == "length_bound" else t.split and not t.takes_turns for t in own):
        things.append(("screening", screening))
    things.append(("task", chosen.get("task", "classification")))
    things += [("logger", name) for name in chosen.get("log_to", ())]
    entries = [plugins.find(kind, thing) for kind, thing in things]
    data_format, data = chosen.get("data_format", "auto"), chosen.get("data", "digits")
    if data_format != "auto":
        entries.append(plugins.find("format", data_format))
    elif not (plugins.known("data", data) or plugins.is_reference(data)):
        entries += plugins.index("format").values()
    if any(t.split for t in own):
        entries += plugins.index("defence").values()
    return any(name in entry.option_names for entry in entries)


def again(resolved: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        path.write_bytes(tomli_w.dumps(resolved).encode())
        return read_toml(path)


def test_every_option_is_tried() -> None:
    rest = {"epochs", "rounds", "local_epochs", "local_steps", "defences"}
    of_things = {o for e in plugins.flat() for o in e.option_names}
    assert set(VALUES) | rest == set(CommonConfig.model_fields) | of_things


@settings(deadline=None)
@given(data=st.data(), algorithm=st.sampled_from(list(ALGORITHMS)), seed=st.integers(0, 2**60))
def test_runs(data: st.DataObject, algorithm: str, seed: int) -> None:
    config = RunConfig(algorithm=algorithm, seed=seed, **data.draw(values((algorithm,))))
    config.check(frozenset(config.model_fields_set))
    resolved = config.resolved()
    read = RunConfig.of(again(resolved))
    read.check(frozenset(read.model_fields_set))
    assert read.resolved() == resolved
    # Values that are not written, but that the algorithm reads, are the same, too.
    replaced = {"epochs"} if config.rounds else set()
    replaced |= {"local_epochs"} if config.specific.get("local_steps") else set()
    looked_at = {n for n in RunConfig.model_fields if n not in CommonConfig.model_fields}
    looked_at |= {n for n in CommonConfig.model_fields if has_effect(n, {}, (algorithm,))} | set(config.specific)
    for name in looked_at - replaced - {"cut"}:
        assert getattr(read, name) == getattr(config, name), name


@settings(deadline=None)
@given(data=st.data())
def test_comparisons(data: st.DataObject) -> None:
    """Comparisons with variants, whose planned runs are also the same."""
    algorithms = tuple(data.draw(st.lists(st.sampled_from(list(ALGORITHMS)), min_size=1, unique=True)))
    seeds = tuple(data.draw(st.lists(st.integers(0, 2**60), min_size=1, max_size=4, unique=True)))
    options = data.draw(values(algorithms))
    variant = {}
    for name in data.draw(st.lists(NAMES.map("v{}".format), max_size=2, unique=True)):
        algorithm = data.draw(st.sampled_from(list(ALGORITHMS)))
        own = data.draw(values((algorithm,)))
        assume(all(taken(key, value, (algorithm,)) for key, value in options.items() if key not in own))
        chosen = {**options, **own}
        idle = BESIDE_A_TRACE if "trace" in chosen else ()
        own = {key: value for key, value in own.items() if has_effect(key, chosen, (algorithm,)) and key not in idle}
        own = {key: list(value) if isinstance(value, tuple) else value for key, value in own.items()}
        variant[name] = {"algorithm": algorithm, **own}
    config = CompareConfig(algorithms=algorithms, seeds=seeds, variant=variant, **options)
    resolved = config.resolved()
    read = CompareConfig.of(again(resolved))
    assert read.resolved() == resolved
    assert read.variant == config.variant
    a, b = (c.runs(frozenset(c.model_fields_set)) for c in (config, read))
    assert {n: {s: r.resolved() for s, r in runs.items()} for n, runs in a.items()} == {
        n: {s: r.resolved() for s, r in runs.items()} for n, runs in b.items()
    }


def test_no_options_of_the_server_are_not_those_of_the_client() -> None:
    """If left out, the server's optimiser uses the client's options. An empty table means no options."""
    options: dict[str, Any] = {"algorithm": "psl", "client_optimizer_options": {"weight_decay": 0.1}}
    config = RunConfig(**options, server_optimizer_options={})
    assert RunConfig.of(again(config.resolved())).server_optimizer_options == {}
    assert RunConfig.of(again(RunConfig(**options).resolved())).server_optimizer_options is None


def test_dashes_in_toml_keys(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(
        "client-lr = 0.5\nphi_until = 0.25\n[variant.mine]\nalgorithm = 'sglr'\nphi-when = 'initial'\n"
    )
    config = CompareConfig.of(read_toml(tmp_path / "c.toml"))
    mine = config.runs(frozenset(config.model_fields_set))["mine"][0]
    assert (mine.client_lr, mine.phi_until, mine.phi_when) == (0.5, 0.25, "initial")


def test_a_variant_with_another_data_format_leaves_out_the_options_of_the_first() -> None:
    variant = {"mine": {"algorithm": "psl", "data_format": "npz"}}
    config = CompareConfig(algorithms=["psl"], data="people.csv", impute="mean", variant=variant)
    runs = config.runs(frozenset(config.model_fields_set))
    assert runs["psl"][0].impute == "mean"
    assert "impute" not in runs["mine"][0].specific


def test_a_variant_replaces_a_value_that_its_algorithm_does_not_take() -> None:
    """U-shaped SFL cannot average gradients. A comparison with SFL may do so if the variant sets another value."""
    options: dict[str, Any] = {"algorithms": ["sfl"], "average_every": "gradients", "local_steps": 1}
    mine = {"algorithm": "usfl", "tail_cut": "hidden2", "average-every": "step"}
    config = CompareConfig(**options, variant={"mine": mine})
    runs = config.runs(frozenset(config.model_fields_set))
    assert runs["sfl"][0].specific["average_every"] == "gradients"
    assert runs["mine"][0].specific["average_every"] == "step"
    del mine["average-every"]
    with pytest.raises(ConfigError, match="unknown average_every 'gradients'"):
        CompareConfig(**options, variant={"mine": mine})
