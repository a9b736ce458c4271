"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import pytest

from llama_fast.errors import LlamaFastError
from llama_fast.utils.files import atomic_file, atomic_folder


def test_file_appears_at_the_end(tmp_path):
    target = tmp_path / "new" / "file"
    with atomic_file(target) as partial:
        partial.write_text("one")
        assert not target.exists()
    with atomic_file(target) as partial:
        partial.write_text("two")
        assert target.read_text() == "one"
    assert target.read_text() == "two"
    assert [path.name for path in target.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_failure_keeps_the_old_file(tmp_path, error):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(error), atomic_file(target) as partial:
        partial.write_text("half")
        raise error
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


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_failure_leaves_no_folder(tmp_path, error):
    with pytest.raises(error), atomic_folder(tmp_path / "folder") as partial:
        (partial / "file").write_text("half")
        raise error
    assert not any(tmp_path.iterdir())
