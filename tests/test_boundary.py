"""Tensors as they cross into C++, with DLPack's C functions and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llama_fast.dispatch import OPS

_cpu = pytest.importorskip("llama_fast._cpu", reason="this needs the C++ module")


class Older:
    """A tensor of a torch that has no DLPack functions in C."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)


class Subclass(torch.Tensor):
    pass


SHAPES = {
    "one row": torch.randn(40),
    "contiguous": torch.randn(2, 1, 3, 2, 40),
    "strided": torch.randn(3, 4, 80)[:, ::2, :40],
    "transposed": torch.randn(2, 3, 5, 40).transpose(1, 2),
    "no rows": torch.randn(0, 40),
}


@pytest.mark.parametrize("wrap", [lambda x: x, Older, lambda x: x.as_subclass(Subclass)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_strides_and_dtypes_cross(shape, dtype, wrap):
    x, weight = SHAPES[shape].to(dtype), torch.randn(40).to(dtype)
    if not SHAPES[shape].is_contiguous():
        x = torch.empty_strided(x.shape, SHAPES[shape].stride(), dtype=dtype).copy_(x)
    y = torch.full(x.shape, torch.nan, dtype=dtype)
    given = wrap(y)
    assert _cpu.rms_norm(wrap(x), wrap(weight), 1e-5, given) is given
    torch.testing.assert_close(y, OPS["rms_norm"].eager(x, weight, 1e-5), rtol=2e-2, atol=2e-2)


def test_bytes_numbers_and_nothing_cross_as_tuples():
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 1, 4, 16, generator=g)
    k, v = (torch.randint(-99, 99, (2, 9, 2, 16), generator=g, dtype=torch.int8) for _ in "kv")
    scales, lengths = torch.rand(2, 9, 2, generator=g), torch.tensor([9, 4])
    results = []
    for wrap in (lambda x: x, Older):
        o, lse = torch.zeros_like(q), torch.empty(0)
        tensors = (
            (wrap(q), wrap(k), wrap(v)),
            (wrap(scales), wrap(scales), None, wrap(o), wrap(lse)),
        )
        assert _cpu.attention(*tensors[0], True, None, wrap(lengths), *tensors[1]) == -1
        results.append(o)
    assert results[0].abs().sum() > 0 and torch.equal(*results)


def test_what_does_not_fit_is_told():
    x, weight = torch.ones(2, 8), torch.ones(8)
    with pytest.raises(TypeError, match="4 arguments are needed, not 3"):
        _cpu.rms_norm(x, weight, 1e-5)
    with pytest.raises(TypeError):
        _cpu.rms_norm(x, weight, "1e-5", x)
    with pytest.raises(AttributeError, match="data_ptr"):
        _cpu.rms_norm(x, 3, 1e-5, x)
    with pytest.raises(AttributeError, match="data_ptr"):
        _cpu.rms_norm(x, None, 1e-5, x)
