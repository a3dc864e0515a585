"""Text from others reaches the terminal, logs and errors only as plain text."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from cutlayer.cli import printing
from cutlayer.remote.logs import _JsonLines, _TextLines
from cutlayer.text import plain, plain_lines
from cutlayer.wire import messages as m
from cutlayer.wire.handshake import agree

EVIL = "a\n\x1b[31mb\x07\u202ec\u2028d\x9b0me\r\x00\u200bf [bold]g[/] [/x] <b>"
SHOWN = r"a\n\x1b[31mb\x07\u202ec\u2028d\x9b0me\r\x00\u200bf [bold]g[/] [/x] <b>"


def test_what_drives_a_terminal_is_shown_as_an_escape() -> None:
    assert plain(EVIL) == SHOWN
    assert plain(plain(EVIL)) == SHOWN
    assert plain("accuracy 91.20 %, ß = 3 ± 1, 测试, naïve") == "accuracy 91.20 %, ß = 3 ± 1, 测试, naïve"
    assert all(plain(chr(c)).isprintable() for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    assert plain(ValueError("x\ty")) == r"x\ty"
    assert plain_lines("one\x1b\ntwo\u2028") == "one\\x1b\ntwo\\u2028"


@pytest.mark.parametrize("shown", [printing.say, printing.show_warning])
def test_the_terminal_shows_foreign_text_as_it_is(shown: Any, capsys: pytest.CaptureFixture[str]) -> None:
    shown(plain(EVIL))
    captured = capsys.readouterr()
    assert SHOWN in captured.out + captured.err
    shown(EVIL)  # also without escaping by the caller
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert "[bold]g[/] [/x]" in captured.out + captured.err


def test_errors_and_tables_show_foreign_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        printing.fail(EVIL, 2)
    assert "\x1b" not in (said := capsys.readouterr().err)
    assert "[bold]g[/] [/x]" in said
    printing.print_table("[red]t[/x]", ["[red]c[/x]"], [["\x1b[2J[/x]"]])
    assert "\x1b" not in (said := capsys.readouterr().out)
    assert "[red]c[/x]" in said
    printing.out.print("[/x]")  # markup is disabled in all output
    assert "[/x]" in capsys.readouterr().out


def test_logs_hold_foreign_text_on_one_line() -> None:
    record = logging.LogRecord("x", logging.WARNING, "", 0, "%s", (EVIL,), None)
    record.facts = {"why": EVIL, "client": 3}
    assert _TextLines("%(message)s").format(record) == SHOWN
    line = json.loads(_JsonLines().format(record))
    assert (line["message"], line["why"], line["client"]) == (SHOWN, SHOWN, 3)
    try:
        raise ValueError("x\x1b[31m")
    except ValueError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    assert "\x1b" not in _TextLines("%(message)s").format(record)
    assert "\x1b" not in json.loads(_JsonLines().format(record))["error"]


def test_terms_that_differ_are_shown_as_text() -> None:
    ours = m.Terms("run", "psl", "part", [], [], m.StepTerms(8))
    refused = agree(m.Terms("\x1b[2J\n", "psl", "part", [], [], m.StepTerms(8)), ours)
    assert refused is not None
    assert refused.sentence.isprintable()
