"""The pages that lead a newcomer inside the model: their code runs as it stands, pasted block by
block into one session."""

from __future__ import annotations

import re
from code import InteractiveConsole

import pytest
import torch

from llama_fast import Llama
from llama_fast.config import LlamaConfig, RopeScaling
from llama_fast.nn.rope import inverse_frequencies

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
    words = (ROOT / "llama_fast/inspect/page.html").read_text(encoding="utf-8")
    assert not re.search("提示(?!词)", chinese + words)  # one word for a prompt
    shapes = re.compile(r"\([BTSHKDCFV,]{3,}\)")
    assert shapes.findall(english) == shapes.findall(chinese)


def test_the_rotation_of_models_whose_frequencies_are_scaled():
    """What the page says to write for them is what the model turns with."""
    text = (ROOT / ENGLISH).read_text(encoding="utf-8")
    (line,) = re.findall(r"`(turn = [^`]+)`", text)
    scaling = RopeScaling(factor=32.0)
    config = LlamaConfig(dim=64, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=9, hidden_dim=32,
                         head_dim=32, max_seq_len=64, rope_scaling=scaling)  # fmt: skip
    T, session = 7, {}
    exec(line, {"torch": torch, "model": Llama(config), "T": T}, session)
    angles = torch.arange(T)[:, None] * inverse_frequencies(32, config.rope_theta, scaling)
    torch.testing.assert_close(session["turn"], torch.polar(torch.tensor(1.0), angles))
    assert not torch.equal(angles, torch.arange(T)[:, None] * inverse_frequencies(32))
