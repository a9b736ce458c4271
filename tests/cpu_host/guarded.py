"""Random calls of the CPU kernels whose every tensor, given or made, lies at the very start or the
very end of pages of its own between pages that nobody may touch, in every instruction set here.
tests/cpu_host/test_guarded.py starts this in a process of its own: a kernel that leaves its tensors
ends it, and the last line says in which call.

With the path of a module built with sanitizers, tensors are allocations of their exact size
instead.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import math
import mmap
import random
import sys
from pathlib import Path

import torch

from llama_fast.backends import cpu
from llama_fast.dispatch import OPS, Op, use_backend
from llama_fast.ops import QuantizedWeight
from llama_fast.ops.quantized_kv import quantize
from llama_fast.ops.rope import tables

from .emulation import forget_launchers, load_module

PAGE = mmap.PAGESIZE
CALLS = 24  # of each op in each instruction set
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class Memory:
    """Where the tensors of a call lie, until it is freed."""

    def __init__(self, guarded: bool, draw: random.Random) -> None:
        self.guarded, self.draw = guarded, draw
        self.mapped: list[tuple[int, int]] = []

    def take(self, nbytes: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor of one dim in so many bytes."""
        if not self.guarded or not nbytes:
            return torch.empty(nbytes // dtype.itemsize, dtype=dtype)
        inside = -(-nbytes // PAGE) * PAGE
        start = _libc.mmap(None, inside + 2 * PAGE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        assert start not in (None, ctypes.c_void_p(-1).value), "mmap failed"
        self.mapped.append((start, inside + 2 * PAGE))
        assert _libc.mprotect(start + PAGE, inside, mmap.PROT_READ | mmap.PROT_WRITE) == 0
        at = start + PAGE + self.draw.choice((0, inside - nbytes))
        buffer = (ctypes.c_char * nbytes).from_address(at)
        return torch.frombuffer(buffer, dtype=dtype)

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        """x in such memory, of the span that its strides need and no more."""
        span = 0
        if x.numel():
            span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        memory = self.take(span * x.element_size(), x.dtype)
        return memory.as_strided(x.shape, x.stride()).copy_(x)

    def maker(self, like: torch.Tensor, shape=None):
        """Stands for `cpu._maker`."""
        shape = tuple(like.shape if shape is None else shape)
        nbytes = math.prod(shape) * like.element_size()
        return lambda: self.take(nbytes, like.dtype).view(shape)

    def free(self) -> None:
        for start, nbytes in self.mapped:
            _libc.munmap(start, nbytes)
        self.mapped.clear()


class Arguments:
    """Draws the arguments of one call after another."""

    def __init__(self, name: str, seed: int) -> None:
        self.draw = random.Random(f"{name} {seed}")
        self.generator = torch.Generator().manual_seed(seed)

    def size(self, most: int) -> int:
        return self.draw.choice((1, 2, self.draw.randint(1, most), self.draw.randint(1, most)))

    def randn(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Of any strides but 1 in the last dim: parts of larger tensors."""
        wider = [n + self.draw.choice((0, 0, 1, 3)) for n in shape]
        x = torch.randn(wider, generator=self.generator).to(dtype)
        for dim, n in enumerate(shape):
            x = x.narrow(dim, self.draw.randint(0, wider[dim] - n), n)
        return x

    def heads_first(self, x: torch.Tensor) -> torch.Tensor:
        """(B,T,K,D) laid out as a cache is, half of the time."""
        return x.transpose(1, 2).contiguous().transpose(1, 2) if self.draw.random() < 0.5 else x

    def lengths(self, B: int, most: int) -> torch.Tensor:
        least = torch.iinfo(torch.int64).min
        drawn = [self.draw.choice((most, self.draw.randint(-9, most), 0)) for _ in range(B)]
        if self.draw.random() < 0.2:
            drawn[0] = self.draw.choice((least, least + 3, -(2**32)))
        return torch.tensor(drawn)

    def of(self, name: str, dtype: torch.dtype) -> tuple:
        return getattr(self, "_" + name)(dtype)

    def _rows(self, dtype, count: int) -> list[torch.Tensor]:
        shape = [self.size(5) for _ in range(self.draw.randint(0, 2))] + [self.size(300)]
        return [self.randn(*shape, dtype=dtype) for _ in range(count)]

    def _rms_norm(self, dtype):
        (x,) = self._rows(dtype, 1)
        return x, torch.randn(x.shape[-1], generator=self.generator).to(dtype), 1e-5

    def _add_rms_norm(self, dtype):
        x, residual = self._rows(dtype, 2)
        return x, residual, torch.randn(x.shape[-1], generator=self.generator).to(dtype), 1e-5

    def _swiglu(self, dtype):
        return tuple(self._rows(dtype, 2))

    def _heads(self, dtype, multiple: int):
        B, T, K, G = self.size(3), self.size(20), self.size(3), self.size(4)
        D = multiple * self.size(160 // multiple)
        sizes = (K * G, K, K)
        return [self.randn(B, T, n, D, dtype=dtype) for n in sizes]

    def _rope(self, dtype):
        q, k, _ = self._heads(dtype, 2)
        cos, sin = tables(self.generator, q.shape[1], q.shape[-1] // 2, device="cpu")
        return q, k, cos, sin, self.draw.random() < 0.5

    def _kv_append(self, dtype):
        q, k, v = self._heads(dtype, 2)
        B, T, K, D = k.shape
        S = T + self.size(9)
        P = S + self.size(3) - 1
        cos, sin = tables(self.generator, P, D // 2, device="cpu")
        caches = [self.heads_first(self.randn(B, S, K, D, dtype=dtype)) for _ in "kv"]
        return q, k, v, cos, sin, *caches, self.lengths(B, S), self.draw.random() < 0.5

    def _kv_append_quantized(self, dtype):
        *tokens, k, v, lengths, interleaved = self._kv_append(dtype)
        (k, k_scale), (v, v_scale) = quantize(k.float()), quantize(v.float())
        return *tokens, k, v, lengths, interleaved, k_scale, v_scale

    def _attention(self, dtype):
        q, _, _ = self._heads(dtype, 8)
        B, T, H, D = q.shape
        K = self.draw.choice([k for k in range(1, H + 1) if H % k == 0])
        S = T + self.draw.choice((0, self.size(300)))
        k, v = (self.heads_first(self.randn(B, S, K, D, dtype=dtype)) for _ in "kv")
        lengths = self.draw.choice((None, self.lengths(B, S)))
        return q, k, v, self.draw.random() < 0.7, None, lengths, self.draw.random() < 0.3

    def _attention_quantized(self, dtype):
        q, k, v, causal, scale, lengths, _ = self._attention(dtype)
        (k, k_scale), (v, v_scale) = quantize(k.float()), quantize(v.float())
        return q, k, v, causal, scale, lengths, False, k_scale, v_scale

    def _matrix(self, dtype, multiple: int = 1):
        C_in, C_out = multiple * self.size(200 // multiple), multiple * self.size(100 // multiple)
        x = self.randn(self.draw.choice((1, self.size(60))), C_in, dtype=dtype)
        weight = torch.randn(C_out, C_in, generator=self.generator).to(dtype)
        return x, weight

    def _linear(self, dtype):
        return self._matrix(dtype)

    def _linear_swiglu(self, dtype):
        return *self._matrix(dtype, 2), None, None, 0, 0, 0, "swiglu"

    def _linear_backward_x(self, dtype):
        x, weight = self._matrix(dtype)
        return self.randn(len(x), len(weight), dtype=dtype), weight

    def _linear_backward_weight(self, dtype):
        x, weight = self._matrix(dtype)
        return self.randn(len(x), len(weight), dtype=dtype), x

    def _linear_quantized(self, dtype, multiple: int = 1):
        x, weight = self._matrix(dtype, multiple)
        form = self.draw.choice((4, 8)), self.draw.choice((32, 64, 128)), self.draw.random() < 0.5
        return x, *QuantizedWeight.from_float(weight.float(), *form).arguments

    def _linear_backward_x_quantized(self, dtype):
        x, *weight, C_out, bits, group_size = self._linear_quantized(dtype)
        grad = self.randn(len(x), C_out, dtype=dtype)
        return grad, *weight, x.shape[-1], bits, group_size

    def _linear_swiglu_quantized(self, dtype):
        return *self._linear_quantized(dtype, 2), "swiglu"


def op_of(form: str) -> Op:
    return OPS[form.removesuffix("_quantized").replace("linear_swiglu", "linear")]


FORMS = [name.removeprefix("_") for name in vars(Arguments) if name[0] == "_" != name[1]]
FORMS = [form for form in FORMS if form not in ("rows", "heads", "matrix")]


def check(name: str, found, expected, dtype: torch.dtype) -> None:
    """That a call computes what it should, roughly: how well is told elsewhere."""
    loose = 0.05 if dtype is not torch.float32 else 1e-3
    for a, b in zip(found, expected, strict=True):
        if a.is_floating_point() and a.shape == b.shape:
            size = b[torch.isfinite(b)].abs().amax() if torch.isfinite(b).any() else 0
            torch.testing.assert_close(a, b, rtol=loose, atol=loose * max(float(size), 1), msg=name)


def described(args: tuple) -> list:
    return [(*a.shape, a.stride()) if isinstance(a, torch.Tensor) else a for a in args]


def as_list(result) -> list[torch.Tensor]:
    return [*result] if isinstance(result, tuple) else [result]


def main() -> None:
    own = load_module("sanitized._cpu", Path(sys.argv[1])) if len(sys.argv) > 1 else None
    if own is not None:
        cpu._cpu = own
    draw, count = random.Random(0), 0
    memory = Memory(own is None, draw)
    cpu._maker = memory.maker
    for isa in cpu.isas():
        with cpu.use_isa(isa), use_backend("cpu", strict=True), torch.no_grad():
            for seed in range(CALLS if own is None else CALLS // 2):  # a tenth as fast
                for name in FORMS:
                    op = op_of(name)
                    dtype = DTYPES[seed % 3]
                    torch.set_num_threads(2 if seed % 4 == 0 else 1)  # as waiting takes long
                    args = Arguments(name, seed).of(name, dtype)
                    if op.explain(*args).reasons["cpu"]:
                        continue
                    print(f"{isa} {name} {dtype} seed {seed}: {described(args)}", flush=True)
                    forget_launchers()  # they make outputs in memory of the call before
                    given = [memory.copy(a) if isinstance(a, torch.Tensor) else a for a in args]
                    found = [x.clone() for x in as_list(op(*given))]
                    check(name, found, as_list(op.eager(*args)), dtype)
                    del given
                    memory.free()
                    count += 1
    print(f"{count} calls")


if __name__ == "__main__":
    sys.exit(main())
