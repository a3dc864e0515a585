"""Text: documents, conversations and answers, turned into tokens by the tokenizer of a model's folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import PrivateAttr

from cutlayer.data.formats import huggingface
from cutlayer.data.formats._sequences import Sequences, packed, padded, together
from cutlayer.data.formats._tokenizer import Document, Tokenizer
from cutlayer.data.formats.reader import Labelled, data_format
from cutlayer.data.several import numbered
from cutlayer.data.targets import Targets
from cutlayer.data.unsplit import SPLITS, Array, Raw, Section, part_called, pick
from cutlayer.errors import ConfigError, DataError
from cutlayer.plugins import option

_SUFFIXES = (".txt", ".jsonl")
_ORDER = ("train", "validation", "test")
_Columns = Mapping[str, Sequence[Any]]  # by name


@data_format(
    "text",
    title="Text",
    summary="a .txt or .jsonl file, or a folder with one of them per client; with data_format = text, also parquet and "
    "Hugging Face data with a column of texts or messages; needs cutlayer[lm]",
)
class Text(Labelled):
    """Rows of tokens [T]. The targets of the task `tokens` are the tokens that follow; a task with one label a row
    takes it from `label_column`.
    """

    tokenizer: str | None = option(None)
    """Folder of the tokenizer. Default: the model's folder (`--model hf:PATH`)."""
    sequence_length: int = option(128, ge=2)
    """Number of tokens in a row, T."""
    packing: Literal["auto", "packed", "padded"] = option("auto")
    """packed: join texts end to end and cut them into rows. padded: one text per row. auto: packed if all tokens are
    learnt and there are no labels."""
    padding_side: Literal["right", "left"] = option("right")
    """The side on which short rows are padded."""
    loss_on: Literal["auto", "all", "answers"] = option("auto")
    """What is learnt: all tokens, or only answers (completions and the assistant's messages). auto: answers, if there
    are any."""
    documents: Literal["file", "paragraph", "line"] = option("file")
    """What counts as a document in a .txt file. Paragraphs are separated by empty lines."""
    text_column: str | None = option(None)
    """The column with texts. Default: text, or else messages, or else prompt and completion."""
    messages_column: str | None = option(None)
    """The column with conversations: lists of messages, each with a role and a content."""
    prompt_column: str | None = option(None)
    """The column with prompts. Default: prompt."""
    completion_column: str | None = option(None)
    """The column with the completions of the prompts. Default: completion."""

    _targets: Targets = PrivateAttr("classes")
    _folder: str = PrivateAttr("")

    @classmethod
    def fits(cls, path: Path) -> bool:
        """A .txt or .jsonl file, or a folder with such files and no other data."""
        return path.suffix.lower() in _SUFFIXES if path.is_file() else bool(_files(path))

    def set_for(self, targets: Targets, folder: str) -> Self:
        """Labels are used if a row has one; the tokenizer is that of the model's folder if none is named."""
        copy = self.model_copy()
        copy._targets, copy._folder = targets, folder
        return copy

    def check(self, given: frozenset[str]) -> None:
        """Check for options that exclude each other. Raises ConfigError."""
        if "label_column" in given and self._targets == "classes":
            raise ConfigError(
                f"label_column = {self.label_column!r} has no effect on text whose tokens are learnt: choose --task "
                "classification, or leave it out"
            )
        if self._targets != "classes" and self.packing == "packed":
            raise ConfigError(
                "packing = 'packed' leaves a row without one label: leave it out, or choose --task tokens"
            )
        if self.padding_side == "left" and self.packing == "packed":
            raise ConfigError("padding_side = 'left' has no effect with packing = 'packed': leave it out")

    def read(self, path: Path) -> Raw:
        """Files, or a folder of them. Folders or files called train, validation and test are these parts; other files
        in a folder are those of one client each.
        """
        if path.suffix.lower() == ".parquet" or not (path.is_file() or _files(path)):
            return self.taken(huggingface.stored(path)[0], path.stem)
        tokenizer = self._tokenizer()
        parts: dict[str, list[Document]] = {}
        for file in [path] if path.is_file() else _files(path):
            part, owner = ("train", None) if path.is_file() else _place(file, path)
            parts.setdefault(part, []).extend(self._documents(file, owner, tokenizer))
        return self._raw(path.stem, parts, tokenizer)

    def taken(self, found: Any, name: str, owners: Array | None = None) -> Raw:
        """A local `datasets.Dataset` with such columns, or a dictionary of them by part."""
        tokenizer, parts = self._tokenizer(), {}
        for part, dataset in huggingface.splits_of(found, name).items():
            columns = {column: dataset[column][:] for column in dataset.column_names}
            parts[part] = list(self._from_columns(columns, len(dataset), f"the part {part!r} of {name}", tokenizer))
        if owners is not None:
            parts["train"] = [
                Document(d.text, d.answers, d.rendered, d.label, owner)
                for d, owner in zip(parts["train"], owners.tolist(), strict=True)
            ]
        raw = self._raw(name, parts, tokenizer)
        return dataclasses.replace(raw, cited=(*huggingface.cited(huggingface.splits_of(found, name)), *raw.cited))

    def _tokenizer(self) -> Tokenizer:
        self.check(frozenset({"label_column"} if self.label_column != "label" else ()))
        if not (folder := self.tokenizer or self._folder):
            raise ConfigError(
                "text needs a tokenizer: name its folder with tokenizer, or a model with one (model = hf:PATH)"
            )
        return Tokenizer(folder)

    def _documents(self, file: Path, owner: str | None, tokenizer: Tokenizer) -> list[Document]:
        """Those in a file; `owner` is its client, if it has one. Raises DataError."""
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not text in UTF-8 ({error.reason} at byte {error.start}): convert it") from None
        if file.suffix.lower() == ".jsonl":
            rows = _objects(text, file)
            names = list(dict.fromkeys(name for row in rows for name in row))
            columns = {name: [row.get(name) for row in rows] for name in names}
            found = list(self._from_columns(columns, len(rows), str(file), tokenizer))
            return [
                Document(d.text, d.answers, d.rendered, d.label, owner if d.owner is None else d.owner) for d in found
            ]
        if self._targets != "classes":
            raise DataError(f"{file} has no labels: choose --task tokens, or give .jsonl with the column label")
        pieces = {"file": [text], "paragraph": _paragraphs(text), "line": text.splitlines()}[self.documents]
        return [Document(piece, owner=owner) for piece in pieces if piece.strip()]

    def _from_columns(self, columns: _Columns, rows: int, where: str, tokenizer: Tokenizer) -> Iterator[Document]:
        """A document for each row. Raises DataError."""
        names = list(columns)
        kind = self._kind(names, where)
        client = self.owner_among(names, where)
        if self._targets != "classes":
            pick("label column", self.label_column, names, f"set label_column to a column of {where}")
        for i in range(rows):
            row = {name: values[i] for name, values in columns.items()}
            label = None if self._targets == "classes" else _given(row, self.label_column, i, where)
            owner = None if client is None else _given(row, client, i, where)
            yield self._document(kind, row, i, where, tokenizer, label, owner)

    def _document(
        self,
        kind: tuple[str, ...],
        row: Mapping[str, Any],
        i: int,
        where: str,
        tokenizer: Tokenizer,
        label: Any,
        owner: Any,
    ) -> Document:
        found = [_given(row, column, i, where) for column in kind[1:]]
        if kind[0] == "messages":
            made = tokenizer.rendered(_messages(found[0], i, where), f"row {i} (from 0) of {where}")
            return Document(made.text, made.answers, made.rendered, label, owner)
        for column, text in zip(kind[1:], found, strict=True):
            if not isinstance(text, str):
                raise DataError(
                    f"column {column!r} of {where} has a {type(text).__name__} in row {i} (from 0): give texts"
                )
        text = "".join(found)
        answers = None if kind[0] == "text" else ((len(found[0]), len(text)),)
        return Document(text, answers, label=label, owner=owner)

    def _kind(self, names: Sequence[str], where: str) -> tuple[str, ...]:
        """The kind of a row (text, messages or prompt), and its columns. Raises DataError."""
        ways = {
            "text": {"text_column": self.text_column or "text"},
            "messages": {"messages_column": self.messages_column or "messages"},
            "prompt": {
                "prompt_column": self.prompt_column or "prompt",
                "completion_column": self.completion_column or "completion",
            },
        }
        asked = [kind for kind, columns in ways.items() if any(getattr(self, name) for name in columns)]
        if len(asked) > 1:
            raise ConfigError(f"a row is either {' or '.join(asked)}: name the columns of one of them")
        for kind in asked or ways:
            if asked or all(column in names for column in ways[kind].values()):
                for name, column in ways[kind].items():
                    pick("column", column, names, f"set {name} to a column of {where}")
                return (kind, *ways[kind].values())
        raise DataError(
            f"{where} has the columns {', '.join(names)}, and none of them is known to contain texts: name it with "
            "text_column, messages_column, or prompt_column and completion_column"
        )

    def _raw(self, name: str, parts: Mapping[str, Sequence[Document]], tokenizer: Tokenizer) -> Raw:
        """The rows of the documents of each part. Raises DataError if there are none."""
        parts = {part: self._learnt(parts[part]) for part in _ORDER if part in parts}
        if "train" not in parts:
            raise DataError(f"{name} has the parts {', '.join(parts)}, but none to train on: add train")
        plain = all(d.answers is None for those in parts.values() for d in those)
        whole = self._targets != "classes" or not plain
        pack = self.packing == "packed" or (self.packing == "auto" and not whole and self.padding_side == "right")
        made = {part: self._sequences(those, tokenizer, pack, whole) for part, those in parts.items()}
        for part, rows in made.items():
            if not len(rows.ids):
                raise DataError(f"the part {part!r} of {name} has no text to learn from: add some, or remove the part")
        masked = self._targets != "classes" or self.padding_side == "left"
        sections, several = {}, {}
        for part, rows in made.items():
            x: Array = rows.ids
            if masked:
                x, several[part] = numbered({"input_ids": rows.ids, "attention_mask": rows.mask}, f"x of {part}")
            labels = [parts[part][i].label for i in rows.document.tolist()]
            sections[part] = Section(x, rows.targets if self._targets == "classes" else np.array(labels))
        owners = {part: _owners(those, made[part]) for part, those in parts.items()}
        return Raw(
            name,
            sections["train"],
            sections.get("validation"),
            sections.get("test"),
            client=owners["train"],
            validation_client=owners.get("validation"),
            test_client=owners.get("test"),
            rows="sequences",
            remarks=_remarks(made, self.sequence_length),
            recipe={"kind": "text", "padding": tokenizer.padding, "padded": not pack},
            several=several,
            cited=("transformers",),
        )

    def _learnt(self, documents: Sequence[Document]) -> Sequence[Document]:
        """The documents with the learnt parts of `loss_on`. Raises ConfigError."""
        if self._targets == "classes" and self.loss_on == "auto":
            return documents
        if self.loss_on == "answers" and any(d.answers is None for d in documents):
            raise ConfigError("loss_on = 'answers' needs prompts with completions, or messages: leave it out")
        if self.loss_on == "answers":
            return documents
        return [Document(d.text, None, d.rendered, d.label, d.owner) for d in documents]

    def _sequences(self, documents: Sequence[Document], tokenizer: Tokenizer, pack: bool, whole: bool) -> Sequences:
        learns = self._targets == "classes"
        tokens, length = tokenizer.tokens(documents, ended=learns), self.sequence_length
        if not pack:
            left = self.padding_side == "left"
            return padded(tokens, length, tokenizer.padding, left=left, whole=whole, every=not learns)
        groups: dict[Any, list[int]] = {}
        for i, document in enumerate(documents):
            groups.setdefault(document.owner, []).append(i)
        found = []
        for group in groups.values():
            rows = packed([tokens[i] for i in group], length, tokenizer.padding)
            found.append(Sequences(rows.ids, rows.targets, rows.mask, np.array(group)[rows.document]))
        return together(found)


