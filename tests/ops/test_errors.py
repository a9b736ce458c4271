"""Bad input to an op: each refusal names the argument, what it is and what it must be."""

from __future__ import annotations

import pytest
import torch

from llama_fast import add_rms_norm, attention, kv_append, rms_norm, rope, swiglu
from llama_fast.errors import GradientError, ShapeError

f32, bf16 = torch.float32, torch.bfloat16
x, w = torch.ones(3, 8), torch.ones(8)
q, k = torch.ones(2, 3, 4, 8), torch.ones(2, 3, 2, 8)
cos = sin = torch.ones(3, 4)
cache, lengths = torch.ones(2, 9, 2, 8), torch.tensor([3, 3])
meta = torch.device("meta")


def rope_with(q=q, k=k, cos=cos, sin=sin):
    return lambda: rope(q, k, cos, sin)


def append_with(**changed):
    given = {"q": q, "k": k, "v": k, "cos": cos, "sin": sin}
    given |= {"k_cache": cache, "v_cache": cache, "lengths": lengths}
    return lambda: kv_append(**(given | changed))


BAD = [
    ("rms_norm, dtypes", lambda: rms_norm(x, w.to(bf16)), "weight is torch.bfloat16 and x is"),
    ("rms_norm, devices", lambda: rms_norm(x, w.to(meta)), "weight is on meta and x on cpu"),
    ("rms_norm, whole numbers", lambda: rms_norm(x.long(), w.long()), "x is torch.int64"),
    ("rms_norm, weight", lambda: rms_norm(x, w[:7]), r"weight has shape \(7,\).*\(C,\) = \(8,\)"),
    ("rms_norm, a scalar", lambda: rms_norm(w[0], w), r"x has shape \(\); it must be \(\.\.\., C"),
    (
        "add_rms_norm, residual",
        lambda: add_rms_norm(x, x[:2], w),
        r"residual has shape \(2, 8\).*x's shape = \(3, 8\)",
    ),
    ("add_rms_norm, dtypes", lambda: add_rms_norm(x, x.half(), w), "residual is torch.float16"),
    ("add_rms_norm, devices", lambda: add_rms_norm(x, x.to(meta), w), "residual is on meta"),
    ("swiglu, up", lambda: swiglu(x, x[:, :4]), r"up has shape \(3, 4\).*gate's shape = \(3, 8\)"),
    ("swiglu, dtypes", lambda: swiglu(x, x.double()), "up is torch.float64 and gate is"),
    ("swiglu, devices", lambda: swiglu(x, x.to(meta)), "up is on meta and gate on cpu"),
    ("swiglu, a scalar", lambda: swiglu(w[0], w[0]), r"gate has shape \(\)"),
    ("rope, q's dims", rope_with(q=x), r"q has shape \(3, 8\); it must be \(B, T, H, D\)"),
    ("rope, k's head dim", rope_with(k=k[..., :6]), r"k has shape.*\(B, T, K, D\) = \(2, 3, 2, 8"),
    ("rope, an odd head dim", rope_with(q=q[..., :7], k=k[..., :7]), "D = 7; it must be even"),
    ("rope, full tables", rope_with(cos=torch.ones(3, 8)), r"cos has.*\(T, D/2\) or \(B, T, D/2"),
    ("rope, rows of tables", rope_with(cos=torch.ones(3, 3, 4)), r"\(B, T, D/2\) = \(2, 3, 4\)"),
    ("rope, sin", rope_with(sin=torch.ones(2, 4)), r"sin has shape \(2, 4\); it must be cos's"),
    ("rope, tables' dtype", rope_with(cos=cos.half()), "cos is torch.float16.*torch.float32"),
    ("rope, tables' device", rope_with(sin=sin.to(meta)), "sin is on meta and q on cpu"),
    ("rope, dtypes", rope_with(k=k.to(bf16)), "k is torch.bfloat16 and q is torch.float32"),
    ("kv_append, v", append_with(v=k[:, :2]), r"v has shape \(2, 2, 2, 8\).*k's shape"),
    ("kv_append, cache's dims", append_with(k_cache=x), r"k_cache has shape \(3, 8\); it must be"),
    (
        "kv_append, cache's heads",
        append_with(k_cache=torch.ones(2, 9, 3, 8)),
        r"k_cache has shape \(2, 9, 3, 8\); it must be \(B, S, K, D\) = \(2, 9, 2, 8\)",
    ),
    ("kv_append, caches", append_with(v_cache=cache[:, :8]), "v_cache has.*k_cache's shape"),
    ("kv_append, cache's dtype", append_with(k_cache=cache.to(bf16)), "k_cache is torch.bfloat16"),
    ("kv_append, tables", append_with(cos=torch.ones(2, 3, 4)), r"cos has.*\(P, D/2\)"),
    ("kv_append, lengths", append_with(lengths=lengths[:1]), r"lengths has shape \(1,\).*\(B,\)"),
    ("kv_append, lengths' dtype", append_with(lengths=lengths.int()), "lengths is torch.int32"),
    ("kv_append, lengths' device", append_with(lengths=lengths.to(meta)), "lengths is .* on meta"),
    (
        "attention, lengths",
        lambda: attention(q, k, k, lengths=lengths[:1]),
        r"attention: lengths has shape \(1,\).*\(B,\) = \(2,\)",
    ),
    (
        "attention, lengths' dtype",
        lambda: attention(q, k, k, lengths=lengths.int()),
        r"attention: lengths is torch.int32.*int64 on cpu.*\.to\('cpu', torch.int64\)",
    ),
]


@pytest.mark.parametrize(("call", "says"), [pytest.param(*bad[1:], id=bad[0]) for bad in BAD])
def test_bad_input_is_refused_in_words(call, says):
    with pytest.raises(ShapeError, match=says):
        call()


@pytest.mark.parametrize("name", ["cos", "sin"])
def test_rope_refuses_a_gradient_of_its_tables(name):
    table = cos.clone().requires_grad_()
    with pytest.raises(GradientError, match=rf"{name} requires a gradient.*{name}\.detach\(\)"):
        rope_with(**{name: table})()
