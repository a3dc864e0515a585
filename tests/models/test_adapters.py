"""Adapters on a frozen base: all engines and deployments agree, also with a training loop that uses peft alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank import difference, together, trained
from torch import Tensor, nn

from cutlayer import ConfigError, Run
from cutlayer.adapters import filled
from cutlayer.exporting import export
from cutlayer.options import RunConfig
from cutlayer.remote.sides import share
from cutlayer.testing.deployed import in_memory
from cutlayer.trained import find_trained

transformers = pytest.importorskip("transformers", reason="needs cutlayer[lm]")
peft = pytest.importorskip("peft", reason="needs cutlayer[lm]")

VOCABULARY, LENGTH, BLOCKS = 32, 6, 2
BENT = ("upsl", "usfl")
CUT = ("psl", "sfl", "sglr", "ssl", *BENT)
EVERY = (*CUT, "fl")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    transformers.utils.logging.disable_progress_bar()
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=12, num_attention_heads=2, num_key_value_heads=1,
        num_hidden_layers=BLOCKS, max_position_embeddings=LENGTH, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("base")
    transformers.LlamaForCausalLM(config).save_pretrained(place)
    return str(place)


def rows(count: int) -> dict[str, Tensor]:
    """Tokens and their successors as targets. The first targets of each row are not learnt."""
    ids = torch.randint(0, VOCABULARY, (count, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    y = ids[:, 1:].clone()
    y[:, :2] = -100
    return {"x": ids[:, :-1], "y": y, "x_test": ids[:2, :-1], "y_test": y[:2]}


def options(base: str, algorithm: str, clients: int = 2, **more: Any) -> dict[str, Any]:
    cuts: dict[str, Any] = {} if algorithm in ("fl", "cl") else {"cut": "1"}
    cuts |= {"tail_cut": "2"} if algorithm in BENT else {}
    common = {
        "model": f"hf:{base}", "task": "tokens", "algorithm": algorithm, "clients": clients, "rounds": 2, "batch": 2,
        "client_lr": 0.05, "client_optimizer": "sgd", "lora_rank": 2, "engine": "local", "lr_schedule": "constant",
    }  # fmt: skip
    return {**common, **cuts, **more}


def innermost(run: Run) -> Any:
    cohort: Any = run.training.clients
    while hasattr(cohort, "inner"):
        cohort = cohort.inner
    return cohort


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads this attribute
@pytest.mark.parametrize("accumulate", [1, 2])
def test_psl_with_one_client_takes_the_steps_of_peft_on_the_uncut_model(base: str, accumulate: int) -> None:
    """The reference uses peft's model, a loss with the ignore index and torch's optimiser.

    Two batches of half the rows with accumulated gradients equal one batch of all rows.
    """
    data = rows(4)
    x, y = data["x"], data["y"]
    config = options(base, "psl", clients=1, rounds=4, batch=4 // accumulate, accumulate=accumulate)
    run = Run(data=data, validation=0, **config)
    begun = {n: t.clone() for part in run.training.parts.all for n, t in part.state_dict().items() if "lora" in n}
    losses = [step.loss for step in run]

    model = transformers.LlamaForCausalLM.from_pretrained(base)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))
    assert (
        tuned.load_state_dict({f"base_model.model.{n}": t for n, t in begun.items()}, strict=False).unexpected_keys
        == []
    )
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.05)
    theirs = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(tuned(input_ids=x).logits.flatten(0, 1), y.flatten(), ignore_index=-100)
        loss.backward()
        optimizer.step()
        theirs.append(loss.item())
    pairs = [sum(losses[i : i + accumulate]) / accumulate for i in range(0, len(losses), accumulate)]
    assert pairs == pytest.approx(theirs, abs=1e-6)
    assert theirs[0] != pytest.approx(theirs[-1], abs=1e-4)
    ours = run.model(0).state_dict()
    for name, tensor in tuned.state_dict().items():
        assert torch.allclose(tensor, ours[name.removeprefix("base_model.model.")], atol=1e-6), name


@pytest.mark.parametrize("engine", ["local", "stacked"])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_that_are_computed_again_change_nothing(base: str, engine: str, masked: bool) -> None:
    """Equal bit for bit with dropout, a base in bfloat16 and gradients accumulated over two batches.

    With a mask, the model is cut by another method.
    """
    data: dict[str, Any] = rows(8)
    if masked:
        mask = torch.ones_like(data["x"])
        mask[:, 0] = 0
        data |= {k: {"input_ids": data[k], "attention_mask": mask[: len(data[k])]} for k in ("x", "x_test")}
    precision = "float32" if masked else "bfloat16"
    more = {"validation": 0, "lora_dropout": 0.2, "base_precision": precision, "accumulate": 2, "engine": engine}
    plain, again = (
        Run(data=data, **options(base, "sfl", gradient_checkpointing=sides, **more)) for sides in ("none", "both")
    )
    assert [step.loss for step in plain] == [step.loss for step in again]
    assert plain.training.parts.method == ("tape" if masked else "hooks")
    for k in range(2):
        assert_close(plain.training.clients.model_state(k), again.training.clients.model_state(k), atol=0)
    assert_close(plain.training.server.state()["model"], again.training.server.state()["model"], atol=0)


def exported_ranks(base: str, folder: Path, whole: nn.Module) -> set[tuple[int, int]]:
    """The ranks of exported adapters, by layer. Checks that peft computes the same as `whole` with them."""
    tuned = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM.from_pretrained(base), folder)
    x, double = rows(2)["x"], next(whole.parameters()).dtype == torch.float64
    logits = (tuned.double() if double else tuned)(input_ids=x).logits
    assert torch.allclose(logits, whole(input_ids=x).logits, rtol=0, atol=1e-6)
    sizes = {name: len(p) for name, p in tuned.named_parameters() if "lora_A" in name}
    return {(int(name.partition("layers.")[2][0]), rank) for name, rank in sizes.items()}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads this attribute
def test_ranks_per_client(base: str, tmp_path: Path) -> None:
    """Adapters of a transformer: the bytes and the exported adapter of each client have the client's rank."""
    data, more = rows(12), {"validation": 0, "averaging": "products", "lora_rank": 0, "precision": "float64"}
    run = Run(data=data, **options(base, "sfl", lora_ranks=(1, 3), **more))
    assert all(step.loss for step in run)
    # Queries (8 to 8) and values (8 to 4) of one block, in float64, in two rounds.
    each = [2 * 8 * rank * (8 + 8 + 8 + 4) for rank in (1, 3)]
    assert run.training.ledger.of_clients("up", "models").tolist() == each
    for k, rank in enumerate((1, 3)):
        state = run.training.clients.model_state(k)
        name = "model.layers.0.self_attn.q_proj.lora_{}.default.weight"
        product = state[name.format("B")] @ state[name.format("A")]
        assert torch.linalg.matrix_rank(product.double(), atol=1e-7) == rank
        export(run.trained(), k, "peft", tmp_path / str(k))
        assert exported_ranks(base, tmp_path / str(k), run.model(k)) == {(0, rank), (1, 3)}
    average, products = run.trained().state("average"), []
    for k in range(2):
        state = run.training.clients.model_state(k)
        products.append(state[name.format("B")] @ state[name.format("A")])
    u, s, vh = torch.linalg.svd((products[0] + products[1]) / 2, full_matrices=False)
    assert torch.allclose(average[name.format("B")] @ average[name.format("A")], u[:, :3] * s[:3] @ vh[:3], atol=1e-12)
    with pytest.raises(ConfigError, match="lora_rank = 2 has no effect beside lora_ranks"):
        Run(data=data, **options(base, "sfl", lora_ranks=(1, 3), averaging="products"))
    with pytest.raises(ConfigError, match="give ranks of 1 or more"):
        Run(data=data, **options(base, "sfl", lora_ranks=(0, 3), **more))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads this attribute
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.long
def test_ranks_on_other_machines(base: str, tmp_path: Path, masked: bool) -> None:
    """Equal to a simulation with either engine. Exported adapters have the client's rank and work in peft.

    With a mask, the model is cut by another method.
    """
    data: dict[str, Any] = rows(12)
    if masked:
        data |= {k: {"input_ids": data[k], "attention_mask": torch.ones_like(data[k])} for k in ("x", "x_test")}
    given = options(base, "sfl", lora_rank=0, lora_ranks=(3, 1), averaging="products", validation=0)
    given |= {"precision": "float64", "share_server_model": True}
    local, stacked = (Run(data=data, out=tmp_path / e, **{**given, "engine": e}) for e in ("local", "stacked"))
    losses = [step.loss for step in local]
    assert [step.loss for step in stacked] == pytest.approx(losses, rel=1e-10)
    remote = in_memory(RunConfig.of(given), data=data, folder=tmp_path)
    assert [step.loss for step in remote.run] == pytest.approx(losses, rel=1e-10)
    share(remote.run, remote.cohort)
    assert (stacked.training.engine, local.training.parts.method) == ("stacked", "tape" if masked else "hooks")
    for k, rank in enumerate((3, 1)):
        theirs = local.training.clients.model_state(k)
        assert_close(filled(remote.model(k), theirs), theirs, atol=1e-10)
        for place in (tmp_path / "local", tmp_path / f"client-{k}"):
            trained = find_trained(place)
            export(trained, k, "peft", tmp_path / f"peft-{k}")
            assert exported_ranks(base, tmp_path / f"peft-{k}", trained.model(k)) == {(0, rank), (1, 3)}


