"""A folder that is replaced as a whole: whoever looks sees the old one or the new one."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable
from pathlib import Path

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def replace_folder(folder: Path, written: Path, is_replaced: Callable[[str], bool]) -> None:
    """Put the folder `written` in the place of `folder`, on the same file system, and keep the old one's other files.

    Args:
        folder: where the new one goes; it need not exist.
        written: the new one. What remains under this name afterwards can be deleted.
        is_replaced: whether a file of the old folder, by its name, is left behind.
    """
    for entry in written.iterdir():
        with open(entry, "rb") as file:
            os.fsync(file.fileno())
    if not folder.exists():
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(written, 0o777 & ~umask)
        os.rename(written, folder)
        return
    shutil.copymode(folder, written)
    for entry in folder.iterdir():
        if (written / entry.name).exists() or is_replaced(entry.name):
            continue
        if entry.is_dir():
            shutil.copytree(entry, written / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry, written / entry.name)
    exchange(written, folder)


def _link(source: str | Path, target: str | Path) -> None:
    """A second name for a file, since a folder of checkpoints is large; a copy where the file system has no links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def exchange(a: Path, b: Path) -> None:
    """Exchange the names of two folders, in one step where the system can (Linux)."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        renameat2 = None
    if renameat2 is not None and not renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE):
        return
    aside = a.with_name(a.name + ".old")
    os.rename(b, aside)
    os.rename(a, b)
    os.rename(aside, a)
