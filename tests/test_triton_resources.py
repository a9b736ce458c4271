"""The Triton kernels compile for every chip, and fit it: no spills, and matrix instructions."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile

import pytest

from llama_fast.cli import resources
from llama_fast.errors import BackendError

pytest.importorskip("triton", reason="this compiles Triton's kernels")

# In a process of its own: here, Triton may be its interpreter, which compiles nothing.
COMPILE = """
import json, sys
from llama_fast.triton_kernels.aot import launches, problems, resources
from llama_fast.triton_kernels.chips import CHIPS

chip, stems = CHIPS[sys.argv[1]], tuple(sys.argv[2].split())
for launch in launches(chip, stems, brief=True):
    row = resources(chip, launch)
    print(json.dumps([row.kernel, row.config, row.matrix, problems(row)]))
"""
# The rest of the table, other models, dtypes and kernels: llama-fast doctor --resources.
ATTENTION = "attention"
ALL = "rms_norm add_rms_norm swiglu rope kv_append attention cross_entropy linear adamw"
MATRIX = {"sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}


def apart(script: str, *arguments: str) -> list[str]:
    """The lines that a script says, which compiles in a process and with a cache of its own."""
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            capture_output=True,
            text=True,
            env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache},
        )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("chip", "stems"),
    [
        ("sm_90", ALL),
        *((chip, ATTENTION) for chip in ("sm_80", "gfx942")),
        # Half a minute each, with the instructions of sm_80, or as below.
        *(
            pytest.param(chip, ATTENTION, marks=pytest.mark.thorough)
            for chip in ("sm_86", "sm_89", "sm_100", "sm_120")
        ),
    ],
)
def test_the_configurations_of_the_8b_model(chip, stems):
    rows = [json.loads(line) for line in apart(COMPILE, chip, stems)]
    assert {row[0].split("_")[0] for row in rows} >= {"attention"}
    assert not [problem for row in rows for problem in row[3]]
    training = [row for row in rows if row[0] == "attention_fwd" and " m=16 " not in row[1]]
    assert all(row[2] == MATRIX.get(chip, "mma.sync") for row in training), training


def test_a_chip_that_is_not_known(monkeypatch):
    monkeypatch.setattr(resources, "triton_interpreter", lambda: False)
    with pytest.raises(BackendError, match="no chip sm_70, sm_1; there are sm_80, sm_86"):
        resources.show_resources("sm_70,sm_90,sm_1")


TMA = """
import dataclasses, sys, torch
from llama_fast.triton_kernels import attention
from llama_fast.triton_kernels.aot import compile_for, problems, resources
from llama_fast.triton_kernels.chips import CHIPS, assume
from llama_fast.triton_kernels.choice import trying
from llama_fast.triton_kernels.launch import record

q, k, v = (torch.empty(2, 2048, h, 128, dtype=torch.bfloat16, device="meta") for h in (32, 8, 8))
def forward(chip, configs):
    with assume(chip), record() as launches, trying(configs) as made:
        attention.attention(q, k, v, True, None, None, True)
    return launches, made
for chip in map(CHIPS.get, sys.argv[1:]):
    _, made = forward(chip, {})
    tiles = {choice: dataclasses.replace(made[choice], tma=True) for choice in made}
    (launch,), _ = forward(chip, tiles)
    compiled = compile_for(chip, launch)
    print(problems(resources(chip, launch, compiled)), compiled.asm["sass"].count("UTMALDG"))
"""
WITH_TMA = ("sm_90", "sm_100")


@functools.cache
def with_tiles_by_tma() -> dict[str, str]:
    return dict(zip(WITH_TMA, apart(TMA, *WITH_TMA), strict=True))


@pytest.mark.parametrize("chip", WITH_TMA)
def test_attention_with_tiles_by_tma(chip):
    found, _, copies = with_tiles_by_tma()[chip].rpartition(" ")
    assert found == "[]" and int(copies) >= 4, with_tiles_by_tma()


OVERWRITTEN = """
import re, sys
from llama_fast.triton_kernels.aot import compile_for, launches
from llama_fast.triton_kernels.chips import CHIPS

for chip in map(CHIPS.get, sys.argv[1:]):
    (launch,) = launches(chip, ("cross_entropy",), brief=True)
    ptx = compile_for(chip, launch).asm["ptx"]
    print(*re.findall(r"bar\\.sync|(?:ld|st)\\.global[.:\\w]*", ptx))
"""
OVERWRITTEN_ON = ("sm_80", "sm_90")


@functools.cache
def overwritten() -> dict[str, str]:
    return dict(zip(OVERWRITTEN_ON, apart(OVERWRITTEN, *OVERWRITTEN_ON), strict=True))


@pytest.mark.parametrize("chip", OVERWRITTEN_ON)
def test_the_logit_of_a_target_is_read_before_gradients_take_its_place(chip):
    """Every thread reads it and one overwrites it, so a barrier of the block lies between."""
    line = overwritten()[chip]
    memory = line.split()
    logit = max(i for i, code in enumerate(memory) if code.endswith(".b16") and "ld" in code)
    gradients = min(i for i, code in enumerate(memory) if "st" in code and ".v4" in code)
    assert "bar.sync" in memory[logit:gradients], line