@pytest.mark.parametrize("accumulate", [2, pytest.param(3, marks=pytest.mark.long)])
def test_gradients_of_adapters_accumulate_on_every_engine(base: str, accumulate: int) -> None:
    data, more = rows(12), {"validation": 0, "accumulate": accumulate, "client_optimizer": "adam"}
    local, stacked = (Run(data=data, **options(base, "sfl", engine=e, **more)) for e in ("local", "stacked"))
    losses = [step.loss for step in local]
    assert [step.loss for step in stacked] == pytest.approx(losses, abs=1e-5)
    for k in range(2):
        assert_close(stacked.training.clients.model_state(k), local.training.clients.model_state(k))
    remote = in_memory(RunConfig.of(options(base, "sfl", **more)), data=data)
    assert [step.loss for step in remote.run] == losses
    once = Run(data=data, **options(base, "sfl", validation=0, client_optimizer="adam"))
    assert [step.loss for step in once] != losses


@pytest.mark.parametrize("algorithm", [a if a == "sfl" else pytest.param(a, marks=pytest.mark.long) for a in EVERY])
def test_engines_and_clients_of_a_deployment_agree(base: str, algorithm: str) -> None:
    """The stacked engine agrees up to rounding and the deployment bit for bit. The base does not change."""
    data, more = rows(10), {"validation": 0}
    local = Run(data=data, **options(base, algorithm, **more))
    losses = [step.loss for step in local]
    parts = [local.training.clients.model_state(k) for k in range(2)]
    if algorithm != "ssl":
        stacked = Run(data=data, **options(base, algorithm, engine="stacked", **more))
        assert [step.loss for step in stacked] == pytest.approx(losses, abs=1e-5)
        for k, part in enumerate(parts):
            assert_close(stacked.training.clients.model_state(k), part)
    remote = in_memory(RunConfig.of(options(base, algorithm, **more)), data=data)
    assert [step.loss for step in remote.run] == losses
    for k, part in enumerate(parts):
        assert_close(remote.model(k), part, atol=0)
    servers = [run.training.server.state()["model"] for run in (local, remote.run)]
    assert_close(*servers, atol=0)
    whole = transformers.LlamaForCausalLM.from_pretrained(base).state_dict()
    held = {**parts[0], **servers[0]}
    assert any((t != 0).any() for n, t in held.items() if "lora_B" in n)
    kept = {n.replace(".base_layer", ""): t for n, t in held.items() if "lora" not in n}
    assert_close(kept, {n: whole[n] for n in kept}, atol=0)
    assert remote.run.training.ledger.table() == local.training.ledger.table()


