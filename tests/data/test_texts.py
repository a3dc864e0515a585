"""Text: rows and targets from documents, answers and conversations, and the owners of rows."""

import dataclasses
import json
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlayer import Run
from cutlayer.data import Source, from_memory, load, load_whole
from cutlayer.data.formats._sequences import IGNORED, packed, padded
from cutlayer.data.formats._tokenizer import Tokenized
from cutlayer.errors import ConfigError, CutlayerError, DataError

transformers = pytest.importorskip("transformers", reason="needs cutlayer[lm]")
datasets = pytest.importorskip("datasets", reason="needs cutlayer[datasets]")

WORDS = [
    "<pad>",
    "<end>",
    "<user>",
    "<assistant>",
    *ascii_lowercase,
    "user",
    "assistant",
    ":",
    "user:",
    "assistant:",
    "?",
]
CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% if m.role == 'assistant' %}<end> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPLIT: dict[str, Any] = {"validation": 0, "test": 1}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer with one token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    own = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token="<pad>", eos_token="<end>", unk_token="?",
        additional_special_tokens=["<user>", "<assistant>"],
    )  # fmt: skip
    place = tmp_path_factory.mktemp("words")
    made.save_pretrained(place)
    made.chat_template = CHAT
    made.save_pretrained(place / "chat")
    return str(place)


def said(ids: Any) -> str:
    """The words of tokens, with dots for tokens that are not learnt."""
    return " ".join("." if i == IGNORED else WORDS[i] for i in torch.as_tensor(ids).flatten().tolist())


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def whole(data: str, tokenizer: str, **options: Any) -> Source:
    return load_whole(data, targets="classes", tokenizer=tokenizer, **options)


def test_a_text_is_packed_and_targets_follow(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a b c d\n\ne f g")
    found = whole(str(tmp_path / "one.txt"), tokenizer, sequence_length=3)
    assert [said(row) for row in found.train.x] == ["a b c", "d e f", "g <end> <pad>"]
    assert [said(row) for row in found.train.y] == ["b c d", "e f g", "<end> . ."]
    assert "3 sequences" in found.account
    assert "8 tokens, 11% of the places filled up" in found.account


def test_documents_of_a_text(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a b\nc\n\n \nd\n")
    rows = {
        unit: [said(row) for row in whole(str(tmp_path / "one.txt"), tokenizer, sequence_length=4, packing="padded",
                                          documents=unit).train.x]
        for unit in ("file", "paragraph", "line")
    }  # fmt: skip
    assert rows["file"] == ["a b c d"]
    assert rows["paragraph"] == ["a b c <end>", "d <end> <pad> <pad>"]
    assert rows["line"] == ["a b <end> <pad>", "c <end> <pad> <pad>", "d <end> <pad> <pad>"]


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_are_filled_up_on_either_side(tokenizer: str, tmp_path: Path, side: str) -> None:
    """With padding on the left, the model needs a mask. On the right, no token attends to padding."""
    data = lines(tmp_path / "t.jsonl", [{"text": "a b c"}, {"text": "d e f g h"}])
    found = whole(data, tokenizer, sequence_length=4, packing="padded", padding_side=side).train
    if side == "right":
        assert [said(row) for row in found.x] == ["a b c <end>", "d e f g", "h <end> <pad> <pad>"]
        assert [said(row) for row in found.y] == ["b c <end> .", "e f g h", "<end> . . ."]
    else:
        assert isinstance(found.inputs, dict)
        assert [said(row) for row in found.inputs["input_ids"]] == ["a b c <end>", "d e f g", "<pad> <pad> h <end>"]
        assert found.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]]
        assert [said(row) for row in found.y] == ["b c <end> .", "e f g h", ". . <end> ."]


def test_only_completions_are_learnt(tokenizer: str, tmp_path: Path) -> None:
    data = lines(
        tmp_path / "t.jsonl", [{"prompt": "a b ", "completion": "c d"}, {"prompt": "a b c d e ", "completion": "f"}]
    )
    found = whole(data, tokenizer, sequence_length=5)
    assert [said(row) for row in found.train.x] == ["a b c d <end>", "a b c d e"]
    assert [said(row) for row in found.train.y] == [". c d <end> .", ". . . . f"]
    assert "cut off 1 texts after 5 tokens" in found.account
    everything = whole(data, tokenizer, sequence_length=5, loss_on="all", packing="padded")
    assert said(everything.train.y[0]) == "b c d <end> ."
    short = whole(data, tokenizer, sequence_length=3)
    assert len(short.train) == 1
    assert "left out 1 texts without a token to learn" in short.account


