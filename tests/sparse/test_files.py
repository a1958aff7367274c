import ctypes
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import pytest

from peft_pst.sparse.files import exchange, replacing


def folder(path, **files):
    path.mkdir()
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def content(path):
    return {entry.name: entry.read_text() for entry in path.iterdir()}


@pytest.fixture(params=["in one step", "where the system cannot"])
def system(request, monkeypatch):
    if request.param != "in one step":
        monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: (_ for _ in ()).throw(OSError()))


def test_exchange(tmp_path, system):
    a, b = folder(tmp_path / "a", x="1"), folder(tmp_path / "b", y="2")
    exchange(a, b)
    assert content(a) == {"y": "2"} and content(b) == {"x": "1"}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "b"]


def replace(path, is_replaced=lambda name: False, **files):
    with replacing(path, is_replaced) as written:
        for name, text in files.items():
            (written / name).write_text(text)


def test_a_new_folder(tmp_path):
    replace(tmp_path / "a" / "new", x="1")
    assert content(tmp_path / "a" / "new") == {"x": "1"} and os.listdir(tmp_path / "a") == ["new"]
    plain = folder(tmp_path / "plain")
    assert (tmp_path / "a" / "new").stat().st_mode == plain.stat().st_mode


def test_what_is_not_replaced_stays(tmp_path, system):
    old = folder(tmp_path / "old", x="1", mine="2", weights="3")
    replace(old, lambda name: name == "weights", x="new")
    assert content(old) == {"x": "new", "mine": "2"} and os.listdir(tmp_path) == ["old"]


def test_an_error_leaves_the_old_one(tmp_path):
    old = folder(tmp_path / "old", x="1")
    with pytest.raises(KeyError), replacing(old, lambda name: False) as written:
        (written / "x").write_text("2")
        raise KeyError
    assert content(old) == {"x": "1"} and os.listdir(tmp_path) == ["old"]


def test_a_folder_beside_it_is_not_copied(tmp_path):
    old = folder(tmp_path / "old", x="1")
    checkpoint = folder(old / "checkpoint-5", weights="large") / "weights"
    inode = checkpoint.stat().st_ino
    replace(old, x="2")
    assert checkpoint.read_text() == "large" and checkpoint.stat().st_ino == inode


def test_what_a_dead_process_left_goes(tmp_path):
    folder(tmp_path / ".a.pst-saving-dead", lock="", new="1")
    folder(tmp_path / ".a.backup", mine="1")  # a folder of the user's
    replace(tmp_path / "a", x="1")
    assert sorted(os.listdir(tmp_path)) == [".a.backup", "a"]


def test_what_a_living_process_writes_stays(tmp_path):
    with replacing(tmp_path / "a", lambda name: False) as written:
        (written / "x").write_text("slow")
        replace(tmp_path / "a", x="fast")
        assert content(tmp_path / "a") == {"x": "fast"}
    assert content(tmp_path / "a") == {"x": "slow"} and os.listdir(tmp_path) == ["a"]


def test_a_process_that_died_between_two_renames(tmp_path):
    """Where the system cannot exchange, the old folder lies in the workplace for a moment."""
    workplace = folder(tmp_path / ".a.pst-saving-dead")
    folder(workplace / "old", x="1", mine="2")
    replace(tmp_path / "a", x="3")
    assert content(tmp_path / "a") == {"x": "3", "mine": "2"} and os.listdir(tmp_path) == ["a"]


def test_a_link_stays_one(tmp_path):
    real = folder(tmp_path / "real", x="1", mine="2")
    (tmp_path / "link").symlink_to(real)
    replace(tmp_path / "link", x="new")
    assert (tmp_path / "link").is_symlink() and content(real) == {"x": "new", "mine": "2"}


@pytest.mark.parametrize("why", ["the current directory", "a mount point", "in a folder of somebody else's"])
def test_a_folder_that_cannot_be_exchanged(tmp_path, monkeypatch, why):
    old = folder(tmp_path / "old", x="1", mine="2", weights="3")
    folder(old / "sub", y="1")
    inode = old.stat().st_ino
    if why == "the current directory":
        monkeypatch.chdir(old)
    elif why == "a mount point":
        monkeypatch.setattr(Path, "is_mount", lambda path: path == old)
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    written_last = []
    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (written_last.append(Path(b).name), rename(a, b)))
    with replacing(Path() if why == "the current directory" else old, lambda name: name == "weights") as written:
        assert os.listdir(tmp_path) == ["old"]
        for name in ("config.json", "x"):
            (written / name).write_text("new")
        folder(written / "sub", y="new")
    assert written_last[-1] == "config.json" and old.stat().st_ino == inode
    assert content(old / "sub") == {"y": "new"} and sorted(os.listdir(old)) == ["config.json", "mine", "sub", "x"]
    assert (old / "x").read_text() == (old / "config.json").read_text() == "new" and Path.cwd().exists()


def test_a_sweep_before_the_lock(tmp_path, monkeypatch):
    """Another process saves, and sweeps, in the moment in which the workplace is there but not locked yet."""
    make = tempfile.mkdtemp

    def make_and_wait(**kwargs):
        monkeypatch.setattr(tempfile, "mkdtemp", make)
        made = make(**kwargs)
        replace(tmp_path / "a", x="theirs", more="1")
        return made

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_wait)
    replace(tmp_path / "a", x="ours")
    assert content(tmp_path / "a") == {"x": "ours", "more": "1"} and os.listdir(tmp_path) == ["a"]


def test_a_sweep_holds_the_lock(tmp_path, monkeypatch):
    """A workplace that is about to be swept is not begun to be used."""
    make, remove = tempfile.mkdtemp, shutil.rmtree
    sweeping, others = threading.Event(), []

    def make_and_wait(**kwargs):
        monkeypatch.setattr(tempfile, "mkdtemp", make)
        made = make(**kwargs)
        others.append(threading.Thread(target=replace, args=(tmp_path / "a",), kwargs={"x": "theirs"}))
        others[0].start()
        assert sweeping.wait(60)
        return made

    def remove_late(path, **kwargs):
        if threading.current_thread() in others and not sweeping.is_set():
            sweeping.set()
            time.sleep(0.5)  # time enough for the first to go on, if nothing held it
        remove(path, **kwargs)

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_wait)
    monkeypatch.setattr(shutil, "rmtree", remove_late)
    with replacing(tmp_path / "a", lambda name: False) as written:
        others[0].join()
        (written / "x").write_text("ours")
    assert content(tmp_path / "a") == {"x": "ours"} and os.listdir(tmp_path) == ["a"]
