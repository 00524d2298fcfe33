"""Files and folders written whole or not at all: the old contents, or the new ones.

The new contents are written into a temporary folder beside the target, which no other process or thread uses, and
renamed. What is not finished is removed with that folder; only a killed process leaves it, as ``.compaware-...``.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

OLD = ".compaware-old"  # in the temporary folder: the folder that is being replaced


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Replace a file atomically: yields the path to write to, which becomes ``path`` when the block ends.

    As ``open(path, "w")`` does, it follows a symbolic link and keeps the mode of a file that is there; a new file has
    the mode that the umask leaves, whatever the writer gave it.

    Raises:
        OSError: the folder is missing or cannot be written, or ``path`` is no regular file. Then, and when the block
            raises, nothing has changed.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(f"{path}: wanted a regular file to replace, or nothing")
    with _beside(target, path) as folder:
        new = folder / target.name
        new.touch()
        mode = _mode(target, new)
        yield new
        new.chmod(mode)
        os.replace(new, target)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Replace a folder whole: yields an empty folder, which becomes ``path`` when the block ends; the old one goes.

    Links and modes, also of the files in it, as with :func:`atomic_write`. A process that is killed between the two
    renames leaves the old folder and the new one in the temporary folder.

    Raises:
        OSError: the parent folder is missing or cannot be written. Nothing has changed.
    """
    target = Path(os.path.realpath(path))
    with _beside(target, path) as folder:
        new, old, probe = folder / target.name, folder / OLD, folder / ".compaware-probe"
        new.mkdir()
        probe.touch()
        yield new
        for file in filter(Path.is_file, new.rglob("*")):
            file.chmod(_mode(target / file.relative_to(new), probe))
        new.chmod(_mode(target, new))
        try:
            if target.exists():
                os.replace(target, old)
            os.replace(new, target)
        finally:
            if old.exists() and not target.exists():
                os.replace(old, target)


def write_text(path: Path, text: str) -> Path:
    """Write a text file atomically, in UTF-8; returns the path.  Raises OSError as :func:`atomic_write`."""
    with atomic_write(path) as new:
        new.write_text(text, encoding="utf-8")
    return path


@contextmanager
def _beside(target: Path, path: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder on the target's file system, with all that is in it, but for an old folder that is needed."""
    try:
        folder = Path(mkdtemp(prefix=".compaware-", dir=target.parent))
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    try:
        yield folder
    finally:
        if target.exists() or not (folder / OLD).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _mode(there: Path, new: Path) -> int:
    """Permission bits of what is replaced, if there is something, else of ``new``."""
    return stat.S_IMODE((there if there.exists() else new).stat().st_mode)