def test_only_answers_of_conversations_are_learnt(tokenizer: str, tmp_path: Path) -> None:
    talk = [
        {"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"},
        {"role": "assistant", "content": "e f"},
    ]  # fmt: skip
    data = lines(tmp_path / "t.jsonl", [{"messages": talk}])
    found = whole(data, f"{tokenizer}/chat", sequence_length=12).train
    assert said(found.x) == "<user> a b <assistant> c <end> <user> d <assistant> e f <end>"
    assert said(found.y) == ". . . c <end> . . . e f <end> ."
    plain = whole(data, tokenizer, sequence_length=16).train  # without a template
    answers = [word for word in said(plain.y).split() if word != "."]
    assert answers == ["c", "e", "f", "<end>"]


def test_one_file_for_each_client(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for name, text in (("anna", "a b c d e f g"), ("ben", "x y z x y z")):
        (tmp_path / "train" / f"{name}.txt").write_text(text)
    (tmp_path / "test.txt").write_text("i j k l")
    found = load(str(tmp_path), targets="classes", tokenizer=tokenizer, sequence_length=3, validation=0, seed=0)
    assert found.owner_names == ("anna", "ben")
    assert found.client_column is not None
    own = {"anna": {*"abcdefg"}, "ben": {*"xyz"}}
    for x, who in zip(found.train.x, found.client_column.tolist(), strict=True):  # no row has another client's text
        assert set(said(x).split()) <= own[found.owner_names[who]] | {"<end>", "<pad>"}
    assert said(found.test.x[0]) == "i j k"


def test_tables_of_text_from_files_and_memory(tokenizer: str, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"id": [1, 2], "text": ["a b", "c d e"], "who": ["x", "y"]})
    rows.to_parquet(str(tmp_path / "t.parquet"))
    rows.save_to_disk(str(tmp_path / "stored"))
    options: dict[str, Any] = {"targets": "classes", "tokenizer": tokenizer, "sequence_length": 2, "seed": 0, **SPLIT}
    options |= {"data_format": "text", "client_column": "who"}
    found = [load(str(tmp_path / name), **options) for name in ("t.parquet", "stored")]
    found.append(from_memory(rows, **options))
    for one in found:
        assert torch.equal(one.train.x, found[0].train.x)
        assert one.owner_names == ("x", "y")
    del options["client_column"]
    apart = from_memory({"x": rows.select([0]), "y": rows.select([1])}, **options)
    assert torch.equal(apart.train.x, found[0].train.x)
    assert apart.owner_names == ("x", "y")


def test_rows_with_a_label(tokenizer: str, tmp_path: Path) -> None:
    data = lines(tmp_path / "t.jsonl", [{"text": "a b c d", "label": "no"}, {"text": "e", "label": "yes"}] * 3)
    found = load(data, tokenizer=tokenizer, sequence_length=3, validation=0, seed=0)
    assert found.class_names == ("no", "yes")
    assert isinstance(found.train.inputs, dict)
    for ids, mask, y in zip(*found.train.inputs.values(), found.train.y, strict=True):
        assert said(ids) == ("a b c", "e <pad> <pad>")[int(y)]
        assert mask.tolist() == ([1, 1, 1], [1, 0, 0])[int(y)]


documents_of_tokens = st.lists(
    st.lists(st.tuples(st.integers(5, 40), st.booleans()), min_size=1, max_size=12), min_size=1, max_size=5
)


@settings(deadline=None)
@given(documents_of_tokens, st.integers(2, 7), st.booleans())
def test_every_token_that_is_learnt_is_a_target_once(
    found: list[list[tuple[int, bool]]], length: int, left: bool
) -> None:
    documents = [Tokenized([i for i, _ in d], [x for _, x in d]) for d in found]
    stream = [pair for d in found for pair in d]
    rows = packed(documents, length, 0)
    assert rows.targets[rows.targets != IGNORED].tolist() == [i for i, x in stream[1:] if x]
    apart = padded(documents, length, 0, left=left)
    assert apart.targets[apart.targets != IGNORED].tolist() == [i for d in found for i, x in d[1:] if x]
    for made in (rows, apart):
        assert made.ids.shape == made.targets.shape == made.mask.shape
        inner = made.targets[:, :-1] != IGNORED
        assert (made.targets[:, :-1][inner] == made.ids[:, 1:][inner]).all() or made is rows
        assert (made.targets[made.mask == 0] == IGNORED).all()
    assert all(set(row[row != 0]) <= set(documents[d].ids) for row, d in zip(apart.ids, apart.document, strict=True))


