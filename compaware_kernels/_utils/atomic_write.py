"""Atomic writes of files and folders: readers see the old contents or the new ones, never a part.

The new contents are written into a unique temporary folder beside the target and then renamed. The folder is removed
also on an error; only a killed process leaves it behind, as ``.compaware-...``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

__all__ = ["OLD", "atomic_folder", "atomic_write", "write_text"]

OLD = ".compaware-old"  # name, in the temporary folder, of the folder that is being replaced


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Context manager that replaces a file atomically: yields a temporary path, renamed to ``path`` at the end.

    Like ``open(path, "w")`` it follows symbolic links and keeps the permissions of an existing file; a new file has
    those of the umask, whatever the block sets.

    Raises:
        OSError: the folder is missing or cannot be written, or ``path`` is no regular file. Then, and when the block
            raises, ``path`` is unchanged.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(f"{path}: wanted a regular file to replace, or nothing")
    with _temporary_folder(target, path) as folder:
        new = folder / target.name
        new.touch()
        mode = _mode(target, new)
        yield new
        new.chmod(mode)
        os.replace(new, target)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Context manager that replaces a folder: yields an empty temporary folder, renamed to ``path`` at the end.

    Symbolic links and permissions, also of the files in it, as with :func:`atomic_write`. On Linux an existing folder
    is exchanged with the new one in one rename. Elsewhere, and on file systems without this, there are two renames: a
    process that is killed between them leaves both folders in the temporary folder, and no ``path``.

    Raises:
        OSError: the parent folder is missing or cannot be written; ``path`` is unchanged.
    """
    target = Path(os.path.realpath(path))
    with _temporary_folder(target, path) as folder:
        new, old, probe = folder / target.name, folder / OLD, folder / ".compaware-probe"
        new.mkdir()
        probe.touch()
        yield new
        for file in filter(Path.is_file, new.rglob("*")):
            file.chmod(_mode(target / file.relative_to(new), probe))
        new.chmod(_mode(target, new))
        if target.exists() and _exchanged(new, target):
            return
        try:
            if target.exists():
                os.replace(target, old)
            os.replace(new, target)
        finally:
            if old.exists() and not target.exists():
                os.replace(old, target)


def write_text(path: Path, text: str) -> Path:
    """Write a UTF-8 text file atomically; returns ``path``.

    Raises:
        OSError: as :func:`atomic_write`.
    """
    with atomic_write(path) as new:
        new.write_text(text, encoding="utf-8")
    return path


def _exchanged(a: Path, b: Path) -> bool:
    """Exchange two paths in one rename, as Linux can; False, and nothing has changed, where it cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h
    if rename(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0:
        return True
    if ctypes.get_errno() in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), os.fspath(b))


@contextmanager
def _temporary_folder(target: Path, path: str | os.PathLike) -> Iterator[Path]:
    """Temporary folder beside the target; kept at the end only if it holds the sole copy of the old folder."""
    try:
        folder = Path(mkdtemp(prefix=".compaware-", dir=target.parent))
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    try:
        yield folder
    finally:
        if target.exists() or not (folder / OLD).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _mode(old: Path, new: Path) -> int:
    """Permission bits of ``old`` if it exists, else of ``new``."""
    return stat.S_IMODE((old if old.exists() else new).stat().st_mode)
