"""The pages that lead a newcomer inside the model: their code runs as it stands, pasted block by
block into one session."""

from __future__ import annotations

import re
from code import InteractiveConsole

import pytest

from .test_readme import LINK, ROOT, blocks

ENGLISH, CHINESE = "docs/walk-through.md", "docs/walk-through.zh-CN.md"


class Session(InteractiveConsole):
    """Python as one types into it: there, a blank line ends a statement of several lines."""

    def paste(self, block: str) -> None:
        for line in block.splitlines():
            unfinished = self.push(line)
        assert not unfinished, f"another paste would go on with this one: {line!r}"

    def showsyntaxerror(self, *_, **__) -> None:
        raise

    showtraceback = showsyntaxerror


@pytest.mark.parametrize("page", [ENGLISH, "docs/inspect.md"])
def test_the_code_runs(page, capsys):
    session = Session(filename=page)
    for block in blocks(page, "python"):
        session.paste(block)
    out = capsys.readouterr().out
    assert "42\n" in out if page == ENGLISH else "layers.3.attention.scores" in out


def test_both_languages_have_the_same_code_pictures_and_formulas():
    assert blocks(ENGLISH, "python") == blocks(CHINESE, "python")
    english, chinese = ((ROOT / page).read_text(encoding="utf-8") for page in (ENGLISH, CHINESE))
    others = {"walk-through.md", "walk-through.zh-CN.md"}
    assert set(LINK.findall(english)) ^ set(LINK.findall(chinese)) == others
    shapes = re.compile(r"\([BTSHKDCFV,]{3,}\)")
    assert shapes.findall(english) == shapes.findall(chinese)
