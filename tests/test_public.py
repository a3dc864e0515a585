"""What users rely on, frozen: public names, options, commands, choices. A change here is a change for them."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args, get_type_hints

import cutlayer
from cutlayer import catalog
from cutlayer.algorithms import ALGORITHMS
from cutlayer.cli import app
from cutlayer.options import CommonConfig, CompareConfig, FleetConfig, PlanConfig, RunConfig, all_specific, applicable

PUBLIC = """CompareConfig Comparison ConfigError CutError CutlayerError DataError NonFiniteError Parts Record Result Row
Run RunConfig RunFolderError Samples Scores Source TrainingError UsageError __version__ cut cut_points from_arrays
from_dataset load partition"""

COMMON = """client_device server_device link up_mbps down_mbps latency_ms server_mbps multicast utilisation speed_spread
rate_spread stragglers straggler_slowdown profiles data data_format label_column client_column class_names validation
test clients partition dirichlet_alpha shards_per_client quantity samples_per_client participation model cut tail_cut
start epochs rounds batch client_optimizer client_optimizer_options client_lr server_optimizer
server_optimizer_options server_lr lr_schedule server_lr_schedule lr_decay lr_decay_at local_epochs local_steps alpha
alpha_clients phi phi_when phi_until average_over average_reduce gradient_scale up_codec down_codec clip
gaussian_noise laplace_noise feature_dropout nopeek average_every hand_over hand_over_optimizer visit_order engine
device precision memory_limit eval_every eval_clients checkpoint_every snapshot_every"""

PLAN = """model cut algorithms input input_type classes label_bytes clients samples_per_client batch phi precision
client_optimizer memory_budget energy_budget servers seed"""

OWN = {
    "cl": "",
    "fl": "local_epochs local_steps",
    "ssl": "hand_over hand_over_optimizer visit_order",
    "psl": "gradient_scale",
    "sfl": "average_every gradient_scale local_epochs local_steps",
    "sflv1": "local_epochs local_steps",
    "sflv2": "local_epochs local_steps",
    "sflv3": "local_epochs local_steps",
    "slr": "alpha alpha_clients gradient_scale",
    "sgl": "average_over average_reduce gradient_scale phi phi_until phi_when",
    "sglr": "alpha alpha_clients average_over average_reduce gradient_scale phi phi_until phi_when",
    "ussl": "hand_over hand_over_optimizer tail_cut visit_order",
}


def test_public_names() -> None:
    assert cutlayer.__all__ == PUBLIC.split()
    assert all(getattr(cutlayer, name) is not None for name in cutlayer.__all__)
    assert set(dir(cutlayer)) == set(cutlayer.__all__)


def test_options() -> None:
    assert list(CommonConfig.model_fields) == COMMON.split()
    assert set(RunConfig.model_fields) - set(CommonConfig.model_fields) == {"algorithm", "seed"}
    assert set(CompareConfig.model_fields) - set(CommonConfig.model_fields) == {"algorithms", "seeds", "variant"}
    assert list(PlanConfig.model_fields) == [*FleetConfig.model_fields, *PLAN.split()]
    for config in (CompareConfig, PlanConfig):
        assert all(field.description for field in config.model_fields.values())


def test_commands() -> None:
    assert {name for name in app if not name.startswith("-")} == {
        "run",
        "compare",
        "resume",
        "report",
        "plan",
        "calibrate",
        "serve",
        "join",
        "certs",
        "reproduce",
        "leakage",
        "list",
    }


def test_options_of_each_algorithm() -> None:
    assert {name: sorted(info.options) for name, info in catalog.ALGORITHMS.items()} == {
        name: sorted(options.split()) for name, options in OWN.items()
    }
    assert applicable("cl") == frozenset()
    assert all_specific() <= set(CommonConfig.model_fields)


def test_catalogue_names_what_there_is() -> None:
    assert list(catalog.ALGORITHMS) == list(ALGORITHMS)
    formats = set(get_args(get_type_hints(CommonConfig)["data_format"]))
    assert formats == {"auto", *catalog.DATA_FORMATS}


def test_importing_is_light() -> None:
    """Neither the package nor the command line's help may wait for torch."""
    code = "import cutlayer, cutlayer.cli, sys; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
