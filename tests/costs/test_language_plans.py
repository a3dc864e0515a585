"""Plans of language models from a configuration alone, compared with plans of loaded models and with real runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT
from torch import Tensor

from cutlayer import ConfigError, Run
from cutlayer.costs.measure import example, load_model, measure, placed
from cutlayer.costs.plan import Plan, plan
from cutlayer.models import build
from cutlayer.options import PlanConfig
from cutlayer.report.planned import heading

transformers = pytest.importorskip("transformers", reason="needs cutlayer[lm]")
pytest.importorskip("peft", reason="needs cutlayer[lm]")

VOCABULARY, LENGTH, CLIENTS, ROWS = 32, 6, 3, 5
EXAMPLES = ROOT / "examples" / "language_models"
MACHINES = {"client_device": "raspberry-pi-4", "link": "lte", "server_device": "h100"}
LM: dict[str, Any] = {"input": (LENGTH,), "input_type": "int64", "task": "tokens", "lora_rank": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers.utils.logging.disable_progress_bar()
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=12, num_attention_heads=2, num_key_value_heads=1,
        num_hidden_layers=3, max_position_embeddings=LENGTH, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("base")
    transformers.LlamaForCausalLM(config).save_pretrained(place)
    return place


def planned(model: str, **options: Any) -> Plan:
    common = {**LM, "clients": CLIENTS, "samples_per_client": ROWS, "batch": 2, "cut": "1"}
    return plan(PlanConfig.of({**common, "model": model, **options}))


def rows(count: int) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (count, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return {"x": ids[:, :-1], "y": ids[:, 1:], "x_test": ids[:2, :-1], "y_test": ids[:2, 1:]}


def run(folder: Path, algorithm: str, **options: Any) -> Run:
    cuts = {} if algorithm in ("cl", "fl") else {"cut": "1"}
    common = {
        "task": "tokens",
        "lora_rank": 2,
        "clients": CLIENTS,
        "batch": 2,
        "rounds": 1,
        "validation": 0,
        **MACHINES,
    }
    if algorithm in ("upsl", "usfl"):
        cuts["tail_cut"] = "2"
    else:
        options.pop("tail_cut", None)
    if not cuts:
        options = {name: value for name, value in options.items() if "codec" not in name}
    given: dict[str, Any] = {"model": f"hf:{folder}", "algorithm": algorithm, **common, **cuts, **options}
    return Run(data=rows(CLIENTS * ROWS), partition="iid", **given)


@pytest.mark.parametrize(
    ("algorithms", "options"),
    [
        (("fl", "psl"), {"base_precision": "bfloat16"}),
        pytest.param(("cl", "sfl", "sglr"), {"up_codec": "int8", "down_codec": "top-k:0.25"}, marks=pytest.mark.long),
        pytest.param(("upsl",), {"up_codec": "float8", "down_codec": "int8", "tail_cut": "2"}, marks=pytest.mark.long),
    ],
)
def test_a_plan_of_a_configuration_is_what_a_run_counts(
    folder: Path, tmp_path: Path, algorithms: tuple[str, ...], options: dict[str, str]
) -> None:
    """Bytes, FLOPs and time equal those of a run, and the plan equals that of the loaded model exactly."""
    alone = tmp_path / "tiny.json"
    alone.write_bytes((folder / "config.json").read_bytes())
    found = planned(f"hf:{alone}", algorithms=algorithms, **options, **MACHINES)
    own = {name: value for name, value in options.items() if name == "base_precision"}
    made = build(f"hf:{folder}", (LENGTH,), 2, lora_rank=2, **own)
    bare = PlanConfig.of({name: value for name, value in found.config.model_dump().items() if name != "lora_rank"})
    loaded = plan(bare.model_copy(update={"specific": {}}), model=made)
    assert loaded.costs == found.costs
    assert loaded.memory == found.memory
    assert loaded.chosen.measured == found.chosen.measured
    for cost in found.costs:
        real = run(folder, cost.algorithm, **options)
        result, ledger, e = real.run(), real.training.ledger, cost.expected
        assert (e.up + e.once_up, e.down) == (ledger.total("up"), ledger.total("down")), cost.algorithm
        assert e.down_broadcast == ledger.total("down", "wire-broadcast")
        assert e.paper == ledger.total("up", "paper") + ledger.total("down", "paper")
        assert (e.client_flops, e.server_flops) == (result.client_flops, result.server_flops)
        assert e.seconds == pytest.approx(result.virtual_seconds)


@pytest.mark.parametrize(
    ("algorithms", "options"),
    [
        pytest.param(("cl", "fl", "sfl"), {}, marks=pytest.mark.long),
        pytest.param(("psl", "upsl"), {"tail_cut": "2", "up_codec": "int8"}, marks=pytest.mark.long),
        pytest.param(("usfl", "sglr"), {"tail_cut": "2", "phi": 0.7}, marks=pytest.mark.long),
    ],
)
def test_ranks_per_client_are_what_a_run_counts(
    folder: Path, algorithms: tuple[str, ...], options: dict[str, Any]
) -> None:
    """Bytes, FLOPs, time and energy on different machines and links."""
    ranks = {"lora_rank": 0, "lora_ranks": (1, 4, 1), "speed_spread": 0.7, "rate_spread": 0.5}
    found = planned(f"hf:{folder}", algorithms=algorithms, **options, **ranks, **MACHINES)
    for cost in found.costs:
        own = {n: v for n, v in options.items() if n != "phi" or cost.algorithm == "sglr"}
        own |= {"averaging": "products"} if cost.algorithm in ("fl", "sfl", "usfl") else {}
        real = run(folder, cost.algorithm, **own, **ranks)
        result, ledger, e = real.run(), real.training.ledger, cost.expected
        assert (e.up + e.once_up, e.down) == (ledger.total("up"), ledger.total("down")), cost.algorithm
        assert e.down_broadcast == ledger.total("down", "wire-broadcast")
        assert e.paper == ledger.total("up", "paper") + ledger.total("down", "paper")
        assert (e.client_flops, e.server_flops) == pytest.approx((result.client_flops, result.server_flops), rel=1e-12)
        assert e.seconds == pytest.approx(result.virtual_seconds, rel=1e-9)
        joules = None if e.clients is None else e.clients.total
        assert joules == (None if result.clients_joules is None else pytest.approx(result.clients_joules, rel=1e-9))


@pytest.mark.long
def test_fewer_heads_of_keys_take_less_memory_and_no_scores_are_kept(folder: Path) -> None:
    """Saved memory is linear in the number of tokens, except for a mask, which is quadratic.

    A block that is computed again keeps only its inputs.
    """
    kept = []
    for tokens in (8, 16):
        net = placed(load_model(f"hf:{folder}", (tokens,), 2, lora_rank=2), torch.float32)
        kept.append(measure(net, "model.layers.1", example((tokens,), torch.int64)).whole)
    few, many = kept
    assert many.per_row - 16 * 16 == 2 * (few.per_row - 8 * 8)
    assert many.held_per_row - 16 * 16 == 2 * (few.held_per_row - 8 * 8)
    assert few.held_per_row + few.block_per_row < few.per_row <= few.held_per_row + 3 * few.block_per_row


@pytest.mark.long
def test_memory_of_both_sides(folder: Path) -> None:
    """Parameters, gradients and Adam's moments by hand. The server holds the rows of all clients."""
    found = planned(f"hf:{folder}", algorithms=("fl", "sfl"))
    client, server, whole = found.memory
    assert [one.side for one in found.memory] == ["client", "server", "client of FL"]
    # Rank 2 on the queries (8 to 8) and values (8 to 4) of each of three blocks.
    block = 2 * (8 + 8) + 2 * (8 + 4)
    assert [one.gradients for one in found.memory] == [4 * block, 2 * 4 * block, 3 * 4 * block]
    assert all(one.trained == one.gradients == one.moments // 2 for one in found.memory)
    attention, rest = 2 * 8 * 8 + 2 * 8 * 4, 3 * 8 * 12 + 2 * 8
    assert client.frozen >= 4 * (VOCABULARY * 8 + attention + rest)
    assert client.frozen + server.frozen == whole.frozen
    of_one = planned(f"hf:{folder}", algorithms=("sfl",), clients=1).memory[1]
    measured = found.chosen.measured.server
    assert server.activations - of_one.activations == (CLIENTS - 1) * 2 * measured.per_row
    halved = planned(f"hf:{folder}", algorithms=("sfl",), base_precision="bfloat16").memory[1]
    assert server.frozen > halved.frozen > server.frozen / 2  # norms stay in float32
    assert halved.trained == server.trained
    assert any("int64" not in line and "lora_rank 2" in line for line in heading(found))


@pytest.mark.long
def test_codecs_that_cannot_be_planned(folder: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be planned, since what zstd saves depends on the numbers"):
        planned(f"hf:{folder}", up_codec="int8+zstd")


def test_data_are_sent_once(folder: Path) -> None:
    """Adapters are 672 bytes per epoch, up and down. Tokens and labels are 96 bytes per sample and are sent once."""
    (found,) = [
        b
        for b in planned(f"hf:{folder}", algorithms=("cl", "fl"), samples_per_client=100).data_break_evens
        if b.convention == "wire-unicast"
    ]
    moved = 2 * planned(f"hf:{folder}", algorithms=("fl",)).costs[0].expected.up // CLIENTS
    assert found.last == 100 * 2 * 8 * LENGTH // moved


@pytest.mark.long
@pytest.mark.parametrize(("name", "parameters"), [("1b", 1.10e9), ("7b", 6.74e9), ("70b", 68.98e9)])
def test_billions_of_parameters_from_a_configuration(name: str, parameters: float) -> None:
    begin = time.process_time()
    model = f"hf:{EXAMPLES / f'llama-{name}.json'}"
    found = planned(model, input=(2048,), cut="2", lora_rank=8, algorithms=("fl", "sfl"))
    assert found.chosen.measured.parameters == pytest.approx(parameters, rel=0.005)
    assert found.memory[1].checkpointed < found.memory[1].activations / 5
    assert time.process_time() - begin < 120
