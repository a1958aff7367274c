"""A folder that is replaced as a whole: whoever looks sees the old one or the new one."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@contextmanager
def replacing(folder: Path, is_replaced: Callable[[str], bool]) -> Iterator[Path]:
    """A new folder to write into; when the block ends without an error, it takes the place of `folder`.

    It lies beside `folder`, in a hidden workplace which what follows removes: this call, or after a killed process
    the next one.

    Args:
        folder: the folder to replace; it need not exist.
        is_replaced: whether a file of the old folder, by its name, is left behind. The others move into the new one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}.pst-saving-"
    for entry in folder.parent.iterdir():
        if entry.name.startswith(prefix):
            _sweep(entry, folder)
    workplace = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        with FileLock(workplace / "lock"):
            written = workplace / "new"
            written.mkdir()
            yield written
            _replace(folder, written, is_replaced)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def _sweep(workplace: Path, folder: Path) -> None:
    """Remove a workplace whose process has died."""
    try:
        with FileLock(workplace / "lock", blocking=False):
            pass
    except Timeout:
        return  # another process is saving
    old = workplace / "old"
    if old.exists() and not folder.exists():  # it died between two renames
        os.rename(old, folder)
    shutil.rmtree(workplace, ignore_errors=True)


def _replace(folder: Path, written: Path, is_replaced: Callable[[str], bool]) -> None:
    for entry in written.rglob("*"):
        if entry.is_file():
            with open(entry, "rb") as file:
                os.fsync(file.fileno())
    if not folder.exists():
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
    """Exchange the names of two folders, in one step where the system can (Linux); elsewhere `b` is called `old`,
    beside `a`, for a moment."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        renameat2 = None
    if renameat2 is not None and not renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE):
        return
    old = a.with_name("old")
    os.rename(b, old)
    os.rename(a, b)
    os.rename(old, a)
