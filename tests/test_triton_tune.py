"""Launch configurations are data: chosen by shape, measured when asked, read where they exist."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch

pytest.importorskip("triton", reason="this chooses configurations of Triton's kernels")

from llama_fast.backends import triton as backend
from llama_fast.bench.shapes import Work
from llama_fast.cli import main
from llama_fast.cli.tune import tune_ops, write
from llama_fast.config import LlamaConfig
from llama_fast.dispatch import OPS, use_backend
from llama_fast.triton_kernels import attention, chips, choice, rms_norm
from llama_fast.triton_kernels.choice import Choice, chosen, knob, neighbours, trying
from llama_fast.triton_kernels.launch import record

INTERPRETED = pytest.mark.skipif(
    not backend.INTERPRETED,
    reason="this needs Triton's interpreter: without a GPU it is the default",
)
CHIP = replace(chips.INTERPRETER, device="stand-in")
TINY = LlamaConfig(
    dim=64, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=96, vocab_size=80,
    max_seq_len=64,
)  # fmt: skip


@dataclass(frozen=True)
class Knobs:
    block: int = knob(16, 64)
    stages: int = knob(1, 3, step=1)
    switch: bool = False


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of measured configurations."""
    monkeypatch.setattr(choice, "FOLDER", tmp_path)
    choice.measured.cache_clear()
    yield tmp_path
    choice.measured.cache_clear()


def test_neighbours_stay_within_the_knobs():
    assert set(neighbours(Knobs(16, 1))) == {Knobs(32, 1), Knobs(16, 2), Knobs(16, 1, True)}
    assert set(neighbours(Knobs(64, 2, True))) == {
        Knobs(32, 2, True),
        Knobs(64, 1, True),
        Knobs(64, 3, True),
        Knobs(64, 2, False),
    }


def test_a_file_is_read_where_there_is_one_and_for_its_shapes_alone(folder):
    default = Knobs(32, 2)
    assert chosen("rope", "rope_fwd", CHIP, default, H=4) == default
    row = {"kernel": "rope_fwd", "shape": {"H": 4}, "config": {"block": 64}, "seconds": 1.0}
    (folder / "rope.stand-in.json").write_text(json.dumps({"rows": [row]}))
    choice.measured.cache_clear()
    assert chosen("rope", "rope_fwd", CHIP, default, H=4) == Knobs(64, 2)
    assert chosen("rope", "rope_fwd", CHIP, default, H=8) == default
    assert chosen("rope", "rope_fwd", chips.CHIPS["sm_90"], default, H=4) == default


@pytest.mark.parametrize("text", ["", "[]", '{"rows": [{"kernel": "rope_fwd"}]}', '{"rows": [1]}'])
def test_a_broken_file_is_named(folder, text):
    path = folder / "rope.stand-in.json"
    path.write_text(text)
    with pytest.raises(choice.ConfigFileError, match=f"{path} holds no launch configurations"):
        chosen("rope", "rope_fwd", CHIP, Knobs(32, 2), H=4)


def test_launches_take_the_measured_configuration(folder):
    x, weight = torch.empty(8, 64, device="meta"), torch.empty(64, device="meta")
    row = {
        "kernel": "rms_norm_fwd",
        "shape": {"C": 64, "dtype": "fp32"},
        "config": {"block_n": 2, "num_warps": 8},
    }
    (folder / "rms_norm.stand-in.json").write_text(json.dumps({"rows": [row]}))
    with chips.assume(CHIP), record() as launches:
        rms_norm.rms_norm(x, weight, 1e-5)
    assert launches[0].grid == (4,)
    assert (launches[0].options["BLOCK_N"], launches[0].options["num_warps"]) == (2, 8)


@INTERPRETED
def test_tuning_finds_the_fastest_and_writes_what_is_then_read(folder):
    """The stand-in timer says that rms_norm is fastest with 4 rows and 8 warps."""

    def seconds(call) -> float:
        with record() as launches:
            call()
        options = launches[0].options
        return 1e-3 * (1 + abs(options["BLOCK_N"] - 4) + abs(options["num_warps"] - 8))

    wanted = [("rms_norm", "tiny", TINY, Work.decode(16))]
    found = tune_ops(wanted, torch.float32, "cpu", seconds, lambda launches: "")
    (one,) = found
    assert (one.config.block_n, one.config.num_warps, one.seconds) == (4, 8, 1e-3)
    assert one.default_seconds > one.seconds and one.timed > 4 and not one.refused
    (path,) = write(found, "stand-in", 80)
    written = json.loads(path.read_text())
    assert path.name == "rms_norm.stand-in.json" and written["versions"]["triton"]
    shape = {"C": 64, "dtype": "fp32"}
    default = rms_norm.forward_config(64, torch.float32)
    assert chosen("rms_norm", "rms_norm_fwd", CHIP, default, **shape) == one.config
    # A second run keeps the rows of other shapes.
    other = Choice("rms_norm", "rms_norm_fwd", (("C", 128), ("dtype", "fp32")))
    write([replace(one, choice=other)], "stand-in", 80)
    assert len(json.loads(path.read_text())["rows"]) == 2


