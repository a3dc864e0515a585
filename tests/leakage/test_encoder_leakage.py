"""Labelled texts and a BERT-like classifier: from a file of texts to the tokens that a server recovers, by commands."""

import json
from pathlib import Path

import pytest
import torch
from support import call

transformers = pytest.importorskip("transformers", reason="needs cutlayer[lm]")
pytest.importorskip("peft", reason="needs cutlayer[lm]")
tokenizers = pytest.importorskip("tokenizers", reason="needs cutlayer[lm]")

WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "nu", "pe", "ri", "so", "tu") for b in ("n", "m", "t", "s")]


def text(row: int) -> str:
    """Three to nine words. The first words of the vocabulary are common."""
    generator = torch.Generator().manual_seed(row)
    length = int(torch.randint(3, 10, (1,), generator=generator))
    return " ".join(WORDS[int(k)] for k in torch.randint(0, len(WORDS), (2, length), generator=generator).amin(0))


def folder_of_model(place: Path) -> None:
    """A small BERT with weights, and a tokenizer for whole words."""
    known = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(place)
    config = transformers.BertConfig(
        vocab_size=len(known), hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2,
        max_position_embeddings=16, num_labels=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(place)


@pytest.mark.long
def test_words_of_labelled_texts_are_read_behind_an_encoder(tmp_path: Path) -> None:
    """After the embedding, all words are recovered; after a block, which mixes words, more than 90% are.

    A search token by token is not possible after the block. Padding is not counted.
    """
    folder_of_model(tmp_path / "bert")
    rows = [{"text": text(k), "label": "yes" if "kan" in text(k) else "no"} for k in range(240)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shares = {}
    for cut in ("bert.embeddings", "1"):
        out = str(tmp_path / f"run-{cut}")
        call(
            "run", "--model", f"hf:{tmp_path / 'bert'}", "--data", str(tmp_path / "texts.jsonl"), "--task",
            "classification", "--clients", "2", "--sequence-length", "12", "--algorithm", "psl", "--cut", cut,
            "--lora-rank", "2", "--epochs", "2", "--batch", "8", "--client-lr", "0.01", "--test", "100", "--out", out,
        )  # fmt: skip
        call("leakage", out, "--samples", "40", "--clients", "1", "--attacks", "nearest", "inversion", "search")
        (finding,) = json.loads(Path(out, "leakage.json").read_text(encoding="utf-8"))["findings"]
        found = {(r["attack"], r["knowledge"]): r for r in finding["recovered"]}
        searched = "what is sent for a token depends on later ones" not in finding["not_measured"].get("search", "")
        assert {attack for attack, _ in found} == {"nearest", "inversion", *(["search"] if searched else [])}
        assert searched == (cut == "bert.embeddings")
        shares[cut] = found
        for one in found.values():
            assert 3 * one["rows"] <= one["tokens"] <= 9 * one["rows"]
    first, later = shares["bert.embeddings"], shares["1"]
    for knowledge in ("model", "smashed"):
        assert first["nearest", knowledge]["accuracy"] == 1
        assert first["inversion", knowledge]["accuracy"] > 0.95
        assert later["nearest", knowledge]["accuracy"] > 0.9
        assert later["nearest", knowledge]["unigram"] < 0.1
