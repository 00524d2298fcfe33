"""Files and folders that are written whole or not at all, whoever writes them at the same time."""

import ctypes
import errno
import os
import stat
import sys
import threading
from types import SimpleNamespace

import pytest
from torch import nn

import compaware_kernels as ck
from compaware_kernels._utils import atomic_write as atomic_write_module
from compaware_kernels._utils.atomic_write import OLD, atomic_folder, atomic_write, write_text


def mode(path):
    return oct(stat.S_IMODE(path.stat().st_mode))


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def folder_with(path, text):
    with atomic_folder(path) as new:
        (new / "file").write_text(text)


WRITERS = {"file": write_text, "folder": folder_with}


def contents(path):
    return (path / "file" if path.is_dir() else path).read_text()


@pytest.fixture(params=["exchange", "two renames"])
def ways(request, monkeypatch):
    """Both ways to replace a folder, whatever this file system can."""
    if request.param == "two renames":
        monkeypatch.setattr(atomic_write_module, "_exchanged", lambda a, b: False)


@pytest.mark.parametrize("kind", WRITERS)
def test_written_and_replaced(kind, ways, tmp_path):
    path = tmp_path / "target"
    for text in ("one", "two"):
        WRITERS[kind](path, text)
        assert contents(path) == text and os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("before", [True, False])
def test_a_writer_that_fails_changes_nothing(kind, error, before, tmp_path):
    path = tmp_path / "target"
    if before:
        WRITERS[kind](path, "old")
    with pytest.raises(error, match="stopped"), (atomic_write if kind == "file" else atomic_folder)(path) as new:
        (new if kind == "file" else new / "file").write_text("half")
        raise error("stopped")
    assert os.listdir(tmp_path) == ["target"] * before and (not before or contents(path) == "old")


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("there", [True, False])
def test_links_are_followed(kind, there, tmp_path):
    """Also a link to what is not there yet, by a path that is relative to the link's folder."""
    real, link = tmp_path / "data" / "real", tmp_path / "links" / "link"
    real.parent.mkdir()
    link.parent.mkdir()
    link.symlink_to("../data/real")
    if there:
        WRITERS[kind](real, "old")
    WRITERS[kind](link, "new")
    assert link.is_symlink() and contents(real) == "new" and not real.is_symlink()
    assert os.listdir(link.parent) == ["link"] and os.listdir(real.parent) == ["real"]


def test_the_mode_of_a_new_file_is_the_umasks(umask, tmp_path):
    with atomic_write(tmp_path / "file") as new:
        new.touch(0o600)
        new.chmod(0o600)
    folder_with(tmp_path / "folder", "")
    ck.save(nn.Linear(2, 2), tmp_path / "model.safetensors")  # safetensors gives its files 0600
    found = {path.name: mode(path) for path in tmp_path.rglob("*")}
    assert found == {"file": "0o640", "folder": "0o750", "model.safetensors": "0o640"}


def test_the_mode_of_what_is_replaced_is_kept(umask, tmp_path):
    write_text(tmp_path / "target", "old")
    (tmp_path / "target").chmod(0o604)
    write_text(tmp_path / "target", "new")
    folder_with(tmp_path / "folder", "old")
    (tmp_path / "folder").chmod(0o711)
    (tmp_path / "folder/file").chmod(0o604)
    folder_with(tmp_path / "folder", "new")
    assert [mode(tmp_path / name) for name in ("target", "folder", "folder/file")] == ["0o604", "0o711", "0o604"]


def test_an_adapters_files_have_the_umasks_mode(umask, tmp_path):
    base, model = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    ck.export_lora(model, base, tmp_path / "adapter")
    assert {mode(file) for file in (tmp_path / "adapter").iterdir()} == {"0o640"}


def test_threads_that_write_at_once(tmp_path):
    """All of one of them, never a bit of each, and nothing else is left."""
    path, begin, failed = tmp_path / "target", threading.Barrier(8), []

    def write(letter):
        begin.wait()
        for _ in range(20):
            try:
                with atomic_write(path) as new, new.open("w") as file:
                    for _ in range(50):
                        file.write(letter * 100)
                        file.flush()
            except OSError as error:
                failed.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcdefgh"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    text = path.read_text()
    assert not failed and text == text[0] * 5000 and os.listdir(tmp_path) == ["target"]


def test_the_folder_that_is_missing_is_named(tmp_path):
    for kind in WRITERS:
        with pytest.raises(FileNotFoundError, match="absent/target"):
            WRITERS[kind](tmp_path / "absent" / "target", "")
    assert not os.listdir(tmp_path)


def test_only_regular_files_are_replaced(tmp_path):
    """Not a pipe, nor a device, which for root would be gone."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(OSError, match=f"{name}: wanted a regular file"):
            write_text(tmp_path / name, "")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and len(os.listdir(tmp_path)) == 2


def test_an_old_folder_that_cannot_be_put_back_is_kept(tmp_path, monkeypatch):
    folder_with(tmp_path / "target", "old")
    renames = []

    def replace(source, target, real=os.replace):
        renames.append(target)
        if len(renames) > 1:
            raise OSError("gone")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(atomic_write_module, "_exchanged", lambda a, b: False)
    with pytest.raises(OSError, match="gone"):
        folder_with(tmp_path / "target", "new")
    (kept,) = tmp_path.glob(f".compaware-*/{OLD}")
    assert contents(kept) == "old"


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_a_folder_is_replaced_in_one_rename(tmp_path, monkeypatch):
    """No moment without one: nothing else may move it."""
    folder_with(tmp_path / "target", "old")
    monkeypatch.setattr(os, "replace", None)
    folder_with(tmp_path / "target", "new")
    assert contents(tmp_path / "target") == "new" and os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EACCES])
def test_file_systems_that_cannot_exchange(code, tmp_path, monkeypatch):
    """Two renames do it instead; any other error is one."""

    def rename(*_):
        ctypes.set_errno(code)
        return -1

    folder_with(tmp_path / "target", "old")
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(renameat2=rename))
    if code == errno.EACCES:
        with pytest.raises(OSError, match="target"):
            folder_with(tmp_path / "target", "new")
    else:
        folder_with(tmp_path / "target", "new")
    assert contents(tmp_path / "target") == ("old" if code == errno.EACCES else "new")
    assert os.listdir(tmp_path) == ["target"]
