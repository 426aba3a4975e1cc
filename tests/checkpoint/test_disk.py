"""What happens on the file system, and what stays when something fails."""

import os
import subprocess
import sys

import pytest

from flaxfit._core.errors import CheckpointError
from flaxfit.checkpoint import disk


def writes(data):
    return lambda file: file.write(data)


def test_a_file_is_replaced(tmp_path):
    target = tmp_path / "a" / "b" / "run"
    disk.replace_file(target, writes(b"old"))
    disk.replace_file(target, writes(b"new"))
    assert target.read_bytes() == b"new"
    assert os.listdir(target.parent) == ["run"]


def test_what_write_raises_comes_through_and_nothing_stays(tmp_path):
    target = tmp_path / "run"
    disk.replace_file(target, writes(b"old"))

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        disk.replace_file(target, fail)
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["run"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    disk.replace_file(tmp_path / "link", writes(b"x"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "run").read_bytes() == b"x"


def test_file_and_new_folders_are_made_safe(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def record(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        calls.append(os.path.relpath(name, tmp_path).split(".")[0] or "temporary")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(
        os, "replace", lambda *args: (calls.append("replace"), replace(*args))
    )
    disk.replace_file(tmp_path / "a" / "b" / "run", writes(b"x"))
    # The names of a and of a/b, the file, its new name.
    assert calls == ["", "a", "a/b/", "replace", "a/b"] or calls == [
        "temporary",
        "a",
        "a/b/",
        "replace",
        "a/b",
    ]


def test_temporaries_of_the_dead_are_removed_those_of_the_living_are_not(tmp_path):
    dead = tmp_path / ".run.01234567.tmp"
    other = tmp_path / ".other.01234567.tmp"
    users = [".run.tmp", ".run.0123456g.tmp", "run.01234567.tmp"]
    for name in [dead, other, *(tmp_path / name for name in users)]:
        name.write_bytes(b"x")
    seen = []

    def write(file):
        file.write(b"x")
        disk.remove_stale(tmp_path, "run")
        seen.extend(os.listdir(tmp_path))

    disk.replace_file(tmp_path / "run", write)
    assert sum(name.startswith(".run.") and name.endswith(".tmp") for name in seen) == 3
    assert sorted(os.listdir(tmp_path)) == sorted([*users, other.name, "run"])
    disk.remove_stale(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*users, "run"])


def test_a_killed_writer_leaves_a_temporary_that_the_next_one_removes(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from flaxfit.checkpoint import disk\n"
        "def write(file):\n"
        "    file.write(b'x'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "disk.replace_file(Path(sys.argv[1]), write)"
    )
    target = tmp_path / "run"
    done = subprocess.run([sys.executable, "-c", code, str(target)])
    assert done.returncode == -9
    assert len(os.listdir(tmp_path)) == 1
    disk.replace_file(target, writes(b"new"))
    assert os.listdir(tmp_path) == ["run"]


def test_a_folder_is_locked_once(tmp_path):
    folder = tmp_path / "new"
    with disk.lock_folder(folder):
        text = rf"is being written by this process \(pid {os.getpid()}\)"
        with pytest.raises(CheckpointError, match=text):
            with disk.lock_folder(folder):
                pass
    with disk.lock_folder(folder):
        pass


def test_systems_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "fcntl", None)
    (tmp_path / ".run.01234567.tmp").write_bytes(b"x")
    with disk.lock_folder(tmp_path), disk.lock_folder(tmp_path):
        disk.replace_file(tmp_path / "run", writes(b"x"))
    assert sorted(os.listdir(tmp_path)) == [".lock", ".run.01234567.tmp", "run"]


def test_remove(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    disk.remove(tmp_path / "a")
    disk.remove(tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_probe(tmp_path):
    disk.probe(tmp_path / "a")
    assert os.listdir(tmp_path / "a") == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"Nothing can be written into .*file/x"):
        disk.probe(tmp_path / "file" / "x")
