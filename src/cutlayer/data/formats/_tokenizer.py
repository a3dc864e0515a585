"""The tokenizer in a folder on this machine, by transformers. Nothing is downloaded; no code in the folder is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cutlayer.errors import DataError

Spans = tuple[tuple[int, int], ...]
"""Parts of a text, each from a character to another (exclusive)."""

_MARKS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")


@dataclass(frozen=True)
class Document:
    """A text. `answers` are the learnt parts (None: all of it). If it is `rendered` by a chat template, it has its
    marks already. `label` and `owner` are those of its row.
    """

    text: str
    answers: Spans | None = None
    rendered: bool = False
    label: Any = None
    owner: Any = None


class Tokenized(NamedTuple):
    """The tokens of a document, and which of them are learnt."""

    ids: list[int]
    learnt: list[bool]


class Tokenizer:
    """The tokenizer in `folder`. Raises DataError."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        path = Path(folder).expanduser()
        if not any((path / name).is_file() for name in _MARKS):
            raise DataError(
                f"there is no tokenizer in {folder!r}: save one there with tokenizer.save_pretrained, or name its "
                "folder with tokenizer"
            )
        transformers = _transformers()
        try:
            with _quiet(transformers):
                self._own = transformers.AutoTokenizer.from_pretrained(
                    path, local_files_only=True, trust_remote_code=False
                )
        except Exception as error:  # damaged files, unknown kinds, code that would need to run
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DataError(
                f"the tokenizer in {folder!r} cannot be read ({reason}): save it again with tokenizer.save_pretrained"
            ) from None
        if not self._own.is_fast:
            raise DataError(
                f"the tokenizer in {folder!r} does not give the positions of its tokens in a text: save it as a fast "
                "tokenizer, with a tokenizer.json"
            )

    @property
    def padding(self) -> int:
        """The token for padding rows: the padding token, or else the end token, or else 0."""
        found = self._own.pad_token_id
        return int(found if found is not None else self.end or 0)

    @property
    def end(self) -> int | None:
        """The token that ends a text, if there is one."""
        return None if self._own.eos_token_id is None else int(self._own.eos_token_id)

    def tokens(self, documents: Sequence[Document], *, ended: bool) -> list[Tokenized]:
        """The tokens of each document. The tokenizer's own marks are added unless a chat template has done so. With
        `ended`, the token that ends a text is added, and learnt.
        """
        found: list[Tokenized | None] = [None] * len(documents)
        for rendered in (False, True):
            at = [i for i, document in enumerate(documents) if document.rendered == rendered]
            if not at:
                continue
            made = self._own(
                [documents[i].text for i in at],
                add_special_tokens=not rendered,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,
            )
            for i, ids, places in zip(at, made["input_ids"], made["offset_mapping"], strict=True):
                found[i] = self._ended(_learnt(list(ids), places, documents[i].answers), ended and not rendered)
        return [tokens for tokens in found if tokens is not None]

    def _ended(self, tokens: Tokenized, ended: bool) -> Tokenized:
        if not ended or self.end is None or (tokens.ids and tokens.ids[-1] == self.end):
            return tokens
        return Tokenized([*tokens.ids, self.end], [*tokens.learnt, True])

    def rendered(self, messages: Sequence[Mapping[str, str]], where: str) -> Document:
        """A conversation as the tokenizer's chat template writes it. The assistant's messages are learnt. Without a
        template, each message is on its own lines. Raises DataError.
        """
        if self._own.chat_template is None:
            return _plain(messages)
        text, answers, before = "", list[tuple[int, int]](), ""
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._template(messages[:i], where, opened=True)
            text = self._template(messages[: i + 1], where)
            if message["role"] == "assistant":
                if not text.startswith(before):
                    raise DataError(
                        f"the chat template in {self.folder!r} does not write the answer of {where} behind what it "
                        "writes before an answer: use texts that are rendered already"
                    )
                answers.append((len(before), len(text)))
        return Document(text, tuple(answers), rendered=True)

    def _template(self, messages: Sequence[Mapping[str, str]], where: str, *, opened: bool = False) -> str:
        if not messages:
            return ""
        try:
            return str(self._own.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opened))
        except Exception as error:  # possible errors of a template
            raise DataError(
                f"the chat template in {self.folder!r} refuses {where} ({str(error).splitlines()[0]}): correct the "
                "messages"
            ) from None


def _plain(messages: Sequence[Mapping[str, str]]) -> Document:
    text, answers = "", list[tuple[int, int]]()
    for message in messages:
        text += f"{message['role']}: "
        if message["role"] == "assistant":
            answers.append((len(text), len(text) + len(message["content"]) + 1))
        text += f"{message['content']}\n"
    return Document(text, tuple(answers))


def _learnt(ids: list[int], places: Sequence[tuple[int, int]], answers: Spans | None) -> Tokenized:
    """The tokens that begin within an answer, without marks, which have no place in the text."""
    if answers is None:
        return Tokenized(ids, [True] * len(ids))
    return Tokenized(ids, [any(a <= start < b for a, b in answers) and end > start for start, end in places])


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise DataError(
            "text needs the package transformers, which is not installed: pip install 'cutlayer[lm]'"
        ) from None
    return transformers


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    log = transformers.utils.logging
    verbosity = log.get_verbosity()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