def _files(path: Path) -> list[Path]:
    """The files of text in a folder and its parts; none if there are other data, too."""
    found = [f for f in sorted(path.rglob("*")) if f.is_file() and not f.name.startswith((".", "README", "LICENSE"))]
    texts = [file for file in found if file.suffix.lower() in _SUFFIXES]
    return texts if len(texts) == len(found) else []


def _place(file: Path, root: Path) -> tuple[str, str | None]:
    """The part that a file in a folder belongs to, and the client: train/anna.txt, anna.txt, test.txt."""
    folders = file.relative_to(root).parts[:-1]
    part = next((found for word in folders if (found := part_called(word))), None)
    own = SPLITS.get(file.stem.lower())
    return (own or part or "train", None if own else file.stem)


def _paragraphs(text: str) -> list[str]:
    return ["\n".join(part) for part in _blocks(text.splitlines())]


def _blocks(lines: Sequence[str]) -> Iterator[list[str]]:
    block: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            block.append(line)
        elif block:
            yield block
            block = []


def _objects(text: str, file: Path) -> list[Mapping[str, Any]]:
    found = list[Mapping[str, Any]]()
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a string may contain U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"line {number} of {file} is not JSON ({error}): write one object on each line") from None
        if not isinstance(row, dict):
            raise DataError(f"line {number} of {file} is a {type(row).__name__}: write one object on each line")
        found.append(row)
    return found


