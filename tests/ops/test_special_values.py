"""NaN, infinity and the ends of the range through the elementwise kernels."""

from __future__ import annotations

import math

import pytest
import torch

from llama_fast import add_rms_norm, rms_norm, swiglu

from .backends import BACKENDS, device, on

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTH = 75  # whole vectors, pairs of them and a rest, whatever the width


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with on(request.param), torch.device(device(request.param)):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, 40, LENGTH - 1])
def test_swiglu(dtype, at):
    big = torch.finfo(dtype).max
    for gate, up, expected in [
        (math.nan, 1.0, math.nan),
        (1.0, math.nan, math.nan),
        (math.inf, 2.0, math.inf),
        (2.0, -math.inf, -math.inf),
        (big, 0.5, big / 2),
        (-big, 1.0, 0.0),
        (-200.0, 100.0, 0.0),
        (0.0, 3.0, 0.0),
    ]:
        x, y = torch.ones(LENGTH, dtype=dtype), torch.ones(LENGTH, dtype=dtype)
        x[at], y[at] = gate, up
        h = swiglu(x, y)
        torch.testing.assert_close(
            h[at].item(), expected, rtol=torch.finfo(dtype).eps, atol=1e-30, equal_nan=True
        )
        assert (h == h[(at + 1) % LENGTH]).sum() == LENGTH - 1, f"{gate} reached its neighbours"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_norms_keep_a_bad_row_to_itself(dtype, value):
    x, weight = torch.ones(3, LENGTH, dtype=dtype), torch.ones(LENGTH, dtype=dtype)
    x[1, 33] = value
    total = x + 1
    for y in (rms_norm(x, weight), *add_rms_norm(x, torch.ones_like(x), weight)):
        assert torch.isfinite(y[[0, 2]]).all() and not torch.isfinite(y[1, 33])
    torch.testing.assert_close(
        add_rms_norm(x, torch.ones_like(x), weight)[1], total, rtol=0, atol=0, equal_nan=True
    )
