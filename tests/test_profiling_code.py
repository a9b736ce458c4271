"""Compiled kernels as `llama-fast profile --arch` reads them: what they hold and what they take."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama_fast.bench.profile import calls, code, cuda_code, instructions, limits, ncu, steps
from llama_fast.bench.profile.code import chip_named, record_calls
from llama_fast.bench.profile.instructions import amd_class, mix, parse_amd, parse_sass, sass_class
from llama_fast.bench.roofline import Roofline
from llama_fast.bench.shapes import Work
from llama_fast.config import LlamaConfig
from llama_fast.dispatch import Cost
from llama_fast.errors import BackendError
from llama_fast.triton_kernels.chips import CHIPS
from llama_fast.triton_kernels.cubin import find_tool

ROOT = Path(__file__).parent.parent
TINY = LlamaConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, hidden_dim=96, vocab_size=160
)
ROOFLINE = Roofline("cpu", 1, None, 1e9, 1e9, 1e9, None)
NVCC = cuda_code._setup().find_nvcc()
needs_nvcc = pytest.mark.skipif(
    NVCC is None or find_tool("cuobjdump") is None, reason="this needs nvcc and cuobjdump"
)

# Of rms_norm_bwd_sum_kernel<half> for sm_80, as cuobjdump -sass writes it; lines left out.
SASS = """
	.headerflags	@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0020*/                   ULDC.64 UR4, c[0x0][0x118] ;          /* 0x0000460000047ab9 */
                                                                         /* 0x000fe20000000a00 */
        /*0030*/                   BSSY B0, 0xd50 ;                      /* 0x00000d1000007945 */
        /*01e0*/              @!P2 BRA 0x3b0 ;                           /* 0x000001c00000a947 */
        /*02e0*/                   MOV R12, R17 ;                        /* 0x00000011000c7202 */
        /*02f0*/                   IMAD.MOV.U32 R13, RZ, RZ, R16 ;       /* 0x000000ffff0d7224 */
        /*0300*/                   LDG.E.CONSTANT R12, [R12.64] ;        /* 0x000000040c0c7981 */
        /*0350*/                   ISETP.NE.U32.AND P2, PT, R14, RZ, PT ; /* 0x000000ff0e007 */
        /*0390*/                   FADD R23, R12, R23 ;                  /* 0x000000170c177221 */
        /*03a0*/               @P2 BRA 0x2e0 ;                           /* 0xffffff3000002947 */
        /*03b0*/                   BSYNC B1 ;                            /* 0x0000000000017941 */
        /*0d80*/                   STS [R2], R23 ;                       /* 0x0000001702007388 */
        /*0d90*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;         /* 0x0000000000007b1d */
        /*0da0*/               @P1 EXIT ;                                /* 0x000000000000194d */
        /*0db0*/                   LDS R2, [R0.X4+0x80] ;                /* 0x0000800000027984 */
        /*0ea0*/                   F2FP.PACK_AB R15, RZ, R15 ;           /* 0x0000000fff0f723e */
        /*0ec0*/                   STG.E.U16 [R2.64], R15 ;              /* 0x0000000f02007986 */
        /*0ed0*/                   EXIT ;                                /* 0x000000000000794d */
        /*0ee0*/                   BRA 0xee0;                            /* 0xfffffff000007947 */
        /*0ef0*/                   NOP;                                  /* 0x0000000000007918 */
        /*0f00*/                   NOP;                                  /* 0x0000000000007918 */
"""
AMD = """
	.globl	kernel
kernel:
	s_load_dwordx2 s[2:3], s[0:1], 0x0      ; some comment
	v_mov_b32_e32 v1, 0
.LBB0_1:
	buffer_load_dwordx4 v[2:5], v1, s[4:7], 0 offen
	s_waitcnt vmcnt(0)
	v_mfma_f32_16x16x16_bf16 v[6:9], v[2:3], v[4:5], v[6:9]
	v_exp_f32_e32 v1, v1
	s_cbranch_scc1 .LBB0_1