def _given(row: Mapping[str, Any], column: str, i: int, where: str) -> Any:
    if row[column] is None:
        raise DataError(f"column {column!r} of {where} is empty in row {i} (from 0): fill it in or remove the row")
    return row[column]


def _messages(found: Any, i: int, where: str) -> list[dict[str, str]]:
    """A conversation, checked. Raises DataError."""
    good = isinstance(found, list) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in found
    )
    if not good:
        raise DataError(
            f"row {i} (from 0) of {where} holds no messages: give a list of objects with a role and a content, both "
            "texts"
        )
    return [{"role": m["role"], "content": m["content"]} for m in found]


def _owners(documents: Sequence[Document], rows: Sequences) -> Array | None:
    owners = [documents[i].owner for i in rows.document.tolist()]
    return None if any(owner is None for owner in owners) else np.array(owners)


def _remarks(made: Mapping[str, Sequences], length: int) -> tuple[str, ...]:
    tokens = sum(int(rows.mask.sum()) for rows in made.values())
    cells = sum(rows.mask.size for rows in made.values())
    cut_off = sum(rows.cut_off for rows in made.values())
    empty = sum(rows.empty for rows in made.values())
    return tuple(
        filter(
            None,
            (
                f"{tokens} tokens" + (f", {1 - tokens / cells:.0%} of the places filled up" if tokens < cells else ""),
                f"cut off {cut_off} texts after {length} tokens" if cut_off else "",
                f"left out {empty} texts without a token to learn" if empty else "",
            ),
        )
    )
