import ctypes

import pytest

from peft_pst.sparse.files import exchange, replace_folder


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


def test_a_new_folder(tmp_path):
    replace_folder(tmp_path / "new", folder(tmp_path / "written", x="1"), lambda name: False)
    assert content(tmp_path / "new") == {"x": "1"} and not (tmp_path / "written").exists()


def test_what_is_not_replaced_stays(tmp_path, system):
    old = folder(tmp_path / "old", x="1", mine="2", weights="3")
    replace_folder(old, folder(tmp_path / "written", x="new"), lambda name: name == "weights")
    assert content(old) == {"x": "new", "mine": "2"}


def test_a_folder_beside_it_is_not_copied(tmp_path):
    old = folder(tmp_path / "old", x="1")
    checkpoint = folder(old / "checkpoint-5", weights="large") / "weights"
    inode = checkpoint.stat().st_ino
    replace_folder(old, folder(tmp_path / "written", x="2"), lambda name: False)
    assert checkpoint.read_text() == "large" and checkpoint.stat().st_ino == inode
