"""What attention refuses, and with which words."""

from __future__ import annotations

from torch import Tensor

from ..errors import GradientError, ShapeError
from . import checks, documents, quantized_kv


def no_gradient() -> GradientError:
    return GradientError(
        "attention has no gradient against keys and values in 8 bits, but q requires one: "
        "call it under torch.no_grad(), or give tensors of q's dtype"
    )


def check(
    q, k, v, causal, scale, lengths, need_lse=False, k_scale=None, v_scale=None, cu_seqlens=None
) -> None:
    checks.ndim("attention", "q", q, 4, "(B, T, H, D)")
    checks.ndim("attention", "k", k, 4, "(B, S, K, D)")
    B, _, H, D = q.shape
    _, S, K, _ = k.shape
    quantized_kv.check("attention", q, (B, S, K, D), "k", k, k_scale, "v", v, v_scale)
    check_groups("attention", H, K, D)
    if lengths is not None:
        checks.lengths("attention", lengths, q)
    if cu_seqlens is not None:
        check_documents(q, k, lengths, k_scale, cu_seqlens)


def check_documents(q, k, lengths, k_scale, cu_seqlens) -> None:
    for name, other in (("lengths", lengths), ("k_scale and v_scale", k_scale)):
        if other is not None:
            raise ShapeError(
                f"attention: cu_seqlens and {name} were given; packed documents are whole "
                f"sequences of q's dtype: leave out one of the two"
            )
    documents.check("attention", cu_seqlens, q)
    T, S = q.shape[1], k.shape[1]
    if S != T:
        raise ShapeError(
            f"attention: q has T = {T} tokens and k has S = {S}; with cu_seqlens both hold the "
            "same documents: S must be T"
        )


def check_groups(op: str, H: int, K: int, D: int) -> None:
    if K == 0 or H % K or D == 0:
        raise ShapeError(
            f"{op}: q has H = {H} heads of D = {D} and k has K = {K}; "
            "D must be positive and H a multiple of K > 0"
        )


def check_lengths(lengths: Tensor | None, S: int) -> None:
    """The values, where reading them costs nothing: on the CPU."""
    if lengths is not None and lengths.is_cpu and lengths.numel() and (lengths > S).any():
        row = int(lengths.argmax())
        raise too_long(row, int(lengths[row]), S)


def unfit(row: int, S: int, lengths: Tensor | None, cu_seqlens: Tensor | None) -> ShapeError:
    """What to raise where a kernel has found a value of lengths or cu_seqlens that does not fit."""
    if cu_seqlens is None:
        return too_long(row, int(lengths[row]), S)
    try:
        documents.spans("attention", cu_seqlens, S)
    except ShapeError as error:
        return error
    return ShapeError(f"attention: cu_seqlens was changed while it was read, at index {row}")


def too_long(row: int, length: int, S: int) -> ShapeError:
    return ShapeError(
        f"attention: lengths[{row}] is {length} and k has S = {S} keys; a length is at most S: "
        "pass a longer k and v, or shorter lengths"
    )


def backward_check(grad, q, k, v, o, lse, causal, scale, lengths, cu_seqlens=None) -> None:
    check(q, k, v, causal, scale, lengths, cu_seqlens=cu_seqlens)
    checks.same_kind("attention_backward", "q", q, grad=grad, o=o)
    checks.shape("attention_backward", "grad", grad, q.shape, "q's shape")
    checks.shape("attention_backward", "o", o, q.shape, "q's shape")
    B, T, H, _ = q.shape
    checks.shape("attention_backward", "lse", lse, (B, H, T), "(B, H, T)")


def head_dim_reasons(D: int) -> list[str]:
    """Why no kernel serves heads of D elements, whatever its backend; nothing where one may."""
    return [f"D is {D}; it must be a multiple of 8 up to 256"] if D % 8 or D > 256 else []
