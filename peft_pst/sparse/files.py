"""A folder that is replaced as a whole: whoever looks sees the old one or the new one."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@contextmanager
def replacing(folder: Path, is_replaced: Callable[[str], bool]) -> Iterator[Path]:
    """A new folder to write into; when the block ends without an error, it takes the place of `folder`.

    It lies beside `folder`, in a hidden workplace which what follows removes: this call, or after a killed process
    the next one. A folder that can have no other in its place (a mount point, one that a process stands in, one in a
    folder that is not ours to write to) is replaced file by file, `config.json` last.

    Args:
        folder: the folder to replace, or a link to it; it need not exist.
        is_replaced: whether a file of the old folder, by its name, is left behind. The others stay.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    as_a_whole = _is_exchangeable(folder)
    around = folder.parent if as_a_whole else folder
    prefix = f".{folder.name}.pst-saving-"
    for entry in around.iterdir():
        if entry.name.startswith(prefix):
            _sweep(entry, folder)
    with _workplace(prefix, around) as workplace:
        written = workplace / "new"
        written.mkdir()
        yield written
        for entry in written.rglob("*"):
            if entry.is_file():
                with open(entry, "rb") as file:
                    os.fsync(file.fileno())
        (_replace if as_a_whole else _replace_files)(folder, written, is_replaced)


def _is_exchangeable(folder: Path) -> bool:
    stood_in = Path.cwd().is_relative_to(folder)
    return not (folder.is_mount() or stood_in) and os.access(folder.parent, os.W_OK)


@contextmanager
def _workplace(prefix: str, around: Path) -> Iterator[Path]:
    """A new folder, locked while it is in use."""
    workplace, lock = _locked(prefix, around)
    while not (workplace / "lock").exists():  # another process has swept it before it was locked
        lock.release()
        workplace, lock = _locked(prefix, around)
    try:
        yield workplace
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
        lock.release()


def _locked(prefix: str, around: Path) -> tuple[Path, FileLock]:
    workplace = Path(tempfile.mkdtemp(prefix=prefix, dir=around))
    lock = FileLock(workplace / "lock")
    with suppress(FileNotFoundError):  # swept
        lock.acquire()
    return workplace, lock


def _sweep(workplace: Path, folder: Path) -> None:
    """Remove a workplace whose process has died."""
    try:
        with FileLock(workplace / "lock", blocking=False):
            old = workplace / "old"
            if old.exists() and not folder.exists():  # it died between two renames
                os.rename(old, folder)
            shutil.rmtree(workplace, ignore_errors=True)
    except Timeout:
        pass  # another process is saving


def _replace(folder: Path, written: Path, is_replaced: Callable[[str], bool]) -> None:
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


def _replace_files(folder: Path, written: Path, is_replaced: Callable[[str], bool]) -> None:
    names = {entry.name for entry in written.iterdir()}
    for name in sorted(names, key=lambda name: name == "config.json"):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        os.replace(written / name, folder / name)
    for entry in list(folder.iterdir()):
        if entry.name not in names and is_replaced(entry.name):
            entry.unlink()


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
