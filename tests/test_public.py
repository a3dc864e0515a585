"""The interface that users rely on: public names, options, commands and choices. Changing it affects users."""

from __future__ import annotations

import inspect
import subprocess
import sys

import cutlayer
from cutlayer import derive, plugins
from cutlayer.cli import application, flags
from cutlayer.options import CommonConfig, CompareConfig, FleetConfig, PlanConfig, RunConfig

PUBLIC = """CompareConfig Comparison ConfigError CutError CutlayerError DataError NonFiniteError Parts Predictions
Record Result Row Run RunConfig RunFolderError Samples Scores Source TrainedModel TrainingError UsageError __version__
cite cut cut_points from_arrays from_dataset load load_model partition tables"""

COMMON = """client_device server_device link up_mbps down_mbps latency_ms server_mbps multicast utilisation
speed_spread rate_spread stragglers straggler_slowdown profiles trace
trace_period data data_format label_column client_column class_names
validation test test_seed data_in_memory data_workers
clients partition samples_per_client participation sampling task metrics primary_metric model cut
cut_by client_memory client_seconds tail_cut untie
weights weights_strict start freeze epochs rounds batch client_optimizer client_optimizer_options client_lr
client_clip_grad_norm server_optimizer server_optimizer_options server_lr server_clip_grad_norm accumulate
gradient_checkpointing server_accumulate param_groups lr_schedule server_lr_schedule lr_warmup averaging logit_adjust
tau up_codec cache_features down_codec
 screening defences attack engine tune deterministic device precision memory_limit client_states eval_every
 eval_clients judge evaluate_on own_test log_to stop_after checkpoint_every keep_best snapshot_every"""

PLAN = """model cut cut_by client_memory client_seconds tail_cut algorithms input input_type freeze task target classes
label_bytes clients samples_per_client batch precision up_codec down_codec client_optimizer gradient_checkpointing
memory_budget energy_budget servers ranks seed"""

METRICS = """accuracy majority recall balanced_accuracy class_gap macro_f1 confusion iou miou dice auroc
average_precision mae rmse r2 perplexity"""

THINGS = {
    "algorithm": {
        "cl": "",
        "cyclepsl": "gradient_scale running_statistics server_batch",
        "cyclesfl": "gradient_scale local_epochs local_steps running_statistics server_batch",
        "cyclesglr": "alpha alpha_clients average_over average_reduce gradient_scale phi phi_until phi_when "
        "running_statistics server_batch",
        "fl": "local_epochs local_steps",
        "gas": "answer buffer_batches buffer_models decay fill generate local_epochs local_steps statistics working",
        "gpsl": "local_epochs local_steps",
        "gscala": "average_every gradient_scale local_epochs local_steps",
        "psl": "gradient_scale",
        "ssl": "hand_over hand_over_optimizer visit_order",
        "slr": "alpha alpha_clients gradient_scale",
        "sgl": "average_over average_reduce gradient_scale phi phi_until phi_when",
        "sglr": "alpha alpha_clients average_over average_reduce gradient_scale phi phi_until phi_when",
        "sfl": "average_every gradient_scale local_epochs local_steps",
        "sflv1": "local_epochs local_steps",
        "sflv2": "local_epochs local_steps server_order",
        "smofi": "local_epochs local_steps",
        "sflv3": "local_epochs local_steps",
        "scala": "average_every gradient_scale local_epochs local_steps",
        "ussl": "hand_over hand_over_optimizer visit_order",
        "upsl": "gradient_scale",
        "ampere": "aux client_share pool_batch",
        "cse-fsl": "aux local_epochs local_steps upload_every",
        "fsl-sage": "align_batch align_epochs align_every align_lr align_rows align_scale aux local_epochs local_steps "
        "upload_every",
        "usfl": "average_every gradient_scale local_epochs local_steps",
        "usglr": "alpha alpha_clients average_over average_reduce gradient_scale phi phi_until phi_when",
    },
    "task": {
        "binary": "auxiliary_weights positive_weight",
        "classification": "auxiliary_weights balanced_classes class_weights ignore_index label_smoothing",
        "multilabel": "auxiliary_weights positive_weights",
        "regression": "auxiliary_weights huber_delta loss",
        "segmentation": "auxiliary_weights balanced_classes class_weights ignore_index label_smoothing",
        "tokens": "auxiliary_weights balanced_classes class_weights ignore_index label_smoothing next_token",
    },
    "metric": dict.fromkeys(METRICS.split(), ""),
    "model": {
        "alexnet": "",
        "cnn": "",
        "hf": "base_precision lora_alpha lora_dropout lora_rank lora_ranks lora_sides lora_targets model_head",
        "mlp": "",
        "resnet16": "",
    },
    "data": {"digits": "", "fashion-mnist": ""},
    "format": {
        "csv": "client_column columns ignore_columns impute label_column",
        "huggingface": "client_column columns ignore_columns impute label_column resize",
        "idx": "",
        "images": "resize",
        "npz": "",
        "text": "client_column completion_column documents label_column loss_on messages_column packing padding_side "
        "prompt_column sequence_length text_column tokenizer",
    },
    "partition": {
        "column": "",
        "dirichlet": "dirichlet_alpha",
        "iid": "",
        "quantity": "quantity",
        "shards": "shards_per_client",
    },
    "schedule": {
        "constant": "",
        "cosine": "",
        "linear": "lr_end",
        "onecycle": "lr_first lr_last lr_peak_at",
        "step": "lr_decay lr_decay_at",
    },
    "averaging": {
        "mean": "",
        "median": "",
        "norm_bound": "norm_limit norm_multiple",
        "products": "",
        "trimmed_mean": "trim",
    },
    "screening": {"length_bound": "row_limit", "median_bound": "row_multiple", "none": ""},
    "codec": {"bfloat16": "", "float16": "", "float8": "", "int8": "", "rand-top-k": "", "raw": "", "top-k": ""},
    "defence": {
        "feature-dropout": "feature_dropout",
        "noise": "clip gaussian_noise laplace_noise",
        "nopeek": "nopeek",
    },
    "attack": {"features": "", "labels": "", "poison": "", "scale": "", "sign": ""},
    "logger": {
        "csv": "log_every",
        "tensorboard": "log_every",
        "wandb": "log_every wandb_mode wandb_project",
        "mlflow": "log_every mlflow_experiment mlflow_uri",
        "trackio": "log_every trackio_project",
    },
    "search": {"grid": "", "halving": "eta", "optuna": "eta rungs", "random": ""},
    "optimizer": {},
    "head": {},
}


