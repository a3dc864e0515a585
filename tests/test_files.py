"""Small files are written completely or not at all, also on a full disk, and always in UTF-8."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cutlayer.errors import DiskFullError, RunFolderError
from cutlayer.files import Lines, append_line, put_whole, replace_file, unwritable
from cutlayer.folder import STEPS, Folder
from cutlayer.remote.audit import Audit

FULL = Path("/dev/full")  # all writes fail as on a full disk
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


def test_a_full_disk_is_named_with_the_command_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    (tmp_path / "run").mkdir()
    sentence = str(unwritable(tmp_path / "run" / "steps.jsonl", full))
    mount = next(str(folder) for folder in tmp_path.parents if os.path.ismount(folder))
    assert f"the disk at {mount!r}" in sentence
    assert sentence.endswith("make room, then start the same command again")
    (tmp_path / "run" / "config.toml").touch()
    assert f"`cutlayer resume {tmp_path / 'run'}`" in str(unwritable(tmp_path / "run" / "steps.jsonl", full))
    monkeypatch.chdir(tmp_path)
    assert "`cutlayer resume run`" in str(unwritable(Path("run", "snapshots", "one"), full))
    (tmp_path / "run" / "events.jsonl").touch()  # the folder of a server, which only `serve` can continue
    assert "start the same command again" in str(unwritable(tmp_path / "run" / "steps.jsonl", full))
    quota = unwritable(tmp_path / "x", OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert isinstance(quota, DiskFullError)
    assert quota.exit_code == 3
    denied = unwritable(tmp_path / "x", OSError(errno.EACCES, "Permission denied"))
    assert isinstance(denied, RunFolderError)
    assert "make the folder writable" in str(denied)


@needs_full
def test_records_that_find_no_room_end_the_run_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match=r"steps\.jsonl.*cutlayer resume"):
        fill(tmp_path / "a", flush=True)
    with pytest.raises(DiskFullError, match=r"steps\.jsonl.*cutlayer resume"):  # noticed only when the file is closed
        fill(tmp_path / "b", flush=False)
    with pytest.raises(KeyError):  # the first error is raised
        fill(tmp_path / "c", flush=False, then=KeyError)
    with pytest.raises(DiskFullError):
        append_line(FULL, "an event")


def fill(path: Path, *, flush: bool, then: type[Exception] | None = None) -> None:
    with Folder.create(path, {}) as folder:
        (path / STEPS).symlink_to(FULL)
        folder.append(STEPS, {"step": 0})
        if flush:
            folder.offsets()
        if then is not None:
            raise then


def test_records_shorter_than_a_checkpoint_says_are_left_as_they_are(tmp_path: Path) -> None:
    with Folder.create(tmp_path / "run", {}) as folder:
        for step in range(2):
            folder.append(STEPS, {"step": step})
            if not step:
                before = folder.offsets()
        whole = folder.offsets()
        with pytest.raises(RunFolderError, match=rf"has {whole[STEPS]} bytes, where the checkpoint says"):
            folder.truncate({STEPS: whole[STEPS] + 1})
        assert folder.offsets() == whole
        folder.truncate(before)
    assert (tmp_path / "run" / STEPS).read_text() == '{"step": 0}\n'


def test_a_file_is_on_disk_before_it_takes_the_place_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut, either the old or the new file exists completely."""
    done: list[str] = []

    def sync(file: int) -> None:
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{file}')).name}")

    def replace(here: Path, there: Path) -> None:
        done.append(f"replace {there.name}")
        rename(here, there)

    rename = os.replace
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    replace_file(tmp_path / "state", b"new")
    assert done == ["sync .state.new", "replace state", f"sync {tmp_path.name}"]
    with Lines(tmp_path / "steps") as lines:
        lines.add("1")
        lines.sync()
        assert (tmp_path / "steps").read_text(encoding="utf-8") == "1\n"
    assert done[3:] == ["sync steps"]


def test_nothing_is_left_of_a_file_that_cannot_be_put_in_place(tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    with pytest.raises(RunFolderError, match="place"):
        replace_file(tmp_path / "place", b"content")  # the place is a folder
    assert [file.name for file in tmp_path.iterdir()] == ["place"]


SMALL_DISK = """
set -e
mount -t tmpfs -o size=200k tmpfs "$1"
cd "$1"
set +e
"$2" -m cutlayer run --algorithm psl --model mlp --clients 2 --samples-per-client 8 --epochs 400 --out run 2> "$3/says"
echo $? > "$3/code"
ls -A run > "$3/left"
"""


def can_mount() -> bool:
    try:
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", "mount -t tmpfs tmpfs /mnt"], capture_output=True, check=False
        )
    except OSError:
        return False
    return done.returncode == 0


