"""Templates, workflows and the citation file name only what exists."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ROOT

import cutlayer
from cutlayer import testing

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FORMS = [path for path in sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")) if path.stem != "config"]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
TEXTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "CITATION.cff")),
    *(path for path in sorted((ROOT / ".github").rglob("*")) if path.is_file()),
    ROOT / ".pre-commit-config.yaml",
]
KINDS = {"algorithm", "model", "data", "defence", "codec"}


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_there_is_a_template_for_each_kind_of_addition() -> None:
    assert {path.stem for path in FORMS} == KINDS | {"bug"}
    assert {path.stem for path in (ROOT / ".github/PULL_REQUEST_TEMPLATE").glob("*.md")} == KINDS


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_have_the_shape_that_github_wants(path: Path) -> None:
    form = read(path)
    assert {"name", "description", "body"} <= set(form)
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in fields} <= {"textarea", "input", "dropdown", "checkboxes"}
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_paths_and_checks_that_are_named_exist(path: Path) -> None:
    """Files and folders of the project, `make` targets, and the checks of `cutlayer.testing`."""
    text = path.read_text(encoding="utf-8")
    places = re.findall(r"`((?:src|tests|docs|\.github)/[\w./-]+)`", text)
    assert [place for place in places if not (ROOT / place).exists()] == []
    assert {name for name in re.findall(r"cutlayer\.testing\.(\w+)", text) if not hasattr(testing, name)} == set()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:`|run: )make ([a-z-]+)", text)) <= targets


def test_nightly_targets_exist() -> None:
    targets = read(ROOT / ".github/workflows/nightly.yml")["jobs"]["slow"]["strategy"]["matrix"]["target"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert [target for target in targets if f"\n{target}:" not in makefile] == []


def test_the_matrix_begins_with_the_oldest_python_that_is_supported() -> None:
    matrix = read(ROOT / ".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    assert PROJECT["requires-python"] == f">={matrix['python'][0]}"
    assert {name.split("-")[0] for name in matrix["os"]} == {"ubuntu", "macos"}


def test_every_job_ends_in_time_or_is_another_workflow() -> None:
    jobs = {f"{path.stem}.{name}": job for path in WORKFLOWS for name, job in read(path)["jobs"].items()}
    assert [name for name, job in jobs.items() if not job.get("timeout-minutes") and not job.get("uses")] == []
    assert [j["uses"] for j in jobs.values() if "uses" in j and not (ROOT / j["uses"]).is_file()] == []


def test_the_version_is_the_same_everywhere() -> None:
    assert read(ROOT / "CITATION.cff")["version"] == PROJECT["version"] == cutlayer.__version__


def test_no_address_of_a_package_registry() -> None:
    texts = [*TEXTS, *sorted((ROOT / "docs").rglob("*.md"))]
    found = re.compile(r"https?://(?:[\w.-]*pypi\.org|download\.pytorch\.org|files\.pythonhosted\.org)")
    assert [path.name for path in texts if found.search(path.read_text(encoding="utf-8"))] == []
