"""The code on the pages of chat formats and training data runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .test_readme import ROOT, blocks
from .training_rows import dialog, write


@pytest.mark.parametrize("page", ["docs/chat.md", "docs/training.md"])
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    (tmp_path / "llama_fast").symlink_to(ROOT / "llama_fast")
    monkeypatch.chdir(tmp_path)
    write(Path("."), "dialogs.jsonl", [dialog()] * 4)
    names: dict = {}
    data = [block for block in blocks(page, "python") if "finetune" not in block]
    assert data
    for block in data:
        exec(compile(block, page, "exec"), names)
    if page.endswith("chat.md"):
        (described,) = re.findall(r"describe\(\)\)  # (.*)", "".join(data))
        assert described in capsys.readouterr().out
        assert "weather" in names["tokenizer"].decode(names["encoded"].ids)
    else:
        assert names["batch"].kept > 0
