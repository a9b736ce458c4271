"""The pages that lead a newcomer inside the model: their code runs as it stands, in one session."""

from __future__ import annotations

import re

import pytest

from .test_readme import LINK, ROOT, blocks

ENGLISH, CHINESE = "docs/walk-through.md", "docs/walk-through.zh-CN.md"


@pytest.mark.parametrize("page", [ENGLISH, "docs/inspect.md"])
def test_the_code_runs(page, capsys):
    session: dict = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), session)
    out = capsys.readouterr().out
    assert "42\n" in out if page == ENGLISH else "layers.3.attention.scores" in out


def test_both_languages_have_the_same_code_pictures_and_formulas():
    assert blocks(ENGLISH, "python") == blocks(CHINESE, "python")
    english, chinese = ((ROOT / page).read_text(encoding="utf-8") for page in (ENGLISH, CHINESE))
    others = {"walk-through.md", "walk-through.zh-CN.md"}
    assert set(LINK.findall(english)) ^ set(LINK.findall(chinese)) == others
    shapes = re.compile(r"\([BTSHKDCFV,]{3,}\)")
    assert shapes.findall(english) == shapes.findall(chinese)
