"""Models from Hugging Face folders (`hf:PATH`): cuts, and adapters on a base that does not change."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cutlayer import Run, plugins
from cutlayer.errors import ConfigError, CutError, CutlayerWarning
from cutlayer.exporting import export
from cutlayer.models import build, cut
from cutlayer.models.blocks import blocks_of
from cutlayer.trained import find_trained

transformers = pytest.importorskip("transformers", reason="needs cutlayer[lm]")
pytest.importorskip("peft", reason="needs cutlayer[lm]")

VOCABULARY, LENGTH = 64, 10
_COMMON = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
_COMMON |= {"num_hidden_layers": 2, "max_position_embeddings": 32, "pad_token_id": 0}
_KEYS = {"num_key_value_heads": 2, "tie_word_embeddings": False}
_GPT2 = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, "pad_token_id": 0}
_GPT2 |= {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _COMMON | _KEYS),
    "qwen": ("Qwen2Config", "Qwen2ForCausalLM", _COMMON | _KEYS),
    "mistral": ("MistralConfig", "MistralForCausalLM", _COMMON | _KEYS),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2),
    "bert": ("BertConfig", "BertForSequenceClassification", _COMMON | {"num_labels": 3}),
    "tied": ("LlamaConfig", "LlamaForCausalLM", _COMMON | _KEYS | {"tie_word_embeddings": True}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    transformers.utils.logging.disable_progress_bar()
    for name, (config, model, options) in FAMILIES.items():
        torch.manual_seed(0)
        getattr(transformers, model)(getattr(transformers, config)(**options)).save_pretrained(root / name)
    return {name: root / name for name in FAMILIES}


def batch(side: str, rows: int = 6) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if side != "none":
        mask[1:3, (slice(6, None) if side == "right" else slice(4))] = 0
    return {"input_ids": torch.where(mask > 0, ids, 0), "attention_mask": mask}


def trained_on(rows: int = 15, name: str = "llama") -> tuple[dict[str, Tensor], Tensor]:
    inputs = batch("right", rows)
    return inputs, inputs["input_ids"][:, 0] % 3 if name == "bert" else inputs["input_ids"].roll(-1, 1)


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "tied"])
def test_the_parts_are_the_model_with_padding_on_either_side(folders: dict[str, Path], name: str) -> None:
    """Logits and the gradients of all adapters, in training with dropout and in evaluation."""
    options = {"lora_rank": 2, "lora_dropout": 0.2, "lora_targets": ("all-linear",)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(f"hf:{folders[name]}", (LENGTH,), 3, at=("1",), **options)
        for p in adapters(model).values():  # LoRA's second factor is initialised with zeros
            nn.init.normal_(p, std=0.3)
        parts = cut(model, "1", batch("none"))
    held = {n: p for part in parts.all for n, p in part.named_parameters()}
    for training in (True, False):
        for part in (model, *parts.all):
            part.train(training)
        for side in ("none", "left", "right"):
            x = batch(side)
            with torch.random.fork_rng():
                torch.manual_seed(3)
                whole = model(**x).logits
                torch.manual_seed(3)
                apart = parts.server(parts.client(x))
            counts = x["attention_mask"].bool() if whole.dim() == 3 else torch.ones(len(whole), dtype=torch.bool)
            assert torch.allclose(whole[counts], apart[counts], atol=1e-5), (training, side)
            names = list(adapters(model))
            wanted = torch.autograd.grad(whole[counts].square().sum(), [adapters(model)[n] for n in names])
            found = torch.autograd.grad(apart[counts].square().sum(), [held[n] for n in names])
            for a, b in zip(wanted, found, strict=True):
                assert torch.allclose(a, b, atol=1e-4, rtol=1e-4), (training, side)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_base_in_bfloat16_is_near_the_one_in_float32(folders: dict[str, Path], name: str) -> None:
    """Covers GPT-2, with transposed weights, and BERT, with a trained head and embeddings of more than words."""
    x, logits = batch("right"), []
    for precision in ("float32", "bfloat16"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = build(f"hf:{folders[name]}", (LENGTH,), 3, at=("1",), lora_rank=2, base_precision=precision)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            for p in adapters(model).values():
                nn.init.normal_(p, std=0.3)
        parts = cut(model, "1", x)
        for part in parts.all:
            part.eval()  # without dropout
        logits.append(parts.server(parts.client(x)))
        logits[-1].square().sum().backward()
        assert all(p.grad is not None for p in adapters(parts.client).values())
    halves = {n for n, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in halves} >= {"wte" if name == "gpt2" else "word_embeddings"}
    assert logits[1].dtype == torch.float32
    assert torch.allclose(*logits, atol=0.05)
    assert not torch.equal(*logits)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_engines_agree_and_only_adapters_move(folders: dict[str, Path], name: str) -> None:
    base = build(f"hf:{folders[name]}", (LENGTH,), 3)
    task = "classification" if name == "bert" else "tokens"
    states, moved = [], []
    for engine in ("local", "stacked"):
        run = Run(
            model=f"hf:{folders[name]}", data=trained_on(name=name), task=task, algorithm="sfl", cut="1", lora_rank=2,
            clients=3, rounds=2, batch=2, client_lr=0.01, client_optimizer="sgd", engine=engine,
        )  # fmt: skip
        done = run.run()
        states.append(run.model("average").state_dict())
        moved.append(next(m["paper"] for m in done.bytes if m["kind"] == "models" and m["direction"] == "up"))
    assert all(torch.allclose(states[0][n], states[1][n], atol=1e-6) for n in states[0])
    trained = build(f"hf:{folders[name]}", (LENGTH,), 3, at=("1",), lora_rank=2)
    block = blocks_of(trained)[0]
    size = sum(p.nbytes for n, p in adapters(trained).items() if n.startswith(f"{block}."))
    assert moved == [3 * 2 * size] * 2  # three clients, two averagings, only the adapters of the first block
    for weight, value in base.state_dict().items():
        place, _, leaf = weight.rpartition(".")
        kept = states[0].get(f"{place}.base_layer.{leaf}", states[0].get(weight))
        if kept is not None and not place.startswith("classifier"):
            assert torch.equal(kept, value), weight


def test_one_client_takes_the_steps_of_the_whole_model(folders: dict[str, Path]) -> None:
    seen: list[Tensor] = []

    def stepped(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.transpose(1, 2), targets, reduction="none").mean(1)

    common: dict[str, Any] = {
        "model": f"hf:{folders['llama']}", "data": trained_on(), "task": "tokens", "clients": 1, "rounds": 3,
        "batch": 4, "client_lr": 0.05, "client_optimizer": "sgd", "lora_rank": 2, "engine": "local", "loss": stepped,
    }  # fmt: skip
    for algorithm in ("psl", "cl"):
        cuts = {"cut": "1"} if algorithm == "psl" else {}
        run = Run(algorithm=algorithm, **cuts, **common)
        run.run()
        seen.append(
            torch.cat([t.flatten() for n, t in run.model(0 if cuts else None).state_dict().items() if "lora" in n])
        )
    assert torch.allclose(*seen, atol=1e-6)
    assert seen[0].abs().sum() > 0


@pytest.mark.parametrize(("sides", "kept"), [("client", "layers.0"), ("server", "layers.1"), ("both", "layers.")])
def test_sides(folders: dict[str, Path], sides: str, kept: str) -> None:
    names = adapters(build(f"hf:{folders['llama']}", (LENGTH,), 3, at=("1",), lora_rank=2, lora_sides=sides))
    assert names
    assert all(kept in name for name in names)


def test_u_shape_of_tied_embeddings_keeps_text_and_labels(folders: dict[str, Path]) -> None:
    """The client has the embedding, the first block and the tied output."""
    inputs, y = trained_on()
    run = Run(
        model=f"hf:{folders['tied']}", data=(inputs["input_ids"], y), task="tokens", algorithm="upsl", cut="1",
        tail_cut="2", lora_rank=2, clients=2, rounds=1, batch=2, client_lr=0.01, client_optimizer="sgd",
        engine="local",
    )  # fmt: skip
    kinds = {m["kind"] for m in run.run().bytes}
    assert "labels" not in kinds
    assert "smashed data" in kinds


def test_a_cut_inside_a_tied_pair_is_refused(folders: dict[str, Path]) -> None:
    model = build(f"hf:{folders['tied']}", (LENGTH,), 3)
    with pytest.raises(CutError, match=r"'lm_head.weight' is used on both sides of the cut"):
        cut(model, "1", batch("none")["input_ids"])


def test_blocks_have_numbers(folders: dict[str, Path]) -> None:
    model = build(f"hf:{folders['gpt2']}", (LENGTH,), 3)
    x = batch("none")["input_ids"]
    by_number, by_name = cut(model, "1", x), cut(model, "transformer.h.0", x)
    assert list(by_number.client.state_dict()) == list(by_name.client.state_dict())
    with pytest.raises(CutError, match="the blocks 1 to 2"):
        cut(model, "3", x)
    with pytest.raises(CutError, match="unknown module '1'"):
        cut(nn.ModuleDict({"a": nn.Linear(2, 2)}), "1", torch.zeros(2, 2))


def test_a_folder_without_weights_starts_as_the_seed_says(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(folders["llama"] / "config.json", tmp_path)
    states = []
    for seed in (0, 0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            with pytest.warns(CutlayerWarning, match="has no weights"):
                model = build(f"hf:{tmp_path}", (LENGTH,), 3)
        states.append(model.state_dict()["lm_head.weight"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        (lambda p: shutil.rmtree(p), {}, "there is no folder"),
        (lambda p: (p / "config.json").unlink(), {}, "has no config.json"),
        (lambda p: (p / "config.json").write_text("{"), {}, "is not JSON"),
        (lambda p: (p / "config.json").write_text("[]"), {}, "names no model_type"),
        (lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"), {}, r"pickled weights only .*save_pretr"),
        (lambda p: (p / "model.safetensors").write_bytes(b"no"), {}, "cannot be read"),
        (lambda p: None, {"lora_rank": 2, "lora_targets": ("nothing",)}, "match no layer of the model: choose among"),
        (lambda p: None, {"lora_alpha": 2.0}, "lora_alpha = 2.0 has no effect without lora_rank"),
        (lambda p: None, {"base_precision": "bfloat16"}, "base_precision = 'bfloat16' has no effect without lora_rank"),
        (lambda p: None, {"lora_rank": 2, "lora_sides": "client"}, "no effect on a model that is not cut"),
    ],
)  # fmt: skip
def test_bad_folders_and_options(
    folders: dict[str, Path], tmp_path: Path, change: Any, options: dict[str, Any], says: str
) -> None:
    place = shutil.copytree(folders["llama"], tmp_path / "model")
    change(place)
    with pytest.raises(ConfigError, match=says) as error:
        build(f"hf:{place}", (LENGTH,), 3, **options)
    assert "\n" not in str(error.value)


def test_no_code_of_a_folder_is_run(folders: dict[str, Path], tmp_path: Path) -> None:
    place = shutil.copytree(folders["llama"], tmp_path / "model")
    config = json.loads((place / "config.json").read_text())
    config |= {"model_type": "unheard-of", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.M"}}
    (place / "config.json").write_text(json.dumps(config))
    (place / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        build(f"hf:{place}", (LENGTH,), 3)
    assert not (tmp_path / "ran").exists()


def test_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert plugins.absolute("hf:there") == f"hf:{tmp_path / 'there'}"
    assert plugins.registered_name("model", "hf:there") == "hf"
    assert plugins.known("model", "hf:there")
    assert not plugins.known("model", "mlp:there")
    with pytest.raises(ConfigError, match="needs a local folder"):
        plugins.load("model", "hf")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads this attribute
@pytest.mark.parametrize(
    "name", ["llama", "bert", *(pytest.param(n, marks=pytest.mark.long) for n in ("gpt2", "tied"))]
)
def test_an_exported_adapter_does_on_the_uncut_base_what_the_parts_did(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """The exported adapter is loaded by peft, which knows nothing of the cut."""
    from peft import PeftModel

    more: dict[str, Any] = {"untie": True} if name == "tied" else {}
    run = Run(
        model=f"hf:{folders[name]}", data=trained_on(name=name), task="classification" if name == "bert" else "tokens",
        algorithm="psl", cut="1", lora_rank=2, lora_targets=("all-linear",), clients=2, rounds=2, batch=2,
        client_lr=0.05, client_optimizer="sgd", out=tmp_path / "run", engine="local", **more,
    )  # fmt: skip
    run.run()
    adapter = tmp_path / "adapter"
    written = export(find_trained(tmp_path / "run"), 1, "peft", adapter)
    assert sorted(path.name for path in written) == sorted(path.name for path in adapter.iterdir())
    _, class_name, _ = FAMILIES[name]
    options = {"num_labels": 3} if name == "bert" else {}
    plain = getattr(transformers, class_name).from_pretrained(folders[name], **options).eval()
    x = batch("right")
    loaded = PeftModel.from_pretrained(plain, adapter).eval()
    counts = x["attention_mask"].bool() if name != "bert" else torch.ones(len(x["input_ids"]), dtype=torch.bool)
    with torch.no_grad():
        theirs, ours = loaded(**x).logits, run.model(1)(**x).logits
        assert torch.allclose(theirs[counts], ours[counts], atol=1e-6)
        with loaded.disable_adapter():
            assert not torch.allclose(loaded(**x).logits[counts], ours[counts], atol=1e-4)
    learnt = load_file(adapter / "adapter_model.safetensors")
    assert all("lora" in key or "classifier" in key for key in learnt)


def test_a_run_without_adapters_exports_none(folders: dict[str, Path], tmp_path: Path) -> None:
    run = Run(
        model=f"hf:{folders['llama']}", data=trained_on(), task="tokens", algorithm="cl", rounds=1, batch=2,
        out=tmp_path / "run",
    )  # fmt: skip
    run.run()
    with pytest.raises(ConfigError, match="the model has 0 adapters"):
        export(run.trained(), None, "peft", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
