"""The benchmark of training measures what it says, in a tiny shape; figures are not looked at."""

from __future__ import annotations

import pytest

from benchmarks import models, train
from benchmarks.peers import lora
from benchmarks.peers.lora import Batch
from llama_fast.bench.results import MULTIPLY_ADDS, OURS
from llama_fast.errors import WrongResultError

pytest.importorskip("llama_fast._cpu", reason="the C++ kernels are not built")
DEMO = models.shape("demo")
TWO = Batch((16, 9), masked=0.5)


def test_a_batch_counts_its_tokens():
    assert (TWO.tokens, TWO.labelled) == (25, 8 + 5)
    assert Batch((16,)).labelled == 15
    (_, labels), _ = TWO.documents()
    assert labels[:8].eq(lora.IGNORED).all() and labels[8:].ge(0).all()
    tokens, targets, cu_seqlens = TWO.packed()
    assert tokens.shape == targets.shape == (1, 25) and cu_seqlens.tolist() == [0, 16, 25]
    assert targets[0, 7:15].equal(tokens[0, 8:16]) and targets.eq(lora.IGNORED).sum() == 25 - 13
    assert lora.flops(DEMO, Batch((16, 9))) > lora.flops(DEMO, TWO)


@pytest.mark.parametrize("arguments", [(TWO,), (TWO, "int4", True)], ids=["floats", "int4"])
def test_our_step_trains_the_adapter(arguments):
    step = lora.OursLora(DEMO, *arguments)
    before = [p.clone() for p in step.model.parameters() if p.requires_grad]
    step()
    after = [p for p in step.model.parameters() if p.requires_grad]
    assert any(not a.equal(b) for a, b in zip(before, after, strict=True))
    assert step.peak() > 0


def test_peft_and_the_full_step_have_the_loss_of_random_weights():
    pytest.importorskip("peft", reason="peft is not installed")
    lora.PeftLora(DEMO, TWO)()
    step = lora.OursFull(DEMO, Batch((16,)))
    assert all("forward" in vars(layer) for layer in step.model.layers)  # checkpointed still
    step()
    step.model.norm.weight.data.fill_(1e4)
    with pytest.raises(WrongResultError, match="with random weights it is near"):
        step()


def test_attention_backward_is_checked_and_timed_in_turn():
    samples, _ = train._attention_backward((4, 2, 16), 32, 1000, rounds=2)
    assert samples.keys() == {OURS, "SDPA", MULTIPLY_ADDS}
    assert {len(seconds) for seconds in samples.values()} == {2}


def test_rows_are_asked_for_by_name(capsys):
    assert train.main(["--list"]) == 0
    assert "lora packed" in capsys.readouterr().out.splitlines()
    assert train.main(["--rows", "lora", "nothing"]) == 1
    assert "no row nothing; the rows are lora, " in capsys.readouterr().err
