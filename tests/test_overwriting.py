"""A run or a comparison can replace an earlier one, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import call, mlp, source

from cutlayer import Comparison, ConfigError, Run, RunFolderError
from cutlayer.errors import CutlayerWarning
from cutlayer.folder import Folder, locked

OPTIONS: dict[str, Any] = {
    "model": mlp,
    "cut": "2",
    "partition": "column",
    "clients": 2,
    "rounds": 1,
    "batch": 4,
    "engine": "local",
    "precision": "float64",
}


def run(out: Path, **options: Any) -> Run:
    return Run(data=source([8, 8], (6,)), out=out, **{"algorithm": "psl", **OPTIONS, **options})


def compare(out: Path, **options: Any) -> Comparison:
    return Comparison(
        data=source([8, 8], (6,)), out=out, **{"algorithms": ("psl",), "seeds": (0,), **OPTIONS, **options}
    )


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_run_is_replaced_when_the_next_one_begins(tmp_path: Path) -> None:
    out = tmp_path / "r"
    run(out, rounds=2, snapshot_every=1).run()
    (out / "table.csv").touch()
    (out / "export").mkdir()
    (out / "export/model.onnx").touch()
    before = content(out)
    with pytest.raises(RunFolderError, match=r"already holds files: .* or --overwrite to replace it"):
        run(out)
    with pytest.raises(ConfigError):
        run(out, overwrite=True, rounds=-1)
    later = run(out, overwrite=True)
    assert content(out) == before  # not replaced yet
    with pytest.warns(CutlayerWarning, match=r"'.*/r': the finished run of psl of [\d: -]+ is replaced"):
        result = later.run()
    run(tmp_path / "fresh", overwrite=True).run()
    assert set(content(out)) == set(content(tmp_path / "fresh"))
    assert result.rounds == 1
    assert len((out / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()) == 1


def test_a_comparison_is_replaced_and_does_not_take_its_results(tmp_path: Path) -> None:
    out = tmp_path / "c"
    first = compare(out, algorithms=("psl", "ssl")).run()
    second = compare(out, overwrite=True, rounds=2)
    assert second.waiting == [("psl", 0)]
    with pytest.warns(CutlayerWarning, match="the finished comparison of"):
        (row,) = second.run()
    assert row.steps == 2 * first[0].steps
    assert not (out / "ssl").exists()
    with pytest.raises(RunFolderError, match="already holds files"):
        second.run()  # it would replace its own folder
    (out / "comparison.json").unlink()
    with pytest.warns(CutlayerWarning, match="the unfinished comparison of"):
        run(out, overwrite=True).run()


def foreign(out: Path) -> dict[str, Callable[[], Any]]:
    """Things in a folder that prevent its deletion, by the path that the error names."""
    return {
        "notes.md": lambda: (out / "notes.md").touch(),
        "psl/notes.md": lambda: (out / "psl/notes.md").touch(),
        "psl/seed-0/thesis.pdf": lambda: (out / "psl/seed-0/thesis.pdf").touch(),
        "elsewhere": lambda: (out / "elsewhere").symlink_to(out.parent),
        "other/main.py": lambda: ((out / "other").mkdir(), (out / "other/main.py").touch()),
        "psl/seed-1": lambda: (out / "psl/seed-1").symlink_to(out / "psl/seed-0"),
    }


@pytest.mark.parametrize("what", foreign(Path()))
def test_what_is_not_of_a_run_is_not_deleted(tmp_path: Path, what: str) -> None:
    out = tmp_path / "c"
    (out / "psl/seed-0").mkdir(parents=True)
    (out / "config.toml").write_text('algorithms = ["psl"]', encoding="utf-8")
    (out / "psl/seed-0/config.toml").write_text('algorithm = "psl"', encoding="utf-8")
    compare(out, overwrite=True)
    foreign(out)[what]()
    before = content(out)
    named = what.rpartition("seed-0/")[2]
    with pytest.raises(RunFolderError, match=f"not overwritten, since it holds '{named}', which is not part of a run"):
        compare(out, overwrite=True)
    assert content(out) == before


def test_folders_of_others_are_refused(tmp_path: Path) -> None:
    for name, text in (("photos/a.png", ""), ("project/config.toml", "debug = true"), ("broken/config.toml", "=")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises((RunFolderError, ConfigError)):
            run((tmp_path / name).parent, overwrite=True)
        with pytest.raises((RunFolderError, ConfigError)):
            Folder.create((tmp_path / name).parent, {}, overwrite=True)
        assert (tmp_path / name).read_text(encoding="utf-8") == text
    out = tmp_path / "r"
    run(out).run()
    with locked(out), pytest.raises(RunFolderError, match="is in use"):
        run(out, overwrite=True)
    with pytest.raises(ConfigError, match="overwrite has no effect without out"):
        Run(algorithm="psl", overwrite=True)


def test_the_command_line_replaces_what_is_named(tmp_path: Path) -> None:
    small = ("--rounds", "1", "--clients", "2", "--samples-per-client", "20", "--engine", "local", "--model", "mlp")
    (tmp_path / "r").mkdir()
    (tmp_path / "r/config.toml").write_text('algorithm = "psl"', encoding="utf-8")
    again = call("run", *small, "--out", "r", "--overwrite", cwd=tmp_path)
    assert "'r': the unfinished run of psl of " in again.stderr
    assert again.stderr.count("\n") == 1
    refused = call("compare", *small, "--overwrite", cwd=tmp_path, code=2)
    assert refused.stderr == (
        "error: --overwrite has no effect without --out: name the folder to replace, or leave it out\n"
    )
