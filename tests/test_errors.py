"""The exit codes of the command line, with one test for each kind of error."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
from support import call  # type: ignore[import-not-found]

from cutlayer import errors
from cutlayer.errors import CutlayerError, ExitCode
from cutlayer.folder import locked

CODES = {
    "CutlayerError": 1,
    "UsageError": 2,
    "ConfigError": 2,
    "PortInUseError": 75,
    "DataError": 2,
    "CutError": 2,
    "RunFolderError": 2,
    "FolderInUseError": 75,
    "NetworkError": 75,
    "DistrustError": 2,
    "DiskFullError": 3,
    "WireError": 1,
    "ForbiddenError": 2,
    "BudgetError": 2,
    "TrainingError": 1,
    "AbsentError": 75,
    "LostRankError": 75,
}
OF_ITS_OWN = {
    "RefusedError",
    "NonFiniteError",
    "StepLostError",
}  # made from more than a sentence; the first has a code for each reason


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_the_exit_code_of_each_error(name: str, code: int) -> None:
    assert getattr(errors, name)("a sentence").exit_code == code


def test_no_error_is_left_out() -> None:
    found = {n for n, e in vars(errors).items() if isinstance(e, type) and issubclass(e, CutlayerError)}
    assert found == {*CODES, *OF_ITS_OWN}
    assert errors.NonFiniteError("loss").exit_code == 1
    assert errors.StepLostError((1,)).exit_code == 75


def test_the_documentation_has_every_exit_code() -> None:
    page = (Path(__file__).parents[1] / "docs" / "deployment.md").read_text()
    table = page.partition("## Exit codes")[2].partition("\n## ")[0]
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)] == list(ExitCode)


def test_a_client_that_reaches_nobody_may_try_again(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    words = ["--data", "digits", "--clients", "2", "--samples-per-client", "10", "--give-up-after", "0.1"]
    said = call("join", address, "--client", "client-0", "--insecure", *words, cwd=tmp_path, code=75)
    assert "cannot be reached" in said.stderr


def test_a_folder_that_is_in_use_may_be_free_later(tmp_path: Path) -> None:
    with locked(tmp_path):
        assert "in use by process" in call("run", "--data", "digits", "--out", str(tmp_path), code=75).stderr


def test_a_port_that_is_taken_may_be_free_later(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = ["--insecure", "--listen", f"127.0.0.1:{taken.getsockname()[1]}", "--data", "digits", "--clients", "2"]
        said = call("serve", *words, "--samples-per-client", "10", cwd=tmp_path, code=75)
    assert "another program has that port" in said.stderr