@pytest.mark.skipif(not can_mount(), reason="this user may not mount a disk of their own")
def test_a_run_on_a_disk_that_becomes_full(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    words = ["unshare", "-rm", "sh", "-c", SMALL_DISK, "sh", str(tmp_path / "disk"), sys.executable, str(tmp_path)]
    subprocess.run(words, check=True, capture_output=True, timeout=120)
    says = " ".join((tmp_path / "says").read_text("utf-8").split())
    assert (tmp_path / "code").read_text("utf-8") == "3\n", says
    assert "is full" in says
    assert f"the disk at '{tmp_path / 'disk'}'" in says
    assert "`cutlayer resume run`" in says
    assert not [name for name in (tmp_path / "left").read_text("utf-8").split() if name.endswith(".new")]


@pytest.mark.network  # a process with another locale
def test_text_is_utf_8_whatever_the_machines_encoding(tmp_path: Path) -> None:
    rows = "".join(f"{n},{['größer', 'kleiner'][n % 2]},{['Zürich', 'Köln', 'Łódź'][n % 3]}\n" for n in range(60))
    (tmp_path / "data.csv").write_text(f"höhe,art,ort\n{rows}", encoding="utf-8")
    (tmp_path / "run.toml").write_text(
        'data = "data.csv"\nlabel_column = "art"\nclient_column = "ort"\npartition = "column"\nclients = 3\n'
        'model = "mlp"\nalgorithm = "psl"\nepochs = 1\n# größer\n',
        encoding="utf-8",
    )
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHONIO"))}
    env = plain | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "cutlayer", "run", "--config", "run.toml", "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    for name in ("config.toml", "report.html"):
        assert "art" in (tmp_path / "run" / name).read_text("utf-8")
    assert json.loads((tmp_path / "run" / "classes.json").read_text("utf-8"))["class_names"] == ["größer", "kleiner"]
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "Names of the clients in the data: 0 is Köln, 1 is Zürich, 2 is Łódź." in page
    assert "Data: data: 60 rows (1 column) in 2 classes" in page


class Crowded:
    """A disk with room for a number of bytes, for everything that is written by system calls."""

    def __init__(self, room: int, patch: pytest.MonkeyPatch) -> None:
        self.room = room
        write, pwrite = os.write, os.pwrite
        patch.setattr(os, "write", lambda file, data: write(file, self.taken(data)))
        patch.setattr(os, "pwrite", lambda file, data, at: pwrite(file, self.taken(data), at))

    def taken(self, data: bytes) -> bytes:
        """The part of `data` for which there is room. Raises OSError if there is none."""
        if data and not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = bytes(data)[: self.room]
        self.room -= len(part)
        return part


@pytest.mark.parametrize("room", range(0, 48, 7))
def test_a_file_has_whole_lines_wherever_the_disk_is_full(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events, a client's record, records of a run, a client's spent budget, and replaced files."""
    lines, records, old = tmp_path / "events.jsonl", tmp_path / "run", tmp_path / "old"
    audit = Audit(tmp_path / "audit.jsonl", "client-0", "server")
    purse = os.open(tmp_path / "spent", os.O_RDWR | os.O_CREAT)
    old.write_bytes(b"as it was")
    with Folder.create(records, {}) as folder:
        folder.append(STEPS, {"step": 0})
        folder.offsets()
        append_line(lines, "first")
        attempts: list[Callable[[], object]] = [
            lambda: append_line(lines, "x" * 50),
            lambda: audit.event("joined"),
            lambda: (folder.append(STEPS, {"step": 1, "more": "x" * 40}), folder.offsets()),
            lambda: replace_file(old, b"y" * 61),
        ]
        for attempt in attempts:
            with monkeypatch.context() as patch:
                Crowded(room, patch)
                with pytest.raises(DiskFullError, match=r"full.*make room, then"):
                    attempt()
        with monkeypatch.context() as patch:
            Crowded(room, patch)
            with pytest.raises(OSError, match="No space left"):
                put_whole(purse, b"z" * 61)
    assert lines.read_text() == "first\n"
    assert (tmp_path / "audit.jsonl").read_text() == ""
    assert (tmp_path / "spent").read_bytes() == b""
    assert (records / STEPS).read_text() == '{"step": 0}\n'
    assert old.read_bytes() == b"as it was"
    assert {path.name for path in tmp_path.iterdir()} == {"events.jsonl", "run", "audit.jsonl", "spent", "old"}
    append_line(lines, "second")
    assert lines.read_text() == "first\nsecond\n"
    audit.close()
    os.close(purse)
