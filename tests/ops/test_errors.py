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
int8, scales = k[:1].to(torch.int8), torch.ones(1, 3, 2)
meta = torch.device("meta")


def rope_with(q=q, k=k, cos=cos, sin=sin):
    return lambda: rope(q, k, cos, sin)


def append_with(**changed):
    given = {"q": q, "k": k, "v": k, "cos": cos, "sin": sin}
    given |= {"k_cache": cache, "v_cache": cache, "lengths": lengths}
    return lambda: kv_append(**(given | changed))


def packed_with(ends, **changed):
    given = {"q": q[:1], "k": k[:1], "v": k[:1], **changed}
    return lambda: attention(**given, cu_seqlens=torch.tensor(ends, dtype=torch.int32))


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
    (
        "attention, cu_seqlens and lengths",
        packed_with([0, 3], lengths=lengths[:1]),
        r"attention: cu_seqlens and lengths were given.*leave out one",
    ),
    (
        "attention, cu_seqlens and int8",
        packed_with([0, 3], k=int8, v=int8, k_scale=scales, v_scale=scales),
        r"attention: cu_seqlens and k_scale and v_scale were given",
    ),
    ("attention, cu_seqlens' shape", packed_with([]), r"cu_seqlens has shape \(0,\).*\(n \+ 1,\)"),
    (
        "attention, cu_seqlens' dtype",
        lambda: attention(q[:1], k[:1], k[:1], cu_seqlens=torch.tensor([0, 3])),
        r"attention: cu_seqlens is torch.int64.*\.to\('cpu', torch.int32\)",
    ),
    (
        "attention, cu_seqlens and a batch",
        packed_with([0, 3], q=q, k=k, v=k),
        r"attention: packed documents \(cu_seqlens\) lie in one row, but there are B = 2",
    ),
    (
        "attention, cu_seqlens against a cache",
        packed_with([0, 3], k=cache[:1], v=cache[:1]),
        r"attention: q has T = 3 tokens and k has S = 9; with cu_seqlens",
    ),
    ("attention, cu_seqlens begins", packed_with([1, 3]), r"cu_seqlens\[0\] is 1"),
    ("attention, cu_seqlens falls", packed_with([0, 2, 1, 3]), "falls from 2 to 1 at index 2"),
    ("attention, cu_seqlens ends", packed_with([0, 2]), "ends with 2 and there are T = 3 tokens"),
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