@pytest.mark.parametrize("algorithm", [a if a == "psl" else pytest.param(a, marks=pytest.mark.long) for a in CUT])
def test_codecs_do_the_same_in_a_deployment(base: str, algorithm: str) -> None:
    """With int8 up and top-k down, the deployment equals the simulation bit for bit, with the same bytes.

    The codecs change the losses and reduce the bytes.
    """
    data, more = rows(10), {"validation": 0, "up_codec": "int8", "down_codec": "top-k:0.2"}
    local = Run(data=data, **options(base, algorithm, **more))
    steps = list(local)
    losses = [step.loss for step in steps]
    remote = in_memory(RunConfig.of(options(base, algorithm, **more)), data=data)
    assert [step.loss for step in remote.run] == losses
    for k in range(2):
        assert_close(remote.model(k), local.training.clients.model_state(k), atol=0)
    assert_close(remote.run.training.server.state()["model"], local.training.server.state()["model"], atol=0)
    assert remote.run.training.ledger.table() == local.training.ledger.table()
    plain = list(Run(data=data, **options(base, algorithm, validation=0)))
    assert [step.loss for step in plain] != losses
    assert steps[-1].bytes_up < plain[-1].bytes_up
    assert steps[-1].bytes_down < plain[-1].bytes_down


@pytest.mark.long
def test_two_ranks_are_one(base: str, tmp_path: Path) -> None:
    """Two processes share the clients and each have the base. The results are those of one process."""
    made = rows(40)
    np.savez(tmp_path / "tokens.npz", **made)  # type: ignore[arg-type]
    more = {"data": str(tmp_path / "tokens.npz"), "partition": "iid", "precision": "float32", "validation": 0}
    cases = [options(base, algorithm, clients=5, **more) for algorithm in ("psl", "sfl", "sglr", "fl", "usfl")]
    for alone, both in zip(map(trained, cases), together(2, cases, tmp_path), strict=True):
        assert sum(both.sent) > 0
        assert difference(alone, both) < 1e-5