def test_public_names() -> None:
    assert cutlayer.__all__ == PUBLIC.split()
    assert all(getattr(cutlayer, name) is not None for name in cutlayer.__all__)
    assert set(dir(cutlayer)) == set(cutlayer.__all__)


def test_options() -> None:
    assert list(CommonConfig.model_fields) == COMMON.split()
    assert set(RunConfig.model_fields) - set(CommonConfig.model_fields) == {"algorithm", "seed", "share_server_model"}
    assert set(CompareConfig.model_fields) - set(CommonConfig.model_fields) == {
        "algorithms",
        "seeds",
        "variant",
        "sweep",
        "tuning",
    }
    assert list(PlanConfig.model_fields) == [*FleetConfig.model_fields, *PLAN.split()]
    for config in (CompareConfig, PlanConfig):
        assert all(field.description for field in config.model_fields.values())


def test_commands() -> None:
    assert {name for name in application() if not name.startswith("-")} == {
        "run",
        "compare",
        "resume",
        "report",
        "cite",
        "collect",
        "export",
        "predict",
        "plan",
        "calibrate",
        "serve",
        "join",
        "certs",
        "reproduce",
        "leakage",
        "list",
    }


def test_things_and_their_options() -> None:
    found = {
        kind: {name: " ".join(sorted(entry.option_names)) for name, entry in plugins.index(kind).items()}
        for kind in plugins.KINDS
    }
    found["codec"] = dict.fromkeys(found["codec"], "")  # written with the name of a codec, not as an option of a run
    assert found == THINGS


def test_what_is_derived_is_up_to_date() -> None:
    """If this fails, run `make derive`."""
    stored = plugins.stored_index()
    assert stored is not None, "index.json is out of date"
    assert derive.KEYWORDS.read_text() == derive.keywords()
    assert derive.OPTIONS.read_text() == derive.options()
    assert derive.SECURITY.read_text() == derive.security(derive.SECURITY.read_text())


def test_importing_is_light() -> None:
    """Neither the package nor the command line's help imports torch."""
    code = "import cutlayer, cutlayer.cli, sys; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_no_command_has_a_flag_with_two_meanings() -> None:
    """No parameter of a command has the name of an option that the command also accepts."""
    application()  # registers all commands
    for made in flags.COMMANDS:
        own = set(inspect.signature(made.function).parameters) - set(made.flags)
        for config in made.flags.values():
            twice = own & set(flags.flags_of(config, ()).model_fields)
            assert not twice, f"{made.function.__name__}: {sorted(twice)}"
