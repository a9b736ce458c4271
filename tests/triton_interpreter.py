"""Triton's interpreter, made to round as GPUs do, and quicker."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


def behave_as_a_gpu() -> None:
    """Corrects three things that Triton's interpreter (3.6 to 3.9) does otherwise than compiled
    code, so that a kernel is judged by the arithmetic that it will have:

    - float32 → bfloat16 cuts the low bits off; GPUs round to nearest even;
    - a whole number → bfloat16 takes the number for the bits;
    - tl.dot of bfloat16 multiplies their bits as if they were whole numbers.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if hasattr(InterpreterBuilder.cast_impl, "rounds"):
        return
    cast = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source.is_int() and target == tl.bfloat16:
            src, source = cast(self, src, tl.float32), tl.float32
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
            data = rounded.view(torch.int16).numpy().view(np.uint16)
        elif (source, target) == (tl.bfloat16, tl.float32):
            data = (src.data.astype(np.uint32) << 16).view(np.float32)
        else:
            return cast(self, src, dst_type)
        return TensorHandle(data.reshape(src.data.shape), target)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        a, b = (cast_impl(self, x, tl.float32).data for x in (a, b))
        return TensorHandle(np.matmul(a, b) + d.data, d.dtype.scalar)

    cast_impl.rounds = True
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot


def be_quick() -> None:
    """Two things are done once that the interpreter does at every call: it looks through Triton's
    language for what to replace at each call of a function, here where a kernel is launched; and
    it lists all dtypes to find numpy's of one. They are half of its time."""
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction

    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    patch, np_dtype = interpreter._patch_lang, interpreter._get_np_dtype
    known: dict[str, np.dtype] = {}

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    def get_np_dtype(dtype: tl.dtype) -> np.dtype:
        name = dtype.scalar.name
        if name not in known:
            known[name] = np_dtype(dtype)
        return known[name]

    InterpretedFunction.__call__ = call
    interpreter._patch_lang = lambda kernel: patch(everything)
    interpreter._get_np_dtype = get_np_dtype