def assert_close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], atol: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=atol), name


@pytest.mark.parametrize(
    ("algorithm", "engine"),
    [
        ("psl", "local"),
        ("upsl", "stacked"),
        *(pytest.param(*p, marks=pytest.mark.long) for p in (("psl", "stacked"), ("upsl", "local"), ("fl", "local"))),
    ],
)
def test_all_clients_share_one_base(base: str, tmp_path: Path, algorithm: str, engine: str) -> None:
    """All clients share the storage of the base, in training and in the stored run."""
    run = Run(data=rows(20), out=tmp_path / "run", validation=0, **options(base, algorithm, clients=8, engine=engine))
    cohort = innermost(run)
    modules = [c.module for c in cohort._clients] if engine == "local" else [cohort._stack.module]
    places = [
        {n: p.untyped_storage().data_ptr() for n, p in module.named_parameters() if not p.requires_grad}
        for module in modules
    ]
    assert len(places) == (8 if engine == "local" else 1)
    assert all(place == places[0] for place in places)
    run.run()
    if engine == "stacked":  # stacked adapters of all clients, and one base
        stacked = {name: t.shape[0] for name, t in cohort._stack._moving().items()}
        assert set(stacked.values()) == {8}
        assert all("lora" in name for name in stacked)
    for kept in (run.trained(), find_trained(tmp_path / "run")):
        frozen = [{n: t.data_ptr() for n, t in state.items() if "lora" not in n} for state in kept.clients.values()]
        assert all(one == frozen[0] for one in frozen)
        assert_close(kept.state(3), run.trained().state(3), atol=0)


def test_a_base_in_bfloat16_computes_as_its_rounded_weights_would(base: str, tmp_path: Path) -> None:
    """Losses and adapters are those of a float32 base with rounded weights, with both engines."""
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    model.save_pretrained(tmp_path / "rounded")
    data, more = rows(10), {"validation": 0, "client_lr": 0.5}
    found = {}
    for name, place, half, engine in (
        ("rounded", str(tmp_path / "rounded"), "float32", "local"),
        ("half", base, "bfloat16", "local"),
        ("stacked", base, "bfloat16", "stacked"),
    ):
        run = Run(data=data, **options(place, "sfl", base_precision=half, engine=engine, **more))
        begun = {n: t.clone() for n, t in run.training.clients.model_state(0).items() if "lora_A" in n}
        losses = [step.loss for step in run]
        state = {**run.training.clients.model_state(0), **run.training.server.state()["model"]}
        found[name] = (begun, losses, state, run)
    for name in ("half", "stacked"):
        begun, losses, state, run = found[name]
        assert losses == pytest.approx(found["rounded"][1], abs=2e-3)  # adapters have rounded initial values
        frozen = {n: p for part in run.training.parts.all for n, p in part.named_parameters() if not p.requires_grad}
        kept = {n for n, p in frozen.items() if p.dtype == torch.bfloat16}
        assert kept == {n for n in frozen if "norm" not in n}
        assert all(t.dtype == torch.float32 for n, t in state.items() if "lora" in n)
    assert found["half"][3].training.flops == found["rounded"][3].training.flops
    assert found["half"][1] == pytest.approx(found["stacked"][1], abs=1e-5)
    trained = found["half"][3].model("average")
    x = data["x_test"]
    assert trained(x).logits.dtype == torch.float32
    assert any(m.weight.dtype == torch.bfloat16 for m in trained.modules() if isinstance(m, nn.Linear))