; %bb.2:
	global_store_short v1, v2, s[2:3]
	s_endpgm
	.section	.rodata
	v_add_f32 v0, v0, v0
"""


# --- instructions -----------------------------------------------------------------------------


def test_a_listing_is_counted_by_class():
    found = {one.name: one for one in mix(parse_sass(SASS), sass_class)}
    assert sum(one.count for one in found.values()) == 17  # not what fills up the end
    assert {name: (one.count, one.in_loops) for name, one in found.items()} == {
        instructions.FP32: (1, 1),
        instructions.CONVERT: (1, 0),
        instructions.GLOBAL_LOAD: (1, 1),
        instructions.GLOBAL_STORE: (1, 0),
        instructions.SHARED_LOAD: (1, 0),
        instructions.SHARED_STORE: (1, 0),
        instructions.CONSTANT: (1, 0),
        instructions.BARRIER: (1, 0),
        instructions.INTEGER: (1, 1),
        instructions.MOVE: (2, 2),
        instructions.CONTROL: (6, 1),
    }
    assert found[instructions.GLOBAL_STORE].forms == {"STG 16 bit": 1}


def test_a_loop_that_only_waits_is_none():
    text = """
        /*0000*/  SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2+URZ], R3 ;
        /*0010*/  @!P0 BRA 0x0 ;
        /*0020*/  FADD R1, R1, R2 ;
        /*0030*/  EXIT ;
    """
    assert [one.in_loops for one in mix(parse_sass(text), sass_class)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("opcode", "kind", "form"),
    [
        ("HMMA.16816.F32.BF16", instructions.MATRIX, "mma HMMA.16816.F32.BF16"),
        ("HGMMA.64x64x16.F32.BF16", instructions.MATRIX, "wgmma HGMMA.64x64x16.F32.BF16"),
        ("UTCHMMA", instructions.MATRIX, "tcgen05 UTCHMMA"),
        ("IMMA.16832.S8.S8", instructions.MATRIX, "mma IMMA.16832.S8.S8"),
        ("HFMA2.MMA", instructions.FP16, "HFMA2"),
        ("FFMA2", instructions.FP32, "FFMA2"),
        ("LDG.E.128.CONSTANT", instructions.GLOBAL_LOAD, "LDG 128 bit"),
        ("LDG.E.NA.64", instructions.GLOBAL_LOAD, "LDG 64 bit"),
        ("LDG.E.U16", instructions.GLOBAL_LOAD, "LDG 16 bit"),
        ("LDG.E.S8.CONSTANT", instructions.GLOBAL_LOAD, "LDG 8 bit"),
        ("STG.E", instructions.GLOBAL_STORE, "STG 32 bit"),
        ("LDSM.16.M88.4", instructions.SHARED_LOAD, "LDSM 128 bit"),
        ("LDSM.16.MT88.2", instructions.SHARED_LOAD, "LDSM 64 bit"),
        ("LDGSTS.E.BYPASS.128", instructions.ASYNC, "LDGSTS 128 bit"),
        ("UTMALDG.2D", instructions.ASYNC, "UTMALDG"),
        ("LDTM.x32", instructions.TENSOR_MEMORY, "LDTM"),
        ("STL.64", instructions.LOCAL, "STL 64 bit"),
        ("ULDC.64", instructions.CONSTANT, "ULDC"),
        ("MUFU.EX2", instructions.SPECIAL, "MUFU.EX2"),
        ("IMAD.MOV.U32", instructions.MOVE, "IMAD.MOV"),
        ("IMAD.WIDE.U32", instructions.INTEGER, "IMAD"),
        ("UIADD3", instructions.INTEGER, "UIADD3"),
        ("REDG.E.ADD.F32", instructions.ATOMIC, "REDG"),
        ("SYNCS.ARRIVE", instructions.BARRIER, "SYNCS"),
        ("UTCBAR", instructions.BARRIER, "UTCBAR"),
        ("SHFL.BFLY", instructions.EXCHANGE, "SHFL"),
        ("FROB.X", instructions.OTHER, "FROB"),
    ],
)
def test_opcodes(opcode, kind, form):
    assert sass_class(opcode) == (kind, form)


def test_amd_s_assembler_is_read_up_to_the_kernel_s_end():
    found = {one.name: (one.count, one.in_loops) for one in mix(parse_amd(AMD), amd_class)}
    assert found == {
        instructions.MATRIX: (1, 1),
        instructions.SPECIAL: (1, 1),
        instructions.GLOBAL_LOAD: (1, 1),
        instructions.GLOBAL_STORE: (1, 0),
        instructions.CONSTANT: (1, 0),
        instructions.BARRIER: (1, 1),
        instructions.MOVE: (1, 0),
        instructions.CONTROL: (1, 1),
    }
    assert amd_class("buffer_load_dwordx4")[1] == "buffer_load 128 bit"


# --- chips ------------------------------------------------------------------------------------


def test_every_chip_has_its_limits():
    assert set(limits.LIMITS) == set(CHIPS)
    assert chip_named("90a") is chip_named("sm_90") is chip_named("90") is CHIPS["sm_90"]
    assert chip_named("gfx942") is CHIPS["gfx942"] and chip_named("sm_75") is None


@pytest.mark.parametrize(
    ("chip", "registers", "warps", "shared", "programs"),
    [
        ("sm_80", 64, 4, 0, 8),  # 65536 registers, 8192 a program
        ("sm_80", 65, 4, 0, 7),  # given out by eights
        ("sm_80", 16, 4, 0, 16),  # 64 warps
        ("sm_80", 16, 1, 0, 32),  # 32 programs
        ("sm_86", 16, 1, 0, 16),
        ("sm_89", 16, 1, 0, 24),
        ("sm_90", 32, 4, 75 * 1024, 3),  # 228 kB, of which each takes one more
        ("sm_90", 32, 4, 76 * 1024, 2),
        ("gfx942", 64, 4, 32 * 1024, 2),
    ],
)
def test_programs_that_fit_a_processor(chip, registers, warps, shared, programs):
    assert CHIPS[chip].programs(registers, warps, shared) == programs


# --- calls on the meta device -----------------------------------------------------------------

STEPS = {
    "decode": lambda model: steps.decode_step(model, batch=2, context=7),
    "prefill": lambda model: steps.prefill_step(model, batch=1, tokens=6),
    "train": lambda model: steps.train_step(model, batch=2, tokens=5),
}


@pytest.mark.parametrize(("name", "quantize"), [*((s, None) for s in STEPS), ("decode", "int4")])
def test_a_step_recorded_without_contents_costs_what_it_costs(name, quantize):
    """The same calls, with the same bytes and FLOPs, as of a step that runs."""
    totals = []
    for device in ("cpu", "meta"):
        model = steps.random_model(
            TINY, layers=2, dtype=torch.bfloat16, device=device, quantize=quantize
        )
        if device == "meta":
            recorded = record_calls(STEPS[name](model))
            found = [(c.label, c.count, c.cost) for c in recorded if c.label != "adamw"]
        else:
            ran = calls.count(STEPS[name](model), ROOFLINE)
            found = [(c.op, 1, c) for c in ran if c.op != "AdamW"]
        total: dict[str, list[int]] = {}
        for op, count, cost in found:
            one = total.setdefault(op, [0, 0, 0])
            for index, value in enumerate((1, cost.bytes, cost.flops)):
                one[index] += count * value
        totals.append(total)
    assert totals[0] == totals[1]


@pytest.mark.parametrize("name", ["linear", "linear int8", "attention", "rms_norm"])
def test_an_op_is_recorded_once_for_each_matrix(name):
    op, _, form = name.partition(" ")
    step = steps.op_step(
        op, TINY, Work.decode(9), dtype=torch.bfloat16, device="meta", quantize=form or None
    )
    found = record_calls(step)
    expected = 6 if op == "linear" else 1  # gate_up once more, with swiglu
    assert len(found) == expected and {call.count for call in found} == {1}


def test_the_least_time_is_that_of_the_nearer_limit():
    made = limits.Limits("none", bandwidth=10.0, bfloat16=100.0, float32=2.0, source="")
    half, full = torch.empty(1, 1, dtype=torch.bfloat16), torch.empty(1, 1)
    cost = Cost(bytes=20, flops=40)
    assert code.MetaCall("linear", (half,), 1, cost).at_best(made) == (2.0, "memory")
    assert code.MetaCall("swiglu", (half,), 1, cost).at_best(made) == (20.0, "float32")
    assert code.MetaCall("linear", (full,), 1, cost).at_best(made) == (20.0, "float32")


# --- CUDA's kernels ---------------------------------------------------------------------------


def test_kernels_of_an_op_are_found_in_its_sources():
    assert cuda_code.kernel_names("rms_norm") == ["rms_norm_fwd_kernel"]
    backward = cuda_code.kernel_names("add_rms_norm_backward")
    assert backward == ["rms_norm_bwd_kernel", "rms_norm_bwd_sum_kernel"]
    assert cuda_code.kernel_names("linear int4") == ["linear_fwd_kernel"]
    assert cuda_code.source_of("linear swiglu") == cuda_code.SOURCES / "linear" / "swiglu.cu"
    assert cuda_code.kernel_names("linear swiglu int8") == ["linear_fwd_kernel"]
    assert cuda_code.kernel_names("linear_cross_entropy") == []
    assert cuda_code.kernel_names("linear_backward_x") == []


@needs_nvcc
def test_a_cuda_kernel_is_compiled_once_and_read(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_code, "ROOT", tmp_path)
    setup = cuda_code._setup()
    monkeypatch.setattr(cuda_code, "_setup", lambda: setup)
    step = steps.op_step("rms_norm", TINY, Work.prefill(3), dtype=torch.float16, device="meta")
    (call,) = record_calls(step)
    found = list(code.cuda_kernels(call, CHIPS["sm_80"]))
    (file,) = (tmp_path / "build" / "profile").iterdir()
    written = file.stat().st_mtime_ns
    assert [kernel.config for kernel in code.cuda_kernels(call, CHIPS["sm_80"])] == [
        kernel.config for kernel in found
    ]
    assert file.stat().st_mtime_ns == written
    for kernel in found:
        assert kernel.name == "rms_norm_fwd_kernel" and "bfloat16" not in kernel.config
        assert 16 <= kernel.registers <= 128 and kernel.spilled == 0 and kernel.warps in (8, 32)
        assert kernel.programs == CHIPS["sm_80"].programs(kernel.registers, kernel.warps, 0)
        classes = {one.name: one for one in kernel.mix()}
        assert instructions.OTHER not in classes, classes[instructions.OTHER].forms
        assert classes[instructions.GLOBAL_LOAD].count and classes[instructions.SPECIAL].count
    assert any("LDG 128 bit" in one.forms for kernel in found for one in kernel.mix())


def test_a_missing_nvcc_says_what_to_do(monkeypatch):
    monkeypatch.setattr(cuda_code._setup(), "find_nvcc", lambda: None)
    with pytest.raises(BackendError, match=r"no nvcc was found.*CUDA_HOME.*--backend triton"):
        cuda_code.cubin(cuda_code.SOURCES / "rms_norm.cu", "80")


def test_an_nvcc_that_is_too_old_says_so(monkeypatch):
    monkeypatch.setattr(cuda_code._setup(), "find_nvcc", lambda: Path("nvcc"))
    monkeypatch.setattr(cuda_code._setup(), "known_architectures", lambda nvcc: {80, 90})
    with pytest.raises(BackendError, match="compiles for sm_80, sm_90, and not for sm_100"):
        cuda_code.cubin(cuda_code.SOURCES / "rms_norm.cu", "100")


def test_an_installation_without_sources_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_code, "ROOT", tmp_path)
    assert "in a checkout" in cuda_code.why_not()


# --- Nsight Compute ---------------------------------------------------------------------------


def test_the_command_of_ncu():
    program = ["python", "-m", "llama_fast", "profile", "swiglu", "--bare"]
    names = ["swiglu_fwd_kernel", "swiglu_bwd_kernel", "swiglu_fwd_kernel"]
    made = ncu.command(program, names, products=False, skip=4, report="out")
    assert made[0] == "ncu" and made[-len(program) :] == program
    options = dict(zip(made[1::2], made[2::2], strict=False))
    pattern = options["--kernel-name"].removeprefix("regex:")
    assert re.match(pattern, "swiglu_bwd_kernel") and not re.match(pattern, "xswiglu_bwd_kernel")
    assert options["--launch-skip"] == "4" and options["--export"] == "out"
    sections = [made[i + 1] for i, part in enumerate(made) if part == "--section"]
    assert {"SpeedOfLight", "Occupancy", "MemoryWorkloadAnalysis"} <= set(sections)
    assert len(sections) == len(set(sections)) and "ComputeWorkloadAnalysis" not in sections
    products = ncu.command(program, names, products=True, skip=4, report="out")
    sections = [products[i + 1] for i, part in enumerate(products) if part == "--section"]
    assert "SpeedOfLight_HierarchicalTensorRooflineChart" in sections
    assert len(sections) == len(set(sections))


# --- the command ------------------------------------------------------------------------------


def profile(*arguments: object, path: Path) -> subprocess.CompletedProcess:
    """In a process of its own: here, Triton may be its interpreter, which compiles nothing."""
    environment = dict(os.environ, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(path / "triton"))
    command = [sys.executable, "-m", "llama_fast", "profile", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def test_triton_s_kernels_are_shown_as_compiled(tmp_path):
    pytest.importorskip("triton", reason="this compiles Triton's kernels")
    file, listings = tmp_path / "code.json", tmp_path / "listings"
    done = profile(
        *("rms_norm", "--shape", "8b", "--tokens", 128, "--arch", "sm_90", "--backward"),
        *("--backend", "triton", "--json", file, "--dump", listings),
        path=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(file.read_text())
    assert [call["op"] for call in content["calls"]] == ["rms_norm", "rms_norm_backward"]
    # Forward: x is read and y written; the least time is theirs at 3.35 TB/s.
    assert content["calls"][0]["at_best"] == pytest.approx((2 * 128 + 1) * 4096 * 2 / 3350e9)
    names = [kernel["name"] for kernel in content["kernels"]]
    assert names == ["rms_norm_fwd_kernel", "rms_norm_bwd_kernel", "sum_rows_kernel"]
    assert len(list(listings.iterdir())) == 3
    for kernel in content["kernels"]:
        assert 16 <= kernel["registers"] <= 255 and kernel["spilled"] == 0
        assert 0 < kernel["occupancy"] <= 1 and kernel["programs"] >= 1
        assert f"{kernel['name'].removesuffix('_kernel')} {kernel['config']}" in done.stdout
        classes = {one["name"]: one for one in kernel["mix"]}
        assert "other" not in classes, classes["other"]
        assert "LDG 128 bit" in classes["global load"]["forms"]
    loops = {kernel["name"]: sum(one["in_loops"] for one in kernel["mix"])
             for kernel in content["kernels"]}  # fmt: skip
    assert loops["rms_norm_fwd_kernel"] == 0 < loops["rms_norm_bwd_kernel"]


def test_ncu_is_told_the_kernels_of_the_step(tmp_path):
    pytest.importorskip("triton", reason="this records Triton's launches")
    done = profile(
        *("attention", "--tokens", 64, "--dtype", "float16", "--arch", "sm_90", "--ncu"),
        path=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    made = shlex.split(done.stdout)
    pattern = made[made.index("--kernel-name") + 1].removeprefix("regex:")
    assert re.match(pattern, "attention_fwd_kernel") and re.match(
        pattern, "attention_prefill_kernel"
    )
    step = made[made.index("llama_fast") + 1 :]
    assert step[:2] == ["profile", "attention"] and "--bare" in step
    options = dict(zip(step[2::2], step[3::2], strict=False))
    assert options["--tokens"] == "64" and options["--dtype"] == "float16"
    assert options["--device"] == "cuda"