def test_a_run_on_text(tokenizer: str, tmp_path: Path) -> None:
    """The tokenizer is taken from the model's folder. Rows from memory give the same results."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=2,
        max_position_embeddings=8, pad_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    place = tmp_path / "model"
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(place)
    transformers.LlamaForCausalLM(config).save_pretrained(place)
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS[4:30], 9)) for _ in range(20)]
    data = lines(tmp_path / "t.jsonl", [{"text": text, "who": str(i % 2)} for i, text in enumerate(texts)])
    common: dict[str, Any] = {
        "model": f"hf:{place}", "task": "tokens", "algorithm": "psl", "cut": "1", "clients": 2, "rounds": 2, "batch": 2,
        "partition": "column", "client_column": "who", "sequence_length": 8, "engine": "local", "validation": 0,
    }  # fmt: skip
    scores = [Run(data=data, **common).run().test["perplexity"]]
    scores.append(Run(data=datasets.Dataset.from_json(data), data_format="text", **common).run().test["perplexity"])
    assert scores[0] == scores[1]
    for options, says in (
        ({"sequence_length": 9}, "sequence_length = 9 is more than the 8 tokens that the model can process"),
        ({"next_token": True}, "the targets of text already are the tokens that follow"),
    ):
        with pytest.raises(ConfigError, match=says):
            Run(data=data, **common | options).run()


def test_padding_of_a_classifier_is_that_of_the_tokenizer(tokenizer: str, tmp_path: Path) -> None:
    from cutlayer.checks import check_text
    from cutlayer.tasks.classification import Classification

    data = lines(tmp_path / "t.jsonl", [{"text": "a b", "label": "no"}, {"text": "e", "label": "yes"}] * 3)
    found = load(data, tokenizer=tokenizer, sequence_length=3, validation=0, seed=0)
    model = torch.nn.Linear(1, 1)
    model.config = dataclasses.make_dataclass("C", [("pad_token_id", int)])(0)  # type: ignore[assignment]
    check_text(model, found, Classification())
    model.config.pad_token_id = 1  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="takes token 1 for padding, but the tokenizer takes token 0"):
        check_text(model, found, Classification())


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        ("", {}, "no rows|no text|columns"),
        ("{", {}, "line 1 of .*t.jsonl is not JSON"),
        ("[1]", {}, "line 1 of .*t.jsonl is a list"),
        ('{"words": "a"}', {}, "has the columns words, and none of them"),
        ('{"text": 1}', {}, "'text' of .* has a int in row 0"),
        ('{"text": "a"}\n{"words": "a"}', {}, "'text' of .* is empty in row 1"),
        ('{"messages": "a"}', {}, "row 0 .* holds no messages"),
        ('{"messages": [{"role": "user"}]}', {}, "row 0 .* holds no messages"),
        ('{"text": "a b"}', {"loss_on": "answers"}, "loss_on = 'answers' needs prompts with completions"),
        ('{"text": "a b"}', {"text_column": "words"}, "'words'"),
        ('{"text": "a b"}', {"text_column": "a", "messages_column": "b"}, "either text or messages"),
        ('{"text": "a b"}', {"label_column": "words"}, "label_column = 'words' has no effect on text whose tokens"),
        ('{"text": "a b"}', {"client_column": "who"}, "'who'"),
        ('{"text": "a b"}', {"packing": "packed", "padding_side": "left"}, "padding_side = 'left' has no effect"),
        ('{"text": "a b"}', {"targets": "class"}, "'label'"),
        ('{"text": "a b", "label": 1}', {"targets": "class", "packing": "packed"}, "packing = 'packed' leaves a row"),
        ('{"text": "a b"}', {"tokenizer": "/nowhere"}, "there is no tokenizer in '/nowhere'"),
        ('{"text": "a b"}', {"tokenizer": None}, "text needs a tokenizer"),
    ],
)  # fmt: skip
def test_what_is_wrong(tokenizer: str, tmp_path: Path, rows: str, options: dict[str, Any], says: str) -> None:
    (tmp_path / "t.jsonl").write_text(rows)
    given_: dict[str, Any] = {"targets": "classes", "tokenizer": tokenizer, "seed": 0, **SPLIT} | options
    given_ = {name: value for name, value in given_.items() if value is not None}
    with pytest.raises(CutlayerError, match=says) as error:
        load(str(tmp_path / "t.jsonl"), **given_)
    assert "\n" not in str(error.value)


def test_texts_that_are_none(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a \xff")
    with pytest.raises(DataError, match="is not text in UTF-8"):
        whole(str(tmp_path / "a.txt"), tokenizer)
    (tmp_path / "a.txt").write_text("a b")
    with pytest.raises(DataError, match="has no labels: choose --task tokens"):
        load(str(tmp_path / "a.txt"), tokenizer=tokenizer)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        whole(str(tmp_path / "a.txt"), str(broken))
    with pytest.raises(ConfigError, match="data_format = 'text' has no effect on a tuple"):
        from_memory((torch.ones(2, 2), torch.ones(2)), data_format="text", tokenizer=tokenizer)
