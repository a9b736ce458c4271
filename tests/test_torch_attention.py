"""Our attention as torch's flash attention: see llama_fast/engines/torch_attention.py."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.nn.functional import scaled_dot_product_attention

from llama_fast.dispatch import wrapped_launches

if not hasattr(torch_attention, "register_flash_attention_impl"):
    pytest.skip("needs torch 2.13, where flash attention can be replaced", allow_module_level=True)

from torch.nn.attention.varlen import AuxRequest, varlen_attn, varlen_attn_out

from llama_fast.engines import torch_attention as engine
from llama_fast.engines import torch_varlen

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
OPERATOR = "aten::_scaled_dot_product_flash_attention_for_cpu"


@contextmanager
def active():
    """Inside the block our attention is torch's; gives the names of the ops launched there."""
    launched = []

    def watch(op, backend, launch):
        def run(*args):
            launched.append(op.name)
            return launch(*args)

        return run

    torch_attention.activate_flash_attention_impl("llama_fast")
    try:
        with wrapped_launches(watch):
            yield launched
    finally:
        torch_attention.restore_flash_attention_impl(_raise_warn=False)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def heads(dtype=torch.float32, H=4, K=4, T=24, S=24, D=16) -> list[Tensor]:
    shapes = ((2, H, T, D), (2, K, S, D), (2, K, S, D))
    return [random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def with_gradients(inputs: list[Tensor], **kwargs) -> list[Tensor]:
    """The result, and the gradients of q, k and v."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    o = scaled_dot_product_attention(*inputs, **kwargs)
    gradients = torch.autograd.grad(o, inputs, random(*o.shape, dtype=o.dtype, seed=9))
    return [o.detach(), *gradients]


def close(given: Tensor, expected: Tensor, tolerance: float) -> None:
    size = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(given, expected, rtol=0, atol=tolerance * size)


SERVED = {
    "causal": (heads, {"is_causal": True}),
    "not causal": (heads, {}),
    "scale": (heads, {"scale": 0.7}),
    "grouped heads": (lambda dtype: heads(dtype, K=2), {"is_causal": True, "enable_gqa": True}),
    "one query": (lambda dtype: heads(dtype, T=1), {}),
    "causal, one query": (lambda dtype: heads(dtype, T=1), {"is_causal": True}),
    "causal, fewer queries than keys": (lambda dtype: heads(dtype, T=10), {"is_causal": True}),
    "more queries than keys": (lambda dtype: heads(dtype, S=10), {}),
    "tokens before heads": (
        lambda dtype: [x.transpose(1, 2).contiguous().transpose(1, 2) for x in heads(dtype)],
        {"is_causal": True},
    ),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", SERVED)
def test_a_call_goes_through_the_op_both_ways(case, dtype):
    make, kwargs = SERVED[case]
    own = with_gradients(make(dtype), **kwargs)
    with active() as launched:
        ours = with_gradients(make(dtype), **kwargs)
    assert launched == ["attention", "attention_backward"]
    for given, expected in zip(ours, own, strict=True):
        close(given, expected, TOLERANCE[dtype])
        assert given.stride() == expected.stride()


def other_strides(dtype):
    return [x.mT.contiguous().mT for x in heads(dtype)]


UNSERVED = {
    "mask": (heads, {"attn_mask": torch.ones(24, 24, dtype=torch.bool).triu(-3).tril(3)}),
    "mask to add": (heads, {"attn_mask": random(24, 24)}),
    "dropout": (heads, {"dropout_p": 0.3}),
    "head dim": (lambda dtype: heads(dtype, D=20), {"is_causal": True}),
    "float64": (lambda dtype: heads(torch.float64), {"is_causal": True}),
    "causal, more queries than keys": (lambda dtype: heads(dtype, S=10), {"is_causal": True}),
    "no keys": (lambda dtype: heads(dtype, S=0), {}),
    "strided elements": (other_strides, {"is_causal": True}),
}


@pytest.mark.parametrize("case", UNSERVED)
def test_any_other_call_is_torchs_to_the_bit(case):
    make, kwargs = UNSERVED[case]
    torch.manual_seed(0)
    own = with_gradients(make(torch.float32), **kwargs)
    with active() as launched:
        torch.manual_seed(0)
        ours = with_gradients(make(torch.float32), **kwargs)
    assert not launched
    assert all(map(torch.equal, ours, own))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_every_gradient_mode(mode):
    inputs = [x.requires_grad_() for x in heads()]
    with mode():
        own = scaled_dot_product_attention(*inputs, is_causal=True)
        with active() as launched:
            ours = scaled_dot_product_attention(*inputs, is_causal=True)
    assert launched == ["attention"]
    assert ours.requires_grad == own.requires_grad
    close(ours, own, 1e-5)


def test_autocast():
    inputs = heads()
    with torch.autocast("cpu", torch.bfloat16):
        own = scaled_dot_product_attention(*inputs, is_causal=True)
        with active() as launched:
            ours = scaled_dot_product_attention(*inputs, is_causal=True)
    assert launched == ["attention"] and ours.dtype is torch.bfloat16
    close(ours, own, TOLERANCE[torch.bfloat16])


def test_vmap():
    q, k, v = (random(3, 2, 4, 24, 16, seed=i) for i in range(3))
    own = torch.vmap(scaled_dot_product_attention)(q, k, v)
    with active() as launched:
        ours = torch.vmap(scaled_dot_product_attention)(q, k, v)
    assert launched and set(launched) == {"attention"}
    close(ours, own, 1e-5)


def test_torch_compile():
    """Compiled before the activation or after it, as the operator is looked up at each call."""

    def loss(q, k, v):
        return (scaled_dot_product_attention(q * 2, k, v, is_causal=True) ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True)
    found = {}
    for name in ("own", "ours", "restored"):
        inputs = [x.requires_grad_() for x in heads()]
        if name == "ours":
            with active() as launched:
                found[name] = torch.autograd.grad(compiled(*inputs), inputs)
            assert launched == ["attention", "attention_backward"]
        else:
            found[name] = torch.autograd.grad(compiled(*inputs), inputs)
    for own, ours, restored in zip(*found.values(), strict=True):
        close(ours, own, 1e-5)
        assert torch.equal(own, restored)


def test_activated_and_restored_again_and_again():
    kernel = str(torch.library.get_kernel(OPERATOR, "CPU"))
    own = with_gradients(heads(), is_causal=True)
    for _ in range(2):
        with active(), active() as launched:
            scaled_dot_product_attention(*heads(), is_causal=True)
            assert launched == ["attention"]
            assert torch_attention.current_flash_attention_impl() == "llama_fast"
            assert str(torch.library.get_kernel(OPERATOR, "CPU")) != kernel
        assert torch_attention.current_flash_attention_impl() is None
        assert str(torch.library.get_kernel(OPERATOR, "CPU")) == kernel
        assert all(map(torch.equal, with_gradients(heads(), is_causal=True), own))
        with pytest.raises(RuntimeError, match="no kernel"):
            torch.library.get_kernel("aten::_flash_attention_forward", "CPU")


def test_a_gradient_whose_forward_pass_was_the_others():
    """Forward and backward passes mean the same log-sum-exp, so either may be torch's."""
    own = with_gradients(heads(), is_causal=True)
    inputs = [x.requires_grad_() for x in heads()]
    with active():
        o = scaled_dot_product_attention(*inputs, is_causal=True)
    of_ours = torch.autograd.grad(o, inputs, random(*o.shape, seed=9))
    o = scaled_dot_product_attention(*inputs, is_causal=True)
    with active():
        by_ours = torch.autograd.grad(o, inputs, random(*o.shape, seed=9))
    for expected, *given in zip(own[1:], of_ours, by_ours, strict=True):
        for x in given:
            close(x, expected, 1e-5)


def test_a_model_that_knows_nothing_of_it():
    """Of torch's own modules; training, as its inference does without the operator."""
    torch.manual_seed(0)
    net = torch.nn.TransformerEncoderLayer(32, 2, 64, dropout=0, batch_first=True)
    x = random(2, 12, 32)
    own = net(x)
    with active() as launched:
        ours = net(x)
    assert launched == ["attention"]
    close(ours, own, 1e-5)


# varlen_attn

CU_SEQLENS = torch.tensor([0, 5, 5, 17, 40], dtype=torch.int32)


def rows(tokens=40, H=4, K=2, D=16, dtype=torch.float32) -> list[Tensor]:
    shapes = ((40, H, D), (tokens, K, D), (tokens, K, D))
    return [random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def one_by_one(q, k, v, cu_q, cu_k, causal=True) -> Tensor:
    """Each sequence by itself; its queries are the last of its keys."""
    results = []
    for i in range(len(cu_q) - 1):
        own = q[cu_q[i] : cu_q[i + 1]]
        keys, values = k[cu_k[i] : cu_k[i + 1]], v[cu_k[i] : cu_k[i + 1]]
        T, S = len(own), len(keys)
        if T:
            seen = torch.ones(T, S, dtype=torch.bool).tril(S - T) if causal else None
            batch = (x.transpose(0, 1)[None] for x in (own, keys, values))
            o = scaled_dot_product_attention(*batch, attn_mask=seen, enable_gqa=True)
            results.append(o[0].transpose(0, 1))
    return torch.cat(results)


def varlen(q, k, v, cu_q, cu_k, causal=True, **kwargs):
    window = (-1, 0) if causal else (-1, -1)
    return varlen_attn(q, k, v, cu_q, cu_k, 23, 40, window_size=window, enable_gqa=True, **kwargs)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_varlen_attention_both_ways(packed, causal, dtype):
    cu_k = CU_SEQLENS if packed else torch.tensor([0, 8, 8, 30, 53], dtype=torch.int32)
    found = []
    for attend in (one_by_one, varlen):
        inputs = [x.requires_grad_() for x in rows(int(cu_k[-1]), dtype=dtype)]
        with active() as launched:
            o = attend(*inputs, CU_SEQLENS, cu_k, causal=causal)
            gradients = torch.autograd.grad(o, inputs, random(*o.shape, dtype=dtype, seed=9))
        found.append([o, *gradients])
    calls = 1 if packed else 3  # of four sequences, one is empty
    assert launched == ["attention"] * calls + ["attention_backward"] * calls
    for expected, given in zip(*found, strict=True):
        close(given, expected, TOLERANCE[dtype])


def test_varlen_attention_over_pages():
    """Keys in pages of 4 that lie anywhere in a pool, the last one of a sequence filled in part."""
    used = torch.tensor([5, 0, 14, 23], dtype=torch.int32)
    starts = [0, 5, 5, 19, 42]
    q, k, v = rows(42)
    pages = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:24].view(4, 6)
    pool = [torch.full((40, 4, 2, 16), float("nan")) for _ in range(2)]
    for x, into in zip((k, v), pool, strict=True):
        for i, count in enumerate(used.tolist()):
            for s in range(count):
                into[pages[i, s // 4], s % 4] = x[starts[i] + s]
    expected = one_by_one(q, k, v, CU_SEQLENS, starts)
    paged = {"seqused_k": used, "block_table": pages.to(torch.int32)}
    with active() as launched:
        given = varlen(q, *pool, CU_SEQLENS, None, **paged)
        out = torch.empty_like(q)
        window = {"window_size": (-1, 0), "enable_gqa": True}
        varlen_attn_out(out, q, *pool, CU_SEQLENS, None, 23, 40, **window, **paged)
    assert set(launched) == {"attention"}
    close(given, expected, 1e-5)
    assert torch.equal(out, given)


def test_varlen_log_sum_exp():
    q, k, v = rows(K=4)
    with active():
        _, lse = varlen(q, k, v, CU_SEQLENS, CU_SEQLENS, return_aux=AuxRequest(lse=True))
    assert lse.dtype is torch.float32 and lse.shape == (4, 40)
    last = torch.einsum("hd,shd->hs", q[39], k[17:]) / 4  # the last query of the last sequence
    close(lse[:, 39], last.logsumexp(-1), 1e-5)


def test_varlen_under_torch_compile():
    inputs = rows()
    with active() as launched:
        eager = varlen(*inputs, CU_SEQLENS, CU_SEQLENS)
        compiled = torch.compile(varlen, fullgraph=True)(*inputs, CU_SEQLENS, CU_SEQLENS)
    assert launched == ["attention"] * 2
    close(compiled, eager, 1e-6)


def test_a_window_longer_than_the_sequences_is_none_and_a_shorter_one_is_refused():
    inputs = rows()
    arguments = (*inputs, CU_SEQLENS, CU_SEQLENS, 23, 23)
    with active():
        expected = varlen_attn(*arguments, window_size=(-1, 0), enable_gqa=True)
        given = varlen_attn(*arguments, window_size=(22, 0), enable_gqa=True)
        assert torch.equal(given, expected)
        with pytest.raises(NotImplementedError, match="window of 21 keys before each query"):
            varlen_attn(*arguments, window_size=(21, 0), enable_gqa=True)


def test_without_us_torch_has_no_varlen_attention_on_a_cpu():
    with active():
        varlen(*rows(), CU_SEQLENS, CU_SEQLENS)
    with pytest.raises(NotImplementedError, match="aten::_flash_attention_forward"):
        varlen(*rows(), CU_SEQLENS, CU_SEQLENS)


# What a GPU would call, here with tensors of the CPU, for which torch has no such kernels.


def refuse(keyset, reasons, *args, **kwargs):
    raise NotImplementedError("; ".join(reasons))


@pytest.mark.parametrize("causal", [True, False])
def test_the_operators_of_a_gpu(causal):
    q, k, v = heads(torch.bfloat16)
    own = with_gradients([q, k, v], is_causal=causal)
    operator = torch.ops.aten._scaled_dot_product_flash_attention.default
    o, lse, *rest = engine.cuda_forward(refuse, None, q, k, v, 0.0, causal)
    expected = operator(*(x.to("meta") for x in (q, k, v)), 0.0, causal)
    for given, meta in zip((o, lse, *rest), expected, strict=True):
        if isinstance(meta, Tensor):
            assert (given.shape, given.dtype, given.stride()) == (
                (meta.shape, meta.dtype, meta.stride())
            )
        else:
            assert given == meta
    grad = random(*o.shape, dtype=o.dtype, seed=9)
    of_dropout = rest[4], rest[5]
    gradients = engine.cuda_backward(
        refuse, None, grad, q, k, v, o, lse, None, None, 24, 24, 0.0, causal, *of_dropout
    )
    for given, wanted in zip((o, *gradients), own, strict=True):
        close(given, wanted, TOLERANCE[torch.bfloat16])
        assert given.stride() == q.stride()
    with pytest.raises(NotImplementedError, match=r"dropout_p is 0\.1"):
        engine.cuda_forward(refuse, None, q, k, v, 0.1, causal)


def test_keys_of_a_cache_on_a_gpu_are_torchs():
    """Their values cannot be read without waiting for the GPU."""
    q = torch.empty(40, 4, 16, device="meta")
    cu_q, cu_k = (torch.empty(5, dtype=torch.int32, device="meta") for _ in range(2))
    reasons = torch_varlen._layout_reasons(q, cu_q, torch_varlen.Keys(cu_k, used=cu_k))
    assert reasons == ["keys other than those of the queries' own sequences"]
    assert not torch_varlen._layout_reasons(q, CU_SEQLENS, torch_varlen.Keys(CU_SEQLENS))
