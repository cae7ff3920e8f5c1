"""lhact.command and lhact.files: the exit status and the one line of every way that a command ends,
and files that are whole or as they were."""

import os

import pytest
import torch

from lhact import command
from lhact.cache import BadCache
from lhact.files import naming, write_whole
from lhact.messages import InputError

FULL = OSError(28, "No space left on device")
GPU = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
ENDS = {
    "done": (None, 0, ""),
    "input": (InputError("x is missing; give it"), 1, "lhact.x: x is missing; give it\n"),
    "value": (BadCache("x is damaged"), 1, "lhact.x: x is damaged\n"),
    "file": (FileNotFoundError(2, "No such file", "a\nb"), 1, "lhact.x: a\\nb: No such file\n"),
    "no-file": (FULL, 1, "lhact.x: a file: No space left on device\n"),
    "ctrl-c": (KeyboardInterrupt(), 130, "lhact.x: interrupted\n"),
    "memory": (torch.OutOfMemoryError("CUDA"), 1, "lhact.x: the device has too little memory; "),
    "gpu": (GPU, 1, "lhact.x: the device has too little memory; give another --device"),
}


def raising(error):
    def work(*_):
        if error is not None:
            raise error

    return work


@pytest.mark.parametrize("end", ENDS)
def test_a_command_ends_with_a_status_and_one_line(end, capsys):
    error, status, line = ENDS[end]
    assert command.run("lhact.x", lambda: 3, raising(error)) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(line)
    assert len(err.splitlines()) == (error is not None)


def test_what_work_returns_is_the_status():
    assert command.run("lhact.x", lambda: 3, lambda job: job + 1) == 4


@pytest.mark.parametrize(("error", "status"), [(ValueError("no"), 2), (InputError("no"), 1)])
def test_a_command_line_that_is_not_right(error, status, capsys):
    assert command.run("lhact.x", raising(error), pytest.fail) == status
    assert capsys.readouterr().err == "lhact.x: no\n"


@pytest.mark.parametrize("error", [ValueError("1"), RuntimeError("shapes do not match")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error), match=str(error)):
        command.run("lhact.x", lambda: 3, raising(error))


def test_an_error_without_a_file_gets_one():
    with pytest.raises(OSError, match="No space left on device: 'there'"), naming("there"):
        raise FULL


@pytest.mark.parametrize("link", [False, True])
def test_a_file_is_written_whole_with_its_mode_through_its_link(link, tmp_path):
    target = tmp_path / "target"
    target.write_bytes(b"older and longer")
    target.chmod(0o640)
    path = tmp_path / "link" if link else target
    if link:
        path.symlink_to(target)
    write_whole(path, b"new")
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o640
    assert path.is_symlink() is link
    assert len(list(tmp_path.iterdir())) == 1 + link


def test_a_new_file_has_the_mode_that_every_new_file_has(tmp_path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "new", b"new")
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640


def test_a_file_that_cannot_be_written_is_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, "replace", raising(FULL))
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'file'}'"):
        write_whole(tmp_path / "file", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]
