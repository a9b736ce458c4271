"""Work that many threads share, in a process forked from one that has used threads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from llama_fast.backends import cpu

pytestmark = pytest.mark.skipif(
    not cpu.isas() or sys.platform != "linux", reason="this needs llama_fast._cpu, and fork()"
)

# What every script below begins with. A child that hangs is ended by its alarm.
HEAD = """
import os, signal, sys
import torch
from llama_fast import QuantizedWeight, linear
from llama_fast.dispatch import OPS, use_backend
from llama_fast.ops.quantized_kv import quantize
from llama_fast.ops.rope import tables

torch.manual_seed(0)
torch.set_num_threads(3)

def threads():
    return len(os.listdir("/proc/self/task"))

def in_child(check):
    pid = os.fork()
    if not pid:
        signal.alarm(20)
        try:
            assert check()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert not status, f"the child ended with {status}"
"""

# Each way that a kernel has to share its work, with enough of it for three threads. Products of
# many rows of float16 are ours in every instruction set.
OPS_OF_MANY_THREADS = """
def randn(*shape):
    return torch.randn(*shape).half()

B, T, S, H, K, D = 4, 64, 600, 8, 4, 64
q, k, v = randn(B, T, H, D), randn(B, S, K, D), randn(B, S, K, D)
(k8, k_scale), (v8, v_scale) = quantize(k), quantize(v)
cos, sin = tables(torch.Generator().manual_seed(0), S, D // 2, device="cpu")
lengths = torch.full((B,), S)
x, rows, weight = randn(512, 1024), randn(3, 1024), randn(2048, 1024)
int8, int4 = (QuantizedWeight.from_float(weight, bits, 64) for bits in (8, 4))

def results():
    call = lambda op, *args: OPS[op](*args)
    appended = [k.clone(), v.clone()]
    return torch.utils._pytree.tree_leaves([
        call("rms_norm", x, weight[0], 1e-5),
        call("add_rms_norm", x, x, weight[0], 1e-5),
        call("swiglu", x, x),
        call("rope", q, k[:, :T], cos[:T], sin[:T], False),
        call("kv_append", q, k[:, :T], v[:, :T], cos, sin, *appended, lengths, False),
        appended,
        *(call("attention", some, k, v, True, None, None, False) for some in (q, q[:, :1])),
        *(call("attention", some, k8, v8, True, None, None, False, k_scale, v_scale)
          for some in (q, q[:, :1])),
        *(linear(some, w) for some in (x, rows) for w in (weight, int8, int4)),
    ])

def product():
    return x.float() @ weight.float().t()

def same():
    with use_backend("cpu", strict=True):
        return all(map(torch.equal, results(), expected))

with use_backend("cpu", strict=True):
    expected, expected_product = results(), product()
assert threads() >= 3
"""

ON_ONE_THREAD = """
def told_otherwise():
    torch.set_num_threads(3)
    y = OPS["rms_norm"](x, weight[0], 1e-5)
    torch.set_num_threads(1)
    return torch.equal(y, expected[0])

in_child(lambda: same() and threads() == 1 and told_otherwise())
"""

MULTIPROCESSING = """
import torch.multiprocessing
from torch.utils.data import DataLoader

x, weight = torch.randn(512, 1024), torch.ones(1024)
def norm(x):
    return OPS["rms_norm"](x, weight, 1e-5)

expected = norm(x)

class Norms(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        return norm(x * (i + 1))[0]

def many_threads(worker):
    torch.set_num_threads(3)

signal.alarm(60)
loader = DataLoader(Norms(), 2, num_workers=2, multiprocessing_context="fork",
                    worker_init_fn=many_threads)
found = torch.cat(list(loader))
assert torch.equal(found, torch.stack([norm(x * (i + 1))[0] for i in range(4)]))
with torch.multiprocessing.get_context("fork").Pool(2) as pool:
    assert all(torch.equal(y, expected) for y in pool.map(norm, [x] * 3))
"""

# Steps that were recorded before the fork are replayed.
GENERATE = """
from llama_fast.demo import FOLDER
from llama_fast.generation.generate import generate
from llama_fast.model import Llama
from llama_fast.tokenizer import Tokenizer

model, tokenizer = Llama.from_pretrained(FOLDER), Tokenizer.from_pretrained(FOLDER)

def texts():
    done = generate(model, tokenizer, ["Once", "The"] * 8, max_new_tokens=20, temperature=0)
    return [completion.text for completion in done]

expected = texts()
assert threads() >= 3
in_child(lambda: texts() == expected)
assert texts() == expected
"""

# Takes the place of the OpenMP runtime's function that stops threads.
CANNOT_STOP = "int omp_pause_resource_all(int kind) { return -1; }"


def run(script: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HEAD + script],
        capture_output=True,
        text=True,
        timeout=150,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr


def test_every_op():
    """Torch's own as well. The child has threads of its own, and so has the parent afterwards."""
    check = "lambda: same() and torch.equal(product(), expected_product) and threads() >= 3"
    run(OPS_OF_MANY_THREADS + f"check = {check}\nin_child(check)\nassert check()")


@pytest.mark.skipif(shutil.which("cc") is None, reason="this needs a C compiler")
def test_every_op_where_threads_cannot_be_stopped(tmp_path):
    """Such a runtime believes that they are still there: the child works on one, torch as well
    unless it is told otherwise."""
    library = tmp_path / "cannot_stop.so"
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", library]
    subprocess.run(command, input=CANNOT_STOP, text=True, check=True)
    run(OPS_OF_MANY_THREADS + ON_ONE_THREAD, LD_PRELOAD=str(library))


def test_processes_of_multiprocessing():
    run(MULTIPROCESSING)


def test_a_generation():
    run(GENERATE)