@INTERPRETED
def test_candidates_that_fail_or_spill_or_are_wrong_are_passed_over(monkeypatch):
    launcher = rms_norm.rms_norm

    def poor(x, weight, eps):
        with record() as launches:
            launcher(x, weight, eps)
        y = launcher(x, weight, eps)
        if launches[0].options["BLOCK_N"] == 8:
            raise RuntimeError("out of resource")
        return y + 1 if launches[0].options["num_warps"] == 4 else y

    monkeypatch.setattr(rms_norm, "rms_norm", poor)
    wanted = [("rms_norm", "tiny", TINY, Work.decode(16))]

    def spills(launches) -> str:
        return "spills" if launches and launches[0].options["BLOCK_N"] == 32 else ""

    (one,) = tune_ops(wanted, torch.float32, "cpu", lambda call: 1.0, spills)
    assert one.config == rms_norm.forward_config(64, torch.float32)
    assert sorted(why.split(":")[0] for why in one.refused.values()) == [
        "RuntimeError",
        "gives another result",
        "spills",
    ]


@INTERPRETED
@pytest.mark.parametrize("op", ["attention", "linear_cross_entropy"])
def test_the_kernels_of_a_gradient_are_tuned_too(op):
    """Every kernel of the op is asked for, under its own name, and none changes the result."""
    found = tune_ops(
        [(op, "tiny", TINY, Work.prefill(17))], torch.float32, "cpu",
        lambda call: 1.0, lambda launches: "not now",
    )  # fmt: skip
    kernels = {one.choice.kernel for one in found}
    if op == "attention":
        assert kernels == {"attention_fwd", "attention_bwd_dq", "attention_bwd_dk_dv"}
    else:
        assert kernels == {"cross_entropy", "linear_quantized"}  # of a head in 8 bits
    assert all(one.refused and not one.timed for one in found)


@INTERPRETED
@pytest.mark.parametrize("op", ["attention", "kv_append"])
@pytest.mark.parametrize("work", [Work.decode(40), Work.prefill(17)])
def test_a_cache_in_8_bits_has_configurations_of_its_own(op, work):
    found = tune_ops(
        [(op, "tiny", TINY, work)], torch.float32, "cpu", lambda call: 1.0, lambda launches: "no"
    )
    made = {(one.choice.stem, one.choice.kernel, one.choice.shape) for one in found}
    if op == "kv_append":
        assert {kernel for _, kernel, _ in made} == {"kv_append", "kv_append_quantized"}
    else:
        forward = [dict(shape) for _, kernel, shape in made if kernel == "attention_fwd"]
        assert sorted(shape.get("kv", "") for shape in forward) == ["", "int8"]
    assert {stem for stem, *_ in made} == {op}
    assert all(one.refused and not one.timed for one in found)


@INTERPRETED
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("blocks", [(16, 16), (32, 64)])
def test_another_configuration_changes_the_speed_alone(blocks, tma):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 37, 4, 32, generator=generator)
    k, v = (torch.randn(1, 50, 2, 32, generator=generator) for _ in "kv")
    args = (q, k, v, True, None, torch.tensor([50]), True)
    with use_backend("triton", strict=True), torch.no_grad():
        with trying({}) as made:
            expected = OPS["attention"](*args)
        (asked,) = made
        config = attention.AttentionConfig(*blocks, num_warps=4, num_stages=1, tma=tma)
        with trying({asked: config}) as made:
            actual = OPS["attention"](*args)
    assert made == {asked: config}
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this needs a machine without a GPU")
def test_without_a_gpu_nothing_is_tuned(capsys, folder):
    assert main(["bench", "rms_norm", "--tune"]) == 1
    assert "on a GPU, and torch finds none here" in capsys.readouterr().err
    assert not list(folder.iterdir())
