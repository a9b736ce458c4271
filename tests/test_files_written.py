"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil

import pytest

from llama_fast.errors import LlamaFastError
from llama_fast.utils.files import atomic_file, atomic_folder, check_file


def test_file_appears_at_the_end(tmp_path):
    target = tmp_path / "file"
    with atomic_file(target) as partial:
        partial.write_text("one")
        assert not target.exists()
    with atomic_file(target) as partial:
        partial.write_text("two")
        assert target.read_text() == "one"
    assert target.read_text() == "two"
    assert [path.name for path in target.parent.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("raised", "seen"), [(OSError, LlamaFastError), (KeyboardInterrupt, KeyboardInterrupt)]
)
def test_failure_keeps_the_old_file(tmp_path, raised, seen):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(seen), atomic_file(target) as partial:
        partial.write_text("half")
        raise raised
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_file_over_a_folder_is_refused(tmp_path):
    with pytest.raises(LlamaFastError, match="is a folder"), atomic_file(tmp_path):
        pytest.fail("the body must not run")


@pytest.mark.parametrize("exists", [False, True])
def test_folder_appears_at_the_end(tmp_path, exists):
    target = tmp_path / "folder"
    if exists:
        target.mkdir()
    with atomic_folder(target) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text("one")
        assert exists == target.exists()
    assert (target / "inner" / "file").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    with pytest.raises(LlamaFastError, match="not empty"), atomic_folder(target):
        pytest.fail("the body must not run")


@pytest.mark.parametrize(
    ("raised", "seen"), [(OSError, LlamaFastError), (KeyboardInterrupt, KeyboardInterrupt)]
)
def test_failure_leaves_no_folder(tmp_path, raised, seen):
    with pytest.raises(seen), atomic_folder(tmp_path / "folder") as partial:
        (partial / "file").write_text("half")
        raise raised
    assert not any(tmp_path.iterdir())


def test_permissions_and_links_stay(tmp_path):
    """A link to a file, to a place where none is yet, and to an empty folder."""
    target, link, other = tmp_path / "file", tmp_path / "link", tmp_path / "link to nothing"
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target.name)
    other.symlink_to(tmp_path / "new")
    for path in (link, other):
        with atomic_file(path) as partial:
            partial.write_text("new")
    assert link.is_symlink() and target.read_text() == "new" == (tmp_path / "new").read_text()
    assert target.stat().st_mode & 0o777 == 0o600
    (tmp_path / "folder").mkdir(mode=0o700)
    (tmp_path / "folder link").symlink_to("folder")
    with atomic_folder(tmp_path / "folder link") as partial:
        (partial / "inner").write_text("one")
    assert (tmp_path / "folder" / "inner").read_text() == "one"
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o700


def test_a_long_name(tmp_path):
    """As long as a name may be, of characters of several bytes."""
    target = tmp_path / ("字" * 85)
    with atomic_file(target) as partial:
        partial.write_text("one")
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_what_is_wrong_with_another_file_is_not_said_of_this_one(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "folder") as partial:
        shutil.copyfile(tmp_path / "missing", partial / "copy")
    assert not any(tmp_path.iterdir())


def test_a_file_that_may_only_be_read(tmp_path, monkeypatch):
    """os.access says yes of everything to root."""
    target = tmp_path / "file"
    target.write_text("old")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(LlamaFastError, match="may only be read"), atomic_file(target):
        pytest.fail("the body must not run")


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux's /proc")
def test_no_file_that_a_program_has_open(tmp_path):
    """/dev/stdout leads to the file that the output goes to, which would be replaced under it."""
    target, link = tmp_path / "file", tmp_path / "link"
    with open(target, "w") as file:
        link.symlink_to(f"/proc/self/fd/{file.fileno()}")
        for path in (link, f"/proc/self/fd/{file.fileno()}", f"/dev/fd/{file.fileno()}"):
            with pytest.raises(LlamaFastError, match="what a program has open"):
                check_file(path)
    assert check_file(target) == target


@pytest.mark.parametrize("path", [None, "", 3, "a\0b"])
def test_what_is_no_path(path):
    with pytest.raises(LlamaFastError, match=r"the path is .*; give the name of a file"):
        check_file(path)
